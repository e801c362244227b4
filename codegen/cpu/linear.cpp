// Products with weights, a third of the time that the kernels take to build: compiled beside kernels.cpp.
#include "linear.h"

namespace accelc {
void run_linear(const Instruction& ins, Team& team) { linear(ins, team); }
int64_t run_linear_scratch(const Instruction& ins) { return linear_scratch(ins); }
}  // namespace accelc
