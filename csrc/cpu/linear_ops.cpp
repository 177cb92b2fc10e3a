// A group of slim linears over one input: prologue, core 0 of every member, core 1 of every member.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "linear_pieces.h"
#include "program.h"

namespace cai {
namespace {

Int padded16(Int n) { return (n + 15) / 16 * 16; }

// Up to this many elements, every thread computes the whole input itself: that is faster than sharing the work in a phase.
constexpr Int kPrivateNorm = 8192, kPrivateGated = 4096, kPrivateCodes = 8192;

void apply_prologue(const LinearCall& c, Int row0, Int row1, float* to) {
  const Int K = c.group->in_features;
  const KernelTable& k = kernels();
  switch (c.prologue) {
    case Prologue::kNone: return;
    case Prologue::kNorm: return k.rms_norm(c.x, nullptr, c.norm_weight, c.eps, K, row0, row1, nullptr, to);
    case Prologue::kLayerNorm: return k.layer_norm(c.x, c.norm_weight, c.norm_bias, c.eps, K, row0, row1, to);
    case Prologue::kGelu: return k.gelu(c.x, c.ldx, K, row0, row1, to);
    case Prologue::kSwiglu: return k.swiglu(c.x, c.ldx, K, row0, row1, to);
  }
}

// The windows of a convolution after the prologue, each between two rows of zeros.
void pad_windows(Team& team, const LinearCall& c, float* to) {
  const Int columns = c.group->in_features / kTaps, windows = c.M * c.stride / c.window, padded = c.window + 2;
  const Int piece = std::max<Int>(1, c.window * windows / (team.threads() * 8));
  const Int pieces = (c.window + piece - 1) / piece;
  team.deal(windows * pieces, [&](Int p) {
    const Int w = p / pieces, row0 = p % pieces * piece, row1 = std::min(c.window, row0 + piece);
    const float* from = c.x + w * c.window * columns;
    float* target = to + (w * padded + 1) * columns;
    if (c.prologue == Prologue::kGelu) {
      kernels().gelu(from, columns, columns, row0, row1, target);
    } else {
      std::memcpy(target + row0 * columns, from + row0 * columns, static_cast<size_t>((row1 - row0) * columns) * sizeof(float));
    }
    if (row0 == 0) std::fill(target - columns, target, 0.0f);
    if (row1 == c.window) std::fill(target + c.window * columns, target + (c.window + 1) * columns, 0.0f);
  });
}

// Room for M rows of K columns rounded to int8, codes first.
Int8Rows codes_at(void* memory, Int M, Int K, Int parts) {
  const Int groups = padded16(K) / kCodeGroup * parts;
  char* codes = static_cast<char*>(memory);
  return {reinterpret_cast<int8_t*>(codes), reinterpret_cast<CodeShare*>(codes + M * groups * kCodeGroup), M, groups, parts};
}
Int codes_bytes(Int M, Int K, Int parts) { return M * parts * padded16(K) / kCodeGroup * Int(kCodeGroup + sizeof(CodeShare)); }

Int ranks(const LinearGroup& g) {  // of all members together
  Int sum = 0;
  for (const Member* m = g.begin(); m != g.begin() + g.members; ++m) sum += m->rank;
  return sum;
}

bool is_coded(const PackedMatrix& w) { return w.store == Store::kInt8Quads && w.rows > 0; }

// From so many results on, those of interpolative members are stored in the cores' order first and put in the features' order
// row by row: stored at their places at once, neighbours come at different times, and a line of the cache is written sixteen
// times.
constexpr Int kPlacedResults = 6144;

// How many codes an element of the group's input has, at most; 0: no member's first core multiplies codes.
Int input_codes(const LinearGroup& g) {
  Int parts = 0;
  for (const Member* m = g.begin(); m != g.begin() + g.members; ++m)
    if (is_coded(m->core[0])) parts = std::max(parts, m->core[0].group);
  return parts;
}

// The input of core 0: x after the prologue and the rounding to int8, if any. Each thread computes all of it, or all
// threads share the work in a phase of their own.
class Input {
 public:
  Input(Team& team, const LinearCall& c) : c_(c), x_(c.x), ldx_(c.ldx), coded_(input_codes(*c.group)) {
    const Int K = c.group->in_features, elements = c.M * K;
    if (c.window > 0) {
      pad_windows(team, c, c.scratch);
      team.sync();
      use(c.scratch, c.stride * K / kTaps);
      return;
    }
    const bool transformed = c.prologue != Prologue::kNone;
    if (!transformed && !coded_) return;
    const bool gated = c.prologue == Prologue::kSwiglu || c.prologue == Prologue::kGelu;
    lazy_ = elements <= (gated ? kPrivateGated : kPrivateNorm);
    if (lazy_) return;
    float* to = c.scratch + c.M * c.group->z_columns;
    const Int8Rows codes = codes_at(to + (transformed ? elements : 0), c.M, K, coded_);
    // Few rows at a time, which are still in the second-level cache when they are rounded.
    const Int rows = std::clamp<Int>(c.M / (team.threads() * 4), 1, std::max<Int>(1, 65536 / std::max<Int>(1, K)));
    team.deal((c.M + rows - 1) / rows, [&](Int p) {
      const Int row0 = p * rows, row1 = std::min(c.M, row0 + rows);
      if (transformed) apply_prologue(c, row0, row1, to);
      if (coded_)
        kernels().quantize_rows(transformed ? to : c.x, transformed ? K : c.ldx, K, row0, row1, codes);
    });
    team.sync();
    if (transformed) use(to, K);
    if (coded_) rows_ = codes;
  }

