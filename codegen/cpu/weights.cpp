// Products with weights, half of the time that the kernels take to build: compiled beside kernels.cpp.
#include "weights.h"
#include "linear.h"
#include "quantized.h"

namespace accelc {
void run_linear(const Instruction& ins, Team& team) { linear(ins, team); }
void run_quantized_linear(const Instruction& ins, Team& team) { quantized_linear(ins, team); }
}  // namespace accelc
