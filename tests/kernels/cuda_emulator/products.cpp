// products_kernel of csrc/cuda/products.cuh on the emulated device, as a C function.
#include "device.h"
// The device comes first: it redefines what the kernel is written in.
#include "cuda/products.cuh"

namespace {

template <typename T, typename W, int M>
void run(const cai::Rows<T>& rows, cai::Group& group) {
  const int blocks = cai::plan<T, W>(rows, group);
  emulator::launch(blocks, cai::kThreads, [&] { cai::products_kernel<T, W, M>(rows, group); });
}

template <typename T, typename W>
void run_rows(int tile, const cai::Rows<T>& rows, cai::Group& group) {
  switch (tile) {
    case 1: return run<T, W, 1>(rows, group);
    case 4: return run<T, W, 4>(rows, group);
    case 8: return run<T, W, 8>(rows, group);
    case 16: return run<T, W, 16>(rows, group);
  }
  throw std::runtime_error("no such tile");
}

template <typename T>
void run_store(int store, int tile, const cai::Rows<T>& rows, cai::Group& group) {
  switch (store) {
    case 0: return run_rows<T, float>(tile, rows, group);
    case 1: return run_rows<T, __nv_bfloat16>(tile, rows, group);
    case 2: return run_rows<T, __half>(tile, rows, group);
    case 3: return run_rows<T, int8_t>(tile, rows, group);
  }
  throw std::runtime_error("no such store");
}

}  // namespace

// Returns null, or what went wrong. `rows` is a cai::Rows of any T: its layout does not depend on T.
extern "C" const char* run_products(int activation, int store, int tile, const void* rows, cai::Group* group) {
  static char message[256];
  try {
    switch (activation) {
      case 0: run_store(store, tile, *static_cast<const cai::Rows<float>*>(rows), *group); return nullptr;
      case 1: run_store(store, tile, *static_cast<const cai::Rows<__nv_bfloat16>*>(rows), *group); return nullptr;
      case 2: run_store(store, tile, *static_cast<const cai::Rows<__half>*>(rows), *group); return nullptr;
    }
    throw std::runtime_error("no such activation");
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}
