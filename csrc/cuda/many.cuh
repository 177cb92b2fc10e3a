// Linears for many rows of x: y = W x by the tensor cores, weights packed as for decode (packed.cuh), x in panels (panels.cuh),
// accumulated in float32.
//
// Eight warps, two warp groups, each multiply a tile of 16 weight rows by 64 or 128 rows of x; a ninth asks for copies, a stage
// of them at a time, which brings some columns of the eight tiles and of x. Weights are widened in registers, which is where
// Hopper's instruction takes its first operand from; x is what it reads from shared memory.
//
// With many rows the multiprocessors would ask the second-level cache for more than it gives. So four blocks are a cluster, two
// groups of tiles by two runs of rows, and a copy goes to the two blocks that need it.
//
// Batch invariance: sums are formed as the decode kernel forms them, in parts of the columns that are added in order, by an
// instruction that adds alike (device.cuh). So a row has the same bits, whatever kernel its batch took.
//
// Free of launches and of FFI, so that tests can run the same code on a CPU.
#pragma once

#include "decode.cuh"
#include "many_step.cuh"

namespace cai {

// Which columns of which tiles a stage brings.
struct Stage {
  const Product* product;
  int first_tile;  // of kTilesOfGroup
  int row_block;   // of x
  int part, step, steps;
  bool ragged;  // whether its last step is the tile's, and that is not full
  bool begins, ends;  // of its part
  bool stores;  // whether the block stores what comes of it
};

// The stages of a block, one after another, for the warp that asks for them and for those that read them alike.
template <typename W, bool kSplit>
class Walk {
  static constexpr int kCluster = kSplit ? kParts : kShared;

  const Group& group_;
  const ManyCut& cut_;
  const int rank_;
  int item_, part_, step_;  // next
  Stage stage_{};

 public:
  __device__ Walk(const Group& group, const ManyCut& cut, int block)
      : group_(group), cut_(cut), rank_(block % kCluster), item_(block / kCluster), part_(kSplit ? rank_ : 0), step_(-1) {}

  __device__ __forceinline__ const Stage& stage() const { return stage_; }

  // Goes on to the next stage. A part without steps is a stage without steps.
  __device__ __forceinline__ bool next() {
    if (item_ >= cut_.groups * cut_.row_blocks) return false;
    const int at = item_ / cut_.row_blocks;
    const Product& p = group_.product[member_of(group_, at)];
    const int group = at - p.first_group, row_block = item_ - at * cut_.row_blocks;
    const int first = first_step(p.steps, part_), end = first_step(p.steps, part_ + 1);
    stage_.product = &p;
    place(p, group, row_block);
    stage_.part = part_;
    stage_.begins = step_ < 0;
    stage_.step = step_ < 0 ? first : step_;
    constexpr int kSteps = kStageSteps<W, kSplit>;
    stage_.steps = end - stage_.step < kSteps ? end - stage_.step : kSteps;
    step_ = stage_.step + stage_.steps;
    stage_.ends = step_ == end;
    stage_.ragged = step_ == p.steps && stage_.steps > 0 && p.last_blocks != Packing<W>::kBlocks;
    if (stage_.ends) {
      step_ = -1;
      if (kSplit || ++part_ == kParts) {
        part_ = 0;
        item_ = kSplit ? cut_.groups * cut_.row_blocks : item_ + cut_.blocks / kCluster;
      }
    }
    return true;
  }

