#pragma once

// The kernels behind decode_kernels_<isa>, compiled once for each instruction set.

#include "attention_tile.h"
#include "decode_attention.h"
#include "relative_bias.h"

namespace minilm_fast {
namespace {

template <class T>
inline const T* at_row(const void* base, int64_t row, int64_t row_stride, int64_t head, int64_t head_stride) {
  return static_cast<const T*>(base) + row * row_stride + head * head_stride;
}

template <class From, class To>
inline void convert_row(const From* from, int64_t size, To* to) {
  for (int64_t d = 0; d < size; d += kLanes) store_first(to + d, load_first(from + d, size - d), size - d);
}

// Scratch memory, in floats, of a DecodeHead.
inline int64_t decode_scratch(const DecodeProblem& problem, int64_t) {
  const int64_t bias = problem.relative_bias == nullptr ? 0 : 2 * problem.distance_limit + 1 + 2 * kLanes;
  return problem.size * kScoreStride + kKeyBlock * round_up(problem.size, kLanes) + bias;
}

// The rows of a group at one head, and where their keys are. T: storage of the rows, C: of the caches.
template <class T, class C>
class DecodeRows {
 protected:
  // `next`: the group that is worked on after this one, at `next_head`; null if none is.
  DecodeRows(const DecodeProblem& problem, const DecodeGroup& group, int64_t head, const DecodeGroup* next,
             int64_t next_head)
      : p_(problem),
        g_(group),
        head_(head),
        next_(next),
        next_head_(next_head),
        rows_(static_cast<int>((group.beam_end - group.beam_begin) * problem.rows)) {}

  int64_t row_index(int64_t beam, int64_t row) const { return (g_.example * p_.beams + beam) * p_.rows + row; }
  int64_t row_of_tile(int64_t r) const { return row_index(g_.beam_begin, 0) + r; }
  const T* query(int64_t r) const { return at_row<T>(p_.q, row_of_tile(r), p_.q_row, head_, p_.q_head); }
  T* out(int64_t r) const { return static_cast<T*>(p_.out) + (row_of_tile(r) * p_.heads + head_) * p_.size; }
  C* history(void* cache, int64_t step, int64_t beam) const { return history_of(g_, head_, cache, step, beam); }
  C* history_of(const DecodeGroup& group, int64_t head, void* cache, int64_t step, int64_t beam) const {
    const int64_t entry = (group.slot * p_.history_capacity + step) * p_.beams + beam;
    return static_cast<C*>(cache) + (entry * p_.heads + head) * p_.size;
  }
  const C* source(const void* cache) const { return source_of(g_, head_, cache); }
  const C* source_of(const DecodeGroup& group, int64_t head, const void* cache) const {
    return static_cast<const C*>(cache) + (group.slot * p_.heads + head) * p_.size * p_.source_capacity;
  }
  // The source of what is worked on next.
  Stream next_source() const {
    if (next_ == nullptr) return {};
    constexpr int64_t kBytes = sizeof(C);
    return {source_of(*next_, next_head_, p_.source_k),
            p_.size,
            p_.source_capacity * kBytes,
            next_->length * kBytes,
            source_of(*next_, next_head_, p_.source_v),
            next_->length * p_.size * kBytes};
  }
  const T* own_key(const TailEntry& entry) const {
    return at_row<T>(p_.k, row_index(entry.beam, entry.row), p_.k_row, head_, p_.k_head);
  }
  const T* own_value(const TailEntry& entry) const {
    return at_row<T>(p_.v, row_index(entry.beam, entry.row), p_.v_row, head_, p_.v_head);
  }

  // Row 0 of each beam leaves its key and value in the history.
  void remember() {
    for (int64_t beam = g_.beam_begin; beam < g_.beam_end; ++beam) {
      const TailEntry row{0, static_cast<int32_t>(beam), 0};
      convert_row(own_key(row), p_.size, history(p_.history_k, g_.step, beam));
      convert_row(own_value(row), p_.size, history(p_.history_v, g_.step, beam));
    }
  }

  const DecodeProblem& p_;
  const DecodeGroup& g_;
  int64_t head_;
  const DecodeGroup* next_;
  int64_t next_head_;
  int rows_;
};

template <class T, class C>
class DecodeHead : DecodeRows<T, C> {
  using Rows = DecodeRows<T, C>;
  using Rows::g_;
  using Rows::head_;
  using Rows::history;
  using Rows::out;
  using Rows::p_;
  using Rows::query;
  using Rows::rows_;
  using Rows::source;

