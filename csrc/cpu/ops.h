// The operations on whole tensors. Every thread of a region runs the operation's function (Team). So a single operation
// (exports.cpp) and a recorded forward pass of hundreds (program.cpp) share their code. exports.cpp and the recorders
// of program.h check the dtype, device and shape of every tensor (tensors.h). Activations are fp32, row-major.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "thread_pool.h"

namespace cai {

using Int = int64_t;

template <class T>
inline T* pointer(Int address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// The kernels in use: the best instruction set of this processor, or the one chosen by name.
const KernelTable& kernels();

// Memory of the calling thread, 64-byte aligned, that stays until the next call with the same purpose.
enum class Private { kValues, kInput, kCodes, kInt4, kPanel, kQuery, kPartial, kWindow, kSampling, kCandidates, kSaved, kCount };
void* private_memory(Private purpose, Int bytes);

// Threads for `work` multiply-adds or so: waking them costs microseconds.
inline int threads_for(Int work) { return work < (Int(1) << 16) ? 1 : num_threads(); }

// Prefetches the next phase's weights into the second-level cache while a thread waits in Team::sync.
class Fetcher {
 public:
  explicit Fetcher(const char* next) : at_(next), end_(next ? next + 32768 : next) {}
  void operator()() {
    for (int line = 0; line < 4 && at_ < end_; ++line, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
};

// ------------------------------------------------------------------------------------------------------ linear group

enum class Kind : Int { kDense = 0, kLowRank = 1, kInterpolative = 2 };

// One projection, as CpuLinear in kernels/slim_linear.py lays it out.
struct Member {
  Kind kind;
  Int out_features, out_offset, rank, z_offset;
  const int32_t* pivot;
  const float* bias;
  const int32_t* place;  // interpolative, of quads: where each output feature lies among both cores' rows; else null
  PackedMatrix core[2];
};
static_assert(sizeof(Member) == 22 * sizeof(Int), "read where Python wrote it, as 64-bit fields");

struct LinearGroup {
  Int members, in_features, z_columns;
  const Member* begin() const { return reinterpret_cast<const Member*>(this + 1); }
  const Member& operator[](Int i) const { return begin()[i]; }
};
constexpr Int kMaxMembers = 64;

enum class Prologue : Int { kNone = 0, kNorm = 1, kSwiglu = 2, kLayerNorm = 3, kGelu = 4 };

struct LinearCall {
  const LinearGroup* group;
  const float* x;  // [M, in_features]; with kSwiglu [M, 2 in_features]
  Int ldx, M;
  Prologue prologue;
  const float *norm_weight, *norm_bias;
  float eps;
  const float* residual;  // [M, ldr] or null
  Int ldr;
  float* out;  // [M, ldo]: the members' outputs side by side (+ residual)
  Int ldo;
  float* scratch;  // scratch_floats(group, M) floats; of a convolution convolution_floats
  // Of a convolution (see below), else 0: rows of x in a window, and the rows of x from one row of the output to the next.
  Int window = 0, stride = 0;
};

// A convolution with three taps over windows of rows is a linear over rows that overlap, in_features = 3 * columns of x:
// after the prologue (none or GELU), the windows are copied with a row of zeros before and behind each. Then row m of a
// window's output takes the three padded rows from m * stride on. x [M * stride, in_features / 3], contiguous.
constexpr Int kTaps = 3;
Int convolution_floats(const LinearGroup& group, Int M, Int window, Int stride);
// Raises ValueError for a group, prologue, window or stride that a convolution can't have.
Prologue checked_convolution(const LinearGroup& group, Int prologue, Int window, Int stride);
// x: `rows` rows, whole windows. scratch: convolution_floats(group, rows / stride, window, stride) floats.
LinearCall convolution_call(const LinearGroup& group, const float* x, Int rows, Prologue prologue, Int window, Int stride,
                            float* out, float* scratch);
Int scratch_floats(const LinearGroup& group, Int M);
Int output_width(const LinearGroup& group);  // of all members together
// The group in an int64 tensor of `size` elements. Raises ValueError where it is not laid out as CpuLinear does it.
const LinearGroup& checked_group(const void* data, Int size);
// after: the weights that this thread reads in the phase after this operation, to be prefetched; or null.
void linear_group(Team& team, const LinearCall& call, const char* after);
constexpr Int kLinearPhases = 5;
// Where a thread of a team begins to read a group's weights.
const char* first_weights(const Team& team, const LinearGroup& group);
Int linear_work(const LinearGroup& group);  // multiply-adds of one row

// ------------------------------------------------------------------------------------------------------------ row-wise

struct NormCall {
  const float *x, *residual, *weight;  // residual and residual_out: both null or both given
  float eps;
  Int width, M;
  float *residual_out, *out;
};
void rms_norm(Team& team, const NormCall& call);

struct LayerNormCall {
  const float *x, *weight, *bias;
  float eps;
  Int width, M;
  float* out;
};
void layer_norm(Team& team, const LayerNormCall& call);

struct GeluCall {
  const float* x;  // [M, ldx]
  Int ldx, width, M;
  float* out;
};
void gelu(Team& team, const GeluCall& call);

// out = x + table[index], or table[m % table_rows] for row m where index is null.
struct AddRowsCall {
  const float *x, *table;
  const int32_t* index;
  Int table_rows, width, M;
  float* out;
};
void check_add_rows(const AddRowsCall& call);  // raises IndexError for a number outside the table
void add_rows(Team& team, const AddRowsCall& call);

struct SwigluCall {
  const float* gate_up;  // [M, 2 width]
  Int width, M;
  float* out;
};
void swiglu(Team& team, const SwigluCall& call);

struct GatherCall {
  const PackedMatrix* matrix;
  const int32_t* ids;
  Int count;
  float* out;
};
void check_gather(const GatherCall& call);  // raises IndexError for an id outside the matrix
void gather(Team& team, const GatherCall& call);

// ----------------------------------------------------------------------------------------------------------- attention

// The rows of each sequence and the pages of one cache group; see AttentionBatch in kernels/batch.py.
struct Batch {
  const int32_t *positions, *slots, *query_start, *context_len, *page_table;  // slots: null where nothing is written
  Int sequences, pages_per_sequence;
};

// One layer's heads, cache and rotary table.
struct AttentionLayer {
  AttentionShape shape;  // without pages_per_sequence, which a step says
  Int pages;             // of the cache
  void *k_cache, *v_cache;
  const float* cos_sin;  // [positions, rotary_dim]: cosines, then sines
  Int positions, rotary_dim;
  const float* head_norms;  // weights [2, head_dim] of the RMSNorm of query heads and of key heads, or null
  float norm_eps;
};

struct AttentionCall {
  AttentionLayer layer;
  Batch batch;
  float* qkv;  // [M, (query_heads + 2 kv_heads) head_dim]; may be overwritten
  Int M;
  float* out;  // [M, query_heads * head_dim]
  // Set by plan_attention:
  bool decode;  // one row of each sequence
  Int splits;   // of the longest sequence, if splits are separate pieces of work; else 1
  // Set by the caller: memory for the splits' states, as many floats as plan_attention returned.
  float* partial;
};
// Checks the batch against the layer and decides how to divide the work. Returns the floats that `partial` needs. Raises
// IndexError for a slot, page or position out of range. Call this before the region.
Int plan_attention(AttentionCall& call, const AttentionLayer& layer, int threads);
void attention(Team& team, const AttentionCall& call);
constexpr Int kAttentionPhases = 2;

// ------------------------------------------------------------------------------------------------------------ weights

// A row-major matrix of elements of `size` bytes into the layout of PackedMatrix.
void pack(const void* source, Int rows, Int cols, Int size, void* target);
// int4: rows of ceil(cols / 2) bytes, column 2 j in the low half of a byte, into the layout of PackedMatrix.
void pack_int4(const uint8_t* source, Int rows, Int cols, uint32_t* target);
// Codes of int8, row-major, as quads.
void pack_quads(const int8_t* source, Int rows, Int cols, uint8_t* target);

}  // namespace cai
