// The CUDA operations as functions of a shared library, through apache-tvm-ffi: no torch, no Python.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <array>
#include <vector>

#include "launch.cuh"

namespace cai {
namespace {

namespace ffi = tvm::ffi;
using ffi::TensorView;

// Per member: core_0, scale_0, zero_0, core_1, scale_1, zero_1, pivot, bias; each may be None but the first.
constexpr int kFields = 8;

void require(bool condition, const char* message) {
  if (!condition) TVM_FFI_THROW(ValueError) << message;
}

bool is_type(const DLDataType& t, uint8_t code, int bits) { return t.code == code && t.bits == bits && t.lanes == 1; }

// The array that holds the tensor outlives the view.
TensorView view(const ffi::Optional<ffi::Tensor>& t) {
  const ffi::Tensor tensor = t.value();
  return TensorView(tensor);
}

Store store_of(const DLDataType& t) {
  if (is_type(t, kDLFloat, 32)) return Store::kFloat32;
  if (is_type(t, kDLBfloat, 16)) return Store::kBFloat16;
  if (is_type(t, kDLFloat, 16)) return Store::kFloat16;
  if (is_type(t, kDLInt, 8)) return Store::kInt8;
  if (is_type(t, kDLUInt, 8)) return Store::kInt4;  // two codes to a byte
  TVM_FFI_THROW(TypeError) << "decode_linear: tensors are float32, bfloat16 or float16, cores also int8 or int4 (uint8)";
  return Store::kFloat32;  // not reached
}

// A matrix whose rows are contiguous, though they may lie apart.
void require_rows(const TensorView& t, const char* name, int device) {
  if (t.ndim() != 2) TVM_FFI_THROW(ValueError) << "decode_linear: " << name << " must have two dimensions";
  if (t.device().device_type != kDLCUDA || t.device().device_id != device)
    TVM_FFI_THROW(ValueError) << "decode_linear: " << name << " must be on CUDA device " << device;
  if (t.size(1) > 1 && t.stride(1) != 1)
    TVM_FFI_THROW(ValueError) << "decode_linear: " << name << " must be contiguous in its last dimension";
}

// A vector of `size` elements of the given type, or null.
template <typename T>
const T* vector_or_null(const ffi::Optional<ffi::Tensor>& t, uint8_t code, int bits, int64_t size, int device,
                        const char* name) {
  if (!t.has_value()) return nullptr;
  const TensorView v = view(t);
  const bool fits = v.ndim() == 1 && v.size(0) == size && is_type(v.dtype(), code, bits) && v.IsContiguous() &&
                    v.device().device_type == kDLCUDA && v.device().device_id == device;
  if (!fits) TVM_FFI_THROW(ValueError) << "decode_linear: " << name << " must be contiguous, of " << size
                                       << " elements, on x's device, of its dtype (scale, bias float32; pivot int32)";
  return static_cast<const T*>(v.data_ptr());
}

// A product of one stage, with the store that says which launch it goes into.
struct Part {
  Store store;
  Product product;
};

// How many columns share one of `groups` scales in a row of `cols`, as a power of two. Where two would do, they mean the same.
int group_bits_of(int64_t cols, int64_t groups) {
  for (int bits : {5, 6, 7})
    if (((cols - 1) >> bits) + 1 == groups) return bits;
  TVM_FFI_THROW(ValueError) << "decode_linear: an int4 core of " << cols << " columns has scales in groups of 32, 64 or "
                            << "128 columns, not " << groups << " of them";
  return 0;  // not reached
}

// members[at], [at + 1], [at + 2]: a core [rows, cols], its scale and zero point.
Part make_part(const ffi::Array<ffi::Optional<ffi::Tensor>>& members, size_t at, int64_t cols, int device) {
  const TensorView core = view(members[at]);
  require_rows(core, "a core", device);
  Part part{store_of(core.dtype()), {}};
  Product& p = part.product;
  const int64_t width = part.store == Store::kInt4 ? (cols + 1) / 2 : cols;
  if (core.size(1) != width)
    TVM_FFI_THROW(ValueError) << "decode_linear: a core of " << cols << " columns has " << core.size(1) << " in memory";
  require(core.size(0) < (int64_t{1} << 31) && cols < (int64_t{1} << 31), "decode_linear: core too large");
  p.w = core.data_ptr();
  p.w_stride = core.stride(0) * ((core.dtype().bits + 7) / 8);
  p.rows = static_cast<int32_t>(core.size(0));
  p.cols = static_cast<int32_t>(cols);
  if (part.store == Store::kInt8) {
    // Asked of the argument rather than the address: a core without rows has a scale without elements, at address 0.
    require(members[at + 1].has_value(), "decode_linear: an int8 core needs a scale");
    p.scale = vector_or_null<float>(members[at + 1], kDLFloat, 32, core.size(0), device, "an int8 core's scale");
  } else if (part.store == Store::kInt4) {
    require(members[at + 1].has_value(), "decode_linear: an int4 core needs scales");
    const TensorView scale = view(members[at + 1]);
    require_rows(scale, "an int4 core's scale", device);
    require(is_type(scale.dtype(), kDLBfloat, 16) && scale.size(0) == core.size(0),
            "decode_linear: an int4 core's scales are bfloat16 [rows, groups]");
    p.group_bits = group_bits_of(cols, scale.size(1));
    p.scale = scale.data_ptr();
    p.scale_stride = static_cast<int32_t>(scale.stride(0));
    if (members[at + 2].has_value()) {
      const TensorView zero = view(members[at + 2]);
      require_rows(zero, "an int4 core's zero point", device);
      require(is_type(zero.dtype(), kDLUInt, 8) && zero.size(0) == scale.size(0) && zero.size(1) == scale.size(1),
              "decode_linear: zero points are uint8 of the scales' shape");
      p.zero = static_cast<const uint8_t*>(zero.data_ptr());
      p.zero_stride = static_cast<int32_t>(zero.stride(0));
    }
  } else {
    require(!members[at + 1].has_value(), "decode_linear: a float core has no scale");
  }
  return part;
}

// Launch a stage: products that share a store go together, kMaxMembers to a launch.
template <typename T>
void launch_stage(const std::vector<Part>& parts, Prologue prologue, const Rows<T>& rows, const LaunchOptions& options) {
  std::array<Group, kStores> groups{};
  const auto flush = [&](int store) {
    if (groups[store].count == 0) return;
    if (prologue != Prologue::kNone && !multiplies_matrices<T>(static_cast<Store>(store)))
      TVM_FFI_THROW(ValueError) << "decode_linear: this activation type and store have no prologue";
    TVM_FFI_CHECK_CUDA_ERROR(launch_group<T>(static_cast<Store>(store), prologue, rows, groups[store], options));
    groups[store].count = 0;
  };
  for (const Part& part : parts) {
    if (part.product.rows == 0) continue;  // an interpolative core_1 is empty at full rank
    Group& group = groups[static_cast<int>(part.store)];
    group.product[group.count++] = part.product;
    if (group.count == kMaxMembers) flush(static_cast<int>(part.store));
  }
  for (int store = 0; store < kStores; ++store) flush(store);
}

struct Arguments {
  TensorView x, y;
  const TensorView *residual, *z, *norm;
  double eps;
  Prologue prologue;
};

template <typename T>
void run(const Arguments& a, const std::vector<Part>& first, const std::vector<Part>& second,
         const LaunchOptions& options) {
  Rows<T> rows{};
  rows.x = static_cast<const T*>(a.x.data_ptr());
  rows.x_stride = a.x.stride(0);
  rows.y = static_cast<T*>(a.y.data_ptr());
  rows.y_stride = a.y.stride(0);
  rows.count = static_cast<int32_t>(a.x.size(0));
  if (a.residual != nullptr) {
    rows.residual = static_cast<const T*>(a.residual->data_ptr());
    rows.residual_stride = a.residual->stride(0);
  }
  if (a.z != nullptr) {
    rows.z = static_cast<T*>(a.z->data_ptr());
    rows.z_stride = a.z->stride(0);
  }
  if (a.norm != nullptr) {
    rows.norm = static_cast<const T*>(a.norm->data_ptr());
    rows.eps = static_cast<float>(a.eps);
  }
  launch_stage(first, a.prologue, rows, options);
  if (second.empty()) return;
  rows.norm = nullptr;
  rows.x = rows.z;
  rows.x_stride = rows.z_stride;
  launch_stage(second, Prologue::kNone, rows, options);
}

LaunchOptions options_for(int device, bool dependent) {
  return {static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device)), dependent};
}

