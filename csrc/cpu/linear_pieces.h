// How the row blocks of a group of linears and the rows of x are divided among the threads; see linear_ops.cpp.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ops.h"

namespace cai {

// From so many rows of x on, weights are multiplied as panels that stay in a cache (linear_many).
constexpr Int kManyRows = 24;
constexpr Int kPanelBytes = 768 << 10;  // of a panel in fp32, or of codes
constexpr Int kRowUnit = kCodeTile;     // rows of x in a chunk are a multiple of it: of every instruction set's tiles

// The row blocks of one core of every member, cut into pieces small enough to balance and large enough to stream. Many rows of
// x are cut into chunks, too. For int4, a thread prepares a chunk of x once for all its pieces; for other stores, a panel of
// weights once for all chunks.
struct Pieces {
  Int first[kMaxMembers + 1];  // prefix sums of pieces

  Pieces(const LinearGroup& group, int core, int threads, Int M) : M_(M), threads_(threads) {
    Int total = 0;
    for (Int i = 0; i < group.members; ++i) total += (group[i].core[core].rows + kBlockRows - 1) / kBlockRows;
    rows_ = kBlockRows * std::min<Int>(32, std::max<Int>(2, total / (threads * 6) / 2 * 2));
    first[0] = 0;
    for (Int i = 0; i < group.members; ++i) {
      const PackedMatrix& w = group[i].core[core];
      first[i + 1] = first[i] + runs(w) * chunks(w);
    }
    members = group.members;
  }
  Int total() const { return first[members]; }
  bool many(const PackedMatrix& w) const { return M_ >= kManyRows && w.store != Store::kInt4; }
  Int chunks(const PackedMatrix& w) const {
    if (w.store == Store::kInt4) return (M_ + kInt4Chunk - 1) / kInt4Chunk;
    return many(w) ? (M_ + chunk_rows() - 1) / chunk_rows() : 1;
  }

  // Where a piece of w, the member's core, lies.
  struct Place {
    Int block0, block1, row0, row1;  // of the weights, of x
  };
  Place place(const PackedMatrix& w, Int member, Int piece) const {
    const Int n = chunks(w), local = piece - first[member];
    const Int run = many(w) ? local / n : local % runs(w), chunk = many(w) ? local % n : local / runs(w);
    const Int block0 = run * blocks(w), block1 = std::min((run + 1) * blocks(w), blocks_of(w));
    if (many(w)) return {block0, block1, chunk * chunk_rows(), std::min(M_, (chunk + 1) * chunk_rows())};
    return {block0, block1, M_ * chunk / n, M_ * (chunk + 1) / n};
  }
  Int member_of(Int piece) const {
    Int i = 0;
    while (first[i + 1] <= piece) ++i;
    return i;
  }

 private:
  Int chunk_rows() const { return std::clamp<Int>(M_ / (threads_ * 8), 4, 8) * kRowUnit; }
  // Blocks of one piece of w, at most, and into how many pieces that cuts it.
  Int blocks(const PackedMatrix& w) const {
    if (!many(w)) return std::max<Int>(1, rows_ / block_rows(w));
    // Panels of equal size, and enough of them to balance where there are few chunks.
    const bool quads = w.store == Store::kInt8Quads;
    const Int unit = quads ? 1 : 4;  // blocks, see many_rows.inl
    const Int bytes = std::max<Int>(1, w.cols) * block_rows(w) * (quads ? 1 : Int(sizeof(float)));
    const Int all = std::max<Int>(1, blocks_of(w)), most = std::max(unit, kPanelBytes / bytes / unit * unit);
    const Int wanted = std::max((all + most - 1) / most, (threads_ * 4 + chunks(w) - 1) / chunks(w));
    return ((all + wanted - 1) / wanted + unit - 1) / unit * unit;
  }
  Int runs(const PackedMatrix& w) const { return (blocks_of(w) + blocks(w) - 1) / blocks(w); }

  Int members, rows_, M_, threads_;
};

inline const char* address(const PackedMatrix& w, Int block) {
  return static_cast<const char*>(w.data) + block * block_bytes(w);
}

// Where a thread's own run of pieces begins, or null when it has none.
inline const char* own_begin(const Team& team, const LinearGroup& group, const Pieces& pieces, int core) {
  const Int p = team.own_begin(pieces.total());
  if (p >= team.own_end(pieces.total())) return nullptr;
  const Int i = pieces.member_of(p);
  const PackedMatrix& w = group[i].core[core];
  return address(w, pieces.place(w, i, p).block0);
}

// The prefetch plan of a piece: where this thread's run of pieces in the member ends, and where its next run begins.
inline Ahead ahead_of(const Team& team, const LinearGroup& group, const Pieces& pieces, int core, Int piece, const char* after) {
  const Int begin = team.own_begin(pieces.total()), end = team.own_end(pieces.total());
  const char* unlimited = reinterpret_cast<const char*>(UINTPTR_MAX);
  if (piece < begin || piece >= end) return {unlimited, nullptr};  // of another thread's run, which ends soon
  const Int i = pieces.member_of(piece), last = std::min(end, pieces.first[i + 1]);
  const PackedMatrix& w = group[i].core[core];
  if (pieces.chunks(w) > 1) return {unlimited, nullptr};  // most chunks find the weights in a cache
  const char* limit = address(w, pieces.place(w, i, last - 1).block1);
  const char* next = after;
  if (last < end) {
    Int following = i + 1;
    while (blocks_of(group[following].core[core]) == 0) ++following;
    next = address(group[following].core[core], 0);
  }
  return next ? Ahead{limit, next} : Ahead{unlimited, nullptr};
}

}  // namespace cai
