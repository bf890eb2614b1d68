#pragma once

// Attention on matrix tiles where every row sees every key and these fit one block: what encoders do nearly always. It
// needs no running maximum, so the softmax works on 16 rows at a time.

#include "amx_tile.h"
#include "attention_kernel.h"

namespace minilm_fast {
namespace {

// Two vectors rounded to bf16, the first one's lanes before the second's.
inline __m512i to_bf16_pair(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first)));
}

struct WholeBuffers {
  alignas(64) float scores[2 * kTileSide * kAmxScoreStride];  // then the probabilities
  alignas(64) float sums[4 * kTileWords];
  alignas(64) uint16_t queries[kTileSide * kMaxHeadSize];
};

class WholeAttention : AttentionRows<Bf16> {
 public:
  static bool fits(const AttentionProblem& problem, const AttentionTask& task) {
    return task.target == 0 && task.pseudo == 0 && task.source <= kAmxKeyBlock && problem.size % kTileDepth == 0 &&
           problem.relative_bias == nullptr && problem.dropout == 0 && problem.scale > 0;
  }

  WholeAttention(const AttentionProblem& problem, const AttentionTask& task, float* scratch, WholeBuffers& buffers)
      : AttentionRows(problem, task),
        b_(buffers),
        depth_(problem.size / kTileDepth),
        value_step_(problem.size / kTileSide * kTileWords),
        steps_(round_up(length_, kTileDepth) / kTileDepth),
        factor_(static_cast<float>(problem.scale / kLn2)),
        keys_(reinterpret_cast<uint32_t*>(scratch)),
        values_(keys_ + round_up(length_, 4 * kTileSide) * depth_ * kTileSide) {}

  void run() {
    for (int64_t j = 0; j < length_; j += kTileSide) pack_keys(j);
    for (int64_t j = 0; j < length_; j += kTileDepth) pack_values(j);
    int64_t row = t_.row_begin;
    for (; row + kTileSide < t_.row_end; row += 2 * kTileSide) run_rows<2>(row);
    if (row < t_.row_end) run_rows<1>(row);
  }

 private:
  // 16 keys from `first` on as right operands whose columns they are.
  void pack_keys(int64_t first) {
    for (int64_t k = 0; k < depth_; ++k) {
      Vec square[kTileSide];
      for (int64_t i = 0; i < kTileSide; ++i)
        square[i] = first + i < length_ ? load(reinterpret_cast<const float*>(key(first + i) + k * kTileDepth)) : Vec{};
      transpose(square);
      std::memcpy(keys_ + (first * depth_ + k * kTileSide) * kTileSide, square, sizeof(square));
    }
  }

  // 32 values from `first` on as right operands whose rows they are, in pairs; those that are not there are zeros.
  void pack_values(int64_t first) {
    uint32_t* tiles = values_ + first / kTileDepth * value_step_;
    for (int64_t i = 0; i < kTileSide; ++i)
      for (int64_t d = 0; d < p_.size; d += kTileSide) {
        const int64_t j = first + 2 * i;
        const BitVec even = j < length_ ? load_words(value(j) + d) : BitVec{};
        const BitVec odd = j + 1 < length_ ? load_words(value(j + 1) + d) : BitVec{};
        store_words(tiles + d * kTileSide + i * kTileSide, even | (odd << 16));
      }
  }

  template <int Lefts>
  void run_rows(int64_t row) {
    const int64_t left = t_.row_end - row;
    memory_fence();
    score<Lefts>(row, left);
    memory_fence();
    Vec maxima[Lefts], totals[Lefts];
    for (int i = 0; i < Lefts; ++i) softmax(b_.scores + i * kTileSide * kAmxScoreStride, maxima[i], totals[i]);
    for (int64_t d = 0; d < p_.size; d += kTileDepth) {
      memory_fence();
      multiply_values<Lefts>(b_.scores, values_ + d * kTileSide, steps_, value_step_, b_.sums);
      memory_fence();
      for (int i = 0; i < Lefts; ++i) write(row + i * kTileSide, left - i * kTileSide, i, d, 1.0f / totals[i]);
    }
    if (p_.lse == nullptr) return;
    for (int64_t r = 0; r < Lefts * kTileSide && r < left; ++r) {
      const int64_t i = r / kTileSide, lane = r % kTileSide;
      p_.lse[t_.head * p_.queries + t_.query + row + r] =
          static_cast<float>(maxima[i][lane] * kLn2) + __builtin_logf(totals[i][lane]);
    }
  }

  // Queries are left operands where they are, but for the last rows of a sequence.
  const uint16_t* queries_of(int64_t row, int64_t count, int64_t& stride) {
    if (count >= kTileSide) {
      stride = 2 * p_.q_token;
      return &query(row)->bits;
    }
    stride = 2 * p_.size;
    std::memset(b_.queries, 0, kTileSide * stride);
    for (int64_t i = 0; i < count; ++i) std::memcpy(b_.queries + i * p_.size, query(row + i), stride);
    return b_.queries;
  }

