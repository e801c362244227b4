// Element-wise arithmetic on positions, masks and conditions: up to three operands of any dtype, computed in int64 where
// all are integers, else in fp64 (exact for every operand). Values of layers go through `pointwise`, which is faster.
#pragma once
#include <algorithm>
#include <cmath>
#include "plan.h"
#include "rows.h"

namespace accelc {

enum Map : int64_t { M_FIRST, M_ADD, M_SUB, M_MUL, M_FLOOR_DIVIDE, M_REMAINDER, M_LT, M_LE, M_GT, M_GE, M_EQ, M_NE, M_AND, M_OR,
                     M_XOR, M_WHERE, M_CLAMP };

template <class T> void pull(const Team& team, const Tensor& t, int64_t at, int64_t n, T* into) {
  int64_t stride = t.stride[t.ndim - 1];
  const void* p = element(team.at<void>(t), t.dtype, at);
  if (t.dtype == I64) for (int64_t i = 0; i < n; i++) into[i] = T(((const int64_t*)p)[i * stride]);
  else if (t.dtype == BOOL) for (int64_t i = 0; i < n; i++) into[i] = T(((const uint8_t*)p)[i * stride]);
  else with_dtype(t.dtype, [&](auto tag) { for (int64_t i = 0; i < n; i++) into[i] = T(load1((const decltype(tag)*)p + i * stride)); });
}
template <class T> void push(const T* from, const Team& team, const Tensor& t, int64_t at, int64_t n) {
  int64_t stride = t.stride[t.ndim - 1];
  void* p = element(team.at<void>(t), t.dtype, at);
  if (t.dtype == I64) for (int64_t i = 0; i < n; i++) ((int64_t*)p)[i * stride] = int64_t(from[i]);
  else if (t.dtype == BOOL) for (int64_t i = 0; i < n; i++) ((uint8_t*)p)[i * stride] = from[i] != 0;
  else with_dtype(t.dtype, [&](auto tag) { for (int64_t i = 0; i < n; i++) store1((decltype(tag)*)p + i * stride, float(from[i])); });
}

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
inline double floor_divide(double a, double b) { return std::floor(a / b); }

template <class T> void calculate(int64_t op, T* a, const T* b, const T* c, int64_t n) {
  auto each = [&](auto f) { for (int64_t i = 0; i < n; i++) a[i] = T(f(a[i], b[i])); };
  switch (op) {
    case M_ADD: each([](T x, T y) { return x + y; }); break;
    case M_SUB: each([](T x, T y) { return x - y; }); break;
    case M_MUL: each([](T x, T y) { return x * y; }); break;
    case M_FLOOR_DIVIDE: each([](T x, T y) { return floor_divide(x, y); }); break;
    case M_REMAINDER: each([](T x, T y) { return x - y * floor_divide(x, y); }); break;
    case M_LT: each([](T x, T y) { return x < y; }); break;
    case M_LE: each([](T x, T y) { return x <= y; }); break;
    case M_GT: each([](T x, T y) { return x > y; }); break;
    case M_GE: each([](T x, T y) { return x >= y; }); break;
    case M_EQ: each([](T x, T y) { return x == y; }); break;
    case M_NE: each([](T x, T y) { return x != y; }); break;
    case M_AND: each([](T x, T y) { return int64_t(x) & int64_t(y); }); break;
    case M_OR: each([](T x, T y) { return int64_t(x) | int64_t(y); }); break;
    case M_XOR: each([](T x, T y) { return int64_t(x) ^ int64_t(y); }); break;
    case M_WHERE: for (int64_t i = 0; i < n; i++) a[i] = a[i] != 0 ? b[i] : c[i]; break;
    case M_CLAMP: for (int64_t i = 0; i < n; i++) a[i] = a[i] < b[i] ? b[i] : a[i] > c[i] ? c[i] : a[i]; break;
  }
}

template <class T> void map_as(const Instruction& ins, Team& team, T number_b, T number_c) {
  constexpr int64_t PART = 256;
  const Tensor &a = ins.t(0), &b = ins.t(1), &c = ins.t(2), &out = ins.t(3);
  Rows rows(out, 1);
  int last = out.ndim - 1;
  int64_t n = out.size[last], parts = (n + PART - 1) / PART;
  T u[PART], v[PART], w[PART];
  std::fill(v, v + PART, number_b);
  std::fill(w, w + PART, number_c);
  each_row(team, rows.count * parts, std::min(n, PART), [&](int64_t item) {
    int64_t row = item / parts, from = item % parts * PART, count = std::min(PART, n - from);
    pull(team, a, rows.offset(a, row) + from * a.stride[last], count, u);
    if (b) pull(team, b, rows.offset(b, row) + from * b.stride[last], count, v);
    if (c) pull(team, c, rows.offset(c, row) + from * c.stride[last], count, w);
    calculate(ins.ints[0], u, v, w, count);
    push(u, team, out, rows.offset(out, row) + from * out.stride[last], count);
  });
}

// tensors: a, b?, c?, out (operands broadcast by zero strides); ints: op, integers (or fp64), numbers in place of b and c;
// floats: the same numbers
inline void map(const Instruction& ins, Team& team) {
  if (ins.ints[1]) map_as<int64_t>(ins, team, ins.ints[2], ins.ints[3]);
  else map_as<double>(ins, team, ins.floats[0], ins.floats[1]);
}

}  // namespace accelc
