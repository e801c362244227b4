// Products of codes with activations in fixed point, by instruction set: all that quantized.h has to know of the processor.
//
// Weights lie as accelc/ir/quantized.py says: a line of 64 bytes holds a word of each of 16 rows, that is 32 / BITS columns. A
// kernel works on vectors of W rows, one a lane. `CodeDot<BITS, ACTIVATION>` says how activations of ACTIVATION bits lie, so that
// the kernel multiplies words of them, broadcast to all lanes, by codes that were taken apart once for all rows of x:
//
//   RANGE  the largest magnitude of an activation
//   WORDS  32-bit words of activations a line; `place` writes them
//   LINES  lines that `add` takes together
//   SUMS   vectors of sums that it adds products to; `total` joins them. Exact for 256 columns.
//   ROWS   rows of x that a kernel takes at once, as registers allow
#pragma once
#include "vec.h"

// Sums stay in registers only if the loops over them are gone before the compiler decides on that.
#define UNROLL _Pragma("GCC unroll 16")

namespace accelc {

#if defined(__AVX512VNNI__)
#define ACCELC_DOT4
inline vi dot4_add(vi acc, vi codes, vi x) { return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)codes, (__m512i)x); }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
#define ACCELC_DOT4
inline vi dot4_add(vi acc, vi codes, vi x) { return (vi)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)codes, (__m256i)x); }
#endif

// acc[lane] += the products of two pairs of signed 16-bit numbers
inline vi dot2_add(vi acc, vi a, vi b) {
#if defined(__AVX512BW__)
  return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX512F__)  // without products of 16-bit numbers
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#elif defined(__AVXVNNI__)
  return (vi)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  __m128i p[2], q[2];
  std::memcpy(p, &a, sizeof(p));
  std::memcpy(q, &b, sizeof(q));
  for (int h = 0; h < 2; h++) p[h] = _mm_madd_epi16(p[h], q[h]);
  vi sum;
  std::memcpy(&sum, p, sizeof(sum));
  return acc + sum;
#else
  return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The compiler would otherwise move products ahead of sums, which takes more registers than AVX2 has (1.1 to 1.3 times the time at 8 rows).
inline vi in_order(vi v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+x"(v));
#endif
  return v;
}

inline vi load_words(const uint8_t* p) { vi v; std::memcpy(&v, p, sizeof(v)); return v; }
inline vi broadcast(const int32_t* p) { int32_t v; std::memcpy(&v, p, sizeof(v)); return vi{} + v; }

// 16 bits: codes as 16-bit numbers, times pairs of activations.
template <int BITS> struct Pairs {
  static constexpr int RANGE = 32767, COLUMNS = 32 / BITS, WORDS = COLUMNS / 2, LINES = 1, SUMS = 1, ROWS = 4;

  static void place(const int32_t* x, int32_t* words) {  // the columns that `add` finds beside each other
    constexpr int FIRST[2][4] = {{0, 1}, {0, 4, 1, 5}};
    for (int j = 0; j < WORDS; j++) {
      int k = FIRST[BITS == 4][j];
      words[j] = int32_t(uint32_t(uint16_t(x[k])) | uint32_t(uint16_t(x[k + 2])) << 16);
    }
  }
  template <int M, int N> static void add(vi (*acc)[N][SUMS], const uint8_t* const* at, const int32_t* x) {
    typedef uint16_t pairs __attribute__((vector_size(W * 4)));
    pairs line[N];
    UNROLL
    for (int n = 0; n < N; n++) line[n] = bits_as<pairs>(load_words(at[n]));
    UNROLL
    for (int j = 0; j < WORDS; j++) {
      vi codes[N];
      UNROLL
      for (int n = 0; n < N; n++) {
        pairs v = line[n] >> (BITS * j);
        codes[n] = (vi)(j < WORDS - 1 ? v & uint16_t((1 << BITS) - 1) : v);
      }
      UNROLL
      for (int i = 0; i < M; i++) {
        vi a = broadcast(x + i * WORDS + j);
        UNROLL
        for (int n = 0; n < N; n++) acc[i][n][0] = in_order(dot2_add(acc[i][n][0], codes[n], a));
      }
    }
  }
  static vf total(const vi* acc) { return __builtin_convertvector(acc[0], vf); }
};

template <int BITS, int ACTIVATION> struct CodeDot : Pairs<BITS> {};

