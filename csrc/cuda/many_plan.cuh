// How a launch for many rows of x is cut up.
#pragma once

#include "fill_panels.cuh"
#include "many.cuh"
#include "plan.cuh"

namespace cai {

struct ManyDevice {
  Room room;
  int multiprocessors, clusters;  // of the latter, those of kShared blocks that run at once with a multiprocessor for each
  bool warp_groups;  // Hopper's product of a warp group
};

// Whose groups of multiprocessors may have an odd number: not all are in clusters.
constexpr ManyDevice kHopperDevice{kHopper, 132, 32, true};

// Fills in where each product's groups of so many tiles begin; how many there are.
inline int count_groups(Group& group, int of = kTilesOfGroup) {
  int groups = 0;
  for (int i = 0; i < group.count; ++i) {
    group.product[i].first_group = groups;
    const int tiles = (group.product[i].rows + kTileRows - 1) / kTileRows;
    groups += (tiles + of - 1) / of;
  }
  return groups;
}

// Whether clusters of eight blocks divide the columns: where blocks that take all of them would leave a third of the device
// idle, or half of each cluster, for want of rows. Nothing but time depends on it.
inline bool multiplies_split(Group& group, int count, const ManyDevice& device) {
  const int rows = device.warp_groups ? 2 * kPanelRows : kPanelRows, runs = (count + rows - 1) / rows;
  return runs == 1 || count_groups(group) * runs * 3 < device.multiprocessors * 2;
}

// A cut of fewer than two stages is of a device without room for the kernel.
template <typename W, int kRows, bool kSplit>
ManyCut cut_many(Group& group, int count, const ManyDevice& device) {
  ManyCut cut{};
  constexpr int kSide = kSplit ? 1 : 2;  // of a cluster: groups, and runs of rows
  cut.groups = count_groups(group, kSide * kTilesOfGroup);
  cut.runs = (count + kRows - 1) / kRows;
  cut.row_blocks = (cut.runs + kSide - 1) / kSide;
  const int items = cut.groups * cut.row_blocks;
  cut.blocks = kSplit ? items * kParts : (items < device.clusters ? items : device.clusters) * kShared;
  const int panels = kStageBlocks<W, kSplit> * (kRows / kPanelRows) * kPanelBlock;
  cut.stage_bytes = rounded_up(panels + kTilesOfGroup * kStageSteps<W, kSplit> * kFullStep<W>, 1024);
  const int partial = kSplit ? kParts * kRows * kPartStride * static_cast<int>(sizeof(float)) : 0;
  const int taken = kRingStart + partial;
  const bool two = kSplit && device.room.for_two - taken >= 2 * cut.stage_bytes;  // blocks to a multiprocessor
  cut.stages = ((two ? device.room.for_two : device.room.most) - taken) / cut.stage_bytes;
  if (cut.stages > kMostStages) cut.stages = kMostStages;
  cut.partial = kRingStart + cut.stages * cut.stage_bytes;
  cut.bytes = cut.partial + partial;
  return cut;
}

// ------------------------------------------------------------------------------------------------------ rows to panels

// Blocks for each row of a launch of `fill_panels_kernel`.
inline int fill_parts(Prologue prologue, int cols) {
  return prologue == Prologue::kNorm ? 1 : (cols + kFillColumns - 1) / kFillColumns;
}
inline int fill_shared_bytes(Prologue prologue, int cols) {
  const int runs = (cols + kSquaredColumns - 1) / kSquaredColumns;
  return prologue == Prologue::kNorm ? runs * static_cast<int>(sizeof(float)) : 0;
}
// Fills in whether wide loads of x are aligned.
template <typename T>
void align_rows(Rows<T>& rows, int cols) {
  rows.x_vector = aligned_to(rows.x, 16) && rows.x_stride % 8 == 0 && aligned_to(rows.norm, 16) &&
                  (rows.prologue != Prologue::kSwiglu || cols % 8 == 0);
}

}  // namespace cai
