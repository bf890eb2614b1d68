#pragma once

// The kernel behind attention_backward_<isa>, compiled once for each instruction set. Probabilities are computed
// again from the log-sum-exp, for a block of query rows and a block of keys at a time (Dao, FlashAttention-2,
// arXiv 2307.08691, algorithm 2).

#include "attention_kernel.h"

namespace minilm_fast {
namespace {

constexpr int64_t kRowBlock = 48;  // a multiple of kTileRows
constexpr int64_t kColumnBlock = kDropoutBlock;
constexpr int64_t kPairStride = kColumnBlock + 16;  // no power of two: rows would share the sets of the cache
constexpr int64_t kProductChain = 64;
constexpr int64_t kTilePadding = 16;  // rows that a tile may write beyond the last

// A left operand: element (row, step) is at p[row * Row + step * depth_stride].
template <int64_t Row>
struct Left {
  const float* p;
  int64_t depth_stride;
};

template <int Rows, int Cols, int64_t Row>
inline void multiply_tile(Left<Row> left, const float* right, int64_t right_stride, int64_t depth, float* out,
                          int64_t out_stride, bool add) {
  for (int64_t begin = 0; begin < depth; begin += kProductChain) {
    const int64_t end = depth < begin + kProductChain ? depth : begin + kProductChain;
    Vec sums[Rows][Cols] = {};
    for (int64_t t = begin; t < end; ++t, left.p += left.depth_stride, right += right_stride) {
      Vec column[Cols];
      for (int c = 0; c < Cols; ++c) column[c] = load(right + c * kLanes);
      for (int r = 0; r < Rows; ++r)
        for (int c = 0; c < Cols; ++c) sums[r][c] += left.p[r * Row] * column[c];
    }
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Cols; ++c) {
        float* to = out + r * out_stride + c * kLanes;
        store(to, add ? load(to) + sums[r][c] : sums[r][c]);
      }
    add = true;
  }
}

// out[r][c] (+)= the sum over `depth` steps of left(r, step) * right[step][c], for kTileRows rows at most; whole
// vectors of columns, and rows up to the next number that has a kernel, are read and written.
template <int64_t Row>
inline void multiply(Left<Row> left, const float* right, int64_t right_stride, int64_t depth, float* out,
                     int64_t out_stride, int rows, int64_t columns, bool add) {
  with_rows(rows, [&](auto constant) {
    constexpr int kRows = decltype(constant)::value;
    int64_t c = 0;
    for (; c + kLanes < columns; c += 2 * kLanes)
      multiply_tile<kRows, 2>(left, right + c, right_stride, depth, out + c, out_stride, add);
    if (c < columns) multiply_tile<kRows, 1>(left, right + c, right_stride, depth, out + c, out_stride, add);
  });
}

// What the rows of a block need, packed.
struct RowBlock {
  alignas(64) float q[kRowBlock * kMaxHeadSize];  // [rows, width]
  alignas(64) float grad_out[kRowBlock * kMaxHeadSize];
  alignas(64) float q_columns[kRowBlock / kTileRows * kMaxHeadSize * kQueryStride];  // by tile, dimension-major
  alignas(64) float grad_out_columns[kRowBlock / kTileRows * kMaxHeadSize * kQueryStride];
  alignas(64) float p[kRowBlock * kPairStride];   // scores, then probabilities with their dropout factors
  alignas(64) float ds[kRowBlock * kPairStride];  // gradients of the probabilities, then of the scores
  alignas(64) float dq[kRowBlock * kMaxHeadSize];
  float lse[kRowBlock], delta[kRowBlock];  // lse as an exponent of two
};

static_assert(sizeof(RowBlock) <= sizeof(float) * kBackwardBlock, "scratch memory must hold the block");

inline float dot(const float* a, const float* b, int64_t width) {
  Vec total = {};
  for (int64_t d = 0; d < width; d += kLanes) total += load(a + d) * load(b + d);
  return sum(total);
}

// to += factor * from
inline void add_multiple(float* to, const float* from, float factor, int64_t width) {
  for (int64_t d = 0; d < width; d += kLanes) store(to + d, load(to + d) + load(from + d) * factor);
}

template <class T>
class AttentionHeadBackward : AttentionRows<T> {
  using Rows = AttentionRows<T>;
  using Rows::length_, Rows::p_, Rows::t_, Rows::width_, Rows::scale_;

 public:
  AttentionHeadBackward(const AttentionProblem& problem, const AttentionGradients& gradients, const AttentionTask& task,
                        float* bias_gradient, float* scratch)
      : Rows(problem, task),
        g_(gradients),
        b_(*reinterpret_cast<RowBlock*>(scratch)),
        stride_(round_up(length_, kLanes) + kLanes),
        key_columns_(scratch + sizeof(RowBlock) / sizeof(float)),
        value_columns_(key_columns_ + problem.size * stride_),
        keys_(value_columns_ + problem.size * stride_),
        dk_(keys_ + length_ * width_),
        dv_(dk_ + (length_ + kTilePadding) * width_),
        tables_(dv_ + (length_ + kTilePadding) * width_),
        bias_gradient_(bias_gradient) {}

