// A group of slim linears over one input: prologue, core 0 of every member, core 1 of every member.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstdint>

#include "program.h"

namespace cai {
namespace {

// The row blocks of one core of every member, cut into pieces small enough to balance and large enough to stream. For
// int4, many rows of x are also cut into chunks: a thread prepares a chunk of x once for all its pieces.
struct Pieces {
  Int first[kMaxMembers + 1];  // prefix sums of pieces

  Pieces(const LinearGroup& group, int core, int threads, Int M) : M_(M) {
    Int total = 0;
    for (Int i = 0; i < group.members; ++i) total += (group[i].core[core].rows + kBlockRows - 1) / kBlockRows;
    rows_ = kBlockRows * std::min<Int>(32, std::max<Int>(2, total / (threads * 6) / 2 * 2));
    first[0] = 0;
    for (Int i = 0; i < group.members; ++i) {
      const PackedMatrix& w = group[i].core[core];
      first[i + 1] = first[i] + runs(w) * chunks(w);
    }
    members = group.members;
  }
  Int total() const { return first[members]; }
  Int chunks(const PackedMatrix& w) const { return w.store == Store::kInt4 ? (M_ + kInt4Chunk - 1) / kInt4Chunk : 1; }

  // Where a piece of w, the member's core, lies.
  struct Place {
    Int block0, block1, row0, row1;  // of the weights, of x
  };
  Place place(const PackedMatrix& w, Int member, Int piece) const {
    const Int run = (piece - first[member]) % runs(w), chunk = (piece - first[member]) / runs(w), n = chunks(w);
    return {run * blocks(w), std::min((run + 1) * blocks(w), blocks_of(w)), M_ * chunk / n, M_ * (chunk + 1) / n};
  }
  Int member_of(Int piece) const {
    Int i = 0;
    while (first[i + 1] <= piece) ++i;
    return i;
  }

 private:
  // Blocks of one piece of w, at most, and into how many pieces that cuts it.
  Int blocks(const PackedMatrix& w) const { return std::max<Int>(1, rows_ / block_rows(w)); }
  Int runs(const PackedMatrix& w) const { return (blocks_of(w) + blocks(w) - 1) / blocks(w); }

