#include <algorithm>
#include <cmath>

#include "cuda_device.cuh"
#include "decode_attention_cuda.h"
#include "decode_attention_tile.cuh"

// A block takes one head and up to 16 rows of one example, so that the rows are those of one matrix instruction and
// the source is read once for all of them. Its warps take tiles of keys in turn, each with its own running softmax, and
// are merged at the end in the order of their numbers. What comes after the source, the tail, is listed first: every
// entry of the history that one of the rows sees, once, with the rows that see it. While it is listed the first tiles
// of the source are on their way.
namespace minilm_fast::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kStages = 2;
constexpr int kTailEntries = 512;  // of a round; a longer tail takes several
constexpr float kLog2E = 1.44269504088896340736f;

// A key behind the source.
struct TailEntry {
  int32_t index;     // of the history, step * beams + beam; or ~row of the block, which brings the key along
  int16_t distance;  // of its position from that of row 0
  uint16_t rows;     // bit i: row i sees it
};

struct Group {
  int example, head, slot, length, step;
  int first_beam, beams;

  __device__ int64_t first_row(const DecodeAttention& p) const {
    return (static_cast<int64_t>(example) * p.beams + first_beam) * p.rows;
  }
};

template <typename T, int kSize>
struct SharedLayout {
  using Shape = TileShape<T, kSize>;
  static constexpr int kQ = kWarps * kStages * 2 * kTileBytes;
  static constexpr int kEntries = kQ + kGroupRows * Shape::kKeyBytes;
  static constexpr int kCounts = kEntries + kTailEntries * static_cast<int>(sizeof(TailEntry));
  static constexpr int kBytes = kCounts + kWarps * static_cast<int>(sizeof(int32_t));
  // The merge takes the place of the tiles.
  static_assert(kWarps * kGroupRows * (kSize + 2) * sizeof(float) <= kQ, "room for the merge");
};

template <typename T>
__device__ const T* history_row(const DecodeAttention& p, const Group& group, const void* history, int64_t index) {
  const int64_t entry = static_cast<int64_t>(group.slot) * p.history_capacity * p.beams + index;
  return static_cast<const T*>(history) + (entry * p.heads + group.head) * p.size;
}

// Row 0 of each beam stays behind as this step's entry of the history.
template <typename T, int kSize>
__device__ void store_history(const DecodeAttention& p, const Group& group) {
  constexpr int kChunks = TileShape<T, kSize>::kKeyBytes / 16;
  for (int i = threadIdx.x; i < group.beams * kChunks; i += kThreads) {
    const int beam = i / kChunks, chunk = i % kChunks;
    const int64_t row = group.first_row(p) + static_cast<int64_t>(beam) * p.rows;
    const int64_t index = static_cast<int64_t>(group.step) * p.beams + group.first_beam + beam;
    const T* k = static_cast<const T*>(p.k) + row * p.k_row + group.head * p.k_head;
    const T* v = static_cast<const T*>(p.v) + row * p.v_row + group.head * p.v_head;
    auto* to_k = const_cast<T*>(history_row<T>(p, group, p.history_k, index));
    auto* to_v = const_cast<T*>(history_row<T>(p, group, p.history_v, index));
    reinterpret_cast<uint4*>(to_k)[chunk] = reinterpret_cast<const uint4*>(k)[chunk];
    reinterpret_cast<uint4*>(to_v)[chunk] = reinterpret_cast<const uint4*>(v)[chunk];
  }
}

// Copies the queries of the group to shared memory, zeros to the rows that it lacks.
template <typename T, int kSize>
__device__ void load_queries(const DecodeAttention& p, const Group& group, unsigned char* shared) {
  using Shape = TileShape<T, kSize>;
  constexpr int kChunks = Shape::kKeyBytes / 16;
  for (int i = threadIdx.x; i < kGroupRows * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    uint4 value = {};
    if (row < group.beams * p.rows) {
      const T* q = static_cast<const T*>(p.q) + (group.first_row(p) + row) * p.q_row + group.head * p.q_head;
      value = reinterpret_cast<const uint4*>(q)[chunk];
    }
    *reinterpret_cast<uint4*>(shared + chunk_offset<Shape::kKeyBytes>(row, chunk)) = value;
  }
}

