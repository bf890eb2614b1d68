#include <cmath>

#include "best_candidates.cuh"
#include "cuda_device.cuh"
#include "lm_head_cuda.h"
#include "lm_head_tile.cuh"

// The first kernel computes the logits of 64 rows and 128 words, keeps of each row the largest, the sum of exponentials
// and the k best, and forgets the logits. The second one merges these for each row. Banned and suppressed words,
// the exceptions, count in the sum of exponentials; they are then hidden from the search, and their logits are kept
// apart, to be scored at the end. Nothing depends on how many rows there are.
namespace minilm_fast::cuda {
namespace {

constexpr float kForbidden = -10000.0f;
constexpr float kLog2E = 1.44269504088896340736f;
constexpr int kMergeRows = 4;  // of a block of the second kernel, a warp each

// Word of exception j of a row, or -1. The suppressed one comes last.
__device__ int exception_id(const LmHead& p, int row, int j) {
  if (j < p.banned_width) {
    const int id = p.banned[static_cast<int64_t>(row) * p.banned_width + j];
    return id < p.vocabulary ? id : -1;
  }
  return p.suppress != nullptr && p.suppress[row] ? p.suppress_id : -1;
}

// Keeps the logits of the exceptions among the block's words and makes them NaN, which no search takes. First all are
// read, then all are hidden: a word may be banned twice.
__device__ void hide_exceptions(const LmHead& p, int first_row, int first_word, int words, float* logits) {
  const int width = p.banned_width + 1;
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = threadIdx.x; i < kHeadRows * width; i += kHeadThreads) {
      const int row = i / width, j = i % width;
      if (first_row + row >= p.rows) continue;
      const int column = exception_id(p, first_row + row, j) - first_word;
      if (column < 0 || column >= words) continue;
      float& logit = logits[row * kLogitStride + column];
      if (pass == 0)
        p.exceptions[static_cast<int64_t>(first_row + row) * width + j] = logit;
      else
        logit = NAN;
    }
    __syncthreads();
  }
}

// Statistics of a row by two threads, which take turns at its words.
__device__ void sum_exponentials(const LmHead& p, int row, int64_t place, int words, const float* logits) {
  const int half = threadIdx.x % 2;
  float largest = -INFINITY;
  for (int c = half; c < words; c += 2) largest = fmaxf(largest, logits[c]);
  largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, 1));
  const float shift = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  for (int c = half; c < words; c += 2) sum += exp2f((logits[c] - shift) * kLog2E);
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  if (half == 0 && row < p.rows) {
    p.maxima[place] = shift;
    p.sums[place] = sum;
  }
}

template <typename T, int kMost>
__global__ void __launch_bounds__(kHeadThreads) lm_head_kernel(LmHead p) {
  const int first_row = static_cast<int>(blockIdx.x) * kHeadRows;
  const int slice = blockIdx.y, first_word = slice * kHeadColumns;
  const int words = min(kHeadColumns, p.vocabulary - first_word);
  float* tile = multiply_tile<T>(p, first_row, first_word);
  for (int i = threadIdx.x; i < kHeadRows * words; i += kHeadThreads)
    tile[i / words * kLogitStride + i % words] += p.bias[first_word + i % words];
  __syncthreads();

  const int row = first_row + static_cast<int>(threadIdx.x) / 2;
  const int64_t place = static_cast<int64_t>(row) * gridDim.y + slice;
  const float* logits = tile + static_cast<int>(threadIdx.x) / 2 * kLogitStride;
  sum_exponentials(p, row, place, words, logits);
  if (p.banned_width > 0 || p.suppress != nullptr) {
    __syncthreads();
    hide_exceptions(p, first_row, first_word, words, tile);
  }
  Best<kMost> best;
  for (int c = threadIdx.x % 2; c < words; c += 2) best.offer({logits[c], logits[c], first_word + c});
  for (int i = 0; i < p.k; ++i) {
    const Candidate next = best.take(1);
    if (threadIdx.x % 2 != 0 || row >= p.rows) continue;
    p.candidate_logits[place * p.k + i] = next.logit;
    p.candidate_ids[place * p.k + i] = next.id;
  }
}

