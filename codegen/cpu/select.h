// The largest of many.
#pragma once
#include <algorithm>
#include "plan.h"
#include "rows.h"

namespace accelc {

// Whether any lane of a comparison is true
inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int l = 0; l < W; l++) found |= mask[l];
  return found != 0;
#endif
}

// The best values of a row with their places, the best first; of equal ones the first in the row. NaN is above all.
struct Best {
  float* values;
  int64_t* places;
  int64_t k, found = 0;
  static bool above(float a, float b) { return a > b || (a != a && b == b); }
  bool full() const { return found == k; }
  float least() const { return values[k - 1]; }
  void offer(float value, int64_t place) {
    if (full() && !above(value, least())) return;
    int64_t at = full() ? k - 1 : found++;
    for (; at > 0 && above(value, values[at - 1]); at--) values[at] = values[at - 1], places[at] = places[at - 1];
    values[at] = value, places[at] = place;
  }
  template <class T> void read(const T* from, int64_t n) {
    int64_t i = 0;
    for (; i < n && !full(); i++) offer(load1(from + i), i);
    for (; i + W <= n; i += W) {
      const vf some = load(from + i);
      if (!any(~vi(some <= least()))) continue;
      for (int l = 0; l < W; l++) offer(some[l], i + l);
    }
    for (; i < n; i++) offer(load1(from + i), i);
  }
};

// tensors: scores [..., V], out [..., K] (int64)
inline void top_k(const Instruction& ins, Team& team) {
  const Tensor &scores = ins.t(0), &out = ins.t(1);
  Rows rows(out, 1);
  const int last = out.ndim - 1;
  const int64_t n = scores.size[last];
  with_dtype(scores.dtype, [&](auto tag) {
    typedef decltype(tag) T;
    each_row(team, rows.count, n, [&](int64_t row) {
      const T* from = (const T*)team.at<void>(scores) + rows.offset(scores, row);
      Best best{team.scratch, team.at<int64_t>(out) + rows.offset(out, row), out.size[last]};
      best.read(from, n);
    });
  });
}
inline int64_t top_k_scratch(const Instruction& i) { return padded(i.t(1).size[i.t(1).ndim - 1]); }

}  // namespace accelc
