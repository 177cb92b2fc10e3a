// How a launch is cut into blocks and clusters, and a block's shared memory into parts.
#pragma once

#include "decode.cuh"

namespace cai {

// Of compute capability 9.0: 228 KiB a multiprocessor, 1 KiB of each block the system's.
constexpr Room kHopper{227 << 10, (228 / 2 - 1) << 10};
// Gated elements of x that a block makes; a cluster divides them.
constexpr int kGatedElements = 2048;

inline int rounded_up(int bytes, int multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// The columns of x in shared memory, by product, and their sum: products that read the same columns share them.
template <typename W>
int stage_columns(Group& group, int cluster) {
  int columns = 0;
  for (int i = 0; i < group.count; ++i) {
    Product& p = group.product[i];
    p.stages = 1;
    for (int before = 0; before < i; ++before) {
      const Product& other = group.product[before];
      if (other.x_col != p.x_col || other.cols != p.cols) continue;
      p.staged = other.staged;
      p.stages = 0;
      break;
    }
    if (!p.stages) continue;
    int widest = 0;
    for (int rank = 0; rank < cluster; ++rank) {
      const int parts = kParts / cluster;
      const int steps = first_step(p.steps, (rank + 1) * parts) - first_step(p.steps, rank * parts);
      if (steps > widest) widest = steps;
    }
    p.staged = columns;
    columns += widest * kStepColumns<W>;
  }
  return columns;
}

// The cut with clusters of this size. Fills in what it needs of every product.
template <typename T, typename W>
Cut cut_with(const Rows<T>& rows, Group& group, const Room& room, int cluster) {
  Cut cut{};
  cut.cluster = cluster;
  cut.slot_bytes = kStepsPerCopy * kFullStep<W>;
  cut.ring = rounded_up(kWarps * kSlots * static_cast<int>(sizeof(CopyBarrier)), 128);
  cut.partial = cut.ring + kWarps * kSlots * cut.slot_bytes;
  cut.squares = cut.partial + 2 * kParts * rows.count * kPartStride * static_cast<int>(sizeof(float));
  const int chunks = (group.product[0].cols + kSquaredColumns - 1) / kSquaredColumns;
  const int squares = rows.prologue == Prologue::kNorm ? chunks * rows.count * static_cast<int>(sizeof(float)) : 0;
  cut.x = rounded_up(cut.squares + squares, 128);
  // Rows of x begin half a turn of the banks apart, so that the lanes of two rows read from different ones.
  cut.x_stride = rounded_up(stage_columns<W>(group, cluster) * 2, 128) + 64;
  const int64_t bytes = cut.x + static_cast<int64_t>(rows.count) * cut.x_stride;
  cut.bytes = bytes > room.most ? 0 : static_cast<int>(bytes);
  for (int i = 0; i < group.count; ++i) {
    Product& p = group.product[i];
    p.first_group = cut.groups;
    const int tiles = (p.rows + kTileRows - 1) / kTileRows;
    cut.groups += (tiles + cluster - 1) / cluster;
  }
  return cut;
}

// Fills in what a launch needs of rows and products; `bytes` is 0 where the rows don't fit: fewer may. wanted: the size of
// clusters, or 0 for the smallest that leaves room for the next kernel, else the smallest that fits.
template <typename T, typename W>
Cut cut_launch(Rows<T>& rows, Group& group, const Room& room, int wanted = 0) {
  rows.x_vector = aligned_to(rows.x, 16) && rows.x_stride % 8 == 0 && aligned_to(rows.norm, 16);
  for (int i = 0; i < group.count; ++i) {
    const Product& p = group.product[i];
    rows.x_vector = rows.x_vector && p.x_col % 8 == 0 && (rows.prologue != Prologue::kSwiglu || p.cols % 8 == 0);
  }
  if (wanted != 0) return cut_with<T, W>(rows, group, room, wanted);
  const bool gated = rows.prologue == Prologue::kSwiglu;
  for (const int bytes : {room.for_two, room.most})
    for (int cluster = 1; cluster <= kParts; cluster *= 2) {
      const Cut cut = cut_with<T, W>(rows, group, room, cluster);
      const bool short_enough = !gated || group.product[0].cols * rows.count <= kGatedElements * cluster;
      if (cut.bytes != 0 && cut.bytes <= bytes && (short_enough || cluster == kParts)) return cut;
    }
  return cut_with<T, W>(rows, group, room, kParts);
}

// As many clusters as run at once at most, and every one the same number of groups of tiles, give or take one.
inline void choose_blocks(Cut& cut, int clusters_at_once) {
  const int rounds = (cut.groups + clusters_at_once - 1) / clusters_at_once;
  cut.blocks = (cut.groups + rounds - 1) / rounds * cut.cluster;
}

}  // namespace cai
