#pragma once

// The inner part of relation_kl: a tile of rows against a block of columns, on both sides, and what is made of the
// scores. Scores are in units of a factor, by which they become powers of two.

#include "attention_tile.h"

namespace minilm_fast {
namespace {

constexpr int64_t kRowStride = 16;       // of rows stored dimension-major
constexpr int64_t kRelationBlock = 256;  // columns; two tiles of scores stay in the first-level cache
constexpr int64_t kRelationStride = kRelationBlock + 16;
// Rows whose sums over columns, of three quantities, are kept in registers.
constexpr int kRowGroup = kLanes == 16 ? 4 : 2;
// Takes the place of -infinity: differences of two of them are numbers, and powers of two of it are zero.
constexpr float kLowest = -0x1p126f;
// Below this bound (of scores as powers of two) exponentials need no maximum subtracted: neither they nor their sums
// leave the range of floats.
constexpr float kBounded = 96.0f;
constexpr double kLog2E = 1.4426950408889634;

// Scores of a tile: rows [size, kRowStride] times columns [size, stride], to [Rows, kRelationStride].
template <int Rows, int Cols>
inline void relate_columns(const float* rows, const float* columns, int64_t stride, int64_t size, float* scores) {
  constexpr int64_t kChain = 64;
  for (int64_t begin = 0; begin < size; begin += kChain) {
    const int64_t end = size < begin + kChain ? size : begin + kChain;
    Vec sums[Rows][Cols] = {};
    for (int64_t d = begin; d < end; ++d, rows += kRowStride, columns += stride) {
      Vec column[Cols];
      for (int c = 0; c < Cols; ++c) column[c] = load(columns + c * kLanes);
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) sums[r][c] += rows[r] * column[c];
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) {
        float* score = scores + r * kRelationStride + c * kLanes;
        store(score, begin == 0 ? sums[r][c] : sums[r][c] + load(score));
      }
  }
}

template <int Rows>
inline void relate(const float* rows, const float* columns, int64_t stride, int64_t size, int64_t count,
                   float* scores) {
  int64_t j = 0;
  for (; j + kLanes < count; j += 2 * kLanes) relate_columns<Rows, 2>(rows, columns + j, stride, size, scores + j);
  if (j < count) relate_columns<Rows, 1>(rows, columns + j, stride, size, scores + j);
}

// sums [Rows, width] += gradients [Rows, kRelationStride] times values [count, width].
template <int Rows, int Cols>
inline void add_row_sums(const float* gradients, const float* values, int64_t count, int64_t width, float* sums) {
  for (int64_t begin = 0; begin < count; begin += kKeyChain) {
    const int64_t end = count < begin + kKeyChain ? count : begin + kKeyChain;
    Vec part[Rows][Cols] = {};
    for (int64_t j = begin; j < end; ++j, values += width, ++gradients) {
      Vec value[Cols];
      for (int c = 0; c < Cols; ++c) value[c] = load(values + c * kLanes);
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) part[r][c] += gradients[r * kRelationStride] * value[c];
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) {
        float* sum = sums + r * width + c * kLanes;
        store(sum, load(sum) + part[r][c]);
      }
  }
}

template <int Rows>
inline void add_row_sums(const float* gradients, const float* values, int64_t count, int64_t width, float* sums) {
  int64_t d = 0;
  for (; d + kLanes < width; d += 2 * kLanes) add_row_sums<Rows, 2>(gradients, values + d, count, width, sums + d);
  if (d < width) add_row_sums<Rows, 1>(gradients, values + d, count, width, sums + d);
}

// sums [Dims, stride] += rows [Dims, kRowStride] times gradients [count, kRelationStride], for Cols vectors.
template <int Dims, int Cols>
inline void add_column_sums(const float* rows, const float* gradients, int count, int64_t stride, float* sums) {
  Vec part[Dims][Cols];
  for (int d = 0; d < Dims; ++d)
    for (int c = 0; c < Cols; ++c) part[d][c] = load(sums + d * stride + c * kLanes);
  for (int r = 0; r < count; ++r) {
    Vec gradient[Cols];
    for (int c = 0; c < Cols; ++c) gradient[c] = load(gradients + r * kRelationStride + c * kLanes);
    for (int d = 0; d < Dims; ++d)
      for (int c = 0; c < Cols; ++c) part[d][c] += rows[d * kRowStride + r] * gradient[c];
  }
  for (int d = 0; d < Dims; ++d)
    for (int c = 0; c < Cols; ++c) store(sums + d * stride + c * kLanes, part[d][c]);
}

