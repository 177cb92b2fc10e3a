// The CUDA operations as functions of a shared library, through apache-tvm-ffi: no torch, no Python.
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include <array>
#include <vector>

#include "products_launch.cuh"

namespace cai {
namespace {

namespace ffi = tvm::ffi;
using ffi::TensorView;

constexpr int kFields = 6;  // per member: core_0, scale_0, core_1, scale_1, pivot, bias; each may be None but the first

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
  TVM_FFI_THROW(TypeError) << "decode_linear: tensors are float32, bfloat16 or float16, cores also int8";
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

Part make_part(const TensorView& core, const float* scale, int x_col, int destination, int z_col, int y_col) {
  Part part{store_of(core.dtype()), {}};
  Product& p = part.product;
  require(core.size(0) < (int64_t{1} << 31) && core.size(1) < (int64_t{1} << 31), "decode_linear: core too large");
  require(part.store != Store::kInt8 || scale != nullptr, "decode_linear: an int8 core needs a scale");
  p.w = core.data_ptr();
  p.scale = scale;
  p.w_stride = core.stride(0);
  p.rows = static_cast<int32_t>(core.size(0));
  p.cols = static_cast<int32_t>(core.size(1));
  p.x_col = x_col;
  p.z_col = z_col;
  p.y_col = y_col;
  p.destination = destination;
  return part;
}

// Launch a stage: products that share a store go together, kMaxMembers to a launch.
template <typename T>
void launch_stage(const std::vector<Part>& parts, const Rows<T>& rows, cudaStream_t stream) {
  std::array<Group, 4> groups{};
  const auto flush = [&](int store) {
    if (groups[store].count == 0) return;
    TVM_FFI_CHECK_CUDA_ERROR(launch_products<T>(static_cast<Store>(store), rows, groups[store], stream));
    groups[store].count = 0;
  };
  for (const Part& part : parts) {
    if (part.product.rows == 0) continue;  // an interpolative core_1 is empty at full rank
    Group& group = groups[static_cast<int>(part.store)];
    group.product[group.count++] = part.product;
    if (group.count == kMaxMembers) flush(static_cast<int>(part.store));
  }
  for (int store = 0; store < 4; ++store) flush(store);
}

template <typename T>
void run(const TensorView& x, const TensorView* residual, const TensorView& y, const TensorView* z,
         const std::vector<Part>& first, const std::vector<Part>& second, cudaStream_t stream) {
  Rows<T> rows{};
  rows.x = static_cast<const T*>(x.data_ptr());
  rows.x_stride = x.stride(0);
  rows.y = static_cast<T*>(y.data_ptr());
  rows.y_stride = y.stride(0);
  rows.count = static_cast<int32_t>(x.size(0));
  if (residual != nullptr) {
    rows.residual = static_cast<const T*>(residual->data_ptr());
    rows.residual_stride = residual->stride(0);
  }
  if (z != nullptr) {
    rows.z = static_cast<T*>(z->data_ptr());
    rows.z_stride = z->stride(0);
  }
  launch_stage(first, rows, stream);
  if (second.empty()) return;
  rows.x = rows.z;
  rows.x_stride = rows.z_stride;
  launch_stage(second, rows, stream);
}

// y [M, sum of out] = the members' linears of x [M, in], side by side, plus residual; 1 to 16 rows. members holds kFields
// entries for each: core_0 [rows, in], scale_0, core_1, scale_1, pivot int32 [out], bias float32 [out]. Without core_1 a
// member is dense, without pivot lowrank, else interpolative. z [M, columns] is scratch of x's type: every member with two
// cores takes its rank of columns, rounded up to 16.
void decode_linear(TensorView x, ffi::Optional<TensorView> residual, TensorView y, ffi::Optional<TensorView> z,
                   ffi::Array<ffi::Optional<ffi::Tensor>> members) {
  require(x.device().device_type == kDLCUDA, "decode_linear: x must be on a CUDA device");
  const int device = x.device().device_id;
  require_rows(x, "x", device);
  require_rows(y, "y", device);
  require(x.size(0) >= 1 && x.size(0) <= kMaxRows, "decode_linear: x must have 1 to 16 rows");
  const auto matches = [&](const TensorView& t) {
    return t.size(0) == x.size(0) && t.dtype().code == x.dtype().code && t.dtype().bits == x.dtype().bits;
  };
  require(matches(y), "decode_linear: y must have x's rows and dtype");
  require(!members.empty() && members.size() % kFields == 0, "decode_linear: six entries per member");

  std::vector<Part> first, second;
  int64_t z_col = 0, y_col = 0;
  for (size_t at = 0; at < members.size(); at += kFields) {
    require(members[at].has_value(), "decode_linear: core_0 is missing");
    const TensorView core0 = view(members[at]);
    require_rows(core0, "core_0", device);
    require(core0.size(1) == x.size(1), "decode_linear: core_0's columns must be x's");
    const bool two = members[at + 2].has_value(), interpolative = members[at + 4].has_value();
    require(two || !interpolative, "decode_linear: a pivot needs core_1");
    const int64_t rank = core0.size(0);
    int64_t out = rank;
    if (two) {
      const TensorView core1 = view(members[at + 2]);
      require_rows(core1, "core_1", device);
      require(core1.size(1) == rank, "decode_linear: core_1's columns must be core_0's rows");
      out = interpolative ? rank + core1.size(0) : core1.size(0);
    }
    require(y_col + out < (int64_t{1} << 31), "decode_linear: y is too wide");
    const auto* scale0 = vector_or_null<float>(members[at + 1], kDLFloat, 32, rank, device, "scale_0");
    const auto* pivot = vector_or_null<int32_t>(members[at + 4], kDLInt, 32, out, device, "pivot");
    const auto* bias = vector_or_null<float>(members[at + 5], kDLFloat, 32, out, device, "bias");
    const int z_at = static_cast<int>(z_col), y_at = static_cast<int>(y_col);
    Part part = make_part(core0, scale0, 0, !two ? kToY : interpolative ? kToZ | kToY : kToZ, z_at, y_at);
    part.product.index = pivot;
    part.product.bias = bias;
    first.push_back(part);
    if (two) {
      const TensorView core1 = view(members[at + 2]);
      const auto* scale1 =
          vector_or_null<float>(members[at + 3], kDLFloat, 32, core1.size(0), device, "scale_1");
      part = make_part(core1, scale1, z_at, kToY, 0, y_at);
      part.product.index = interpolative ? pivot + rank : nullptr;
      part.product.bias = bias;
      second.push_back(part);
      z_col += (rank + 15) / 16 * 16;
    }
    y_col += out;
  }
  require(y.size(1) == y_col, "decode_linear: y's columns must be the members' outputs");
  require(second.empty() || z.has_value(), "decode_linear: z is missing");
  const TensorView* z_view = nullptr;
  if (z.has_value()) {
    z_view = &*z;
    require_rows(*z_view, "z", device);
    require(matches(*z_view) && z_view->size(1) >= z_col, "decode_linear: z must have x's rows and dtype, and room");
  }
  const TensorView* residual_view = nullptr;
  if (residual.has_value()) {
    residual_view = &*residual;
    require_rows(*residual_view, "residual", device);
    require(matches(*residual_view) && residual_view->size(1) == y_col, "decode_linear: residual must be like y");
  }

  ffi::CUDADeviceGuard guard(device);
  const auto stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device));
  switch (store_of(x.dtype())) {
    case Store::kFloat32: return run<float>(x, residual_view, y, z_view, first, second, stream);
    case Store::kBFloat16: return run<__nv_bfloat16>(x, residual_view, y, z_view, first, second, stream);
    case Store::kFloat16: return run<__half>(x, residual_view, y, z_view, first, second, stream);
    case Store::kInt8: require(false, "decode_linear: x is float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(decode_linear, cai::decode_linear);
