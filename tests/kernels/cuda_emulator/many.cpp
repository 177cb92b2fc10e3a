// The kernels of csrc/cuda for many rows on the emulated device, as C functions.
#include "calls.h"
#include "many_launches.h"

namespace {

using BFloat16 = __nv_bfloat16;

template <typename T>
void many(const cai::Kind& kind, const cai::ManyRows<T>& rows, cai::Group& group, const cai::ManyDevice& device,
          cai::Columns columns) {
  for (int i = 0; i < group.count; ++i) cai::measure<T>(kind, group.product[i]);
  if (cai::launch_many_rows(kind, rows, group, device, emulator::ManyLaunch<T>{}, columns) != cudaSuccess) throw std::runtime_error("refused");
}

}  // namespace

// As `run_linear`: x's rows into panels; `rows` is a cai::Rows.
extern "C" const char* run_fill(int half, const void* rows, void* panels, float* factor, int cols, int blocks) {
  return told([&] {
    auto* bytes = static_cast<uint8_t*>(panels);
    half ? emulator::fill(*static_cast<const cai::Rows<__half>*>(rows), bytes, factor, cols, blocks)
         : emulator::fill(*static_cast<const cai::Rows<BFloat16>*>(rows), bytes, factor, cols, blocks);
  });
}

// As `run_linear`; `rows` is a cai::ManyRows, whose x lies in `late`. split: eight blocks divide the columns.
extern "C" const char* run_many(int half, int store, int columns, int zero, int split, int warp_groups, int eager,
                                const void* rows, cai::Group* group, void* late, const void* then, int64_t bytes) {
  begin(eager, late, then, bytes);
  emulator::warp_groups = warp_groups != 0;
  const cai::Kind kind{static_cast<cai::Store>(store), columns, zero != 0};
  const cai::ManyDevice device{cai::kHopper, 4, 1, warp_groups != 0};
  const cai::Columns how = split ? cai::Columns::kSplit : cai::Columns::kWhole;
  return told([&] {
    half ? many(kind, *static_cast<const cai::ManyRows<__half>*>(rows), *group, device, how)
         : many(kind, *static_cast<const cai::ManyRows<BFloat16>*>(rows), *group, device, how);
  });
}
