// Products with weights, a third of the time that the kernels take to build: compiled beside kernels.cpp.
#include "linear.h"

namespace accelc {
void run_linear(const Instruction& ins, Team& team) { linear(ins, team); }
}  // namespace accelc
