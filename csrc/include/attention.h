#pragma once

#include <cstdint>

namespace minilm_fast {

// Packed attention, see minilm_fast/ops/attention.py. Strides are in elements; the last dimension is contiguous.
struct AttentionProblem {
  const void *q, *k, *v;
  void* out;   // [tokens, heads, size], contiguous
  float* lse;  // [heads, tokens]
  bool bf16;   // storage of q, k, v and out; otherwise fp32
  int64_t tokens, heads, size;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  double scale;
  const float* relative_bias;  // [heads, 2 * distance_limit + 1] or null
  int64_t distance_limit;
  const int32_t* positions;  // [tokens], with relative_bias
};

// Some query rows of one head of one sequence.
struct AttentionTask {
  int64_t first;  // token
  int64_t source, target, pseudo;
  int64_t head;
  int64_t row_begin, row_end;  // within the sequence
};

// `scratch` holds attention_scratch floats, aligned to 64 bytes.
using AttentionKernel = void (*)(const AttentionProblem&, const AttentionTask&, float* scratch);
void attention_default(const AttentionProblem&, const AttentionTask&, float* scratch);
void attention_avx2(const AttentionProblem&, const AttentionTask&, float* scratch);
void attention_avx512(const AttentionProblem&, const AttentionTask&, float* scratch);
void attention_amx(const AttentionProblem&, const AttentionTask&, float* scratch);  // bf16 only

// Scratch memory, in floats, that tasks of sequences up to `length` tokens need with any instruction set: keys and
// values, each padded to whole vectors or tiles, and the bias.
static inline int64_t attention_scratch(const AttentionProblem& problem, int64_t length) {
  constexpr int64_t kTileKeys = 64, kTileSize = 32, kMostLanes = 16;
  const int64_t keys = (length + kTileKeys - 1) / kTileKeys * kTileKeys + kMostLanes;
  const int64_t width = (problem.size + kTileSize - 1) / kTileSize * kTileSize;
  const int64_t bias = problem.relative_bias == nullptr ? 0 : 2 * problem.distance_limit + 1 + 2 * kMostLanes;
  return 2 * keys * width + bias;
}

}  // namespace minilm_fast
