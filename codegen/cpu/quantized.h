// quantized linear: y[m, n] = sum_k x[m, k] (code[n, k] - zero[n, g]) scale[n, g] + bias[n], for few rows m.
//
// The activations are rounded to fixed point, segment by segment of a row, and multiplied by the codes as integers
// (dot_codes.h): with 16 bits, more than bf16 keeps, or with 8, which loses. Sums of a segment are exact; they are scaled and
// added up in fp32. Weights are read once: all rows of x pass over a segment of 16 or 32 of their rows.
#pragma once
#include <algorithm>
#include "dot_codes.h"
#include "plan.h"

namespace accelc {

// Rows of x in fixed point: the words that go with some lines of codes lie beside each other for all rows. Of each segment of a
// row, its step (NaN where a value is not finite, so that it does not get lost) and the sum of its rounded values.
struct Fixed {
  static constexpr int64_t LONGEST = 256;  // columns of a segment
  int64_t k_size, k_padded, segment, segments, m_size, room;  // room: words of a row in a segment
  int32_t* words;     // [segments][lines][m][D::LINES * D::WORDS]
  float *step, *sum;  // [segments][m]

  static int64_t count(int64_t k_padded, int64_t segment) { return (k_padded + segment - 1) / segment; }
  Fixed(float* memory, int64_t m_size, int64_t k_size, int64_t k_padded, int64_t segment, int64_t room)
      : k_size(k_size), k_padded(k_padded), segment(segment), segments(count(k_padded, segment)), m_size(m_size), room(room),
        words((int32_t*)memory), step(memory + segments * m_size * room), sum(step + segments * m_size) {}

  int64_t columns(int64_t s) const { return std::min(segment, k_padded - s * segment); }