  Int members, rows_, M_;
};

const char* address(const PackedMatrix& w, Int block) {
  return static_cast<const char*>(w.data) + block * block_bytes(w);
}

// Where a thread's own run of pieces begins, or null when it has none.
const char* own_begin(const Team& team, const LinearGroup& group, const Pieces& pieces, int core) {
  const Int p = team.own_begin(pieces.total());
  if (p >= team.own_end(pieces.total())) return nullptr;
  const Int i = pieces.member_of(p);
  const PackedMatrix& w = group[i].core[core];
  return address(w, pieces.place(w, i, p).block0);
}

// The prefetch plan of a piece: where this thread's run of pieces in the member ends, and where its next run begins.
Ahead ahead_of(const Team& team, const LinearGroup& group, const Pieces& pieces, int core, Int piece, const char* after) {
  const Int begin = team.own_begin(pieces.total()), end = team.own_end(pieces.total());
  const char* unlimited = reinterpret_cast<const char*>(UINTPTR_MAX);
  if (piece < begin || piece >= end) return {unlimited, nullptr};  // of another thread's run, which ends soon
  const Int i = pieces.member_of(piece), last = std::min(end, pieces.first[i + 1]);
  const PackedMatrix& w = group[i].core[core];
  if (pieces.chunks(w) > 1) return {unlimited, nullptr};  // most chunks find the weights in a cache
  const char* limit = address(w, pieces.place(w, i, last - 1).block1);
  const char* next = after;
  if (last < end) {
    Int following = i + 1;
    while (blocks_of(group[following].core[core]) == 0) ++following;
    next = address(group[following].core[core], 0);
  }
  return next ? Ahead{limit, next} : Ahead{unlimited, nullptr};
}

Int padded16(Int n) { return (n + 15) / 16 * 16; }

// Up to this many elements, every thread computes the whole input itself: that is faster than sharing the work in a phase.
constexpr Int kPrivateNorm = 8192, kPrivateSwiglu = 4096, kPrivateCodes = 8192;

void apply_prologue(const LinearCall& c, Int row0, Int row1, float* to) {
  const Int K = c.group->in_features;
  if (c.prologue == Prologue::kNorm) {
    kernels().rms_norm(c.x, nullptr, c.norm_weight, c.eps, K, row0, row1, nullptr, to);
  } else {
    kernels().swiglu(c.x, c.ldx, K, row0, row1, to);
  }
}

// Memory for rows rounded to int8.
struct Codes {
  int8_t* codes;
  float* scale;
  Int ld;
  Int8Rows rows() const { return {codes, ld, scale}; }
};

// Room for M rows of K columns, codes first.
Codes codes_at(void* memory, Int M, Int K) {
  const Int ld = padded16(K);
  return {static_cast<int8_t*>(memory), reinterpret_cast<float*>(static_cast<char*>(memory) + M * ld), ld};
}
Int codes_bytes(Int M, Int K) { return M * padded16(K) + padded16(M) * Int(sizeof(float)); }

bool takes_codes(const LinearGroup& g, int core) {
  if (!g.int8_activations) return false;
  for (const Member* m = g.begin(); m != g.begin() + g.members; ++m)
    if (m->core[core].store == Store::kInt8 && m->core[core].rows > 0) return true;
  return false;
}

// The input of core 0: x after the prologue and the rounding to int8, if any. Each thread computes all of it, or all
// threads share the work in a phase of their own.
class Input {
 public:
  Input(Team& team, const LinearCall& c) : c_(c), x_(c.x), ldx_(c.ldx), coded_(takes_codes(*c.group, 0)) {
    const Int K = c.group->in_features, elements = c.M * K;
    const bool transformed = c.prologue != Prologue::kNone;
    if (!transformed && !coded_) return;
    lazy_ = elements <= (c.prologue == Prologue::kSwiglu ? kPrivateSwiglu : kPrivateNorm);
    if (lazy_) return;
    float* to = c.scratch + c.M * c.group->z_columns;
    Codes codes = codes_at(to + (transformed ? elements : 0), c.M, K);
    const Int rows = std::max<Int>(1, c.M / (team.threads() * 4));
    team.deal((c.M + rows - 1) / rows, [&](Int p) {
      const Int row0 = p * rows, row1 = std::min(c.M, row0 + rows);
      if (transformed) apply_prologue(c, row0, row1, to);
      if (coded_)
        kernels().quantize_rows(transformed ? to : c.x, transformed ? K : c.ldx, K, row0, row1, codes.codes, codes.ld,
                                codes.scale);
    });
    team.sync();
    if (transformed) use(to, K);
    if (coded_) rows_ = codes.rows();
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
      Codes codes = codes_at(private_memory(Private::kCodes, codes_bytes(c_.M, K)), c_.M, K);
      kernels().quantize_rows(x_, ldx_, K, 0, c_.M, codes.codes, codes.ld, codes.scale);
      rows_ = codes.rows();
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
  bool coded_, lazy_ = false;
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
  if (group.int8_activations) {
    bytes += codes_bytes(M, group.in_features);
    for (Int i = 0; i < group.members; ++i) bytes += codes_bytes(M, group[i].rank);
  }
  return (bytes + Int(sizeof(float)) - 1) / Int(sizeof(float));
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

void linear_group(Team& team, const LinearCall& c, const char* after) {
  const LinearGroup& group = *c.group;
  const KernelTable& k = kernels();
  const Pieces pieces0(group, 0, team.threads(), c.M), pieces1(group, 1, team.threads(), c.M);
  const bool two = pieces1.total() > 0;
  float* z = c.scratch;

  Int4Input int4{};
  Int int4_cols = 0;
  auto multiply = [&](const PackedMatrix& w, const float* x, Int ldx, const Int8Rows& codes, const Pieces::Place& at,
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
    } else if (group.int8_activations && w.store == Store::kInt8) {
      k.linear_int8(codes, c.M, w, at.block0, at.block1, e, ahead);
    } else {
      k.linear(x, c.M, ldx, w, at.block0, at.block1, e, ahead);
    }
  };
  auto epilogue = [&](const Member& m) {
    return Epilogue{c.out + m.out_offset, c.ldo, nullptr, m.bias, c.residual ? c.residual + m.out_offset : nullptr, c.ldr,
                    nullptr, 0};
  };
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
      if (m.kind == Kind::kInterpolative) {
        e.index = m.pivot;
      } else {
        e.out = nullptr;
      }
    }
    multiply(m.core[0], input.x(), input.ldx(), input.rows(), pieces0.place(m.core[0], i, piece), e,
             ahead_of(team, group, pieces0, 0, piece, second));
  });
  if (!two) return;
  team.sync(Fetcher(second));

