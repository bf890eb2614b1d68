#include "amx_tile.h"
#include "attention_kernel.h"
#include "attention_whole.h"

namespace minilm_fast {
namespace {

constexpr int kMostLefts = 2;
constexpr int kMostRows = kMostLefts * kTileSide;

struct Buffers {
  QueryTile states[kMostLefts];
  alignas(64) uint32_t queries[kMostLefts * kMaxHeadSize / kTileDepth * kTileWords];
  alignas(64) float scores[kMostRows * kAmxScoreStride];
  alignas(64) float sums[4 * kTileWords];
  alignas(64) float factors[kAmxKeyBlock];
};

class AmxAttentionHead : AttentionRows<Bf16> {
 public:
  AmxAttentionHead(const AttentionProblem& problem, const AttentionTask& task, float* scratch, Buffers& buffers)
      : AttentionRows(problem, task),
        b_(buffers),
        depth_(round_up(problem.size, kTileDepth) / kTileDepth),
        value_step_(round_up(problem.size, kTileDepth) / kTileSide * kTileWords),
        keys_(reinterpret_cast<uint32_t*>(scratch)),
        values_(keys_ + round_up(length_, 4 * kTileSide) * depth_ * kTileSide),
        bias_(reinterpret_cast<float*>(values_ + round_up(length_, kTileDepth) / kTileDepth * value_step_)) {}

  void run() {
    pack(visible_keys(t_.row_begin, t_.row_end));
    if (p_.relative_bias == nullptr) return run_rows(nullptr);
    const DistanceBias bias = make_bias(bias_);
    run_rows(&bias);
  }

 private:
  void pack(int64_t keys) {
    pack_columns([&](int64_t j) { return key(j); }, keys, p_.size, keys_);
    for (int64_t j = 0; j < keys; j += kTileDepth)
      pack_values([&](int64_t i) { return value(j + i); }, keys - j, p_.size, values_ + j / kTileDepth * value_step_);
  }

  void run_rows(const DistanceBias* bias) {
    for (int64_t row = t_.row_begin; row < t_.row_end; row += kMostRows) {
      const int64_t left = t_.row_end - row;
      if (left > kTileSide)
        run_tiles<2>(row, static_cast<int>(left < kMostRows ? left : kMostRows), bias);
      else
        run_tiles<1>(row, static_cast<int>(left), bias);
    }
  }

  template <int Lefts>
  void run_tiles(int64_t row, int rows, const DistanceBias* bias) {
    for (int i = 0; i < Lefts; ++i) take_queries(i, row + i * kTileSide, rows_of(i, rows), bias);
    const int64_t keys = visible_keys(row, row + rows);
    for (int64_t first = 0; first < keys; first += kAmxKeyBlock)
      see<Lefts>(row, rows, first, keys - first < kAmxKeyBlock ? keys - first : kAmxKeyBlock, bias);
    for (int i = 0; i < Lefts; ++i) finish(b_.states[i], row + i * kTileSide, rows_of(i, rows));
  }

  static int rows_of(int tile, int rows) {
    const int left = rows - tile * static_cast<int>(kTileSide);
    return left < kTileSide ? left : static_cast<int>(kTileSide);
  }

  void take_queries(int tile, int64_t row, int rows, const DistanceBias* bias) {
    begin(b_.states[tile], row, rows, kTileSide, bias);
    uint32_t* queries = b_.queries + tile * depth_ * kTileWords;
    pack_rows([&](int64_t r) { return query(row + r); }, rows, p_.size, queries);
    const float unit = bias == nullptr ? scale_ : 1.0f;
    if (unit > 0) return;
    // A tile's factor is positive, so the sign of the scale goes into the queries.
    for (int64_t i = 0; i < depth_ * kTileWords; ++i) queries[i] = unit < 0 ? queries[i] ^ 0x80008000u : 0;
  }

  template <int Lefts>
  void see(int64_t row, int rows, int64_t first, int64_t count, const DistanceBias* bias) {
    memory_fence();
    for (int64_t j = 0; j < count; j += 4 * kTileSide)
      multiply_keys<Lefts>(b_.queries, keys_ + (first + j) * depth_ * kTileSide, depth_, b_.scores + j);
    memory_fence();
    for (int r = 0; r < rows; ++r) {
      float* scores = b_.scores + r * kAmxScoreStride;
      const int64_t left = prefix(row + r) - first, visible = left < count ? left : count;
      if (bias != nullptr) add_bias(scores, row + r, first, visible, *bias);
      if (drops()) factors(row + r, first, visible, b_.factors);
      softmax_words(b_.states[r / kTileSide], r % kTileSide, scores, visible, count, p_.size,
                    drops() ? b_.factors : nullptr);
    }
    const int64_t steps = round_up(count, kTileDepth) / kTileDepth;
    for (int64_t d = 0; d < p_.size; d += 2 * kTileSide) {
      const uint32_t* values = values_ + first / kTileDepth * value_step_ + d / kTileSide * kTileWords;
      memory_fence();
      multiply_values<Lefts>(b_.scores, values, steps, value_step_, b_.sums);
      memory_fence();
      for (int r = 0; r < rows; ++r) add_sums(r, d);
    }
  }

  void add_sums(int row, int64_t d) {
    const int tile = row / kTileSide, r = row % kTileSide;
    for (int64_t i = 0; i < 2 && d + i * kTileSide < width_; ++i) {
      const float* sums = b_.sums + (2 * tile + i) * kTileWords + r * kTileSide;
      float* out = b_.states[tile].out + r * width_ + d + i * kTileSide;
      store(out, load(out) + load(sums));
    }
  }

  Buffers& b_;
  int64_t depth_, value_step_;
  uint32_t *keys_, *values_;
  float* bias_;
};

}  // namespace

void attention_amx(const AttentionProblem& problem, const AttentionTask& task, float* scratch) {
  TileRegisters registers;
  if (WholeAttention::fits(problem, task)) {
    WholeBuffers buffers;
    WholeAttention(problem, task, scratch, buffers).run();
    return;
  }
  Buffers buffers;
  AmxAttentionHead(problem, task, scratch, buffers).run();
}

}  // namespace minilm_fast
