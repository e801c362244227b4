// Matrix products of few rows whose matrix does not lie as `linear` wants it (rows of K): stored [K, N], as GPT-2's layers have
// it, or one matrix a batch element.
#pragma once
#include <algorithm>
#include "plan.h"
#include "rows.h"

namespace accelc {

// tensors: x [..., M, K], matrix [..., K, N] (unit stride along N or K), bias [N]?, out [..., M, N]; fp32 accumulation
struct Product {
  static constexpr int64_t ROWS = 4, COLUMNS = 1024;  // accumulators that fit in the first cache
  static int64_t scratch(const Instruction& i) { return ROWS * padded(i.t(0).size[i.t(0).ndim - 1]) + (ROWS + 1) * COLUMNS; }

  const Instruction& ins;
  Team& team;
  const Tensor &x = ins.t(0), &matrix = ins.t(1), &bias = ins.t(2), &out = ins.t(3);
  int d = out.ndim - 1;
  int64_t m = out.size[d - 1], n = out.size[d], k = x.size[d], step = padded(k);
  float *rows = team.scratch, *sums = rows + ROWS * step;

  // Sums over K, four rows of the matrix at a time: long contiguous reads, which one block of columns at a time would not give.
  template <class T> void along_n(const T* from, int64_t count, int64_t width) {
    int64_t stride = matrix.stride[d - 1];
    for (int64_t i = 0; i < count; i++) std::fill(sums + i * COLUMNS, sums + i * COLUMNS + width, 0.f);
    int64_t kk = 0, whole = width / W * W;
    for (; kk + 4 <= k; kk += 4) {
      const T *a = from + kk * stride, *b = a + stride, *c = b + stride, *e = c + stride;
      for (int64_t i = 0; i < count; i++) {
        const float* f = rows + i * step + kk;
        float* s = sums + i * COLUMNS;
        vf f0 = splat(f[0]), f1 = splat(f[1]), f2 = splat(f[2]), f3 = splat(f[3]);
        for (int64_t j = 0; j < whole; j += W)
          store(s + j, load(s + j) + f0 * load(a + j) + f1 * load(b + j) + f2 * load(c + j) + f3 * load(e + j));
        for (int64_t j = whole; j < width; j++)
          s[j] += f[0] * load1(a + j) + f[1] * load1(b + j) + f[2] * load1(c + j) + f[3] * load1(e + j);
      }
    }
    for (; kk < k; kk++)
      for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < width; j++) sums[i * COLUMNS + j] += rows[i * step + kk] * load1(from + kk * stride + j);
  }

  template <class T> void along_k(const T* from, int64_t count, int64_t width) {
    int64_t whole = k / W * W;
    for (int64_t j = 0; j < width; j++) {
      const T* column = from + j * matrix.stride[d];
      for (int64_t i = 0; i < count; i++) {
        vf sum = splat(0);
        for (int64_t kk = 0; kk < whole; kk += W) sum += load(rows + i * step + kk) * load(column + kk);
        float total = hsum(sum);
        for (int64_t kk = whole; kk < k; kk++) total += rows[i * step + kk] * load1(column + kk);
        sums[i * COLUMNS + j] = total;
      }
    }
  }

  void run() {
    Rows batch(out, 2);
    int64_t width = std::min(COLUMNS, std::max<int64_t>(64, padded((n + 2 * team.size - 1) / (2 * team.size))));
    int64_t across = (n + width - 1) / width, down = (m + ROWS - 1) / ROWS;
    for (int64_t item; (item = team.next()) < batch.count * across * down;) {
      int64_t z = item / (across * down), m0 = item / across % down * ROWS, n0 = item % across * width;
      int64_t count = std::min(ROWS, m - m0), columns = std::min(width, n - n0);
      for (int64_t i = 0; i < count; i++)
        fetch(team, x, batch.offset(x, z) + (m0 + i) * x.stride[d - 1], k, rows + i * step);
      with_dtype(matrix.dtype, [&](auto tag) {
        auto from = team.at<decltype(tag)>(matrix) + batch.offset(matrix, z) + n0 * matrix.stride[d];
        if (matrix.stride[d] == 1) along_n(from, count, columns);
        else along_k(from, count, columns);
      });
      for (int64_t i = 0; i < count; i++) {
        float* s = sums + i * COLUMNS;
        if (bias) {
          float* b = sums + ROWS * COLUMNS;
          fetch(team, bias, n0 * bias.stride[0], columns, b);
          for (int64_t j = 0; j < columns; j++) s[j] += b[j];
        }
        narrow(s, element(team.at<void>(out), out.dtype, batch.offset(out, z) + (m0 + i) * out.stride[d - 1] + n0), out.dtype, columns);
      }
    }
  }
};
inline void product(const Instruction& ins, Team& team) { Product{ins, team}.run(); }

// tensors: x [..., K], out [..., K], any strides: softmax over the last dim
inline void softmax(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &out = ins.t(1);
  Rows rows(out, 1);
  int64_t n = out.size[out.ndim - 1], stride = out.stride[out.ndim - 1];
  float* v = team.scratch;
  each_row(team, rows.count, n, [&](int64_t row) {
    fetch(team, x, rows.offset(x, row), n, v);
    float most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < n; i++) most = std::max(most, v[i]);
    for (int64_t i = 0; i < n; i++) sum += v[i] = std::exp(v[i] - most);  // a row of -inf alone gives NaN, as torch's does
    for (int64_t i = 0; i < n; i++) v[i] /= sum;
    void* to = element(team.at<void>(out), out.dtype, rows.offset(out, row));
    if (stride == 1) return narrow(v, to, out.dtype, n);
    for (int64_t i = 0; i < n; i++) narrow(v + i, element(to, out.dtype, i * stride), out.dtype, 1);
  });
}
inline int64_t softmax_scratch(const Instruction& i) { return padded(i.t(0).size[i.t(0).ndim - 1]); }

}  // namespace accelc
