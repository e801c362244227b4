// attention over a cache: reads the valid slots only, online softmax in fp32 (Milakov and Gimelshein 2018), grouped query heads
// share one pass over their key head. With few (row, head) pairs the slots are split as well and merged at the end.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include "plan.h"

namespace accelc {

enum Mask : int64_t { CAUSAL = 0, WINDOW = 1, CHUNK = 2 };

constexpr int TILE = 16;    // query rows that share a pass over keys
constexpr int BLOCK = 64;   // keys between two rescalings
constexpr int SPLITS = 16;  // most pieces that the slots of one tile are split into

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// tensors: query, key, value, positions, lengths, tree?, bias?, sinks?, slopes?, out, partial [tiles, SPLITS, TILE, Dv + 2] | none
struct Attention {
  const Instruction& ins;
  Team& team;
  const Tensor &q, &k, &v, &out;
  int64_t heads, kv_heads, group, fresh, slots, dim, dim_v, mask, window;
  float scale, softcap;
  const int64_t *positions, *lengths;

  Attention(const Instruction& i, Team& t)
      : ins(i), team(t), q(i.t(0)), k(i.t(1)), v(i.t(2)), out(i.t(9)), heads(q.size[1]), kv_heads(k.size[1]),
        group(heads / kv_heads), fresh(q.size[2]), slots(k.size[2]), dim(q.size[3]), dim_v(v.size[3]), mask(i.ints[0]),
        window(i.ints[1]), scale(float(i.floats[0])), softcap(float(i.floats[1])), positions(t.at<int64_t>(i.t(3))),
        lengths(t.at<int64_t>(i.t(4))) {}

  int64_t position(int64_t b, int64_t i) const { return positions[b * ins.t(3).stride[0] + i * ins.t(3).stride[1]]; }
  int64_t length(int64_t b) const { return lengths[b * ins.t(4).stride[0]]; }
  bool ancestor(int64_t b, int64_t i, int64_t j) const {  // is new token j visible to new token i?
    const Tensor& tree = ins.t(5);
    if (!tree) return j <= i;
    auto words = team.at<int64_t>(tree);
    return words[b * tree.stride[0] + i * tree.stride[1] + (j / 64) * tree.stride[2]] >> (j % 64) & 1;
  }
  bool allowed(int64_t at_query, int64_t at_key) const {
    if (mask == WINDOW) return at_query - at_key < window;
    if (mask == CHUNK) return floor_div(at_query, window) == floor_div(at_key, window);
    return true;
  }

  // The tile's rows are (token i, head g of the group), tokens outermost; row r of tile t is t * TILE + r.
  struct Tile { int64_t b, kv, first, rows; };
  int64_t tiles_per_head() const { return (group * fresh + TILE - 1) / TILE; }
  int64_t tiles() const { return q.size[0] * kv_heads * tiles_per_head(); }
  Tile tile(int64_t index) const {
    int64_t per = tiles_per_head(), first = index % per * TILE;
    index /= per;
    return {index / kv_heads, index % kv_heads, first, std::min<int64_t>(TILE, group * fresh - first)};
  }
  // Slots that any row of the tile may see.
  void reach(const Tile& t, int64_t& begin, int64_t& end) const {
    int64_t first = t.first / group, last = (t.first + t.rows - 1) / group, len = length(t.b);
    end = std::min(slots, len + (ins.t(5) ? fresh : last + 1));
    begin = 0;
    if (mask == CAUSAL) return;
    int64_t lowest = position(t.b, first);
    for (int64_t i = first; i <= last; i++) lowest = std::min(lowest, position(t.b, i));
    int64_t visible = mask == WINDOW ? lowest - window + 1 : floor_div(lowest, window) * window;
    begin = std::max<int64_t>(0, std::min(visible, len));  // a committed slot's position is its index
  }

  // Thread scratch: queries, scores, sums, all fp32.
  static int64_t scratch(const Instruction& i) {
    return TILE * (padded(i.t(0).size[3]) + BLOCK + padded(i.t(2).size[3]) + 4);
  }

