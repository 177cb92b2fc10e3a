// rms_norm, layer_norm, gelu, swiglu and gather.
#include <cmath>

#include "checks.h"

namespace cai::check {

void check_rms_norm(const KernelTable& table, Report& report) {
  Random random(3);
  for (int64_t H : {1, 2, 7, 15, 16, 17, 33, 64, 100, 577}) {
    for (const bool with_residual : {false, true}) {
      const int64_t M = random.between(1, 6), row0 = random.between(0, M - 1);
      const float eps = random.uniform(1e-6f, 1e-3f);
      const Buffer<float> x = random.floats(M * H, -3, 3), residual = random.floats(M * H), weight = random.floats(H);
      auto run = [&](int64_t first, int64_t last, Buffer<float>& sum) {
        Buffer<float> out(M * H, kUntouched);
        sum.assign(M * H, kUntouched);
        table.rms_norm(x.data(), with_residual ? residual.data() : nullptr, weight.data(), eps, H, first, last,
                       with_residual ? sum.data() : nullptr, out.data());
        return out;
      };
      Buffer<float> sum, sum_of_one;
      const Buffer<float> out = run(row0, M, sum);
      for (int64_t i = 0; i < M; ++i) {
        if (i < row0) {
          bool kept = true;
          for (int64_t k = 0; k < H; ++k) kept &= out[i * H + k] == kUntouched && sum[i * H + k] == kUntouched;
          report.expect(kept, "rms_norm", "wrote a row it was not given");
          continue;
        }
        std::vector<double> in(H);
        double squares = 0;
        for (int64_t k = 0; k < H; ++k) {
          const float f = with_residual ? x[i * H + k] + residual[i * H + k] : x[i * H + k];
          if (with_residual) report.expect(sum[i * H + k] == f, "rms_norm", "the residual sum is not x + residual");
          in[k] = f;
          squares += in[k] * in[k];
        }
        for (int64_t k = 0; k < H; ++k) {
          const double want = in[k] / std::sqrt(squares / H + eps) * weight[k];
          report.value("rms_norm", out[i * H + k], want, std::fabs(want), 1e-6);
        }
        const Buffer<float> one = run(i, i + 1, sum_of_one);
        report.expect(std::memcmp(one.data() + i * H, out.data() + i * H, H * sizeof(float)) == 0, "rms_norm",
                      "a row's bits depend on the rows it came with");
      }
    }
  }
}

void check_layer_norm(const KernelTable& table, Report& report) {
  Random random(11);
  for (int64_t H : {1, 2, 7, 15, 16, 17, 33, 64, 100, 577}) {
    const int64_t M = random.between(1, 6), row0 = random.between(0, M - 1);
    const float eps = random.uniform(1e-6f, 1e-3f);
    const Buffer<float> x = random.floats(M * H, -1, 3), weight = random.floats(H), bias = random.floats(H);
    auto run = [&](int64_t first, int64_t last) {
      Buffer<float> out(M * H, kUntouched);
      table.layer_norm(x.data(), weight.data(), bias.data(), eps, H, first, last, out.data());
      return out;
    };
    const Buffer<float> out = run(row0, M);
    for (int64_t i = 0; i < M; ++i) {
      double mean = 0, squares = 0;
      for (int64_t k = 0; k < H; ++k) mean += static_cast<double>(x[i * H + k]) / H;
      for (int64_t k = 0; k < H; ++k) squares += (x[i * H + k] - mean) * (x[i * H + k] - mean);
      for (int64_t k = 0; k < H; ++k) {
        const double scale = weight[k] / std::sqrt(squares / H + eps), want = (x[i * H + k] - mean) * scale + bias[k];
        if (i < row0) {
          report.expect(out[i * H + k] == kUntouched, "layer_norm", "wrote a row it was not given");
        } else {
          report.value("layer_norm", out[i * H + k], want, 4 * std::fabs(scale) + std::fabs(want), 1e-6);
        }
      }
      if (i < row0) continue;
      const Buffer<float> one = run(i, i + 1);
      report.expect(std::memcmp(one.data() + i * H, out.data() + i * H, H * sizeof(float)) == 0, "layer_norm",
                    "a row's bits depend on the rows it came with");
    }
  }
}

void check_gelu(const KernelTable& table, Report& report) {
  Random random(12);
  for (int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 50, 131}) {
    const int64_t M = random.between(1, 5), row0 = random.between(0, M - 1), ld = width + random.between(0, 3);
    Buffer<float> in = random.floats((M - 1) * ld + width, -8, 8);
    in[row0 * ld] = random.uniform(0, 1) < 0.5f ? -200.0f : 200.0f;
    auto run = [&](int64_t first, int64_t last) {
      Buffer<float> out(M * width, kUntouched);
      table.gelu(in.data(), ld, width, first, last, out.data());
      return out;
    };
    const Buffer<float> out = run(row0, M);
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t k = 0; k < width; ++k) {
        const double v = in[i * ld + k];
        if (i < row0) {
          report.expect(out[i * width + k] == kUntouched, "gelu", "wrote a row it was not given");
        } else {
          report.value("gelu", out[i * width + k], 0.5 * v * std::erfc(-v / std::sqrt(2.0)), 1, 1e-6);
        }
      }
      if (i < row0) continue;
      const Buffer<float> one = run(i, i + 1);
      report.expect(std::memcmp(one.data() + i * width, out.data() + i * width, width * sizeof(float)) == 0, "gelu",
                    "a row's bits depend on the rows it came with");
    }
  }
}

