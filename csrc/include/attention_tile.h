#pragma once

// The inner part of attention, shared by the packed and the decoding operator: a tile of query rows against a
// block of keys, softmax in one pass over blocks (online).
//
// A row's result depends on the order of its own keys alone, never on the other rows of its tile.

#include <type_traits>

#include "vec.h"

namespace minilm_fast {
namespace {

constexpr int kTileRows = kLanes == 16 ? 12 : 6;  // rows of accumulators that fit the registers, two vectors each
constexpr int64_t kKeyBlock = 512;
constexpr int64_t kScoreStride = kKeyBlock + 16;  // no power of two: rows would share the sets of the cache
constexpr int64_t kMaxHeadSize = 128;
constexpr int64_t kQueryStride = 16;
// How many products are summed one after the other, over dimensions and over keys; longer sums round more.
constexpr int64_t kSizeChain = 32, kKeyChain = 64;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kMinusInfinity = -__builtin_inff();

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A tile's state; the rows beyond kTileRows are for kernels that do without `scores`.
struct QueryTile {
  alignas(64) float scores[kTileRows * kScoreStride];  // then the probabilities
  alignas(64) float out[kQueryStride * kMaxHeadSize];
  alignas(64) float query[kMaxHeadSize * kQueryStride];  // dimension-major
  float factor;                                          // of the scores, which are in units of it, to powers of two
  float maximum[kQueryStride];                           // of the scores times the factor
  float total[kQueryStride];                             // of 2^(score * factor - maximum)
};

// A block of keys as the tile needs it: at most kKeyBlock of them. Whole vectors are read, of the keys up to
// round_up(count, kLanes), of each value up to round_up(D, kLanes); what the extra lanes hold does not matter.
template <class Key, class Value>
struct KeyBlock {
  static constexpr bool kStreamed = false;
  const Key* keys;  // [D, key_stride], dimension-major
  int64_t key_stride;
  const Value* values;  // [count, value_stride]
  int64_t value_stride;
  int64_t count;
};

// Fetches the line of memory at an address, which need not belong to the process, into the second-level cache.
inline void prefetch(intptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2); }

inline intptr_t address_of(const void* p) { return reinterpret_cast<intptr_t>(p); }

// Memory that will be read next, which is fetched a little at a time while something else is worked on: some rows, and
// then another piece. In the order in which it lies in memory, as the processor then helps.
class Stream {
 public:
  Stream() = default;
  Stream(const void* rows, int64_t count, int64_t stride, int64_t bytes, const void* last, int64_t last_bytes)
      : row_(address_of(rows) - stride),
        left_(count),
        stride_(stride),
        bytes_(bytes),
        last_(address_of(last)),
        last_bytes_(last_bytes) {}

  // The next lines, if there are any.
  void fetch(int64_t lines) {
    for (; lines > 0; --lines, at_ += kLine) {
      if (at_ >= end_ && !advance()) return;
      prefetch(at_);
    }
  }

  int64_t lines() const { return (left_ * bytes_ + last_bytes_) / kLine; }

 private:
  static constexpr int64_t kLine = 64;

  bool advance() {
    if (left_ > 0) {
      --left_;
      row_ += stride_;
      at_ = row_;
      end_ = row_ + bytes_;
    } else {
      at_ = last_;
      end_ = last_ + last_bytes_;
      last_bytes_ = 0;
    }
    return at_ < end_;
  }

  intptr_t at_ = 0, end_ = 0, row_ = 0;
  int64_t left_ = 0, stride_ = 0, bytes_ = 0;
  intptr_t last_ = 0;
  int64_t last_bytes_ = 0;
};

// A block with a stream that goes on as fast as the block is read.
template <class Key, class Value>
struct StreamedKeyBlock : KeyBlock<Key, Value> {
  static constexpr bool kStreamed = true;
  Stream* stream;
};

template <class T, int Cols>
constexpr int64_t kLinesOf = (Cols * kLanes * static_cast<int64_t>(sizeof(T)) + 63) / 64;

template <int Rows, int Cols, class Block>
inline void score_columns(QueryTile& tile, const Block& block, int64_t size, int64_t column) {
  float* scores = tile.scores + column;
  const float* query = tile.query;
  auto* keys = block.keys + column;
  for (int64_t begin = 0; begin < size; begin += kSizeChain) {
    const int64_t end = size < begin + kSizeChain ? size : begin + kSizeChain;
    Vec sums[Rows][Cols] = {};
    for (int64_t d = begin; d < end; ++d, query += kQueryStride, keys += block.key_stride) {
      Vec key[Cols];
      for (int c = 0; c < Cols; ++c) key[c] = load(keys + c * kLanes);
      if constexpr (Block::kStreamed) block.stream->fetch(kLinesOf<std::decay_t<decltype(*keys)>, Cols>);
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) sums[r][c] += query[r] * key[c];
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) {
        float* score = scores + r * kScoreStride + c * kLanes;
        store(score, begin == 0 ? sums[r][c] : sums[r][c] + load(score));
      }
  }
}

template <int Rows, class Block>
inline void compute_scores(QueryTile& tile, const Block& block, int64_t size) {
  int64_t column = 0;
  for (; column + kLanes < block.count; column += 2 * kLanes) score_columns<Rows, 2>(tile, block, size, column);
  if (column < block.count) score_columns<Rows, 1>(tile, block, size, column);
}

