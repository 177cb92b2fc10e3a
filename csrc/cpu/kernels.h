// The table of single-thread kernels that each instruction set provides. Row-wise arithmetic only: who calls them with
// which rows, on which thread, is decided in ops.cpp.
//
// Order of reduction. A dot product over K columns is one vector accumulator of the instruction set's width, filled from
// column 0 upwards, then summed by one fixed tree (Simd::sum4). It does not depend on how many rows of x are in a tile, on
// the number of tiles or on the thread, so a row of the result is the same bits alone and in a batch.
#pragma once

#include <cstdint>

namespace cai {

// How a matrix element is stored. The values are shared with kernels/cpu_library.py.
enum class Store : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3 };

constexpr int64_t kBlockRows = 4;   // rows of a packed matrix that lie interleaved
constexpr int64_t kBlockCols = 16;  // columns of one row that lie together

// A matrix packed for streaming: [ceil(rows/4)][ceil(cols/16)][4][16] elements, padded with zeros, so that a block of four
// rows is one sequential stream of whole cache lines.
struct PackedMatrix {
  const void* data;
  const float* scale;  // per row, or null
  Store store;
  int64_t rows;
  int64_t cols;
};

// Where the result of a row goes: out[m * ld + (index ? index[row] : row)], plus residual at the same place, and
// optionally a copy in row order (the input of the next core).
struct Epilogue {
  float* out;              // may be null when only `copy` is wanted
  int64_t ld_out;
  const int32_t* index;    // per row of the matrix, or null
  const float* bias;       // per output feature (after index), or null
  const float* residual;   // same leading dimension as out, or null
  int64_t ld_residual;
  float* copy;             // or null
  int64_t ld_copy;
};

struct AttentionShape {
  int64_t query_heads, kv_heads, head_dim, page_size, pages_per_sequence;
  float scale;
  Store store;  // of the cache
};

struct KernelTable {
  const char* name;
  // y[m, row] for row blocks [block0, block1) of four rows each and all M rows of x.
  void (*linear)(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                 const Epilogue& e);
  // out = x / rms(x) * weight for rows [row0, row1); when residual_out is given, x + residual is stored there first.
  void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps, int64_t H, int64_t row0,
                   int64_t row1, float* residual_out, float* out);
  // out[m, i] = silu(gate_up[m, i]) * gate_up[m, I + i]
  void (*swiglu)(const float* gate_up, int64_t I, int64_t row0, int64_t row1, float* out);
  // Rows of a packed matrix, dequantized.
  void (*gather)(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out);
  // Rotate q and k of rows [row0, row1) in place, write k and v into the cache. See ops.cpp for the layouts.
  void (*rope_kv_write)(float* qkv, const int32_t* positions, const int32_t* slots, const float* cos_sin,
                        int64_t rotary_dim, const AttentionShape& shape, void* k_cache, void* v_cache, int64_t row0,
                        int64_t row1);
  // Causal attention of `count` query rows of one sequence, the first at absolute position `position`, for one KV head.
  void (*attention)(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head,
                    const int32_t* pages, const void* k_cache, const void* v_cache, const AttentionShape& shape,
                    float* out, int64_t ldo);
};

const KernelTable* kernels_generic();
#if defined(__x86_64__) || defined(_M_X64)
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
#elif defined(__aarch64__)
const KernelTable* kernels_neon();
#endif

}  // namespace cai
