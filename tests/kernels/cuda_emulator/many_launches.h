// The launches for many rows of csrc/cuda/launch_instances.cuh on the emulated device.
#pragma once

#include "device.h"
// The device comes first: it redefines what the kernels are written in.
#include "cuda/dispatch.cuh"

namespace emulator {

template <typename T>
struct ManyLaunch {
  template <typename W, int kRows, bool kSplit>
  cudaError_t run(const cai::ManyRows<T>& rows, const cai::Group& group, const cai::ManyCut& cut) const {
    launch(cut.blocks, cai::kManyThreads, [&] { cai::many_products_kernel<T, W, kRows, kSplit>(rows, group, cut); },
           kSplit ? cai::kParts : cai::kShared, cut.bytes);
    return cudaSuccess;
  }
};

template <typename T>
void fill(cai::Rows<T> rows, uint8_t* panels, float* factor, int cols, int blocks) {
  cai::align_rows(rows, cols);
  const int parts = cai::fill_parts(rows.prologue, cols);
  launch(rows.count * parts, cai::kThreads, [&] { cai::fill_panels_kernel(rows, panels, factor, cols, blocks, parts); }, 1,
         cai::fill_shared_bytes(rows.prologue, cols));
}

}  // namespace emulator
