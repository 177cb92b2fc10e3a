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

// Per member: core_0 packed, its scale, core_1 packed, its scale, pivot, bias; each may be None but the first.
constexpr int kFields = 6;
// Per core: rows, columns, store, columns of a scale group, whether it has zero points; zeros for an absent core.
constexpr int kNumbers = 5;
constexpr int64_t kMostRows = int64_t{1} << 20;

void require(bool condition, const char* message) {
  if (!condition) TVM_FFI_THROW(ValueError) << message;
}

bool is_type(const DLDataType& t, uint8_t code, int bits) { return t.code == code && t.bits == bits && t.lanes == 1; }

// The array that holds the tensor outlives the view.
TensorView view(const ffi::Optional<ffi::Tensor>& t) {
  const ffi::Tensor tensor = t.value();
  return TensorView(tensor);
}

// A matrix whose rows are contiguous, though they may lie apart.
void require_rows(const TensorView& t, const char* name, int device) {
  if (t.ndim() != 2) TVM_FFI_THROW(ValueError) << "linear: " << name << " must have two dimensions";
  if (t.device().device_type != kDLCUDA || t.device().device_id != device)
    TVM_FFI_THROW(ValueError) << "linear: " << name << " must be on CUDA device " << device;
  if (t.size(1) > 1 && t.stride(1) != 1)
    TVM_FFI_THROW(ValueError) << "linear: " << name << " must be contiguous in its last dimension";
}

// A vector of `size` elements of the given type, or null.
template <typename T>
const T* vector_or_null(const ffi::Optional<ffi::Tensor>& t, uint8_t code, int bits, int64_t size, int device,
                        const char* name) {
  if (!t.has_value()) return nullptr;
  const TensorView v = view(t);
  const bool fits = v.ndim() == 1 && v.size(0) == size && is_type(v.dtype(), code, bits) && v.IsContiguous() &&
                    v.device().device_type == kDLCUDA && v.device().device_id == device;
  if (!fits) TVM_FFI_THROW(ValueError) << "linear: " << name << " must be contiguous, of " << size
                                       << " elements, on x's device, of its dtype (scale, bias float32; pivot int32)";
  return static_cast<const T*>(v.data_ptr());
}

// A product of one stage, with what says which launch it goes into.
struct Part {
  Kind kind;
  Product product;
};

// A core as `numbers` describe it, packed in `data`, with its scale.
template <typename T>
Part make_part(const ffi::Optional<ffi::Tensor>& data, const ffi::Optional<ffi::Tensor>& scale, const int64_t* numbers,
               int64_t cols, int device) {
  Part part{{static_cast<Store>(numbers[2]), static_cast<int>(numbers[3]), numbers[4] != 0}, {}};
  const Kind& kind = part.kind;
  require(numbers[2] >= 0 && numbers[2] <= 2, "linear: unknown store");
  const bool int4 = kind.store == Store::kInt4;
  require(int4 ? kind.group == 32 || kind.group == 64 || kind.group == 128 : kind.group == 0 && !kind.zero,
          "linear: an int4 core has scales in groups of 32, 64 or 128 columns, others have none");
  require(numbers[0] >= 0 && numbers[1] > 0 && numbers[0] < (int64_t{1} << 30) && numbers[1] < (int64_t{1} << 30),
          "linear: core too large, or without columns");
  if (numbers[1] != cols) TVM_FFI_THROW(ValueError) << "linear: a core of " << numbers[1] << " columns for " << cols;
  Product& p = part.product;
  p.rows = static_cast<int32_t>(numbers[0]);
  p.cols = static_cast<int32_t>(numbers[1]);
  measure<T>(kind, p);
  const int64_t bytes = (numbers[0] + kTileRows - 1) / kTileRows * p.tile_bytes;
  p.w = vector_or_null<uint8_t>(data, kDLUInt, 8, bytes, device, "a packed core");
  require(p.rows == 0 || (p.w != nullptr && aligned_to(p.w, 16)), "linear: a packed core is aligned to 16 bytes");
  // Asked of the argument rather than the address: a core without rows has a scale without elements, at address 0.
  require(scale.has_value() == (kind.store == Store::kInt8), "linear: int8 cores have a scale, others don't");
  p.scale = vector_or_null<float>(scale, kDLFloat, 32, numbers[0], device, "an int8 core's scale");
  return part;
}

