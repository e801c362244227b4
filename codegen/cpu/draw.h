// Sampling: one token of each row of scores, as accelc::draw_token says.
#pragma once
#include <cmath>
#include <functional>
#include <limits>
#include "select.h"

namespace accelc {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr int64_t FEW = 64;  // largest scores that are found by insertion

// How a row is drawn.
struct Wanted {
  bool greedy;
  float temperature;
  int64_t k;  // 0: all
  float p, least;
  double uniform;  // in [0, 1)
};

// Row-wise sums of exp(s - peak) over scores that are not below a cut; s is padded with -inf to whole vectors.
inline double mass(const float* s, int64_t n, float peak, float cut) {
  double total = 0;
  constexpr int64_t BLOCK = 16 * W;  // sums of few floats, in double from there on
  for (int64_t begin = 0; begin < n; begin += BLOCK) {
    vf sum = splat(0);
    for (int64_t i = begin; i < std::min(n, begin + BLOCK); i += W) {
      const vf x = load(s + i);
      sum += bits_as<vf>(bits_as<vi>(vexp(x - peak)) & vi(x >= cut));
    }
    total += hsum(sum);
  }
  return total;
}

struct Drawing {
  float *s, *sorted;  // n floats each, padded
  int64_t n;
  int64_t* places;    // FEW
  int64_t known = 0;  // of the largest scores, sorted

  // The largest `count` scores, sorted, the largest first.
  void sort(int64_t count) {
    if (count <= known) return;
    known = count;
    if (count <= FEW) {
      Best best{sorted, places, count};
      best.read(s, n);
      return;
    }
    std::copy(s, s + n, sorted);
    if (count < n) std::nth_element(sorted, sorted + count - 1, sorted + n, std::greater<float>());
    std::sort(sorted, sorted + count, std::greater<float>());
  }

  // The smallest score of the likeliest tokens that reach p.
  float nucleus(float p, float peak, float cut) {
    const double total = mass(s, n, peak, cut);
    double reached = 0;
    for (int64_t i = 0, count = std::min(FEW, n); i < n; i++) {
      if (i == count) count = std::min(n, 16 * count);
      sort(count);
      if (i > 0 && (reached / total >= p || sorted[i] < cut)) return sorted[i - 1];
      reached += std::exp(double(sorted[i]) - peak);
    }
    return cut;
  }

  int64_t token(const Wanted& wanted) {
    std::fill(s + n, s + padded(n), LOWEST);
    vf high = splat(LOWEST);
    vi strange{};
    for (int64_t i = 0; i < n; i += W) {
      const vf x = load(s + i);
      strange |= vi(x != x);
      high = x > high ? x : high;
    }
    float peak = hmax(high);
    if (any(strange) || !std::isfinite(peak)) return -1;
    if (wanted.greedy) return std::find(s, s + n, peak) - s;
    for (int64_t i = 0; i < n; i += W) store(s + i, load(s + i) / wanted.temperature);
    peak /= wanted.temperature;
    float cut = LOWEST;
    if (wanted.k > 0 && wanted.k < n) {
      sort(wanted.k);
      cut = sorted[wanted.k - 1];
    }
    if (wanted.p < 1) cut = std::max(cut, nucleus(wanted.p, peak, cut));
    for (int64_t i = 0; i < n; i += W) {
      const vf x = load(s + i), e = vexp(x - peak);
      store(s + i, bits_as<vf>(bits_as<vi>(e) & vi(x >= cut) & vi(e >= wanted.least)));
    }
    return invert(wanted.uniform);
  }

  // The place where the running sum of s first exceeds a share of the whole.
  int64_t invert(double uniform) const {
    constexpr int64_t BLOCK = 16 * W;
    auto block = [&](int64_t begin) {
      vf sum = splat(0);
      for (int64_t i = begin; i < std::min(n, begin + BLOCK); i += W) sum += load(s + i);
      return double(hsum(sum));
    };
    double total = 0, before = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) total += block(begin);
    const double target = uniform * total;
    int64_t last = 0;  // the last token with a probability so far: the one, where rounding leaves none
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      const double here = block(begin);
      if (here > 0 && before + here > target) {
        double sum = before;
        for (int64_t i = begin; i < std::min(n, begin + BLOCK); i++) {
          if (!(s[i] > 0)) continue;
          last = i;
          if ((sum += s[i]) > target) break;
        }
        return last;
      }
      if (here > 0)
        for (int64_t i = begin; i < std::min(n, begin + BLOCK); i++)
          if (s[i] > 0) last = i;
      before += here;
    }
    return last;
  }
};

// tensors: scores [..., V]; greedy (bool), temperature, k (int64), p, min_p, uniform (the bits of a double), out (int64) [...]
inline void draw(const Instruction& ins, Team& team) {
  const Tensor &scores = ins.t(0), &out = ins.t(7);
  Rows rows(out, 0);
  const int64_t n = scores.size[scores.ndim - 1];
  float* scratch = team.scratch;
  each_row(team, rows.count, n, [&](int64_t row) {
    widen(element(team.at<void>(scores), scores.dtype, rows.offset(scores, row)), scores.dtype, scratch, n);
    auto number = [&](int i) { return team.at<float>(ins.t(i))[rows.offset(ins.t(i), row)]; };
    const Wanted wanted{
        team.at<uint8_t>(ins.t(1))[rows.offset(ins.t(1), row)] != 0, number(2),
        team.at<int64_t>(ins.t(3))[rows.offset(ins.t(3), row)], number(4), number(5),
        team.at<double>(ins.t(6))[rows.offset(ins.t(6), row)]};
    Drawing drawing{scratch, scratch + padded(n), n, (int64_t*)(scratch + 2 * padded(n))};
    team.at<int64_t>(out)[rows.offset(out, row)] = drawing.token(wanted);
  });
}
inline int64_t draw_scratch(const Instruction& i) { return 2 * padded(i.t(0).size[i.t(0).ndim - 1]) + 2 * FEW; }

}  // namespace accelc