 private:
  // The block's tiles and rows. Where an odd one out would have none it takes what its neighbour has, for nothing: every stage of
  // every block brings something to the blocks that it shares with, so that none is more than a turn of the slots ahead.
  __device__ __forceinline__ void place(const Product& p, int group, int row_block) {
    stage_.stores = true;
    if constexpr (!kSplit) {
      const int groups = (p.rows + kTilesOfGroup * kTileRows - 1) / (kTilesOfGroup * kTileRows);
      group = 2 * group + rank_ % 2;
      row_block = 2 * row_block + rank_ / 2;
      stage_.stores = group < groups && row_block < cut_.runs;
      group = group < groups ? group : groups - 1;
      row_block = row_block < cut_.runs ? row_block : cut_.runs - 1;
    }
    stage_.first_tile = group * kTilesOfGroup;
    stage_.row_block = row_block;
  }
};

// Of threads that ask for copies, and of those that multiply; less where two blocks share a multiprocessor. Four warps and eight
// of them get no more than what twelve have at the launch: who takes more waits for ever.
template <bool kSplit>
constexpr int kFewRegisters = kSplit ? 32 : 40;
template <bool kSplit>
constexpr int kManyRegisters = kSplit ? 104 : 232;
template <bool kSplit>
constexpr int kLaunchRegisters = kSplit ? 80 : 168;  // 65,536 over the threads, in eights
template <bool kSplit>
constexpr bool kRegistersSuffice = 4 * kFewRegisters<kSplit> + 8 * kManyRegisters<kSplit> <= 12 * kLaunchRegisters<kSplit>;
static_assert(kRegistersSuffice<true> && kRegistersSuffice<false>, "registers that the block does not have");

template <typename T, typename W, int kRows, bool kSplit>
class Multiplier {
  static constexpr int kPanels = kRows / kPanelRows;
  static constexpr int kReaders = kSplit ? 1 : 3;  // blocks whose copies a block's slots get, and which wait for them
  static constexpr int kPanelBytes = kStageBlocks<W, kSplit> * kPanels * kPanelBlock;  // of a stage, weights follow
  static constexpr int kRunBytes = kStageSteps<W, kSplit> * kFullStep<W>;              // of a tile

  const ManyRows<T>& rows_;
  const Group& group_;
  const ManyCut& cut_;
  uint8_t* const memory_;
  const int block_, thread_, warp_, lane_;

 public:
  __device__ Multiplier(const ManyRows<T>& rows, const Group& group, const ManyCut& cut, uint8_t* memory, int block, int thread)
      : rows_(rows), group_(group), cut_(cut), memory_(memory), block_(block), thread_(thread), warp_(thread / 32),
        lane_(thread % 32) {}

  __device__ __forceinline__ void run() {
    if (thread_ == 0) {
      for (int i = 0; i < cut_.stages; ++i) {
        init_barrier(full(i));
        init_barrier(empty(i), kTilesOfGroup * kReaders);
      }
      publish_barriers();
    }
    __syncthreads();
    arrive_at_cluster();
    let_next_kernel_start();
    if (!kSplit) wait_for_cluster();  // all of its blocks are there, and their barriers
    if (warp_ >= kTilesOfGroup) {
      keep_registers<kFewRegisters<kSplit>>();
      if (warp_ == kTilesOfGroup) ask();
      if (kSplit) wait_for_cluster();
    } else {
      take_registers<kManyRegisters<kSplit>>();
      wait_for_previous_kernel();
      if (kSplit) wait_for_cluster();
      multiply();
    }
    arrive_at_cluster();
    wait_for_cluster();  // no block ends before the others have written to it
    if (kSplit && warp_ < kTilesOfGroup) finish_tile();
  }

 private:
  __device__ __forceinline__ CopyBarrier* full(int stage) const { return reinterpret_cast<CopyBarrier*>(memory_) + stage; }
  __device__ __forceinline__ CopyBarrier* empty(int stage) const { return full(kMostStages + stage); }
  __device__ __forceinline__ uint8_t* slot(int stage) const { return memory_ + kRingStart + stage * cut_.stage_bytes; }

  // ------------------------------------------------------------------------------------------------- asking for copies

  // Asks for all stages. Weights of the first ones do not wait for the kernel ahead.
  __device__ __forceinline__ void ask() {
    Walk<W, kSplit> walk(group_, cut_, block_);
    unsigned asked = 0;
    bool more = walk.next();
    for (Walk<W, kSplit> ahead = walk; more && asked < static_cast<unsigned>(cut_.stages); more = ahead.next()) {
      if (ahead.stage().steps == 0) continue;
      announce(ahead.stage(), asked);
      ask_for_weights(ahead.stage(), asked++);
    }
    wait_for_previous_kernel();
    const unsigned ready = asked;
    asked = 0;
    Walk<W, kSplit> again(group_, cut_, block_);
    while (again.next()) {
      const Stage& stage = again.stage();
      if (stage.steps == 0) continue;
      if (asked >= ready) {
        const unsigned turn = asked / cut_.stages;
        wait_for_phase(empty(asked % cut_.stages), (turn - 1) % 2);
        announce(stage, asked);
        ask_for_weights(stage, asked);
      }
      ask_for_x(stage, asked++);
    }
  }