  void run() {
    std::memset(dk_, 0, sizeof(float) * 2 * (length_ + kTilePadding) * width_);
    if (t_.row_begin < t_.row_end) {
      pack_keys(Rows::visible_keys(t_.row_begin, t_.row_end));
      if (p_.relative_bias == nullptr) {
        run_rows(nullptr, nullptr);
      } else {
        const DistanceBias bias = Rows::make_bias(tables_);
        DistanceSums sums(p_.distance_limit, tables_ + DistanceBias::floats(p_.distance_limit));
        run_rows(&bias, bias_gradient_ == nullptr ? nullptr : &sums);
        if (bias_gradient_ != nullptr) sums.write(bias_gradient_);
      }
    } else if (bias_gradient_ != nullptr) {
      std::memset(bias_gradient_, 0, sizeof(float) * (2 * p_.distance_limit + 1));
    }
    for (int64_t j = 0; j < length_; ++j) {
      write(dk_ + j * width_, scale_, static_cast<T*>(g_.k) + (t_.first + j) * g_.k_token + t_.head * p_.size);
      write(dv_ + j * width_, 1.0f, static_cast<T*>(g_.v) + (t_.first + j) * g_.v_token + t_.head * p_.size);
    }
  }

 private:
  void pack_keys(int64_t keys) {
    write_transposed([&](int64_t j) { return Rows::key(j); }, keys, p_.size, key_columns_, stride_);
    write_transposed([&](int64_t j) { return Rows::value(j); }, keys, p_.size, value_columns_, stride_);
    for (int64_t j = 0; j < keys; ++j) read(Rows::key(j), keys_ + j * width_);
  }

  void read(const T* from, float* to) const {
    for (int64_t d = 0; d < width_; d += kLanes) store(to + d, load_first(from + d, p_.size - d));
  }

  void write(const float* from, float factor, T* to) const {
    for (int64_t d = 0; d < p_.size; d += kLanes) store_first(to + d, load(from + d) * factor, p_.size - d);
  }

  const T* grad_out(int64_t row) const {
    return static_cast<const T*>(g_.grad_out) + (t_.query + row) * g_.grad_out_token + t_.head * g_.grad_out_head;
  }

