#include "amx_tile.h"
#include "attention_backward_kernel.h"

namespace minilm_fast {
namespace {

// All products have keys or dimensions as rows, so that a vector holds 16 queries of one key and no product needs a
// transposed matrix of probabilities: S' = K Q', dP' = V dO', dV += P' dO, dK += dS' Q, dQ' += K' dS'.
constexpr int64_t kStep = 2 * kTileSide;  // keys, or queries, of one square of scores
constexpr int64_t kQueryChunk = 256;      // queries whose products with a block of keys are added up in a go
constexpr int64_t kChunkSteps = kQueryChunk / kStep;
constexpr int64_t kBlockSteps = kDropoutBlock / kStep;
constexpr int64_t kPairWords = kStep * kTileSide;  // a square of bf16, two to a word

// sums[2][2] (+)= left[2] * right[2] over `steps` tiles, in registers 4 to 7.
inline void zero_sums() {
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}

inline void load_sums(const float* p, int64_t stride) {
  _tile_loadd(4, p, stride * sizeof(float));
  _tile_loadd(5, p + kTileSide, stride * sizeof(float));
  _tile_loadd(6, p + kTileSide * stride, stride * sizeof(float));
  _tile_loadd(7, p + kTileSide * stride + kTileSide, stride * sizeof(float));
}

inline void store_sums(float* p, int64_t stride) {
  _tile_stored(4, p, stride * sizeof(float));
  _tile_stored(5, p + kTileSide, stride * sizeof(float));
  _tile_stored(6, p + kTileSide * stride, stride * sizeof(float));
  _tile_stored(7, p + kTileSide * stride + kTileSide, stride * sizeof(float));
}

inline void multiply_pairs(const uint32_t* left0, const uint32_t* left1, const uint32_t* right0,
                           const uint32_t* right1) {
  _tile_loadd(0, left0, kTileLine);
  _tile_loadd(2, right0, kTileLine);
  _tile_dpbf16ps(4, 0, 2);
  _tile_loadd(3, right1, kTileLine);
  _tile_dpbf16ps(5, 0, 3);
  _tile_loadd(1, left1, kTileLine);
  _tile_dpbf16ps(6, 1, 2);
  _tile_dpbf16ps(7, 1, 3);
}

// Which of 16 rows keep each of 128 columns: bit r of kept[column] for row + r.
inline void dropout_columns(const Dropout& dropout, int64_t stream, int64_t row, int64_t block, __mmask16* kept) {
  const __m512i last = _mm512_set1_epi32(static_cast<int>(last_dropped(dropout)));
  const uint64_t c2 = static_cast<uint32_t>(stream);
  for (int64_t lane = 0; lane < 16; ++lane) {
    const uint64_t c0 = static_cast<uint32_t>(16 * block + lane);
    BitVec words[4];
    philox_words(
        dropout, ascending(row),
        [&](WideVec c1) { return PhiloxState<uint64_t, WideVec, uint64_t, uint64_t>{c0, c1, c2, 0}; }, words);
    for (int i = 0; i < 4; ++i) {
      kept[lane + 32 * i] = _mm512_cmpgt_epu32_mask(reinterpret_cast<__m512i>(words[i] << 16), last);
      kept[lane + 32 * i + 16] = _mm512_cmpgt_epu32_mask(reinterpret_cast<__m512i>(words[i]), last);
    }
  }
}

// Takes words from memory in turn.
class Words {
 public:
  explicit Words(float* memory) : next_(reinterpret_cast<uint32_t*>(memory)) {}
  uint32_t* words(int64_t count) {
    uint32_t* taken = next_;
    next_ += round_up(count, kTileSide);
    return taken;
  }
  float* floats(int64_t count) { return reinterpret_cast<float*>(words(count)); }