  // Bytes that a tile has in a stage.
  __device__ __forceinline__ int run_bytes(const Stage& s) const {
    const int whole = s.steps * kFullStep<W>;
    return s.ragged ? whole - kFullStep<W> + bytes_of_step<W>(s.product->last_blocks) : whole;
  }
  __device__ __forceinline__ int blocks_of(const Stage& s) const {
    const int whole = s.steps * Packing<W>::kBlocks;
    return s.ragged ? whole - Packing<W>::kBlocks + s.product->last_blocks : whole;
  }
  __device__ __forceinline__ int tiles_of(const Stage& s) const {
    const int tiles = (s.product->rows + kTileRows - 1) / kTileRows - s.first_tile;
    return tiles < kTilesOfGroup ? tiles : kTilesOfGroup;
  }
  // Of the panels that the block's rows of x are, those that there are.
  __device__ __forceinline__ int panels_of(const Stage& s) const {
    const int panels = cai::panels_of(rows_.count) - s.row_block * kPanels;
    return panels < kPanels ? panels : kPanels;
  }

  __device__ __forceinline__ void announce(const Stage& s, unsigned n) const {
    if (lane_ == 0)
      expect_bytes(full(n % cut_.stages), tiles_of(s) * run_bytes(s) + panels_of(s) * blocks_of(s) * kPanelBlock);
    __syncwarp();
  }

  __device__ __forceinline__ void ask_for_weights(const Stage& s, unsigned n) const {
    if (lane_ >= tiles_of(s)) return;
    const Product& p = *s.product;
    const uint8_t* from = p.w + (s.first_tile + lane_) * p.tile_bytes + static_cast<int64_t>(s.step) * kFullStep<W>;
    bring(kPanelBytes + lane_ * kRunBytes, from, run_bytes(s), n, rank() / 2, 5 << rank() % 2);
  }

  __device__ __forceinline__ void ask_for_x(const Stage& s, unsigned n) const {
    const int panel = lane_ % kPanels, block = lane_ / kPanels;
    if (panel >= panels_of(s) || block >= blocks_of(s)) return;
    const int64_t column = s.product->x_col / kBlockColumns + s.step * Packing<W>::kBlocks + block;
    const uint8_t* from = rows_.x + ((s.row_block * kPanels + panel) * static_cast<int64_t>(rows_.x_blocks) + column) * kPanelBlock;
    bring((block * kPanels + panel) * kPanelBlock, from, kPanelBlock, n, rank() % 2, 3 << rank() / 2 * 2);
  }

  // One of the copies of a stage, to `place` in its slot. Of what two blocks need each brings one half to both `blocks`.
  __device__ __forceinline__ void bring(int place, const uint8_t* from, int bytes, unsigned n, int half, int blocks) const {
    uint8_t* to = slot(n % cut_.stages) + place;
    if constexpr (kSplit) {
      copy_bulk<false>(to, from, bytes, full(n % cut_.stages));
    } else {
      const int first = bytes / 32 * 16, at = half == 0 ? 0 : first;
      copy_bulk_to(to + at, from + at, half == 0 ? first : bytes - first, full(n % cut_.stages), blocks);
    }
  }

  __device__ __forceinline__ int rank() const { return block_ % kShared; }

  // The slot is read. All that copy to it must know: the block itself, the one with the same tiles, the one with the same rows.
  __device__ __forceinline__ void release(unsigned n) const {
    __syncwarp();
    if constexpr (kSplit) {
      if (lane_ == 0) arrive_at(empty(n % cut_.stages));
    } else {
      if (lane_ < kReaders) arrive_in_block(empty(n % cut_.stages), rank() ^ lane_);
    }
  }

  // -------------------------------------------------------------------------------------------------------- multiplying

  __device__ __forceinline__ void multiply() {
    Walk<W, kSplit> walk(group_, cut_, block_);
    RowSums<kRows> sums, total;
    unsigned used = 0;
#pragma unroll 1
    while (walk.next()) {
      const Stage& s = walk.stage();
      if (s.steps > 0) {
        wait_for_phase(full(used % cut_.stages), used / cut_.stages % 2);
        const uint8_t* x = slot(used % cut_.stages);
        multiply_stage(s, x + kPanelBytes + warp_ * kRunBytes, x, sums);
        release(used++);
      } else {
        each(sums, [](float& sum, int, int) { sum = 0.0f; });
      }
      if (!s.ends) continue;
      if constexpr (kSplit) {
        send(sums);
      } else {
        const bool first = s.part == 0;
        each(total, [&](float& t, int eight, int i) { t = first ? sums[eight][i] : t + sums[eight][i]; });
        if (s.part == kParts - 1 && s.stores) finish(s, total);
      }
    }
  }

