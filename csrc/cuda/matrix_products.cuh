// The decode kernel for 16-bit activations: y = W x for 1 to 16 rows of x by the tensor cores, weights of x's type, int8 or
// int4, accumulated in float32. The instruction's 16 rows are weight rows, its eight columns rows of x.
//
// At these sizes a linear costs the reading of its weights. A tile is 16 weight rows. A block takes tiles in turn; its warps
// share a tile's columns, a chunk of 64 bytes a row at a time, and each keeps a ring of chunks in flight from device to
// shared memory (cp.async), across the ends of tiles, so that memory is never idle while sums are formed. Weights are
// widened in registers, exactly; an int4 group's scale multiplies the float32 sum of its products. x comes from the caches.
//
// Batch invariance: which warp takes which chunk, and in which order the sums meet (chunks ascending within a warp, then
// warps in order), depends on the number of columns and the store alone; an instruction treats all rows of x alike.
//
// Free of launches and of FFI, so that tests can run the same code on a CPU.
#pragma once

#include "device.cuh"
#include "tile.cuh"
#include "unpack.cuh"

namespace cai {

template <typename T, typename W, int kHalves, Prologue kPrologue>
class TileWorker {
  using Memory = TileMemory<T, W, kHalves, kPrologue>;
  static constexpr bool kInt4 = is_same<W, Int4>;
  static constexpr int kColumns = kChunkColumns<W>;
  static constexpr int kSubgroups = 4;  // groups of 32 columns in a chunk of int4

  const Rows<T>& rows_;
  const Group& group_;
  Memory& memory_;
  const int tiles_, step_;  // tiles of the launch; blocks of the grid
  const int warp_, lane_, g_, t_;
  // The next chunk to ask memory for: its tile's product, and where this lane's rows of weights begin.
  int next_tile_, next_chunk_, next_member_ = 0;
  bool more_ = true, settled_ = false;
  const uint8_t* next_rows_[2] = {};
  int next_scales_ = 0;  // the row whose scales and zero points this lane copies
  // Rows g and g + 8 of x for the tile in work. Rows beyond the last repeat it; their sums are not stored.
  const T* x_rows_[2] = {};
  int asked_ = 0, used_ = 0;  // chunks so far

 public:
  __device__ TileWorker(const Rows<T>& rows, const Group& group, Memory& memory, int tiles, int block, int blocks,
                        int thread)
      : rows_(rows), group_(group), memory_(memory), tiles_(tiles), step_(blocks), warp_(thread / 32),
        lane_(thread % 32), g_(thread % 32 / 4), t_(thread % 4), next_tile_(block), next_chunk_(thread / 32) {}

  __device__ __forceinline__ void run(int block, int thread) {
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) ask();
    wait_for_previous_kernel();
    let_next_kernel_start();
    bool first = true;
#pragma unroll 1
    for (int tile = block; tile < tiles_; tile += step_) {
      const Product& p = group_.product[member_of(tile)];
      if constexpr (kPrologue == Prologue::kNorm) {
        if (first) {
          sum_chunks<true>(p);
        } else {
          sum_chunks<false>(p);
        }
      } else {
        sum_chunks<false>(p);
      }
      __syncthreads();
      if (kPrologue == Prologue::kNorm && first) {
        if (thread < 8 * kHalves) {
          float sum = memory_.squares[0][thread];
          for (int warp = 1; warp < kWarpsPerTile; ++warp) sum += memory_.squares[warp][thread];
          memory_.factor[thread] = inverse_root(sum / static_cast<float>(p.cols) + rows_.eps);
        }
        __syncthreads();
      }
      finish(p, (tile - p.first_block) * kTileRows, thread);
      __syncthreads();
      first = false;
    }
  }

 private:
  __device__ __forceinline__ int member_of(int tile) const {
    int member = 0;
    while (member + 1 < group_.count && tile >= group_.product[member + 1].first_block) ++member;
    return member;
  }

  __device__ __forceinline__ int row_of_x(int m) const { return m < rows_.count ? m : rows_.count - 1; }

  static __device__ __forceinline__ int chunks_of(const Product& p) { return (p.cols + kColumns - 1) / kColumns; }

  __device__ __forceinline__ uint8_t* slot(int chunk) const { return memory_.ring[warp_][chunk % kStages]; }

