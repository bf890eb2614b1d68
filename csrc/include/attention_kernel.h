#pragma once

// The kernel behind attention_<isa>, compiled once for each instruction set.

#include "attention.h"
#include "attention_tile.h"
#include "philox.h"
#include "relative_bias.h"

namespace minilm_fast {
namespace {

// The rows of a task: where they are and what they see.
template <class T>
class AttentionRows {
 protected:
  AttentionRows(const AttentionProblem& problem, const AttentionTask& task)
      : p_(problem),
        t_(task),
        length_(task.source + task.target + task.pseudo),
        width_(round_up(problem.size, kLanes)),
        scale_(static_cast<float>(problem.scale)),
        dropout_(make_dropout(problem.dropout, problem.seed)) {}

  const T* query(int64_t row) const {
    return static_cast<const T*>(p_.q) + (t_.query + row) * p_.q_token + t_.head * p_.q_head;
  }
  const T* key(int64_t row) const {
    return static_cast<const T*>(p_.k) + (t_.first + row) * p_.k_token + t_.head * p_.k_head;
  }
  const T* value(int64_t row) const {
    return static_cast<const T*>(p_.v) + (t_.first + row) * p_.v_token + t_.head * p_.v_head;
  }
  bool is_pseudo(int64_t row) const { return row >= t_.source + t_.target; }

  // How many keys, counted from the first, a row sees; a pseudo row also sees itself.
  int64_t prefix(int64_t row) const {
    if (row < t_.source) return t_.source;
    if (!is_pseudo(row)) return row + 1;
    const int64_t before = row - t_.target, all = t_.source + t_.target;
    return before < all ? before : all;
  }

  // The largest prefix among rows [begin, end).
  int64_t visible_keys(int64_t begin, int64_t end) const {
    int64_t most = prefix(begin);
    for (int64_t row = begin + 1; row < end; ++row)
      if (prefix(row) > most) most = prefix(row);
    return most;
  }

  DistanceBias make_bias(float* memory) const {
    return DistanceBias(p_.relative_bias + t_.head * (2 * p_.distance_limit + 1), p_.distance_limit, memory);
  }

  bool drops() const { return dropout_.threshold > 0; }

  // Dropout factors of a row at keys [first, first + count), in whole blocks; `first` is a multiple of kDropoutBlock.
  void factors(int64_t row, int64_t first, int64_t count, float* factors) const {
    for (int64_t j = 0; j < count; j += kDropoutBlock)
      dropout_factors(dropout_, t_.head, t_.query + row, (first + j) / kDropoutBlock, factors + j);
  }

  // The factor of a row at its own key.
  float own_factor(int64_t row) const {
    if (!drops()) return 1.0f;
    float block[kDropoutBlock];
    factors(row, row / kDropoutBlock * kDropoutBlock, 1, block);
    return block[row % kDropoutBlock];
  }

  // Takes rows [row, row + rows) into the tile, as many as `padded` with those that are not there; a pseudo row
  // starts with its own key.
  void begin(QueryTile& tile, int64_t row, int rows, int padded, const DistanceBias* bias) const {
    set_queries(
        tile, [&](int64_t r) { return query(row + r); }, rows, padded, p_.size, bias == nullptr ? p_.scale : 1.0);
    for (int r = 0; r < rows; ++r) {
      if (!is_pseudo(row + r)) continue;
      float score = 0.0f;
      for (int64_t d = 0; d < p_.size; ++d) score += tile.query[d * kQueryStride + r] * to_float(key(row + r)[d]);
      if (bias != nullptr) score = score * scale_ + bias->at(0);
      tile.maximum[r] = score * tile.factor;
      tile.total[r] = 1.0f;
      const float factor = own_factor(row + r);
      for (int64_t d = 0; d < p_.size; ++d) tile.out[r * width_ + d] = factor * to_float(value(row + r)[d]);
    }
  }

