// The operations on whole tensors, by address: the functions that Python calls (exports.cpp) and that a recorded program
// runs (program.cpp). The callers in kernels/ have checked shapes, dtypes and contiguity. Activations are fp32, row-major.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace cai {

using Int = int64_t;

template <class T>
inline T* pointer(Int address) {
  return reinterpret_cast<T*>(static_cast<intptr_t>(address));
}

// The kernels in use: the best instruction set of this processor, or the one chosen by name.
const KernelTable& kernels();

// y [M, ldo] = the members' outputs side by side (+ residual). desc: [members, in_features, z_ld], then the members as
// CpuLinear in kernels/slim_linear.py lays them out. scratch: M * z_ld floats.
void linear_group(Int desc, Int x, Int M, Int ldx, Int out, Int ldo, Int residual, Int ldr, Int scratch);

// residual and residual_out are both 0 or both given.
void rms_norm(Int x, Int residual, Int weight, double eps, Int H, Int M, Int residual_out, Int out);

void swiglu(Int gate_up, Int I, Int M, Int out);

// matrix: the five integers of a PackedMatrix. Raises IndexError for an id outside it.
void gather(Int matrix, Int ids, Int n, Int out);

// shape: [query_heads, kv_heads, head_dim, page_size, pages_per_sequence, store]
void rope_kv_write(Int qkv, Int M, Int positions, Int slots, Int cos_sin, Int rotary_dim, Int shape, Int k_cache,
                   Int v_cache);
void paged_attention(Int q, Int ldq, Int query_start, Int context_len, Int page_table, Int sequences, Int shape,
                     double scale, Int k_cache, Int v_cache, Int out, Int ldo);

// A row-major matrix of elements of `size` bytes into the layout of PackedMatrix.
void pack(Int source, Int rows, Int cols, Int size, Int target);

// A recorded sequence of the operations above over M rows; see program.cpp.
void run_program(Int program, Int x, Int M, Int out, Int workspace, Int batch);

}  // namespace cai