  void run_rows(const DistanceBias* bias, DistanceSums* sums) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kRowBlock) {
      const int64_t left = t_.row_end - row;
      run_block(row, left < kRowBlock ? left : kRowBlock, bias, sums);
    }
  }

  void run_block(int64_t row, int64_t rows, const DistanceBias* bias, DistanceSums* sums) {
    take_rows(row, rows);
    for (int64_t r = 0; r < rows; ++r)
      if (Rows::is_pseudo(row + r)) see_itself(row + r, r, bias, sums);
    const int64_t keys = Rows::visible_keys(row, row + rows);
    for (int64_t first = 0; first < keys; first += kColumnBlock) {
      const int64_t count = keys - first < kColumnBlock ? keys - first : kColumnBlock;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t left = rows - r;
        see(row + r, r, static_cast<int>(left < kTileRows ? left : kTileRows), first, count, bias, sums);
      }
      add_to_keys(b_.p, b_.grad_out, rows, count, dv_ + first * width_);
      add_to_keys(b_.ds, b_.q, rows, count, dk_ + first * width_);
    }
    for (int64_t r = 0; r < rows; ++r)
      write(b_.dq + r * width_, scale_, static_cast<T*>(g_.q) + (t_.query + row + r) * g_.q_token + t_.head * p_.size);
  }

  void take_rows(int64_t row, int64_t rows) {
    alignas(64) float out[kMaxHeadSize];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = t_.query + row + r;
      read(Rows::query(row + r), b_.q + r * width_);
      read(grad_out(row + r), b_.grad_out + r * width_);
      read(static_cast<const T*>(g_.out) + index * g_.out_token + t_.head * g_.out_head, out);
      b_.delta[r] = dot(out, b_.grad_out + r * width_, width_);
      b_.lse[r] = static_cast<float>(g_.lse[t_.head * p_.queries + index] / kLn2);
    }
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t count = rows - r < kTileRows ? rows - r : kTileRows, to = r / kTileRows * p_.size * kQueryStride;
      write_transposed([&](int64_t i) { return b_.q + (r + i) * width_; }, count, p_.size, b_.q_columns + to,
                       kQueryStride);
      write_transposed([&](int64_t i) { return b_.grad_out + (r + i) * width_; }, count, p_.size,
                       b_.grad_out_columns + to, kQueryStride);
    }
    std::memset(b_.dq, 0, sizeof(float) * rows * width_);
  }

  // A pseudo row's own key, which is not among those that its prefix counts.
  void see_itself(int64_t row, int64_t r, const DistanceBias* bias, DistanceSums* sums) {
    alignas(64) float key[kMaxHeadSize], value[kMaxHeadSize];
    read(Rows::key(row), key);
    read(Rows::value(row), value);
    const float *q = b_.q + r * width_, *grad_out = b_.grad_out + r * width_;
    float score = dot(q, key, width_) * scale_;
    if (bias != nullptr) score += bias->at(0);
    const float p = exp2(splat(static_cast<float>(score / kLn2) - b_.lse[r]))[0], factor = Rows::own_factor(row);
    const float ds = p * (factor * dot(grad_out, value, width_) - b_.delta[r]);
    add_multiple(dv_ + row * width_, grad_out, p * factor, width_);
    add_multiple(dk_ + row * width_, q, ds, width_);
    add_multiple(b_.dq + r * width_, key, ds, width_);
    if (sums != nullptr) sums->add(0, ds);
  }

  // A tile of rows, from `r` of the block on, against keys [first, first + count).
  void see(int64_t row, int64_t r, int rows, int64_t first, int64_t count, const DistanceBias* bias,
           DistanceSums* sums) {
    float *p = b_.p + r * kPairStride, *ds = b_.ds + r * kPairStride;
    const int64_t from = r / kTileRows * p_.size * kQueryStride;
    const int64_t all = Rows::visible_keys(row, row + rows) - first, keys = all < count ? all : count;
    if (keys > 0) {
      multiply<1>({b_.q_columns + from, kQueryStride}, key_columns_ + first, stride_, p_.size, p, kPairStride, rows,
                  keys, false);
      multiply<1>({b_.grad_out_columns + from, kQueryStride}, value_columns_ + first, stride_, p_.size, ds, kPairStride,
                  rows, keys, false);
    }
    for (int i = 0; i < rows; ++i) {
      const int64_t left = Rows::prefix(row + i) - first;
      differentiate_row(row + i, r + i, first, left < count ? left : count, count, bias, sums);
    }
    if (keys > 0)
      multiply<kPairStride>({ds, 1}, keys_ + first * width_, width_, keys, b_.dq + r * width_, width_, rows, width_,
                            true);
  }

  // Scores to probabilities and their gradients to those of the scores; zero where the row does not see.
  void differentiate_row(int64_t row, int64_t r, int64_t first, int64_t visible, int64_t count,
                         const DistanceBias* bias, DistanceSums* sums) {
    float *p = b_.p + r * kPairStride, *ds = b_.ds + r * kPairStride;
    alignas(64) float factors[kColumnBlock];
    if (Rows::drops() && visible > 0) Rows::factors(row, first, visible, factors);
    if (bias != nullptr) Rows::add_bias(p, row, first, visible, *bias);
    const Vec unit = splat(static_cast<float>((bias == nullptr ? p_.scale : 1.0) / kLn2));
    const Vec lse = splat(b_.lse[r]), delta = splat(b_.delta[r]);
    int64_t j = 0;
    for (; j < visible; j += kLanes) {
      Vec probability = exp2(load(p + j) * unit - lse), gradient = load(ds + j), kept = probability;
      if (Rows::drops()) {
        const Vec factor = load(factors + j);
        gradient *= factor;
        kept *= factor;
      }
      gradient = probability * (gradient - delta);
      if (j + kLanes > visible) {
        kept = first_lanes(visible - j, kept, Vec{});
        gradient = first_lanes(visible - j, gradient, Vec{});
      }
      store(p + j, kept);
      store(ds + j, gradient);
      if (sums != nullptr) {
        const int32_t* positions = p_.positions + t_.first;
        sums->add(positions[row], positions + first + j, visible - j, gradient);
      }
    }
    const int64_t end = round_up(count, kLanes);
    if (j >= end) return;
    std::memset(p + j, 0, sizeof(float) * (end - j));
    std::memset(ds + j, 0, sizeof(float) * (end - j));
  }

  // Adds the products of the transposed weights [rows, kPairStride] with rows of q or grad_out to those of keys.
  void add_to_keys(const float* weights, const float* rows, int64_t depth, int64_t count, float* to) const {
    for (int64_t j = 0; j < count; j += kTileRows) {
      const int64_t left = count - j;
      multiply<1>({weights + j, kPairStride}, rows, width_, depth, to + j * width_, width_,
                  static_cast<int>(left < kTileRows ? left : kTileRows), width_, true);
    }
  }

  const AttentionGradients& g_;
  RowBlock& b_;
  int64_t stride_;
  float *key_columns_, *value_columns_, *keys_, *dk_, *dv_, *tables_, *bias_gradient_;
};

inline void attention_backward_kernel(const AttentionProblem& problem, const AttentionGradients& gradients,
                                      const AttentionTask& task, float* bias_gradient, float* scratch) {
  if (problem.bf16)
    AttentionHeadBackward<Bf16>(problem, gradients, task, bias_gradient, scratch).run();
  else
    AttentionHeadBackward<float>(problem, gradients, task, bias_gradient, scratch).run();
}

}  // namespace
}  // namespace minilm_fast
