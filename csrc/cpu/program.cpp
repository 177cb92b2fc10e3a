// Makes a program of recorded operations, and runs it.
//
// All operations run in one region of the thread pool. Between two of them the threads only wait for each other's last
// pieces, and prefetch the next weights while they wait.
#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <map>
#include <stdexcept>

namespace cai {

namespace ffi = tvm::ffi;

namespace {

std::map<std::string, Recorder>& registry() {
  static std::map<std::string, Recorder>* kinds = new std::map<std::string, Recorder>;  // before other static objects
  return *kinds;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float, Free>;

// Up to so many bytes of a step's values stay with their thread: the system zeroes the pages that it gives. More are given
// back, and come in huge pages. Four blocks of 768 columns over 1,500 rows take 0.96 of the time with it, with int8
// activations 0.84.
constexpr Int kKeptBytes = Int(64) << 20;

// Bytes in huge pages where the system has them.
Memory allocate(Int bytes) {
  constexpr Int kHuge = Int(2) << 20;
  const Int size = (bytes + kHuge - 1) / kHuge * kHuge;
  void* memory = std::aligned_alloc(static_cast<size_t>(kHuge), static_cast<size_t>(size));
  if (memory == nullptr) throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes for a step's values");
#ifdef MADV_HUGEPAGE
  madvise(memory, static_cast<size_t>(size), MADV_HUGEPAGE);  // it may refuse, and then the pages are small
#endif
  return Memory(static_cast<float*>(memory));
}

using Dict = ffi::Map<ffi::String, ffi::Any>;

template <class T>
T entry(const Dict& dict, const char* key) {
  return dict.at(key).cast<T>();
}

std::vector<Int> integers(const Dict& dict, const char* key) {
  std::vector<Int> numbers;
  for (const ffi::Any& number : entry<ffi::Array<ffi::Any>>(dict, key)) numbers.push_back(number.cast<Int>());
  return numbers;
}

class Program {
 public:
  // recorded: axes, widths and types of the values; places: a column of the axis' part of the workspace, or -1 - i for
  // argument i; columns: of the workspace, by axis; arguments: their names; groups: names of cache groups; operations: name,
  // inputs, output, attributes, bindings.
  explicit Program(const Dict& recorded) : columns_(integers(recorded, "columns")), places_(integers(recorded, "places")) {
    const std::vector<Int> axes = integers(recorded, "axes"), widths = integers(recorded, "widths"),
                           types = integers(recorded, "types");
    if (columns_.size() != kAxes || axes.size() != places_.size() || widths.size() != places_.size() ||
        types.size() != places_.size())
      TVM_FFI_THROW(ValueError) << "a program's values do not fit one another";
    for (size_t i = 0; i < axes.size(); ++i) {
      const bool known = axes[i] >= 0 && axes[i] < kAxes && (types[i] == 0 || types[i] == 1) && widths[i] > 0;
      if (!known || (places_[i] >= 0 && places_[i] + widths[i] > columns_[axes[i]]))
        TVM_FFI_THROW(ValueError) << "value " << i << " of a program has an axis, type, width or place that is unknown";
      values_.push_back({static_cast<Axis>(axes[i]), widths[i], static_cast<ValueType>(types[i])});
      if (places_[i] < 0) {
        const size_t argument = static_cast<size_t>(-1 - places_[i]);
        if (arguments_.size() <= argument) arguments_.resize(argument + 1, -1);
        arguments_[argument] = static_cast<Int>(i);
      }
    }
    for (const ffi::Any& name : entry<ffi::Array<ffi::Any>>(recorded, "arguments")) names_.push_back(name.cast<ffi::String>());
    if (names_.size() != arguments_.size()) TVM_FFI_THROW(ValueError) << "a program's arguments do not fit their names";
    for (Int value : arguments_)
      if (value < 0) TVM_FFI_THROW(ValueError) << "an argument of a program stands for no value";
    for (const ffi::Any& group : entry<ffi::Array<ffi::Any>>(recorded, "groups"))
      groups_.push_back(group.cast<ffi::String>());
    for (const ffi::Any& noted : entry<ffi::Array<ffi::Any>>(recorded, "operations")) note(noted.cast<Dict>());
  }

  // arguments: positions, query_start, context_len (each or none), slots and page_table of each group, then the arguments.
  void run(ffi::PackedArgs arguments) const;

 private:
  void note(const Dict& noted) {
    const std::string name = entry<ffi::String>(noted, "name");
    const std::vector<Int> inputs = integers(noted, "inputs");
    const Int output = entry<Int>(noted, "output"), count = static_cast<Int>(values_.size());
    auto found = registry().find(name);
    if (found == registry().end()) TVM_FFI_THROW(ValueError) << "no operation is registered as " << name;
    for (Int value : inputs)
      if (value < 0 || value >= count) TVM_FFI_THROW(ValueError) << name << ": input " << value << " is no value";
    if (output < 0 || output >= count) TVM_FFI_THROW(ValueError) << name << ": output " << output << " is no value";
    const Dict bindings = entry<Dict>(noted, "bindings");
    operations_.push_back(
        found->second(Noted(name, inputs, output, entry<Dict>(noted, "attributes"), bindings, values_, groups_)));
    outputs_.push_back(output);
    bindings_.push_back(bindings);
  }

  // Row counts, and the tables and arguments of a step.
  void bind(Step& step, const ffi::PackedArgs& arguments) const;

  const std::vector<Int> columns_, places_;
  std::vector<Value> values_;
  std::vector<Int> arguments_;  // argument -> value
  std::vector<std::string> names_;  // of the arguments, for messages
  std::vector<std::string> groups_;
  std::vector<std::unique_ptr<const Operation>> operations_;
  std::vector<Int> outputs_;  // of each operation
  std::vector<Dict> bindings_;  // held on to
};

void Program::bind(Step& step, const ffi::PackedArgs& arguments) const {
  const size_t tables = 3 + 2 * groups_.size();
  if (static_cast<size_t>(arguments.size()) != tables + arguments_.size())
    TVM_FFI_THROW(ValueError) << "a program takes " << tables + arguments_.size() << " tensors, not " << arguments.size();
  auto tensor = [&](size_t i) { return arguments[static_cast<int>(i)].cast<Tensor>(); };
  bool known[kAxes] = {};
  auto count = [&](Axis axis, Int rows, const char* what) {
    const Int a = static_cast<Int>(axis);
    if (known[a] && step.counts[a] != rows)
      TVM_FFI_THROW(ValueError) << what << " has " << rows << " rows where the step has " << step.counts[a];
    known[a] = true;
    step.counts[a] = rows;
  };
  const bool batch = arguments[0].type_index() != ffi::TypeIndex::kTVMFFINone;
  if (!batch && !groups_.empty()) TVM_FFI_THROW(ValueError) << "a program with attention needs a batch";
  if (batch) {
    count(Axis::kTokens, tensor(0).numel(), "positions");
    count(Axis::kSequences, tensor(2).numel(), "context_len");
  }
  for (size_t g = 0; g < groups_.size(); ++g)
    step.batches.push_back(checked_batch(tensor(0), tensor(3 + 2 * g), tensor(1), tensor(2), tensor(4 + 2 * g),
                                         step.counts[static_cast<Int>(Axis::kTokens)]));
  step.values = &values_;
  step.addresses.resize(values_.size());
  for (size_t i = 0; i < arguments_.size(); ++i) {
    const Value& value = values_[static_cast<size_t>(arguments_[i])];
    const char* name = names_[i].c_str();
    const Tensor given = tensor(tables + i);
    const Int rows = rows_of(given, name);
    count(value.axis, rows, name);
    step.addresses[static_cast<size_t>(arguments_[i])] = checked_matrix<void>(
        given, name, value.type == ValueType::kInt32 ? kInt32 : kFloat, rows, value.width);
  }
}

void Program::run(ffi::PackedArgs arguments) const {
  Step step;
  bind(step, arguments);
  step.threads = num_threads();
  Int floats = 0, begin[kAxes];
  for (Int a = 0; a < kAxes; ++a) {
    begin[a] = floats;
    floats += (columns_[static_cast<size_t>(a)] * step.counts[a] + 15) / 16 * 16;
  }
  Int scratch = 0, call_bytes = 0, phases = 0;
  constexpr Int kAlign = alignof(std::max_align_t);
  for (const auto& operation : operations_) {
    scratch = std::max(scratch, operation->scratch_floats(step));
    call_bytes += (operation->call_bytes() + kAlign - 1) / kAlign * kAlign;
    phases += operation->phases();
  }
  const Int bytes = (floats + scratch) * Int(sizeof(float));
  const Memory own_workspace = bytes > kKeptBytes ? allocate(bytes) : nullptr;
  float* workspace = bytes > kKeptBytes ? own_workspace.get() : static_cast<float*>(private_memory(Private::kValues, bytes));
  step.scratch = workspace + floats;
  for (size_t v = 0; v < values_.size(); ++v) {
    const Int a = static_cast<Int>(values_[v].axis);
    if (places_[v] >= 0) step.addresses[v] = workspace + begin[a] + places_[v] * step.counts[a];
  }

  struct Call {
    const Operation* operation;
    void* call;
  };
  std::vector<std::max_align_t> memory(static_cast<size_t>(call_bytes / kAlign));
  std::vector<Call> calls;
  calls.reserve(operations_.size());
  Int own = 0, at = 0;
  for (size_t i = 0; i < operations_.size(); ++i) {
    if (step.rows(outputs_[i]) == 0) continue;
    calls.push_back({operations_[i].get(), memory.data() + at});
    own = std::max(own, operations_[i]->prepare(step, calls.back().call));
    at += (operations_[i]->call_bytes() + kAlign - 1) / kAlign;
  }
  float* partial = static_cast<float*>(private_memory(Private::kPartial, own * Int(sizeof(float))));
  for (const Call& c : calls) c.operation->give(c.call, partial);

  parallel(step.threads, phases, [&](Team& team) {
    for (size_t i = 0; i < calls.size(); ++i) {
      const char* after = nullptr;
      for (size_t j = i + 1; j < calls.size(); ++j)
        if (calls[j].operation->has_weights()) {
          after = calls[j].operation->first_weights(team);
          break;
        }
      calls[i].operation->run(team, calls[i].call, after);
      if (i + 1 < calls.size()) team.sync(Fetcher(after));
    }
  });
}

}  // namespace

bool register_operation(const char* name, Recorder recorder) {
  registry()[name] = recorder;
  return true;
}

void Noted::fail(const std::string& why) const { TVM_FFI_THROW(ValueError) << name << " " << why; throw 0; }

Tensor Noted::tensor(const char* binding) const {
  auto found = bindings_.find(binding);
  if (found == bindings_.end()) fail(std::string("lacks the binding ") + binding);
  auto tensor = (*found).second.try_cast<Tensor>();
  if (!tensor.has_value()) fail(std::string("needs a tensor as ") + binding);
  return tensor.value();
}

Int Noted::group() const {
  const std::string wanted = get<ffi::String>("group");
  auto found = std::find(groups_.begin(), groups_.end(), wanted);
  if (found == groups_.end()) fail("names the cache group " + wanted + ", which the program does not have");
  return found - groups_.begin();
}

Int Noted::input(size_t i, Int width, ValueType type, bool same_rows) const {
  if (i >= inputs.size()) fail("has " + std::to_string(inputs.size()) + " inputs, and needs one more");
  const Value& v = value(inputs[i]);
  if (v.type != type || v.width != width)
    fail("takes " + std::to_string(width) + " columns of " + (type == ValueType::kFloat32 ? "float32" : "int32") +
         " as input " + std::to_string(i) + ", not " + std::to_string(v.width) +
         (v.type == ValueType::kFloat32 ? " of float32" : " of int32"));
  if (same_rows && v.axis != value(output).axis) fail("has other rows as input than as output");
  return inputs[i];
}

Int Noted::checked_output(Int width) const {
  const Value& v = value(output);
  if (v.type != ValueType::kFloat32 || v.width != width)
    fail("gives " + std::to_string(width) + " columns of float32, not " + std::to_string(v.width));
  return output;
}

ffi::Function make_program(Dict recorded) {
  auto program = std::make_shared<const Program>(recorded);
  return ffi::Function::FromPacked([program](ffi::PackedArgs arguments, ffi::Any*) { program->run(arguments); });
}

}  // namespace cai
