// A forward pass recorded once and run with one call; see program.cpp.
#pragma once

#include "ops.h"

namespace cai {

void run_program(Int program, Int x, Int M, Int out, Int workspace, Int batch);

}  // namespace cai
