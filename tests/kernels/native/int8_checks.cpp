// int8 activations: quantize_rows against its formula (kernels/quantized_rows.py), linear_int8 against exact sums.
#include <cmath>
#include <limits>

#include "checks.h"

namespace cai::check {

namespace {

// Codes and shares of M rows, each in memory of exactly their size.
struct Coded {
  int64_t M, parts, groups;
  Buffer<int8_t> codes;
  Buffer<CodeShare> shares;

  Coded(int64_t rows, int64_t K, int64_t codes_each)
      : M(rows),
        parts(codes_each),
        groups((K + kCodeGroup - 1) / kCodeGroup * parts),
        codes(M * groups * kCodeGroup, 77),
        shares(M * groups, {kUntouched, 77}) {}
  Int8Rows rows() { return {codes.data(), shares.data(), M, groups, parts}; }
  // g: of the groups of all parts; the parts of a group follow each other.
  int64_t share_at(int64_t m, int64_t g) {
    return m / kCodeTile * kCodeTile * groups + g * rows().tile_rows(m / kCodeTile) + m % kCodeTile;
  }
  CodeShare& share(int64_t m, int64_t g) { return shares[share_at(m, g)]; }
  int8_t& code(int64_t m, int64_t g, int64_t k) { return codes[share_at(m, g) * kCodeGroup + k]; }
};

}  // namespace

void check_quantize_rows(const KernelTable& table, Report& report) {
  Random random(9);
  for (int64_t K : {1, 3, 15, 16, 17, 33, 64, 100, 256}) {
    for (int64_t parts : {1, 2}) {
      const int64_t M = random.between(3, 31), row0 = random.between(0, 2), ldx = K + random.between(0, 3);
      Buffer<float> x = random.floats((M - 1) * ldx + K, -5, 5);
      for (int64_t k = 0; k < K; ++k) x[row0 * ldx + k] = random.between(0, 1) ? 0.0f : 0x1p-100f;
      const int64_t odd = M - 1, odd_at = random.between(0, K - 1);  // a group that holds no number, or an infinity
      x[odd * ldx + odd_at] = random.between(0, 1) ? std::numeric_limits<float>::infinity() : NAN;
      Coded coded(M, K, parts);
      table.quantize_rows(x.data(), ldx, K, row0, M, coded.rows());
      const float most = parts == 2 ? 127 * kFineCodes + 127 : 127.0f;
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t g = 0; g < coded.groups; g += parts) {
          const CodeShare share = coded.share(m, g), fine = coded.share(m, g + parts - 1);
          if (m < row0) {
            bool kept = share.scale == kUntouched && share.start == 77 && fine.scale == kUntouched;
            for (int64_t k = 0; k < kCodeGroup; ++k) kept &= coded.code(m, g, k) == 77;
            report.expect(kept, "quantize_rows", "wrote a row it was not given");
            continue;
          }
          const int64_t first = g / parts * kCodeGroup;
          const bool lost = m == odd && odd_at / kCodeGroup == g / parts;
          float peak = 0;
          for (int64_t k = first; k < std::min(K, first + kCodeGroup); ++k) peak = std::fmax(peak, std::fabs(x[m * ldx + k]));
          const bool zero = lost || !(peak > 0x1p-100f);
          if (lost) {
            report.expect(std::isnan(share.scale), "quantize_rows", "a group with no number in it got a scale");
          } else {
            const float step = zero ? 0.0f : peak / most;
            report.expect(share.scale == (parts == 2 ? kFineCodes * step : step) && (parts == 1 || fine.scale == step),
                          "quantize_rows", "the scale is not max|group| over the greatest code");
          }
          const float inverse = zero ? 0.0f : most / peak;
          int32_t sum = 0, fine_sum = 0;
          for (int64_t k = 0; k < kCodeGroup; ++k) {
            const float want = first + k < K && !zero ? std::nearbyint(x[m * ldx + first + k] * inverse) : 0.0f;
            const int code = coded.code(m, g, k), below = coded.code(m, g + parts - 1, k);
            report.expect(static_cast<float>(parts == 2 ? 254 * code + below : code) == want, "quantize_rows",
                          "a code is not x / scale rounded to even, or no zero where it pads");
            report.expect(code >= -127 && below >= -127, "quantize_rows", "a code is -128");
            sum += code;
            fine_sum += below;
          }
          report.expect(share.start == -128 * sum && fine.start == -128 * (parts == 2 ? fine_sum : sum), "quantize_rows",
                        "the start is not what the weights add");
        }
      }
    }
  }
}

