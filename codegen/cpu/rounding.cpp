// Rounding a weight to few bits, as accelc/ir/rounding.py specifies it: for each group of a row the range that loses least.
#include <omp.h>
#include <algorithm>
#include <vector>
#include "plan.h"

namespace accelc {

struct Rounding {
  const void* weight;
  int32_t dtype;
  int64_t rows, columns, padded, group;  // group: columns that share a scale
  int bits;
  bool symmetric;
  int32_t scale_dtype;
  const double* shrink;
  int64_t tries;            // 0: keep the whole range
  const float* importance;  // of each column | none
  uint8_t* codes;           // [blocks, padded * bits / 32, 64]
  void *scales, *zeros;     // [blocks, groups, 16]

  int64_t groups() const { return padded / group; }
  float middle() const { return float(1 << (bits - 1)); }
  float highest() const { return float((1 << bits) - 1); }

  float stored(float v) const {  // as a scale or zero is kept
    with_dtype(scale_dtype, [&](auto tag) {
      decltype(tag) kept;
      store1(&kept, v);
      v = load1(&kept);
    });
    return v;
  }
  // A kept scale is not nearer to zero than it was: of 256 codes half a step would be cut off.
  float away_from_zero(float v) const {
    float kept = stored(v);
    if (std::fabs(kept) >= std::fabs(v) || kept != kept) return kept;
    if (scale_dtype == F32) return std::nextafter(kept, std::copysign(INFINITY, v));
    uint16_t word = 0;  // 16-bit floats of one sign order as integers do
    float next = kept;
    with_dtype(scale_dtype, [&](auto tag) {
      if constexpr (!std::is_same<decltype(tag), float>::value) {
        decltype(tag) value;
        store1(&value, kept);
        word = value.bits;
        if (!(word & 0x7fff)) word = std::signbit(v) ? 0x8000 : 0;
        value.bits = uint16_t(word + 1);
        next = load1(&value);
      }
    });
    return next;
  }

  struct Fit { float scale, zero; };
  // Codes of n values: clamped to the nearest, halves to even.
  vf code(vf w, float inverse, float zero) const {
    vf t = w * inverse + zero;
    t = vmin(vmax(t, splat(0.f)), splat(highest()));
    return (t + 12582912.f) - 12582912.f;
  }
  static float inverse(float scale) { return scale == 0 ? 0.f : 1.f / scale; }

  double error(const float* w, const float* count, Fit fit) const {
    vf total = splat(0);
    const float inv = inverse(fit.scale);
    for (int64_t i = 0; i < group; i += W) {
      vf d = (code(load(w + i), inv, fit.zero) - fit.zero) * fit.scale - load(w + i);
      total += count ? d * d * load(count + i) : d * d;
    }
    return sum(total);
  }
  static double sum(vf v) {
    double total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
  }
  // Scale and zero of least squared error for the codes that `from` gives.
  Fit refit(const float* w, const float* count, Fit from) const {
    const float inv = inverse(from.scale), mid = symmetric ? from.zero : middle();
    vf q1 = splat(0), w1 = q1, qq = q1, qw = q1, c1 = q1;
    for (int64_t i = 0; i < group; i += W) {
      vf x = load(w + i), q = code(x, inv, from.zero) - mid, c = count ? load(count + i) : splat(1);
      vf cq = c * q;
      qq += cq * q;
      qw += cq * x;
      if (symmetric) continue;
      q1 += cq;
      w1 += c * x;
      c1 += c;
    }
    double square = sum(qq), mixed = sum(qw);
    if (symmetric) return {square > 0 ? float(mixed / std::max(square, 1e-30)) : from.scale, from.zero};
    double n = std::max(sum(c1), 1e-30), mean_q = sum(q1) / n, mean_w = sum(w1) / n;
    square -= n * mean_q * mean_q;
    double slope = (mixed - n * mean_q * mean_w) / std::max(square, 1e-30);
    if (!(square > 1e-6) || slope == 0) return from;
    return {float(slope), float(mid + mean_q - mean_w / slope)};
  }
  Fit full_range(const float* w) const {
    vf least = splat(0), most = least;
    for (int64_t i = 0; i < group; i += W) {
      least = vmin(least, load(w + i));
      most = vmax(most, load(w + i));
    }
    float low = -hmax(-least), high = hmax(most);
    if (!symmetric) {
      float scale = (high - low) / highest();
      return {scale, scale > 0 ? std::nearbyint(-low / scale) : 0.f};
    }
    // The side with one code more belongs to the larger extreme: the scale has its sign turned for that.
    bool negative = -low >= high;
    float extreme = negative ? low : high, other = negative ? high : -low;
    float scale = std::max(std::fabs(extreme) / middle(), other / (middle() - 1));
    return {negative ? scale : -scale, middle()};
  }
  Fit best(const float* w, const float* count) const {
    Fit full = full_range(w), found{};
    double least = INFINITY;
    auto consider = [&](Fit fit) {
      double e = error(w, count, fit);
      if (e < least || least == INFINITY) least = e, found = fit;
    };
    auto kept = [&](float zero) { return symmetric ? zero : stored(zero); };
    if (tries == 0) return {away_from_zero(full.scale), kept(full.zero)};
    if (bits == 8) consider({away_from_zero(full.scale), kept(full.zero)});
    for (int64_t t = 0; t < tries; t++) {
      Fit fit = refit(w, count, {full.scale * float(shrink[t]), full.zero});
      consider({stored(fit.scale), kept(fit.zero)});
    }
    return found;
  }

