#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda_dtype.h"

namespace minilm_fast::cuda {

constexpr int kMostCandidates = 16;  // k at most
constexpr int kHeadColumns = 128;    // words of the vocabulary that a block takes
constexpr int kHeadChunkBytes = 16;  // rows of x and weight are whole chunks of this size

// The vocabulary projection with its best words, see minilm_fast/ops/linear.py. x [rows, features] and weight
// [vocabulary, features] are contiguous, of one dtype and aligned to 16 bytes. A slice is kHeadColumns words.
struct LmHead {
  Dtype dtype;
  const void *x, *weight;
  const float* bias;
  int32_t rows, features, vocabulary, k;
  const int32_t* banned;  // [rows, banned_width], -1 for none, or null
  int32_t banned_width;
  const bool* suppress;  // [rows] or null
  int32_t suppress_id;
  float* values;  // [rows, k]
  int32_t* ids;
  // What passes between the two kernels. The exceptions are the logits of the banned words and behind them the
  // suppressed one's, [rows, banned_width + 1].
  float *maxima, *sums;     // [rows, slices]
  float* candidate_logits;  // [rows, slices, k]
  int32_t* candidate_ids;
  float* exceptions;
};

inline int32_t head_slices(int32_t vocabulary) { return (vocabulary + kHeadColumns - 1) / kHeadColumns; }

cudaError_t launch_lm_head_topk(const LmHead& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