void check_linear_int8(const KernelTable& table, Report& report) {
  Random random(10);
  const std::string kernel = "linear_int8";
  for (int64_t K : {1, 15, 16, 17, 48, 100, 1000}) {
    for (int64_t M : {int64_t(1), random.between(2, 6), random.between(7, 15), int64_t(31)}) {
      const bool extreme = random.between(0, 3) == 0;  // the largest sums that there are
      const Matrix w = random_matrix(random, Store::kInt8Quads, random.between(1, 39), K, extreme);
      const int64_t blocks = blocks_of(w.packed()), parts = random.between(1, 2);
      Coded all(M, K, parts);
      for (int64_t m = 0; m < M; ++m)
        for (int64_t g = 0; g < all.groups; ++g) {
          int32_t sum = 0;
          for (int64_t k = 0; k < kCodeGroup; ++k)
            sum += all.code(m, g, k) = static_cast<int8_t>(
                g / parts * kCodeGroup + k >= K ? 0 : extreme ? (random.between(0, 9) ? -127 : 127) : random.between(-127, 127));
          all.share(m, g) = {random.uniform(0.001f, 0.1f), -128 * sum};
        }
      const Buffer<float> bias = random.floats(w.rows), residual = random.floats(M * w.rows);
      const bool whole = random.between(0, 1) != 0, scattered = random.between(0, 1) != 0, copied = random.between(0, 1) != 0;
      Buffer<int32_t> index(w.rows);
      for (int64_t i = 0; i < w.rows; ++i) index[i] = static_cast<int32_t>(w.rows - 1 - i);
      // Rows [m0, m1) of M, alone in memory that ends with the last of them.
      auto run = [&](int64_t m0, int64_t m1, int64_t split, bool chunks) {
        Buffer<float> out((m1 - m0) * w.rows, kUntouched), copy((m1 - m0) * w.rows, kUntouched);
        Epilogue e{};
        e.out = out.data();
        e.ld_out = e.ld_residual = e.ld_copy = w.rows;
        if (scattered) e.index = index.data();
        if (copied) e.copy = copy.data();
        if (whole) {
          e.bias = bias.data();
          e.residual = residual.data() + m0 * w.rows;
        }
        Coded own(m1 - m0, K, parts);
        for (int64_t m = m0; m < m1; ++m) {
          for (int64_t g = 0; g < own.groups; ++g) {
            own.share(m - m0, g) = all.share(m, g);
            for (int64_t k = 0; k < kCodeGroup; ++k) own.code(m - m0, g, k) = all.code(m, g, k);
          }
        }
        const char* data = reinterpret_cast<const char*>(w.data.data());
        const Ahead ahead{data + w.data.size(), data};
        const int64_t middle = chunks ? std::min(kCodeTile, m1 - m0) : m1 - m0;
        for (const auto& [row0, row1] : {std::pair<int64_t, int64_t>(0, middle), std::pair<int64_t, int64_t>(middle, m1 - m0)}) {
          if (row0 == row1) continue;
          table.linear_int8(own.rows(), row0, row1, w.packed(), 0, split, e, ahead);
          table.linear_int8(own.rows(), row0, row1, w.packed(), split, blocks, e, ahead);
        }
        if (copied && !whole)
          for (int64_t m = 0; m < m1 - m0; ++m)
            for (int64_t i = 0; i < w.rows; ++i)
              report.expect(copy[m * w.rows + i] == out[m * w.rows + (scattered ? index[i] : i)], kernel, "the copy is another result");
        return out;
      };
      const Buffer<float> out = run(0, M, random.between(0, blocks), false);
      report.same(run(0, M, random.between(0, blocks), true), out, kernel, "chunks of rows change the bits");
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t i = 0; i < w.rows; ++i) {
          double want = 0, size = 1e-30;
          for (int64_t g = 0; g < all.groups; ++g) {
            double sum = 0;
            for (int64_t k = g / parts * kCodeGroup; k < std::min(K, (g / parts + 1) * kCodeGroup); ++k)
              sum += all.code(m, g, k % kCodeGroup) * w.values[i * K + k];
            want += sum * all.share(m, g).scale;
            size += std::fabs(sum * all.share(m, g).scale);
          }
          const int64_t at = scattered ? index[i] : i;
          if (whole) {
            want += static_cast<double>(bias[at]) + residual[m * w.rows + at];
            size += 1;
          }
          report.value(kernel, out[m * w.rows + at], want, size, 6e-8 * static_cast<double>(all.groups + 4));
        }
        const Buffer<float> one = run(m, m + 1, random.between(0, blocks), false);
        report.same(one, {out.begin() + m * w.rows, out.begin() + (m + 1) * w.rows}, kernel,
                    "a row's bits depend on the number of rows");
      }
    }
  }
}

}  // namespace cai::check