  // Transforms x for this thread alone, if no phase did it for all. Call this only while holding a claimed piece: until
  // that piece is finished, no thread overwrites x.
  void make() {
    if (!lazy_) return;
    lazy_ = false;
    const Int K = c_.group->in_features;
    if (c_.prologue != Prologue::kNone) {
      float* to = static_cast<float*>(private_memory(Private::kInput, c_.M * K * Int(sizeof(float))));
      apply_prologue(c_, 0, c_.M, to);
      use(to, K);
    }
    if (coded_) {
      rows_ = codes_at(private_memory(Private::kCodes, codes_bytes(c_.M, K, coded_)), c_.M, K, coded_);
      kernels().quantize_rows(x_, ldx_, K, 0, c_.M, rows_);
    }
  }

  const float* x() const { return x_; }
  Int ldx() const { return ldx_; }
  const Int8Rows& rows() const { return rows_; }

 private:
  void use(const float* x, Int ld) {
    x_ = x;
    ldx_ = ld;
  }

  const LinearCall& c_;
  const float* x_;
  Int ldx_;
  Int coded_;  // codes of an element; 0: none
  bool lazy_ = false;
  Int8Rows rows_{};
};

}  // namespace

const char* first_weights(const Team& team, const LinearGroup& group) {
  return own_begin(team, group, Pieces(group, 0, team.threads(), 1), 0);
}

Int linear_work(const LinearGroup& group) {
  Int work = 0;
  for (Int i = 0; i < group.members; ++i)
    for (const PackedMatrix& w : group[i].core) work += w.rows * w.cols;
  return work;
}

// z of every member, the input after its prologue, and with int8 activations the codes of both.
Int scratch_floats(const LinearGroup& group, Int M) {
  Int bytes = M * (group.z_columns + group.in_features) * Int(sizeof(float));
  bytes += codes_bytes(M, group.in_features, input_codes(group));
  for (const Member* m = group.begin(); m != group.begin() + group.members; ++m)
    if (is_coded(m->core[1])) bytes += codes_bytes(M, m->rank, m->core[1].group);
  return (bytes + Int(sizeof(float)) - 1) / Int(sizeof(float));
}

Int convolution_floats(const LinearGroup& group, Int M, Int window, Int stride) {
  return M * stride / window * (window + 2) * (group.in_features / kTaps);
}

Int output_width(const LinearGroup& group) {
  Int width = 0;
  for (Int i = 0; i < group.members; ++i) width += group[i].out_features;
  return width;
}

const LinearGroup& checked_group(const void* data, Int size) {
  const auto* group = static_cast<const LinearGroup*>(data);  // null where there are no numbers
  constexpr Int kHead = sizeof(LinearGroup) / sizeof(Int), kMember = sizeof(Member) / sizeof(Int);
  if (size < kHead || group->members < 1 || group->members > kMaxMembers || size != kHead + group->members * kMember)
    TVM_FFI_THROW(ValueError) << "a group of linears has 1 to " << kMaxMembers << " members, " << kMember
                              << " numbers each after the first " << kHead << ", not " << size << " numbers in all";
  return *group;
}

namespace {

// A thread's panel of fp32 weights, kept while the pieces that follow want the same one.
class Panel {
 public:
  const float* of(const PackedMatrix& w, Int block0, Int block1) {
    if (w.store == Store::kFp32) return reinterpret_cast<const float*>(address(w, block0));
    if (&w != w_ || block0 != block0_) {
      const Int bytes = (block1 - block0) * kBlockRows * padded16(w.cols) * Int(sizeof(float));
      memory_ = static_cast<float*>(private_memory(Private::kPanel, bytes));
      kernels().widen(w, block0, block1, memory_);
      w_ = &w;
      block0_ = block0;
    }
    return memory_;
  }

