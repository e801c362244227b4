// What a compiled step is to the machine: a list of instructions over described buffers, run by a team of threads.
#pragma once
#include <sched.h>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>
#include "vec.h"

namespace accelc {

enum DType : int32_t { F32 = 0, BF16 = 1, F16 = 2, I64 = 3, BOOL = 4 };
constexpr int64_t ITEMSIZE[] = {4, 2, 2, 8, 1};
constexpr int MAX_DIMS = 6;
constexpr int LANES = 16;  // rows of a weight in few bits that lie interleaved

struct Tensor {          // strides in elements
  int32_t base = -1;     // index into the bases given at each run; -1: absent
  int32_t dtype = 0;
  int32_t ndim = 0;
  int64_t offset = 0;    // bytes
  int64_t size[MAX_DIMS];
  int64_t stride[MAX_DIMS];
  explicit operator bool() const { return base >= 0; }
};

// What is left of one part of an instruction. It is done when its items are handed out and nobody is inside: threads that came
// late, or that the machine has taken off their cores, are not waited for unless they hold an item.
struct alignas(64) Work {
  std::atomic<int64_t> cursor{0};
  std::atomic<int32_t> inside{0};
  void reset() {
    cursor.store(0, std::memory_order_relaxed);
    inside.store(0, std::memory_order_relaxed);
  }
  void enter() { inside.fetch_add(1, std::memory_order_acq_rel); }
  void leave() { inside.fetch_sub(1, std::memory_order_acq_rel); }
  // For a thread that saw the last item handed out: it then also sees everybody who got one enter (`cursor` carries that).
  void wait() const {
    constexpr int SPINS = 4096;  // about 0.1 ms
    for (int spins = 0; inside.load(std::memory_order_acquire) > 0; spins++) {
      // A partner that the machine has taken off its core must get the chance to come back.
      if (spins > SPINS) sched_yield();
#if defined(__x86_64__)
      else _mm_pause();
#endif
    }
  }
};

// The threads that run one instruction together; `next` hands out work items. An instruction with a second part, which reads
// what the first wrote, calls `settle` between them.
struct Team {
  static constexpr int PARTS = 2;
  int rank, size;
  void* const* bases;
  Work* work;            // of the part that is running
  float* scratch;        // this thread's own
  std::atomic<int32_t>* error;
  void fail(int32_t code) const { error->store(code, std::memory_order_relaxed); }
  int64_t next() {
    if (size > 1) return work->cursor.fetch_add(1, std::memory_order_acq_rel);
    int64_t item = work->cursor.load(std::memory_order_relaxed);
    work->cursor.store(item + 1, std::memory_order_relaxed);
    return item;
  }
  void settle() {
    if (size > 1) {
      work->leave();
      work->wait();
      work[1].enter();
    }
    work++;
  }
  template <class T> T* at(const Tensor& t) const { return (T*)((char*)bases[t.base] + t.offset); }
};

// Shares [0, count) out in pieces of multiples of `unit`, large ones first (long streams), small ones last (threads that end
// together): always a part of what is left, but not below LEAST bytes. `bytes`: of one.
struct Pieces {
  static constexpr int64_t LEAST = 16384;
  int64_t count, unit, bytes;
  int threads;
  bool take(Team& team, int64_t& begin, int64_t& end) const {
    const int64_t least = std::max<int64_t>(unit, LEAST / std::max<int64_t>(bytes, 1) / unit * unit);
    int64_t item = team.next();
    for (begin = 0; begin < count; begin = end, item--) {  // the pieces before it follow from its number alone
      end = std::min(count, begin + std::max(least, (count - begin) / (2 * threads) / unit * unit));
      if (item == 0) return true;
    }
    return false;
  }
};

struct Instruction {
  int32_t op;
  bool sync;             // wait for all earlier instructions first
  std::vector<Tensor> tensors;
  std::vector<int64_t> ints;
  std::vector<double> floats;
  const Tensor& t(int i) const { return tensors[i]; }
};

inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

template <class F> inline void with_dtype(int32_t dtype, F f) {
  if (dtype == F32) f(float{});
  else if (dtype == BF16) f(bf16{});
  else f(f16{});
}

// n values as fp32, from any float dtype, and back
inline void widen(const void* src, int32_t dtype, float* dst, int64_t n) {
  with_dtype(dtype, [&](auto tag) {
    auto p = (const decltype(tag)*)src;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(dst + i, load(p + i));
    for (; i < n; i++) dst[i] = load1(p + i);
  });
}
inline void narrow(const float* src, void* dst, int32_t dtype, int64_t n) {
  with_dtype(dtype, [&](auto tag) {
    auto p = (decltype(tag)*)dst;
    int64_t i = 0;
    for (; i + W <= n; i += W) store(p + i, load(src + i));
    for (; i < n; i++) store1(p + i, src[i]);
  });
}
inline const void* element(const void* p, int32_t dtype, int64_t i) { return (const char*)p + i * ITEMSIZE[dtype]; }
inline void* element(void* p, int32_t dtype, int64_t i) { return (char*)p + i * ITEMSIZE[dtype]; }

// A walk over the leading dims of up to 4 tensors of one shape: element offsets of row `row`.
struct Rows {
  int ndim;
  int64_t size[MAX_DIMS];
  int64_t count = 1;
  Rows(const Tensor& shape, int inner) : ndim(shape.ndim - inner) {
    for (int d = 0; d < ndim; d++) count *= size[d] = shape.size[d];
  }
  int64_t offset(const Tensor& t, int64_t row) const {
    int64_t at = 0;
    for (int d = ndim - 1; d >= 0; d--) {
      at += row % size[d] * t.stride[d];
      row /= size[d];
    }
    return at;
  }
};

}  // namespace accelc
