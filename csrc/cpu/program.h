// A forward pass recorded once and run with one call: what a CUDA graph is on a GPU. kernels/program.py records it.
//
// A value is a matrix whose rows belong to one thing that a step counts (Axis). An operation is of a kind that registered
// itself by name: it checks its attributes and bindings when the pass is recorded, checks the step before it runs, and runs
// as its part of one region of the thread pool. To add an operation, write one class and one CAI_OPERATION line.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <memory>
#include <string>
#include <vector>

#include "ops.h"
#include "tensors.h"

namespace cai {

// What the rows of a value are: tokens, sequences, rows whose logits are wanted, positions of an encoder, or rows dealt to
// experts. The values are shared with kernels/program.py.
enum class Axis : Int { kTokens = 0, kSequences = 1, kWanted = 2, kEncoder = 3, kExpert = 4, kCount = 5 };
constexpr Int kAxes = static_cast<Int>(Axis::kCount);

enum class ValueType : Int { kFloat32 = 0, kInt32 = 1 };

struct Value {
  Axis axis;
  Int width;
  ValueType type;
};

// One run of a program: row counts, where each value lies, and the pages of each cache group.
class Step {
 public:
  Int rows(Int value) const { return counts[static_cast<Int>((*values)[value].axis)]; }
  template <class T>
  T* at(Int value) const {
    return static_cast<T*>(addresses[value]);
  }
  const Batch& batch(Int group) const { return batches[group]; }

  Int counts[kAxes] = {};
  const std::vector<Value>* values = nullptr;
  std::vector<void*> addresses;   // by value
  std::vector<Batch> batches;     // by cache group
  float* scratch = nullptr;       // one operation's, in the workspace
  int threads = 1;
};

// An operation as Python recorded it. The getters raise ValueError, naming the operation.
class Noted {
 public:
  Noted(std::string name, std::vector<Int> inputs, Int output, tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> attributes,
        tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> bindings, const std::vector<Value>& values,
        const std::vector<std::string>& groups)
      : name(std::move(name)), inputs(std::move(inputs)), output(output), attributes_(std::move(attributes)),
        bindings_(std::move(bindings)), values_(values), groups_(groups) {}

  const std::string name;
  const std::vector<Int> inputs;  // numbers of values
  const Int output;

  Int integer(const char* attribute) const { return get<Int>(attribute); }
  double number(const char* attribute) const { return get<double>(attribute); }
  bool has_binding(const char* binding) const { return bindings_.count(binding) > 0; }
  // A tensor that the pass holds on to. Python keeps it alive as long as the program.
  Tensor tensor(const char* binding) const;
  Int group() const;  // the number of the cache group that the attribute "group" names

  // The number of input i. Raises ValueError where the value is of another type or width, or where its rows are not those of
  // the output and `same_rows`.
  Int input(size_t i, Int width, ValueType type = ValueType::kFloat32, bool same_rows = true) const;
  // Raises ValueError where the output is not float32 of this width.
  Int checked_output(Int width) const;
  const Value& value(Int number) const { return values_[number]; }
  [[noreturn]] void fail(const std::string& why) const;

 private:
  template <class T>
  T get(const char* attribute) const {
    auto found = attributes_.find(attribute);
    if (found == attributes_.end()) fail(std::string("lacks the attribute ") + attribute);
    auto value = (*found).second.template try_cast<T>();
    if (!value.has_value()) fail(std::string("has an attribute of another type: ") + attribute);
    return value.value();
  }

  tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> attributes_, bindings_;
  const std::vector<Value>& values_;
  const std::vector<std::string>& groups_;
};

// A recorded operation: immutable, so that a program may run in several threads. The state of one run is its call, a plain
// structure of `call_bytes` that `prepare` makes and `run` reads.
class Operation {
 public:
  virtual ~Operation() = default;
  virtual Int call_bytes() const = 0;
  virtual Int phases() const = 0;  // most phases of one run, see thread_pool.h
  // Called before the region. Raises IndexError or ValueError for a step that does not fit. Returns the floats of memory
  // that the call needs, which `give` then passes to it.
  virtual Int prepare(const Step& step, void* call) const = 0;
  virtual void give(void* /*call*/, float* /*memory*/) const {}
  // Called in the region, on every thread. after: the weights that this thread reads next, to be prefetched; or null.
  virtual void run(Team& team, const void* call, const char* after) const = 0;
  // Whether it streams weights, and the first ones that a thread reads.
  virtual bool has_weights() const { return false; }
  virtual const char* first_weights(const Team& /*team*/) const { return nullptr; }
  virtual Int scratch_floats(const Step& /*step*/) const { return 0; }
};

// The plain part of an operation whose call is a `Call`.
template <class Call, Int kPhases>
class OperationOf : public Operation {
 public:
  Int call_bytes() const override { return sizeof(Call); }
  Int phases() const override { return kPhases; }
  Int prepare(const Step& step, void* call) const override { return prepare(step, *new (call) Call{}); }
  void give(void* call, float* memory) const override { give(*static_cast<Call*>(call), memory); }
  void run(Team& team, const void* call, const char* after) const override {
    run(team, *static_cast<const Call*>(call), after);
  }
  virtual Int prepare(const Step& step, Call& call) const = 0;
  virtual void give(Call& /*call*/, float* /*memory*/) const {}
  virtual void run(Team& team, const Call& call, const char* after) const = 0;
};

using Recorder = std::unique_ptr<const Operation> (*)(const Noted&);
bool register_operation(const char* name, Recorder recorder);  // returns true
#define CAI_OPERATION(name, type)                                        \
  [[maybe_unused]] const bool registered_##type = ::cai::register_operation( \
      name, [](const ::cai::Noted& noted) -> std::unique_ptr<const ::cai::Operation> { return std::make_unique<type>(noted); })

// See program.cpp.
tvm::ffi::Function make_program(tvm::ffi::Map<tvm::ffi::String, tvm::ffi::Any> recorded);

}  // namespace cai
