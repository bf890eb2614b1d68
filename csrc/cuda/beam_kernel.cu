#include "beam_cuda.h"
#include "cuda_device.cuh"

namespace minilm_fast::cuda {
namespace {

constexpr int kBanWarps = 4;
constexpr int kBeamThreads = 128;

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

// Where a block of advance_beams keeps its parts in shared memory: for all candidates their totals, for each hypothesis
// the score, id and parent chosen, one column of tokens a thread, and the best hypothesis.
struct BeamShared {
  float *totals, *scores;
  int32_t *ids, *parents, *column, *winner;

  __device__ BeamShared(const AdvanceBeams& p, unsigned char* memory) {
    totals = reinterpret_cast<float*>(memory);
    scores = totals + p.candidate_beams * p.beams;
    ids = reinterpret_cast<int32_t*>(scores + p.beams);
    parents = ids + p.beams;
    column = parents + p.beams;
    winner = column + p.beams * kBeamThreads;
  }

  static size_t bytes(const AdvanceBeams& p) {
    return sizeof(int32_t) * (static_cast<size_t>(p.beams) * (p.candidate_beams + 3 + kBeamThreads) + 1);
  }
};

// The place of a candidate is the number of those before it, so each is found apart. All threads of the block.
__device__ void choose_beams(const AdvanceBeams& p, int64_t row, const BeamShared& shared) {
  const int64_t example = blockIdx.x;
  const int count = p.candidate_beams * p.beams;
  for (int i = threadIdx.x; i < count; i += kBeamThreads)
    shared.totals[i] = total_score(p, p.candidate_scores[example * count + i], row * p.beams + i / p.beams);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kBeamThreads) {
    const float total = shared.totals[i];
    int place = 0;
    for (int j = 0; j < count; ++j) place += goes_before(shared.totals[j], j, total, i);
    if (place >= p.beams) continue;
    shared.scores[place] = total;
    shared.ids[place] = p.candidate_ids[example * count + i];
    shared.parents[place] = i / p.beams;
  }
  __syncthreads();
}

// Gives each hypothesis the first `count` entries of its parent, and `last` [beams], if there are any, as the next one.
// Lists of `capacity` entries, one a hypothesis. A thread takes a column, so none waits for another.
__device__ void reorder(const AdvanceBeams& p, const BeamShared& shared, int32_t* lists, int capacity, int count,
                        const int32_t* last) {
  for (int i = threadIdx.x; i <= count; i += kBeamThreads) {
    if (i < count) {
      int32_t* column = shared.column + threadIdx.x;
      for (int b = 0; b < p.beams; ++b) column[b * kBeamThreads] = lists[b * capacity + i];
      for (int b = 0; b < p.beams; ++b) lists[b * capacity + i] = column[shared.parents[b] * kBeamThreads];
    } else {
      for (int b = 0; b < p.beams; ++b) lists[b * capacity + i] = last[b];
    }
  }
}

// A block takes an example. Rows that stand still are left as they are.
__global__ void __launch_bounds__(kBeamThreads) advance_beams_kernel(AdvanceBeams p) {
  const int64_t row = p.row(blockIdx.x);
  if (!p.first() && !p.running[row]) return;
  const BeamShared shared(p, shared_memory());
  const int frame = p.first() ? 0 : p.frame[row], steps = p.first() ? p.entering : p.steps[row];
  int32_t* tokens = p.tokens + row * p.beams * p.length;
  int32_t* ancestry = p.ancestry + row * p.beams * p.history;
  choose_beams(p, row, shared);

  reorder(p, shared, tokens, p.length, frame, shared.ids);
  if (p.first()) {
    // What comes before a target is stored under beam 0.
    for (int i = threadIdx.x; i < p.beams * steps; i += kBeamThreads) ancestry[i / steps * p.history + i % steps] = 0;
  } else {
    // The last token has just been stored under the beam that was its parent.
    reorder(p, shared, ancestry, p.history, steps, shared.parents);
  }
  for (int b = threadIdx.x; b < p.beams; b += kBeamThreads)
    enter_hypothesis(p, row, frame, b, shared.scores[b], shared.ids[b], shared.parents[b]);
  if (threadIdx.x == 0) *shared.winner = settle(p, row, shared.scores, shared.ids);
  __syncthreads();
  const int winner = *shared.winner;
  if (winner < 0) return;
  // Each thread reads what it has written itself.
  for (int i = threadIdx.x; i <= frame; i += kBeamThreads)
    p.best_tokens[row * p.length + i] = tokens[winner * p.length + i];
}

}  // namespace

cudaError_t launch_ban_repeated_ngrams(const BanNgrams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const dim3 grid((p.rows + kBanWarps - 1) / kBanWarps);
  return launch(ban_ngrams_kernel, grid, dim3(kBanWarps * kLanes), 0, stream, p);
}

cudaError_t launch_advance_beams(const AdvanceBeams& p, cudaStream_t stream) {
  if (p.examples == 0) return cudaSuccess;
  return launch(advance_beams_kernel, dim3(p.examples), dim3(kBeamThreads), BeamShared::bytes(p), stream, p);
}

}  // namespace minilm_fast::cuda
