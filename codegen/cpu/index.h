// Look-ups by tensors of indices, and what a new token may see of a cache.
#pragma once
#include <algorithm>
#include <cstring>
#include "plan.h"
#include "rows.h"

namespace accelc {

// out[i] = base[i] at offset sum_k index_k[i] * step_k, negative indices from the end. All tensors have the shape of out, by zero
// strides. tensors: table, out, index... (int64); ints: (size, step in elements) of each index
inline void index(const Instruction& ins, Team& team) {
  const Tensor &table = ins.t(0), &out = ins.t(1);
  int count = int(ins.tensors.size()) - 2, last = out.ndim - 1;
  bool run = table.stride[last] == 1 && out.stride[last] == 1;  // whether the last dim is copied whole
  for (int k = 0; k < count; k++) run &= ins.t(2 + k).stride[last] == 0;
  Rows rows(out, run ? 1 : 0);
  int64_t bytes = ITEMSIZE[out.dtype], n = run ? out.size[last] : 1;
  each_row(team, rows.count, n, [&](int64_t row) {
    int64_t from = rows.offset(table, row);
    for (int k = 0; k < count; k++) {
      const Tensor& index = ins.t(2 + k);
      int64_t at = team.at<int64_t>(index)[rows.offset(index, row)], size = ins.ints[2 * k];
      if (at < 0) at += size;
      if (at < 0 || at >= size) return team.fail(1);
      from += at * ins.ints[2 * k + 1];
    }
    std::memcpy(element(team.at<void>(out), out.dtype, rows.offset(out, row)), element(team.at<void>(table), table.dtype, from), n * bytes);
  });
}

// A matrix in few bits (accelc/ir/quantized.py): codes [P, lines, 64], scales [P, G, 16], zeros?
template <int BITS> struct Codes {
  static constexpr int PER = 32 / BITS, SOME = 256;  // codes of a word; columns that are narrowed at a time
  const uint8_t* codes;
  const void *scales, *zeros;
  int32_t dtype;
  int64_t words, groups, group;
  Codes(const Team& team, const Tensor& c, const Tensor& s, const Tensor& z)
      : codes(team.at<const uint8_t>(c)), scales(team.at<const void>(s)), zeros(z ? team.at<const void>(z) : nullptr),
        dtype(s.dtype), words(c.size[1]), groups(s.size[1]), group(words * PER / groups) {}

  // Columns 0 to `columns` of one row as floats of type `type`.
  void row(int64_t row, int64_t columns, void* out, int32_t type) const {
    vu shift;
    for (int l = 0; l < W; l++) shift[l] = BITS == 8 ? l % 4 * 8 : l % 4 * 8 + l % 8 / 4 * 4;
    const int64_t part = row / LANES, lane = row % LANES;
    const uint8_t* own = codes + part * words * LANES * 4 + lane * 4;
    alignas(64) float values[SOME];
    for (int64_t begin = 0; begin < columns; begin += SOME) {
      const int64_t end = std::min(begin + SOME, columns);
      for (int64_t k = begin; k < end; k += W) {  // a group has a multiple of 32 columns, and codes are padded to whole groups
        const int64_t g = (part * groups + k / group) * LANES + lane;
        float scale, zero = float(1 << (BITS - 1));
        widen(element(scales, dtype, g), dtype, &scale, 1);
        if (zeros) widen(element(zeros, dtype, g), dtype, &zero, 1);
        vu bits;
        for (int l = 0; l < W; l += PER < W ? PER : W) {
          uint32_t word;
          std::memcpy(&word, own + (k + l) / PER * LANES * 4, sizeof(word));
          for (int i = l; i < l + PER && i < W; i++) bits[i] = word;
        }
        const uint32_t more = BITS == 4 ? k % PER / 4 * 4 : 0;  // where a vector is half a word
        const vi code = bits_as<vi>((bits >> (shift + more)) & ((1u << BITS) - 1));
        store(values + k - begin, (__builtin_convertvector(code, vf) - zero) * scale);
      }
      narrow(values, element(out, type, begin), type, end - begin);
    }
  }
};

// Rows of a table in few bits as floats. tensors: ids [R] (int64), codes, scales, zeros?, out [R, K]; ints: bits, rows of
// the table
template <int BITS> inline void quantized_embedding_as(const Instruction& ins, Team& team) {
  const Tensor &ids = ins.t(0), &out = ins.t(4);
  const Codes<BITS> table(team, ins.t(1), ins.t(2), ins.t(3));
  each_row(team, out.size[0], out.size[1], [&](int64_t row) {
    const int64_t id = team.at<int64_t>(ids)[row * ids.stride[0]];
    if (id < 0 || id >= ins.ints[1]) return team.fail(1);
    table.row(id, out.size[1], element(team.at<void>(out), out.dtype, row * out.stride[0]), out.dtype);
  });
}
inline void quantized_embedding(const Instruction& ins, Team& team) {
  return ins.ints[0] == 8 ? quantized_embedding_as<8>(ins, team) : quantized_embedding_as<4>(ins, team);
}

// A matrix in few bits as floats. tensors: codes, scales, zeros?, out [N, K]; ints: bits
template <int BITS> inline void dequantize_as(const Instruction& ins, Team& team) {
  const Tensor& out = ins.t(3);
  const Codes<BITS> matrix(team, ins.t(0), ins.t(1), ins.t(2));
  each_row(team, out.size[0], out.size[1], [&](int64_t row) {
    matrix.row(row, out.size[1], element(team.at<void>(out), out.dtype, row * out.stride[0]), out.dtype);
  });
}
inline void dequantize(const Instruction& ins, Team& team) {
  return ins.ints[0] == 8 ? dequantize_as<8>(ins, team) : dequantize_as<4>(ins, team);
}

// tensors: positions [B, N], lengths [B], out [B, S] (int64)
inline void key_positions(const Instruction& ins, Team& team) {
  const Tensor &positions = ins.t(0), &lengths = ins.t(1), &out = ins.t(2);
  int64_t n = positions.size[1], slots = out.size[1];
  each_row(team, out.size[0], slots, [&](int64_t b) {
    int64_t length = team.at<int64_t>(lengths)[b * lengths.stride[0]];
    const int64_t* own = team.at<int64_t>(positions) + b * positions.stride[0];
    int64_t* to = team.at<int64_t>(out) + b * out.stride[0];
    for (int64_t s = 0; s < slots; s++) to[s] = s < length ? s : own[std::min(s - length, n - 1) * positions.stride[1]];
  });
}

// tensors: lengths [B], tree [B, N, W]?, out [B, N, S] (bool)
inline void visible(const Instruction& ins, Team& team) {
  const Tensor &lengths = ins.t(0), &tree = ins.t(1), &out = ins.t(2);
  int64_t n = out.size[1], slots = out.size[2];
  each_row(team, out.size[0] * n, slots, [&](int64_t row) {
    int64_t b = row / n, i = row % n, length = team.at<int64_t>(lengths)[b * lengths.stride[0]];
    uint8_t* to = team.at<uint8_t>(out) + b * out.stride[0] + i * out.stride[1];
    for (int64_t s = 0; s < slots; s++) {
      int64_t j = s - length;
      if (j < 0 || !tree) to[s] = j <= i;
      else to[s] = j < n && (team.at<int64_t>(tree)[b * tree.stride[0] + i * tree.stride[1] + j / 64 * tree.stride[2]] >> (j % 64) & 1);
    }
  });
}

}  // namespace accelc
