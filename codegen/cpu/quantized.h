// quantized linear: y[m, n] = sum_k x[m, k] (code[n, k] - zero[n, g]) scale[n, g] + bias[n], for few rows m.
//
// Weights lie as accelc/ir/quantized.py says: 16 rows interleaved, one a lane, four codes (or eight of 4 bits) a word. The
// activations are rounded to fixed point, segment by segment of a row, and multiplied as integers, four products a lane and
// instruction: with two signed bytes (PLANES = 2) they keep 16 bits, more than bf16 does; with one (PLANES = 1) 8, which loses.
// Sums of a segment are exact; they are scaled and added up in fp32.
#pragma once
#include <algorithm>
#include "plan.h"

namespace accelc {

constexpr int LANES = 16;
typedef int32_t i16l __attribute__((vector_size(LANES * 4)));
typedef float f16l __attribute__((vector_size(LANES * 4)));

// acc[lane] += sum_j codes[lane][j] * x[j]: four unsigned by four signed bytes, in `codes` a lane and in `x` for all.
inline i16l dot4(i16l acc, i16l codes, int32_t x) {
#if defined(__AVX512VNNI__)
  return (i16l)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
  // Bytes 0 and 2, and 1 and 3, as 16-bit numbers: exact for all codes, unlike maddubs.
  int32_t even = int32_t(uint32_t(uint16_t(int16_t(int8_t(x)))) | uint32_t(uint16_t(int16_t(int8_t(x >> 16)))) << 16);
  int32_t odd = int32_t(uint32_t(uint16_t(int16_t(int8_t(x >> 8)))) | uint32_t(uint16_t(int16_t(int8_t(x >> 24)))) << 16);
  i16l low = codes & 0x00ff00ff, high = (codes >> 8) & 0x00ff00ff;
  __m256i a[2], b[2], sum[2];
  std::memcpy(a, &low, sizeof(a));
  std::memcpy(b, &high, sizeof(b));
  for (int h = 0; h < 2; h++)
    sum[h] = _mm256_add_epi32(_mm256_madd_epi16(a[h], _mm256_set1_epi32(even)), _mm256_madd_epi16(b[h], _mm256_set1_epi32(odd)));
  i16l total;
  std::memcpy(&total, sum, sizeof(total));
  return acc + total;
#else
  for (int j = 0; j < 4; j++) acc += ((codes >> (8 * j)) & 0xff) * int32_t(int8_t(x >> (8 * j)));
  return acc;
#endif
}

inline i16l line(const uint8_t* p) { i16l v; std::memcpy(&v, p, sizeof(v)); return v; }

template <class T> inline f16l lanes_as(const T* p) {
  f16l v;
  for (int i = 0; i < LANES / W; i++) { vf part = load(p + i * W); std::memcpy((char*)&v + i * sizeof(part), &part, sizeof(part)); }
  return v;
}
inline f16l lanes(const void* p, int32_t dtype, int64_t i) {
  f16l v;
  with_dtype(dtype, [&](auto tag) { v = lanes_as((const decltype(tag)*)p + i); });
  return v;
}

// Rows of x in fixed point: PLANES bytes planes [m][plane][k_padded], and of each segment its step and its sum.
struct Fixed {
  int64_t k_size, k_padded, segment, segments;
  int planes;
  int8_t* bytes;
  float *step, *sum;  // [m][segments]; sum: of the rounded values, already times the step

  static int64_t floats(int64_t m_size, int64_t k_padded, int64_t segments, int planes) {
    return m_size * (2 * segments + planes * k_padded / 4);
  }
  Fixed(float* memory, int64_t m_size, int64_t k_size, int64_t k_padded, int64_t segment, int planes)
      : k_size(k_size), k_padded(k_padded), segment(segment), segments((k_padded + segment - 1) / segment), planes(planes),
        bytes((int8_t*)memory), step(memory + m_size * planes * k_padded / 4), sum(step + m_size * segments) {}

