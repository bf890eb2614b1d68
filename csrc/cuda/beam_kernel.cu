#include "beam_cuda.h"
#include "cuda_device.cuh"

namespace minilm_fast::cuda {
namespace {

constexpr float kForbidden = -10000.0f;
constexpr int kBanWarps = 4;
constexpr int kStepThreads = 128;

// Whether `value` is in a list; all lanes of a warp look.
__device__ bool warp_contains(const int32_t* list, int count, int32_t value) {
  bool found = false;
  for (int i = threadIdx.x % kLanes; i < count; i += kLanes) found |= list[i] == value;
  return __any_sync(kFullWarp, found);
}

// The follower of the n-gram that starts at `place` if it repeats the tail, whose last n - 1 tokens end at `length`.
__device__ bool repeats_tail(const int32_t* tokens, int place, int length, int n) {
  for (int i = 0; i + 1 < n; ++i)
    if (tokens[place + i] != tokens[length - (n - 1) + i]) return false;
  return true;
}

// A warp takes a row. It looks at 32 places at a time; the few that match are taken one after the other, since each
// token is listed once, in the order in which it first appears.
__global__ void __launch_bounds__(kBanWarps* kLanes) ban_ngrams_kernel(BanNgrams p) {
  const int lane = threadIdx.x % kLanes;
  const int row = static_cast<int>(blockIdx.x) * kBanWarps + static_cast<int>(threadIdx.x) / kLanes;
  if (row >= p.rows) return;
  const int32_t* tokens = p.tokens + static_cast<int64_t>(row) * p.capacity;
  int32_t* banned = p.banned + static_cast<int64_t>(row) * p.capacity;
  const int length = min(max(p.lengths[row], 0), p.capacity);
  int listed = 0;
  bool searching = length >= p.n;
  for (int i = p.n == 1 ? 0 : length - (p.n - 1); searching && i < length; ++i)
    searching = !warp_contains(p.ignored, p.ignored_count, tokens[i]);
  for (int base = 0; searching && base + p.n <= length; base += kLanes) {
    const int place = base + lane;
    unsigned matches = __ballot_sync(kFullWarp, place + p.n <= length && repeats_tail(tokens, place, length, p.n));
    for (; matches != 0; matches &= matches - 1) {
      const int32_t follower = tokens[base + __ffs(matches) - 1 + p.n - 1];
      if (warp_contains(p.ignored, p.ignored_count, follower)) continue;
      if (warp_contains(banned, listed, follower)) continue;
      if (lane == 0) banned[listed] = follower;
      ++listed;
      __syncwarp();
    }
  }
  for (int i = listed + lane; i < p.capacity; i += kLanes) banned[i] = -1;
}

// Descending order, NaN before everything as in torch.topk, then ascending order of indices.
__device__ bool goes_before(float a, int i, float b, int j) {
  const bool nan_a = a != a, nan_b = b != b;
  if (nan_a != nan_b) return nan_a;
  if (!nan_a && a != b) return a > b;
  return i < j;
}

// A block takes an example. The place of a candidate is the number of those before it, so each is found apart.
__global__ void __launch_bounds__(kStepThreads) beam_step_kernel(BeamStep p) {
  float* totals = reinterpret_cast<float*>(shared_memory());
  const int64_t example = blockIdx.x;
  const int count = p.beams * p.width;
  for (int i = threadIdx.x; i < count; i += kStepThreads) {
    const int64_t beam = example * p.beams + i / p.width;
    const float before = (p.last_ids[beam] == p.eos ? kForbidden : 0.0f) + p.scores[beam];
    totals[i] = p.candidate_scores[example * count + i] + before;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kStepThreads) {
    const float total = totals[i];
    int place = 0;
    for (int j = 0; j < count; ++j) place += goes_before(totals[j], j, total, i);
    if (place >= p.width) continue;
    const int64_t to = example * p.width + place;
    p.out_scores[to] = total;
    p.out_ids[to] = p.candidate_ids[example * count + i];
    p.out_parents[to] = i / p.width;
  }
}

}  // namespace

cudaError_t launch_ban_repeated_ngrams(const BanNgrams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const dim3 grid((p.rows + kBanWarps - 1) / kBanWarps);
  return launch(ban_ngrams_kernel, grid, dim3(kBanWarps * kLanes), 0, stream, p);
}

cudaError_t launch_beam_step(const BeamStep& p, cudaStream_t stream) {
  if (p.examples == 0 || p.width == 0) return cudaSuccess;
  const size_t shared = static_cast<size_t>(p.beams) * p.width * sizeof(float);
  return launch(beam_step_kernel, dim3(p.examples), dim3(kStepThreads), shared, stream, p);
}

}  // namespace minilm_fast::cuda
