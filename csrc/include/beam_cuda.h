#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace minilm_fast::cuda {

// The most candidates of an example, beams * width.
constexpr int kMostTotals = 8192;

// See minilm_fast/ops/beam.py; all tensors contiguous.
struct BanNgrams {
  const int32_t *tokens, *lengths, *ignored;  // [rows, capacity], [rows], [ignored_count]
  int32_t* banned;                            // [rows, capacity]
  int32_t rows, capacity, n, ignored_count;
};

cudaError_t launch_ban_repeated_ngrams(const BanNgrams& problem, cudaStream_t stream);

struct BeamStep {
  const float *candidate_scores, *scores;   // [examples, beams, width], [examples, beams]
  const int32_t *candidate_ids, *last_ids;  // [examples, beams, width], [examples, beams]
  float* out_scores;                        // [examples, width], as the next two
  int32_t *out_ids, *out_parents;
  int32_t examples, beams, width, eos;
};

cudaError_t launch_beam_step(const BeamStep& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
