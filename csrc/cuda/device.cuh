// The instructions that CUDA C++ has no function for, and pairs of 16-bit numbers in one register. tests/kernels/
// cuda_emulator/device.h has the same functions for a CPU, and defines the guard.
#pragma once

#ifndef CAI_DEVICE_FUNCTIONS
#define CAI_DEVICE_FUNCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "panels.cuh"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CAI_WARPGROUPS
#include "warpgroup.cuh"
#endif

namespace cai {

// What the launch asked for, aligned as panels of x need it.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return memory;
}

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

// ------------------------------------------------------------------------------------------------------ bulk copies

// A barrier in shared memory: a phase of it ends when its arrivals and the bytes that they announce have come. Phases are told
// apart by their parity, 0 first.
using CopyBarrier = uint64_t;

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// One thread, once for each barrier; then `publish_barriers`, before any copy names them.
__device__ __forceinline__ void init_barrier(CopyBarrier* barrier, int arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void arrive_at(CopyBarrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives and announces bytes that copies will bring.
__device__ __forceinline__ void expect_bytes(CopyBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Copies from global to shared memory, both aligned to 16 bytes, `bytes` a multiple of 16: a part of what `barrier` expects.
// kOnce: read once a step, so that the second-level cache may forget it first. One thread.
template <bool kOnce>
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, int bytes, CopyBarrier* barrier) {
  const uint32_t to = shared_address(shared), at = shared_address(barrier);
  if constexpr (kOnce) {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(global), "r"(bytes), "r"(at), "l"(policy)
        : "memory");
  } else {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(global), "r"(bytes), "r"(at)
                 : "memory");
  }
}

// The same to the place that `shared` has in every block of the cluster whose bit is set in `blocks`, and to the barrier at its
// place in each. All of them have begun.
__device__ __forceinline__ void copy_bulk_to(void* shared, const void* global, int bytes, CopyBarrier* barrier, int blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// Until the phase of this parity has ended, and what its copies wrote is seen.
__device__ __forceinline__ void wait_for_phase(CopyBarrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// --------------------------------------------------------------------------------------------------------- clusters

// Blocks of a cluster read and write each other's shared memory, once all of them have arrived at a barrier.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Arrives at the barrier that lies at the place of `barrier` in the block of this rank.
__device__ __forceinline__ void arrive_in_block(CopyBarrier* barrier, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(barrier)), "r"(rank));
  // Without a wider scope, which would be a fence of all memory: what went before are reads of shared memory, that are done.
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

// Writes to the place that `shared` has in the block of this rank.
__device__ __forceinline__ void store_in_block(float* shared, int rank, float value) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
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

// --------------------------------------------------------------------------- matrix products of four warps together

// The same product with kRows / 8 times as many columns, which lie in shared memory as `panels.cuh` keeps rows of x: `block` is
// a block of columns of kRows rows, `half` which of its two halves. c as above, by eight rows of x. Four warps (a multiple of
// four and the next three) take part, each with 16 rows of its own. Without `add` c is what the product makes.
//
// Asynchronous: from `begin_products` until `wait_for_products` nothing that takes part may be touched. On Hopper it is one
// instruction. A model of the tensor cores that was found equal to them bit for bit has that instruction and the one above alike:
// 16 products and c are added at once (Xie et al., MMA-Sim, arXiv:2511.10909, sections on Hopper). Elsewhere it is the one above.
template <typename T, int kRows>
__device__ __forceinline__ void multiply_rows(float (&c)[kRows / 8][4], const uint32_t (&a)[4], const uint8_t* block, int half,
                                              bool add) {
#ifdef CAI_WARPGROUPS
  multiply_by_warpgroup<T>(c, a, panel_descriptor(shared_address(block), half), add);
#else
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int eight = 0; eight < kRows / 8; ++eight) {
    const uint8_t* row = block + (8 * eight + g) * kPanelRowBytes + 4 * t;
    const uint32_t b0 = *reinterpret_cast<const uint32_t*>(row + panel_chunk(g, 2 * half));
    const uint32_t b1 = *reinterpret_cast<const uint32_t*>(row + panel_chunk(g, 2 * half + 1));
    if (!add) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[eight][i] = 0.0f;
    }
    multiply_accumulate<T>(c[eight], a, b0, b1);
  }
#endif
}

// Blocks of columns that are widened before their products begin, where there are so many.
#ifdef CAI_WARPGROUPS
constexpr int kBlocksAhead = 2;
#else
constexpr int kBlocksAhead = 1;
#endif

__device__ __forceinline__ void begin_products() {
#ifdef CAI_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_products() {
#ifdef CAI_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Of the registers that a block has, four warps keep so many for each thread; others take more.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
#ifdef CAI_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef CAI_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
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
