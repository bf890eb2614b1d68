#pragma once

// The inner part of attention, shared by the packed and the decoding operator: a tile of query rows against a
// block of keys, softmax in one pass over blocks (online). Scores are kept in units of log2, so that the softmax
// needs 2^x only; the factor is folded into the queries.
//
// A row's result depends on the order of its own keys alone, never on the other rows of its tile.

#include "vec.h"

namespace minilm_fast {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // rows of accumulators that fit the registers, two vectors each
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kScoreStride = kKeyBlock + 16;  // no power of two: rows would share the sets of the cache
constexpr int64_t kMaxHeadSize = 128;
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct QueryTile {
  alignas(64) float scores[kTileRows * kScoreStride];  // then the probabilities
  alignas(64) float out[kTileRows * kMaxHeadSize];
  alignas(64) float query[kMaxHeadSize * kTileRows];  // dimension-major
  float maximum[kTileRows];
  float total[kTileRows];
};

// A block of keys as the tile needs it: at most kKeyBlock of them. Whole vectors are read, of the keys up to
// round_up(count, kLanes), of each value up to round_up(D, kLanes); what the extra lanes hold does not matter.
template <class Key, class Value>
struct KeyBlock {
  const Key* keys;  // [D, key_stride], dimension-major
  int64_t key_stride;
  const Value* values;  // [count, value_stride]
  int64_t value_stride;
  int64_t count;
};

inline void reset(QueryTile& tile, int rows, int64_t size) {
  for (int r = 0; r < rows; ++r) {
    tile.maximum[r] = kMinusInfinity;
    tile.total[r] = 0.0f;
  }
  std::memset(tile.out, 0, sizeof(float) * rows * round_up(size, kLanes));
}

template <class T>
inline void set_query(QueryTile& tile, int row, const T* q, int64_t size, double scale) {
  const double factor = scale * (1.0 / kLn2);
  for (int64_t d = 0; d < size; ++d)
    tile.query[d * kTileRows + row] = static_cast<float>(to_float(q[d]) * factor);
}

inline void clear_queries(QueryTile& tile, int from, int to, int64_t size) {
  for (int64_t d = 0; d < size; ++d)
    for (int r = from; r < to; ++r) tile.query[d * kTileRows + r] = 0.0f;
}

template <int Rows, int Cols, class T>
inline void score_columns(QueryTile& tile, const T* keys, int64_t stride, int64_t size, int64_t column) {
  Vec sums[Rows][Cols] = {};
  const float* query = tile.query;
  for (int64_t d = 0; d < size; ++d, query += kTileRows, keys += stride) {
    Vec key[Cols];
    for (int c = 0; c < Cols; ++c) key[c] = load(keys + c * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) sums[r][c] += query[r] * key[c];
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) store(tile.scores + r * kScoreStride + column + c * kLanes, sums[r][c]);
}

template <int Rows, class Block>
inline void compute_scores(QueryTile& tile, const Block& block, int64_t size) {
  int64_t column = 0;
  for (; column + kLanes < block.count; column += 2 * kLanes)
    score_columns<Rows, 2>(tile, block.keys + column, block.key_stride, size, column);
  if (column < block.count) score_columns<Rows, 1>(tile, block.keys + column, block.key_stride, size, column);
}

template <int Rows, int Cols, class Block>
inline void add_value_columns(QueryTile& tile, const Block& block, int64_t width, int64_t column) {
  Vec sums[Rows][Cols];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) sums[r][c] = load(tile.out + r * width + column + c * kLanes);
  auto* values = block.values + column;
  const float* probability = tile.scores;
  for (int64_t j = 0; j < block.count; ++j, values += block.value_stride, ++probability) {
    Vec value[Cols];
    for (int c = 0; c < Cols; ++c) value[c] = load(values + c * kLanes);
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) sums[r][c] += probability[r * kScoreStride] * value[c];
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Cols; ++c) store(tile.out + r * width + column + c * kLanes, sums[r][c]);
}

