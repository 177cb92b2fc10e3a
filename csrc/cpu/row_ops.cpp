// Row-wise operations over the threads, and the packing of weights.
#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstring>

#include "ops.h"

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

void pack(Int source, Int rows, Int cols, Int size, Int target) {
  const char* from = pointer<const char>(source);
  char* to = pointer<char>(target);
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

void pack_int4(Int source, Int rows, Int cols, Int target) {
  const uint8_t* from = pointer<const uint8_t>(source);
  uint32_t* to = pointer<uint32_t>(target);
  const Int words = (cols + kInt4Cols - 1) / kInt4Cols * (kInt4Cols / 8), width = (cols + 1) / 2;
  over_blocks(rows, kInt4Rows, rows * width, [&](Int b) {
    for (Int r = 0; r < kInt4Rows; ++r) {
      const Int row = b * kInt4Rows + r;
      for (Int k = 0; k < words; ++k) {  // the source has its columns in the same order, low halves first
        uint32_t word = 0;
        for (Int i = 0; row < rows && i < 4 && 4 * k + i < width; ++i)
          word |= static_cast<uint32_t>(from[row * width + 4 * k + i]) << (8 * i);
        to[(b * words + k) * kInt4Rows + r] = word;
      }
    }
  });
}

}  // namespace cai