  template <int Lefts>
  void score(int64_t row, int64_t count) {
    int64_t strides[2] = {};
    const uint16_t* queries[2] = {queries_of(row, count, strides[0]), nullptr};
    if (Lefts == 2) queries[1] = queries_of(row + kTileSide, count - kTileSide, strides[1]);
    memory_fence();
    constexpr int64_t kStride = kAmxScoreStride * sizeof(float);
    const int64_t key_tile = depth_ * kTileWords;
    for (int64_t j = 0; j < length_; j += 2 * kTileSide) {
      const uint32_t* keys = keys_ + j / kTileSide * key_tile;
      _tile_zero(4);
      _tile_zero(5);
      _tile_zero(6);
      _tile_zero(7);
      for (int64_t k = 0; k < depth_; ++k) {
        _tile_loadd(0, queries[0] + k * kTileDepth, strides[0]);
        _tile_loadd(2, keys + k * kTileWords, kTileLine);
        _tile_dpbf16ps(4, 0, 2);
        _tile_loadd(3, keys + k * kTileWords + key_tile, kTileLine);
        _tile_dpbf16ps(5, 0, 3);
        if constexpr (Lefts == 2) {
          _tile_loadd(1, queries[1] + k * kTileDepth, strides[1]);
          _tile_dpbf16ps(6, 1, 2);
          _tile_dpbf16ps(7, 1, 3);
        }
      }
      _tile_stored(4, b_.scores + j, kStride);
      _tile_stored(5, b_.scores + j + kTileSide, kStride);
      if constexpr (Lefts == 2) {
        _tile_stored(6, b_.scores + kTileSide * kAmxScoreStride + j, kStride);
        _tile_stored(7, b_.scores + kTileSide * kAmxScoreStride + j + kTileSide, kStride);
      }
    }
  }

  // Scores of 16 rows to probabilities times their total, as bf16 in the place of the first half of the scores.
  void softmax(float* scores, Vec& maxima, Vec& totals) {
    const int64_t end = steps_ * kTileDepth;
    if (length_ < end)
      for (int64_t r = 0; r < kTileSide; ++r)
        for (int64_t j = length_ / kTileSide * kTileSide; j < end; j += kTileSide) {
          float* score = scores + r * kAmxScoreStride + j;
          store(score, first_lanes(length_ - j, load(score), splat(kMinusInfinity)));
        }
    Vec rows[kTileSide];
    for (Vec& row : rows) row = splat(kMinusInfinity);
    for (int64_t j = 0; j < end; j += kTileSide)
#pragma GCC unroll 16
      for (int r = 0; r < kTileSide; ++r) rows[r] = maximum(load(scores + r * kAmxScoreStride + j), rows[r]);
    maxima = combine_rows(rows, [](Vec a, Vec b) { return maximum(a, b); }) * factor_;
    float top[kTileSide];
    store(top, maxima);
    const bool exact = p_.lse != nullptr;
    for (int r = 0; r < kTileSide; ++r) {
      float* row = scores + r * kAmxScoreStride;
      rows[r] = exact ? probabilities(row, top[r], end, [](Vec x) { return exp2(x); })
                      : probabilities(row, top[r], end, [](Vec x) { return exp2_to_bf16(x); });
    }
    totals = combine_rows(rows, [](Vec a, Vec b) { return a + b; });
  }

  template <class Exp>
  Vec probabilities(float* row, float top, int64_t end, Exp exp) const {
    const Vec factor = splat(factor_), subtrahend = splat(top);
    Vec totals[2] = {};
    float* words = row;
    for (int64_t j = 0; j < end; j += kTileDepth, words += kTileSide) {
      const Vec low = exp(load(row + j) * factor - subtrahend);
      const Vec high = exp(load(row + j + kTileSide) * factor - subtrahend);
      totals[0] += low;
      totals[1] += high;
      _mm512_storeu_si512(words, to_bf16_pair(low, high));
    }
    return totals[0] + totals[1];
  }

  void write(int64_t row, int64_t count, int tile, int64_t d, Vec inverse) {
    const float* sums = b_.sums + 2 * tile * kTileWords;
    Bf16* out = static_cast<Bf16*>(p_.out) + ((t_.query + row) * p_.heads + t_.head) * p_.size + d;
    for (int64_t r = 0; r < kTileSide && r < count; ++r, out += p_.heads * p_.size)
      _mm512_storeu_si512(out, to_bf16_pair(load(sums + r * kTileSide) * inverse[r],
                                            load(sums + kTileWords + r * kTileSide) * inverse[r]));
  }

  WholeBuffers& b_;
  int64_t depth_, value_step_, steps_;
  float factor_;
  uint32_t *keys_, *values_;
};

}  // namespace
}  // namespace minilm_fast