template <int Rows, class Block>
inline void add_values(QueryTile& tile, const Block& block, int64_t size) {
  const int64_t width = round_up(size, kLanes);
  int64_t column = 0;
  for (; column + kLanes < width; column += 2 * kLanes)
    add_value_columns<Rows, 2>(tile, block, width, column);
  if (column < width) add_value_columns<Rows, 1>(tile, block, width, column);
}

// 2^x, but zero where x is so small that it must come from a hidden key.
inline Vec exp2_or_zero(Vec x) { return x < splat(-1e30f) ? Vec{} : exp2(x); }

// Scores of one row to probabilities relative to the running maximum, whose total and output are brought to the
// new maximum. The row sees the first `visible` of the block's `count` keys, and of those only the ones whose
// score is not -infinity.
inline void softmax_row(QueryTile& tile, int row, int64_t visible, int64_t count, int64_t size) {
  float* scores = tile.scores + row * kScoreStride;
  const int64_t end = round_up(count, kLanes);
  const int64_t whole = visible <= 0 ? 0 : visible / kLanes * kLanes;
  Vec top = splat(tile.maximum[row]);
  for (int64_t j = 0; j < whole; j += kLanes) top = maximum(top, load(scores + j));
  if (whole < visible)
    top = maximum(top, first_lanes(visible - whole, load(scores + whole), splat(kMinusInfinity)));
  const float before = tile.maximum[row], now = largest(top);
  if (now == kMinusInfinity) {
    std::memset(scores, 0, sizeof(float) * end);
    return;
  }
  Vec total = {};
  int64_t j = 0;
  for (; j < whole; j += kLanes) {
    const Vec p = exp2_or_zero(load(scores + j) - now);
    total += p;
    store(scores + j, p);
  }
  if (j < visible) {
    const Vec p = first_lanes(visible - j, exp2_or_zero(load(scores + j) - now), Vec{});
    total += p;
    store(scores + j, p);
    j += kLanes;
  }
  if (j < end) std::memset(scores + j, 0, sizeof(float) * (end - j));

  tile.maximum[row] = now;
  const float correction = before == now ? 1.0f : exp2(splat(before - now))[0];
  tile.total[row] = tile.total[row] * correction + sum(total);
  if (before == now) return;
  const int64_t width = round_up(size, kLanes);
  float* out = tile.out + row * width;
  for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(out + d) * correction);
}

template <class T>
inline void write_row(const QueryTile& tile, int row, int64_t size, T* out) {
  const float* sums = tile.out + row * round_up(size, kLanes);
  const Vec reciprocal = splat(1.0f / tile.total[row]);
  for (int64_t d = 0; d < size; d += kLanes) store_first(out + d, load(sums + d) * reciprocal, size - d);
}

inline float log_sum_exp(const QueryTile& tile, int row) {
  return static_cast<float>(tile.maximum[row] * kLn2 + __builtin_logf(tile.total[row]));
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Calls f with the number of rows as a constant: `rows`, rounded up to a number that has a kernel of its own.
template <class F>
inline void with_rows(int rows, F f) {
  if (rows <= 1) return f(Constant<1>());
  if (rows <= 2) return f(Constant<2>());
  if (rows <= 4) return f(Constant<4>());
  if constexpr (kTileRows > 6) {
    if (rows <= 6) return f(Constant<6>());
    if (rows <= 8) return f(Constant<8>());
    if (rows <= 10) return f(Constant<10>());
  }
  return f(Constant<kTileRows>());
}

// Writes `count` rows of `size` elements (row i at rows(i)) as columns: to[d * stride + i]. Columns up to the
// next multiple of kLanes are zeroed.
template <class To, class Rows>
inline void write_transposed(Rows rows, int64_t count, int64_t size, To* to, int64_t stride) {
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec square[kLanes] = {};
      for (int64_t i = 0; i < kLanes && j + i < count; ++i) square[i] = load_first(rows(j + i) + d, size - d);
      transpose(square);
      for (int64_t i = 0; i < kLanes && d + i < size; ++i) store(to + (d + i) * stride + j, square[i]);
    }
  }
}

}  // namespace
}  // namespace minilm_fast