  // Where the 16 bytes of lane 4 g + t lie in their eight rows of a slot. Int4 is read back across the four lanes of a row,
  // a word of each: the turn keeps those reads in different banks.
  static __device__ __forceinline__ int place(int g, int t) { return (4 * g + (kInt4 ? t ^ (g / 2 % 4) : t)) * 16; }

  // Ask memory for this warp's next chunk, or for nothing at the end: every call makes one group of copies.
  __device__ __forceinline__ void ask() {
    if (!settled_) settle();
    if (more_) {
      const Product& p = group_.product[next_member_];
      copy_chunk(p, next_chunk_, slot(asked_));
      next_chunk_ += kWarpsPerTile;
      settled_ = next_chunk_ < chunks_of(p);
      if (!settled_) next_tile_ += step_;
    }
    ++asked_;
    commit_copies();
  }

  // On to the next tile of which this warp has a chunk.
  __device__ __forceinline__ void settle() {
    next_chunk_ = warp_;
    for (; more_; next_tile_ += step_) {
      more_ = next_tile_ < tiles_;
      if (!more_) return;
      next_member_ = member_of(next_tile_);
      if (next_chunk_ < chunks_of(group_.product[next_member_])) break;
    }
    settled_ = true;
    const Product& p = group_.product[next_member_];
    const int first_row = (next_tile_ - p.first_block) * kTileRows;
    const auto row = [&](int i) { return first_row + i < p.rows ? first_row + i : p.rows - 1; };  // repeats the last
#pragma unroll
    for (int half = 0; half < 2; ++half)
      next_rows_[half] = static_cast<const uint8_t*>(p.w) + row(8 * half + g_) * p.w_stride;
    if constexpr (kInt4) next_scales_ = row(lane_ % kTileRows);
  }