  // z rounded to int8, for members whose core 1 multiplies codes: in the scratch after the input's codes, or in this
  // thread's own memory.
  const bool coded = takes_codes(group, 1), apart = coded && c.M * group.z_columns > kPrivateCodes;
  Codes codes[kMaxMembers] = {};
  bool made[kMaxMembers] = {};
  auto round_member = [&](Int i, Int row0, Int row1) {
    const Member& m = group[i];
    k.quantize_rows(z + m.z_offset, group.z_columns, m.rank, row0, row1, codes[i].codes, codes[i].ld, codes[i].scale);
  };
  if (coded) {
    const Int K = group.in_features;
    Int bytes = 0;
    for (Int i = 0; i < group.members; ++i) bytes += codes_bytes(c.M, group[i].rank);
    char* memory = apart ? reinterpret_cast<char*>(z + c.M * (group.z_columns + K)) + codes_bytes(c.M, K)
                         : static_cast<char*>(private_memory(Private::kCodes, bytes));
    for (Int i = 0; i < group.members; ++i) {
      codes[i] = codes_at(memory, c.M, group[i].rank);
      memory += codes_bytes(c.M, group[i].rank);
    }
  }
  if (apart) {
    const Int rows = std::max<Int>(1, c.M / (team.threads() * 4));
    team.deal((c.M + rows - 1) / rows, [&](Int p) {
      for (Int i = 0; i < group.members; ++i)
        if (group[i].kind != Kind::kDense) round_member(i, p * rows, std::min(c.M, (p + 1) * rows));
    });
    team.sync();
  }
  team.deal(pieces1.total(), [&](Int piece) {
    const Int i = pieces1.member_of(piece);
    const Member& m = group[i];
    Epilogue e = epilogue(m);
    if (m.kind == Kind::kInterpolative) e.index = m.pivot + m.rank;
    if (coded && !apart && !made[i]) {
      round_member(i, 0, c.M);
      made[i] = true;
    }
    multiply(m.core[1], z + m.z_offset, group.z_columns, codes[i].rows(), pieces1.place(m.core[1], i, piece), e,
             ahead_of(team, group, pieces1, 1, piece, after));
  });
}

namespace {

// inputs: x, then the residual if there is one. attributes: prologue, eps. bindings: group (a CpuLinear's numbers), weight
// (the norm's).
class RecordedLinear : public OperationOf<LinearCall, kLinearPhases> {
 public:
  explicit RecordedLinear(const Noted& n) {
    const Tensor numbers = n.tensor("group");
    group_ = &checked_group(checked_array<const Int>(numbers, "a linear's group", kInt64, 0, true), numbers.numel());
    prologue_ = checked_prologue(n.integer("prologue"), n.has_binding("weight"));
    if (prologue_ == Prologue::kNorm) {
      weight_ = checked_array<float>(n.tensor("weight"), "the norm's weight", kFloat, group_->in_features);
      eps_ = static_cast<float>(n.number("eps"));
    }
    width_ = output_width(*group_);
    ldx_ = group_->in_features * (prologue_ == Prologue::kSwiglu ? 2 : 1);
    x_ = n.input(0, ldx_);
    if (n.inputs.size() > 1) residual_ = n.input(1, width_);
    out_ = n.checked_output(width_);
  }
  Int prepare(const Step& step, LinearCall& c) const override {
    c = {group_, step.at<const float>(x_), ldx_, step.rows(x_), prologue_, weight_, eps_,
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
  const float* weight_ = nullptr;
  float eps_ = 0;
  Int width_, ldx_, x_, residual_ = -1, out_;
};
CAI_OPERATION("linear", RecordedLinear);

}  // namespace
}  // namespace cai