 private:
  uint32_t* next_;
};

// What a square of scores needs of its queries.
struct QueryStep {
  Vec lse[2], delta[2];  // lse as an exponent of two
  IntVec prefix[2];      // keys that a query sees, 0 for one that is not there
  int64_t least, most;   // of the prefixes
};

struct SquareBuffers {
  alignas(64) float scores[kStep * kStep];     // [keys, queries]
  alignas(64) float gradients[kStep * kStep];  // of the probabilities
  alignas(64) __mmask16 kept[kQueryChunk / kTileSide][kDropoutBlock];
  QueryStep queries[kChunkSteps];
  int active[kChunkSteps];  // steps of queries of which one sees one of the keys at hand
};

class AmxAttentionHeadBackward : AttentionRows<Bf16> {
 public:
  AmxAttentionHeadBackward(const AttentionProblem& problem, const AttentionGradients& gradients,
                           const AttentionTask& task, float* bias_gradient, float* scratch, SquareBuffers& buffers)
      : AttentionRows(problem, task),
        g_(gradients),
        b_(buffers),
        wide_(round_up(problem.size, kTileDepth)),
        depth_(wide_ / kTileDepth),
        sides_(wide_ / kTileSide),
        keys_(round_up(length_, kStep)),
        bins_(2 * problem.distance_limit + 1),
        bias_gradient_(bias_gradient),
        memory_(scratch),
        dk_(memory_.floats(keys_ * wide_)),
        dv_(memory_.floats(keys_ * wide_)),
        k_rows_(memory_.words(keys_ * wide_ / 2)),
        v_rows_(memory_.words(keys_ * wide_ / 2)),
        k_columns_(memory_.words(keys_ * wide_ / 2)),
        q_columns_(memory_.words(kQueryChunk * wide_ / 2)),
        o_columns_(memory_.words(kQueryChunk * wide_ / 2)),
        q_values_(memory_.words(kQueryChunk * wide_ / 2)),
        o_values_(memory_.words(kQueryChunk * wide_ / 2)),
        dq_(memory_.floats(kQueryChunk * wide_)),
        dq_columns_(memory_.floats(kQueryChunk * wide_)),
        p_words_(memory_.words(kChunkSteps * kPairWords)),
        ds_words_(memory_.words(kChunkSteps * kPairWords)),
        ds_pairs_(memory_.words(kBlockSteps * kChunkSteps * kPairWords)) {}

  void run() {
    std::memset(dk_, 0, sizeof(float) * keys_ * wide_);
    std::memset(dv_, 0, sizeof(float) * keys_ * wide_);
    if (t_.row_begin < t_.row_end) {
      pack_keys(visible_keys(t_.row_begin, t_.row_end));
      p_.relative_bias == nullptr ? run_rows(nullptr, nullptr) : run_with_bias();
    } else if (bias_gradient_ != nullptr) {
      std::memset(bias_gradient_, 0, sizeof(float) * bins_);
    }
    for (int64_t j = 0; j < length_; ++j) {
      write(dk_ + j * wide_, scale_, static_cast<Bf16*>(g_.k) + (t_.first + j) * g_.k_token + t_.head * p_.size);
      write(dv_ + j * wide_, 1.0f, static_cast<Bf16*>(g_.v) + (t_.first + j) * g_.v_token + t_.head * p_.size);
    }
  }

 private:
  void pack_keys(int64_t keys) {
    for (int64_t j = 0; j < keys; j += kStep) {
      const int64_t count = keys - j < kStep ? keys - j : kStep;
      for (int64_t i = 0; i < kStep; i += kTileSide) {
        const int64_t to = (j + i) * wide_ / 2;
        pack_rows([&](int64_t r) { return key(j + i + r); }, rows_of(count, i), p_.size, k_rows_ + to);
        pack_rows([&](int64_t r) { return value(j + i + r); }, rows_of(count, i), p_.size, v_rows_ + to);
      }
      uint32_t* columns = k_columns_ + j * wide_ / 2;
      std::memset(columns, 0, kStep * wide_ / 2 * sizeof(uint32_t));
      pack_values([&](int64_t r) { return key(j + r); }, count, p_.size, columns);
      for (int64_t d = 0; d < sides_; ++d) transpose_tile(columns + d * kTileWords);
    }
  }

