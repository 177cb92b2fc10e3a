// The table of single-thread kernels that each instruction set provides. They only compute rows. The operations
// (linear_ops.cpp, row_ops.cpp, attention_ops.cpp) divide the rows among the threads.
//
// Order of reduction. A dot product over K columns is one vector accumulator of the instruction set's width, filled from
// column 0 upwards, then summed by one fixed tree (Simd::sum4). With int4 weights, each unit of 32 columns is summed from
// its first column upwards; the units' sums are scaled and added from the first unit upwards (int4.inl). The order does not
// depend on the rows of x in a tile, the number of tiles or the thread. So a row of the result has the same bits alone and
// in a batch. With int8 activations (int8_rows.inl) the sum over a group of 16 columns is one of integers, exact in any order;
// the groups' sums are scaled and added from the first group upwards.
#pragma once

#include <cstdint>

namespace cai {

// How a matrix element is stored. The values are shared with kernels/cpu_library.py.
// kInt8Quads: int8 weights, laid out for int8 activations.
enum class Store : int64_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3, kInt4 = 4, kInt8Quads = 5 };

constexpr int64_t kBlockRows = 4;   // rows of a packed matrix that lie interleaved
constexpr int64_t kBlockCols = 16;  // columns of one row that lie together
constexpr int64_t kLaneRows = 16;   // the same for int4 and for quads of int8: the rows are the lanes of a vector
constexpr int64_t kInt4Cols = 32;   // columns of a unit of int4 codes; columns are padded to whole units

// A matrix packed for streaming, so that a block of four rows (sixteen of int4 and quads) is one sequential stream of whole
// cache lines:
//   [ceil(rows/4)][ceil(cols/16)][4][16] elements, padded with zeros;
//   int4: [ceil(rows/16)][ceil(cols/32)][4][16] words of 32 bits: half byte j of word [b][c][q][r], counted from the lowest,
//   is column 32 c + 8 q + j of row 16 b + r. So the lanes of a vector of words are rows, and masks select its eight
//   columns. Scales and zero points per group of columns, [ceil(rows/16)][ceil(cols/group)][16];
//   quads: [ceil(rows/16)][ceil(cols/16)][4][16][4] bytes: byte j of quad [b][c][q][r] is column 16 c + 4 q + j of row 16 b + r
//   plus 128 (VNNI's first operand is unsigned), padded with 128.
// kernels/cpu_library.py lays these seven integers out.
struct PackedMatrix {
  const void* data;
  const void* scale;  // fp32 [rows] for int8 and quads; bf16 blocks for int4; else null
  Store store;
  int64_t rows;
  int64_t cols;
  const uint8_t* zero;  // int4: blocks of zero points, or null for 8
  int64_t group;        // int4: columns that share a scale: 32, 64 or 128; quads: codes of an element of x, 1 or 2
};
static_assert(sizeof(PackedMatrix) == 56 && sizeof(void*) == 8, "Python writes it as seven 64-bit fields");

inline int64_t block_rows(const PackedMatrix& w) { return w.store >= Store::kInt4 ? kLaneRows : kBlockRows; }
inline int64_t blocks_of(const PackedMatrix& w) { return (w.rows + block_rows(w) - 1) / block_rows(w); }
inline int64_t groups_of(const PackedMatrix& w) { return (w.cols + w.group - 1) / w.group; }  // int4

// Bytes of one block of rows.
inline int64_t block_bytes(const PackedMatrix& w) {
  constexpr int64_t kSize[] = {4, 2, 2, 1, 0, 1};
  if (w.store == Store::kInt4) return (w.cols + kInt4Cols - 1) / kInt4Cols * kInt4Cols * kLaneRows / 2;
  return (w.cols + kBlockCols - 1) / kBlockCols * kBlockCols * block_rows(w) * kSize[static_cast<int64_t>(w.store)];
}