// Lists the history's entries of the steps [begin, end) and, behind the last step, the rows' own; returns how many. The
// first hypothesis that sees an entry lists it for all. All threads of the block take part.
__device__ int list_tail(const DecodeAttention& p, const Group& group, int begin, int end, TailEntry* entries,
                         int32_t* counts) {
  const int32_t* ancestors =
      p.ancestry + (static_cast<int64_t>(group.example) * p.beams + group.first_beam) * p.history_capacity;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int pairs = (end - begin) * group.beams;
  const unsigned both = (1u << p.rows) - 1;
  int listed = 0;
  for (int base = 0; base < pairs; base += kThreads) {
    const int pair = base + static_cast<int>(threadIdx.x);
    const int step = begin + pair / group.beams, own = pair % group.beams;
    int beam = 0;
    unsigned rows = 0;
    bool first = pair < pairs;
    if (first) {
      beam = ancestors[static_cast<int64_t>(own) * p.history_capacity + step];
      for (int other = 0; other < group.beams; ++other) {
        if (ancestors[static_cast<int64_t>(other) * p.history_capacity + step] != beam) continue;
        rows |= both << (other * p.rows);
        first &= other >= own;
      }
    }
    const unsigned firsts = __ballot_sync(kFullWarp, first);
    if (lane == 0) counts[warp] = __popc(firsts);
    __syncthreads();
    int place = listed + __popc(firsts & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) place += counts[w];
      listed += counts[w];
    }
    if (first)
      entries[place] = {step * p.beams + beam, static_cast<int16_t>(step - group.step), static_cast<uint16_t>(rows)};
    __syncthreads();
  }
  if (end == group.step) {
    const int row = threadIdx.x, own = group.beams * p.rows;
    if (row < own) {
      const int beam = row / p.rows, place = row % p.rows;
      // Row 1 sees row 0, not the other way round.
      const unsigned rows = (place == 0 ? both : 2u) << (beam * p.rows);
      entries[listed + row] = {~row, static_cast<int16_t>(place), static_cast<uint16_t>(rows)};
    }
    listed += own;
  }
  __syncthreads();
  return listed;
}

// Starts the copy of the source's keys from `first` on, one warp. Values beyond the length become zero: a weight of
// zero would not hide a NaN there. Of keys it does, since their scores are replaced.
template <typename T, int kSize>
__device__ void stage_source(const DecodeAttention& p, const Group& group, int first, unsigned char* tiles) {
  using Shape = TileShape<T, kSize>;
  const int lane = threadIdx.x % kLanes;
  const int64_t plane = (static_cast<int64_t>(group.slot) * p.heads + group.head) * kSize * p.source_capacity;
  const T* k = static_cast<const T*>(p.source_k) + plane;
  const T* v = static_cast<const T*>(p.source_v) + plane;
  constexpr int kDimChunks = Shape::kDimBytes / 16, kKeyChunks = Shape::kKeyBytes / 16;
#pragma unroll
  for (int i = lane; i < kTileBytes / 16; i += kLanes) {
    const int dimension = i / kDimChunks, chunk = i % kDimChunks;
    const int key = first + chunk * Shape::kChunk;
    copy_async(tiles + chunk_offset<Shape::kDimBytes>(dimension, chunk),
               k + static_cast<int64_t>(dimension) * p.source_capacity + key, key < group.length);
  }
#pragma unroll
  for (int i = lane; i < kTileBytes / 16; i += kLanes) {
    const int row = i / kKeyChunks, chunk = i % kKeyChunks;
    copy_async(tiles + kTileBytes + chunk_offset<Shape::kKeyBytes>(row, chunk),
               v + static_cast<int64_t>(first + row) * kSize + chunk * Shape::kChunk, first + row < group.length);
  }
}

// The same for the tail, whose keys lie one after the other.
template <typename T, int kSize>
__device__ void stage_tail(const DecodeAttention& p, const Group& group, const TailEntry* entries, int first, int count,
                           unsigned char* tiles) {
  using Shape = TileShape<T, kSize>;
  const int lane = threadIdx.x % kLanes;
  constexpr int kKeyChunks = Shape::kKeyBytes / 16;
#pragma unroll 4
  for (int i = lane; i < kTileBytes / 16; i += kLanes) {
    const int row = i / kKeyChunks, chunk = i % kKeyChunks;
    const bool valid = first + row < count;
    const int index = valid ? entries[first + row].index : 0;
    const T *k, *v;
    if (index >= 0) {
      k = history_row<T>(p, group, p.history_k, index);
      v = history_row<T>(p, group, p.history_v, index);
    } else {
      const int64_t own = group.first_row(p) + ~index;
      k = static_cast<const T*>(p.k) + own * p.k_row + group.head * p.k_head;
      v = static_cast<const T*>(p.v) + own * p.v_row + group.head * p.v_head;
    }
    const int offset = chunk_offset<Shape::kKeyBytes>(row, chunk);
    copy_async(tiles + offset, k + chunk * Shape::kChunk, valid);
    copy_async(tiles + kTileBytes + offset, v + chunk * Shape::kChunk, valid);
  }
}

