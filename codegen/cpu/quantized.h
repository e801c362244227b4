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

// Weights by blocks of 16 rows. A thread's piece is read by several readers, each in a part of its own, as in linear.h.
template <class D> struct Quantized {
  static constexpr int V = LANES / W;                               // vectors of a block of rows
  static constexpr int N = V > 2 ? V : 2, BLOCKS = N / V;           // vectors and blocks that share what `D::add` loads of x
  static constexpr int64_t TOGETHER = 64;                           // rows of x that are summed at once
  // Bytes to prefetch ahead of one reader, and of several (measured on Zen 3: several without it read 0.8 to 0.9 as fast)
  static constexpr int64_t AHEAD_ONE = 4096, AHEAD_SEVERAL = 512;
  static constexpr int readers(int m) { return m == 1 ? 4 : 2; }    // blocks at once, as sums fit in registers
  static constexpr int groups(int m) { return readers(m) > BLOCKS && m < 3 ? readers(m) / BLOCKS : 1; }
  const Fixed& x;
  const uint8_t* codes;
  const void *scales, *zeros;
  int32_t scale_dtype;
  int64_t lines, scales_each;  // lines of 64 bytes of a block; its groups: each a segment, or one in all
  const void* bias;
  int32_t bias_dtype, out_dtype;
  void* out;
  int64_t n_size, ldo;

  // Where G times BLOCKS blocks lie; moves along.
  template <int G> struct Place {
    static constexpr int COUNT = G * BLOCKS;
    int64_t block[COUNT], scale[COUNT];
    const uint8_t* at[COUNT];
  };
  template <int G> Place<G> place(int64_t first, int64_t apart, int64_t last) const {
    Place<G> p;
    for (int j = 0; j < p.COUNT; j++) {
      p.block[j] = std::min(first + j * apart, last);  // beyond the last it is computed again
      p.at[j] = codes + p.block[j] * lines * 64;
      p.scale[j] = p.block[j] * scales_each * LANES;
    }
    return p;
  }

  // sums[M][G * N] += rows m .. m + M of x times `count` lines of codes, of segment s
  template <int M, int G> void tile(const Place<G>& from, int64_t count, int64_t ahead, int64_t m, int64_t s, const vf* scale,
                                    const vf* zero, vf* sums) const {
    constexpr int WORDS = D::LINES * D::WORDS;
    const int32_t* words = x.words + s * x.m_size * x.room + m * WORDS;
    vi acc[G][M][N][D::SUMS] = {};
    for (int64_t l = 0; l < count; l += D::LINES, words += x.m_size * WORDS)
      UNROLL
      for (int g = 0; g < G; g++) {
        const uint8_t* line[N];
        UNROLL
        for (int n = 0; n < N; n++) {
          line[n] = from.at[g * BLOCKS + n / V] + l * 64 + n % V * W * 4;
          if (ahead && n % V == 0)
            UNROLL
            for (int p = 0; p < D::LINES; p++) __builtin_prefetch(line[n] + p * 64 + ahead, 0, 3);
        }
        D::template add<M, N>(acc[g], line, words);
      }
    const float *step = x.step + s * x.m_size + m, *sum = x.sum + s * x.m_size + m;
    UNROLL
    for (int i = 0; i < M; i++)
      UNROLL
      for (int j = 0; j < G * N; j++)
        sums[i * G * N + j] += (D::total(acc[j / N][i][j % N]) - zero[j] * sum[i]) * (scale[j] * step[i]);
  }
  template <int G> void load_scales(const Place<G>& from, vf* scale, vf* zero) const {
    with_dtype(scale_dtype, [&](auto tag) {
      for (int j = 0; j < G * N; j++) {
        const int64_t at = from.scale[j / V] + j % V * W;
        scale[j] = load((const decltype(tag)*)scales + at);
        zero[j] = zeros ? load((const decltype(tag)*)zeros + at) : splat(D::COLUMNS == 8 ? 8 : 128);
      }
    });
  }
  // For each segment, while `from` moves along: f(segment, its lines, scales, zeros)
  template <int G, class F> void segments(Place<G>& from, F f) const {
    vf scale[G * N], zero[G * N];
    for (int64_t s = 0; s < x.segments; s++) {
      const int64_t count = x.columns(s) / D::COLUMNS;
      if (s == 0 || scales_each > 1) load_scales(from, scale, zero);
      f(s, count, scale, zero);
      for (int j = 0; j < from.COUNT; j++) {
        from.at[j] += count * 64;
        from.scale[j] += LANES;
      }
    }
  }

  // Rows m .. m + M of x times G groups of blocks
  template <int M, int G> void few(Place<G> from, int64_t m) const {
    vf sums[M * G * N] = {};
    const int64_t ahead = from.COUNT == 1 ? AHEAD_ONE : AHEAD_SEVERAL;
    const Place<G> first = from;
    segments(from, [&](int64_t s, int64_t count, const vf* scale, const vf* zero) {
      tile<M, G>(from, count, ahead, m, s, scale, zero, sums);
    });
    put(first, m, M, sums);
  }
  // The same for more rows, which share segments of weights in the cache
  void many(Place<1> from, int64_t m, int64_t rows) const {
    vf sums[TOGETHER * N];
    std::fill(sums, sums + rows * N, vf{});
    const Place<1> first = from;
    segments(from, [&](int64_t s, int64_t count, const vf* scale, const vf* zero) {
      int64_t i = 0, ahead = AHEAD_ONE;
      for (; i + D::ROWS <= rows; i += D::ROWS, ahead = 0)
        tile<D::ROWS, 1>(from, count, ahead, m + i, s, scale, zero, sums + i * N);
      if (D::ROWS > 4 && i + 4 <= rows) {
        tile<4, 1>(from, count, ahead, m + i, s, scale, zero, sums + i * N);
        i += 4, ahead = 0;
      }
      switch (rows - i) {
        case 3: return tile<3, 1>(from, count, ahead, m + i, s, scale, zero, sums + i * N);
        case 2: return tile<2, 1>(from, count, ahead, m + i, s, scale, zero, sums + i * N);
        case 1: return tile<1, 1>(from, count, ahead, m + i, s, scale, zero, sums + i * N);
      }
    });
    put(first, m, rows, sums);
  }
  template <int G> void put(const Place<G>& place, int64_t m, int64_t rows, const vf* sums) const {
    for (int j = 0; j < place.COUNT; j++) {
      const int64_t n = place.block[j] * LANES, used = std::min<int64_t>(LANES, n_size - n);
      float more[LANES] = {};
      if (bias) widen(element(bias, bias_dtype, n), bias_dtype, more, used);
      for (int64_t r = 0; r < rows; r++) {
        float row[LANES];
        std::memcpy(row, sums + r * G * N + j * V, sizeof(row));
        if (bias)
          for (int64_t i = 0; i < used; i++) row[i] += more[i];
        narrow(row, element(out, out_dtype, (m + r) * ldo + n), out_dtype, used);
      }
    }
  }
  template <int M> void pieces(int64_t begin, int64_t end, int64_t m) const {
    constexpr int G = groups(M), COUNT = G * BLOCKS;
    const int64_t apart = (end - begin) / COUNT;
    for (int64_t i = 0; i < apart; i++) few<M, G>(place<G>(begin + i, apart, end - 1), m);
    for (int64_t b = begin + apart * COUNT; b < end; b += BLOCKS) few<M, 1>(place<1>(b, 1, end - 1), m);
  }
  void range(int64_t begin, int64_t end) const {  // blocks of weights
    switch (x.m_size) {
      case 1: return pieces<1>(begin, end, 0);
      case 2: return pieces<2>(begin, end, 0);
      case 3: return pieces<3>(begin, end, 0);
      case 4: return pieces<4>(begin, end, 0);
    }
    for (int64_t b = begin; b < end; b += BLOCKS)
      for (int64_t m = 0; m < x.m_size; m += TOGETHER) many(place<1>(b, 1, end - 1), m, std::min(TOGETHER, x.m_size - m));
  }
};

