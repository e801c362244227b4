// linear: y[m, n] = sum_k x[m, k] w[n, k] + bias[n] (+ residual[m, n]), for few rows m.
//
// Weights stay in torch's row-major layout: a row is one unbroken stream, which already reaches the memory's bandwidth, so
// nothing is packed or copied at start. Every weight is read once per call; a block of NR weight rows is kept in the first-level
// cache while all rows of x pass over it. Each dot product is summed in lanes and folded once at its end.
#pragma once
#include <algorithm>
#include <cstring>
#include "plan.h"

namespace accelc {

// Bytes ahead of the weight streams to prefetch into the second-level cache (measured better than into the first), for one
// row of x: with one stream, and with several at once. x of up to SHORT bytes stays in the first-level cache beside one stream.
constexpr int64_t AHEAD_ONE = 4096, AHEAD_SEVERAL = 2048, SHORT = 12288;

template <class T> struct Dot {  // fp32 lanes
  static constexpr int STEP = W;
  typedef vf operand;
  static operand get(const T* p) { return load(p); }
  static vf mac(operand a, operand b, vf acc) { return a * b + acc; }
};
#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {  // pairs of bf16 into one fp32 lane
  static constexpr int STEP = 32;
  typedef __m512bh operand;
  static operand get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf mac(operand a, operand b, vf acc) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#elif defined(__AVX2__)
template <> struct Dot<bf16> {  // even and odd elements apart: a shift and a mask widen them, no lane is crossed
  static constexpr int STEP = 2 * W;
  struct operand { vf even, odd; };
  static operand get(const bf16* p) {
    typedef uint32_t bits __attribute__((vector_size(sizeof(vf))));
    bits v;
    std::memcpy(&v, p, sizeof(v));
    return {(vf)(v << 16), (vf)(v & 0xffff0000u)};
  }
  static vf mac(operand a, operand b, vf acc) { return a.odd * b.odd + (a.even * b.even + acc); }
};
#endif

// MR dot products of one weight row, which streams through once.
template <class T, int MR> inline void dot_rows(const T* x, int64_t ldx, const T* w, int64_t k_size, float* out) {
  using D = Dot<T>;
  constexpr int U = MR > 2 ? 2 : 4;  // sums in flight a row of x
  vf acc[MR][U] = {};
  int64_t k = 0;
  for (; k + U * D::STEP <= k_size; k += U * D::STEP)
    for (int u = 0; u < U; u++) {
      __builtin_prefetch((const char*)(w + k + u * D::STEP) + AHEAD_ONE, 0, 2);
      auto b = D::get(w + k + u * D::STEP);
      for (int m = 0; m < MR; m++) acc[m][u] = D::mac(D::get(x + m * ldx + k + u * D::STEP), b, acc[m][u]);
    }
  for (; k + D::STEP <= k_size; k += D::STEP)
    for (int m = 0; m < MR; m++) acc[m][0] = D::mac(D::get(x + m * ldx + k), D::get(w + k), acc[m][0]);
  for (int m = 0; m < MR; m++) {
    vf sum = acc[m][0];
    for (int u = 1; u < U; u++) sum += acc[m][u];
    out[m] = hsum(sum);
    for (int64_t j = k; j < k_size; j++) out[m] += load1(x + m * ldx + j) * load1(w + j);
  }
}

// MR x NR dot products of length k_size. `ahead` (bytes) is how far in front of these weights to prefetch; 0: not at all.
template <class T, int MR, int NR>
inline void dot_tile(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t k_size, int64_t ahead, float (*out)[NR]) {
  using D = Dot<T>;
  vf acc[MR][NR] = {};
  int64_t k = 0;
  for (; k + D::STEP <= k_size; k += D::STEP) {
    typename D::operand b[NR];
    for (int n = 0; n < NR; n++) {
      b[n] = D::get(w + n * ldw + k);
      if (ahead) __builtin_prefetch((const char*)(w + n * ldw + k) + ahead, 0, 2);
    }
    for (int m = 0; m < MR; m++) {
      auto a = D::get(x + m * ldx + k);
      for (int n = 0; n < NR; n++) acc[m][n] = D::mac(a, b[n], acc[m][n]);
    }
  }
  for (int m = 0; m < MR; m++) {
    v4 folded{};
    if constexpr (NR == 4) folded = hsum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
    for (int n = 0; n < NR; n++) {
      float sum = NR == 4 ? folded[n] : hsum(acc[m][n]);
      for (int64_t j = k; j < k_size; j++) sum += load1(x + m * ldx + j) * load1(w + n * ldw + j);
      out[m][n] = sum;
    }
  }
}

// One dot product, for one row of x: a single stream over the weights with several sums in flight.
template <class T> inline float dot_stream(const T* x, const T* w, int64_t k_size) {
  using D = Dot<T>;
  constexpr int U = 4;
  vf acc[U] = {};
  int64_t k = 0;
  for (; k + U * D::STEP <= k_size; k += U * D::STEP)
    for (int u = 0; u < U; u++) {
      __builtin_prefetch((const char*)(w + k + u * D::STEP) + AHEAD_ONE, 0, 2);
      acc[u] = D::mac(D::get(x + k + u * D::STEP), D::get(w + k + u * D::STEP), acc[u]);
    }
  for (; k + D::STEP <= k_size; k += D::STEP) acc[0] = D::mac(D::get(x + k), D::get(w + k), acc[0]);
  float sum = hsum((acc[0] + acc[1]) + (acc[2] + acc[3]));
  for (; k < k_size; k++) sum += load1(x + k) * load1(w + k);
  return sum;
}

// NR dot products of one long row of x, which is loaded once for all of them.
template <class T, int NR> inline void dot_streams(const T* x, const T* w, int64_t ldw, int64_t k_size, float* out) {
  using D = Dot<T>;
  vf acc[NR] = {};
  int64_t k = 0;
  for (; k + D::STEP <= k_size; k += D::STEP) {
    auto a = D::get(x + k);
    for (int n = 0; n < NR; n++) {
      __builtin_prefetch((const char*)(w + n * ldw + k) + AHEAD_SEVERAL, 0, 2);
      acc[n] = D::mac(a, D::get(w + n * ldw + k), acc[n]);
    }
  }
  for (int n = 0; n < NR; n++) {
    out[n] = hsum(acc[n]);
    for (int64_t j = k; j < k_size; j++) out[n] += load1(x + j) * load1(w + n * ldw + j);
  }
}

template <class T> struct Linear {
  static constexpr int MR = 4, NR = 4;  // 16 sums and 8 operands: fits the 32 registers of AVX-512
  const T *x, *w, *bias, *residual;
  T* out;
  int64_t m_size, n_size, k_size, ldx, ldw, ldo, ldr;

  void put(int64_t m, int64_t n, float v) const {
    if (bias) v += load1(bias + n);
    if (residual) v += load1(residual + m * ldr + n);
    store1(out + m * ldo + n, v);
  }
  template <int M, int N> void tile(int64_t m, int64_t n) const {
    float sums[M][N];
    // The first rows of x bring in the weights: they fetch the next block meanwhile, the others find theirs in the cache.
    dot_tile<T, M, N>(x + m * ldx, ldx, w + n * ldw, ldw, k_size, m == 0 ? N * ldw * int64_t(sizeof(T)) : 0, sums);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) put(m + i, n + j, sums[i][j]);
  }
  template <int N> void block(int64_t n) const {  // all rows of x against N rows of weights
    int64_t m = 0;
    for (; m + MR <= m_size; m += MR) tile<MR, N>(m, n);
    switch (m_size - m) {
      case 3: tile<3, N>(m, n); break;
      case 2: tile<2, N>(m, n); break;
      case 1: tile<1, N>(m, n); break;
    }
  }
  template <int M> void few(int64_t n, int64_t end) const {  // for M rows of x that fit in the first-level cache together
    for (float sums[M]; n < end; n++) {
      dot_rows<T, M>(x, ldx, w + n * ldw, k_size, sums);
      for (int m = 0; m < M; m++) put(m, n, sums[m]);
    }
  }
  void single(int64_t n, int64_t end) const {  // the same for one row of x
    if (k_size * int64_t(sizeof(T)) > SHORT)
      for (; n + NR <= end; n += NR) {
        float sums[NR];
        dot_streams<T, NR>(x, w + n * ldw, ldw, k_size, sums);
        for (int j = 0; j < NR; j++) put(0, n + j, sums[j]);
      }
    for (; n < end; n++) put(0, n, dot_stream<T>(x, w + n * ldw, k_size));
  }
  void range(int64_t n, int64_t end) const {  // weight rows [n, end)
    if (m_size == 1) return single(n, end);
    if (m_size <= 4 && m_size * k_size * int64_t(sizeof(T)) <= 2 * SHORT) switch (m_size) {
      case 2: return few<2>(n, end);
      case 3: return few<3>(n, end);
      case 4: return few<4>(n, end);
    }
    for (; n + NR <= end; n += NR) block<NR>(n);
    for (; n < end; n++) block<1>(n);
  }
};