// The running softmax of a warp. Of rows i / 4 and i / 4 + 8 (lane i): the largest score so far in units of log 2, this
// lane's share of the sum of weights, and its share of the weighted values.
template <typename T, int kSize>
struct Running {
  using Shape = TileShape<T, kSize>;
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};
  float values[Shape::kResults][4] = {};

  __device__ void add(const Products<T, kSize>& products, float (&scores)[Shape::kScores][4],
                      const unsigned char* tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int n = 0; n < Shape::kScores; ++n) most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      const float shift = most == -INFINITY ? 0.0f : most;
      const float factor = exp2f(largest[half] - shift);
      largest[half] = most;
      sum[half] *= factor;
#pragma unroll
      for (int d = 0; d < Shape::kResults; ++d) {
        values[d][2 * half] *= factor;
        values[d][2 * half + 1] *= factor;
      }
#pragma unroll
      for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[n][i] = exp2f(scores[n][i] - shift);
          sum[half] += scores[n][i];
        }
    }
    products.accumulate(values, scores, tile);
  }
};

// From products to scores in units of log 2: scale, bias, mask. `distance` is that of a key from row 0; row i is
// i % rows positions further on.
struct Scoring {
  float scale;
  const float* bias;  // entry of distance 0, or null
  int limit, rows;

  __device__ float operator()(float product, int row, int distance, bool visible) const {
    if (!visible) return -INFINITY;
    float score = product * scale;
    if (bias != nullptr) {
      const int from = distance - row % rows;
      score = fmaf(bias[min(max(from, -limit), limit)], kLog2E, score);
    }
    return score;
  }
};

template <typename T, int kSize>
__device__ void add_source(const Group& group, const Scoring& scoring, const Products<T, kSize>& products, int first,
                           const unsigned char* tiles, Running<T, kSize>& running) {
  using Shape = TileShape<T, kSize>;
  const int lane = threadIdx.x % kLanes;
  float scores[Shape::kScores][4];
  products.template scores<true>(scores, tiles);
#pragma unroll
  for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + n * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
      scores[n][i] = scoring(scores[n][i], row, key - group.length - group.step, key < group.length);
    }
  running.add(products, scores, tiles + kTileBytes);
}

template <typename T, int kSize>
__device__ void add_tail(const Scoring& scoring, const Products<T, kSize>& products, const TailEntry* entries,
                         int first, int count, const unsigned char* tiles, Running<T, kSize>& running) {
  using Shape = TileShape<T, kSize>;
  const int lane = threadIdx.x % kLanes;
  float scores[Shape::kScores][4];
  products.template scores<false>(scores, tiles);
#pragma unroll
  for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int place = first + n * 8 + lane % 4 * 2 + j;
      const TailEntry entry = place < count ? entries[place] : TailEntry{0, 0, 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4 + half * 8;
        float& score = scores[n][2 * half + j];
        score = scoring(score, row, entry.distance, entry.rows >> row & 1);
      }
    }
  running.add(products, scores, tiles + kTileBytes);
}

// Merges the warps and writes the result. All threads of the block take part.
template <typename T, int kSize>
__device__ void merge(const DecodeAttention& p, const Group& group, Running<T, kSize>& running) {
  using Shape = TileShape<T, kSize>;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  float* values = reinterpret_cast<float*>(shared_memory());
  float* largest = values + kWarps * kGroupRows * kSize;
  float* sums = largest + kWarps * kGroupRows;
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = warp * kGroupRows + lane / 4 + half * 8;
    float sum = running.sum[half];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (lane % 4 == 0) {
      largest[place] = running.largest[half];
      sums[place] = sum;
    }
#pragma unroll
    for (int d = 0; d < Shape::kResults; ++d) {
      float* pair = values + place * kSize + d * 8 + lane % 4 * 2;
      pair[0] = running.values[d][2 * half];
      pair[1] = running.values[d][2 * half + 1];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < group.beams * p.rows * kSize; i += kThreads) {
    const int row = i / kSize, d = i % kSize;
    float most = largest[row];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) most = fmaxf(most, largest[w * kGroupRows + row]);
    float sum = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int place = w * kGroupRows + row;
      const float factor = exp2f(largest[place] - most);
      sum = fmaf(sums[place], factor, sum);
      value = fmaf(values[place * kSize + d], factor, value);
    }
    const int64_t to = ((group.first_row(p) + row) * p.heads + group.head) * kSize + d;
    static_cast<T*>(p.out)[to] = from_float<T>(value / sum);
  }
}