 private:
  const PackedMatrix* w_ = nullptr;
  Int block0_ = 0;
  float* memory_ = nullptr;
};

// A piece of a float product. panel: null for few rows. e: of x's first row.
void multiply_rows(const LinearCall& c, const float* x, Int ldx, const PackedMatrix& w, const Pieces::Place& at,
                   const float* panel, const Epilogue& e, const Ahead& ahead) {
  const KernelTable& k = kernels();
  // The rows of a convolution's windows lie apart.
  const Int window = c.window > 0 ? c.window / c.stride : c.M;
  const Int apart = c.window > 0 ? (c.window + 2) * (c.group->in_features / kTaps) : 0;
  for (Int m = at.row0; m < at.row1;) {
    const Int rows = std::min(at.row1, (m / window + 1) * window) - m;
    const float* from = x + m / window * apart + m % window * ldx;
    Epilogue part = e;
    part.skip_rows(m);
    if (panel != nullptr) {
      k.linear_many(from, rows, ldx, w, panel, at.block0, at.block1, part);
    } else {
      k.linear(from, rows, ldx, w, at.block0, at.block1, part, ahead);
    }
    m += rows;
  }
}

}  // namespace

Prologue checked_convolution(const LinearGroup& group, Int prologue, Int window, Int stride) {
  const Member& m = group[0];
  const bool floats = m.kind == Kind::kDense && m.core[0].store <= Store::kFp16;
  if (group.members != 1 || !floats || group.in_features % kTaps || window < 1 || stride < 1 || window % stride ||
      (prologue != Int(Prologue::kNone) && prologue != Int(Prologue::kGelu)))
    TVM_FFI_THROW(ValueError) << "a convolution is one dense linear of float weights over three rows, with GELU before it or "
                                 "nothing, and its window is a multiple of its stride";
  return static_cast<Prologue>(prologue);
}

LinearCall convolution_call(const LinearGroup& group, const float* x, Int rows, Prologue prologue, Int window, Int stride,
                            float* out, float* scratch) {
  const Int width = output_width(group);
  return {&group, x, 0, rows / stride, prologue, nullptr, nullptr, 0, nullptr, 0, out, width, scratch, window, stride};
}

// A row of an interpolative member, from z with both cores' results to the features' places.
void place_row(const LinearCall& c, const Member& m, Int row) {
  const float* from = c.scratch + row * c.group->z_columns + m.z_offset;
  float* out = c.out + row * c.ldo + m.out_offset;
  const float* residual = c.residual ? c.residual + row * c.ldr + m.out_offset : nullptr;
  if (!m.bias && !residual) {
    for (Int f = 0; f < m.out_features; ++f) out[f] = from[m.place[f]];
    return;
  }
  for (Int f = 0; f < m.out_features; ++f) {
    float y = from[m.place[f]];
    if (m.bias) y += m.bias[f];
    if (residual) y += residual[f];
    out[f] = y;
  }
}

void linear_group(Team& team, const LinearCall& c, const char* after) {
  const LinearGroup& group = *c.group;
  const KernelTable& k = kernels();
  const Pieces pieces0(group, 0, team.threads(), c.M), pieces1(group, 1, team.threads(), c.M);
  const bool two = pieces1.total() > 0;
  float* z = c.scratch;

  Int4Input int4{};
  Int int4_cols = 0;
  Panel panel;
  auto multiply = [&](const PackedMatrix& w, const float* x, Int ldx, const Int8Rows& codes, const Pieces::Place& at, bool many,
                      Epilogue e, const Ahead& ahead) {
    if (w.store == Store::kInt4) {
      const Int rows = at.row1 - at.row0;
      x += at.row0 * ldx;
      if (x != int4.x || w.cols != int4_cols) {  // another chunk, or another member's input
        const Int bytes = int4_floats(rows, w.cols) * Int(sizeof(float));
        int4 = {x, ldx, static_cast<float*>(private_memory(Private::kInt4, bytes)), false, false};
        int4_cols = w.cols;
      }
      e.skip_rows(at.row0);
      k.linear_int4(int4, rows, w, at.block0, at.block1, e, ahead);
    } else if (w.store == Store::kInt8Quads) {
      k.linear_int8(codes, at.row0, at.row1, w, at.block0, at.block1, e, ahead);
    } else {
      multiply_rows(c, x, ldx, w, at, many ? panel.of(w, at.block0, at.block1) : nullptr, e, ahead);
    }
  };
  auto epilogue = [&](const Member& m) {
    return Epilogue{c.out + m.out_offset, c.ldo, nullptr, m.bias, c.residual ? c.residual + m.out_offset : nullptr, c.ldr,
                    nullptr, 0};
  };
  const bool many_results = c.M * c.ldo >= kPlacedResults;
  auto placed_later = [&](const Member& m) { return many_results && m.place != nullptr; };
  Input input(team, c);
  const char* second = two ? own_begin(team, group, pieces1, 1) : after;
  team.deal(pieces0.total(), [&](Int piece) {
    input.make();
    const Int i = pieces0.member_of(piece);
    const Member& m = group[i];
    Epilogue e = epilogue(m);
    if (m.kind != Kind::kDense) {
      e.copy = z + m.z_offset;
      e.ld_copy = group.z_columns;
      if (m.kind == Kind::kInterpolative && !placed_later(m)) {
        e.index = m.pivot;
      } else {
        e.out = nullptr;
      }
    }
    multiply(m.core[0], input.x(), input.ldx(), input.rows(), pieces0.place(m.core[0], i, piece), pieces0.many(m.core[0]),
             e, ahead_of(team, group, pieces0, 0, piece, second));
  });
  auto place = [&] {
    if (std::none_of(group.begin(), group.begin() + group.members, placed_later)) return;
    team.sync(Fetcher(after));
    const Int rows = std::max<Int>(1, c.M / (team.threads() * 4));
    team.deal((c.M + rows - 1) / rows, [&](Int p) {
      for (Int row = p * rows; row < std::min(c.M, (p + 1) * rows); ++row)
        for (const Member* m = group.begin(); m != group.begin() + group.members; ++m)
          if (placed_later(*m)) place_row(c, *m, row);
    });
  };
  if (!two) return place();
  team.sync(Fetcher(second));

  // z rounded to int8, for members whose core 1 multiplies codes: in the scratch after the input's codes, or in this
  // thread's own memory.
  const bool coded = std::any_of(group.begin(), group.begin() + group.members, [](const Member& m) { return is_coded(m.core[1]); });
  const bool apart = coded && ranks(group) * c.M > kPrivateCodes;
  Int8Rows codes[kMaxMembers] = {};
  bool made[kMaxMembers] = {};
  auto round_member = [&](Int i, Int row0, Int row1) {
    const Member& m = group[i];
    k.quantize_rows(z + m.z_offset, group.z_columns, m.rank, row0, row1, codes[i]);
  };
  if (coded) {
    const Int K = group.in_features;
    Int bytes = 0;
    for (Int i = 0; i < group.members; ++i)
      if (is_coded(group[i].core[1])) bytes += codes_bytes(c.M, group[i].rank, group[i].core[1].group);
    char* memory = apart ? reinterpret_cast<char*>(z + c.M * (group.z_columns + K)) + codes_bytes(c.M, K, input_codes(group))
                         : static_cast<char*>(private_memory(Private::kCodes, bytes));
    for (Int i = 0; i < group.members; ++i) {
      if (!is_coded(group[i].core[1])) continue;
      codes[i] = codes_at(memory, c.M, group[i].rank, group[i].core[1].group);
      memory += codes_bytes(c.M, group[i].rank, group[i].core[1].group);
    }
  }
  if (apart) {
    const Int rows = std::max<Int>(1, c.M / (team.threads() * 4));
    team.deal((c.M + rows - 1) / rows, [&](Int p) {
      for (Int i = 0; i < group.members; ++i)
        if (is_coded(group[i].core[1])) round_member(i, p * rows, std::min(c.M, (p + 1) * rows));
    });
    team.sync();
  }
  team.deal(pieces1.total(), [&](Int piece) {
    const Int i = pieces1.member_of(piece);
    const Member& m = group[i];
    Epilogue e = epilogue(m);
    if (placed_later(m)) {
      e.out = nullptr;
      e.copy = z + m.z_offset + m.rank;
      e.ld_copy = group.z_columns;
    } else if (m.kind == Kind::kInterpolative) {
      e.index = m.pivot + m.rank;
    }
    if (!apart && !made[i] && is_coded(m.core[1])) {
      round_member(i, 0, c.M);
      made[i] = true;
    }
    multiply(m.core[1], z + m.z_offset, group.z_columns, codes[i], pieces1.place(m.core[1], i, piece),
             pieces1.many(m.core[1]), e, ahead_of(team, group, pieces1, 1, piece, after));
  });
  place();
}

namespace {

// inputs: x, then the residual if there is one. attributes: prologue, eps. bindings: group (a CpuLinear's numbers), weight
// and bias (the norm's).
class RecordedLinear : public OperationOf<LinearCall, kLinearPhases> {
 public:
  explicit RecordedLinear(const Noted& n) {
    const Tensor numbers = n.tensor("group");
    group_ = &checked_group(checked_array<const Int>(numbers, "a linear's group", kInt64, 0, true), numbers.numel());
    prologue_ = checked_prologue(n.integer("prologue"), n.has_binding("weight"), n.has_binding("bias"));
    if (n.has_binding("weight")) {
      weight_ = checked_array<float>(n.tensor("weight"), "the norm's weight", kFloat, group_->in_features);
      eps_ = static_cast<float>(n.number("eps"));
    }
    if (n.has_binding("bias"))
      bias_ = checked_array<float>(n.tensor("bias"), "the norm's bias", kFloat, group_->in_features);
    width_ = output_width(*group_);
    ldx_ = group_->in_features * (prologue_ == Prologue::kSwiglu ? 2 : 1);
    x_ = n.input(0, ldx_);
    if (n.inputs.size() > 1) residual_ = n.input(1, width_);
    out_ = n.checked_output(width_);
  }
  Int prepare(const Step& step, LinearCall& c) const override {
    c = {group_, step.at<const float>(x_), ldx_, step.rows(x_), prologue_, weight_, bias_, eps_,
         residual_ < 0 ? nullptr : step.at<const float>(residual_), width_, step.at<float>(out_), width_, step.scratch};
    return 0;
  }
  void run(Team& team, const LinearCall& c, const char* after) const override { linear_group(team, c, after); }
  bool has_weights() const override { return true; }
  const char* first_weights(const Team& team) const override { return cai::first_weights(team, *group_); }
  Int scratch_floats(const Step& step) const override { return cai::scratch_floats(*group_, step.rows(x_)); }

