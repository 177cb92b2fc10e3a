// Checks of the tensors that Python hands over: dtype, device, shape and strides, before a kernel follows their addresses.
// Each returns the address, or throws ValueError with the tensor's name and what it should be.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/tvm_ffi.h>

#include <string>

#include "ops.h"

namespace cai {

using Tensor = tvm::ffi::TensorView;
using MaybeTensor = tvm::ffi::Optional<tvm::ffi::TensorView>;

struct ElementType {
  DLDataTypeCode code;
  uint8_t bits;
  const char* name;
};
constexpr ElementType kFloat{kDLFloat, 32, "float32"}, kBfloat16{kDLBfloat, 16, "bfloat16"}, kHalf{kDLFloat, 16, "float16"},
    kInt32{kDLInt, 32, "int32"}, kInt64{kDLInt, 64, "int64"}, kByte{kDLUInt, 8, "uint8"},
    kInt8{kDLInt, 8, "int8"};

inline bool is_type(const Tensor& t, ElementType type) {
  const DLDataType found = t.dtype();
  return found.code == type.code && found.bits == type.bits && found.lanes == 1;
}

// "float64 [3, 8] on device type 2", for messages.
inline std::string described(const Tensor& t) {
  std::string text = tvm::ffi::DLDataTypeToString(t.dtype()).operator std::string() + " [";
  for (int i = 0; i < t.ndim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  text += "]";
  if (t.device().device_type != kDLCPU) text += " on device type " + std::to_string(t.device().device_type);
  return text;
}

inline bool on_cpu(const Tensor& t, ElementType type) { return is_type(t, type) && t.device().device_type == kDLCPU; }

// A contiguous array of exactly [size], or of at least `size` elements and any shape where `at_least`.
template <class T>
T* checked_array(const Tensor& t, const char* name, ElementType type, Int size, bool at_least = false) {
  const bool fits = at_least ? t.numel() >= size : t.ndim() == 1 && t.size(0) == size;
  if (!on_cpu(t, type) || !t.IsContiguous() || !fits)
    TVM_FFI_THROW(ValueError) << name << " must be contiguous " << type.name << " of " << (at_least ? "at least " : "") << size
                              << " elements on the CPU, not " << described(t);
  return static_cast<T*>(t.data_ptr());
}

// A contiguous matrix [rows, columns].
template <class T>
T* checked_matrix(const Tensor& t, const char* name, ElementType type, Int rows, Int columns) {
  if (!on_cpu(t, type) || t.ndim() != 2 || t.size(0) != rows || t.size(1) != columns || !t.IsContiguous())
    TVM_FFI_THROW(ValueError) << name << " must be contiguous " << type.name << " [" << rows << ", " << columns
                              << "] on the CPU, not " << described(t);
  return static_cast<T*>(t.data_ptr());
}

// Rows of float32, each contiguous, `stride` apart.
struct Rows {
  float* data;
  Int count, stride;
};

// `rows` < 0: any number of them.
inline Rows checked_rows(const Tensor& t, const char* name, Int rows, Int columns) {
  // With fewer than two rows the row stride has no meaning.
  const bool shaped = on_cpu(t, kFloat) && t.ndim() == 2 && (rows < 0 || t.size(0) == rows) && t.size(1) == columns;
  if (!shaped || (t.size(0) > 0 && columns > 1 && t.stride(1) != 1) || (t.size(0) > 1 && t.stride(0) < 0))
    TVM_FFI_THROW(ValueError) << name << " must be float32 [" << (rows < 0 ? "rows" : std::to_string(rows)) << ", " << columns
                              << "] on the CPU with contiguous rows, not " << described(t);
  return {static_cast<float*>(t.data_ptr()), t.size(0), t.size(0) > 1 ? t.stride(0) : columns};
}

// The number of rows of a matrix, before its columns are known to fit.
inline Int rows_of(const Tensor& t, const char* name) {
  if (t.ndim() != 2) TVM_FFI_THROW(ValueError) << name << " must have two dimensions, not be " << described(t);
  return t.size(0);
}

// The element type of a store that a matrix or a cache may have in memory.
inline ElementType element_type(Store store) {
  return store == Store::kFp32 ? kFloat : store == Store::kBf16 ? kBfloat16 : store == Store::kFp16 ? kHalf : kInt8;
}

// Raises ValueError for a prologue that is unknown, or a norm's weight or bias that it lacks or does not take.
inline Prologue checked_prologue(Int number, bool has_weight, bool has_bias) {
  const Prologue prologue = static_cast<Prologue>(number);
  const bool layer_norm = prologue == Prologue::kLayerNorm;
  if (number < 0 || number > static_cast<Int>(Prologue::kGelu) ||
      has_weight != (layer_norm || prologue == Prologue::kNorm) || has_bias != layer_norm)
    TVM_FFI_THROW(ValueError) << "prologue " << number << (has_weight ? " with" : " without") << " a norm's weight and"
                              << (has_bias ? " with" : " without") << " its bias";
  return prologue;
}

// Positions, slots, query_start, context_len and page_table of a step; see AttentionBatch in kernels/batch.py. A cache group
// that a step only reads has no slots: then the batch's are null.
inline Batch checked_batch(const Tensor& positions, const Tensor& slots, const Tensor& query_start,
                           const Tensor& context_len, const Tensor& page_table, Int rows) {
  const Int sequences = context_len.ndim() == 1 ? context_len.size(0) : 0;
  const Int pages = page_table.ndim() == 2 ? page_table.size(1) : 0;
  return {checked_array<int32_t>(positions, "positions", kInt32, rows),
          slots.ndim() == 1 && slots.size(0) == 0 ? nullptr : checked_array<int32_t>(slots, "slots", kInt32, rows),
          checked_array<int32_t>(query_start, "query_start", kInt32, sequences + 1),
          checked_array<int32_t>(context_len, "context_len", kInt32, sequences),
          checked_matrix<int32_t>(page_table, "page_table", kInt32, sequences, pages),
          sequences, pages};
}

// The heads of a layer and its cache, of `pages` pages in the layout of attention.inl.
struct CacheLayer {
  AttentionShape shape;  // with scale 1, and without sinks and pages_per_sequence
  void *k_cache, *v_cache;
};

// `heads`: query_heads, kv_heads, head_dim, page_size, window (0: none).
inline CacheLayer checked_cache(const Tensor& heads, const Tensor& k_cache, const Tensor& v_cache, Int pages) {
  const Int* h = checked_array<const Int>(heads, "heads", kInt64, 5);
  AttentionShape s = {h[0], h[1], h[2], h[3], 0, h[4], nullptr, 1.0f, Store::kFp32};
  if (s.head_dim < 1 || s.head_dim > 512 || s.page_size < 16 || s.page_size > 64 || s.page_size % 16 || s.kv_heads < 1 ||
      s.query_heads < 1 || s.query_heads % s.kv_heads || s.window < 0 || pages < 0)
    TVM_FFI_THROW(ValueError) << "attention takes head_dim up to 512, a page_size of 16, 32, 48 or 64, and whole groups of "
                                 "query heads";
  while (!is_type(k_cache, element_type(s.store))) {
    if (s.store == Store::kInt8)
      TVM_FFI_THROW(ValueError) << "a KV cache is float32, bfloat16, float16 or int8, not " << described(k_cache);
    s.store = static_cast<Store>(static_cast<Int>(s.store) + 1);
  }
  const Int keys = pages * s.kv_heads * s.page_size, padded = (s.head_dim + 15) / 16 * 16;
  const Int scale = s.store == Store::kInt8 ? Int(sizeof(float)) : 0;
  return {s, checked_array<void>(k_cache, "the key cache", element_type(s.store), keys * (s.head_dim + scale), true),
          checked_array<void>(v_cache, "the value cache", element_type(s.store), keys * (padded + scale), true)};
}

// heads, k_cache, v_cache, pages: see checked_cache. sinks: float32 [query_heads] or none. head_norms: float32 [2, head_dim] or
// none.
inline AttentionLayer checked_layer(const Tensor& heads, double scale, const Tensor& cos_sin, const Tensor& k_cache,
                                    const Tensor& v_cache, Int pages, const MaybeTensor& sinks,
                                    const MaybeTensor& head_norms, double norm_eps) {
  const CacheLayer cache = checked_cache(heads, k_cache, v_cache, pages);
  AttentionLayer layer{};
  AttentionShape& s = layer.shape = cache.shape;
  s.scale = static_cast<float>(scale);
  layer.pages = pages;
  layer.k_cache = cache.k_cache;
  layer.v_cache = cache.v_cache;
  layer.positions = rows_of(cos_sin, "cos_sin");
  layer.rotary_dim = cos_sin.size(1);
  layer.cos_sin = checked_matrix<float>(cos_sin, "cos_sin", kFloat, layer.positions, layer.rotary_dim);
  if (layer.rotary_dim > s.head_dim || layer.rotary_dim % 2)
    TVM_FFI_THROW(ValueError) << "cos_sin rotates an even number of dimensions up to head_dim, not " << layer.rotary_dim;
  if (sinks.has_value()) s.sinks = checked_array<float>(sinks.value(), "sinks", kFloat, s.query_heads);
  if (head_norms.has_value())
    layer.head_norms = checked_matrix<float>(head_norms.value(), "the norms of heads", kFloat, 2, s.head_dim);
  layer.norm_eps = static_cast<float>(norm_eps);
  return layer;
}

}  // namespace cai
