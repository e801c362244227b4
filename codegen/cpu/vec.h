// SIMD in plain C++: GCC vector extensions, so that one source serves AVX-512, AVX2, SSE2 and others; the compiler's target
// flags decide. Only conversions and dot products that the extensions do not reach use intrinsics, each with a plain twin.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace accelc {

#if defined(__AVX512F__)
constexpr int W = 16;  // fp32 lanes of a vector
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From> inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  std::memcpy(&out, &v, sizeof(out));
  return out;
}

inline vf splat(float v) { return vf{} + v; }
inline vf select(vi mask, vf a, vf b) { return bits_as<vf>((mask & bits_as<vi>(a)) | (~mask & bits_as<vi>(b))); }
inline vf vmax(vf a, vf b) { return select(a > b, a, b); }
inline vf vmin(vf a, vf b) { return select(a < b, a, b); }

// -- loads and stores: memory in T, arithmetic in fp32 ---------------------------------------------------------------

inline float load1(const float* p) { return *p; }
inline float load1(const bf16* p) { return bits_as<float>(uint32_t(p->bits) << 16); }
inline void store1(float* p, float v) { *p = v; }
inline void store1(bf16* p, float v) {  // round to nearest even; NaN stays NaN
  uint32_t u = bits_as<uint32_t>(v);
  p->bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof(v)); return v; }
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
// 16-bit integers to and from 32 bits. (The compiler's conversion of whole vectors takes them in halves on AVX2.)
inline vu widen16(const void* p) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vh h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, vu);
#endif
}
inline void narrow16(void* p, vu v) {  // of values below 2^16
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32((__m256i)v, (__m256i)v), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
#else
  vh h = __builtin_convertvector(v, vh);
  std::memcpy(p, &h, sizeof(h));
#endif
}
inline vf load(const bf16* p) { return bits_as<vf>(widen16(p) << 16); }
inline void store(bf16* p, vf v) {
  vu u = bits_as<vu>(v);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  vu nan = bits_as<vu>(vi(v != v));
  narrow16(p, (rounded & ~nan) | (nan & 0x7fc0));
}
#if defined(__F16C__)
inline float load1(const f16* p) { return _cvtsh_ss(p->bits); }
inline void store1(f16* p, float v) { p->bits = _cvtss_sh(v, 0); }
#else
inline float load1(const f16* p) {
  uint32_t sign = uint32_t(p->bits & 0x8000) << 16, rest = p->bits & 0x7fff;
  if (rest >= 0x7c00) return bits_as<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  float v = bits_as<float>(rest << 13) * 0x1p112f;  // rebias the exponent; exact for subnormals too
  return bits_as<float>(bits_as<uint32_t>(v) | sign);
}
inline void store1(f16* p, float v) {
  uint32_t u = bits_as<uint32_t>(v), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
  uint32_t h;
  if (rest > 0x7f800000) h = 0x7e00;
  else if (rest >= 0x477ff000) h = 0x7c00;
  else if (rest < 0x38800000) h = uint32_t(std::nearbyint(bits_as<float>(rest) * 0x1p24f));  // subnormal
  else h = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  p->bits = uint16_t(sign | h);
}
#endif
#if defined(__AVX512F__)
inline vf load(const f16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store(f16* p, vf v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
#elif defined(__F16C__) && defined(__AVX__)
inline vf load(const f16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(f16* p, vf v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, 0)); }
#else
inline vf load(const f16* p) { vf v; for (int i = 0; i < W; i++) v[i] = load1(p + i); return v; }
inline void store(f16* p, vf v) { for (int i = 0; i < W; i++) store1(p + i, v[i]); }
#endif

// -- sums over lanes ---------------------------------------------------------------------------------------------------

typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i4 __attribute__((vector_size(16)));

inline v4 quarter(v8 v) {
  v4 parts[2];
  std::memcpy(parts, &v, sizeof(v));
  return parts[0] + parts[1];
}
inline v4 fold(vf v) {  // sum the lanes down to four
#if defined(__AVX512F__)
  return quarter((v8)_mm512_castps512_ps256((__m512)v) +
                 (v8)_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
#else
  return quarter(v);
#endif
}
inline float hsum(vf v) {
  v4 q = fold(v);
  return (q[0] + q[2]) + (q[1] + q[3]);
}
inline v4 hsum4(vf a, vf b, vf c, vf d) {  // lane sums of four vectors at once
  v4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  v4 pq = __builtin_shuffle(p, q, i4{0, 4, 1, 5}) + __builtin_shuffle(p, q, i4{2, 6, 3, 7});  // p02 q02 p13 q13
  v4 rs = __builtin_shuffle(r, s, i4{0, 4, 1, 5}) + __builtin_shuffle(r, s, i4{2, 6, 3, 7});
  return __builtin_shuffle(pq, rs, i4{0, 1, 4, 5}) + __builtin_shuffle(pq, rs, i4{2, 3, 6, 7});
}
inline float hmax(vf v) {
  v4 parts[sizeof(vf) / sizeof(v4)];
  std::memcpy(parts, &v, sizeof(v));
  v4 m = parts[0];
  for (v4 part : parts) m = part > m ? part : m;
  v4 swapped = __builtin_shuffle(m, i4{2, 3, 0, 1});
  m = swapped > m ? swapped : m;
  return m[1] > m[0] ? m[1] : m[0];
}

// -- transcendental functions, to about 2 units in the last place -----------------------------------------------------------

inline vf vexp(vf x) {  // Cephes expf: 2^n * p(r), r in +-ln2/2; underflows to 0, overflows to inf
  const vf top = splat(88.72283f), low = splat(-87.33654f);
  vi over = x > top, under = x < low, nan = x != x;
  vf y = vmax(vmin(x, top), low);
  vf t = y * 1.44269504f + 12582912.f;  // round to nearest by the 1.5 * 2^23 trick
  vi n = bits_as<vi>(t) - 0x4b400000;
  vf nf = t - 12582912.f;
  vf r = y - nf * 0.693359375f + nf * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // 2^128 has no encoding: split the scale in two factors.
  vi half = n >> 1;
  p = p * bits_as<vf>((half + 127) << 23) * bits_as<vf>((n - half + 127) << 23);
  p = select(over, splat(INFINITY), select(under, splat(0.f), p));
  return select(nan, x, p);
}
inline vf vsigmoid(vf x) { return 1.f / (1.f + vexp(-x)); }
inline vf vtanh(vf x) {  // rational approximation, as in Eigen's generic_fast_tanh_float
  vf c = vmax(vmin(x, splat(7.90531110763549805f)), splat(-7.90531110763549805f)), s = c * c;
  vf p = splat(-2.76076847742355e-16f);
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  vf q = splat(1.19825839466702e-06f);
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return select(x != x, x, c * p / q);
}
inline vf verf(vf x) {  // rational approximation on [-4, 4], as in Eigen's generic_fast_erf_float
  vf c = vmax(vmin(x, splat(4.f)), splat(-4.f)), s = c * c;
  vf p = splat(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return select(x != x, x, c * p / q);
}

}  // namespace accelc
