// The kernels of csrc/cuda on the emulated device, as C functions.
#include "device.h"
// The device comes first: it redefines what the kernels are written in.
#include "cuda/plan.cuh"
#include "calls.h"

namespace {

using BFloat16 = __nv_bfloat16;

// at_once: clusters that the device runs together. cluster: 0 for the one that the launch would choose.
template <typename T, typename W, int kHalves>
void run_instance(cai::Rows<T> rows, cai::Group& group, int cluster, int at_once) {
  for (int i = 0; i < group.count; ++i) {
    cai::Product& p = group.product[i];
    const cai::TileSteps steps = cai::steps_of<W>(p.cols);
    p.steps = steps.steps;
    p.last_blocks = steps.last_blocks;
    p.tile_bytes = cai::bytes_of_tile<W>(steps);
  }
  cai::Cut cut = cai::cut_launch<T, W>(rows, group, cai::kHopper, cluster);
  if (cut.bytes == 0) throw std::runtime_error("the rows do not fit");
  cai::choose_blocks(cut, at_once);
  emulator::launch(cut.blocks, cai::kThreads, [&] { cai::decode_products_kernel<T, W, kHalves>(rows, group, cut); }, cut.cluster,
                   cut.bytes);
}

template <typename T, typename W>
void run_store(const cai::Rows<T>& rows, cai::Group& group, int cluster, int at_once, bool wide) {
  return wide || rows.count > 8 ? run_instance<T, W, 2>(rows, group, cluster, at_once)
                                : run_instance<T, W, 1>(rows, group, cluster, at_once);
}

template <typename T, int kGroup>
void run_int4(const cai::Rows<T>& rows, cai::Group& group, bool zero, int cluster, int at_once, bool wide) {
  return zero ? run_store<T, cai::Int4<kGroup, true>>(rows, group, cluster, at_once, wide)
              : run_store<T, cai::Int4<kGroup, false>>(rows, group, cluster, at_once, wide);
}

template <typename T>
void run_group(int store, int columns, bool zero, const cai::Rows<T>& rows, cai::Group& group, int cluster, int at_once,
               bool wide) {
  if (store == 0) return run_store<T, T>(rows, group, cluster, at_once, wide);
  if (store == 1) return run_store<T, int8_t>(rows, group, cluster, at_once, wide);
  if (columns == 32) return run_int4<T, 32>(rows, group, zero, cluster, at_once, wide);
  if (columns == 64) return run_int4<T, 64>(rows, group, zero, cluster, at_once, wide);
  return run_int4<T, 128>(rows, group, zero, cluster, at_once, wide);
}

}  // namespace

// Returns null, or what went wrong. `rows` is a cai::Rows of any T: its layout does not depend on T. wide: by the kernel for up
// to 16 rows, whatever there are. until: x's, which `rows` names, are written from here when the kernel waits for them.
extern "C" const char* run_linear(int half, int store, int columns, int zero, int cluster, int at_once, int wide, int eager,
                                  const void* rows, cai::Group* group, void* late, const void* then, int64_t bytes) {
  begin(eager, late, then, bytes);
  return told([&] {
    if (half) {
      run_group(store, columns, zero != 0, *static_cast<const cai::Rows<__half>*>(rows), *group, cluster, at_once, wide != 0);
    } else {
      run_group(store, columns, zero != 0, *static_cast<const cai::Rows<BFloat16>*>(rows), *group, cluster, at_once, wide != 0);
    }
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