// The same for all dimensions, or one more than there are, and `columns` columns.
inline void add_column_sums(const float* rows, const float* gradients, int count, int64_t size, int64_t columns,
                            int64_t stride, float* sums) {
  for (int64_t d = 0; d < size; d += kTileRows) {
    const int64_t left = size - d;
    with_rows(static_cast<int>(left < kTileRows ? left : kTileRows), [&](auto constant) {
      constexpr int kDims = decltype(constant)::value;
      float* to = sums + d * stride;
      int64_t j = 0;
      for (; j + kLanes < columns; j += 2 * kLanes)
        add_column_sums<kDims, 2>(rows + d * kRowStride, gradients + j, count, stride, to + j);
      if (j < columns) add_column_sums<kDims, 1>(rows + d * kRowStride, gradients + j, count, stride, to + j);
    });
  }
}

// What a row has seen: the greatest scores as powers of two, the sums of exponentials relative to them, and the sum of
// the teacher's exponentials times the difference of the two exponents.
struct RowState {
  float max_t, max_s, total_t, total_s, dot;
};

inline RowState unseen() { return {kLowest, kLowest, 0.0f, 0.0f, 0.0f}; }

// Adds the first `count` columns of a block to what the row has seen.
inline void see_columns(RowState& state, const float* t, const float* s, int64_t count, float factor_t,
                        float factor_s) {
  const float top_t = largest_score(t, count, kMinusInfinity) * factor_t;
  const float top_s = largest_score(s, count, kMinusInfinity) * factor_s;
  const float max_t = top_t > state.max_t ? top_t : state.max_t;
  const float max_s = top_s > state.max_s ? top_s : state.max_s;
  Vec total_t = {}, total_s = {}, dot = {};
  auto see = [&](int64_t j, auto keep) {
    const Vec x = load(t + j) * factor_t - max_t, y = load(s + j) * factor_s - max_s;
    const Vec e = keep(exp2(x));
    total_t += e;
    total_s += keep(exp2(y));
    dot += e * (x - y);
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) see(j, [](Vec e) { return e; });
  if (j < count) see(j, [&](Vec e) { return first_lanes(count - j, e, Vec{}); });
  const float down_t = state.max_t - max_t, down_s = state.max_s - max_s;
  const float old_t = exp2(splat(down_t))[0], old_s = exp2(splat(down_s))[0];
  state.dot = old_t * (state.dot + state.total_t * (down_t - down_s)) + sum(dot);
  state.total_t = old_t * state.total_t + sum(total_t);
  state.total_s = old_s * state.total_s + sum(total_s);
  state.max_t = max_t;
  state.max_s = max_s;
}

// A row's log-sum-exp as a power of two: the nearest float, and the factor of the probabilities that makes up for what
// that lacks. Without it the whole row would be off by the rounding.
struct RowNorm {
  float lse, correction;
};

inline RowNorm row_norm(double lse) {
  const double exponent = lse * kLog2E;
  const float nearest = static_cast<float>(exponent);
  return {nearest, static_cast<float>(1.0 + (nearest - exponent) * kLn2)};
}

// Scores of a row to the gradient in units of its weight, in the place of the student's; zeros from `count` to `end`.
inline void take_gradients(const float* t, float* s, int64_t count, int64_t end, float factor_t, float factor_s,
                           RowNorm norm_t, RowNorm norm_s) {
  auto gradient = [&](int64_t j) {
    const Vec p = exp2(load(t + j) * factor_t - norm_t.lse), q = exp2(load(s + j) * factor_s - norm_s.lse);
    return q * norm_s.correction - p * norm_t.correction;
  };
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(s + j, gradient(j));
  if (j < count) {
    store(s + j, first_lanes(count - j, gradient(j), Vec{}));
    j += kLanes;
  }
  for (; j < end; j += kLanes) store(s + j, Vec{});
}