  // Scales the scores of a row with keys `first`, `first + 1`, ... and adds the biases.
  void add_bias(float* scores, int64_t row, int64_t first, int64_t visible, const DistanceBias& bias) const {
    const int32_t* positions = p_.positions + t_.first;
    for (int64_t j = 0; j < visible; j += kLanes)
      store(scores + j, load(scores + j) * scale_ + bias.between(positions[row], positions + first + j, visible - j));
  }

  void finish(const QueryTile& tile, int64_t row, int rows) const {
    for (int r = 0; r < rows; ++r) {
      const int64_t to = t_.query + row + r;
      write_row(tile, r, p_.size, static_cast<T*>(p_.out) + (to * p_.heads + t_.head) * p_.size);
      if (p_.lse != nullptr) p_.lse[t_.head * p_.queries + to] = log_sum_exp(tile, r);
    }
  }

  const AttentionProblem& p_;
  const AttentionTask& t_;
  int64_t length_, width_;
  float scale_;
  Dropout dropout_;
};

template <class T>
class AttentionHead : AttentionRows<T> {
  using Rows = AttentionRows<T>;
  using Rows::length_, Rows::p_, Rows::t_, Rows::width_;

 public:
  AttentionHead(const AttentionProblem& problem, const AttentionTask& task, float* scratch)
      : Rows(problem, task),
        key_stride_(round_up(length_, kLanes) + kLanes),
        keys_(scratch),
        values_(keys_ + problem.size * key_stride_),
        bias_(values_ + length_ * width_) {}

  void run(QueryTile& tile) {
    const int64_t keys = Rows::visible_keys(t_.row_begin, t_.row_end);
    write_transposed([&](int64_t j) { return Rows::key(j); }, keys, p_.size, keys_, key_stride_);
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t d = 0; d < width_; d += kLanes)
        store(values_ + j * width_ + d, load_first(Rows::value(j) + d, p_.size - d));
    if (p_.relative_bias == nullptr) return run_rows(tile, nullptr);
    const DistanceBias bias = Rows::make_bias(bias_);
    run_rows(tile, &bias);
  }

 private:
  void run_rows(QueryTile& tile, const DistanceBias* bias) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kTileRows) {
      const int64_t left = t_.row_end - row;
      const int rows = static_cast<int>(left < kTileRows ? left : kTileRows);
      with_rows(rows, [&](auto constant) { run_tile<decltype(constant)::value>(tile, row, rows, bias); });
    }
  }

  template <int Padded>
  void run_tile(QueryTile& tile, int64_t row, int rows, const DistanceBias* bias) {
    Rows::begin(tile, row, rows, Padded, bias);
    const int64_t keys = Rows::visible_keys(row, row + rows);
    for (int64_t first = 0; first < keys; first += kKeyBlock) {
      const int64_t count = keys - first < kKeyBlock ? keys - first : kKeyBlock;
      const KeyBlock<float, float> block{keys_ + first, key_stride_, values_ + first * width_, width_, count};
      compute_scores<Padded>(tile, block, p_.size);
      for (int r = 0; r < rows; ++r) {
        const int64_t left = Rows::prefix(row + r) - first;
        const int64_t visible = left < count ? left : count;
        if (bias != nullptr) Rows::add_bias(tile.scores + r * kScoreStride, row + r, first, visible, *bias);
        softmax_row(tile, r, visible, count, p_.size);
        if (Rows::drops()) drop(tile.scores + r * kScoreStride, row + r, first, visible);
      }
      add_values<Padded>(tile, block, p_.size);
    }
    Rows::finish(tile, row, rows);
  }

  void drop(float* probabilities, int64_t row, int64_t first, int64_t visible) {
    alignas(64) float factors[kKeyBlock];
    Rows::factors(row, first, visible, factors);
    for (int64_t j = 0; j < visible; j += kLanes) store(probabilities + j, load(probabilities + j) * load(factors + j));
  }

  int64_t key_stride_;
  float *keys_, *values_, *bias_;
};

inline void attention_kernel(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  QueryTile tile;
  if (problem.bf16)
    AttentionHead<Bf16>(problem, task, scratch).run(tile);
  else
    AttentionHead<float>(problem, task, scratch).run(tile);
}

}  // namespace
}  // namespace minilm_fast