// Launch a stage: products of one kind go together, kMaxMembers to a launch. launch(kind, group) makes one.
template <typename Launch>
void launch_stage(std::vector<Part> parts, const Launch& launch) {
  while (!parts.empty()) {
    const Kind kind = parts.front().kind;
    Group group{};
    std::vector<Part> others;
    for (const Part& part : parts) {
      if (part.product.rows == 0) continue;  // an interpolative core_1 is empty at full rank
      if (part.kind == kind && group.count < kMaxMembers) {
        group.product[group.count++] = part.product;
      } else {
        others.push_back(part);
      }
    }
    if (group.count > 0) TVM_FFI_CHECK_CUDA_ERROR(launch(kind, group));
    parts = std::move(others);
  }
}

using Members = ffi::Array<ffi::Optional<ffi::Tensor>>;

struct Arguments {
  TensorView x, y;
  const TensorView *residual, *norm;
  double eps;
  Prologue prologue;
  const Members& members;
  const ffi::Array<int64_t>& numbers;
};

// The products of both stages, and the columns of z and y that they take.
struct Stages {
  std::vector<Part> first, second;
  int64_t z_columns = 0, y_columns = 0;
};

template <typename T>
Stages stages_of(const Members& members, const ffi::Array<int64_t>& all_numbers, int64_t in, int device) {
  Stages stages;
  for (size_t member = 0; member < members.size() / kFields; ++member) {
    const auto field = [&](int i) { return members[member * kFields + i]; };
    std::array<int64_t, 2 * kNumbers> numbers{};
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = all_numbers[member * numbers.size() + i];
    require(field(0).has_value(), "linear: core_0 is missing");
    const bool two = field(2).has_value(), interpolative = field(4).has_value();
    require(two || !interpolative, "linear: a pivot needs core_1");
    Part part = make_part<T>(field(0), field(1), numbers.data(), in, device);
    const int64_t rank = part.product.rows;
    int64_t out = rank;
    if (two) out = numbers[kNumbers] + (interpolative ? rank : 0);
    require(stages.y_columns + out < (int64_t{1} << 31), "linear: y is too wide");
    const auto* pivot = vector_or_null<int32_t>(field(4), kDLInt, 32, out, device, "pivot");
    const auto* bias = vector_or_null<float>(field(5), kDLFloat, 32, out, device, "bias");
    part.product.index = pivot;
    part.product.bias = bias;
    part.product.destination = !two ? kToY : interpolative ? kToZ | kToY : kToZ;
    part.product.z_col = static_cast<int32_t>(stages.z_columns);
    part.product.y_col = static_cast<int32_t>(stages.y_columns);
    stages.first.push_back(part);
    if (two) {
      part = make_part<T>(field(2), field(3), numbers.data() + kNumbers, rank, device);
      part.product.index = interpolative ? pivot + rank : nullptr;
      part.product.bias = bias;
      part.product.destination = kToY;
      part.product.x_col = static_cast<int32_t>(stages.z_columns);
      part.product.y_col = static_cast<int32_t>(stages.y_columns);
      stages.second.push_back(part);
      stages.z_columns += blocks_of(rank) * kBlockColumns;
    }
    stages.y_columns += out;
  }
  return stages;
}

// x with what happens to it, residual and y; without z.
template <typename T>
Rows<T> rows_of(const Arguments& a) {
  Rows<T> rows{};
  rows.prologue = a.prologue;
  rows.x = static_cast<const T*>(a.x.data_ptr());
  rows.x_stride = a.x.stride(0);
  rows.y = static_cast<T*>(a.y.data_ptr());
  rows.y_stride = a.y.stride(0);
  rows.count = static_cast<int32_t>(a.x.size(0));
  if (a.residual != nullptr) {
    rows.residual = static_cast<const T*>(a.residual->data_ptr());
    rows.residual_stride = a.residual->stride(0);
  }
  if (a.norm != nullptr) {
    rows.norm = static_cast<const T*>(a.norm->data_ptr());
    rows.eps = static_cast<float>(a.eps);
  }
  return rows;
}