 private:
  const LinearGroup* group_;
  Prologue prologue_;
  const float *weight_ = nullptr, *bias_ = nullptr;
  float eps_ = 0;
  Int width_, ldx_, x_, residual_ = -1, out_;
};
CAI_OPERATION("linear", RecordedLinear);

// input: x, `side` rows of a window side by side in one row. attributes: prologue (none or GELU), stride, window (rows).
// binding: group (a CpuLinear's numbers).
class RecordedConvolution : public OperationOf<LinearCall, kLinearPhases> {
 public:
  explicit RecordedConvolution(const Noted& n) : window_(n.integer("window")), stride_(n.integer("stride")) {
    const Tensor numbers = n.tensor("group");
    group_ = &checked_group(checked_array<const Int>(numbers, "a linear's group", kInt64, 0, true), numbers.numel());
    prologue_ = checked_convolution(*group_, n.integer("prologue"), window_, stride_);
    const Int columns = group_->in_features / kTaps, width = n.inputs.empty() ? 0 : n.value(n.inputs[0]).width;
    side_ = width / columns;
    if (side_ < 1 || side_ % stride_) n.fail("takes whole steps of rows side by side, not " + std::to_string(width) + " columns");
    x_ = n.input(0, side_ * columns);
    out_ = n.checked_output(side_ / stride_ * output_width(*group_));
  }
  Int prepare(const Step& step, LinearCall& c) const override {
    const Int rows = step.rows(x_) * side_;
    if (rows % window_)
      TVM_FFI_THROW(ValueError) << "a convolution takes windows of " << window_ << " rows, not " << rows << " rows";
    c = convolution_call(*group_, step.at<const float>(x_), rows, prologue_, window_, stride_, step.at<float>(out_), step.scratch);
    return 0;
  }
  void run(Team& team, const LinearCall& c, const char* after) const override { linear_group(team, c, after); }
  bool has_weights() const override { return true; }
  const char* first_weights(const Team& team) const override { return cai::first_weights(team, *group_); }
  Int scratch_floats(const Step& step) const override {
    return convolution_floats(*group_, step.rows(x_) * side_ / stride_, window_, stride_);
  }

 private:
  const LinearGroup* group_;
  const Int window_, stride_;
  Prologue prologue_;
  Int side_, x_, out_;
};
CAI_OPERATION("convolution", RecordedConvolution);

}  // namespace
}  // namespace cai