template <typename T, int kSize>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(DecodeAttention p) {
  using Shape = TileShape<T, kSize>;
  using Layout = SharedLayout<T, kSize>;
  const int warp = threadIdx.x / kLanes;
  Group group;
  group.head = blockIdx.x;
  group.example = blockIdx.z;
  group.slot = p.slots[group.example];
  group.step = p.steps[group.example];
  group.length = p.source_lengths[group.slot];
  group.first_beam = static_cast<int>(static_cast<int64_t>(p.beams) * blockIdx.y / gridDim.y);
  group.beams = static_cast<int>(static_cast<int64_t>(p.beams) * (blockIdx.y + 1) / gridDim.y) - group.first_beam;

  unsigned char* shared = shared_memory();
  unsigned char* tiles = shared + warp * kStages * 2 * kTileBytes;
  auto* entries = reinterpret_cast<TailEntry*>(shared + Layout::kEntries);
  auto* counts = reinterpret_cast<int32_t*>(shared + Layout::kCounts);
  // If launched early, all that the kernel before may be writing still is q, k and v.
  const int all_source_tiles = (group.length + Shape::kKeys - 1) / Shape::kKeys;
  for (int s = 0; s < kStages; ++s) {
    const int tile = warp + s * kWarps;
    if (tile >= all_source_tiles) break;
    stage_source<T, kSize>(p, group, tile * Shape::kKeys, tiles + s * 2 * kTileBytes);
    commit_copies();
  }
  wait_for_previous();
  let_next_start();
  load_queries<T, kSize>(p, group, shared + Layout::kQ);
  store_history<T, kSize>(p, group);
  __syncthreads();
  const Products<T, kSize> products(shared + Layout::kQ);
  Running<T, kSize> running;
  const float* bias = nullptr;
  if (p.relative_bias != nullptr)
    bias = p.relative_bias + static_cast<int64_t>(group.head) * (2 * p.distance_limit + 1) + p.distance_limit;
  const Scoring scoring = {p.scale * kLog2E, bias, p.distance_limit, p.rows};

  const int span = (kTailEntries - kGroupRows) / group.beams;
  for (int begin = 0;; begin += span) {
    const int end = min(group.step, begin + span);
    const int source_tiles = begin == 0 ? all_source_tiles : 0;
    const int count = list_tail(p, group, begin, end, entries, counts);
    const int all = source_tiles + (count + Shape::kKeys - 1) / Shape::kKeys;
    for (int s = 0; s < kStages; ++s) {
      const int tile = warp + s * kWarps;
      if (tile < source_tiles) continue;
      if (tile < all)
        stage_tail<T, kSize>(p, group, entries, (tile - source_tiles) * Shape::kKeys, count,
                             tiles + s * 2 * kTileBytes);
      commit_copies();
    }
    int stage = 0;
    for (int tile = warp; tile < all; tile += kWarps, stage = (stage + 1) % kStages) {
      unsigned char* current = tiles + stage * 2 * kTileBytes;
      wait_copies<kStages - 1>();
      __syncwarp();
      if (tile < source_tiles)
        add_source<T, kSize>(group, scoring, products, tile * Shape::kKeys, current, running);
      else
        add_tail<T, kSize>(scoring, products, entries, (tile - source_tiles) * Shape::kKeys, count, current, running);
      __syncwarp();
      const int next = tile + kStages * kWarps;
      if (next < source_tiles)
        stage_source<T, kSize>(p, group, next * Shape::kKeys, current);
      else if (next < all)
        stage_tail<T, kSize>(p, group, entries, (next - source_tiles) * Shape::kKeys, count, current);
      commit_copies();
    }
    if (end == group.step) break;
    __syncthreads();
  }
  merge<T, kSize>(p, group, running);
}

template <typename T, int kSize>
cudaError_t launch_instance(const DecodeAttention& p, cudaStream_t stream) {
  const int most = kGroupRows / p.rows;
  const dim3 grid(p.heads, (p.beams + most - 1) / most, p.examples);
  return launch(p.early, decode_attention_kernel<T, kSize>, grid, dim3(kThreads), SharedLayout<T, kSize>::kBytes,
                stream, p);
}

template <typename T>
cudaError_t launch_size(const DecodeAttention& p, cudaStream_t stream) {
  switch (p.size) {
    case 32:
      return launch_instance<T, 32>(p, stream);
    case 64:
      return launch_instance<T, 64>(p, stream);
    case 128:
      return launch_instance<T, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_decode_attention(const DecodeAttention& p, cudaStream_t stream) {
  if (p.examples == 0 || p.beams == 0 || p.heads == 0) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::kFloat:
      return launch_size<float>(p, stream);
    case Dtype::kHalf:
      return launch_size<__half>(p, stream);
    default:
      return launch_size<__nv_bfloat16>(p, stream);
  }
}

}  // namespace minilm_fast::cuda
