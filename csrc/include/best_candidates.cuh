#pragma once

#include <climits>
#include <cmath>

#include "cuda_device.cuh"

namespace minilm_fast::cuda {

// A word with its logit and, once the log-sum-exp is known, its score.
struct Candidate {
  float score, logit;
  int32_t id;

  // Descending score, then logit, then ascending id. Never true of a NaN.
  __device__ bool before(const Candidate& other) const {
    if (score != other.score) return score > other.score;
    if (logit != other.logit) return logit > other.logit;
    return id < other.id;
  }
};

__device__ inline Candidate no_candidate() { return {-INFINITY, -INFINITY, INT_MAX}; }

// The best candidates that one thread has seen, in order; in registers, so that every index is known when compiling.
template <int kMost>
struct Best {
  Candidate list[kMost];

  __device__ Best() {
#pragma unroll
    for (int i = 0; i < kMost; ++i) list[i] = no_candidate();
  }

  __device__ void offer(Candidate candidate) {
    if (!candidate.before(list[kMost - 1])) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i)
      if (candidate.before(list[i])) {
        const Candidate moved = list[i];
        list[i] = candidate;
        candidate = moved;
      }
  }

  // Among the lanes whose numbers differ in the bits of `lanes` only, takes the best away and returns it to all.
  __device__ Candidate take(int lanes) {
    Candidate best = list[0];
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) {
      if ((lanes & bit) == 0) continue;
      const Candidate other = {__shfl_xor_sync(kFullWarp, best.score, bit), __shfl_xor_sync(kFullWarp, best.logit, bit),
                               __shfl_xor_sync(kFullWarp, best.id, bit)};
      if (other.before(best)) best = other;
    }
    // No id is in two lists.
    if (best.id == list[0].id && best.id != INT_MAX) {
#pragma unroll
      for (int i = 0; i + 1 < kMost; ++i) list[i] = list[i + 1];
      list[kMost - 1] = no_candidate();
    }
    return best;
  }
};

}  // namespace minilm_fast::cuda