  static int64_t rows_of(int64_t count, int64_t first) {
    const int64_t left = count - first;
    return left < 0 ? 0 : left < kTileSide ? left : kTileSide;
  }

  static void transpose_tile(void* tile) {
    Vec square[kTileSide];
    std::memcpy(square, tile, sizeof(square));
    transpose(square);
    std::memcpy(tile, square, sizeof(square));
  }

  // Vectors run over the queries, so the bias by distance from the key to the query is needed: from the other end.
  void run_with_bias() {
    float *reversed = memory_.floats(bins_), *table = memory_.floats(DistanceBias::floats(p_.distance_limit));
    const float* head = p_.relative_bias + t_.head * bins_;
    for (int64_t i = 0; i < bins_; ++i) reversed[i] = head[bins_ - 1 - i];
    const DistanceBias bias(reversed, p_.distance_limit, table);
    DistanceSums sums(p_.distance_limit, memory_.floats(DistanceBias::floats(p_.distance_limit)));
    run_rows(&bias, bias_gradient_ == nullptr ? nullptr : &sums);
    if (bias_gradient_ == nullptr) return;
    sums.write(reversed);
    for (int64_t i = 0; i < bins_; ++i) bias_gradient_[i] = reversed[bins_ - 1 - i];
  }

  void write(const float* from, float factor, Bf16* to) const {
    for (int64_t d = 0; d < p_.size; d += kLanes) store_first(to + d, load(from + d) * factor, p_.size - d);
  }

  const Bf16* grad_out(int64_t row) const {
    return static_cast<const Bf16*>(g_.grad_out) + (t_.query + row) * g_.grad_out_token + t_.head * g_.grad_out_head;
  }

  void run_rows(const DistanceBias* bias, DistanceSums* sums) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kQueryChunk) {
      const int64_t left = t_.row_end - row;
      run_chunk(row, left < kQueryChunk ? left : kQueryChunk, bias, sums);
    }
  }

  void run_chunk(int64_t row, int64_t rows, const DistanceBias* bias, DistanceSums* sums) {
    const int64_t steps = round_up(rows, kStep) / kStep;
    std::memset(dq_, 0, sizeof(float) * rows * wide_);
    std::memset(dq_columns_, 0, sizeof(float) * kQueryChunk * wide_);
    for (int64_t s = 0; s < steps; ++s) take_step(s, row + s * kStep, rows - s * kStep, bias, sums);
    const int64_t keys = visible_keys(row, row + rows);
    for (int64_t first = 0; first < keys; first += kDropoutBlock) {
      if (drops())
        for (int64_t r = 0; r < rows; r += kTileSide)
          dropout_columns(dropout_, t_.head, t_.query + row + r, first / kDropoutBlock, b_.kept[r / kTileSide]);
      const int64_t left = keys - first < kDropoutBlock ? keys - first : kDropoutBlock;
      for (int64_t j = 0; j < left; j += kStep) see_keys(row, steps, first + j, bias, sums);
      for (int64_t s = 0; s < steps; ++s) add_to_queries(s, first, left);
    }
    for (int64_t r = 0; r < rows; r += kTileSide) write_queries(row, r, rows_of(rows, r));
  }