  __device__ __forceinline__ void copy_chunk(const Product& p, int chunk, uint8_t* to) const {
    const int at = chunk * kChunkBytes + t_ * 16;
    const int left = static_cast<int>(Stored<W>::bytes(p.cols)) - at;
    const int valid = left < 0 ? 0 : left < 16 ? left : 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = next_rows_[half] + (valid > 0 ? at : 0);
      copy_16_bytes(to + half * 8 * kChunkBytes + place(g_, t_), from, valid, p.copy_bytes);
    }
    if constexpr (kInt4) {
      if (lane_ < kTileRows) copy_groups(p, chunk, to);
    }
  }

  // Scales (four, or the two or one of the wider groups among an aligned pair) and zero points (among an aligned four) of
  // a row's chunk.
  __device__ __forceinline__ void copy_groups(const Product& p, int chunk, uint8_t* slot) const {
    const int groups = ((p.cols - 1) >> p.group_bits) + 1, first = chunk << (7 - p.group_bits);
    const int base = p.group_bits == 5 ? first : first & ~1, count = p.group_bits == 5 ? 4 : 2;
    const int64_t row = next_scales_;
    const auto* scale = static_cast<const uint16_t*>(p.scale) + row * p.scale_stride + base;
    uint8_t* to = slot + Memory::kWeightBytes + lane_ * 8;
    const int there = groups - base < count ? groups - base : count;
    if (p.copy_scales & 1) {
      if (count == 4) {
        copy_async<8>(to, scale, there * 2);
      } else {
        copy_async<4>(to, scale, there * 2);
      }
    } else {
      for (int i = 0; i < count; ++i) reinterpret_cast<uint16_t*>(to)[i] = i < there ? scale[i] : 0;
    }
    if (p.zero == nullptr) return;
    const int zero_base = first & ~3;
    const uint8_t* zero = p.zero + row * p.zero_stride + zero_base;
    to = slot + Memory::kWeightBytes + kTileRows * 8 + lane_ * 4;
    const int zeros = groups - zero_base < 4 ? groups - zero_base : 4;
    if (p.copy_scales & 2) {
      copy_async<4>(to, zero, zeros);
    } else {
      for (int i = 0; i < 4; ++i) to[i] = i < zeros ? zero[i] : 0;
    }
  }

  // This warp's chunks of a tile, summed; the sums go to shared memory. kSquares: also those of x's squares.
  template <bool kSquares>
  __device__ __forceinline__ void sum_chunks(const Product& p) {
    float sum[kHalves][4] = {};  // by the instruction's rows, those of the weights, and columns, those of x
    float squares[kHalves][4] = {};
    const int chunks = chunks_of(p), whole = rows_.x_vector ? p.cols / kColumns : 0;  // of those, whole and aligned ones
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
      x_rows_[half] = rows_.x + row_of_x(g_ + 8 * half) * rows_.x_stride + p.x_col;
#pragma unroll 1
    for (int chunk = warp_; chunk < chunks; chunk += kWarpsPerTile) {
      wait_for_copies<kStages - 2>();
      __syncwarp();  // every lane's copies are there, and the slot of the chunk before this one is read
      ask();
      const uint8_t* weights = slot(used_++);
      if constexpr (kPrologue == Prologue::kSwiglu) gate(p, chunk * kColumns);
      if (chunk < whole) {
        multiply<kSquares, true>(p, chunk, weights, sum, squares);
      } else {
        multiply<kSquares, false>(p, chunk, weights, sum, squares);
      }
    }
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) memory_.partial[warp_][8 * half + 2 * t_ + i % 2][g_ + i / 2 * 8] = sum[half][i];
      if (kSquares && g_ / 2 == t_) {  // the diagonal of x times itself
        memory_.squares[warp_][8 * half + g_] = g_ % 2 ? squares[half][2 * half + 1] : squares[half][2 * half];
      }
    }
  }

  // The 16-bit numbers of columns [k, k + 8) of x's rows g and g + 8, as pairs, after the prologue; zero beyond its columns.
  // kWhole: all columns are there, and aligned for one load.
  template <bool kSquares, bool kWhole>
  __device__ __forceinline__ void load_x(const Product& p, int k, uint32_t (&x)[2][4],
                                         float (&squares)[kHalves][4]) const {
    uint32_t weight[4];
    if constexpr (kPrologue == Prologue::kNorm) load_pairs<kWhole>(rows_.norm, k, p.cols, weight);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half >= kHalves) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[half][i] = 0;
      } else if constexpr (kPrologue == Prologue::kSwiglu) {
        load_pairs<true>(memory_.gated[warp_][row_of_x(g_)], k % kColumns, kColumns, x[half]);
      } else {
        load_pairs<kWhole>(x_rows_[half], k, p.cols, x[half]);
      }
    }
    if constexpr (kSquares) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {x[0][i], x[1][i], x[0][i + 1], x[1][i + 1]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) multiply_accumulate<T>(squares[half], a, x[half][i], x[half][i + 1]);
      }
    }
    if constexpr (kPrologue == Prologue::kNorm) {
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[half][i] = multiply_bfloat16_pairs(x[half][i], weight[i]);
    }
  }

  template <bool kWhole>
  static __device__ __forceinline__ void load_pairs(const T* row, int k, int cols, uint32_t (&pairs)[4]) {
    if constexpr (kWhole) {
      const uint4 bits = *reinterpret_cast<const uint4*>(row + k);
      pairs[0] = bits.x;
      pairs[1] = bits.y;
      pairs[2] = bits.z;
      pairs[3] = bits.w;
    } else {
      const auto* numbers = reinterpret_cast<const uint16_t*>(row);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[i] = 0;
#pragma unroll 1
      for (int i = 0; i < 8 && k + i < cols; ++i) {
        const uint32_t number = static_cast<uint32_t>(numbers[k + i]) << (i % 2 * 16);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) pairs[pair] |= i / 2 == pair ? number : 0;
      }
    }
  }

  // silu(gate) * up of a chunk's columns, the warp together, for load_x.
  __device__ __forceinline__ void gate(const Product& p, int first) {
    constexpr int kEach = kColumns / 32;
    const int k = first + lane_ * kEach;
    __syncwarp();  // the chunk before this one is read
    for (int m = 0; m < rows_.count && m < kFusedSwigluRows; ++m) {
      const T* row = rows_.x + m * rows_.x_stride + p.x_col;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool there = k + i < p.cols;
        const float gate = there ? Format<T>::widen(row[k + i]) : 0.0f;
        const float up = there ? Format<T>::widen(row[p.cols + k + i]) : 0.0f;
        memory_.gated[warp_][m][lane_ * kEach + i] = Format<T>::narrow(gated(gate, up));
      }
    }
    __syncwarp();
  }

  template <bool kSquares, bool kWhole>
  __device__ __forceinline__ void multiply(const Product& p, int chunk, const uint8_t* weights, float (&sum)[kHalves][4],
                                           float (&squares)[kHalves][4]) const {
    if constexpr (kInt4) {
      switch (p.group_bits) {  // the ends of groups known to the compiler
        case 5: return multiply_int4<kSquares, kWhole, 0>(p, chunk, weights, sum, squares);
        case 6: return multiply_int4<kSquares, kWhole, 1>(p, chunk, weights, sum, squares);
        default: return multiply_int4<kSquares, kWhole, 2>(p, chunk, weights, sum, squares);
      }
    }
    constexpr int kEach = Stored<W>::kPer16Bytes;  // columns of a lane: 8, or 16 of int8
    uint4 bits[2];
#pragma unroll
    for (int operand = 0; operand < 2; ++operand)
      bits[operand] = *reinterpret_cast<const uint4*>(weights + operand * 8 * kChunkBytes + place(g_, t_));
#pragma unroll
    for (int part = 0; part < kEach / 8; ++part) {
      uint32_t x[2][4];
      load_x<kSquares, kWhole>(p, chunk * kColumns + t_ * kEach + 8 * part, x, squares);
      uint32_t w[2][4];
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        const uint32_t words[4] = {bits[operand].x, bits[operand].y, bits[operand].z, bits[operand].w};
        if constexpr (is_same<W, int8_t>) {
          unpack_int8<T>(words[2 * part], w[operand][0], w[operand][1]);
          unpack_int8<T>(words[2 * part + 1], w[operand][2], w[operand][3]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) w[operand][i] = words[i];
        }
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {w[0][i], w[1][i], w[0][i + 1], w[1][i + 1]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) multiply_accumulate<T>(sum[half], a, x[half][i], x[half][i + 1]);
      }
    }
  }

  // A chunk of 128 columns: of every 32, a lane takes the eight of its word, whichever lane copied it, so that the columns
  // of one instruction share a group. A group is 1 << kShift times 32 columns.
  template <bool kSquares, bool kWhole, int kShift>
  __device__ __forceinline__ void multiply_int4(const Product& p, int chunk, const uint8_t* weights,
                                                float (&sum)[kHalves][4], float (&squares)[kHalves][4]) const {
    const int first = chunk << (2 - kShift);
    // By row: four scales and four zero points, of which the chunk's own begin at `first`.
    const auto* scales = reinterpret_cast<const __nv_bfloat16*>(weights + Memory::kWeightBytes) + g_ * 4 +
                         (kShift == 0 ? 0 : first & 1);
    const uint8_t* zeros = weights + Memory::kWeightBytes + kTileRows * 8 + g_ * 4 + (first & 3);
    float part[kHalves][4] = {};
    constexpr int kUnroll = kWhole ? kSubgroups : 1;  // the ends of rows are rare
#pragma unroll kUnroll
    for (int sub = 0; sub < kSubgroups; ++sub) {
      uint32_t x[2][4], w[2][4];
      load_x<kSquares, kWhole>(p, chunk * kColumns + 32 * sub + 8 * t_, x, squares);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) order_as_int4(x[half]);
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        const uint32_t zero = p.zero == nullptr ? 8 : zeros[8 * operand * 4 + (sub >> kShift)];
        uint32_t word;
        __builtin_memcpy(&word, weights + operand * 8 * kChunkBytes + place(g_, sub) + 4 * t_, 4);
        unpack_int4<T>(word, int4_offset<T>(zero), w[operand]);
      }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t a[4] = {w[0][i], w[1][i], w[0][i + 1], w[1][i + 1]};
