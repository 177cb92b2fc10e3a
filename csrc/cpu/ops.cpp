// The operations: which rows on which thread. See ops.h for the arguments.
#include "ops.h"

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "thread_pool.h"

namespace cai {
namespace {

// -------------------------------------------------------------------------------------------------- linear group

enum class Kind : Int { kDense = 0, kLowRank = 1, kInterpolative = 2 };

// One projection, as laid out by PackedGroup in kernels/slim_linear.py: kMemberFields integers.
struct Member {
  Kind kind;
  Int out_features, out_offset, rank, z_offset;
  const int32_t* pivot;
  const float* bias;
  PackedMatrix core[2];
};
constexpr Int kMemberFields = 17;

PackedMatrix read_matrix(const Int* d) {
  return {pointer<const void>(d[0]), pointer<const float>(d[1]), static_cast<Store>(d[2]), d[3], d[4]};
}

Member read_member(const Int* d) {
  Member m;
  m.kind = static_cast<Kind>(d[0]);
  m.out_features = d[1];
  m.out_offset = d[2];
  m.rank = d[3];
  m.z_offset = d[4];
  m.pivot = pointer<const int32_t>(d[5]);
  m.bias = pointer<const float>(d[6]);
  m.core[0] = read_matrix(d + 7);
  m.core[1] = read_matrix(d + 12);
  return m;
}

Int blocks_of(const PackedMatrix& w) { return (w.rows + kBlockRows - 1) / kBlockRows; }

constexpr Int kMaxMembers = 256;

// Deals the row blocks of one core of every member in pieces small enough to balance and large enough to stream.
struct Deal {
  Int piece;
  Int first[kMaxMembers + 1];  // prefix sums of pieces
  Deal(const std::vector<Member>& members, int core, int threads) {
    Int total = 0;
    for (const auto& m : members) total += blocks_of(m.core[core]);
    piece = std::min<Int>(32, std::max<Int>(2, total / (threads * 6) / 2 * 2));
    first[0] = 0;
    for (size_t i = 0; i < members.size(); ++i)
      first[i + 1] = first[i] + (blocks_of(members[i].core[core]) + piece - 1) / piece;
  }
};

}  // namespace

// y = the members' outputs side by side. desc: [members, in_features, z_ld] then the members. scratch: M * z_ld floats.
void linear_group(Int desc, Int x_, Int M, Int ldx, Int out_, Int ldo, Int residual_, Int ldr, Int scratch_) {
  const Int* d = pointer<const Int>(desc);
  const Int count = d[0], z_ld = d[2];
  if (count < 1 || count > kMaxMembers) TVM_FFI_THROW(ValueError) << "a group has 1 to " << kMaxMembers << " members";
  if (M == 0) return;
  std::vector<Member> members;
  members.reserve(count);
  Int work = 0;
  bool two_phases = false;
  for (Int i = 0; i < count; ++i) {
    members.push_back(read_member(d + 3 + i * kMemberFields));
    const Member& m = members.back();
    work += m.core[0].rows * m.core[0].cols + m.core[1].rows * m.core[1].cols;
    two_phases |= m.kind != Kind::kDense;
  }
  const float* x = pointer<const float>(x_);
  const float* residual = pointer<const float>(residual_);
  float* out = pointer<float>(out_);
  float* z = pointer<float>(scratch_);
  const KernelTable& k = kernels();
  const int threads = work * M < (Int(1) << 16) ? 1 : num_threads();
  const Deal deal0(members, 0, threads), deal1(members, 1, threads);

  auto run_piece = [&](const Deal& deal, Int piece, int core) {
    const Int i = std::upper_bound(deal.first, deal.first + count + 1, piece) - deal.first - 1;
    const Member& m = members[i];
    const Int block0 = (piece - deal.first[i]) * deal.piece;
    const Int block1 = std::min(block0 + deal.piece, blocks_of(m.core[core]));
    float* zi = z + m.z_offset;
    Epilogue e{out + m.out_offset, ldo, nullptr, m.bias, residual ? residual + m.out_offset : nullptr, ldr, nullptr, 0};
    const float* from = x;
    Int ld = ldx;
    if (core == 1) {
      from = zi;
      ld = z_ld;
      if (m.kind == Kind::kInterpolative) e.index = m.pivot + m.rank;
    } else if (m.kind != Kind::kDense) {
      e.copy = zi;
      e.ld_copy = z_ld;
      if (m.kind == Kind::kInterpolative) {
        e.index = m.pivot;
      } else {
        e.out = nullptr;
      }
    }
    k.linear(from, M, ld, m.core[core], block0, block1, e);
  };

  parallel(threads, [&](Region& region) {
    region.deal(0, deal0.first[count], [&](Int p) { run_piece(deal0, p, 0); });
    if (!two_phases) return;
    region.wait(0, deal0.first[count]);
    region.deal(1, deal1.first[count], [&](Int p) { run_piece(deal1, p, 1); });
  });
}

namespace {

// ------------------------------------------------------------------------------------------------------- row-wise

// Splits rows over the threads when there is enough to do.
template <class F>
void over_rows(Int rows, Int work_per_row, F f) {
  if (rows == 0) return;
  const Int wanted = rows * work_per_row / (Int(1) << 15);
  const int threads = static_cast<int>(std::min<Int>(std::min<Int>(rows, wanted), num_threads()));
  if (threads <= 1) {
    f(Int(0), rows);
    return;
  }
  const Int piece = std::max<Int>(1, rows / (threads * 4));
  parallel(threads, [&](Region& region) {
    region.deal(0, (rows + piece - 1) / piece, [&](Int p) { f(p * piece, std::min(rows, (p + 1) * piece)); });
  });
}

}  // namespace

void rms_norm(Int x, Int residual, Int weight, double eps, Int H, Int M, Int residual_out, Int out) {
  const KernelTable& k = kernels();
  over_rows(M, H, [&](Int r0, Int r1) {
    k.rms_norm(pointer<const float>(x), pointer<const float>(residual), pointer<const float>(weight),
               static_cast<float>(eps), H, r0, r1, pointer<float>(residual_out), pointer<float>(out));
  });
}


void swiglu(Int gate_up, Int I, Int M, Int out) {
  const KernelTable& k = kernels();
  over_rows(M, 4 * I,
            [&](Int r0, Int r1) { k.swiglu(pointer<const float>(gate_up), I, r0, r1, pointer<float>(out)); });
}


void gather(Int matrix, Int ids, Int n, Int out) {
  const PackedMatrix w = read_matrix(pointer<const Int>(matrix));
  const int32_t* rows = pointer<const int32_t>(ids);
  for (Int i = 0; i < n; ++i)
    if (rows[i] < 0 || rows[i] >= w.rows)
      TVM_FFI_THROW(IndexError) << "token id " << rows[i] << " is outside the embedding's " << w.rows << " rows";
  const KernelTable& k = kernels();
  over_rows(n, w.cols, [&](Int r0, Int r1) { k.gather(w, rows, r0, r1, pointer<float>(out)); });
}

namespace {

// ------------------------------------------------------------------------------------------------------ attention

// shape: [query_heads, kv_heads, head_dim, page_size, pages_per_sequence, store]
AttentionShape read_shape(Int address, double scale) {
  const Int* d = pointer<const Int>(address);
  AttentionShape s{d[0], d[1], d[2], d[3], d[4], static_cast<float>(scale), static_cast<Store>(d[5])};
  if (s.head_dim > 512 || s.page_size > 64 || s.page_size % 16 || s.query_heads % s.kv_heads || d[5] > 2)
    TVM_FFI_THROW(ValueError) << "attention takes head_dim <= 512, a page_size of 16, 32, 48 or 64, whole groups of "
                                 "query heads and a float cache";
  return s;
}

}  // namespace

void rope_kv_write(Int qkv, Int M, Int positions, Int slots, Int cos_sin, Int rotary_dim, Int shape, Int k_cache,
                   Int v_cache) {
  const AttentionShape s = read_shape(shape, 0.0);
  const KernelTable& k = kernels();
  over_rows(M, (s.query_heads + 2 * s.kv_heads) * s.head_dim * 4, [&](Int r0, Int r1) {
    k.rope_kv_write(pointer<float>(qkv), pointer<const int32_t>(positions), pointer<const int32_t>(slots),
                    pointer<const float>(cos_sin), rotary_dim, s, pointer<void>(k_cache), pointer<void>(v_cache), r0,
                    r1);
  });
}

namespace {

// Rows of one sequence and one KV head that are attended together.
constexpr Int kRowsPerTask = 16;

}  // namespace

void paged_attention(Int q_, Int ldq, Int query_start_, Int context_len_, Int page_table_, Int S, Int shape,
                     double scale, Int k_cache, Int v_cache, Int out_, Int ldo) {
  const AttentionShape s = read_shape(shape, scale);
  const float* q = pointer<const float>(q_);
  float* out = pointer<float>(out_);
  const int32_t* query_start = pointer<const int32_t>(query_start_);
  const int32_t* context_len = pointer<const int32_t>(context_len_);
  const int32_t* page_table = pointer<const int32_t>(page_table_);
  const KernelTable& k = kernels();
  std::vector<Int> first(S + 1, 0);  // prefix sums of tasks
  Int work = 0;
  for (Int i = 0; i < S; ++i) {
    const Int rows = query_start[i + 1] - query_start[i];
    first[i + 1] = first[i] + (rows + kRowsPerTask - 1) / kRowsPerTask * s.kv_heads;
    work += rows * context_len[i] * s.head_dim * s.query_heads;
  }
  const Int tasks = first[S];
  if (tasks == 0) return;
  const int threads = static_cast<int>(std::min<Int>(tasks, work < (Int(1) << 16) ? 1 : num_threads()));
  parallel(threads, [&](Region& region) {
    region.deal(0, tasks, [&](Int claimed) {
      const Int t = tasks - 1 - claimed;  // the last rows of a prompt see the most keys: begin with them
      const Int i = std::upper_bound(first.begin(), first.end(), t) - first.begin() - 1;
      const Int local = t - first[i], head = local % s.kv_heads, row = local / s.kv_heads * kRowsPerTask;
      const Int rows = query_start[i + 1] - query_start[i];
      const Int count = std::min(kRowsPerTask, rows - row);
      const Int token = query_start[i] + row;
      k.attention(q + token * ldq, ldq, context_len[i] - rows + row, count, head,
                  page_table + i * s.pages_per_sequence, pointer<void>(k_cache), pointer<void>(v_cache), s,
                  out + token * ldo, ldo);
    });
  });
}

namespace {

// ---------------------------------------------------------------------------------------------------------- pack

}  // namespace

// A row-major matrix of elements of `size` bytes into the layout of PackedMatrix.
void pack(Int source, Int rows, Int cols, Int size, Int target) {
  const char* from = pointer<const char>(source);
  char* to = pointer<char>(target);
  const Int chunks = (cols + kBlockCols - 1) / kBlockCols, chunk_bytes = kBlockCols * size;
  const Int blocks = (rows + kBlockRows - 1) / kBlockRows;
  over_rows(blocks, chunks * chunk_bytes, [&](Int b0, Int b1) {
    for (Int b = b0; b < b1; ++b) {
      for (Int c = 0; c < chunks; ++c) {
        for (Int r = 0; r < kBlockRows; ++r) {
          char* place = to + ((b * chunks + c) * kBlockRows + r) * chunk_bytes;
          const Int row = b * kBlockRows + r;
          const Int bytes = row < rows ? std::min(kBlockCols, cols - c * kBlockCols) * size : 0;
          if (bytes > 0) std::memcpy(place, from + (row * cols + c * kBlockCols) * size, bytes);
          if (bytes < chunk_bytes) std::memset(place + bytes, 0, chunk_bytes - bytes);
        }
      }
    }
  });
}

}  // namespace cai