bool alike(const TensorView& a, const TensorView& b) {
  return a.dtype().code == b.dtype().code && a.dtype().bits == b.dtype().bits;
}

// y [M, sum of out] = the members' linears of x [M, in], side by side, plus residual; 1 to 16 rows. members holds kFields
// entries for each: core_0 [rows, in], core_1, pivot int32 [out], bias float32 [out]; scale: float32 [rows] of an int8 core,
// bfloat16 [rows, groups] of an int4 core, which may have zero points, uint8 [rows, groups], too. Without core_1 a member
// is dense, without pivot lowrank, else interpolative. z [M, columns] is scratch of x's type: every member with two cores
// takes its rank of columns, rounded up to 16. norm [in]: x goes through RMSNorm with this weight and eps first (bfloat16
// alone). swiglu: x is [M, 2 in] and goes through silu(gate) * up first (up to kFusedSwigluRows rows). dependent: use
// programmatic dependent launch where the device has it.
void decode_linear(TensorView x, ffi::Optional<TensorView> residual, TensorView y, ffi::Optional<TensorView> z,
                   ffi::Optional<TensorView> norm, double eps, bool swiglu, bool dependent,
                   ffi::Array<ffi::Optional<ffi::Tensor>> members) {
  require(x.device().device_type == kDLCUDA, "decode_linear: x must be on a CUDA device");
  const int device = x.device().device_id;
  require_rows(x, "x", device);
  require_rows(y, "y", device);
  require(x.size(0) >= 1 && x.size(0) <= kMaxRows, "decode_linear: x must have 1 to 16 rows");
  const auto matches = [&](const TensorView& t) { return t.size(0) == x.size(0) && alike(t, x); };
  require(matches(y), "decode_linear: y must have x's rows and dtype");
  require(!members.empty() && members.size() % kFields == 0, "decode_linear: eight entries per member");
  require(!swiglu || (x.size(1) % 2 == 0 && x.size(0) <= kFusedSwigluRows && !norm.has_value()),
          "decode_linear: a gated x has up to two rows, gate and up, and no norm");
  const int64_t in = swiglu ? x.size(1) / 2 : x.size(1);

  std::vector<Part> first, second;
  int64_t z_col = 0, y_col = 0;
  for (size_t at = 0; at < members.size(); at += kFields) {
    require(members[at].has_value(), "decode_linear: core_0 is missing");
    const bool two = members[at + 3].has_value(), interpolative = members[at + 6].has_value();
    require(two || !interpolative, "decode_linear: a pivot needs core_1");
    Part part = make_part(members, at, in, device);
    const int64_t rank = part.product.rows;
    int64_t out = rank;
    if (two) out = view(members[at + 3]).size(0) + (interpolative ? rank : 0);
    require(y_col + out < (int64_t{1} << 31), "decode_linear: y is too wide");
    const auto* pivot = vector_or_null<int32_t>(members[at + 6], kDLInt, 32, out, device, "pivot");
    const auto* bias = vector_or_null<float>(members[at + 7], kDLFloat, 32, out, device, "bias");
    part.product.index = pivot;
    part.product.bias = bias;
    part.product.destination = !two ? kToY : interpolative ? kToZ | kToY : kToZ;
    part.product.z_col = static_cast<int32_t>(z_col);
    part.product.y_col = static_cast<int32_t>(y_col);
    first.push_back(part);
    if (two) {
      part = make_part(members, at + 3, rank, device);
      part.product.index = interpolative ? pivot + rank : nullptr;
      part.product.bias = bias;
      part.product.destination = kToY;
      part.product.x_col = static_cast<int32_t>(z_col);
      part.product.y_col = static_cast<int32_t>(y_col);
      second.push_back(part);
      z_col += (rank + 15) / 16 * 16;
    }
    y_col += out;
  }
  require(y.size(1) == y_col, "decode_linear: y's columns must be the members' outputs");
  require(second.empty() || z.has_value(), "decode_linear: z is missing");
  Arguments a{x, y, nullptr, nullptr, nullptr, eps, Prologue::kNone};
  if (z.has_value()) {
    a.z = &*z;
    require_rows(*a.z, "z", device);
    require(matches(*a.z) && a.z->size(1) >= z_col, "decode_linear: z must have x's rows and dtype, and room");
  }
  if (residual.has_value()) {
    a.residual = &*residual;
    require_rows(*a.residual, "residual", device);
    require(matches(*a.residual) && a.residual->size(1) == y_col, "decode_linear: residual must be like y");
  }
  if (norm.has_value()) {
    a.norm = &*norm;
    const TensorView& n = *a.norm;
    require(n.ndim() == 1 && n.size(0) == in && n.IsContiguous() && alike(n, x) &&
                n.device().device_type == kDLCUDA && n.device().device_id == device,
            "decode_linear: the norm's weight has x's columns, dtype and device");
    a.prologue = Prologue::kNorm;
  }
  if (swiglu) a.prologue = Prologue::kSwiglu;

  ffi::CUDADeviceGuard guard(device);
  const LaunchOptions options = options_for(device, dependent);
  switch (store_of(x.dtype())) {
    case Store::kFloat32: return run<float>(a, first, second, options);
    case Store::kBFloat16: return run<__nv_bfloat16>(a, first, second, options);
    case Store::kFloat16: return run<__half>(a, first, second, options);
    default: require(false, "decode_linear: x is float32, bfloat16 or float16");
  }
}