template <typename T>
void run_few(const Arguments& a, const TensorView& scratch, int64_t in, const LaunchOptions& options) {
  const Stages stages = stages_of<T>(a.members, a.numbers, in, a.x.device().device_id);
  Rows<T> rows = rows_of<T>(a);
  require(a.y.size(1) == stages.y_columns, "linear: y's columns must be the members' outputs");
  rows.z = static_cast<T*>(scratch.data_ptr());
  rows.z_stride = stages.z_columns;
  require(scratch.size(0) >= rows.count * stages.z_columns * static_cast<int64_t>(sizeof(T)),
          "linear: scratch is too small");
  const auto launch = [&](const Kind& kind, const Group& group) { return launch_group<T>(kind, rows, group, options); };
  launch_stage(stages.first, launch);
  if (stages.second.empty()) return;
  rows.norm = nullptr;
  rows.prologue = Prologue::kNone;
  rows.x = rows.z;
  rows.x_stride = rows.z_stride;
  launch_stage(stages.second, launch);
}

// What the scratch of many rows holds, in bytes from its start: panels of x and of z, and a factor for each row.
struct Scratch {
  int64_t z, factor, bytes;
};
Scratch scratch_of(int64_t rows, int64_t in, int64_t z_columns) {
  const int64_t panels = panels_of(rows) * kPanelBlock;
  const int64_t z = panels * blocks_of(in);
  const int64_t factor = z + panels * blocks_of(z_columns);
  return {z, factor, factor + rows * static_cast<int64_t>(sizeof(float))};
}

template <typename T>
void run_many(const Arguments& a, const TensorView& scratch, int64_t in, const LaunchOptions& options) {
  const Stages stages = stages_of<T>(a.members, a.numbers, in, a.x.device().device_id);
  require(a.y.size(1) == stages.y_columns, "linear: y's columns must be the members' outputs");
  const Rows<T> rows = rows_of<T>(a);
  const Scratch at = scratch_of(rows.count, in, stages.z_columns);
  require(scratch.size(0) >= at.bytes, "linear: scratch is too small");
  auto* memory = static_cast<uint8_t*>(scratch.data_ptr());
  auto* factor = reinterpret_cast<float*>(memory + at.factor);
  const int x_blocks = static_cast<int>(blocks_of(in));
  TVM_FFI_CHECK_CUDA_ERROR(launch_fill<T>(rows, memory, factor, static_cast<int>(in), x_blocks, options));
  ManyRows<T> many{};
  many.x = memory;
  many.factor = a.norm != nullptr ? factor : nullptr;
  many.residual = rows.residual;
  many.residual_stride = rows.residual_stride;
  many.z = memory + at.z;
  many.y = rows.y;
  many.y_stride = rows.y_stride;
  many.count = rows.count;
  many.x_blocks = x_blocks;
  many.z_blocks = static_cast<int32_t>(stages.z_columns / kBlockColumns);
  const auto launch = [&](const Kind& kind, const Group& group) { return launch_many<T>(kind, many, group, options); };
  launch_stage(stages.first, launch);
  many.factor = nullptr;
  many.x = many.z;
  many.x_blocks = many.z_blocks;
  launch_stage(stages.second, launch);
}

LaunchOptions options_for(int device, bool dependent) {
  return {static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, device)), dependent};
}

bool alike(const TensorView& a, const TensorView& b) {
  return a.dtype().code == b.dtype().code && a.dtype().bits == b.dtype().bits;
}

