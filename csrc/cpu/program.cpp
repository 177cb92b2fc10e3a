// A forward pass recorded once and run with one call: what a CUDA graph is on a GPU. kernels/program.py records it.
//
// All operations run in one region of the thread pool: between two of them the threads only wait for each other's last
// pieces, and fetch the next weights meanwhile.
//
// Values live in slots. Slot 0 is the input x, slot 1 the output, both the caller's; the others lie in the workspace, slot s
// at M * offset[s] floats, [M, width[s]] row-major. Offsets are shared between slots that are not alive together.
#include "program.h"

#include <tvm/ffi/tvm_ffi.h>

#include <cstring>
#include <variant>
#include <vector>

namespace cai {
namespace {

enum class OpCode : Int { kRmsNorm = 0, kLinear = 1, kAttention = 2, kSwiglu = 3 };

constexpr Int kOpFields = 10;

double as_double(Int bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

using Step = std::variant<NormCall, LinearCall, AttentionCall, SwigluCall>;

struct Runner {
  Team& team;
  const char* after;  // where the next linear's weights begin for this thread
  void operator()(const NormCall& c) const { rms_norm(team, c); }
  void operator()(const LinearCall& c) const { linear_group(team, c, after); }
  void operator()(const AttentionCall& c) const { attention(team, c); }
  void operator()(const SwigluCall& c) const { swiglu(team, c); }
};

void run_steps(Team& team, const std::vector<Step>& steps) {
  for (size_t i = 0; i < steps.size(); ++i) {
    const char* after = nullptr;
    for (size_t j = i + 1; j < steps.size() && after == nullptr; ++j)
      if (const auto* next = std::get_if<LinearCall>(&steps[j])) {
        after = first_weights(team, *next->group);
        break;
      }
    std::visit(Runner{team, after}, steps[i]);
    if (i + 1 == steps.size()) break;
    team.sync(Fetcher(after));
  }
}

}  // namespace

// program: [slots, operations, scratch_offset], then (offset, width) of each slot, then kOpFields integers an operation:
//   rms_norm   code, from, to, weight, eps (bits of a double)
//   linear     code, from, to, group, prologue, norm weight, eps (bits of a double), residual slot or -1
//   attention  code, from (qkv, may be overwritten), to, shape, k_cache, v_cache, cos_sin, rotary_dim, scale (bits)
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
    return pointer<float>(s == 0 ? x : s == 1 ? out : workspace + slot[2 * s] * M * Int(sizeof(float)));
  };
  auto width = [&](Int s) { return slot[2 * s + 1]; };
  const Batch rows{pointer<const int32_t>(b[0]), pointer<const int32_t>(b[1]), pointer<const int32_t>(b[2]),
                   pointer<const int32_t>(b[3]), pointer<const int32_t>(b[4]), b[5]};
  const int threads = num_threads();
  Int phases = 0;
  std::vector<Step> steps;
  steps.reserve(operations);
  for (Int i = 0; i < operations; ++i, op += kOpFields) {
    float *from = address(op[1]), *to = address(op[2]);
    switch (static_cast<OpCode>(op[0])) {
      case OpCode::kRmsNorm:
        steps.push_back(NormCall{from, nullptr, pointer<const float>(op[3]), static_cast<float>(as_double(op[4])),
                                 width(op[1]), M, nullptr, to});
        phases += 1;
        break;
      case OpCode::kLinear:
        steps.push_back(LinearCall{pointer<const LinearGroup>(op[3]), from, width(op[1]), M, static_cast<Prologue>(op[4]),
                                   pointer<const float>(op[5]), static_cast<float>(as_double(op[6])),
                                   op[7] < 0 ? nullptr : address(op[7]), width(op[2]), to, width(op[2]),
                                   pointer<float>(scratch)});
        phases += kLinearPhases;
        break;
      case OpCode::kAttention: {
        AttentionCall c{};
        c.batch = rows;
        c.qkv = from;
        c.M = M;
        c.cos_sin = pointer<const float>(op[6]);
        c.rotary_dim = op[7];
        c.k_cache = pointer<void>(op[4]);
        c.v_cache = pointer<void>(op[5]);
        c.out = to;
        plan_attention(c, pointer<const Int>(op[3]), as_double(op[8]), b[6], threads);
        steps.push_back(c);
        phases += kAttentionPhases;
        break;
      }
      case OpCode::kSwiglu:
        steps.push_back(SwigluCall{from, width(op[2]), M, to});
        phases += 1;
        break;
      default:
        TVM_FFI_THROW(ValueError) << "operation " << op[0] << " of a program is unknown";
    }
  }
  parallel(threads, phases, [&](Team& team) { run_steps(team, steps); });
}

}  // namespace cai
