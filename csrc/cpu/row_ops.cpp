// Row-wise operations over the threads, and the packing of weights.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstring>

#include "program.h"

namespace cai {
namespace {

// One phase over rows, in pieces of at least `work` elements.
template <class F>
void over_rows(Team& team, Int rows, Int elements_per_row, F f) {
  constexpr Int kElements = Int(1) << 12;
  Int piece = std::max<Int>(1, rows / (team.threads() * 4));
  piece = std::max(piece, kElements / std::max<Int>(1, elements_per_row));
  team.deal((rows + piece - 1) / piece, [&](Int p) { f(p * piece, std::min(rows, (p + 1) * piece)); });
}

}  // namespace

void rms_norm(Team& team, const NormCall& c) {
  over_rows(team, c.M, c.width, [&](Int r0, Int r1) {
    kernels().rms_norm(c.x, c.residual, c.weight, c.eps, c.width, r0, r1, c.residual_out, c.out);
  });
}

void layer_norm(Team& team, const LayerNormCall& c) {
  over_rows(team, c.M, c.width,
            [&](Int r0, Int r1) { kernels().layer_norm(c.x, c.weight, c.bias, c.eps, c.width, r0, r1, c.out); });
}

void gelu(Team& team, const GeluCall& c) {
  over_rows(team, c.M, 2 * c.width, [&](Int r0, Int r1) { kernels().gelu(c.x, c.ldx, c.width, r0, r1, c.out); });
}

void check_add_rows(const AddRowsCall& c) {
  if (c.table_rows < 1 && c.M > 0) TVM_FFI_THROW(IndexError) << "add_rows has a table without rows";
  for (Int i = 0; c.index != nullptr && i < c.M; ++i)
    if (c.index[i] < 0 || c.index[i] >= c.table_rows)
      TVM_FFI_THROW(IndexError) << "row " << c.index[i] << " is added of a table of " << c.table_rows << " rows";
}

void add_rows(Team& team, const AddRowsCall& c) {
  over_rows(team, c.M, c.width, [&](Int r0, Int r1) {
    for (Int r = r0; r < r1; ++r) {
      const float* x = c.x + r * c.width;
      const float* row = c.table + (c.index != nullptr ? c.index[r] : r % c.table_rows) * c.width;
      float* out = c.out + r * c.width;
      for (Int k = 0; k < c.width; ++k) out[k] = x[k] + row[k];
    }
  });
}

void swiglu(Team& team, const SwigluCall& c) {
  over_rows(team, c.M, 4 * c.width,
            [&](Int r0, Int r1) { kernels().swiglu(c.gate_up, 2 * c.width, c.width, r0, r1, c.out); });
}

void check_gather(const GatherCall& c) {
  for (Int i = 0; i < c.count; ++i)
    if (c.ids[i] < 0 || c.ids[i] >= c.matrix->rows)
      TVM_FFI_THROW(IndexError) << "token id " << c.ids[i] << " is outside the embedding's " << c.matrix->rows << " rows";
}

void gather(Team& team, const GatherCall& c) {
  over_rows(team, c.count, c.matrix->cols,
            [&](Int r0, Int r1) { kernels().gather(*c.matrix, c.ids, r0, r1, c.out); });
}

namespace {

// Calls f(block) for every block of block_rows rows, on all threads when there is much to do.
template <class F>
void over_blocks(Int rows, Int block_rows, Int bytes, F f) {
  const Int blocks = (rows + block_rows - 1) / block_rows;
  parallel(bytes < (Int(1) << 18) ? 1 : num_threads(), 1, [&](Team& team) {
    const Int piece = std::max<Int>(1, blocks / (team.threads() * 4));
    team.deal((blocks + piece - 1) / piece, [&](Int p) {
      for (Int b = p * piece; b < std::min(blocks, (p + 1) * piece); ++b) f(b);
    });
  });
}

}  // namespace

void pack(const void* source, Int rows, Int cols, Int size, void* target) {
  const char* from = static_cast<const char*>(source);
  char* to = static_cast<char*>(target);
  const Int chunks = (cols + kBlockCols - 1) / kBlockCols, chunk_bytes = kBlockCols * size;
  over_blocks(rows, kBlockRows, rows * cols * size, [&](Int b) {
    for (Int c = 0; c < chunks; ++c) {
      for (Int r = 0; r < kBlockRows; ++r) {
        char* place = to + ((b * chunks + c) * kBlockRows + r) * chunk_bytes;
        const Int row = b * kBlockRows + r;
        const Int bytes = row < rows ? std::min(kBlockCols, cols - c * kBlockCols) * size : 0;
        if (bytes > 0) std::memcpy(place, from + (row * cols + c * kBlockCols) * size, bytes);
        if (bytes < chunk_bytes) std::memset(place + bytes, 0, chunk_bytes - bytes);
      }
    }
  });
}

void pack_int4(const uint8_t* from, Int rows, Int cols, uint32_t* to) {
  const Int words = (cols + kInt4Cols - 1) / kInt4Cols * (kInt4Cols / 8), width = (cols + 1) / 2;
  over_blocks(rows, kLaneRows, rows * width, [&](Int b) {
    for (Int r = 0; r < kLaneRows; ++r) {
      const Int row = b * kLaneRows + r;
      for (Int k = 0; k < words; ++k) {  // the source has its columns in the same order, low halves first
        uint32_t word = 0;
        for (Int i = 0; row < rows && i < 4 && 4 * k + i < width; ++i)
          word |= static_cast<uint32_t>(from[row * width + 4 * k + i]) << (8 * i);
        to[(b * words + k) * kLaneRows + r] = word;
      }
    }
  });
}

void pack_quads(const int8_t* from, Int rows, Int cols, uint8_t* to) {
  const Int quads = (cols + kBlockCols - 1) / kBlockCols * (kBlockCols / 4);
  over_blocks(rows, kLaneRows, rows * cols, [&](Int b) {
    for (Int r = 0; r < kLaneRows; ++r) {
      const Int row = b * kLaneRows + r;
      for (Int q = 0; q < quads; ++q)
        for (Int k = 4 * q; k < 4 * q + 4; ++k)
          to[((b * quads + q) * kLaneRows + r) * 4 + k % 4] =
              static_cast<uint8_t>(128 + (row < rows && k < cols ? from[row * cols + k] : 0));
    }
  });
}

// ---------------------------------------------------------------------------------------------- in a recorded pass

namespace {

// input: x. attribute: eps. binding: weight.
class RecordedNorm : public OperationOf<NormCall, 1> {
 public:
  explicit RecordedNorm(const Noted& n) : width_(n.value(n.output).width), eps_(static_cast<float>(n.number("eps"))) {
    weight_ = checked_array<float>(n.tensor("weight"), "the norm's weight", kFloat, width_);
    x_ = n.input(0, width_);
    out_ = n.checked_output(width_);
  }
  Int prepare(const Step& step, NormCall& c) const override {
    c = {step.at<const float>(x_), nullptr, weight_, eps_, width_, step.rows(x_), nullptr, step.at<float>(out_)};
    return 0;
  }
  void run(Team& team, const NormCall& c, const char*) const override { rms_norm(team, c); }