template <typename T>
void run_swiglu(const TensorView& x, const TensorView& y, const LaunchOptions& options) {
  TVM_FFI_CHECK_CUDA_ERROR(launch_swiglu<T>(static_cast<const T*>(x.data_ptr()), x.stride(0),
                                            static_cast<T*>(y.data_ptr()), y.stride(0),
                                            static_cast<int>(x.size(0)), static_cast<int>(y.size(1)), options));
}

// y [M, columns] = silu(gate) * up of x [M, 2 columns], with the bits that decode_linear's swiglu gives its rows.
void swiglu(TensorView x, TensorView y, bool dependent) {
  require(x.device().device_type == kDLCUDA, "swiglu: x must be on a CUDA device");
  const int device = x.device().device_id;
  require_rows(x, "x", device);
  require_rows(y, "y", device);
  require(alike(x, y) && x.size(0) == y.size(0) && x.size(1) == 2 * y.size(1), "swiglu: y has half of x's columns");
  require(x.size(0) >= 1 && x.size(0) < 65536 && y.size(1) >= 1, "swiglu: x has 1 to 65535 rows");
  ffi::CUDADeviceGuard guard(device);
  const LaunchOptions options = options_for(device, dependent);
  switch (store_of(x.dtype())) {
    case Store::kFloat32: return run_swiglu<float>(x, y, options);
    case Store::kBFloat16: return run_swiglu<__nv_bfloat16>(x, y, options);
    case Store::kFloat16: return run_swiglu<__half>(x, y, options);
    default: require(false, "swiglu: x is float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_linear, cai::decode_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, cai::swiglu);