// Where a row's result is stored: out[m * ld + (index ? index[row] : row)], plus the residual at the same place.
// `copy` gets the result again, in row order, as the next core's input.
struct Epilogue {
  float* out;              // may be null when only `copy` is wanted
  int64_t ld_out;
  const int32_t* index;    // per row of the matrix, or null
  const float* bias;       // per output feature (after index), or null
  const float* residual;   // same leading dimension as out, or null
  int64_t ld_residual;
  float* copy;             // or null
  int64_t ld_copy;

  void skip_rows(int64_t rows) {  // of x
    if (out) out += rows * ld_out;
    if (residual) residual += rows * ld_residual;
    if (copy) copy += rows * ld_copy;
  }
};

// Prefetch plan: continue past the current block up to `limit`, then from `next`, which this thread reads afterwards.
struct Ahead {
  const char* limit;
  const char* next;
};

// M rows of x [M, K] rounded to int8, with a scale for every group of 16 columns (see int8_rows.inl). An element has one code,
// or two: x is about coarse * 254 scale + fine * scale. Rows lie in tiles of kCodeTile, the last tile with the rows that are
// left: so what a tile of the product reads is one stream. In a tile of `rows` rows: codes [groups][parts][rows][16], padded
// with zeros, and shares [groups][parts][rows].
constexpr int64_t kCodeGroup = 16, kCodeTile = 12;
constexpr float kFineCodes = 254.0f;  // steps of the fine code in one of the coarse
struct CodeShare {
  float scale;    // x is about code * scale
  int32_t start;  // -128 times the sum of the codes: what weights that are 128 too high add to a product
};
struct Int8Rows {
  int8_t* codes;
  CodeShare* shares;
  int64_t M, groups;  // of columns, times the parts
  int64_t parts;      // codes of an element

  int64_t tile_rows(int64_t tile) const { return M - tile * kCodeTile < kCodeTile ? M - tile * kCodeTile : kCodeTile; }
  int8_t* tile_codes(int64_t tile) const { return codes + tile * kCodeTile * groups * kCodeGroup; }
  CodeShare* tile_shares(int64_t tile) const { return shares + tile * kCodeTile * groups; }
};

// Rows of x for int4 weights, with memory of the calling thread for the prepared rows. linear_int4 prepares them once
// for all calls with the same rows and column count.
struct Int4Input {
  const float* x;         // [M, ldx]
  int64_t ldx;
  float* memory;          // int4_floats(M, cols)
  bool prepared, scaled;  // linear_int4's own; false at first
};
constexpr int64_t kInt4Chunk = 32;  // rows of x, at most, in one call
inline int64_t int4_floats(int64_t M, int64_t cols) {
  const int64_t units = (cols + kInt4Cols - 1) / kInt4Cols;
  return M * (units * kInt4Cols + 16 + (units + 3) / 4 * 4);
}

struct AttentionShape {
  int64_t query_heads, kv_heads, head_dim, page_size, pages_per_sequence;
  int64_t window;      // a query sees this many positions, its own included; 0: all before it
  const float* sinks;  // [query_heads], or null
  float scale;
  Store store;  // of the cache
};

// Up to kCrossQueries query vectors [head_dim] that see the same keys, and where their results go: partial[i] gets a state of
// state_floats floats, or, where it is null, out[i] the result [head_dim].
constexpr int kCrossQueries = 8;
struct CrossQueries {
  int64_t count;
  const float* q[kCrossQueries];
  float *partial[kCrossQueries], *out[kCrossQueries];
};

// Attention over an encoder's window (encoder_attention.inl): positions of a block of packed keys and values, and query rows
// that share one pass over the blocks.
constexpr int64_t kKeyBlock = 64, kEncoderRows = 24;
// Floats of a window packed for one KV head, and of the memory that the kernel works in.
inline int64_t window_floats(int64_t rows, int64_t head_dim) {
  return (rows + kKeyBlock - 1) / kKeyBlock * kKeyBlock * (head_dim + (head_dim + 15) / 16 * 16);
}
inline int64_t encoder_work_floats(int64_t head_dim) { return kEncoderRows * (head_dim + (head_dim + 15) / 16 * 16); }

