// The executor of compiled steps, behind a C interface: create a plan from words, run a range of its instructions.
#include "attention.h"
#include "draw.h"
#include "plan.h"
#include "rows.h"
#include "index.h"
#include "map.h"
#include "product.h"
#include "select.h"
#include <omp.h>

namespace accelc {

void run_linear(const Instruction& ins, Team& team);  // linear.cpp
int64_t run_linear_scratch(const Instruction& ins);

typedef void (*Kernel)(const Instruction&, Team&);
typedef int64_t (*Scratch)(const Instruction&);
struct Op { Kernel run; Scratch scratch; };
int64_t no_scratch(const Instruction&) { return 0; }

// In the order of accelc.codegen.instructions.OPS. Null: in a library of its own, which accelc_kernel_set adds.
Op OPS[] = {
    {run_linear, run_linear_scratch},        {attention, Attention::scratch}, {norm, norm_scratch}, {rotary, rotary_scratch},
    {pointwise, pointwise_scratch}, {copy, no_scratch},           {gather, no_scratch}, {cache_update, no_scratch},
    {product, Product::scratch}, {softmax, softmax_scratch},      {map, no_scratch},  {index, no_scratch},
    {key_positions, no_scratch}, {visible, no_scratch}, {nullptr, no_scratch},
    {quantized_embedding, no_scratch}, {dequantize, no_scratch}, {top_k, top_k_scratch},
    {draw, draw_scratch},
};

struct Plan {
  std::vector<Instruction> instructions;
  std::unique_ptr<Work[]> works;  // Team::PARTS of each instruction
  int64_t scratch = 0;  // floats a thread
  int threads;
  std::vector<float*> scratches;
  double* seconds = nullptr;  // for a profile: each instruction's wait before and run time on the first thread
  ~Plan() { for (float* s : scratches) std::free(s); }

  void run(void* const* bases, int64_t begin, int64_t end, std::atomic<int32_t>& error) {
    for (int64_t i = begin * Team::PARTS; i < end * Team::PARTS; i++) works[i].reset();
    std::atomic<int64_t> front{begin};  // instructions before it are done
    auto work = [&](int rank, int size) {
      int64_t settled = begin;  // as far as this thread knows
      for (int64_t i = begin; i < end; i++) {
        if (size > 1 && i < front.load(std::memory_order_acquire)) continue;
        const Instruction& ins = instructions[i];
        Team team{rank, size, bases, &works[i * Team::PARTS], scratches[rank], &error};
        bool clocked = seconds && rank == 0;
        double reached = clocked ? omp_get_wtime() : 0;
        if (ins.sync && size > 1) {
          for (int64_t w = settled * Team::PARTS; w < i * Team::PARTS; w++) works[w].wait();
          settled = i;
          for (int64_t at = front.load(std::memory_order_relaxed); at < i && !front.compare_exchange_weak(at, i);) {}
        }
        double started = clocked ? omp_get_wtime() : 0;
        if (size > 1) team.work->enter();
        OPS[ins.op].run(ins, team);
        if (size > 1) team.work->leave();
        if (!clocked) continue;
        seconds[2 * i] += started - reached;
        seconds[2 * i + 1] += omp_get_wtime() - started;
      }
    };
    if (threads == 1) return work(0, 1);
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num(), omp_get_num_threads());
  }
};

struct Reader {
  const int64_t* at;
  int64_t word() { return *at++; }
  double number() { return bits_as<double>(*at++); }
  Tensor tensor() {
    Tensor t;
    t.base = int32_t(word());
    if (t.base < 0) return t;
    t.dtype = int32_t(word());
    t.ndim = int32_t(word());
    t.offset = word();
    for (int i = 0; i < t.ndim; i++) t.size[i] = word();
    for (int i = 0; i < t.ndim; i++) t.stride[i] = word();
    return t;
  }
  Instruction instruction() {
    Instruction ins;
    ins.op = int32_t(word());
    ins.sync = word();
    int64_t tensors = word(), ints = word(), floats = word();
    while (tensors--) ins.tensors.push_back(tensor());
    while (ints--) ins.ints.push_back(word());
    while (floats--) ins.floats.push_back(number());
    return ins;
  }
};

}  // namespace accelc

extern "C" {

void accelc_kernel_set(int32_t op, void* run) { accelc::OPS[op].run = (accelc::Kernel)run; }

// words: number of instructions, then each as op, sync, counts of tensors, ints and floats, and these (accelc.codegen.plan).
void* accelc_plan_create(const int64_t* words, int64_t threads) {
  using namespace accelc;
  auto* plan = new Plan;
  plan->threads = int(threads);
  Reader reader{words};
  for (int64_t n = reader.word(); n--;) {
    plan->instructions.push_back(reader.instruction());
    const Instruction& ins = plan->instructions.back();
    plan->scratch = std::max(plan->scratch, OPS[ins.op].scratch(ins));
  }
  plan->works.reset(new Work[plan->instructions.size() * Team::PARTS]);
  size_t bytes = (size_t(plan->scratch + W) * sizeof(float) + 4095) / 4096 * 4096;
  for (int64_t i = 0; i < threads; i++) plan->scratches.push_back((float*)aligned_alloc(4096, bytes));
  return plan;
}

void accelc_plan_free(void* plan) { delete (accelc::Plan*)plan; }

// From now on adds to seconds[2 * i] what instruction i waited and to seconds[2 * i + 1] what it ran; null: stops that.
void accelc_plan_clock(void* plan, double* seconds) { ((accelc::Plan*)plan)->seconds = seconds; }

// Runs instructions [begin, end); returns 0, 1 (an index outside its table) or 2 (a cache slot outside its cache).
int32_t accelc_plan_run(void* plan, void* const* bases, int64_t begin, int64_t end) {
  std::atomic<int32_t> error{0};
  ((accelc::Plan*)plan)->run(bases, begin, end, error);
  return error.load();
}

// Reads memory with all threads at once and does nothing with it: for measuring the bandwidth. Pieces are handed out as the
// executor does, so that beside other processes both lose alike, and read as one stream or as several, up to 8, whatever the
// memory likes best. bytes: a multiple of 4096.
float accelc_read(const float* data, int64_t bytes, int32_t streams, int32_t threads) {
  using namespace accelc;
  constexpr int64_t PIECE = 256;  // pages
  constexpr int STREAMS = 8;
  float result = 0;
  int64_t pages = bytes / 4096;
  streams = std::min(streams, STREAMS);
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(+ : result)
  for (int64_t page = 0; page < pages; page += PIECE) {
    const float *p = data + page * 1024, *end = data + std::min(pages, page + PIECE) * 1024;
    const int64_t each = (end - p) / streams / (4 * W) * (4 * W);
    vf sums[4] = {};
    auto read = [&](const float* from) {
      for (int u = 0; u < 4; u++) sums[u] += load(from + u * W);
    };
    for (int64_t i = 0; i < each; i += 4 * W)
      for (int s = 0; s < streams; s++) read(p + s * each + i);
    for (p += each * streams; p < end; p += 4 * W) read(p);
    result += hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return result;
}
}