  template <class D, class T> void round(const T* x, int64_t m, int64_t s) const {
    const int64_t columns = this->columns(s), used = std::max<int64_t>(0, std::min(columns, k_size - s * segment));
    alignas(64) float values[LONGEST];
    alignas(64) int32_t rounded[LONGEST];
    int64_t i = 0;
    x += s * segment;
    for (; i + W <= used; i += W) store(values + i, load(x + i));
    for (; i < used; i++) values[i] = load1(x + i);
    for (; i < columns; i++) values[i] = 0;
    vi most = {};  // magnitudes order as integers do, infinities and NaN last
    for (i = 0; i < columns; i += W) {
      vi v = bits_as<vi>(load(values + i)) & 0x7fffffff;
      most = v > most ? v : most;
    }
    int32_t top = 0;
    for (int l = 0; l < W; l++) top = std::max(top, most[l]);
    const bool finite = top < 0x7f800000;
    const float largest = std::max(finite ? bits_as<float>(top) : 0.f, 1e-34f);  // below, its inverse would overflow
    const float inverse = D::RANGE / largest;
    vi total = {};
    for (i = 0; i < columns; i += W) {
      vi v = bits_as<vi>(load(values + i) * inverse + 12582912.f) - 0x4b400000;  // to the nearest, as in vexp
      total += v;
      std::memcpy(rounded + i, &v, sizeof(v));
    }
    int32_t all = 0;
    for (int l = 0; l < W; l++) all += total[l];
    constexpr int64_t WORDS = D::LINES * D::WORDS, COLUMNS = D::LINES * D::COLUMNS;
    int32_t* to = words + s * m_size * room + m * WORDS;
    for (i = 0; i < columns; i += COLUMNS, to += m_size * WORDS)
      for (int l = 0; l < D::LINES; l++) D::place(rounded + i + l * D::COLUMNS, to + l * D::WORDS);
    step[s * m_size + m] = finite ? largest / D::RANGE : NAN;
    sum[s * m_size + m] = float(all);
  }
};

template <class D> struct Quantized {
  static constexpr int LANES = 16, N = 2;  // rows of weights in a line; vectors of W rows that a tile takes
  static constexpr int64_t TOGETHER = 64, AHEAD = 4096;  // rows of x that are summed at once; bytes ahead to prefetch
  const Fixed& x;
  const uint8_t* codes;
  const void *scales, *zeros;
  int32_t scale_dtype;
  int64_t blocks, lines, groups;  // blocks of 16 rows, their lines of 64 bytes, their groups: each a segment, or one in all

  // out[M][N] += rows m .. m + M of x times `count` lines of codes, of segment s
  template <int M> void tile(const uint8_t* const* at, int64_t count, int64_t ahead, int64_t m, int64_t s, const vf* scale,
                             const vf* zero, vf* out) const {
    constexpr int WORDS = D::LINES * D::WORDS;
    const int32_t* words = x.words + s * x.m_size * x.room + m * WORDS;
    vi acc[M][N][D::SUMS] = {};
    for (int64_t l = 0; l < count; l += D::LINES, words += x.m_size * WORDS) {
      const uint8_t* line[N];
      UNROLL
      for (int n = 0; n < N; n++) {
        line[n] = at[n] + l * 64;
        if (n * W % LANES == 0)
          UNROLL
          for (int p = 0; p < D::LINES; p++) __builtin_prefetch(line[n] + p * 64 + ahead, 0, 2);
      }
      D::template add<M, N>(acc, line, words);
    }
    const float *step = x.step + s * x.m_size + m, *sum = x.sum + s * x.m_size + m;
    UNROLL
    for (int i = 0; i < M; i++)
      UNROLL
      for (int n = 0; n < N; n++)
        out[i * N + n] += (D::total(acc[i][n]) - zero[n] * sum[i]) * (scale[n] * step[i]);
  }

  // Where N vectors of rows of weights lie, from vector p on; beyond the last it is computed again.
  struct Place {
    const uint8_t* at[N];
    int64_t scale[N];
  };
  Place place(int64_t p) const {
    Place to;
    for (int n = 0; n < N; n++) {
      int64_t block = std::min((p + n) * W / LANES, blocks - 1), lane = (p + n) * W % LANES;
      to.at[n] = codes + block * lines * 64 + lane * 4;
      to.scale[n] = block * groups * LANES + lane;
    }
    return to;
  }
  void load_scales(const Place& from, vf* scale, vf* zero) const {
    with_dtype(scale_dtype, [&](auto tag) {
      for (int n = 0; n < N; n++) {
        scale[n] = load((const decltype(tag)*)scales + from.scale[n]);
        zero[n] = zeros ? load((const decltype(tag)*)zeros + from.scale[n]) : splat(D::COLUMNS == 8 ? 8 : 128);
      }
    });
  }
  // For each segment, while `from` moves along: f(segment, its lines, scales, zeros)
  template <class F> void segments(Place& from, F f) const {
    vf scale[N], zero[N];
    for (int64_t s = 0; s < x.segments; s++) {
      const int64_t count = x.columns(s) / D::COLUMNS;
      if (s == 0 || groups > 1) load_scales(from, scale, zero);
      f(s, count, scale, zero);
      for (int n = 0; n < N; n++) {
        from.at[n] += count * 64;
        from.scale[n] += LANES;
      }
    }
  }

  // out[M][N] = rows m .. m + M of x times N vectors of rows of weights, from vector p on
  template <int M> void few(int64_t p, int64_t m, vf* out) const {
    Place from = place(p);
    vf sums[M * N] = {};
    segments(from, [&](int64_t s, int64_t count, const vf* scale, const vf* zero) {
      tile<M>(from.at, count, AHEAD, m, s, scale, zero, sums);
    });
    std::copy(sums, sums + M * N, out);
  }
  // The same for more rows, which share segments of weights in the cache.
  void many(int64_t p, int64_t m, int64_t rows, vf* out) const {
    Place from = place(p);
    std::fill(out, out + rows * N, vf{});
    segments(from, [&](int64_t s, int64_t count, const vf* scale, const vf* zero) {
      int64_t i = 0, ahead = AHEAD;
      for (; i + D::ROWS <= rows; i += D::ROWS, ahead = 0)
        tile<D::ROWS>(from.at, count, ahead, m + i, s, scale, zero, out + i * N);
      if (D::ROWS > 4 && i + 4 <= rows) {
        tile<4>(from.at, count, ahead, m + i, s, scale, zero, out + i * N);
        i += 4, ahead = 0;
      }
      switch (rows - i) {
        case 3: return tile<3>(from.at, count, ahead, m + i, s, scale, zero, out + i * N);
        case 2: return tile<2>(from.at, count, ahead, m + i, s, scale, zero, out + i * N);
        case 1: return tile<1>(from.at, count, ahead, m + i, s, scale, zero, out + i * N);
      }
    });
  }
  void products(int64_t p, int64_t m, int64_t rows, vf* out) const {
    switch (rows) {
      case 1: return few<1>(p, m, out);
      case 2: return few<2>(p, m, out);
      case 3: return few<3>(p, m, out);
      case 4: return few<4>(p, m, out);
      default: return many(p, m, rows, out);
    }
  }
};

template <int BITS, int ACTIVATION> inline void quantized_linear_as(const Instruction& ins, Team& team) {
  using D = CodeDot<BITS, ACTIVATION>;
  using Q = Quantized<D>;
  const Tensor &x = ins.t(0), &codes = ins.t(1), &scales = ins.t(2), &zeros = ins.t(3), &bias = ins.t(4), &out = ins.t(5);
  const int64_t segment = ins.ints[1];
  const int64_t m_size = x.size[0], n_size = out.size[1], blocks = codes.size[0], lines = codes.size[1];
  Fixed fixed(team.at<float>(ins.t(6)), m_size, x.size[1], lines * D::COLUMNS, segment, segment / D::COLUMNS * D::WORDS);
  constexpr int64_t SOME = 16;  // segments that one thread rounds at a time
  int64_t parts = (fixed.segments + SOME - 1) / SOME;
  with_dtype(x.dtype, [&](auto tag) {
    auto* values = team.at<const decltype(tag)>(x);
    for (int64_t i; (i = team.next()) < m_size * parts;) {
      int64_t m = i / parts, first = i % parts * SOME;
      for (int64_t s = first; s < std::min(first + SOME, fixed.segments); s++)
        fixed.round<D>(values + m * x.stride[0], m, s);
    }
  });
  team.settle();
  Q op{fixed, team.at<const uint8_t>(codes), team.at<const void>(scales), zeros ? team.at<const void>(zeros) : nullptr,
       scales.dtype, blocks, lines, scales.size[1]};
  const int64_t vectors = blocks * Q::LANES / W;
  int64_t item = std::max<int64_t>(1, std::min(65536 / (lines * 64), blocks / (4 * team.size))) * Q::LANES / W;
  item = (item + Q::N - 1) / Q::N * Q::N;
  for (int64_t i; (i = team.next()) * item < vectors;)
    for (int64_t p = i * item, last = std::min(vectors, p + item); p < last; p += Q::N)
      for (int64_t m = 0; m < m_size; m += Q::TOGETHER) {
        const int64_t count = std::min(Q::TOGETHER, m_size - m);
        vf sums[Q::TOGETHER * Q::N];
        op.products(p, m, count, sums);
        const int64_t first = p * W, used = std::min<int64_t>(std::min<int64_t>(Q::N, last - p) * W, n_size - first);
        float more[Q::N * W];
        if (bias) widen(element(team.at<const void>(bias), bias.dtype, first), bias.dtype, more, used);
        for (int64_t r = 0; r < count; r++) {
          float row[Q::N * W];
          std::memcpy(row, &sums[r * Q::N], sizeof(row));
          if (bias)
            for (int64_t j = 0; j < used; j++) row[j] += more[j];
          narrow(row, element(team.at<void>(out), out.dtype, (m + r) * out.stride[0] + first), out.dtype, used);
        }
      }
}

// tensors: x [M, K], codes [P, lines, 64], scales [P, G, 16], zeros | none, bias [N] | none, out [M, N], for the rows of x in
// fixed point; ints: bits, columns of a segment (a group's, unless a row is one), bits of an activation
inline void quantized_linear(const Instruction& ins, Team& team) {
  const bool four = ins.ints[0] == 4, lossy = ins.ints[2] == 8;
  if (four) return lossy ? quantized_linear_as<4, 8>(ins, team) : quantized_linear_as<4, 16>(ins, team);
  return lossy ? quantized_linear_as<8, 8>(ins, team) : quantized_linear_as<8, 16>(ins, team);
}

}  // namespace accelc