  template <typename F>
  static __device__ __forceinline__ void each(RowSums<kRows>& sums, F&& f) {
#pragma unroll
    for (int eight = 0; eight < kRows / 8; ++eight)
#pragma unroll
      for (int i = 0; i < 4; ++i) f(sums[eight][i], eight, i);
  }

  __device__ __forceinline__ void multiply_stage(const Stage& s, const uint8_t* weights, const uint8_t* x,
                                                 RowSums<kRows>& sums) const {
    using TileStep = ManyStep<T, W, kRows>;
    constexpr int kSteps = kStageSteps<W, kSplit>, kStepPanels = Packing<W>::kBlocks * kRows * kPanelRowBytes;
    bool add = !s.begins;
    if (s.steps == kSteps && !s.ragged) return TileStep::template whole<kSteps>(weights, x, lane_, sums, add);
#pragma unroll 1
    for (int step = 0; step < s.steps; ++step, weights += kFullStep<W>, x += kStepPanels) {
      const bool last = s.ragged && step + 1 == s.steps;
      TileStep::some(weights, x, last ? s.product->last_blocks : Packing<W>::kBlocks, lane_, sums, add);
      add = true;
    }
  }

  // ------------------------------------------------------------------------------------------------------------ results

  // [part][rows of x][rows of a tile], in the block that stores the tile.
  __device__ __forceinline__ float* partial(int part, int m) const {
    return reinterpret_cast<float*>(memory_ + cut_.partial) + (part * kRows + m) * kPartStride;
  }

  // The sums of the block's part, each tile's to its block.
  __device__ __forceinline__ void send(RowSums<kRows>& sums) const {
    const int g = lane_ / 4, t = lane_ % 4, part = block_ % kParts;
    each(sums, [&](float& sum, int eight, int i) {
      store_in_block(partial(part, 8 * eight + 2 * t + i % 2) + g + i / 2 * 8, warp_, sum);
    });
  }

  // The tile that the block stores, of a cluster.
  __device__ __forceinline__ void finish_tile() const {
    Walk<W, true> walk(group_, cut_, block_);
    walk.next();
    const Stage& s = walk.stage();
    const int tile = s.first_tile + block_ % kParts, row = tile * kTileRows + thread_ % kTileRows;
    if (tile * kTileRows >= s.product->rows) return;
    const Outlet outlet = row < s.product->rows ? outlet_of(*s.product, row) : Outlet{row};
#pragma unroll 1
    for (int m = thread_ / kTileRows; m < kRows; m += kThreads / kTileRows) {
      const float sum = sum_of_parts(partial(0, m) + row % kTileRows, kRows * kPartStride);
      store(*s.product, row, s.row_block * kRows + m, sum, outlet);
    }
  }

