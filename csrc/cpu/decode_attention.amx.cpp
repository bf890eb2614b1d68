#include <initializer_list>
#include <utility>

#include "amx_tile.h"
#include "decode_attention_kernel.h"

// A decoding step on matrix tiles. All keys that a group sees, of the source and of the tail, are columns of one matrix
// of scores. Columns are in blocks of 32: first the 16 even ones, then the odd ones, since so pairs of rows of the
// cache become operands without moving a number across a vector, and probabilities come back in order.

namespace minilm_fast {
namespace {

constexpr int64_t kBlock = kTileDepth;
constexpr int64_t kHalf = kTileSide;
// Takes the place of -infinity: differences are numbers, and their powers of two are zero.
constexpr float kHidden = -1e30f;

struct Buffers {
  alignas(64) uint32_t queries[kMaxHeadSize / kTileDepth * kTileWords];
  // Right operands of a block, two for every 32 dimensions; those of the next one are made while they are used.
  alignas(64) uint32_t operands[2][kMaxHeadSize / kTileDepth * 2 * kTileWords];
  alignas(64) float sums[4 * kTileWords];
  alignas(64) Bf16 asking[2][kTileSide * kMaxHeadSize];  // keys and values of the rows that are not kept
  float totals[kTileSide];
};

// Of a row of scores; an odd number of cache lines, as rows would otherwise share the sets of the cache.
int64_t score_stride(int64_t columns) { return (columns / kHalf | 1) * kHalf; }

// The even lanes of words of two rows, then the odd ones.
inline void store_pairs(BitVec a, BitVec b, uint32_t* even, uint32_t* odd) {
  store_words(even, (a & 0xffffu) | (b << 16));
  store_words(odd, (a >> 16) | (b & 0xffff0000u));
}

inline BitVec load_row(const Bf16* p, __mmask32 mask) {
  return reinterpret_cast<BitVec>(_mm512_maskz_loadu_epi16(mask, p));
}

// Adds the products of 16 rows with both right operands to tiles 4 and 5, or in odd turns to tiles 6 and 7: a product
// need not wait for the one before.
inline void multiply(bool odd, const void* rows, int64_t row_bytes, const uint32_t* operands) {
  _tile_loadd(0, rows, row_bytes);
  _tile_loadd(2, operands, kTileLine);
  _tile_loadd(3, operands + kTileWords, kTileLine);
  if (odd) {
    _tile_dpbf16ps(6, 0, 2);
    _tile_dpbf16ps(7, 0, 3);
  } else {
    _tile_dpbf16ps(4, 0, 2);
    _tile_dpbf16ps(5, 0, 3);
  }
}

inline void clear(bool odd) {
  if (odd) {
    _tile_zero(6);
    _tile_zero(7);
  } else {
    _tile_zero(4);
    _tile_zero(5);
  }
}

inline void store_sums(bool odd, float* to, int64_t tile, int64_t row_bytes) {
  if (odd) {
    _tile_stored(6, to, row_bytes);
    _tile_stored(7, to + tile, row_bytes);
  } else {
    _tile_stored(4, to, row_bytes);
    _tile_stored(5, to + tile, row_bytes);
  }
}

// T: storage of the rows. What is fp32 is rounded to bf16, as what it meets was before.
template <class T>
class AmxDecodeHead : DecodeRows<T, Bf16> {
  using HeadRows = DecodeRows<T, Bf16>;
  using HeadRows::g_;
  using HeadRows::history;
  using HeadRows::history_of;
  using HeadRows::next_;
  using HeadRows::next_head_;
  using HeadRows::out;
  using HeadRows::own_key;
  using HeadRows::own_value;
  using HeadRows::p_;
  using HeadRows::query;
  using HeadRows::rows_;
  using HeadRows::source;

 public:
  AmxDecodeHead(const DecodeProblem& problem, const DecodeGroup& group, int64_t head, const DecodeGroup* next,
                int64_t next_head, float* scratch, Buffers& buffers)
      : HeadRows(problem, group, head, next, next_head),
        b_(buffers),
        stream_(this->next_source()),
        depth_(problem.size / kTileDepth),
        source_columns_(round_up(group.length, kBlock)),
        columns_(source_columns_ + round_up(group.tail_count, kBlock)),
        stride_(score_stride(columns_)),
        parts_(columns_ / kBlock * (1 + depth_) + rows_),
        lines_(stream_.lines() / parts_ + 1),
        scores_(scratch) {}

  void run() {
    this->remember();
    if (p_.rows > 1)
      for (int64_t beam = g_.beam_begin; beam < g_.beam_end; ++beam) {
        const TailEntry row{0, static_cast<int32_t>(beam), 1};
        convert_row(own_key(row), p_.size, asking(0, row));
        convert_row(own_value(row), p_.size, asking(1, row));
      }
    pack_queries();
    score_columns();
    memory_fence();
    for (int r = 0; r < rows_; ++r) {
      fetch();
      softmax(r);
    }
    for (int64_t d = 0; d < p_.size; d += kTileDepth) add_values(d);
  }

