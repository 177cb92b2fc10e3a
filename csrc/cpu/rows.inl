// Row-wise operations: embedding rows, RMSNorm, SwiGLU. Part of kernels.inl.

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

void gather(const PackedMatrix& w, const int32_t* ids, int64_t row0, int64_t row1, float* out) {
  switch (w.store) {
    case Store::kFp32: return gather_store<float>(w, ids, row0, row1, out);
    case Store::kBf16: return gather_store<Simd::Bf16>(w, ids, row0, row1, out);
    case Store::kFp16: return gather_store<Simd::Fp16>(w, ids, row0, row1, out);
    case Store::kInt8: return gather_store<int8_t>(w, ids, row0, row1, out);
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
