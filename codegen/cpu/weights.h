// What weights.cpp has for the executor.
#pragma once
#include "plan.h"

namespace accelc {
void run_linear(const Instruction& ins, Team& team);
void run_quantized_linear(const Instruction& ins, Team& team);
}  // namespace accelc
