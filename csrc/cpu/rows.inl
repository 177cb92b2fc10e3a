// Row-wise operations: embedding rows, RMSNorm, LayerNorm, GELU, SwiGLU. Part of kernels.inl.

template <class T>
void gather_store(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  const int64_t padded = round_up(w.cols, kBlockCols);
  for (int64_t i = row0; i < row1; ++i) {
    const int64_t row = ids[i];
    const T* from = static_cast<const T*>(w.data) + row / 4 * padded * kBlockRows + row % 4 * kBlockCols;
    const V scale = Simd::set1(w.scale ? static_cast<const float*>(w.scale)[row] : 1.0f);
    float buffer[kBlockCols];
    for (int64_t k = 0; k < w.cols; k += kBlockCols) {
      for (int v = 0; v < kBlockCols; v += kW)
        Simd::store(buffer + v, Simd::mul(scale, Simd::load(from + k * kBlockRows + v)));
      const int64_t n = w.cols - k < kBlockCols ? w.cols - k : kBlockCols;
      std::memcpy(out + i * w.cols + k, buffer, n * sizeof(float));
    }
  }
}

void gather_quads(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  for (int64_t i = row0; i < row1; ++i) {
    const int64_t row = ids[i];
    const auto* from = static_cast<const uint8_t*>(w.data) + row / kLaneRows * block_bytes(w) + row % kLaneRows * 4;
    const float scale = static_cast<const float*>(w.scale)[row];
    for (int64_t k = 0; k < w.cols; ++k)
      out[i * w.cols + k] = scale * static_cast<float>(int(from[k / 4 * kLaneRows * 4 + k % 4]) - 128);
  }
}

void gather(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  switch (w.store) {
    case Store::kFp32: return gather_store<float>(w, ids, row0, row1, out);
    case Store::kBf16: return gather_store<Simd::Bf16>(w, ids, row0, row1, out);
    case Store::kFp16: return gather_store<Simd::Fp16>(w, ids, row0, row1, out);
    case Store::kInt8: return gather_store<int8_t>(w, ids, row0, row1, out);
    case Store::kInt8Quads: return gather_quads(w, ids, row0, row1, out);
    case Store::kInt4:
      for (int64_t i = row0; i < row1; ++i) int4_row(w, ids[i], out + i * w.cols);
  }
}

// ------------------------------------------------------------------------------------------- norm and activation

