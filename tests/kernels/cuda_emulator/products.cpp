// The kernels of csrc/cuda on the emulated device, as C functions: products_kernel, matrix_products_kernel, swiglu_kernel.
#include "device.h"
// The device comes first: it redefines what the kernels are written in.
#include "cuda/matrix_products.cuh"
#include "cuda/products.cuh"

namespace {

using cai::Int4;
using cai::Prologue;
using BFloat16 = __nv_bfloat16;

template <typename T, typename W, int M>
void run_products(const cai::Rows<T>& rows, cai::Group& group) {
  const int blocks = cai::plan<T, W>(rows, group);
  emulator::launch(blocks, cai::kThreads, [&] { cai::products_kernel<T, W, M>(rows, group); });
}

template <typename T, typename W>
void run_products(int tile, const cai::Rows<T>& rows, cai::Group& group) {
  switch (tile) {
    case 1: return run_products<T, W, 1>(rows, group);
    case 4: return run_products<T, W, 4>(rows, group);
    case 8: return run_products<T, W, 8>(rows, group);
  }
  throw std::runtime_error("no such tile");
}

template <typename T, typename W, int kHalves, Prologue kPrologue>
void run_tiles(cai::Rows<T> rows, cai::Group& group, int at_once) {
  const int tiles = cai::plan_tiles<T, W>(rows, group);
  emulator::launch(cai::blocks_for(tiles, at_once), cai::kTileThreads,
                   [&] { cai::matrix_products_kernel<T, W, kHalves, kPrologue>(rows, group, tiles); });
}

template <typename T, typename W>
void run_tiles(Prologue prologue, int tile, const cai::Rows<T>& rows, cai::Group& group, int at_once) {
  const bool few = tile <= 8;
  if (prologue == Prologue::kSwiglu) return run_tiles<T, W, 1, Prologue::kSwiglu>(rows, group, at_once);
  if (prologue == Prologue::kNone)
    return few ? run_tiles<T, W, 1, Prologue::kNone>(rows, group, at_once)
               : run_tiles<T, W, 2, Prologue::kNone>(rows, group, at_once);
  if constexpr (cai::is_same<T, BFloat16>)
    return few ? run_tiles<T, W, 1, Prologue::kNorm>(rows, group, at_once)
               : run_tiles<T, W, 2, Prologue::kNorm>(rows, group, at_once);
  throw std::runtime_error("no norm for this type");
}

// at_once 0: products_kernel. As launch_group of csrc/cuda/launch.cuh chooses, any store for float32, else what it takes.
template <typename T>
void run_group(int store, Prologue prologue, int tile, const cai::Rows<T>& rows, cai::Group& group, int at_once) {
  if constexpr (cai::is_same<T, float>) {
    switch (store) {
      case 0: return run_products<T, float>(tile, rows, group);
      case 1: return run_products<T, BFloat16>(tile, rows, group);
      case 2: return run_products<T, __half>(tile, rows, group);
      case 3: return run_products<T, int8_t>(tile, rows, group);
      case 4: return run_products<T, Int4>(tile, rows, group);
    }
  } else {
    constexpr int kOwn = cai::is_same<T, BFloat16> ? 1 : 2;
    if (store == 0) return run_products<T, float>(tile, rows, group);
    if (store == 3) return run_tiles<T, int8_t>(prologue, tile, rows, group, at_once);
    if (store == 4) return run_tiles<T, Int4>(prologue, tile, rows, group, at_once);
    if (store == kOwn) return run_tiles<T, T>(prologue, tile, rows, group, at_once);
  }
  throw std::runtime_error("no such store");
}

const char* told(const std::function<void()>& run) {
  static char message[256];
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}

}  // namespace

// Returns null, or what went wrong. `rows` is a cai::Rows of any T: its layout does not depend on T. tile: the number of
// rows that the kernel is made for. at_once: blocks that the device runs together.
extern "C" const char* run_linear(int activation, int store, int prologue, int tile, int at_once, const void* rows,
                                  cai::Group* group) {
  return told([&] {
    const auto p = static_cast<Prologue>(prologue);
    switch (activation) {
      case 0: return run_group(store, p, tile, *static_cast<const cai::Rows<float>*>(rows), *group, at_once);
      case 1: return run_group(store, p, tile, *static_cast<const cai::Rows<BFloat16>*>(rows), *group, at_once);
      case 2: return run_group(store, p, tile, *static_cast<const cai::Rows<__half>*>(rows), *group, at_once);
    }
    throw std::runtime_error("no such activation");
  });
}

extern "C" const char* run_swiglu_bf16(const void* x, int64_t x_stride, void* y, int64_t y_stride, int rows, int columns) {
  return told([&] {
    for (int m = 0; m < rows; ++m)
      emulator::launch((columns + 255) / 256, 256, [&] {
        cai::swiglu_kernel(static_cast<const BFloat16*>(x) + m * x_stride, x_stride,
                           static_cast<BFloat16*>(y) + m * y_stride, y_stride, columns);
      });
  });
}