  // Packs 32 queries, of which `left` or all are there, and what is known of them.
  void take_step(int64_t s, int64_t row, int64_t left, const DistanceBias* bias, DistanceSums* sums) {
    const int64_t rows = left < kStep ? left : kStep, at = s * kStep * wide_ / 2;
    for (int64_t i = 0; i < kStep; i += kTileSide) {
      const int64_t to = at + i * wide_ / 2;
      pack_columns_of([&](int64_t r) { return query(row + i + r); }, rows_of(rows, i), q_columns_ + to);
      pack_columns_of([&](int64_t r) { return grad_out(row + i + r); }, rows_of(rows, i), o_columns_ + to);
    }
    pack_values([&](int64_t r) { return query(row + r); }, rows, p_.size, q_values_ + at);
    pack_values([&](int64_t r) { return grad_out(row + r); }, rows, p_.size, o_values_ + at);
    float lse[kStep] = {}, delta[kStep] = {};
    int32_t prefixes[kStep] = {};
    QueryStep& step = b_.queries[s];
    step.least = rows < kStep ? 0 : length_;
    step.most = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = t_.query + row + r, seen = prefix(row + r);
      delta[r] =
          dot(static_cast<const Bf16*>(g_.out) + index * g_.out_token + t_.head * g_.out_head, grad_out(row + r));
      lse[r] = static_cast<float>(g_.lse[t_.head * p_.queries + index] / kLn2);
      prefixes[r] = static_cast<int32_t>(seen);
      step.least = seen < step.least ? seen : step.least;
      step.most = seen > step.most ? seen : step.most;
      if (is_pseudo(row + r)) see_itself(row + r, dq_ + (s * kStep + r) * wide_, lse[r], delta[r], bias, sums);
    }
    std::memcpy(step.lse, lse, sizeof(lse));
    std::memcpy(step.delta, delta, sizeof(delta));
    std::memcpy(step.prefix, prefixes, sizeof(prefixes));
  }

  template <class Rows>
  void pack_columns_of(Rows rows, int64_t count, uint32_t* to) const {
    pack_rows(rows, count, p_.size, to);
    for (int64_t d = 0; d < depth_; ++d) transpose_tile(to + d * kTileWords);
  }

  float dot(const Bf16* a, const Bf16* b) const {
    Vec total = {};
    for (int64_t d = 0; d < p_.size; d += kLanes)
      total += load_first(a + d, p_.size - d) * load_first(b + d, p_.size - d);
    return sum(total);
  }

  // to += factor * from
  void add_multiple(float* to, const Bf16* from, float factor) const {
    for (int64_t d = 0; d < p_.size; d += kLanes)
      store(to + d, load(to + d) + load_first(from + d, p_.size - d) * factor);
  }

  // A pseudo row's own key, which is not among those that its prefix counts.
  void see_itself(int64_t row, float* dq, float lse, float delta, const DistanceBias* bias, DistanceSums* sums) {
    float score = dot(query(row), key(row)) * scale_;
    if (bias != nullptr) score += bias->at(0);
    const float p = exp2(splat(static_cast<float>(score / kLn2) - lse))[0], factor = own_factor(row);
    const float ds = p * (factor * dot(grad_out(row), value(row)) - delta);
    add_multiple(dv_ + row * wide_, grad_out(row), p * factor);
    add_multiple(dk_ + row * wide_, query(row), ds);
    add_multiple(dq, key(row), ds);
    if (sums != nullptr) sums->add(0, ds);
  }

  // Keys [first, first + 32) with all the queries of the chunk.
  void see_keys(int64_t row, int64_t steps, int64_t first, const DistanceBias* bias, DistanceSums* sums) {
    int count = 0;
    for (int64_t s = 0; s < steps; ++s) {
      if (b_.queries[s].most <= first) continue;
      multiply_square(k_rows_ + first * wide_ / 2, q_columns_ + s * kStep * wide_ / 2, b_.scores);
      multiply_square(v_rows_ + first * wide_ / 2, o_columns_ + s * kStep * wide_ / 2, b_.gradients);
      memory_fence();
      uint32_t* pairs = ds_pairs_ + (s * kBlockSteps + first % kDropoutBlock / kStep) * kPairWords;
      if (bias != nullptr) add_bias(row + s * kStep, first, *bias);
      differentiate(s, count, first, bias != nullptr, pairs, sums != nullptr);
      if (sums != nullptr) add_to_bias(row + s * kStep, first, *sums);
      b_.active[count++] = static_cast<int>(s);
    }
    memory_fence();
    add_to_keys(p_words_, o_values_, count, dv_ + first * wide_);
    add_to_keys(ds_words_, q_values_, count, dk_ + first * wide_);
    memory_fence();
  }

  void multiply_square(const uint32_t* left, const uint32_t* right, float* to) const {
    const int64_t next = depth_ * kTileWords;
    zero_sums();
    for (int64_t d = 0; d < depth_; ++d, left += kTileWords, right += kTileWords)
      multiply_pairs(left, left + next, right, right + next);
    store_sums(to, kStep);
  }

  // Scales the scores and adds the biases; the positions of queries that are not there are not read.
  void add_bias(int64_t row, int64_t first, const DistanceBias& bias) {
    const int32_t* positions = p_.positions + t_.first;
    for (int64_t j = 0; j < kStep && first + j < length_; ++j)
      for (int64_t i = 0; i < kStep && row + i < t_.row_end; i += kTileSide) {
        float* scores = b_.scores + j * kStep + i;
        const int64_t left = t_.row_end - row - i;
        store(scores, load(scores) * scale_ + bias.between(positions[first + j], positions + row + i, left));
      }
  }

  void add_to_bias(int64_t row, int64_t first, DistanceSums& sums) const {
    const int32_t* positions = p_.positions + t_.first;
    for (int64_t j = 0; j < kStep && first + j < length_; ++j)
      for (int64_t i = 0; i < kStep && row + i < t_.row_end; i += kTileSide)
        sums.add(positions[first + j], positions + row + i, t_.row_end - row - i, load(b_.gradients + j * kStep + i));
  }

  void differentiate(int64_t s, int place, int64_t first, bool biased, uint32_t* pairs, bool keep) {
    const bool whole = b_.queries[s].least >= first + kStep;
    if (drops())
      whole && !keep ? differentiate_square<true, false>(s, place, first, biased, pairs)
                     : differentiate_square<true, true>(s, place, first, biased, pairs);
    else
      whole && !keep ? differentiate_square<false, false>(s, place, first, biased, pairs)
                     : differentiate_square<false, true>(s, place, first, biased, pairs);
  }

  // Scores and gradients of the probabilities of a square to probabilities times dropout factors and gradients of the
  // scores. As left operands: for each key the words of queries i and i + 16. As right ones: for each query those of
  // keys i and i + 16. With Masked, what a query does not see is zero, and the gradients are kept in fp32 too.
  template <bool Drops, bool Masked>
  void differentiate_square(int64_t s, int place, int64_t first, bool biased, uint32_t* pairs) {
    const QueryStep& step = b_.queries[s];
    const Vec unit = splat(static_cast<float>((biased ? 1.0 : p_.scale) / kLn2));
    const __m512 kept_scale = _mm512_set1_ps(dropout_.scale);
    uint32_t *p_words = p_words_ + place * kPairWords, *ds_words = ds_words_ + place * kPairWords;
    for (int64_t j = 0; j < kTileSide; ++j) {
      Vec p[2][2], ds[2][2];
      for (int64_t k = 0; k < 2; ++k)
        for (int64_t i = 0; i < 2; ++i) {
          const int64_t at = (j + k * kTileSide) * kStep + i * kTileSide, key = first + j + k * kTileSide;
          p[k][i] = exp2(load(b_.scores + at) * unit - step.lse[i]);
          Vec gradient = load(b_.gradients + at);
          if constexpr (Masked) p[k][i] = IntVec{} + static_cast<int32_t>(key) < step.prefix[i] ? p[k][i] : Vec{};
          if constexpr (Drops) {
            const __mmask16 kept = b_.kept[2 * s + i][key % kDropoutBlock];
            gradient = _mm512_maskz_mul_ps(kept, gradient, kept_scale);
            ds[k][i] = p[k][i] * (gradient - step.delta[i]);
            p[k][i] = _mm512_maskz_mul_ps(kept, p[k][i], kept_scale);
          } else {
            ds[k][i] = p[k][i] * (gradient - step.delta[i]);
          }
          if constexpr (Masked) store(b_.gradients + at, ds[k][i]);
        }
      for (int64_t k = 0; k < 2; ++k) {
        store_words(p_words + (j + k * kTileSide) * kTileSide, to_words(p[k][0], p[k][1]));
        store_words(ds_words + (j + k * kTileSide) * kTileSide, to_words(ds[k][0], ds[k][1]));
        store_words(pairs + k * kTileWords + j * kTileSide, to_words(ds[0][k], ds[1][k]));
      }
    }
  }

  // Adds words [steps, keys, queries] times the rows of the active steps of queries to 32 rows of keys.
  void add_to_keys(const uint32_t* words, const uint32_t* values, int steps, float* to) const {
    for (int64_t d = 0; d < sides_; d += 2) {
      load_sums(to + d * kTileSide, wide_);
      for (int i = 0; i < steps; ++i) {
        const uint32_t* left = words + i * kPairWords;
        const uint32_t* right = values + b_.active[i] * kStep * wide_ / 2 + d * kTileWords;
        multiply_pairs(left, left + kTileWords, right, right + kTileWords);
      }
      store_sums(to + d * kTileSide, wide_);
    }
  }

  // Adds the products of `keys` keys from `first` on with gradients of scores to 32 columns of the queries' gradient.
  void add_to_queries(int64_t s, int64_t first, int64_t keys) {
    const int64_t seen = b_.queries[s].most - first, end = seen < keys ? seen : keys;
    if (end <= 0) return;
    memory_fence();
    for (int64_t d = 0; d < sides_; d += 2) {
      float* to = dq_columns_ + d * kTileSide * kQueryChunk + s * kStep;
      load_sums(to, kQueryChunk);
      for (int64_t j = 0; j < end; j += kStep) {
        const uint32_t* left = k_columns_ + (first + j) * wide_ / 2 + d * kTileWords;
        const uint32_t* right = ds_pairs_ + (s * kBlockSteps + j / kStep) * kPairWords;
        multiply_pairs(left, left + kTileWords, right, right + kTileWords);
      }
      store_sums(to, kQueryChunk);
    }
    memory_fence();
  }

  // Writes the gradient of 16 queries from `r` of the chunk on, of which `rows` are there.
  void write_queries(int64_t row, int64_t r, int64_t rows) {
    for (int64_t d = 0; d < wide_; d += kTileSide) {
      Vec square[kTileSide];
      for (int64_t i = 0; i < kTileSide; ++i) square[i] = load(dq_columns_ + (d + i) * kQueryChunk + r);
      transpose(square);
      for (int64_t i = 0; i < rows; ++i) {
        float* to = dq_ + (r + i) * wide_ + d;
        store(to, load(to) + square[i]);
      }
    }
    for (int64_t i = r; i < r + rows; ++i)
      write(dq_ + i * wide_, scale_, static_cast<Bf16*>(g_.q) + (t_.query + row + i) * g_.q_token + t_.head * p_.size);
  }

  const AttentionGradients& g_;
  SquareBuffers& b_;
  int64_t wide_, depth_, sides_, keys_, bins_;
  float* bias_gradient_;
  Words memory_;
  float *dk_, *dv_;
  uint32_t *k_rows_, *v_rows_, *k_columns_, *q_columns_, *o_columns_, *q_values_, *o_values_;
  float *dq_, *dq_columns_;
  uint32_t *p_words_, *ds_words_, *ds_pairs_;
};

static_assert(sizeof(float) * (kQueryChunk * 4 * kMaxHeadSize + (2 + kBlockSteps) * kChunkSteps * kPairWords) <=
                  sizeof(float) * kBackwardBlock,
              "scratch memory must hold a chunk of queries");

}  // namespace

void attention_backward_amx(const AttentionProblem& problem, const AttentionGradients& gradients,
                            const AttentionTask& task, float* bias_gradient, float* scratch) {
  SquareBuffers buffers;
  TileRegisters registers;
  AmxAttentionHeadBackward(problem, gradients, task, bias_gradient, scratch, buffers).run();
}

}  // namespace minilm_fast
