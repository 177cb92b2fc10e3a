// int8 activations: quantize_rows against its formula (kernels/quantized_rows.py), linear_int8 against exact sums.
#include <cmath>
#include <limits>

#include "checks.h"

namespace cai::check {

void check_quantize_rows(const KernelTable& table, Report& report) {
  Random random(9);
  for (int64_t K : {1, 3, 15, 16, 17, 33, 100, 256}) {
    const int64_t M = random.between(3, 7), row0 = random.between(0, 2), ldx = K + random.between(0, 3);
    const int64_t ld = round_up(K, 16) + 16 * random.between(0, 1);
    Buffer<float> x = random.floats((M - 1) * ldx + K, -5, 5);
    for (int64_t k = 0; k < K; ++k) x[row0 * ldx + k] = 0;
    const int64_t odd = M - 1;  // a row that holds no number, or an infinity
    x[odd * ldx + random.between(0, K - 1)] = random.between(0, 1) ? std::numeric_limits<float>::infinity() : NAN;
    Buffer<int8_t> codes(M * ld, 77);
    Buffer<float> scale(M, kUntouched);
    table.quantize_rows(x.data(), ldx, K, row0, M, codes.data(), ld, scale.data());
    for (int64_t m = 0; m < M; ++m) {
      if (m < row0) {
        bool kept = scale[m] == kUntouched;
        for (int64_t k = 0; k < ld; ++k) kept &= codes[m * ld + k] == 77;
        report.expect(kept, "quantize_rows", "wrote a row it was not given");
        continue;
      }
      for (int64_t k = K; k < ld; ++k) report.expect(codes[m * ld + k] == table.zero_code, "quantize_rows", "padded with other than zero");
      if (m == odd) {
        report.expect(std::isnan(scale[m]), "quantize_rows", "a row with no number in it got a scale");
        continue;
      }
      float peak = 0;
      for (int64_t k = 0; k < K; ++k) peak = std::fmax(peak, std::fabs(x[m * ldx + k]));
      report.expect(scale[m] == peak / 127.0f, "quantize_rows", "the scale is not max|row| / 127");
      const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
      for (int64_t k = 0; k < K; ++k) {
        const float code = std::fmin(std::fmax(std::nearbyint(x[m * ldx + k] * inverse), -127.0f), 127.0f);
        report.expect(static_cast<int8_t>(codes[m * ld + k] ^ table.zero_code) == code, "quantize_rows", "a code is not x / scale rounded to even");
      }
    }
  }
}

void check_linear_int8(const KernelTable& table, Report& report) {
  Random random(10);
  const std::string kernel = "linear_int8";
  for (int64_t K : {1, 15, 16, 17, 48, 100, 1000}) {
    for (int64_t M : {int64_t(1), random.between(2, 6), random.between(7, 15), int64_t(31)}) {
      // Codes from -127: kernels/cpu_library.py refuses -128 where activations are int8.
      const Matrix w = random_matrix(random, Store::kInt8, random.between(1, 39), K, -127);
      const int64_t ld = round_up(K, 16) + 16 * random.between(0, 1), blocks = blocks_of(w.packed());
      Buffer<int8_t> codes(M * ld, 0);
      const bool extreme = random.between(0, 3) == 0;  // the largest sums that there are
      for (int64_t m = 0; m < M; ++m)
        for (int64_t k = 0; k < K; ++k)
          codes[m * ld + k] = static_cast<int8_t>(extreme ? (random.between(0, 9) ? -127 : 127) : random.between(-127, 127));
      const Buffer<float> scale = random.floats(M, 0.001f, 0.1f), bias = random.floats(w.rows),
                               residual = random.floats(M * w.rows);
      const bool whole = random.between(0, 1) != 0;
      auto run = [&](int64_t m0, int64_t m1, int64_t split) {
        Buffer<float> out((m1 - m0) * w.rows, kUntouched);
        Epilogue e{};
        e.out = out.data();
        e.ld_out = e.ld_residual = w.rows;
        if (whole) {
          e.bias = bias.data();
          e.residual = residual.data() + m0 * w.rows;
        }
        // Codes in memory that ends with the last row's padding.
        Buffer<int8_t> x(codes.begin() + m0 * ld, codes.begin() + (m1 - 1) * ld + round_up(K, 16));
        for (int8_t& code : x) code ^= table.zero_code;
        const char* data = reinterpret_cast<const char*>(w.data.data());
        const Ahead ahead{data + w.data.size(), data};
        const Int8Rows rows{x.data(), ld, scale.data() + m0};
        table.linear_int8(rows, m1 - m0, w.packed(), 0, split, e, ahead);
        table.linear_int8(rows, m1 - m0, w.packed(), split, blocks, e, ahead);
        return out;
      };
      const Buffer<float> out = run(0, M, random.between(0, blocks));
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t i = 0; i < w.rows; ++i) {
          double want = 0;
          for (int64_t k = 0; k < K; ++k) want += codes[m * ld + k] * w.values[i * K + k];
          want *= scale[m];
          double size = std::fabs(want) + 1e-30;
          if (whole) {
            want += static_cast<double>(bias[i]) + residual[m * w.rows + i];
            size += 1;
          }
          report.value(kernel, out[m * w.rows + i], want, size, 3e-7);
        }
        const Buffer<float> one = run(m, m + 1, random.between(0, blocks));
        report.same(one, {out.begin() + m * w.rows, out.begin() + (m + 1) * w.rows}, kernel,
                    "a row's bits depend on the number of rows");
      }
    }
  }
}

}  // namespace cai::check