void check_swiglu(const KernelTable& table, Report& report) {
  Random random(4);
  for (int64_t width : {1, 3, 4, 7, 8, 15, 16, 17, 50, 131}) {
    const int64_t M = random.between(1, 5), row0 = random.between(0, M - 1);
    const int64_t ld = 2 * width + random.between(0, 3);
    Buffer<float> in = random.floats((M - 1) * ld + 2 * width, -12, 12);
    in[row0 * ld] = random.uniform(0, 1) < 0.5f ? -200.0f : 200.0f;  // past where e^x is clamped
    auto run = [&](int64_t first, int64_t last) {
      Buffer<float> out(M * width, kUntouched);
      table.swiglu(in.data(), ld, width, first, last, out.data());
      return out;
    };
    const Buffer<float> out = run(row0, M);
    for (int64_t i = 0; i < M; ++i) {
      if (i < row0) {
        for (int64_t k = 0; k < width; ++k)
          report.expect(out[i * width + k] == kUntouched, "swiglu", "wrote a row it was not given");
        continue;
      }
      for (int64_t k = 0; k < width; ++k) {
        const double gate = in[i * ld + k], up = in[i * ld + width + k];
        const double want = gate / (1 + std::exp(-gate)) * up;
        // e^x is clamped at e^87: what should be smaller than that allows is 12 * 200 * e^-87 at most.
        report.value("swiglu", out[i * width + k], want, std::fabs(want) + 1e-28, 1e-6);
      }
      const Buffer<float> one = run(i, i + 1);
      report.expect(std::memcmp(one.data() + i * width, out.data() + i * width, width * sizeof(float)) == 0, "swiglu",
                    "a row's bits depend on the rows it came with");
    }
  }
}

void check_gather(const KernelTable& table, Report& report) {
  Random random(2);
  for (Store store : {Store::kFp32, Store::kBf16, Store::kFp16, Store::kInt8, Store::kInt4, Store::kInt8Quads}) {
    for (int64_t cols : {1, 5, 16, 31, 64, 100}) {
      const Matrix w = random_matrix(random, store, random.between(1, 30), cols);
      const int64_t n = random.between(1, 12), row0 = random.between(0, n - 1);
      Buffer<int32_t> ids(n);
      for (int32_t& id : ids) id = static_cast<int32_t>(random.between(0, w.rows - 1));
      Buffer<float> out(n * cols, kUntouched), want(n * cols, kUntouched);
      for (int64_t i = row0; i < n; ++i)  // exact but for the product of an int8 and its scale
        for (int64_t k = 0; k < cols; ++k) want[i * cols + k] = static_cast<float>(w.values[ids[i] * cols + k]);
      table.gather(w.packed(), ids.data(), row0, n, out.data());
      report.same(out, want, std::string("gather ") + name(store), "a row is not what is stored");
    }
  }
}

}  // namespace cai::check