#if defined(ACCELC_DOT4)
// Four unsigned codes by four signed bytes at once; 16 bits are two such bytes, which are summed apart.
template <int BITS, int PLANES> struct Bytes {
  static constexpr int RANGE = PLANES == 2 ? 32512 : 127, COLUMNS = 32 / BITS, PARTS = COLUMNS / 4, WORDS = PLANES * PARTS,
                       LINES = 1, SUMS = PLANES, ROWS = PLANES == 2 ? 4 : 8;

  static void place(const int32_t* x, int32_t* words) {
    int8_t bytes[PLANES][COLUMNS];
    for (int k = 0; k < COLUMNS; k++) {
      int32_t high = PLANES == 2 ? (x[k] + 128) >> 8 : 0;
      bytes[0][k] = int8_t(x[k] - 256 * high);
      if (PLANES == 2) bytes[PLANES - 1][k] = int8_t(high);
    }
    std::memcpy(words, bytes, sizeof(bytes));
  }
  template <int M, int N> static void add(vi (*acc)[N][SUMS], const uint8_t* const* at, const int32_t* x) {
    vi codes[PARTS][N];
    UNROLL
    for (int n = 0; n < N; n++) {
      vi v = load_words(at[n]);
      codes[0][n] = BITS == 4 ? v & 0x0f0f0f0f : v;
      if (BITS == 4) codes[PARTS - 1][n] = (v >> 4) & 0x0f0f0f0f;
    }
    UNROLL
    for (int i = 0; i < M; i++)
      UNROLL
      for (int q = 0; q < PLANES; q++)
        UNROLL
        for (int j = 0; j < PARTS; j++) {
          vi a = broadcast(x + i * WORDS + q * PARTS + j);
          UNROLL
          for (int n = 0; n < N; n++) acc[i][n][q] = dot4_add(acc[i][n][q], codes[j][n], a);
        }
  }
  static vf total(const vi* acc) {
    vf t = __builtin_convertvector(acc[0], vf);
    return PLANES == 2 ? t + __builtin_convertvector(acc[PLANES - 1], vf) * 256.f : t;
  }
};
template <int BITS> struct CodeDot<BITS, 8> : Bytes<BITS, 1> {};
#if defined(__AVX512F__)
template <int BITS> struct CodeDot<BITS, 16> : Bytes<BITS, 2> {};
#endif

#elif defined(__AVX2__) && !defined(__AVX512F__)
// Codes of 4 bits by signed bytes: eight times two products fit into 16 bits, 8 * 2 * 15 * 127 < 2^15. (Those of 8-bit codes
// do not, and taking them apart costs as much as 16-bit activations.)
template <> struct CodeDot<4, 8> {
  static constexpr int RANGE = 127, COLUMNS = 8, WORDS = 2, LINES = 4, SUMS = 1, ROWS = 4;

  static void place(const int32_t* x, int32_t* words) {
    int8_t bytes[COLUMNS];
    for (int k = 0; k < COLUMNS; k++) bytes[k] = int8_t(x[k]);
    std::memcpy(words, bytes, sizeof(bytes));
  }
  template <int M, int N> static void add(vi (*acc)[N][SUMS], const uint8_t* const* at, const int32_t* x) {
    vi sum[M][N] = {};
    UNROLL
    for (int j = 0; j < WORDS * LINES; j++) {
      vi codes[N];
      UNROLL
      for (int n = 0; n < N; n++) codes[n] = (load_words(at[n] + j / 2 * 64) >> (j % 2 * 4)) & 0x0f0f0f0f;
      UNROLL
      for (int i = 0; i < M; i++) {
        __m256i a = (__m256i)broadcast(x + i * LINES * WORDS + j);
        UNROLL
        for (int n = 0; n < N; n++)
          sum[i][n] = in_order((vi)_mm256_add_epi16((__m256i)sum[i][n], _mm256_maddubs_epi16((__m256i)codes[n], a)));
      }
    }
    UNROLL
    for (int i = 0; i < M; i++)
      UNROLL
      for (int n = 0; n < N; n++) acc[i][n][0] = in_order(dot2_add(acc[i][n][0], sum[i][n], vi{} + 0x00010001));
  }
  static vf total(const vi* acc) { return __builtin_convertvector(acc[0], vf); }
};
#endif

}  // namespace accelc
