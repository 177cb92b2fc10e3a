// Scratch memory of a thread: kept between calls, freed with the thread. When an allocation fails, the region's call
// throws (see thread_pool.h); the process lives on.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "ops.h"

namespace cai {
namespace {

struct Buffer {
  void* data = nullptr;
  Int bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Private::kCount)];

}  // namespace

void* private_memory(Private purpose, Int bytes) {
  Buffer& b = buffers[static_cast<int>(purpose)];
  if (b.bytes < bytes) {
    std::free(b.data);
    b.bytes = 0;
    b.data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
    if (b.data == nullptr)
      throw std::runtime_error("out of memory: " + std::to_string(bytes) + " bytes for the scratch memory of a thread");
    b.bytes = bytes;
  }
  return b.data;
}

}  // namespace cai