 private:
  const Int width_;
  const float eps_;
  const float* weight_;
  Int x_, out_;
};
CAI_OPERATION("rms_norm", RecordedNorm);

// input: x. attribute: eps. bindings: weight, bias.
class RecordedLayerNorm : public OperationOf<LayerNormCall, 1> {
 public:
  explicit RecordedLayerNorm(const Noted& n)
      : width_(n.value(n.output).width),
        eps_(static_cast<float>(n.number("eps"))),
        weight_(checked_array<float>(n.tensor("weight"), "the norm's weight", kFloat, width_)),
        bias_(checked_array<float>(n.tensor("bias"), "the norm's bias", kFloat, width_)),
        x_(n.input(0, width_)),
        out_(n.checked_output(width_)) {}
  Int prepare(const Step& step, LayerNormCall& c) const override {
    c = {step.at<const float>(x_), weight_, bias_, eps_, width_, step.rows(x_), step.at<float>(out_)};
    return 0;
  }
  void run(Team& team, const LayerNormCall& c, const char*) const override { layer_norm(team, c); }

 private:
  const Int width_;
  const float eps_;
  const float *weight_, *bias_;
  const Int x_, out_;
};
CAI_OPERATION("layer_norm", RecordedLayerNorm);

// input: x.
class RecordedGelu : public OperationOf<GeluCall, 1> {
 public:
  explicit RecordedGelu(const Noted& n)
      : width_(n.value(n.output).width), x_(n.input(0, width_)), out_(n.checked_output(width_)) {}
  Int prepare(const Step& step, GeluCall& c) const override {
    c = {step.at<const float>(x_), width_, width_, step.rows(x_), step.at<float>(out_)};
    return 0;
  }
  void run(Team& team, const GeluCall& c, const char*) const override { gelu(team, c); }