// fp64: two logarithms of nearly equal size are subtracted from one another.
__device__ double log_sum_exp(const float* maxima, const float* sums, int slices) {
  const int lane = threadIdx.x % kLanes;
  float largest = -INFINITY;
  for (int s = lane; s < slices; s += kLanes) largest = fmaxf(largest, maxima[s]);
  for (int bit = 1; bit < kLanes; bit *= 2) largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, bit));
  double sum = 0.0;
  for (int s = lane; s < slices; s += kLanes) sum += sums[s] * exp(static_cast<double>(maxima[s]) - largest);
  for (int bit = 1; bit < kLanes; bit *= 2) sum += __shfl_xor_sync(kFullWarp, sum, bit);
  return largest + log(sum);
}

// Whether exception j names a word that another one names too, which counts instead.
__device__ bool named_again(const LmHead& p, int row, int j, int id) {
  if (j < p.banned_width && exception_id(p, row, p.banned_width) == id) return true;
  for (int i = 0; i < min(j, p.banned_width); ++i)
    if (j < p.banned_width && exception_id(p, row, i) == id) return true;
  return false;
}

template <int kMost>
__global__ void __launch_bounds__(kMergeRows* kLanes) merge_slices_kernel(LmHead p, int slices) {
  const int lane = threadIdx.x % kLanes;
  const int row = static_cast<int>(blockIdx.x) * kMergeRows + static_cast<int>(threadIdx.x) / kLanes;
  if (row >= p.rows) return;
  const int64_t place = static_cast<int64_t>(row) * slices;
  const double lse = log_sum_exp(p.maxima + place, p.sums + place, slices);
  Best<kMost> best;
  const int64_t first = place * p.k;
  for (int i = lane; i < slices * p.k; i += kLanes) {
    const int id = p.candidate_ids[first + i];
    if (id == INT_MAX) continue;
    const float logit = p.candidate_logits[first + i];
    best.offer({static_cast<float>(logit - lse), logit, id});
  }
  const int width = p.banned_width + 1;
  for (int j = lane; j < width; j += kLanes) {
    const int id = exception_id(p, row, j);
    if (id < 0 || named_again(p, row, j, id)) continue;
    const float logit = p.exceptions[static_cast<int64_t>(row) * width + j];
    const float score = j < p.banned_width ? static_cast<float>(logit - lse) + kForbidden : kForbidden;
    best.offer({score, logit, id});
  }
  const bool valid = fabs(lse) < INFINITY;
  for (int i = 0; i < p.k; ++i) {
    const Candidate next = best.take(kLanes - 1);
    if (lane != 0) continue;
    p.values[static_cast<int64_t>(row) * p.k + i] = valid ? next.score : NAN;
    p.ids[static_cast<int64_t>(row) * p.k + i] = valid ? next.id : i;
  }
}

template <typename T, int kMost>
cudaError_t launch_instance(const LmHead& p, cudaStream_t stream) {
  const int slices = head_slices(p.vocabulary);
  const dim3 grid((p.rows + kHeadRows - 1) / kHeadRows, slices);
  const cudaError_t error = launch(lm_head_kernel<T, kMost>, grid, dim3(kHeadThreads), kHeadShared, stream, p);
  if (error != cudaSuccess) return error;
  const dim3 rows((p.rows + kMergeRows - 1) / kMergeRows);
  return launch(merge_slices_kernel<kMost>, rows, dim3(kMergeRows * kLanes), 0, stream, p, slices);
}

template <typename T>
cudaError_t launch_k(const LmHead& p, cudaStream_t stream) {
  if (p.k <= 8) return launch_instance<T, 8>(p, stream);
  return p.k <= kMostCandidates ? launch_instance<T, kMostCandidates>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_lm_head_topk(const LmHead& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::kFloat:
      return launch_k<float>(p, stream);
    case Dtype::kHalf:
      return launch_k<__half>(p, stream);
    default:
      return launch_k<__nv_bfloat16>(p, stream);
  }
}

}  // namespace minilm_fast::cuda