// Sampling processes the vocabulary in blocks of this many tokens.
constexpr int64_t kSampleBlock = 128;

struct KernelTable {
  const char* name;
  // y[m, row] for row blocks [block0, block1) and all M rows of x. Float and int8 weights.
  void (*linear)(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, int64_t block0, int64_t block1,
                 const Epilogue& e, const Ahead& ahead);
  // Weights of row blocks [block0, block1) as fp32 blocks, which is nothing to do for fp32 itself. Float and int8 weights.
  void (*widen)(const PackedMatrix& w, int64_t block0, int64_t block1, float* panel);
  // The same as `linear`, faster from some rows of x on. panel: what widen wrote for these blocks, or fp32 weights themselves.
  void (*linear_many)(const float* x, int64_t M, int64_t ldx, const PackedMatrix& w, const float* panel, int64_t block0,
                      int64_t block1, const Epilogue& e);
  // The same as `linear` for quads of int8 weights and rows [row0, row1) of x rounded to int8, whole tiles of them. e: of x's
  // first row.
  void (*linear_int8)(const Int8Rows& x, int64_t row0, int64_t row1, const PackedMatrix& w, int64_t block0, int64_t block1,
                      const Epilogue& e, const Ahead& ahead);
  // The same for int4 weights and at most kInt4Chunk rows of x.
  void (*linear_int4)(Int4Input& x, int64_t M, const PackedMatrix& w, int64_t block0, int64_t block1,
                      const Epilogue& e, const Ahead& ahead);
  // Rows [row0, row1) of x [M, K] to their places among the codes.
  void (*quantize_rows)(const float* x, int64_t ldx, int64_t K, int64_t row0, int64_t row1, const Int8Rows& to);
  // out = x / rms(x) * weight for rows [row0, row1); when residual_out is given, x + residual is stored there first.
  void (*rms_norm)(const float* x, const float* residual, const float* weight, float eps, int64_t H, int64_t row0,
                   int64_t row1, float* residual_out, float* out);
  // out = (x - mean) / sqrt(variance + eps) * weight + bias for rows [row0, row1).
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t H, int64_t row0,
                     int64_t row1, float* out);
  // out[m, i] = x[m, i] Phi(x[m, i])
  void (*gelu)(const float* x, int64_t ldx, int64_t I, int64_t row0, int64_t row1, float* out);
  // out[m, i] = silu(gate_up[m, i]) * gate_up[m, I + i]
  void (*swiglu)(const float* gate_up, int64_t ld, int64_t I, int64_t row0, int64_t row1, float* out);
  // Rows of a packed matrix, dequantized.
  void (*gather)(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out);
  // Rotates the first rotary_dim dimensions of `heads` heads of one row, of head_dim each, from x to out (which may be x).
  // cos_sin: that position's cosines, then sines.
  void (*rotate)(const float* x, int64_t heads, int64_t head_dim, const float* cos_sin, int64_t rotary_dim, float* out);
  // One rotated key and one value into a slot of the cache, for one KV head.
  void (*write_kv)(const float* k, const float* v, int64_t slot, int64_t kv_head, const AttentionShape& shape,
                   void* k_cache, void* v_cache);
  // Causal attention of `count` query rows of one sequence, the first at absolute position `position`, for one KV head, over
  // the splits [split0, split1) of the keys. If `partial` is null, the splits must hold all keys that the rows see, and the
  // result goes to out. Otherwise there is one split, and `partial` gets the state of every row and head (attention.inl).
  void (*attention)(const float* q, int64_t ldq, int64_t position, int64_t count, int64_t kv_head,
                    const int32_t* pages, const void* k_cache, const void* v_cache, const AttentionShape& shape,
                    int64_t split0, int64_t split1, float* partial, float* out, int64_t ldo);
  // Merges the states of `splits` splits, `stride` floats apart, in order, and finishes one row's heads of one KV head.
  void (*combine)(const float* partial, int64_t splits, int64_t stride, int64_t kv_head, const AttentionShape& shape,
                  float* out);
  // Packs keys and values [rows, ld] of one KV head of an encoder's window, window_floats of them.
  void (*pack_window)(const float* k, const float* v, int64_t ld, int64_t rows, int64_t head_dim, float* packed);
  // Attention of `count` query rows of one head over all rows of a packed window. work: encoder_work_floats floats.
  void (*encoder_attention)(const float* q, int64_t ldq, int64_t count, const float* packed, int64_t rows,
                            int64_t head_dim, float scale, float* work, float* out, int64_t ldo);
  // Keys and values [count, ld] of one KV head into the first `count` places of a page.
  void (*write_page)(const float* k, const float* v, int64_t ld, int64_t count, int64_t page, int64_t kv_head,
                     const AttentionShape& shape, void* k_cache, void* v_cache);
  // Attention to all `rows` positions in `pages`, without a causal limit, for one KV head and the splits [split0, split1).
  // Results are finished only if these are all splits.
  void (*cross_attention)(const CrossQueries& queries, int64_t kv_head, const int32_t* pages, int64_t rows,
                          const void* k_cache, const void* v_cache, const AttentionShape& shape, int64_t split0,
                          int64_t split1);
  // The softmax [rows] of one query vector over the keys in `pages`.
  void (*cross_weights)(const float* q, int64_t kv_head, const int32_t* pages, int64_t rows, const void* k_cache,
                        const AttentionShape& shape, float* out);
  // Sampling (sampling_ops.cpp). The greatest of each block of `count` logits; returns whether one of them is NaN, which
  // leaves the peaks undefined.
  bool (*logit_peaks)(const float* logits, int64_t count, float* peaks);
  // Logits whose bit in `mask` is 0, counted from the lowest of the first word, become -inf.
  void (*mask_logits)(float* logits, int64_t count, const uint32_t* mask);
  // Weights of a block of tokens: e^((logit - greatest) * inverse_temperature) in units of 2^-30, 0 to 2^30. Writes
  // kSampleBlock of them, zeros beyond `count`.
  void (*token_weights)(const float* logits, int64_t count, float greatest, float inverse_temperature, int32_t* weights);
  // Writes each block's sum of weights. peaks: of the blocks, from logit_peaks. If `ids` is not null, also writes the tokens of
  // weight `lowest` (above 0) or more, numbered from first_id, with their weights, and returns their count. These two
  // outputs need room for whole blocks.
  int64_t (*weight_blocks)(const float* logits, int64_t count, const float* peaks, float greatest,
                           float inverse_temperature, int64_t* sums, int32_t lowest, int32_t first_id, int32_t* ids,
                           int32_t* kept);
  // The sum of the weights of at least `lowest`.
  int64_t (*sum_from)(const int32_t* weights, int64_t count, int32_t lowest);
  // Copies the values of at least `lowest` and the numbers of their tokens. Returns their count. Both outputs need room for
  // `count` elements, and may be the inputs.
  int64_t (*collect)(const int32_t* values, const int32_t* numbers, int64_t count, int32_t lowest, int32_t* ids,
                     int32_t* kept);
};

// Pages of keys in one split, which is summed as one chain. Splits begin at multiples of this from position 0, so neither
// the batch nor the thread count moves them.
inline int64_t split_pages(int64_t page_size) { return 256 / page_size > 0 ? 256 / page_size : 1; }

// Floats of the state of one query head: maximum, sum, and the weighted values, padded.
inline int64_t state_floats(int64_t head_dim) { return 16 + (head_dim + 15) / 16 * 16; }

const KernelTable* kernels_generic();
#if defined(__x86_64__) || defined(_M_X64)
const KernelTable* kernels_avx2();
const KernelTable* kernels_avx512();
#elif defined(__aarch64__)
const KernelTable* kernels_neon();
#endif

}  // namespace cai
