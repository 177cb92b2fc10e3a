// linear: every store, odd shapes, every part of the epilogue.
#include <algorithm>
#include <cmath>

#include "checks.h"

namespace cai::check {
namespace {

constexpr double kLinearTolerance = 5e-7;  // of the sum of |x w|, for up to 400 columns

struct Rows {  // x of one case and where its results go
  int64_t M, ldx, ld_out, ld_copy;
  Buffer<float> x;
};

struct Parts {  // of the epilogue; see Epilogue
  bool out, index, bias, residual, copy;
};

struct Results {
  Buffer<float> out, copy;
};

struct Case {
  const KernelTable& table;
  const Matrix& w;
  Rows rows;
  Parts parts;
  Buffer<int32_t> index;
  Buffer<float> bias, residual;
  bool many = false;  // by linear_many

  int64_t blocks() const { return blocks_of(w.packed()); }

  // The rows [m0, m1) alone, the row blocks in two calls split at `split`.
  Results run(int64_t m0, int64_t m1, int64_t split) const {
    Results r;
    r.out.assign((m1 - m0) * rows.ld_out, kUntouched);
    r.copy.assign((m1 - m0) * rows.ld_copy, kUntouched);
    Epilogue e{};
    if (parts.out) {
      e.out = r.out.data();
      e.ld_out = rows.ld_out;
    }
    if (parts.index) e.index = index.data();
    if (parts.bias) e.bias = bias.data();
    if (parts.residual) {
      e.residual = residual.data() + m0 * rows.ld_out;
      e.ld_residual = rows.ld_out;
    }
    if (parts.copy) {
      e.copy = r.copy.data();
      e.ld_copy = rows.ld_copy;
    }
    // x in memory that ends with the last row's last column: a read past it is seen by AddressSanitizer.
    const Buffer<float> x(rows.x.begin() + m0 * rows.ldx, rows.x.begin() + (m1 - 1) * rows.ldx + w.cols);
    const char* data = reinterpret_cast<const char*>(w.data.data());
    const Ahead ahead{data + w.data.size(), data};
    if (w.store == Store::kInt4) {
      Buffer<float> memory(int4_floats(m1 - m0, w.cols));
      Int4Input input{x.data(), rows.ldx, memory.data(), false, false};
      table.linear_int4(input, m1 - m0, w.packed(), 0, split, e, ahead);
      table.linear_int4(input, m1 - m0, w.packed(), split, blocks(), e, ahead);
      return r;
    }
    if (many) {
      const PackedMatrix packed = w.packed();
      for (const auto& [block0, block1] : {std::pair<int64_t, int64_t>(0, split), std::pair<int64_t, int64_t>(split, blocks())}) {
        Buffer<float> panel((block1 - block0) * kBlockRows * round_up(w.cols, kBlockCols));
        table.widen(packed, block0, block1, panel.data());
        const char* stored = data + block0 * block_bytes(packed);
        const float* from = w.store == Store::kFp32 ? reinterpret_cast<const float*>(stored) : panel.data();
        table.linear_many(x.data(), m1 - m0, rows.ldx, packed, from, block0, block1, e);
      }
      return r;
    }
    table.linear(x.data(), m1 - m0, rows.ldx, w.packed(), 0, split, e, ahead);
    table.linear(x.data(), m1 - m0, rows.ldx, w.packed(), split, blocks(), e, ahead);
    return r;
  }
};

void compare(const Case& c, const Results& r, Report& report, const std::string& kernel) {
  std::vector<bool> written(c.rows.ld_out);
  for (int64_t m = 0; m < c.rows.M; ++m) {
    std::fill(written.begin(), written.end(), false);
    for (int64_t i = 0; i < c.w.rows; ++i) {
      double want = 0, size = 1e-30;
      for (int64_t k = 0; k < c.w.cols; ++k) {
        const double x = c.rows.x[m * c.rows.ldx + k];
        want += x * c.w.values[i * c.w.cols + k];
        size += std::fabs(x) * c.w.size(i * c.w.cols + k);
      }
      if (c.parts.copy) report.value(kernel, r.copy[m * c.rows.ld_copy + i], want, size, kLinearTolerance);
      if (!c.parts.out) continue;
      const int64_t feature = c.parts.index ? c.index[i] : i;
      if (c.parts.bias) want += c.bias[feature];
      if (c.parts.residual) want += c.residual[m * c.rows.ld_out + feature];
      report.value(kernel, r.out[m * c.rows.ld_out + feature], want, size + 1, kLinearTolerance);
      written[feature] = true;
    }
    bool kept = true;
    for (int64_t i = 0; i < c.rows.ld_out; ++i) kept &= written[i] || r.out[m * c.rows.ld_out + i] == kUntouched;
    for (int64_t i = c.parts.copy ? c.w.rows : 0; i < c.rows.ld_copy; ++i)
      kept &= r.copy[m * c.rows.ld_copy + i] == kUntouched;
    report.expect(kept, kernel, "wrote where no result belongs");
  }
}

void check_case(const KernelTable& table, Random& random, const Matrix& w, int64_t M, Parts parts, Report& report) {
  Case c{table, w, {M, w.cols + random.between(0, 3), 0, w.rows + random.between(0, 5), {}}, parts, {}, {}, {}};
  const int64_t features = w.rows + (parts.index ? random.between(0, 9) : 0);  // an index may leave some out
  c.rows.ld_out = features + random.between(0, 3);
  c.rows.x = random.floats(M * c.rows.ldx);
  c.index = random.choice(w.rows, features);
  c.bias = random.floats(features);
  c.residual = random.floats(M * c.rows.ld_out);
  const std::string kernel = std::string("linear ") + name(w.store);
  const Results all = c.run(0, M, c.blocks());
  compare(c, all, report, kernel);
  const Results split = c.run(0, M, random.between(0, c.blocks()));
  report.same(all.out, split.out, kernel, "the bits depend on how the row blocks are split");
  report.same(all.copy, split.copy, kernel, "the copy's bits depend on how the row blocks are split");
  if (w.store != Store::kInt4) {
    c.many = true;
    const Results many = c.run(0, M, random.between(0, c.blocks()));
    report.same(all.out, many.out, kernel, "linear_many has other bits than linear");
    report.same(all.copy, many.copy, kernel, "linear_many copies other bits than linear");
    c.many = false;
  }
  for (int64_t m = 0; m < M; ++m) {
    const Results one = c.run(m, m + 1, random.between(0, c.blocks()));
    const auto row = [m](const Buffer<float>& v, int64_t ld) {
      return Buffer<float>(v.begin() + m * ld, v.begin() + (m + 1) * ld);
    };
    report.same(one.out, row(all.out, c.rows.ld_out), kernel, "a row's bits depend on the number of rows");
    report.same(one.copy, row(all.copy, c.rows.ld_copy), kernel, "a copied row's bits depend on the number of rows");
  }
}

// Numbers too small to be multiplied by powers of two beforehand.
void check_tiny_int4(const KernelTable& table, Random& random, Report& report) {
  const std::string kernel = "linear int4 of tiny numbers";
  for (int64_t M : {1, 3, 11}) {
    const Matrix w = random_matrix(random, Store::kInt4, 20, 77);
    Case c{table, w, {M, 77, 20, 20, random.floats(M * 77)}, {true, false, false, false, false}, {}, {}, {}};
    c.rows.x[5] = 3e-39f;
    c.rows.x[14] = -7e-36f;
    c.rows.x[22] = 0.0f;
    compare(c, c.run(0, M, 1), report, kernel);
    // All of them: a power of two taken off and not given back would show.
    for (float& v : c.rows.x) v *= 0x1p-120f;
    const Results tiny = c.run(0, M, 1);
    for (int64_t m = 0; m < M; ++m) {
      const Results one = c.run(m, m + 1, 2);
      report.same(one.out, {tiny.out.begin() + m * 20, tiny.out.begin() + (m + 1) * 20}, kernel,
                  "a row's bits depend on the number of rows");
      for (int64_t i = 0; i < w.rows; ++i) {
        double want = 0, size = 1e-40;
        for (int64_t k = 0; k < w.cols; ++k) {
          want += c.rows.x[m * 77 + k] * w.values[i * 77 + k];
          size += std::fabs(c.rows.x[m * 77 + k]) * w.size(i * 77 + k);
        }
        report.value(kernel, one.out[i], want, size, 1e-5);  // subnormal sums have few bits
      }
    }
  }
}

}  // namespace

void check_linear(const KernelTable& table, Report& report) {
  Random random(1);
  const int64_t cols[] = {1, 3, 4, 15, 16, 17, 31, 33, 48, 100, 255, 400};
  for (Store store : kStores) {
    for (int64_t K : cols) {
      const Matrix w = random_matrix(random, store, random.between(1, 23), K);
      for (int64_t M : {int64_t(1), random.between(2, 7), random.between(8, 20)}) {
        const uint64_t bits = random.next();
        const bool out = (bits & 31) != 0;
        check_case(table, random, w, M, {out, (bits & 32) != 0, (bits & 64) != 0, (bits & 128) != 0, !out || (bits & 256)},
                   report);
      }
    }
    const Matrix w = random_matrix(random, store, 9, 40);
    check_case(table, random, w, 7, {true, false, false, false, false}, report);
    check_case(table, random, w, 7, {true, true, true, true, true}, report);
    check_case(table, random, w, 1, {false, false, false, false, true}, report);
  }
  check_tiny_int4(table, random, report);
  // Columns in more than one span of linear_many.
  for (Store store : {Store::kFp32, Store::kInt8}) {
    const Matrix w = random_matrix(random, store, 37, 3001);
    check_case(table, random, w, 14, {true, false, true, true, false}, report);
  }
  // More rows than the panel of x that stays in the second-level cache (about 512 KiB).
  for (Store store : {Store::kInt8, Store::kInt4}) {
    const Matrix w = random_matrix(random, store, 5, 4000);
    Case c{table, w, {41, 4000, 5, 5, random.floats(41 * 4000)}, {true, false, false, false, false}, {}, {}, {}};
    const Results all = c.run(0, 41, c.blocks());
    for (int64_t m : {0, 30, 31, 32, 33, 36, 40}) {
      const Results one = c.run(m, m + 1, c.blocks());
      report.same(one.out, {all.out.begin() + m * 5, all.out.begin() + (m + 1) * 5},
                  std::string("linear ") + name(store), "a row's bits depend on the panel it is in");
    }
  }
}

}  // namespace cai::check