 public:
  DecodeHead(const DecodeProblem& problem, const DecodeGroup& group, int64_t head, const DecodeGroup* next,
             int64_t next_head, float* scratch)
      : Rows(problem, group, head, next, next_head),
        stream_(this->next_source()),
        width_(round_up(problem.size, kLanes)),
        keys_(scratch),
        values_(keys_ + problem.size * kScoreStride),
        bias_(values_ + kKeyBlock * width_) {}

  void run(QueryTile& tile) {
    this->remember();
    if (p_.relative_bias == nullptr) return choose_rows(tile, nullptr);
    const DistanceBias bias(p_.relative_bias + head_ * (2 * p_.distance_limit + 1), p_.distance_limit, bias_);
    choose_rows(tile, &bias);
  }

 private:
  void choose_rows(QueryTile& tile, const DistanceBias* bias) {
    with_rows(rows_, [&](auto constant) { run_tile<decltype(constant)::value>(tile, bias); });
  }

  template <int Count>
  void run_tile(QueryTile& tile, const DistanceBias* bias) {
    set_queries(tile, [&](int64_t r) { return query(r); }, rows_, Count, p_.size, bias == nullptr ? p_.scale : 1.0);
    for (int64_t first = 0; first < g_.length; first += kKeyBlock) see_source<Count>(tile, first, bias);
    for (int64_t first = 0; first < g_.tail_count; first += kKeyBlock) see_tail<Count>(tile, first, bias);
    for (int r = 0; r < rows_; ++r) write_row(tile, r, p_.size, out(r));
  }

  template <int Count>
  void see_source(QueryTile& tile, int64_t first, const DistanceBias* bias) {
    const int64_t left = g_.length - first, count = left < kKeyBlock ? left : kKeyBlock;
    const C* keys = source(p_.source_k) + first;
    const C* values = source(p_.source_v) + first * p_.size;
    if (p_.size == width_) {
      const KeyBlock<C, C> block{keys, p_.source_capacity, values, p_.size, count};
      attend_source<Count>(tile, StreamedKeyBlock<C, C>{block, &stream_}, first, bias);
    } else {
      for (int64_t j = 0; j < count; ++j) convert_row(values + j * p_.size, p_.size, values_ + j * width_);
      const KeyBlock<C, float> block{keys, p_.source_capacity, values_, width_, count};
      attend_source<Count>(tile, StreamedKeyBlock<C, float>{block, &stream_}, first, bias);
    }
  }

  template <int Count, class Block>
  void attend_source(QueryTile& tile, const Block& block, int64_t first, const DistanceBias* bias) {
    compute_scores<Count>(tile, block, p_.size);
    for (int r = 0; r < rows_; ++r) {
      if (bias != nullptr) {
        float* scores = tile.scores + r * kScoreStride;
        const int64_t query = g_.length + g_.step + r % p_.rows;
        const float scale = static_cast<float>(p_.scale);
        for (int64_t j = 0; j < block.count; j += kLanes)
          store(scores + j, load(scores + j) * scale + bias->consecutive(first + j - query));
      }
      softmax_row(tile, r, block.count, block.count, p_.size);
    }
    add_values<Count>(tile, block, p_.size);
  }

  template <int Count>
  void see_tail(QueryTile& tile, int64_t first, const DistanceBias* bias) {
    const int64_t left = g_.tail_count - first, count = left < kKeyBlock ? left : kKeyBlock;
    gather_tail(first, count);
    const KeyBlock<float, float> block{keys_, kScoreStride, values_, width_, count};
    compute_scores<Count>(tile, block, p_.size);
    for (int r = 0; r < rows_; ++r) {
      float* scores = tile.scores + r * kScoreStride;
      const float* mask = g_.tail_mask + r * g_.tail_stride + first;
      for (int64_t j = 0; j < count; j += kLanes) {
        Vec score = load(scores + j);
        if (bias != nullptr)
          score = score * static_cast<float>(p_.scale) +
                  bias->between(g_.step + r % p_.rows, g_.tail_positions + first + j, count - j);
        store(scores + j, score + load(mask + j));
      }
      softmax_row(tile, r, count, count, p_.size);
    }
    add_values<Count>(tile, block, p_.size);
  }