  int8_t* row(int64_t m, int plane) const { return bytes + (m * planes + plane) * k_padded; }
  template <class T> void round(const T* x, int64_t m, int64_t s) const {
    int64_t begin = s * segment, end = std::min(begin + segment, k_padded), used = std::min(end, k_size);
    float values[256];
    float most = 0;
    for (int64_t k = begin; k < end; k++) {
      float v = k < used ? load1(x + k) : 0.f;
      values[k - begin] = v;
      most = std::max(most, std::fabs(v));
    }
    // Not a number: it must not get lost on the way.
    const float range = planes == 2 ? 32512.f : 127.f;
    float inverse = most > 0 ? range / most : 0.f;
    int64_t total = 0;
    for (int64_t k = begin; k < end; k++) {
      int32_t v = int32_t(std::nearbyint(values[k - begin] * inverse));
      total += v;
      if (planes == 2) {
        int32_t high = (v + 128) >> 8;
        row(m, 0)[k] = int8_t(v - 256 * high);
        row(m, 1)[k] = int8_t(high);
      } else {
        row(m, 0)[k] = int8_t(v);
      }
    }
    float unit = most / range;
    bool finite = true;
    for (int64_t k = begin; k < used; k++) finite = finite && std::isfinite(values[k - begin]);
    step[m * segments + s] = finite ? unit : NAN;
    sum[m * segments + s] = finite ? float(total) * unit : NAN;
  }
};

struct Quantized {
  static constexpr int NB = 2, AHEAD = 4096;  // blocks of a tile; bytes ahead of the weights to prefetch
  const uint8_t* codes;
  const void *scales, *zeros;
  int32_t scale_dtype;
  int64_t blocks, lines, groups, group;  // blocks of 16 rows: their lines of 64 bytes, their groups, columns of a group
  int64_t m_size;
  int bits;
  Fixed x;