  // Calls f with R = 1 to 4 rows at a time, as a compile-time constant: a tile of one row costs one row's work.
  template <class F> static void by_rows(int64_t rows, F f) {
    for (int64_t r = 0; r < rows; r += 4) switch (rows - r) {
      case 1: f(r, std::integral_constant<int, 1>{}); break;
      case 2: f(r, std::integral_constant<int, 2>{}); break;
      case 3: f(r, std::integral_constant<int, 3>{}); break;
      default: f(r, std::integral_constant<int, 4>{});
    }
  }

  // scores[r][j] = q_r . k_j for R rows; 4 keys at a time fill the registers, and their sums come out side by side.
  template <class T, int R> void dots(const float* qs, const T* keys, int64_t count, float* scores) const {
    int64_t ldq = padded(dim), step = k.stride[2], whole = dim / W * W;
    for (int64_t j = 0; j < count; j += 4) {
      const T* key[4];
      for (int n = 0; n < 4; n++) key[n] = keys + std::min(j + n, count - 1) * step;  // past the end: the last again
      vf acc[R][4] = {};
      for (int64_t x = 0; x < whole; x += W) {
        vf kv[4];
        for (int n = 0; n < 4; n++) kv[n] = load(key[n] + x);
        for (int r = 0; r < R; r++)
          for (int n = 0; n < 4; n++) acc[r][n] += load(qs + r * ldq + x) * kv[n];
      }
      for (int r = 0; r < R; r++) {
        v4 sum = hsum4(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
        for (int64_t x = whole; x < dim; x++)
          sum += v4{load1(key[0] + x), load1(key[1] + x), load1(key[2] + x), load1(key[3] + x)} * qs[r * ldq + x];
        std::memcpy(scores + r * BLOCK + j, &sum, sizeof(sum));
      }
    }
  }

  // sums[r][x] += sum_j scores[r][j] v_j[x] for R rows and X vectors of lanes
  template <class T, int R, int X> void mix_lanes(const float* scores, const T* values, int64_t count, float* sums) const {
    int64_t ld = padded(dim_v), step = v.stride[2];
    vf acc[R][X];
    for (int r = 0; r < R; r++)
      for (int x = 0; x < X; x++) acc[r][x] = load(sums + r * ld + x * W);
    for (int64_t j = 0; j < count; j++) {
      vf val[X];
      for (int x = 0; x < X; x++) val[x] = load(values + j * step + x * W);
      for (int r = 0; r < R; r++)
        for (int x = 0; x < X; x++) acc[r][x] += scores[r * BLOCK + j] * val[x];
    }
    for (int r = 0; r < R; r++)
      for (int x = 0; x < X; x++) store(sums + r * ld + x * W, acc[r][x]);
  }
  template <class T, int R> void mix(const float* scores, const T* values, int64_t count, float* sums) const {
    int64_t ld = padded(dim_v), step = v.stride[2], x = 0;
    for (; x + 4 * W <= dim_v; x += 4 * W) mix_lanes<T, R, 4>(scores, values + x, count, sums + x);
    for (; x + W <= dim_v; x += W) mix_lanes<T, R, 1>(scores, values + x, count, sums + x);
    for (; x < dim_v; x++)
      for (int r = 0; r < R; r++)
        for (int64_t j = 0; j < count; j++) sums[r * ld + x] += scores[r * BLOCK + j] * load1(values + j * step + x);
  }

  // Bias, softcap, slopes and visibility of one row over slots [slot, slot + count); hidden ones become -inf.
  void finish(const Tile& t, int64_t row, int64_t slot, int64_t count, float* s) const {
    int64_t at = t.first + row, i = at / group, h = t.kv * group + at % group, len = length(t.b), pos = position(t.b, i);
    for (int64_t j = 0; j < count; j++) s[j] *= scale;
    if (softcap > 0)
      for (int64_t j = 0; j < count; j += W) store(s + j, vtanh(load(s + j) / softcap) * softcap);
    if (const Tensor& slopes = ins.t(8)) {
      float slope;
      widen(element(team.at<void>(slopes), slopes.dtype, h * slopes.stride[0]), slopes.dtype, &slope, 1);
      for (int64_t j = 0; j < count; j++) {
        int64_t key = slot + j < len ? slot + j : position(t.b, std::min(slot + j - len, fresh - 1));
        s[j] += slope * float(key - pos);
      }
    }
    if (const Tensor& bias = ins.t(6)) {
      int64_t from = t.b * bias.stride[0] + h * bias.stride[1] + i * bias.stride[2];
      for (int64_t j = 0; j < count; j++) {
        const void* p = element(team.at<void>(bias), bias.dtype, from + (slot + j) * bias.stride[3]);
        float value = 0;
        if (bias.dtype == BOOL) value = *(const bool*)p ? 0.f : -INFINITY;
        else widen(p, bias.dtype, &value, 1);
        s[j] += value;
      }
    }
    // Committed slots are all visible to a causal mask; only families, and the new tokens' own slots, need a look each.
    for (int64_t j = mask == CAUSAL ? std::max<int64_t>(0, len - slot) : 0; j < count; j++) {
      int64_t fresh_index = slot + j - len;
      bool see = fresh_index < 0 || (fresh_index < fresh && ancestor(t.b, i, fresh_index));
      if (see) see = allowed(pos, fresh_index < 0 ? slot + j : position(t.b, fresh_index));
      if (!see) s[j] = -INFINITY;
    }
  }

  // Ask for all of a block's rows at once: they are too short for the processor to see streams in time.
  template <class T> static void bring(const T* rows, int64_t step, int64_t width, int64_t count) {
    for (int64_t j = 0; j < count; j++)
      for (int64_t b = 0; b < width * int64_t(sizeof(T)); b += 64) __builtin_prefetch((const char*)(rows + j * step) + b, 0, 2);
  }

  template <class T> void run_tile(const Tile& t, int64_t begin, int64_t end, float* partial) {
    float* qs = team.scratch;
    float* scores = qs + TILE * padded(dim);
    float* sums = scores + TILE * BLOCK;
    float* top = sums + TILE * padded(dim_v);
    float* denominator = top + TILE;
    int64_t ld = padded(dim_v);
    std::fill(sums, sums + t.rows * ld, 0.f);
    std::fill(top, top + TILE, -INFINITY);
    std::fill(denominator, denominator + TILE, 0.f);
    for (int64_t r = 0; r < t.rows; r++) {
      int64_t at = t.first + r, h = t.kv * group + at % group;
      int64_t from = t.b * q.stride[0] + h * q.stride[1] + at / group * q.stride[2];
      widen(element(team.at<void>(q), q.dtype, from), q.dtype, qs + r * padded(dim), dim);
    }
    const T* keys = team.at<T>(k) + t.b * k.stride[0] + t.kv * k.stride[1];
    const T* values = team.at<T>(v) + t.b * v.stride[0] + t.kv * v.stride[1];
    for (int64_t slot = begin; slot < end; slot += BLOCK) {
      int64_t count = std::min<int64_t>(BLOCK, end - slot);
      bring(keys + slot * k.stride[2], k.stride[2], dim, count);
      bring(values + slot * v.stride[2], v.stride[2], dim_v, count);
      by_rows(t.rows, [&](int64_t r, auto n) {
        dots<T, n()>(qs + r * padded(dim), keys + slot * k.stride[2], count, scores + r * BLOCK);
      });
      for (int64_t r = 0; r < t.rows; r++) {
        float* s = scores + r * BLOCK;
        std::fill(s + count, s + BLOCK, -INFINITY);
        finish(t, r, slot, count, s);
        std::fill(s + count, s + BLOCK, -INFINITY);
        vf m = load(s);
        for (int j = W; j < BLOCK; j += W) m = vmax(m, load(s + j));
        float high = std::max(top[r], hmax(m));
        if (high == -INFINITY) {
          std::fill(s, s + BLOCK, 0.f);
          continue;
        }
        float shrink = std::exp(top[r] - high);
        vf total = splat(0);
        for (int j = 0; j < BLOCK; j += W) {
          vf p = vexp(load(s + j) - high);
          total += p;
          store(s + j, p);
        }
        denominator[r] = denominator[r] * shrink + hsum(total);
        if (shrink != 1.f)
          for (int64_t x = 0; x < ld; x += W) store(sums + r * ld + x, load(sums + r * ld + x) * shrink);
        top[r] = high;
      }
      by_rows(t.rows, [&](int64_t r, auto n) {
        mix<T, n()>(scores + r * BLOCK, values + slot * v.stride[2], count, sums + r * ld);
      });
    }
    for (int64_t r = 0; r < t.rows; r++) {
      if (partial) {
        float* p = partial + r * (dim_v + 2);
        std::copy(sums + r * ld, sums + r * ld + dim_v, p + 2);
        p[0] = top[r];
        p[1] = denominator[r];
      } else {
        write(t, r, sums + r * ld, top[r], denominator[r]);
      }
    }
  }

  void write(const Tile& t, int64_t r, float* sum, float top, float denominator) const {
    int64_t at = t.first + r, h = t.kv * group + at % group;
    float factor = 1.f / denominator;  // a row that sees nothing gives NaN, as softmax does
    if (const Tensor& sinks = ins.t(7)) {
      float sink;
      widen(element(team.at<void>(sinks), sinks.dtype, h * sinks.stride[0]), sinks.dtype, &sink, 1);
      float high = std::max(top, sink), shrink = std::exp(top - high);
      factor = shrink / (denominator * shrink + std::exp(sink - high));
    }
    for (int64_t x = 0; x < dim_v; x++) sum[x] *= factor;
    int64_t to = t.b * out.stride[0] + h * out.stride[1] + at / group * out.stride[2];
    narrow(sum, element(team.at<void>(out), out.dtype, to), out.dtype, dim_v);
  }

  void run() {
    int64_t count = tiles(), pieces = 1;
    const Tensor& partial = ins.t(10);
    if (partial) {  // few tiles: split long contexts, so that every thread has work and they end together
      int64_t longest = 0;
      for (int64_t b = 0; b < q.size[0]; b++) longest = std::max(longest, length(b) + fresh);
      pieces = std::max<int64_t>(1, std::min<int64_t>({SPLITS, longest / 256, (4 * team.size + count - 1) / count}));
    }
    int64_t stride = TILE * (dim_v + 2);
    float* parts = pieces > 1 ? team.at<float>(partial) : nullptr;
    for (int64_t item; (item = team.next()) < count * pieces;) {
      Tile t = tile(item / pieces);
      int64_t begin, end, piece = item % pieces;
      reach(t, begin, end);
      int64_t share = ((end - begin + pieces - 1) / pieces + BLOCK - 1) / BLOCK * BLOCK;
      int64_t from = begin + piece * share, to = std::min(end, from + share);
      float* into = parts ? parts + (item / pieces * SPLITS + piece) * stride : nullptr;
      with_dtype(k.dtype, [&](auto tag) { run_tile<decltype(tag)>(t, from, to, into); });
    }
    if (!parts) return;
    team.settle();
    for (int64_t row; (row = team.next()) < count * TILE;) merge(row / TILE, row % TILE, pieces, parts);
  }

  void merge(int64_t index, int64_t r, int64_t pieces, float* parts) const {
    Tile t = tile(index);
    if (r >= t.rows) return;
    auto part = [&](int64_t p) { return parts + ((index * SPLITS + p) * TILE + r) * (dim_v + 2); };
    float top = -INFINITY, denominator = 0;
    for (int64_t p = 0; p < pieces; p++) top = std::max(top, part(p)[0]);
    float* sum = team.scratch;
    std::fill(sum, sum + dim_v, 0.f);
    for (int64_t p = 0; p < pieces; p++) {
      if (part(p)[0] == -INFINITY) continue;
      float weight = std::exp(part(p)[0] - top);
      denominator += part(p)[1] * weight;
      for (int64_t x = 0; x < dim_v; x++) sum[x] += part(p)[2 + x] * weight;
    }
    write(t, r, sum, top, denominator);
  }
};

inline void attention(const Instruction& ins, Team& team) { Attention(ins, team).run(); }

}  // namespace accelc
