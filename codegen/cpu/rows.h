// Row-wise instructions: norms, rotary embedding, element-wise arithmetic, gathers and cache writes. Values are widened to fp32
// in a thread's scratch, worked on, and narrowed once at the end.
#pragma once
#include <algorithm>
#include <cmath>
#include "plan.h"

namespace accelc {

constexpr int64_t PIECE = 1024;  // elements that one step works on

// Hands out rows in items of about `elements` each.
template <class F> void each_row(Team& team, int64_t rows, int64_t length, F f, int64_t elements = 4 * PIECE) {
  int64_t group = std::max<int64_t>(1, elements / std::max<int64_t>(1, length)), items = (rows + group - 1) / group;
  for (int64_t item; (item = team.next()) < items;)
    for (int64_t row = item * group, end = std::min(rows, row + group); row < end; row++) f(row);
}

// tensors: x [..., D], weight [D]?, bias [D]?, out [..., D]; ints: centre (layer norm) or not (RMS norm); floats: eps, weight offset
inline void norm(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &weight = ins.t(1), &bias = ins.t(2), &out = ins.t(3);
  Rows rows(x, 1);
  int64_t d = x.size[x.ndim - 1];
  float eps = float(ins.floats[0]), offset = float(ins.floats[1]);
  float *v = team.scratch, *w = v + padded(d), *b = w + padded(d);
  if (weight) widen(team.at<void>(weight), weight.dtype, w, d);
  if (bias) widen(team.at<void>(bias), bias.dtype, b, d);
  each_row(team, rows.count, d, [&](int64_t row) {
    std::fill(v + d / W * W, v + padded(d), 0.f);
    widen(element(team.at<void>(x), x.dtype, rows.offset(x, row)), x.dtype, v, d);
    if (ins.ints[0]) {
      vf sum = splat(0);
      for (int64_t i = 0; i < d; i += W) sum += load(v + i);
      float mean = hsum(sum) / float(d);
      for (int64_t i = 0; i < d; i++) v[i] -= mean;
    }
    vf square = splat(0);
    for (int64_t i = 0; i < d; i += W) square += load(v + i) * load(v + i);
    float factor = 1.f / std::sqrt(hsum(square) / float(d) + eps);
    for (int64_t i = 0; i < d; i++) v[i] *= factor;
    if (weight)
      for (int64_t i = 0; i < d; i++) v[i] *= w[i] + offset;
    if (bias)
      for (int64_t i = 0; i < d; i++) v[i] += b[i];
    narrow(v, element(team.at<void>(out), out.dtype, rows.offset(out, row)), out.dtype, d);
  });
}
inline int64_t norm_scratch(const Instruction& i) { return 3 * padded(i.t(0).size[i.t(0).ndim - 1]); }

// tensors: x [..., R], cos, sin (broadcast to x by zero strides), out; ints: interleaved
inline void rotary(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &cos = ins.t(1), &sin = ins.t(2), &out = ins.t(3);
  Rows rows(x, 1);
  int64_t r = x.size[x.ndim - 1], half = r / 2;
  float *v = team.scratch, *c = v + padded(r), *s = c + padded(r), *y = s + padded(r);
  each_row(team, rows.count, r, [&](int64_t row) {
    widen(element(team.at<void>(x), x.dtype, rows.offset(x, row)), x.dtype, v, r);
    widen(element(team.at<void>(cos), cos.dtype, rows.offset(cos, row)), cos.dtype, c, r);
    widen(element(team.at<void>(sin), sin.dtype, rows.offset(sin, row)), sin.dtype, s, r);
    if (ins.ints[0]) {
      for (int64_t i = 0; i < r; i += 2) {
        y[i] = v[i] * c[i] - v[i + 1] * s[i];
        y[i + 1] = v[i + 1] * c[i + 1] + v[i] * s[i + 1];
      }
    } else {
      for (int64_t i = 0; i < half; i++) y[i] = v[i] * c[i] - v[i + half] * s[i];
      for (int64_t i = half; i < r; i++) y[i] = v[i] * c[i] + v[i - half] * s[i];
    }
    narrow(y, element(team.at<void>(out), out.dtype, rows.offset(out, row)), out.dtype, r);
  });
}
inline int64_t rotary_scratch(const Instruction& i) { return 4 * padded(i.t(0).size[i.t(0).ndim - 1]); }

enum Unary : int64_t { KEEP, NEG, EXP, SILU, SIGMOID, TANH, GELU, GELU_TANH, RELU, RSQRT, SQUARE };
enum Binary : int64_t { FIRST, ADD, SUB, MUL, DIV, RSUB };

inline void apply(int64_t op, float* v, int64_t n) {
  auto each = [&](auto f) { for (int64_t i = 0; i < n; i += W) store(v + i, f(load(v + i))); };
  switch (op) {
    case NEG: each([](vf x) { return -x; }); break;
    case EXP: each([](vf x) { return vexp(x); }); break;
    case SILU: each([](vf x) { return x * vsigmoid(x); }); break;
    case SIGMOID: each([](vf x) { return vsigmoid(x); }); break;
    case TANH: each([](vf x) { return vtanh(x); }); break;
    case GELU: each([](vf x) { return x * .5f * (1.f + verf(x * 0.70710678f)); }); break;
    case GELU_TANH: each([](vf x) { return x * .5f * (1.f + vtanh(0.79788456f * (x + 0.044715f * x * x * x))); }); break;
    case RELU: each([](vf x) { return select(x < 0.f, splat(0.f), x); }); break;
    case RSQRT: for (int64_t i = 0; i < n; i++) v[i] = 1.f / std::sqrt(v[i]); break;
    case SQUARE: each([](vf x) { return x * x; }); break;
  }
}
inline void combine(int64_t op, float* a, const float* b, int64_t n) {
  auto each = [&](auto f) { for (int64_t i = 0; i < n; i += W) store(a + i, f(load(a + i), load(b + i))); };
  switch (op) {
    case ADD: each([](vf x, vf y) { return x + y; }); break;
    case SUB: each([](vf x, vf y) { return x - y; }); break;
    case RSUB: each([](vf x, vf y) { return y - x; }); break;
    case MUL: each([](vf x, vf y) { return x * y; }); break;
    case DIV: each([](vf x, vf y) { return x / y; }); break;
  }
}
inline void fetch(const Team& team, const Tensor& t, int64_t at, int64_t n, float* into) {
  int64_t stride = t.stride[t.ndim - 1];
  const void* p = element(team.at<void>(t), t.dtype, at);
  if (stride == 1) return widen(p, t.dtype, into, n);
  if (stride == 0) {
    widen(p, t.dtype, into, 1);
    return std::fill(into + 1, into + n, into[0]);
  }
  for (int64_t i = 0; i < n; i++) widen(element(p, t.dtype, i * stride), t.dtype, into + i, 1);
}

// out = binary(unary(a), alpha * b), b a tensor or a number. tensors: a, b?, out (a and b broadcast by zero strides);
// ints: unary, binary; floats: alpha, number
inline void pointwise(const Instruction& ins, Team& team) {
  const Tensor &a = ins.t(0), &b = ins.t(1), &out = ins.t(2);
  Rows rows(out, 1);
  int64_t n = out.size[out.ndim - 1], pieces = (n + PIECE - 1) / PIECE;
  float alpha = float(ins.floats[0]), number = float(ins.floats[1]);
  float *u = team.scratch, *v = u + PIECE;
  each_row(team, rows.count * pieces, std::min(n, PIECE), [&](int64_t item) {
    int64_t row = item / pieces, from = item % pieces * PIECE, count = std::min(PIECE, n - from);
    int last = out.ndim - 1;
    fetch(team, a, rows.offset(a, row) + from * a.stride[last], count, u);
    apply(ins.ints[0], u, count);
    if (ins.ints[1] != FIRST) {
      if (b) fetch(team, b, rows.offset(b, row) + from * b.stride[last], count, v);
      else std::fill(v, v + count, number);
      if (alpha != 1.f)
        for (int64_t i = 0; i < count; i++) v[i] *= alpha;
      combine(ins.ints[1], u, v, count);
    }
    int64_t to = rows.offset(out, row) + from * out.stride[last];
    if (out.stride[last] == 1) return narrow(u, element(team.at<void>(out), out.dtype, to), out.dtype, count);
    for (int64_t i = 0; i < count; i++)
      narrow(u + i, element(team.at<void>(out), out.dtype, to + i * out.stride[last]), out.dtype, 1);
  });
}
inline int64_t pointwise_scratch(const Instruction&) { return 2 * PIECE; }

// Copies without arithmetic, any dtype, any strides. tensors: from, to
inline void copy(const Instruction& ins, Team& team) {
  const Tensor &from = ins.t(0), &to = ins.t(1);
  Rows rows(to, 1);
  int64_t n = to.size[to.ndim - 1], f = from.stride[to.ndim - 1], t = to.stride[to.ndim - 1], bytes = ITEMSIZE[to.dtype];
  each_row(team, rows.count, n, [&](int64_t row) {
    auto src = (const char*)element(team.at<void>(from), from.dtype, rows.offset(from, row));
    auto dst = (char*)element(team.at<void>(to), to.dtype, rows.offset(to, row));
    if (f == 1 && t == 1) std::memcpy(dst, src, n * bytes);
    else for (int64_t i = 0; i < n; i++) std::memcpy(dst + i * t * bytes, src + i * f * bytes, bytes);
  });
}

// out[i] = table[index[i]], negative indices from the end. tensors: table [V, D], index [I] (int64), out [I, D]
inline void gather(const Instruction& ins, Team& team) {
  const Tensor &table = ins.t(0), &index = ins.t(1), &out = ins.t(2);
  int64_t bytes = table.size[1] * ITEMSIZE[table.dtype];
  each_row(team, index.size[0], table.size[1], [&](int64_t row) {
    int64_t at = team.at<int64_t>(index)[row * index.stride[0]];
    if (at < 0) at += table.size[0];
    if (at < 0 || at >= table.size[0]) return team.fail(1);
    std::memcpy(element(team.at<void>(out), out.dtype, row * out.stride[0]),
                element(team.at<void>(table), table.dtype, at * table.stride[0]), bytes);
  });
}

// Row i (axis dim) of batch row b goes to slot lengths[b] + i. tensors: cache, value, lengths; ints: dim
inline void cache_update(const Instruction& ins, Team& team) {
  const Tensor &cache = ins.t(0), &value = ins.t(1), &lengths = ins.t(2);
  int64_t dim = ins.ints[0], last = value.ndim - 1;
  bool unit = dim != last && cache.stride[last] == 1 && value.stride[last] == 1;
  Rows rows(value, unit ? 1 : 0);
  int64_t n = unit ? value.size[last] : 1, per_batch = rows.count / std::max<int64_t>(1, value.size[0]), below = 1;
  for (int64_t d = dim + 1; d < rows.ndim; d++) below *= value.size[d];
  each_row(team, rows.count, n, [&](int64_t row) {
    int64_t start = team.at<int64_t>(lengths)[row / per_batch * lengths.stride[0]];
    int64_t slot = start + row / below % value.size[dim];
    if (slot < 0 || slot >= cache.size[dim]) return team.fail(2);
    auto src = element(team.at<void>(value), value.dtype, rows.offset(value, row));
    auto dst = element(team.at<void>(cache), cache.dtype, rows.offset(cache, row) + start * cache.stride[dim]);
    if (cache.dtype == value.dtype) std::memcpy(dst, src, n * ITEMSIZE[cache.dtype]);
    else
      for (int64_t i = 0; i < n; i++) {
        float v;
        widen(element(src, value.dtype, i), value.dtype, &v, 1);
        narrow(&v, element(dst, cache.dtype, i), cache.dtype, 1);
      }
  });
}

}  // namespace accelc