  // Brings the entries [first, first + count) of the tail together in the scratch memory. They come from the
  // history in the cache's type, from this step's rows in the rows' type.
  void gather_tail(int64_t first, int64_t count) {
    for (int64_t j = 0; j < count; j += kLanes) {
      const int64_t lanes = count - j < kLanes ? count - j : kLanes;
      for (int64_t d = 0; d < p_.size; d += kLanes) {
        Vec square[kLanes] = {};
        for (int64_t i = 0; i < lanes; ++i) {
          const TailEntry& entry = g_.tail[first + j + i];
          square[i] = entry.row < 0 ? load_past(entry, p_.history_k, d) : load_own(this->own_key(entry), d);
          const Vec value = entry.row < 0 ? load_past(entry, p_.history_v, d) : load_own(this->own_value(entry), d);
          store(values_ + (j + i) * width_ + d, value);
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes && d + i < p_.size; ++i) store(keys_ + (d + i) * kScoreStride + j, square[i]);
      }
    }
  }

  Vec load_own(const T* row, int64_t d) const { return load_first(row + d, p_.size - d); }

  Vec load_past(const TailEntry& entry, void* cache, int64_t d) const {
    const C* row = history(cache, entry.step, entry.beam);
    prefetch(address_of(row + p_.size + d));  // the next head's
    return load_first(row + d, p_.size - d);
  }

  Stream stream_;
  int64_t width_;
  float *keys_, *values_, *bias_;
};

// Makes a Head of each of the pairs [begin, end) of `count`, see DecodeKernels, and calls f with it.
template <class Head, class F, class... Memory>
inline void for_heads(const DecodeProblem& problem, const DecodeGroup* groups, int64_t count, int64_t begin,
                      int64_t end, F f, Memory&... memory) {
  for (int64_t i = begin; i < end; ++i) {
    const DecodeGroup* next = i + 1 < count ? groups + (i + 1) / problem.heads : nullptr;
    f(Head(problem, groups[i / problem.heads], i % problem.heads, next, (i + 1) % problem.heads, memory...));
  }
}

template <class T, class C>
inline void attend_range(const DecodeProblem& problem, const DecodeGroup* groups, int64_t count, int64_t begin,
                         int64_t end, float* scratch) {
  QueryTile tile;
  for_heads<DecodeHead<T, C>>(problem, groups, count, begin, end, [&](auto&& head) { head.run(tile); }, scratch);
}

inline void attend(const DecodeProblem& problem, const DecodeGroup* groups, int64_t count, int64_t begin, int64_t end,
                   float* scratch) {
  if (problem.bf16 && problem.cache_bf16)
    attend_range<Bf16, Bf16>(problem, groups, count, begin, end, scratch);
  else if (problem.bf16)
    attend_range<Bf16, float>(problem, groups, count, begin, end, scratch);
  else if (problem.cache_bf16)
    attend_range<float, Bf16>(problem, groups, count, begin, end, scratch);
  else
    attend_range<float, float>(problem, groups, count, begin, end, scratch);
}

template <class T, class C>
inline void store_head(const StoreProblem& p, int64_t first, int64_t count, int64_t slot, int64_t head) {
  const int64_t cached = (slot * p.heads + head) * p.size * p.source_capacity;
  C* keys = static_cast<C*>(p.source_k) + cached;
  C* values = static_cast<C*>(p.source_v) + cached;
  write_transposed([&](int64_t j) { return at_row<T>(p.k, first + j, p.k_token, head, p.k_head); }, count, p.size, keys,
                   p.source_capacity);
  for (int64_t j = 0; j < count; ++j)
    convert_row(at_row<T>(p.v, first + j, p.v_token, head, p.v_head), p.size, values + j * p.size);
}

inline void store_source(const StoreProblem& p, int64_t first, int64_t count, int64_t slot, int64_t head) {
  if (p.bf16 && p.cache_bf16)
    store_head<Bf16, Bf16>(p, first, count, slot, head);
  else if (p.bf16)
    store_head<Bf16, float>(p, first, count, slot, head);
  else if (p.cache_bf16)
    store_head<float, Bf16>(p, first, count, slot, head);
  else
    store_head<float, float>(p, first, count, slot, head);
}

}  // namespace
}  // namespace minilm_fast
