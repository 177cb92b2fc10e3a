// The weights of a warp on their way into shared memory: of one tile after another the part that the warp sums, in runs of up
// to two steps, several runs under way at once. A run is one bulk copy, asked for by one lane.
#pragma once

#include "arguments.cuh"
#include "device.cuh"

namespace cai {

// Which tiles a warp sums, and which part of each.
struct Share {
  int cluster, clusters;  // the warp's, and how many there are: they take the groups of tiles in turn
  int tile;               // of its group
  int part;
};

__device__ __forceinline__ int member_of(const Group& group, int tiles) {
  int member = 0;
  while (member + 1 < group.count && tiles >= group.product[member + 1].first_group) ++member;
  return member;
}

// Whether a group of tiles has a tile at this place: the last of a product may not.
__device__ __forceinline__ bool has_tile(const Product& p, int tile) { return tile * kTileRows < p.rows; }

template <typename W>
class Ring {
  const Group& group_;
  const Cut& cut_;
  const Share share_;
  const int lane_;
  uint8_t* slots_;
  CopyBarrier* barriers_;
  // What to ask for next: the rest of a part, then the part of the next group of tiles.
  const uint8_t* from_ = nullptr;
  int left_ = 0, next_group_;
  unsigned asked_ = 0, used_ = 0;

 public:
  __device__ Ring(const Group& group, const Cut& cut, const Share& share, uint8_t* memory, int warp, int lane)
      : group_(group), cut_(cut), share_(share), lane_(lane),
        slots_(memory + cut.ring + warp * kSlots * cut.slot_bytes),
        barriers_(reinterpret_cast<CopyBarrier*>(memory) + warp * kSlots), next_group_(share.cluster) {
    if (lane == 0) {
      for (int i = 0; i < kSlots; ++i) init_barrier(barriers_ + i);
      publish_barriers();
    }
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kSlots; ++i) ask();
  }

  // The next run, there. `done` must follow.
  __device__ __forceinline__ const uint8_t* next() {
    const unsigned slot = used_ % kSlots;
    wait_for_phase(barriers_ + slot, used_ / kSlots % 2);
    return slots_ + slot * cut_.slot_bytes;
  }

  // The run is read; its slot takes another.
  __device__ __forceinline__ void done() {
    __syncwarp();
    ++used_;
    ask();
  }

 private:
  __device__ __forceinline__ void ask() {
    if (left_ == 0 && !find()) return;
    const int bytes = left_ < kStepsPerCopy * kFullStep<W> ? left_ : kStepsPerCopy * kFullStep<W>;
    const unsigned slot = asked_ % kSlots;
    if (lane_ == 0) {
      expect_bytes(barriers_ + slot, bytes);
      copy_bulk<true>(slots_ + slot * cut_.slot_bytes, from_, bytes, barriers_ + slot);
    }
    ++asked_;
    from_ += bytes;
    left_ -= bytes;
  }

  // The next group of tiles in which the warp has something to sum.
  __device__ __forceinline__ bool find() {
    for (; next_group_ < cut_.groups; next_group_ += share_.clusters) {
      const Product& p = group_.product[member_of(group_, next_group_)];
      const int tile = (next_group_ - p.first_group) * cut_.cluster + share_.tile;
      const int first = first_step(p.steps, share_.part), end = first_step(p.steps, share_.part + 1);
      if (first == end || !has_tile(p, tile)) continue;
      from_ = p.w + tile * p.tile_bytes + static_cast<int64_t>(first) * kFullStep<W>;
      left_ = (end - first) * kFullStep<W>;
      if (end == p.steps) left_ -= kFullStep<W> - bytes_of_step<W>(p.last_blocks);
      next_group_ += share_.clusters;
      return true;
    }
    return false;
  }
};

}  // namespace cai
