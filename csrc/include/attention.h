#pragma once

#include <cstdint>

namespace minilm_fast {

// Packed attention, see minilm_fast/ops/attention.py. Strides are in elements; the last dimension is contiguous.
struct AttentionProblem {
  const void *q, *k, *v;
  void* out;   // [queries, heads, size], contiguous
  float* lse;  // [heads, queries], or null
  bool bf16;   // storage of q, k, v and out; otherwise fp32
  int64_t tokens, queries, heads, size;
  int64_t q_token, q_head, k_token, k_head, v_token, v_head;
  double scale;
  const float* relative_bias;  // [heads, 2 * distance_limit + 1] or null
  int64_t distance_limit;
  const int32_t* positions;  // [tokens], with relative_bias
  double dropout;            // 0: none
  uint64_t seed;
};

// Some query rows of one head of one sequence.
struct AttentionTask {
  int64_t first;  // token
  int64_t query;  // row of q that row 0 of the sequence has or would have: less than 0 where the first rows do not ask
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

// The kernel for the instruction set in use.
AttentionKernel attention_kernel(bool bf16);

// Scratch memory, in floats, that tasks of sequences up to `length` tokens need with any instruction set: keys and
// values, each padded to whole vectors or tiles, and the bias.
static inline int64_t attention_scratch(const AttentionProblem& problem, int64_t length) {
  constexpr int64_t kTileKeys = 64, kTileSize = 32, kMostLanes = 16;
  const int64_t keys = (length + kTileKeys - 1) / kTileKeys * kTileKeys + kMostLanes;
  const int64_t width = (problem.size + kTileSize - 1) / kTileSize * kTileSize;
  const int64_t bias = problem.relative_bias == nullptr ? 0 : 2 * problem.distance_limit + 1 + 2 * kMostLanes;
  return 2 * keys * width + bias;
}

// What the backward pass reads and writes beside the problem, whose `out` and `lse` it does not touch.
struct AttentionGradients {
  const void *out, *grad_out;
  const float* lse;                                            // [heads, queries]
  int64_t out_token, out_head, grad_out_token, grad_out_head;  // strides
  void *q, *k, *v;                                             // rows of [heads, size]
  int64_t q_token, k_token, v_token;                           // strides of the rows
};

// One head of one sequence: all its rows that ask, so that the order of every sum is fixed. `bias_gradient` takes
// the gradient by distance, [2 * distance_limit + 1], unless it is null.
using AttentionBackwardKernel = void (*)(const AttentionProblem&, const AttentionGradients&, const AttentionTask&,
                                         float* bias_gradient, float* scratch);
void attention_backward_default(const AttentionProblem&, const AttentionGradients&, const AttentionTask&, float*,
                                float*);
void attention_backward_avx2(const AttentionProblem&, const AttentionGradients&, const AttentionTask&, float*, float*);
void attention_backward_avx512(const AttentionProblem&, const AttentionGradients&, const AttentionTask&, float*,
                               float*);
void attention_backward_amx(const AttentionProblem&, const AttentionGradients&, const AttentionTask&, float*,
                            float*);  // bf16 only

// Scratch memory, in floats, of the backward kernels: a fixed part for a block of rows, of the keys three copies and
// two gradients, and the bias and its gradient.
constexpr int64_t kBackwardBlock = 160 * 1024;
static inline int64_t attention_backward_scratch(const AttentionProblem& problem, int64_t length) {
  constexpr int64_t kTileKeys = 64, kTileSize = 32, kMostLanes = 16;
  const int64_t keys = (length + kTileKeys - 1) / kTileKeys * kTileKeys + 2 * kMostLanes;
  const int64_t width = (problem.size + kTileSize - 1) / kTileSize * kTileSize;
  const int64_t bias = problem.relative_bias == nullptr ? 0 : 3 * (2 * problem.distance_limit + 1 + 3 * kMostLanes);
  return kBackwardBlock + 5 * keys * width + bias;
}

}  // namespace minilm_fast