 private:
  const Int width_, x_, out_;
};
CAI_OPERATION("gelu", RecordedGelu);

// inputs: x, and numbers of the table's rows, int32 [rows, 1], if they are not those of x's rows modulo the table's.
// binding: table.
class RecordedAddRows : public OperationOf<AddRowsCall, 1> {
 public:
  explicit RecordedAddRows(const Noted& n)
      : width_(n.value(n.output).width),
        table_rows_(rows_of(n.tensor("table"), "the table")),
        table_(checked_matrix<float>(n.tensor("table"), "the table", kFloat, table_rows_, width_)),
        x_(n.input(0, width_)),
        index_(n.inputs.size() > 1 ? n.input(1, 1, ValueType::kInt32) : -1),
        out_(n.checked_output(width_)) {}
  Int prepare(const Step& step, AddRowsCall& c) const override {
    c = {step.at<const float>(x_), table_, index_ < 0 ? nullptr : step.at<const int32_t>(index_), table_rows_, width_,
         step.rows(x_), step.at<float>(out_)};
    check_add_rows(c);
    return 0;
  }
  void run(Team& team, const AddRowsCall& c, const char*) const override { add_rows(team, c); }

 private:
  const Int width_, table_rows_;
  const float* table_;
  const Int x_, index_, out_;
};
CAI_OPERATION("add_rows", RecordedAddRows);

// input: gate and up side by side.
class RecordedSwiglu : public OperationOf<SwigluCall, 1> {
 public:
  explicit RecordedSwiglu(const Noted& n)
      : width_(n.value(n.output).width), x_(n.input(0, 2 * width_)), out_(n.checked_output(width_)) {}
  Int prepare(const Step& step, SwigluCall& c) const override {
    c = {step.at<const float>(x_), width_, step.rows(x_), step.at<float>(out_)};
    return 0;
  }
  void run(Team& team, const SwigluCall& c, const char*) const override { swiglu(team, c); }

 private:
  const Int width_, x_, out_;
};
CAI_OPERATION("swiglu", RecordedSwiglu);

// input: ids, int32 [rows, 1]. binding: matrix (the numbers of a PackedMatrix).
class RecordedEmbedding : public OperationOf<GatherCall, 1> {
 public:
  explicit RecordedEmbedding(const Noted& n)
      : matrix_(reinterpret_cast<const PackedMatrix*>(
            checked_array<const Int>(n.tensor("matrix"), "the matrix", kInt64, sizeof(PackedMatrix) / sizeof(Int)))),
        ids_(n.input(0, 1, ValueType::kInt32)),
        out_(n.checked_output(matrix_->cols)) {}
  Int prepare(const Step& step, GatherCall& c) const override {
    c = {matrix_, step.at<const int32_t>(ids_), step.rows(ids_), step.at<float>(out_)};
    check_gather(c);
    return 0;
  }
  void run(Team& team, const GatherCall& c, const char*) const override { gather(team, c); }

 private:
  const PackedMatrix* matrix_;
  const Int ids_, out_;
};
CAI_OPERATION("embedding", RecordedEmbedding);

struct TakeCall {
  const float* x;
  const int32_t* index;
  Int width, count;
  float* out;
};

// inputs: x, and numbers of its rows, int32 [rows of the output, 1]. The output may have another axis than x.
class RecordedTake : public OperationOf<TakeCall, 1> {
 public:
  explicit RecordedTake(const Noted& n)
      : width_(n.value(n.output).width),
        x_(n.input(0, width_, ValueType::kFloat32, false)),
        index_(n.input(1, 1, ValueType::kInt32)),
        out_(n.checked_output(width_)) {}
  Int prepare(const Step& step, TakeCall& c) const override {
    c = {step.at<const float>(x_), step.at<const int32_t>(index_), width_, step.rows(index_), step.at<float>(out_)};
    for (Int i = 0; i < c.count; ++i)
      if (c.index[i] < 0 || c.index[i] >= step.rows(x_))
        TVM_FFI_THROW(IndexError) << "row " << c.index[i] << " is wanted of " << step.rows(x_);
    return 0;
  }
  void run(Team& team, const TakeCall& c, const char*) const override {
    over_rows(team, c.count, c.width, [&](Int r0, Int r1) {
      for (Int r = r0; r < r1; ++r)
        std::memcpy(c.out + r * c.width, c.x + c.index[r] * c.width, static_cast<size_t>(c.width) * sizeof(float));
    });
  }

 private:
  const Int width_, x_, index_, out_;
};
CAI_OPERATION("take_rows", RecordedTake);

}  // namespace
}  // namespace cai
