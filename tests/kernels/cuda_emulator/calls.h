// What the C functions of the emulated kernels have in common.
#pragma once

#include "device.h"

// What the kernel ahead of those that follow does: it writes `bytes` to `late`.
inline void begin(int eager, void* late, const void* then, int64_t bytes) {
  emulator::eager = eager != 0;
  emulator::previous = [=] {
    if (bytes != 0) std::memcpy(late, then, static_cast<size_t>(bytes));
  };
}

// Null, or what went wrong.
inline const char* told(const std::function<void()>& run) {
  static char message[256];
  try {
    run();
    return nullptr;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), sizeof message - 1);
    return message;
  }
}
