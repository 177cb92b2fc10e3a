// From a kind of weights known at run time to the kernel's types; tests launch through it, too.
#pragma once

#include <cuda_runtime_api.h>

#include "launch.cuh"
#include "many_plan.cuh"
#include "plan.cuh"

namespace cai {

// Calls f with a value of the store's type W.
template <typename T, typename F>
auto with_store(const Kind& kind, F&& f) {
  if (kind.store == Store::kOwn) return f(T{});
  if (kind.store == Store::kInt8) return f(int8_t{});
  switch (kind.group) {
    case 32: return kind.zero ? f(Int4<32, true>{}) : f(Int4<32, false>{});
    case 64: return kind.zero ? f(Int4<64, true>{}) : f(Int4<64, false>{});
    default: return kind.zero ? f(Int4<128, true>{}) : f(Int4<128, false>{});
  }
}

template <typename T>
void measure(const Kind& kind, Product& p) {
  with_store<T>(kind, [&](auto store) {
    using W = decltype(store);
    const TileSteps steps = steps_of<W>(p.cols);
    p.steps = steps.steps;
    p.last_blocks = steps.last_blocks;
    p.tile_bytes = bytes_of_tile<W>(steps);
  });
}

// The rows from `first` on, `count` of them.
template <typename T>
Rows<T> some_rows(const Rows<T>& rows, int first, int count) {
  Rows<T> some = rows;
  some.count = count;
  some.x += first * rows.x_stride;
  if (rows.y != nullptr) some.y += first * rows.y_stride;
  if (rows.z != nullptr) some.z += first * rows.z_stride;
  if (rows.residual != nullptr) some.residual += first * rows.residual_stride;
  return some;
}

// `launch` for a kernel's types, with rows, group and cut ready; for half of the rows at a time where all of them don't fit.
template <typename T, typename Launch>
cudaError_t launch_rows(const Kind& kind, const Rows<T>& rows, const Group& group, const Room& room, const Launch& launch) {
  return with_store<T>(kind, [&](auto store) -> cudaError_t {
    using W = decltype(store);
    Rows<T> ready = rows;
    Group planned = group;
    const Cut cut = cut_launch<T, W>(ready, planned, room);
    if (cut.groups == 0) return cudaSuccess;
    if (cut.bytes != 0) {
      if (rows.count <= 8) return launch.template run<W, 1>(ready, planned, cut);
      return launch.template run<W, 2>(ready, planned, cut);
    }
    if (rows.count == 1) return cudaErrorInvalidValue;  // a row beyond what eight blocks hold
    const int half = rows.count / 2;
    const cudaError_t error = launch_rows(kind, some_rows(rows, 0, half), group, room, launch);
    if (error != cudaSuccess) return error;
    return launch_rows(kind, some_rows(rows, half, rows.count - half), group, room, launch);
  });
}

// How the columns of a launch for many rows are cut. kBest: as `multiplies_split` says.
enum class Columns { kBest, kWhole, kSplit };

// `launch` for the kernel of many rows, with group and cut ready. device: what the launch is cut for.
template <typename T, typename Launch>
cudaError_t launch_many_rows(const Kind& kind, const ManyRows<T>& rows, const Group& group, const ManyDevice& device,
                             const Launch& launch, Columns columns = Columns::kBest) {
  return with_store<T>(kind, [&](auto store) -> cudaError_t {
    using W = decltype(store);
    Group planned = group;
    if (count_groups(planned) == 0) return cudaSuccess;
    if (columns == Columns::kSplit || (columns == Columns::kBest && multiplies_split(planned, rows.count, device))) {
      const ManyCut cut = cut_many<W, kPanelRows, true>(planned, rows.count, device);
      return cut.stages < 2 ? cudaErrorNotSupported : launch.template run<W, kPanelRows, true>(rows, planned, cut);
    }
    if (!device.warp_groups) {
      const ManyCut cut = cut_many<W, kPanelRows, false>(planned, rows.count, device);
      return cut.stages < 2 ? cudaErrorNotSupported : launch.template run<W, kPanelRows, false>(rows, planned, cut);
    }
    const ManyCut cut = cut_many<W, 2 * kPanelRows, false>(planned, rows.count, device);
    return cut.stages < 2 ? cudaErrorNotSupported : launch.template run<W, 2 * kPanelRows, false>(rows, planned, cut);
  });
}

}  // namespace cai
