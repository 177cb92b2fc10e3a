// The instructions that CUDA C++ has no function for, and pairs of 16-bit numbers in one register. tests/kernels/
// cuda_emulator/device.h has the same functions for a CPU, and defines the guard.
#pragma once

#ifndef CAI_DEVICE_FUNCTIONS
#define CAI_DEVICE_FUNCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cai {

// ---------------------------------------------------------------------------------- programmatic dependent launch

// Until the kernel before this one has ended and its writes are seen. Every kernel waits, also those that read nothing of
// it: the end of a kernel then means the end of all before it. Without the launch attribute, and before sm_90: nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may take free room from now on; they read weights and then wait as above.
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ------------------------------------------------------------------------------------------- asynchronous copies

// Copies BYTES (4, 8 or 16, aligned so) from global to shared memory; of them `valid` are read, the rest become zero.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16) {  // past the first-level cache, which is left to x
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(valid) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(valid)
                 : "memory");
  }
}

// The copies since the last call are a group. Groups end in order.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the newest N groups of this thread have ended.
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---------------------------------------------------------------------------------------------- matrix products

// c [16, 8] += a [16, 16] b [16, 8], the warp together. Lane 4 g + t holds of a rows g and g + 8 (a0, a1: slots 2 t and
// 2 t + 1; a2, a3: 2 t + 8 and 2 t + 9), of b the same slots of column g (b0, b1), of c rows g (c0, c1) and g + 8 (c2, c3)
// in columns 2 t and 2 t + 1.
template <typename T>
__device__ __forceinline__ void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_accumulate<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_accumulate<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -------------------------------------------------------------------------------- two 16-bit numbers in a register

// Bytes of a (0 to 3) and b (4 to 7) picked by the four digits of `picks`, the lowest first.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t picks) {
  return __byte_perm(a, b, picks);
}

// (a & mask) | bits, in one instruction: the compiler makes two of it where both are constants.
__device__ __forceinline__ uint32_t masked_or(uint32_t a, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(mask), "r"(bits));
  return out;
}

template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  __nv_bfloat162 x, y;
  __builtin_memcpy(&x, &a, 4);
  __builtin_memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  __builtin_memcpy(&a, &x, 4);
  return a;
}
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__half>(uint32_t a, uint32_t b) {
  __half2 x, y;
  __builtin_memcpy(&x, &a, 4);
  __builtin_memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  __builtin_memcpy(&a, &x, 4);
  return a;
}

// Rounded once. bfloat16 alone: a half's product may overflow where the norm that needs it would not.
__device__ __forceinline__ uint32_t multiply_bfloat16_pairs(uint32_t a, uint32_t b) {
  __nv_bfloat162 x, y;
  __builtin_memcpy(&x, &a, 4);
  __builtin_memcpy(&y, &b, 4);
  x = __hmul2(x, y);
  __builtin_memcpy(&a, &x, 4);
  return a;
}

// ------------------------------------------------------------------------------------------------------- functions

// silu(gate) * up, float32. Spelled in single instructions, so that every kernel rounds alike.
__device__ __forceinline__ float gated(float gate, float up) {
  return __fmul_rn(__fdividef(gate, __fadd_rn(1.0f, __expf(-gate))), up);
}

__device__ __forceinline__ float inverse_root(float v) { return rsqrtf(v); }

}  // namespace cai
#endif
