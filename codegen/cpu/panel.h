// linear for many rows: weights are turned, a panel of some of their rows and CHUNK columns at a time, so that a vector holds one
// column of W of them; every element of x, broadcast, multiplies VECTORS of these, and sums stay in registers over a chunk. Both
// sides are widened to fp32 on the way. One Zen 3 core, K 2048, GFLOP/s of this and of dot products (linear.h), whose sums and
// operands are more than the registers of AVX2: fp32 8 rows 31, 36; 12 rows 46, 35; 64 rows 66, 38; 128 rows 75, 40; bf16 16 rows
// 49, 60; 32 rows 62, 58; 128 rows 69, 55.
#pragma once
#include <algorithm>
#include "plan.h"

namespace accelc {

#if defined(__AVX2__) && !defined(__AVX512F__)
#define PANELS 1  // with the 32 registers of AVX-512 dot products do not spill, and without AVX2 turning takes too long

// r[i][j] and r[j][i] change places
inline void transpose(vf (&r)[W]) {
  __m256 pairs[W], fours[W];
  for (int i = 0; i < W; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
  for (int i = 0; i < W; i += 4)
    for (int j = 0; j < 2; j++) {
      fours[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
      fours[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    r[i] = (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

template <class T> inline vf load_some(const T* p, int64_t n) {  // zeros beyond n
  if (n >= W) return load(p);
  vf v{};
  for (int64_t i = 0; i < n; i++) v[i] = load1(p + i);
  return v;
}

// to[column * apart + i] = from[i][column] for i < count; a further row is the last one again. Writes whole vectors, in order:
// what does not belong there is overwritten by the next column, but for that of the last.
template <class T>
inline void turn(const T* from, int64_t ld, int64_t count, int64_t columns, int64_t apart, float* to) {
  for (int64_t j = 0; j < columns; j += W) {
    vf block[W];
    for (int64_t i = 0; i < W; i++) block[i] = load_some(from + std::min(i, count - 1) * ld + j, columns - j);
    transpose(block);
    for (int64_t i = 0; i < W; i++) store(to + (j + i) * apart, block[i]);
  }
}

struct Panels {
  static constexpr int VECTORS = 2, NR = VECTORS * W;             // weight rows of a panel
  static constexpr int LEAST = 3, MOST = 6;                       // rows of x in a tile: their sums fit in registers
  static constexpr int64_t CHUNK = 256, TOGETHER = 512;           // columns at a time; rows of x that are turned at a time

  int64_t rows, height, all;  // rows of x; of a tile; of all tiles
  float *panel, *sums, *x;    // [CHUNK][NR]; [all][NR]; [chunks][tiles][columns][height]

  Panels(int64_t rows, float* memory) : rows(rows), panel(memory), sums(panel + CHUNK * NR) {
    const int64_t tiles = (rows + MOST - 1) / MOST;  // of equal height, as far as that goes
    height = std::max<int64_t>(LEAST, (rows + tiles - 1) / tiles);
    all = (rows + height - 1) / height * height;
    x = sums + all * NR;
  }
  static int64_t scratch(int64_t rows, int64_t columns) {
    return (std::min(rows, TOGETHER) + MOST) * (padded(columns) + NR) + CHUNK * NR + W;
  }

  template <class T> void take(const T* from, int64_t ld, int64_t k_size) const {  // rows of x
    float* to = x;
    for (int64_t k = 0; k < k_size; k += CHUNK) {
      const int64_t columns = std::min(CHUNK, k_size - k);
      for (int64_t m = 0; m < rows; m += height, to += height * padded(columns))
        turn(from + m * ld + k, ld, std::min(height, rows - m), columns, height, to);
    }
  }

  // sums[ROWS][NR] += a tile of x times the panel
  template <int ROWS> static void multiply(const float* x, const float* w, int64_t columns, float* sums) {
    vf acc[ROWS][VECTORS];
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++) acc[i][v] = load(sums + i * NR + v * W);
    for (int64_t k = 0; k < columns; k++, x += ROWS, w += NR) {
      vf column[VECTORS];
      for (int v = 0; v < VECTORS; v++) column[v] = load(w + v * W);
      for (int i = 0; i < ROWS; i++)
        for (int v = 0; v < VECTORS; v++) acc[i][v] += x[i] * column[v];
    }
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++) store(sums + i * NR + v * W, acc[i][v]);
  }
  template <int ROWS = LEAST> void tile(const float* x, int64_t columns, float* sums) const {
    if constexpr (ROWS < MOST)
      if (height > ROWS) return tile<ROWS + 1>(x, columns, sums);
    multiply<ROWS>(x, panel, columns, sums);
  }

  // Into `sums`: all rows of x, times `count` rows of weights, at most NR
  template <class T> void times(const T* w, int64_t ld, int64_t count, int64_t k_size) const {
    std::fill(sums, sums + all * NR, 0.f);
    const float* from = x;
    for (int64_t k = 0; k < k_size; k += CHUNK) {
      const int64_t columns = std::min(CHUNK, k_size - k), wide = padded(columns);
      for (int v = 0; v < VECTORS; v++) {
        const int64_t first = std::min<int64_t>(v * W, count - 1);
        turn(w + first * ld + k, ld, std::min<int64_t>(W, count - first), columns, NR, panel + v * W);
      }
      for (int64_t m = 0; m < all; m += height, from += height * wide) tile(from, wide, sums + m * NR);
    }
  }
};
#endif

}  // namespace accelc