inline Vec after_lanes(int64_t count, Vec v) { return lane_index() < splat(static_cast<float>(count)) ? Vec{} : v; }

// Sums of rows or columns whose scores are bounded: no maximum is subtracted. From the differences of exponents that
// `dot` weighs, `shift` is taken: that of the score of a row with itself, often the greatest, so that little cancels.
struct BoundedSums {
  float *total_t, *total_s, *dot;
  const float* shift;

  BoundedSums from(int64_t i) const { return {total_t + i, total_s + i, dot + i, shift + i}; }
};

// Adds `count` columns to the sums of Rows rows, and these rows to the sums of the columns from `own` on.
template <int Rows>
inline void see_both(const float* t, const float* s, int64_t count, int64_t own, float factor_t, float factor_s,
                     const BoundedSums& rows, const BoundedSums& columns) {
  Vec total_t[Rows] = {}, total_s[Rows] = {}, dot[Rows] = {};
  auto see = [&](int64_t j, auto keep, auto keep_column) {
    const Vec shift = load(columns.shift + j);
    Vec column_t = {}, column_s = {}, column_dot = {};
    for (int r = 0; r < Rows; ++r) {
      const Vec x = load(t + r * kRelationStride + j) * factor_t, y = load(s + r * kRelationStride + j) * factor_s;
      const Vec e = keep(exp2(x)), f = keep(exp2(y)), difference = x - y;
      total_t[r] += e;
      total_s[r] += f;
      dot[r] += e * (difference - rows.shift[r]);
      column_t += e;
      column_s += f;
      column_dot += e * (difference - shift);
    }
    store(columns.total_t + j, load(columns.total_t + j) + keep_column(column_t));
    store(columns.total_s + j, load(columns.total_s + j) + keep_column(column_s));
    store(columns.dot + j, load(columns.dot + j) + keep_column(column_dot));
  };
  auto all = [](Vec v) { return v; };
  int64_t j = 0;
  auto first = [&](Vec v) { return first_lanes(count - j, v, Vec{}); };
  auto others = [&](Vec v) { return after_lanes(own - j, v); };
  for (; j < own && j + kLanes <= count; j += kLanes) see(j, all, others);
  for (; j + kLanes <= count; j += kLanes) see(j, all, all);
  if (j < count) see(j, first, others);
  for (int r = 0; r < Rows; ++r) {
    rows.total_t[r] += sum(total_t[r]);
    rows.total_s[r] += sum(total_s[r]);
    rows.dot[r] += sum(dot[r]);
  }
}

// Reciprocals of the sums of exponentials of rows or columns.
struct Reciprocals {
  const float *t, *s;
};

// Scores of Rows rows to gradients as take_gradients does, to which from column `own` on the gradient of the mirrored
// score is added.
template <int Rows>
inline void take_both_gradients(const float* t, float* s, int64_t count, int64_t own, float factor_t, float factor_s,
                                const Reciprocals& rows, const Reciprocals& columns) {
  auto take = [&](int64_t j, auto keep, auto keep_column) {
    const Vec column_t = keep_column(load(columns.t + j)), column_s = keep_column(load(columns.s + j));
    for (int r = 0; r < Rows; ++r) {
      float* score = s + r * kRelationStride + j;
      const Vec e = exp2(load(t + r * kRelationStride + j) * factor_t), f = exp2(load(score) * factor_s);
      store(score, keep(f * (rows.s[r] + column_s) - e * (rows.t[r] + column_t)));
    }
  };
  auto all = [](Vec v) { return v; };
  int64_t j = 0;
  auto first = [&](Vec v) { return first_lanes(count - j, v, Vec{}); };
  auto others = [&](Vec v) { return after_lanes(own - j, v); };
  for (; j < own && j + kLanes <= count; j += kLanes) take(j, all, others);
  for (; j + kLanes <= count; j += kLanes) take(j, all, all);
  if (j < count) take(j, first, others);
}

}  // namespace
}  // namespace minilm_fast