template <int BITS, int ACTIVATION> inline void quantized_linear_as(const Instruction& ins, Team& team) {
  using D = CodeDot<BITS, ACTIVATION>;
  using Q = Quantized<D>;
  const Tensor &x = ins.t(0), &codes = ins.t(1), &scales = ins.t(2), &zeros = ins.t(3), &bias = ins.t(4), &out = ins.t(5);
  const int64_t segment = ins.ints[1];
  const int64_t m_size = x.size[0], lines = codes.size[1];
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
  const Q op{fixed, team.at<const uint8_t>(codes), team.at<const void>(scales), zeros ? team.at<const void>(zeros) : nullptr,
             scales.dtype, lines, scales.size[1], bias ? team.at<const void>(bias) : nullptr, bias.dtype, out.dtype,
             team.at<void>(out), out.size[1], out.stride[0]};
  Pieces pieces{codes.size[0], Q::readers(1), lines * 64, team.size};
  for (int64_t begin, end; pieces.take(team, begin, end);) op.range(begin, end);
}

// tensors: x [M, K], codes [P, lines, 64], scales [P, G, 16], zeros | none, bias [N] | none, out [M, N], for the rows of x in
// fixed point; ints: bits, columns of a segment (a group's, unless a row is one), bits of an activation
inline void quantized_linear(const Instruction& ins, Team& team) {
  const bool four = ins.ints[0] == 4, lossy = ins.ints[2] == 8;
  if (four) return lossy ? quantized_linear_as<4, 8>(ins, team) : quantized_linear_as<4, 16>(ins, team);
  return lossy ? quantized_linear_as<8, 8>(ins, team) : quantized_linear_as<8, 16>(ins, team);
}

}  // namespace accelc
