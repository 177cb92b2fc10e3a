// The matrix product of a warp group, Hopper's own: m64nNk16 with its first operand in registers, the second in shared memory
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"). For `multiply_rows` of device.cuh alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cai {

#define CAI_EIGHT(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])

// c = a b, plus c where `add`: the instruction takes it as a predicate.
template <typename T>
__device__ __forceinline__ void multiply_by_warpgroup(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add);
template <typename T>
__device__ __forceinline__ void multiply_by_warpgroup(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add);

#define CAI_WARPGROUP_64(T, TYPE)                                                                                       \
  template <>                                                                                                           \
  __device__ __forceinline__ void multiply_by_warpgroup<T>(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b,        \
                                                           bool add) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {"                                       \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"                                                     \
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                                       \
                 : CAI_EIGHT(0), CAI_EIGHT(1), CAI_EIGHT(2), CAI_EIGHT(3),                                              \
                   CAI_EIGHT(4), CAI_EIGHT(5), CAI_EIGHT(6), CAI_EIGHT(7)                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                     \
  }

#define CAI_WARPGROUP_128(T, TYPE)                                                                                      \
  template <>                                                                                                           \
  __device__ __forceinline__ void multiply_by_warpgroup<T>(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b,       \
                                                           bool add) {                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                                           \
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {"                                      \
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
                 "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, " \
                 "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
                 "%62, %63"                                                                                             \
                 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 0;\n}\n"                                                       \
                 : CAI_EIGHT(0), CAI_EIGHT(1), CAI_EIGHT(2), CAI_EIGHT(3),                                              \
                   CAI_EIGHT(4), CAI_EIGHT(5), CAI_EIGHT(6), CAI_EIGHT(7),                                              \
                   CAI_EIGHT(8), CAI_EIGHT(9), CAI_EIGHT(10), CAI_EIGHT(11),                                            \
                   CAI_EIGHT(12), CAI_EIGHT(13), CAI_EIGHT(14), CAI_EIGHT(15)                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                     \
  }

CAI_WARPGROUP_64(__nv_bfloat16, "bf16")
CAI_WARPGROUP_64(__half, "f16")
CAI_WARPGROUP_128(__nv_bfloat16, "bf16")
CAI_WARPGROUP_128(__half, "f16")

#undef CAI_EIGHT
#undef CAI_WARPGROUP_64
#undef CAI_WARPGROUP_128

}  // namespace cai
