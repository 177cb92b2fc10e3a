// A forward pass recorded once and run with one call: what a CUDA graph is on a GPU. kernels/program.py records it.
//
// Values live in slots. Slot 0 is the input x, slot 1 the output, both the caller's; the others lie in the workspace, slot s
// at M * offset[s] floats, [M, width[s]] row-major. Offsets are shared between slots that are not alive together.
#include <tvm/ffi/tvm_ffi.h>

#include <cstring>

#include "ops.h"

namespace cai {
namespace {

enum class OpCode : Int { kRmsNorm = 0, kLinear = 1, kAttention = 2, kSwiglu = 3 };

constexpr Int kOpFields = 10;

double as_double(Int bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace

// program: [slots, operations, scratch_offset], then (offset, width) of each slot, then kOpFields integers an operation:
//   rms_norm   code, from, to, weight, eps (bits of a double)
//   linear     code, from, to, descriptor, residual slot or -1
//   attention  code, from (qkv, overwritten by its rotation), to, shape, k_cache, v_cache, cos_sin, rotary_dim, scale (bits)
//   swiglu     code, from, to
// batch: [positions, slots, query_start, context_len, page_table, sequences, pages_per_sequence]
void run_program(Int program, Int x, Int M, Int out, Int workspace, Int batch) {
  const Int* p = pointer<const Int>(program);
  const Int slots = p[0], operations = p[1], scratch = workspace + p[2] * M * Int(sizeof(float));
  const Int* slot = p + 3;
  const Int* op = slot + 2 * slots;
  const Int* b = pointer<const Int>(batch);
  if (M == 0) return;
  auto address = [&](Int s) {
    return s == 0 ? x : s == 1 ? out : workspace + slot[2 * s] * M * Int(sizeof(float));
  };
  auto width = [&](Int s) { return slot[2 * s + 1]; };
  for (Int i = 0; i < operations; ++i, op += kOpFields) {
    const Int from = address(op[1]), to = address(op[2]);
    switch (static_cast<OpCode>(op[0])) {
      case OpCode::kRmsNorm:
        rms_norm(from, 0, op[3], as_double(op[4]), width(op[1]), M, 0, to);
        break;
      case OpCode::kLinear: {
        const Int residual = op[4] < 0 ? 0 : address(op[4]);
        linear_group(op[3], from, M, width(op[1]), to, width(op[2]), residual, width(op[2]), scratch);
        break;
      }
      case OpCode::kAttention: {
        Int shape[6];
        std::memcpy(shape, pointer<const Int>(op[3]), sizeof shape);
        shape[4] = b[6];
        const Int s = static_cast<Int>(reinterpret_cast<intptr_t>(shape));
        rope_kv_write(from, M, b[0], b[1], op[6], op[7], s, op[4], op[5]);
        paged_attention(from, width(op[1]), b[2], b[3], b[4], b[5], s, as_double(op[8]), op[4], op[5], to,
                        width(op[2]));
        break;
      }
      case OpCode::kSwiglu:
        swiglu(from, width(op[2]), M, to);
        break;
      default:
        TVM_FFI_THROW(ValueError) << "operation " << op[0] << " of a program is unknown";
    }
  }
}

}  // namespace cai