 private:
  Bf16* asking(int which, const TailEntry& entry) const {
    return b_.asking[which] + (entry.beam - g_.beam_begin) * p_.size;
  }
  // Row 0 of this step is in the history by now.
  const Bf16* tail_key(int64_t i) const {
    const TailEntry& entry = g_.tail[i];
    return entry.row > 0 ? asking(0, entry) : history(p_.history_k, entry.step, entry.beam);
  }
  const Bf16* tail_value(int64_t i) const {
    const TailEntry& entry = g_.tail[i];
    return entry.row > 0 ? asking(1, entry) : history(p_.history_v, entry.step, entry.beam);
  }

  // As left operands, one for every 32 dimensions.
  void pack_queries() {
    for (int64_t k = 0; k < depth_; ++k)
      for (int64_t r = 0; r < kTileSide; ++r) {
        auto* to = reinterpret_cast<Bf16*>(b_.queries + k * kTileWords + r * kTileSide);
        if (r < rows_)
          convert_row(query(r) + k * kTileDepth, kTileDepth, to);
        else
          std::memset(to, 0, kTileLine);
      }
  }

  // Dimensions [32 k, 32 k + 32) of the keys of a block as two right operands.
  void pack_source_keys(int64_t first, int64_t k, uint32_t* to) const {
    const __mmask32 mask = first_bits<__mmask32>(p_.source_capacity - first);
    const Bf16* keys = source(p_.source_k) + k * kTileDepth * p_.source_capacity + first;
    for (int64_t i = 0; i < kTileSide; ++i, keys += 2 * p_.source_capacity, to += kTileSide) {
      const Bf16* next = keys + p_.source_capacity;
      store_pairs(load_row(keys, mask), load_row(next, mask), to, to + kTileWords);
    }
  }

  void pack_tail_keys(int64_t first, int64_t k, uint32_t* to) const {
    for (int64_t half = 0; half < 2; ++half, to += kTileWords) {
      Vec square[kTileSide] = {};
      for (int64_t i = 0; i < kTileSide; ++i) {
        const int64_t entry = first + 2 * i + half;
        if (entry < g_.tail_count) square[i] = reinterpret_cast<Vec>(load_row(tail_key(entry) + k * kTileDepth, ~0u));
      }
      transpose(square);
      std::memcpy(to, square, sizeof(square));
    }
  }

  // Fetches the next part of what is worked on next; more at once than the processor has room for would make it wait.
  void fetch() {
    if (next_ == nullptr) return;
    stream_.fetch(lines_);
    const int64_t entries = next_->tail_count, part = parts_done_++;
    for (int64_t i = entries * part / parts_; i < entries * (part + 1) / parts_; ++i) {
      const TailEntry& entry = next_->tail[i];
      if (entry.row >= 0) continue;
      for (void* cache : {p_.history_k, p_.history_v}) {
        const Bf16* row = history_of(*next_, next_head_, cache, entry.step, entry.beam);
        for (int64_t d = 0; d < p_.size; d += kTileDepth) prefetch(address_of(row + d));
      }
    }
  }

  void pack_keys(int64_t column, uint32_t* to) const {
    for (int64_t k = 0; k < depth_; ++k, to += 2 * kTileWords)
      if (column < source_columns_)
        pack_source_keys(column, k, to);
      else
        pack_tail_keys(column - source_columns_, k, to);
  }

  // Scores of all rows with all columns. A block's operands are made one turn before they are used, and its scores are
  // stored one turn after, so that nothing waits.
  void score_columns() {
    const int64_t blocks = columns_ / kBlock, bytes = stride_ * static_cast<int64_t>(sizeof(float));
    pack_keys(0, b_.operands[0]);
    for (int64_t n = 0; n < blocks; ++n) {
      fetch();
      if (n + 1 < blocks) pack_keys((n + 1) * kBlock, b_.operands[(n + 1) % 2]);
      memory_fence();
      clear(n % 2);
      for (int64_t k = 0; k < depth_; ++k)
        multiply(n % 2, b_.queries + k * kTileWords, kTileLine, b_.operands[n % 2] + k * 2 * kTileWords);
      if (n > 0) store_sums((n - 1) % 2, scores_ + (n - 1) * kBlock, kHalf, bytes);
    }
    store_sums((blocks - 1) % 2, scores_ + (blocks - 1) * kBlock, kHalf, bytes);
  }

  // Of a row, hides what it does not see; returns the largest score.
  float hide(int row) {
    float* scores = scores_ + row * stride_;
    Vec most[2] = {splat(kHidden), splat(kHidden)};
    int64_t j = 0;
    for (; j + kBlock <= g_.length; j += kBlock)
      for (int half = 0; half < 2; ++half) most[half] = maximum(most[half], load(scores + j + half * kHalf));
    if (j < source_columns_) {
      const int64_t left = g_.length - j;
      for (int64_t half = 0; half < 2; ++half) {
        float* score = scores + j + half * kHalf;
        const Vec seen = first_lanes((left + 1 - half) / 2, load(score), splat(kHidden));
        store(score, seen);
        most[half] = maximum(most[half], seen);
      }
    }
    IntVec even, odd;
    for (int i = 0; i < kLanes; ++i) {
      even[i] = 2 * i;
      odd[i] = 2 * i + 1;
    }
    const float* mask = g_.tail_mask + row * g_.tail_stride;
    for (int64_t i = 0; i < g_.tail_count; i += kBlock, scores += kBlock) {
      const Vec first = load(mask + i);
      const Vec second = i + kHalf < g_.tail_stride ? load(mask + i + kHalf) : splat(kMinusInfinity);
      for (int half = 0; half < 2; ++half) {
        float* score = scores + source_columns_ + half * kHalf;
        const Vec hidden = shuffle(first, second, half == 0 ? even : odd);
        const Vec seen = hidden == Vec{} ? load(score) : splat(kHidden);
        store(score, seen);
        most[half] = maximum(most[half], seen);
      }
    }
    return largest(maximum(most[0], most[1]));
  }

