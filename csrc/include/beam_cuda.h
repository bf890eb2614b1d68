#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "advance_beams.h"

namespace minilm_fast::cuda {

// The most hypotheses of an example that advance_beams takes.
constexpr int kMostBeams = 64;

// See minilm_fast/ops/beam.py; all tensors contiguous.
struct BanNgrams {
  const int32_t *tokens, *lengths, *ignored;  // [rows, capacity], [rows], [ignored_count]
  int32_t* banned;                            // [rows, capacity]
  int32_t rows, capacity, n, ignored_count;
};

cudaError_t launch_ban_repeated_ngrams(const BanNgrams& problem, cudaStream_t stream);

cudaError_t launch_advance_beams(const AdvanceBeams& problem, cudaStream_t stream);

}  // namespace minilm_fast::cuda