  void block(int64_t b, float* values, uint8_t* row) const {  // values [padded], row [padded]
    uint8_t* to = codes + b * padded * bits / 32 * 64;
    const int64_t lines = padded * bits / 32;
    for (int64_t lane = 0; lane < LANES; lane++) {
      const int64_t n = b * LANES + lane;
      if (n >= rows) {
        for (int64_t l = 0; l < lines; l++) std::memset(to + l * 64 + lane * 4, 0, 4);
        for (int64_t g = 0; g < groups(); g++) put(b, g, lane, {0, 0});
        continue;
      }
      widen(element(weight, dtype, n * columns), dtype, values, columns);
      std::fill(values + columns, values + padded, 0.f);
      for (int64_t g = 0; g < groups(); g++) {
        const float* w = values + g * group;
        Fit fit = best(w, importance ? importance + g * group : nullptr);
        put(b, g, lane, fit);
        const float inv = inverse(fit.scale);
        for (int64_t i = 0; i < group; i += W) {
          vf q = code(load(w + i), inv, fit.zero);
          for (int l = 0; l < W; l++) row[g * group + i + l] = uint8_t(q[l]);
        }
      }
      for (int64_t l = 0; l < lines; l++) {
        const uint8_t* q = row + l * 32 / bits;
        for (int j = 0; j < 4; j++) to[l * 64 + lane * 4 + j] = bits == 8 ? q[j] : uint8_t(q[j] | q[j + 4] << 4);
      }
    }
  }
  void put(int64_t b, int64_t g, int64_t lane, Fit fit) const {
    const int64_t at = (b * groups() + g) * LANES + lane;
    narrow(&fit.scale, (void*)element(scales, scale_dtype, at), scale_dtype, 1);
    if (!symmetric) narrow(&fit.zero, (void*)element(zeros, scale_dtype, at), scale_dtype, 1);
  }
};

}  // namespace accelc

extern "C" {

// Rounds a matrix [rows, columns]; see Rounding. importance: `padded` values, or null. group: a multiple of 32.
void accelc_round(const void* weight, int32_t dtype, int64_t rows, int64_t columns, int64_t padded, int64_t group, int32_t bits,
                  int32_t symmetric, int32_t scale_dtype, const double* shrink, int64_t tries, const float* importance,
                  uint8_t* codes, void* scales, void* zeros, int32_t threads) {
  using namespace accelc;
  const Rounding op{weight, dtype, rows, columns, padded, group, bits, symmetric != 0, scale_dtype, shrink, tries, importance,
                    codes, scales, zeros};
  const int64_t blocks = (rows + LANES - 1) / LANES;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> values(padded);
    std::vector<uint8_t> row(padded);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; b++) op.block(b, values.data(), row.data());
  }
}
}
