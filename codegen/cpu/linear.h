// linear: y[m, n] = sum_k x[m, k] w[n, k] + bias[n] (+ residual[m, n]), for few rows m.
//
// Weights stay in torch's row-major layout, so nothing is packed or copied at start. Every weight is read once per call: a block
// of NR weight rows is kept in the first-level cache while all rows of x pass over it. The rows of a block are those that NR
// readers, each in a part of its own of the thread's piece, have reached: each part is one unbroken stream, however short the
// rows are. Several streams a core are what the memory wants: measured on Zen 3 with two threads, GB/s of one stream a core, of
// four rows that lie beside each other, and of four parts: fp32 rows of 768 22, 28, 37, bf16 rows of 2048 24, 29, 34 (reading
// alone: 38). Each dot product is summed in lanes and folded once at its end.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>
#include "panel.h"
#include "plan.h"

namespace accelc {

// STEP: elements that `get` loads; NEAR: bytes to prefetch ahead of a stream where that work crowds out the loads to come.
template <class T> struct Dot {  // fp32 lanes
  static constexpr int STEP = W, NEAR = 0;
  typedef vf operand;
  static operand get(const T* p) { return load(p); }
  static vf mac(operand a, operand b, vf acc) { return a * b + acc; }
};
#if defined(__AVX512BF16__)
template <> struct Dot<bf16> {  // pairs of bf16 into one fp32 lane
  static constexpr int STEP = 32, NEAR = 0;
  typedef __m512bh operand;
  static operand get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vf mac(operand a, operand b, vf acc) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
};
#elif defined(__AVX2__)
template <> struct Dot<bf16> {  // even and odd elements apart: a shift and a mask widen them, no lane is crossed
  static constexpr int STEP = 2 * W, NEAR = 256;
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

// MR x NR dot products of length k_size. `ahead` (bytes) is how far in front of these weights to prefetch; 0: not at all.
template <class T, int MR, int NR>
inline void dot_tile(const T* x, int64_t ldx, const T* w, int64_t ldw, int64_t k_size, int64_t ahead, float (*out)[NR]) {
  using D = Dot<T>;
  constexpr int U = MR * NR < 8 ? 2 : 1;  // sums in flight: a product waits for the one before it
  vf acc[MR][NR][U] = {};
  int64_t k = 0;
  auto step = [&](int u) {
    typename D::operand b[NR];
    for (int n = 0; n < NR; n++) {
      b[n] = D::get(w + n * ldw + k);
      if (ahead) __builtin_prefetch((const char*)(w + n * ldw + k) + ahead, 0, 2);
      else if (MR <= 2 && D::NEAR) __builtin_prefetch((const char*)(w + n * ldw + k) + D::NEAR);
    }
    for (int m = 0; m < MR; m++) {
      auto a = D::get(x + m * ldx + k);
      for (int n = 0; n < NR; n++) acc[m][n][u] = D::mac(a, b[n], acc[m][n][u]);
    }
    k += D::STEP;
  };
  while (k + U * D::STEP <= k_size)
    for (int u = 0; u < U; u++) step(u);
  while (U > 1 && k + D::STEP <= k_size) step(0);
  for (int m = 0; m < MR; m++) {
    vf sums[NR];
    for (int n = 0; n < NR; n++) sums[n] = U > 1 ? acc[m][n][0] + acc[m][n][U - 1] : acc[m][n][0];
    v4 folded{};
    if constexpr (NR == 4) folded = hsum4(sums[0], sums[1], sums[2], sums[3]);
    for (int n = 0; n < NR; n++) {
      float sum = NR == 4 ? folded[n] : hsum(sums[n]);
      for (int64_t j = k; j < k_size; j++) sum += load1(x + m * ldx + j) * load1(w + n * ldw + j);
      out[m][n] = sum;
    }
  }
}

// Rows of x from which on panels are faster.
template <class T> constexpr int64_t PANEL_ROWS = std::is_same_v<T, bf16> ? 24 : 10;

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
  // Rows of x from m on against N rows of weights, `apart` rows from each other.
  template <int M, int N> void tile(int64_t m, int64_t n, int64_t apart) const {
    float sums[M][N];
    // Where several tiles share the block, the first brings it in, and fetches the next one meanwhile.
    int64_t ahead = m == 0 && m_size > MR ? ldw * int64_t(sizeof(T)) : 0;
    dot_tile<T, M, N>(x + m * ldx, ldx, w + n * ldw, apart * ldw, k_size, ahead, sums);
    for (int i = 0; i < M; i++)
      for (int j = 0; j < N; j++) put(m + i, n + j * apart, sums[i][j]);
  }
  template <int N> void block(int64_t n, int64_t apart) const {  // all rows of x
    int64_t m = 0;
    for (; m + MR <= m_size; m += MR) tile<MR, N>(m, n, apart);
    switch (m_size - m) {
      case 3: tile<3, N>(m, n, apart); break;
      case 2: tile<2, N>(m, n, apart); break;
      case 1: tile<1, N>(m, n, apart); break;
    }
  }
  void range(int64_t n, int64_t end) const {  // weight rows [n, end)
    const int64_t apart = (end - n) / NR;
    for (int64_t i = 0; i < apart; i++) block<NR>(n + i, apart);
    for (n += apart * NR; n < end; n++) block<1>(n, 0);
  }
#ifdef PANELS
  void put_row(int64_t m, int64_t n, int64_t count, const float* sums) const {
    int64_t j = 0;
    for (; j + W <= count; j += W) {
      vf v = load(sums + j);
      if (bias) v += load(bias + n + j);
      if (residual) v += load(residual + m * ldr + n + j);
      store(out + m * ldo + n + j, v);
    }
    for (; j < count; j++) put(m, n + j, sums[j]);
  }
  void panels(Team& team) const {
    Pieces pieces{n_size, Panels::NR, k_size * int64_t(sizeof(T)), team.size};
    bool taken = false;
    for (int64_t begin, end; pieces.take(team, begin, end);)
      for (int64_t first = 0; first < m_size; first += Panels::TOGETHER) {
        const Panels rows(std::min(Panels::TOGETHER, m_size - first), team.scratch);
        if (!taken || m_size > Panels::TOGETHER) rows.take(x + first * ldx, ldx, k_size);
        taken = true;
        for (int64_t n = begin; n < end; n += Panels::NR) {
          const int64_t count = std::min<int64_t>(Panels::NR, end - n);
          rows.times(w + n * ldw, ldw, count, k_size);
          for (int64_t m = 0; m < rows.rows; m++) put_row(first + m, n, count, rows.sums + m * Panels::NR);
        }
      }
  }
#endif
};

// tensors: x [M, K], w [N, K], bias [N] | none, residual [M, N] | none, out [M, N]
template <class T> void linear_as(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &w = ins.t(1), &out = ins.t(4), &res = ins.t(3);
  Linear<T> op{team.at<T>(x), team.at<T>(w), ins.t(2) ? team.at<T>(ins.t(2)) : nullptr, res ? team.at<T>(res) : nullptr,
               team.at<T>(out), x.size[0], w.size[0], x.size[1], x.stride[0], w.stride[0], out.stride[0],
               res ? res.stride[0] : 0};
#ifdef PANELS
  if (op.m_size >= PANEL_ROWS<T>) return op.panels(team);
#endif
  Pieces pieces{op.n_size, Linear<T>::NR, op.k_size * int64_t(sizeof(T)), team.size};
  for (int64_t begin, end; pieces.take(team, begin, end);) op.range(begin, end);
}

inline int64_t linear_scratch(const Instruction& ins) {
  int64_t floats = 0;
#ifdef PANELS
  const Tensor& x = ins.t(0);
  with_dtype(ins.t(1).dtype, [&](auto tag) {
    if (x.size[0] >= PANEL_ROWS<decltype(tag)>) floats = Panels::scratch(x.size[0], x.size[1]);
  });
#endif
  return floats;
}

inline void linear(const Instruction& ins, Team& team) {
  with_dtype(ins.t(1).dtype, [&](auto tag) { linear_as<decltype(tag)>(ins, team); });
}

}  // namespace accelc