  // The warp's tile. As `store` for each element, with addresses that only step on: there are 64 elements to a thread.
  __device__ __forceinline__ void finish(const Stage& s, RowSums<kRows>& total) const {
    const Product& p = *s.product;
    const int tile = s.first_tile + warp_, g = lane_ / 4, t = lane_ % 4;
    if (tile * kTileRows >= p.rows) return;
    const int first = s.row_block * kRows + 2 * t;  // of x
    const bool to_z = (p.destination & kToZ) != 0, to_y = (p.destination & kToY) != 0;
    int row[2];
    Outlet outlet[2];
    T* y[2];
    const T* residual[2];
    uint8_t* z[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      row[side] = tile * kTileRows + g + 8 * side;
      outlet[side] = Outlet{row[side]};
      if (row[side] < p.rows) outlet[side] = outlet_of(p, row[side]);
      const int column = p.y_col + outlet[side].column;
      y[side] = rows_.y + first * rows_.y_stride + column;
      residual[side] = rows_.residual + first * rows_.residual_stride + column;
      z[side] = rows_.z + place_in_z(p.z_col + row[side], first);
    }
#pragma unroll
    for (int eight = 0; eight < kRows / 8; ++eight) {
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const int m = first + 8 * eight + odd;
        if (m >= rows_.count) continue;
        const float factor = rows_.factor != nullptr ? rows_.factor[m] : 1.0f;
        // Rows of x 8 apart have the same swizzle, and so have the two of a pair.
        const int64_t in_z = (eight / 8) * static_cast<int64_t>(rows_.z_blocks) * kPanelBlock +
                             (eight % 8 * 8 + odd) * kPanelRowBytes;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const bool there = row[side] < p.rows;
          const float value = scaled_sum(total[eight][2 * side + odd], rows_.factor != nullptr, factor, outlet[side].scale);
          if (to_z) *reinterpret_cast<T*>(z[side] + in_z) = Format<T>::narrow(there ? value : 0.0f);
          if (!to_y || !there) continue;
          const int64_t on = 8 * eight + odd;
          float rest = 0.0f;
          if (rows_.residual != nullptr) rest = Format<T>::widen(residual[side][on * rows_.residual_stride]);
          y[side][on * rows_.y_stride] =
              Format<T>::narrow(with_rest(value, p.bias != nullptr, outlet[side].bias, rows_.residual != nullptr, rest));
        }
      }
    }
    if (!to_z || !fills_block(p, tile)) return;
    for (int m = first; m < first + kRows - 2 * t && m < rows_.count; m += m % 2 == 0 ? 1 : 7)
      for (int side = 0; side < 2; ++side) put_in_z(p.z_col + row[side] + kTileRows, m, Format<T>::narrow(0.0f));
  }

  // Whether a tile is the last, and half a block of z's columns remains beyond it.
  static __device__ __forceinline__ bool fills_block(const Product& p, int tile) {
    return tile % 2 == 0 && (tile + 1) * kTileRows >= p.rows;
  }

  // One element: to z, and with bias and residual to y, as the decode kernel does. Rows of a tile that there are not are columns
  // of z nevertheless, zeros up to the end of their block.
  __device__ __forceinline__ void store(const Product& p, int row, int m, float sum, const Outlet& outlet) const {
    if (m >= rows_.count) return;
    const bool there = row < p.rows, normed = rows_.factor != nullptr;
    const float value = scaled_sum(sum, normed, normed ? rows_.factor[m] : 1.0f, outlet.scale);
    if (p.destination & kToZ) {
      put_in_z(p.z_col + row, m, Format<T>::narrow(there ? value : 0.0f));
      if (fills_block(p, row / kTileRows)) put_in_z(p.z_col + row + kTileRows, m, Format<T>::narrow(0.0f));
    }
    if (there && (p.destination & kToY) != 0) {
      float rest = 0.0f;
      if (rows_.residual != nullptr)
        rest = Format<T>::widen(rows_.residual[m * rows_.residual_stride + p.y_col + outlet.column]);
      rows_.y[m * rows_.y_stride + p.y_col + outlet.column] =
          Format<T>::narrow(with_rest(value, p.bias != nullptr, outlet.bias, rows_.residual != nullptr, rest));
    }
  }

  __device__ __forceinline__ int64_t place_in_z(int column, int m) const {
    const int64_t block = static_cast<int64_t>(m / kPanelRows) * rows_.z_blocks + column / kBlockColumns;
    return block * kPanelBlock + panel_offset(m % kPanelRows, column % kBlockColumns);
  }
  __device__ __forceinline__ void put_in_z(int column, int m, T value) const {
    *reinterpret_cast<T*>(rows_.z + place_in_z(column, m)) = value;
  }
};

// That share a multiprocessor. Two of them have registers enough where threads can give theirs away.
#if defined(CAI_WARPGROUPS)
template <bool kSplit>
constexpr int kBlocksAtOnce = kSplit ? 2 : 1;
#else
template <bool kSplit>
constexpr int kBlocksAtOnce = 1;
#endif

// kRows: of x, that a block multiplies. kSplit: the blocks of a cluster of eight take a part each.
template <typename T, typename W, int kRows, bool kSplit>
__global__ void __launch_bounds__(kManyThreads, kBlocksAtOnce<kSplit>)
    many_products_kernel(const __grid_constant__ ManyRows<T> rows, const __grid_constant__ Group group,
                         const __grid_constant__ ManyCut cut) {
#if defined(__CUDA_ARCH__) && !defined(CAI_WARPGROUPS)
  if constexpr (kRows > kPanelRows) {  // more registers than a thread has there; never launched
    __trap();
    return;
  }
#endif
  Multiplier<T, W, kRows, kSplit>(rows, group, cut, shared_memory(), static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x))
      .run();
}

}  // namespace cai