#pragma unroll
        for (int half = 0; half < kHalves; ++half) multiply_accumulate<T>(part[half], a, x[half][i], x[half][i + 1]);
      }
      if (((sub + 1) & ((1 << kShift) - 1)) != 0) continue;
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        const float scale = Format<__nv_bfloat16>::widen(scales[8 * operand * 4 + (sub >> kShift)]);
#pragma unroll
        for (int half = 0; half < kHalves; ++half)
#pragma unroll
          for (int side = 0; side < 2; ++side) {
            sum[half][2 * operand + side] = fmaf(scale, part[half][2 * operand + side], sum[half][2 * operand + side]);
            part[half][2 * operand + side] = 0.0f;
          }
      }
    }
  }

  // The warps' sums of a tile, added in order, and stored.
  __device__ __forceinline__ void finish(const Product& p, int first_row, int thread) const {
    const int outputs = kTileRows * rows_.count;
    if (thread >= outputs) return;
    const int r = thread % kTileRows, m = thread / kTileRows, row = first_row + r;
    if (row >= p.rows) return;
    float value = memory_.partial[0][m][r];
#pragma unroll
    for (int warp = 1; warp < kWarpsPerTile; ++warp) value += memory_.partial[warp][m][r];
    if constexpr (kPrologue == Prologue::kNorm) value *= memory_.factor[m];
    if constexpr (is_same<W, int8_t>) value *= static_cast<const float*>(p.scale)[row];
    store(p, rows_, row, m, value);
  }
};

