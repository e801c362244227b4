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