template <int Rows, int Cols, class Block>
inline void add_value_columns(QueryTile& tile, const Block& block, int64_t width, int64_t column) {
  auto* values = block.values + column;
  const float* probability = tile.scores;
  for (int64_t begin = 0; begin < block.count; begin += kKeyChain) {
    const int64_t end = block.count < begin + kKeyChain ? block.count : begin + kKeyChain;
    Vec sums[Rows][Cols] = {};
    for (int64_t j = begin; j < end; ++j, values += block.value_stride, ++probability) {
      Vec value[Cols];
      for (int c = 0; c < Cols; ++c) value[c] = load(values + c * kLanes);
      if constexpr (Block::kStreamed) block.stream->fetch(kLinesOf<std::decay_t<decltype(*values)>, Cols>);
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) sums[r][c] += probability[r * kScoreStride] * value[c];
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) {
        float* out = tile.out + r * width + column + c * kLanes;
        store(out, load(out) + sums[r][c]);
      }
  }
}

template <int Rows, class Block>
inline void add_values(QueryTile& tile, const Block& block, int64_t size) {
  const int64_t width = round_up(size, kLanes);
  int64_t column = 0;
  for (; column + kLanes < width; column += 2 * kLanes) add_value_columns<Rows, 2>(tile, block, width, column);
  if (column < width) add_value_columns<Rows, 1>(tile, block, width, column);
}

// The greatest of the first `count` scores and `least`.
inline float largest_score(const float* scores, int64_t count, float least) {
  Vec top[4] = {splat(least), splat(least), splat(least), splat(least)};
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
    for (int i = 0; i < 4; ++i) top[i] = maximum(top[i], load(scores + j + i * kLanes));
  for (; j < count; j += kLanes)
    top[0] = maximum(top[0], first_lanes(count - j, load(scores + j), splat(kMinusInfinity)));
  return largest(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
}

// Brings a row to a new maximum, relative to which the probabilities of a block add up to `total`.
inline void raise_maximum(QueryTile& tile, int row, float maximum, float total, int64_t size) {
  const float before = tile.maximum[row];
  const float correction = before == maximum ? 1.0f : exp2(splat(before - maximum))[0];
  tile.maximum[row] = maximum;
  tile.total[row] = tile.total[row] * correction + total;
  if (before == maximum) return;
  const int64_t width = round_up(size, kLanes);
  float* out = tile.out + row * width;
  for (int64_t d = 0; d < width; d += kLanes) store(out + d, load(out + d) * correction);
}

// Scores of one row to probabilities relative to the running maximum, whose total and output are brought to the
// new maximum. The row sees the first `visible` of the block's `count` keys, and of those only the ones whose
// score is not -infinity.
inline void softmax_row(QueryTile& tile, int row, int64_t visible, int64_t count, int64_t size) {
  float* scores = tile.scores + row * kScoreStride;
  const int64_t end = round_up(count, kLanes);
  const float before = tile.maximum[row];
  const float top = largest_score(scores, visible, kMinusInfinity) * tile.factor;
  const float now = top > before ? top : before;
  if (now == kMinusInfinity) {
    std::memset(scores, 0, sizeof(float) * end);
    return;
  }
  const Vec factor = splat(tile.factor), subtrahend = splat(now);
  Vec total = {};
  int64_t j = 0;
  for (; j + kLanes <= visible; j += kLanes) {
    const Vec p = exp2(load(scores + j) * factor - subtrahend);
    total += p;
    store(scores + j, p);
  }
  if (j < visible) {
    const Vec p = first_lanes(visible - j, exp2(load(scores + j) * factor - subtrahend), Vec{});
    total += p;
    store(scores + j, p);
    j += kLanes;
  }
  if (j < end) std::memset(scores + j, 0, sizeof(float) * (end - j));

  raise_maximum(tile, row, now, sum(total), size);
}

template <class T>
inline void write_row(const QueryTile& tile, int row, int64_t size, T* out) {
  const float* sums = tile.out + row * round_up(size, kLanes);
  for (int64_t d = 0; d < size; d += kLanes) store_first(out + d, load(sums + d) / tile.total[row], size - d);
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
      for (int64_t i = 0; i < kLanes && j + i < count; ++i) {
        square[i] = load_first(rows(j + i) + d, size - d);
        __builtin_prefetch(rows(j + i + kLanes) + d);  // rows lie far apart; one that does not exist is no error
      }
      transpose(square);
      for (int64_t i = 0; i < kLanes && d + i < size; ++i) store(to + (d + i) * stride + j, square[i]);
    }
  }
}

// Takes the queries (row r at rows(r)) into an empty tile. Scores are to be in units of `unit`: the scale itself,
// or 1 if the scale is already in them, as it must be for a bias to be added.
template <class Rows>
inline void set_queries(QueryTile& tile, Rows rows, int count, int padded, int64_t size, double unit) {
  write_transposed(rows, count, size, tile.query, kQueryStride);
  // The factor must be positive: the maximum is sought before it is applied.
  if (unit <= 0)
    for (int64_t i = 0; i < size * kQueryStride; ++i) tile.query[i] *= unit < 0 ? -1.0f : 0.0f;
  tile.factor = static_cast<float>((unit == 0 ? 1.0 : unit < 0 ? -unit : unit) / kLn2);
  for (int r = 0; r < padded; ++r) {
    tile.maximum[r] = kMinusInfinity;
    tile.total[r] = 0.0f;
  }
  std::memset(tile.out, 0, sizeof(float) * padded * round_up(size, kLanes));
}

}  // namespace
}  // namespace minilm_fast