// tensors: x [M, K], w [N, K], bias [N] | none, residual [M, N] | none, out [M, N]
template <class T> void linear_as(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &w = ins.t(1), &out = ins.t(4), &res = ins.t(3);
  Linear<T> op{team.at<T>(x), team.at<T>(w), ins.t(2) ? team.at<T>(ins.t(2)) : nullptr, res ? team.at<T>(res) : nullptr,
               team.at<T>(out), x.size[0], w.size[0], x.size[1], x.stride[0], w.stride[0], out.stride[0],
               res ? res.stride[0] : 0};
  constexpr int NR = Linear<T>::NR;
  // Items of about 64 KiB: large enough that handing them out is free, small enough that the threads end together.
  int64_t item = (65536 / int64_t(sizeof(T)) / std::max<int64_t>(op.k_size, 1) + NR - 1) / NR * NR;
  item = std::max<int64_t>(NR, std::min(item, (op.n_size / (4 * team.size) + NR - 1) / NR * NR));
  int64_t items = (op.n_size + item - 1) / item;
  for (int64_t i; (i = team.next()) < items;) op.range(i * item, std::min(op.n_size, (i + 1) * item));
}

inline void linear(const Instruction& ins, Team& team) {
  with_dtype(ins.t(1).dtype, [&](auto tag) { linear_as<decltype(tag)>(ins, team); });
}

}  // namespace accelc