// y [M, sum of out] = the members' linears of x [M, in], side by side, plus residual; rows of bfloat16 or float16.
// members holds kFields entries for each, numbers twice kNumbers: cores packed as packed.cuh says, int8 cores with a scale
// float32 [rows], pivot int32 [out], bias float32 [out]. Without core_1 a member is dense, without pivot lowrank, else
// interpolative. scratch: uint8 [scratch_bytes] of its own until all has run. norm [in]: x goes through RMSNorm with this
// weight and eps first (bfloat16 alone). swiglu: x is [M, 2 in] and goes through silu(gate) * up first. dependent: use
// programmatic dependent launch.
void linear(TensorView x, ffi::Optional<TensorView> residual, TensorView y, TensorView scratch,
            ffi::Optional<TensorView> norm, double eps, bool swiglu, bool dependent, Members members,
            ffi::Array<int64_t> numbers) {
  require(x.device().device_type == kDLCUDA, "linear: x must be on a CUDA device");
  const int device = x.device().device_id;
  require_rows(x, "x", device);
  require_rows(y, "y", device);
  require(x.size(0) >= 1 && x.size(0) <= kMostRows, "linear: x must have 1 to 2^20 rows");
  const auto matches = [&](const TensorView& t) { return t.size(0) == x.size(0) && alike(t, x); };
  require(matches(y), "linear: y must have x's rows and dtype");
  require(!members.empty() && members.size() % kFields == 0, "linear: six entries per member");
  require(numbers.size() == members.size() / kFields * 2 * kNumbers, "linear: ten numbers per member");
  require(!swiglu || (x.size(1) % 2 == 0 && !norm.has_value()), "linear: a gated x is gate and up, and has no norm");
  require(scratch.ndim() == 1 && is_type(scratch.dtype(), kDLUInt, 8) && scratch.IsContiguous() &&
              scratch.device().device_type == kDLCUDA && scratch.device().device_id == device &&
              aligned_to(scratch.data_ptr(), 16),
          "linear: scratch must be contiguous uint8 on x's device, aligned to 16 bytes");
  const int64_t in = swiglu ? x.size(1) / 2 : x.size(1);
  Arguments a{x, y, nullptr, nullptr, eps, Prologue::kNone, members, numbers};
  if (residual.has_value()) {
    a.residual = &*residual;
    require_rows(*a.residual, "residual", device);
    require(matches(*a.residual) && a.residual->size(1) == y.size(1), "linear: residual must be like y");
  }
  if (norm.has_value()) {
    a.norm = &*norm;
    const TensorView& n = *a.norm;
    require(n.ndim() == 1 && n.size(0) == in && n.IsContiguous() && alike(n, x) &&
                n.device().device_type == kDLCUDA && n.device().device_id == device,
            "linear: the norm's weight has x's columns, dtype and device");
    a.prologue = Prologue::kNorm;
  }
  if (swiglu) a.prologue = Prologue::kSwiglu;

  ffi::CUDADeviceGuard guard(device);
  const LaunchOptions options = options_for(device, dependent);
  const bool bf16 = is_type(x.dtype(), kDLBfloat, 16);
  if (!bf16 && !is_type(x.dtype(), kDLFloat, 16)) TVM_FFI_THROW(TypeError) << "linear: x is bfloat16 or float16";
  if (x.size(0) <= kMaxRows) return bf16 ? run_few<__nv_bfloat16>(a, scratch, in, options) : run_few<__half>(a, scratch, in, options);
  return bf16 ? run_many<__nv_bfloat16>(a, scratch, in, options) : run_many<__half>(a, scratch, in, options);
}

// Of what `linear` needs for so many rows of x, `in` columns each after the prologue; z_columns: those of all members with two
// cores, a member's rank rounded up to 32.
int64_t scratch_bytes(int64_t rows, int64_t in, int64_t z_columns) {
  return rows <= kMaxRows ? rows * z_columns * 2 : scratch_of(rows, in, z_columns).bytes;
}

template <typename T>
void run_swiglu(const TensorView& x, const TensorView& y, const LaunchOptions& options) {
  TVM_FFI_CHECK_CUDA_ERROR(launch_swiglu<T>(static_cast<const T*>(x.data_ptr()), x.stride(0),
                                            static_cast<T*>(y.data_ptr()), y.stride(0),
                                            static_cast<int>(x.size(0)), static_cast<int>(y.size(1)), options));
}

// y [M, columns] = silu(gate) * up of x [M, 2 columns], with the bits that linear's swiglu gives its rows.
void swiglu(TensorView x, TensorView y, bool dependent) {
  require(x.device().device_type == kDLCUDA, "swiglu: x must be on a CUDA device");
  const int device = x.device().device_id;
  require_rows(x, "x", device);
  require_rows(y, "y", device);
  require(alike(x, y) && x.size(0) == y.size(0) && x.size(1) == 2 * y.size(1), "swiglu: y has half of x's columns");
  require(x.size(0) >= 1 && x.size(0) < 65536 && y.size(1) >= 1, "swiglu: x has 1 to 65535 rows");
  ffi::CUDADeviceGuard guard(device);
  const LaunchOptions options = options_for(device, dependent);
  if (is_type(x.dtype(), kDLBfloat, 16)) return run_swiglu<__nv_bfloat16>(x, y, options);
  if (is_type(x.dtype(), kDLFloat, 16)) return run_swiglu<__half>(x, y, options);
  TVM_FFI_THROW(TypeError) << "swiglu: x is bfloat16 or float16";
}

}  // namespace
}  // namespace cai

TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear, cai::linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scratch_bytes, cai::scratch_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(swiglu, cai::swiglu);