template <typename T, typename W, int kHalves, Prologue kPrologue>
__global__ void __launch_bounds__(kTileThreads, (kBlocksPerProcessor<W, kHalves, kPrologue>))
    matrix_products_kernel(const __grid_constant__ Rows<T> rows, const __grid_constant__ Group group,
                           const int tiles) {
  static_assert(kHalves == 1 || kHalves == 2, "up to 8, or up to 16 rows of x");
  static_assert(kPrologue != Prologue::kSwiglu || kHalves == 1, "gated in the kernel: few rows only");
  static_assert(kPrologue != Prologue::kNorm || is_same<T, __nv_bfloat16>, "the norm in the kernel: bfloat16 only");
  static_assert(kTileThreads == kTileRows * kMaxRows, "a thread for every output of a tile");
  __shared__ TileMemory<T, W, kHalves, kPrologue> memory;
  static_assert(sizeof memory <= 48 << 10, "what a block has without asking for more");
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  TileWorker<T, W, kHalves, kPrologue> worker(rows, group, memory, tiles, block, static_cast<int>(gridDim.x), thread);
  worker.run(block, thread);
}

// ------------------------------------------------------------------------------------------------------- planning

// The widest copy that a matrix's rows are aligned to.
inline int copy_width(const void* w, int64_t stride) {
  for (int bytes : {16, 8, 4})
    if (aligned_to(w, bytes) && stride % bytes == 0) return bytes;
  return 0;
}

// Fills in what a launch needs of every product, and returns the number of tiles.
template <typename T, typename W>
int plan_tiles(Rows<T>& rows, Group& group) {
  int tiles = 0;
  rows.x_vector = aligned_to(rows.x, 16) && rows.x_stride * sizeof(T) % 16 == 0 && aligned_to(rows.norm, 16);
  for (int i = 0; i < group.count; ++i) {
    Product& p = group.product[i];
    rows.x_vector = rows.x_vector && p.x_col * sizeof(T) % 16 == 0;
    p.copy_bytes = copy_width(p.w, p.w_stride);
    const int scale_bytes = p.group_bits == 5 ? 8 : 4;
    p.copy_scales = (aligned_to(p.scale, scale_bytes) && p.scale_stride * 2 % scale_bytes == 0 ? 1 : 0) |
                    (aligned_to(p.zero, 4) && p.zero_stride % 4 == 0 ? 2 : 0);
    p.first_block = tiles;
    tiles += (p.rows + kTileRows - 1) / kTileRows;
  }
  return tiles;
}

// As many blocks as can run at once at most, and every block the same number of tiles, give or take one.
inline int blocks_for(int tiles, int at_once) {
  const int rounds = (tiles + at_once - 1) / at_once;
  return (tiles + rounds - 1) / rounds;
}

// ------------------------------------------------------------------------------------------------- SwiGLU, alone

// y [M, columns] = silu(gate) * up of x [M, 2 columns], with the bits of the prologue above. Grid: (columns, rows).
template <typename T>
__global__ void __launch_bounds__(256) swiglu_kernel(const T* x, int64_t x_stride, T* y, int64_t y_stride, int columns) {
  const int k = static_cast<int>(blockIdx.x * 256 + threadIdx.x), m = static_cast<int>(blockIdx.y);
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (k >= columns) return;
  const T* row = x + m * x_stride;
  y[m * y_stride + k] = Format<T>::narrow(gated(Format<T>::widen(row[k]), Format<T>::widen(row[columns + k])));
}

}  // namespace cai
