// Products with weights in few bits, for the executor in kernels.cpp: a library of its own, built where a program needs it.
#include "quantized.h"

extern "C" void accelc_run_quantized_linear(const accelc::Instruction& ins, accelc::Team& team) {
  accelc::quantized_linear(ins, team);
}