  // Scores of a row to probabilities times their total, as bf16 in the place of the first half of the scores.
  void softmax(int row) {
    const float unit = static_cast<float>(p_.scale / kLn2);
    const Vec factor = splat(unit), subtrahend = splat(hide(row) * unit);
    float* scores = scores_ + row * stride_;
    float* words = scores;
    Vec totals[2] = {};
    for (int64_t j = 0; j < columns_; j += kBlock, words += kHalf) {
      const Vec p = exp2_to_bf16(load(scores + j) * factor - subtrahend);
      const Vec q = exp2_to_bf16(load(scores + j + kHalf) * factor - subtrahend);
      totals[0] += p;
      totals[1] += q;
      store(words, reinterpret_cast<Vec>(to_words(p, q)));
    }
    b_.totals[row] = sum(totals[0] + totals[1]);
  }

  // Dimensions [d, d + 32) of a block's values as two right operands; what is beyond the last is zero, as it may be no
  // number.
  void pack_values_of(int64_t column, int64_t d, uint32_t* to) const {
    const bool in_source = column < source_columns_;
    const int64_t first = in_source ? column : column - source_columns_;
    const int64_t left = (in_source ? g_.length : g_.tail_count) - first;
    const Bf16* values = source(p_.source_v) + first * p_.size + d;
    auto row = [&](int64_t i) {
      if (i >= left) return BitVec{};
      if (!in_source) return load_row(tail_value(first + i) + d, ~0u);
      return load_row(values + i * p_.size, ~0u);
    };
    for (int64_t i = 0; i < kBlock; i += 2, to += kTileSide) store_pairs(row(i), row(i + 1), to, to + kTileWords);
  }

  // Dimensions [d, d + 32) of the result.
  void add_values(int64_t d) {
    const int64_t blocks = columns_ / kBlock;
    clear(false);
    clear(true);
    pack_values_of(0, d, b_.operands[0]);
    for (int64_t n = 0; n < blocks; ++n) {
      fetch();
      if (n + 1 < blocks) pack_values_of((n + 1) * kBlock, d, b_.operands[(n + 1) % 2]);
      memory_fence();
      multiply(n % 2, scores_ + n * kHalf, stride_ * sizeof(float), b_.operands[n % 2]);
    }
    store_sums(false, b_.sums, kTileWords, kTileLine);
    store_sums(true, b_.sums + 2 * kTileWords, kTileWords, kTileLine);
    memory_fence();
    const auto [low, high] = interleaving();
    for (int r = 0; r < rows_; ++r) {
      const Vec factor = splat(1.0f / b_.totals[r]);
      const float* sums = b_.sums + r * kTileSide;
      const Vec even = (load(sums) + load(sums + 2 * kTileWords)) * factor;
      const Vec odd = (load(sums + kTileWords) + load(sums + 3 * kTileWords)) * factor;
      store(out(r) + d, shuffle(even, odd, low));
      store(out(r) + d + kHalf, shuffle(even, odd, high));
    }
  }

  // Even and odd lanes to the two halves of a row.
  static std::pair<IntVec, IntVec> interleaving() {
    IntVec low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i / 2 + i % 2 * kLanes;
      high[i] = low[i] + kLanes / 2;
    }
    return {low, high};
  }

  Buffers& b_;
  Stream stream_;
  int64_t depth_, source_columns_, columns_, stride_;
  int64_t parts_, lines_, parts_done_ = 0;  // of what fetch brings
  float* scores_;                           // [16, stride]
};

int64_t scratch_of(const DecodeProblem&, int64_t keys) {
  return kTileSide * score_stride(round_up(keys, kBlock) + kBlock);
}

void attend_tiles(const DecodeProblem& problem, const DecodeGroup* groups, int64_t count, int64_t begin, int64_t end,
                  float* scratch) {
  Buffers buffers;
  TileRegisters registers;
  auto run = [](auto&& head) { head.run(); };
  if (problem.bf16)
    for_heads<AmxDecodeHead<Bf16>>(problem, groups, count, begin, end, run, scratch, buffers);
  else
    for_heads<AmxDecodeHead<float>>(problem, groups, count, begin, end, run, scratch, buffers);
}

}  // namespace

DecodeKernels decode_kernels_amx() { return {kTileSide, scratch_of, attend_tiles}; }

}  // namespace minilm_fast