  // NB blocks of 16 rows of weights by MR rows of x, from block p and row m on: out[NB][MR]. Where there are fewer, the last is
  // computed again: fewer variants to compile.
  template <int BITS, int PLANES, int MR> void tile(int64_t p, int64_t m, f16l* out) const {
    const uint8_t* at[NB];
    int64_t block[NB], row[MR];
    for (int n = 0; n < NB; n++) {
      block[n] = std::min(p + n, blocks - 1);
      at[n] = codes + block[n] * lines * 64;
    }
    for (int i = 0; i < NB * MR; i++) out[i] = f16l{};
    const int8_t* rows[MR][PLANES];
    for (int i = 0; i < MR; i++) {
      row[i] = std::min(m + i, m_size - 1);
      for (int q = 0; q < PLANES; q++) rows[i][q] = x.row(row[i], q);
    }
    for (int64_t s = 0; s < x.segments; s++) {
      int64_t begin = s * x.segment, end = std::min(begin + x.segment, x.k_padded);
      i16l acc[NB][MR][PLANES] = {};
      for (int64_t k = begin; k < end; k += BITS == 4 ? 8 : 4) {
        i16l low[NB], high[NB];
        for (int n = 0; n < NB; n++, at[n - 1] += 64) {
          __builtin_prefetch(at[n] + AHEAD, 0, 2);
          i16l word = line(at[n]);
          low[n] = BITS == 4 ? word & 0x0f0f0f0f : word;
          if (BITS == 4) high[n] = (word >> 4) & 0x0f0f0f0f;
        }
        for (int i = 0; i < MR; i++)
          for (int q = 0; q < PLANES; q++) {
            int32_t a;
            std::memcpy(&a, rows[i][q] + k, 4);
            for (int n = 0; n < NB; n++) acc[n][i][q] = dot4(acc[n][i][q], low[n], a);
            if (BITS == 4) {
              std::memcpy(&a, rows[i][q] + k + 4, 4);
              for (int n = 0; n < NB; n++) acc[n][i][q] = dot4(acc[n][i][q], high[n], a);
            }
          }
      }
      for (int n = 0; n < NB; n++) {
        int64_t g = (block[n] * groups + begin / group) * LANES;
        f16l scale = lanes(scales, scale_dtype, g);
        f16l zero = zeros ? lanes(zeros, scale_dtype, g) : f16l{} + float(1 << (BITS - 1));
        for (int i = 0; i < MR; i++) {
          f16l t = __builtin_convertvector(acc[n][i][0], f16l);
          if (PLANES == 2) t += __builtin_convertvector(acc[n][i][1], f16l) * 256.f;
          t = t * x.step[row[i] * x.segments + s] - zero * x.sum[row[i] * x.segments + s];
          out[n * MR + i] += t * scale;
        }
      }
    }
  }
  template <int PLANES, int MR> void of_bits(int64_t p, int64_t m, f16l* out) const {
    return bits == 4 ? tile<4, PLANES, MR>(p, m, out) : tile<8, PLANES, MR>(p, m, out);
  }
  template <int MR> void of_planes(int64_t p, int64_t m, f16l* out) const {
    return x.planes == 2 ? of_bits<2, MR>(p, m, out) : of_bits<1, MR>(p, m, out);
  }
  // Rows of x that a tile takes: 16 sums leave half of the registers of AVX-512 to operands.
  int64_t most() const { return x.planes == 2 ? 4 : 8; }
  // Computes `count` rows; returns how far apart the results of two blocks are.
  int64_t rows(int64_t p, int64_t m, int64_t count, f16l* out) const {
    if (count == 1) return of_planes<1>(p, m, out), 1;
    if (count == 2) return of_planes<2>(p, m, out), 2;
    if (count <= 4) return of_planes<4>(p, m, out), 4;
    return of_bits<1, 8>(p, m, out), 8;
  }
};

// tensors: x [M, K], codes [P, lines, 64], scales [P, G, 16], zeros | none, bias [N] | none, out [M, N], for the rows of x in
// fixed point; ints: bits, columns of a group, columns of a segment, planes
inline void quantized_linear(const Instruction& ins, Team& team) {
  const Tensor &x = ins.t(0), &codes = ins.t(1), &scales = ins.t(2), &zeros = ins.t(3), &bias = ins.t(4), &out = ins.t(5);
  const int64_t bits = ins.ints[0], group = ins.ints[1], segment = ins.ints[2], planes = ins.ints[3];
  const int64_t m_size = x.size[0], k_size = x.size[1], n_size = out.size[1], blocks = codes.size[0], lines = codes.size[1];
  const int64_t k_padded = lines * 32 / bits;
  Fixed fixed(team.at<float>(ins.t(6)), m_size, k_size, k_padded, segment, int(planes));
  constexpr int64_t SOME = 16;  // segments that one thread rounds at a time
  int64_t parts = (fixed.segments + SOME - 1) / SOME;
  with_dtype(x.dtype, [&](auto tag) {
    auto* values = team.at<const decltype(tag)>(x);
    for (int64_t i; (i = team.next()) < m_size * parts;) {
      int64_t m = i / parts, first = i % parts * SOME;
      for (int64_t s = first; s < std::min(first + SOME, fixed.segments); s++) fixed.round(values + m * x.stride[0], m, s);
    }
  });
  team.settle();
  Quantized op{team.at<const uint8_t>(codes), team.at<const void>(scales), zeros ? team.at<const void>(zeros) : nullptr,
               scales.dtype, blocks, lines, scales.size[1], group, m_size, int(bits), fixed};
  constexpr int NB = Quantized::NB;
  int64_t item = std::max<int64_t>(1, std::min(65536 / (lines * 64), blocks / (4 * team.size)));
  item = (item + NB - 1) / NB * NB;
  const int64_t most = op.most();
  for (int64_t i; (i = team.next()) * item < blocks;)
    for (int64_t p = i * item, last = std::min(blocks, p + item); p < last; p += NB)
      for (int64_t m = 0; m < m_size; m += most) {
        int64_t count = std::min(most, m_size - m);
        f16l sums[8 * NB];
        int64_t apart = op.rows(p, m, count, sums);
        for (int64_t n = 0; n < std::min<int64_t>(NB, last - p); n++)
          for (int64_t r = 0; r < count; r++) {
            int64_t first = (p + n) * LANES, used = std::min<int64_t>(LANES, n_size - first);
            float row[LANES], more[LANES];
            std::memcpy(row, &sums[n * apart + r], sizeof(row));
            if (bias) {
              widen(element(team.at<const void>(bias), bias.dtype, first), bias.dtype, more, used);
              for (int64_t j = 0; j < used; j++) row[j] += more[j];
            }
            narrow(row, element(team.at<void>(out), out.dtype, (m + r) * out.stride[0] + first), out.dtype, used);
          }
      }
}

}  // namespace accelc