void rms_norm(const float* x, const float* residual, const float* weight, float eps, int64_t H, int64_t row0,
              int64_t row1, float* residual_out, float* out) {
  const int64_t whole = H / kW * kW;
  const int tail = static_cast<int>(H - whole);
  for (int64_t i = row0; i < row1; ++i) {
    const float* from = x + i * H;
    if (residual_out) {
      float* sum = residual_out + i * H;
      for (int64_t k = 0; k < H; ++k) sum[k] = from[k] + residual[i * H + k];
      from = sum;
    }
    V acc = Simd::zero();
    for (int64_t k = 0; k < whole; k += kW) {
      const V v = Simd::load(from + k);
      acc = Simd::fma(v, v, acc);
    }
    if (tail) {
      const V v = Simd::load_part(from + whole, tail);
      acc = Simd::fma(v, v, acc);
    }
    const float inverse = 1.0f / std::sqrt(Simd::sum(acc) / static_cast<float>(H) + eps);
    for (int64_t k = 0; k < H; ++k) out[i * H + k] = weight[k] * (from[k] * inverse);
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t H, int64_t row0, int64_t row1,
                float* out) {
  const int64_t whole = H / kW * kW;
  const int tail = static_cast<int>(H - whole);
  for (int64_t i = row0; i < row1; ++i) {
    const float* from = x + i * H;
    V acc = Simd::zero();
    for (int64_t k = 0; k < whole; k += kW) acc = Simd::add(acc, Simd::load(from + k));
    if (tail) acc = Simd::add(acc, Simd::load_part(from + whole, tail));
    const float mean = Simd::sum(acc) / static_cast<float>(H);
    const V middle = Simd::set1(mean);
    acc = Simd::zero();
    for (int64_t k = 0; k < whole; k += kW) {
      const V v = Simd::sub(Simd::load(from + k), middle);
      acc = Simd::fma(v, v, acc);
    }
    float squares = 0;  // of the last elements, apart from the zeros of load_part
    for (int64_t k = whole; k < H; ++k) squares += (from[k] - mean) * (from[k] - mean);
    const float inverse = 1.0f / std::sqrt((Simd::sum(acc) + squares) / static_cast<float>(H) + eps);
    for (int64_t k = 0; k < H; ++k) out[i * H + k] = (from[k] - mean) * inverse * weight[k] + bias[k];
  }
}

// x Phi(x), error below 1e-6. Phi(x) - 1/2 is x times a polynomial in x^2 (fitted by least squares for the smallest error of
// x Phi(x) on [-5.5, 5.5]), which reaches 1/2 before the end of that range and is cut off there. No division, no e^x.
inline V gelu_ps(V x) {
  constexpr float kEnd = 5.5f;
  constexpr float kTerms[] = {
      -2.022313420e-04f, 6.073421100e-04f, -6.443282473e-04f, 7.984791300e-04f, -2.265773248e-03f,
      4.523391835e-03f, -6.921453867e-03f, 1.028817985e-02f, -1.496366784e-02f, 2.034590580e-02f,
      -2.605443448e-02f, 3.207295388e-02f, -3.879232705e-02f, 4.773748294e-02f, -6.417234987e-02f,
      1.285519302e-01f};
  const V half = Simd::set1(0.5f);
  // The limits come first: max and min return a NaN only if it is their second operand.
  const V t = Simd::min(Simd::set1(kEnd), Simd::max(Simd::set1(-kEnd), x));
  const V v = Simd::fma(Simd::mul(t, t), Simd::set1(2 / (kEnd * kEnd)), Simd::set1(-1.0f));
  V p = Simd::set1(kTerms[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 16; ++i) p = Simd::fma(p, v, Simd::set1(kTerms[i]));
  const V e = Simd::max(Simd::sub(Simd::zero(), half), Simd::min(half, Simd::mul(t, p)));
  return Simd::mul(x, Simd::add(half, e));
}

void gelu(const float* x, int64_t ldx, int64_t I, int64_t row0, int64_t row1, float* out) {
  const int64_t whole = I / kW * kW;
  const int tail = static_cast<int>(I - whole);
  for (int64_t i = row0; i < row1; ++i) {
    const float* from = x + i * ldx;
    float* to = out + i * I;
    for (int64_t k = 0; k < whole; k += kW) Simd::store(to + k, gelu_ps(Simd::load(from + k)));
    if (tail) {
      float buffer[kW];
      Simd::store(buffer, gelu_ps(Simd::load_part(from + whole, tail)));
      std::memcpy(to + whole, buffer, tail * sizeof(float));
    }
  }
}

void swiglu(const float* gate_up, int64_t ld, int64_t I, int64_t row0, int64_t row1, float* out) {
  const V one = Simd::set1(1.0f);
  for (int64_t i = row0; i < row1; ++i) {
    const float* gate = gate_up + i * ld;
    const float* up = gate + I;
    float* to = out + i * I;
    for (int64_t k = 0; k < I; k += kW) {
      const int n = static_cast<int>(lesser<int64_t>(kW, I - k));
      const V g = Simd::load_part(gate + k, n), u = Simd::load_part(up + k, n);
      // Below -88 silu is 0 in fp32, and e^-g beyond what exp_ps gives.
      const V gate_value = Simd::max(Simd::set1(-88.0f), g);
      const V silu = Simd::div(gate_value, Simd::add(one, exp_ps(Simd::sub(Simd::zero(), gate_value))));
      if (n == kW) {
        Simd::store(to + k, Simd::mul(silu, u));
      } else {
        float buffer[kW];
        Simd::store(buffer, Simd::mul(silu, u));
        std::memcpy(to + k, buffer, n * sizeof(float));
      }
    }
  }
}
