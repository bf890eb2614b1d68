#include "attention_cuda.h"
#include "attention_mask.cuh"
#include "attention_rows.cuh"
#include "cuda_device.cuh"

// A block takes one head and 64 or 128 rows of a sequence, each warp 16 or 32 of them, and visits the columns that one
// of its rows sees, 64 at a time. While a tile of keys and values is used, the next one is on its way. A warp leaves
// out the tiles that none of its rows sees, and applies the mask only where not all rows see all of it.
namespace minilm_fast::cuda {
namespace {

// What a block works on: this head's operands, from the sequence's first token on.
template <typename T>
struct Operands {
  const T *q, *k, *v;  // q: such that row i of the sequence is row i here, if it asks
  int64_t q_token, k_token, v_token;

  __device__ Operands(const Attention& p, const Sequence& sequence, int head)
      : q_token(p.q_token), k_token(p.k_token), v_token(p.v_token) {
    q = static_cast<const T*>(p.q) + head * p.q_head + sequence.shift * p.q_token;
    k = static_cast<const T*>(p.k) + head * p.k_head + sequence.first * p.k_token;
    v = static_cast<const T*>(p.v) + head * p.v_head + sequence.first * p.v_token;
  }
};

// Starts to copy kCount rows, of which `count` are there, to shared memory; the others become zeros. A thread copies
// one chunk of every so many rows, and these lie so far apart that they are swizzled alike.
template <typename T, int kSize, int kCount>
__device__ void stage_rows(const T* rows, int64_t stride, int count, unsigned char* shared) {
  constexpr int kRowBytes = kSize * 2, kChunks = kRowBytes / 16, kApart = kAttentionThreads / kChunks;
  static_assert(kApart % 8 == 0 && kCount % kApart == 0, "whole rounds of all threads");
  const int row = static_cast<int>(threadIdx.x) / kChunks, chunk = static_cast<int>(threadIdx.x) % kChunks;
  const T* from = rows + row * stride + chunk * 8;
  unsigned char* to = shared + chunk_offset<kRowBytes>(row, chunk);
#pragma unroll
  for (int i = 0; i < kCount; i += kApart) {
    copy_async(to + i * kRowBytes, from, row + i < count);
    from += kApart * stride;
  }
}

// Keys and values of the columns from `first` on.
template <typename T, int kSize>
__device__ void stage_columns(const Operands<T>& operands, int first, int length, unsigned char* stage) {
  constexpr int kColumns = kAttentionColumns;
  stage_rows<T, kSize, kColumns>(operands.k + first * operands.k_token, operands.k_token, length - first, stage);
  stage_rows<T, kSize, kColumns>(operands.v + first * operands.v_token, operands.v_token, length - first,
                                 stage + kColumns * kSize * 2);
}

// From shared memory to the result, whose row 0 of the sequence `out` points at.
template <typename T, int kSize, int kCount>
__device__ void store_rows(const unsigned char* shared, T* out, int64_t stride, int first_row, int length) {
  constexpr int kRowBytes = kSize * 2, kChunks = kRowBytes / 16;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x) % kLanes; i < kCount * kChunks; i += kLanes) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (first_row + row >= length) continue;
    const auto* from = reinterpret_cast<const uint4*>(shared + chunk_offset<kRowBytes>(row, chunk));
    *reinterpret_cast<uint4*>(out + (first_row + row) * stride + chunk * 8) = *from;
  }
}

template <typename T, int kSize, bool kBias>
__global__ void __launch_bounds__(kAttentionThreads, AttentionShape<kSize, kBias>::kResident)
    attention_forward_kernel(Attention p) {
  using Shape = AttentionShape<kSize, kBias>;
  const Sequence sequence(p, blockIdx.z);
  const int head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int block_row = sequence.first_row + static_cast<int>(blockIdx.x) * Shape::kRows;
  if (block_row >= sequence.length) return;
  const int columns = sequence.longest(block_row, min(block_row + Shape::kRows, sequence.length));
  const int tiles = (columns + Shape::kColumns - 1) / Shape::kColumns;
  const Operands<T> operands(p, sequence, head);
  unsigned char* shared = shared_memory();

  // The queries take the place of the second stage first.
  unsigned char* queries = shared + Shape::kStageBytes;
  stage_rows<T, kSize, Shape::kRows>(operands.q + block_row * operands.q_token, operands.q_token,
                                     sequence.length - block_row, queries);
  if (tiles > 0) stage_columns<T, kSize>(operands, 0, sequence.length, shared);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  DistanceBias bias = {};
  if (kBias)
    bias = {p.relative_bias + static_cast<int64_t>(head) * (2 * p.distance_limit + 1) + p.distance_limit,
            p.position_ids + sequence.first, p.distance_limit};
  const int first_row = block_row + warp * Shape::kWarpRows;
  const int stop = min(first_row + Shape::kWarpRows, sequence.length);
  const bool active = first_row < stop;
  const int most = active ? sequence.longest(first_row, stop) : 0;
  const int least = active ? sequence.shortest(first_row, stop) : 0;
  WarpRows<T, kSize, kBias> rows(sequence, first_row, p.scale * kLog2OfE, bias,
                                 queries + warp * Shape::kWarpRows * Shape::kRowBytes);
  if (stop > sequence.end) rows.see_themselves(operands.k, operands.k_token, operands.v, operands.v_token);

#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int column = tile * Shape::kColumns;
    wait_copies<0>();
    // Also: all warps are done with what the next copies replace.
    __syncthreads();
    if (tile + 1 < tiles)
      stage_columns<T, kSize>(operands, column + Shape::kColumns, sequence.length,
                              shared + (tile + 1) % 2 * Shape::kStageBytes);
    commit_copies();
    const unsigned char* stage = shared + tile % 2 * Shape::kStageBytes;
    if (column + Shape::kColumns <= least)
      rows.template add<false>(stage, column, Shape::kColumns);
    else if (column < most)
      rows.template add<true>(stage, column, most - column);
  }

  __syncthreads();
  if (!active) return;
  const int64_t row = sequence.shift, stride = static_cast<int64_t>(p.heads) * kSize;
  unsigned char* results = shared + warp * Shape::kWarpRows * Shape::kRowBytes;
  rows.finish(results, p.lse + head * p.queries + row);
  __syncwarp();
  store_rows<T, kSize, Shape::kWarpRows>(results, static_cast<T*>(p.out) + row * stride + head * kSize, stride,
                                         first_row, sequence.length);
}

template <typename T, int kSize, bool kBias>
cudaError_t launch_instance(const Attention& p, cudaStream_t stream) {
  using Shape = AttentionShape<kSize, kBias>;
  const dim3 grid((p.max_seqlen + Shape::kRows - 1) / Shape::kRows, p.heads, p.batch);
  return launch(attention_forward_kernel<T, kSize, kBias>, grid, dim3(kAttentionThreads), 2 * Shape::kStageBytes,
                stream, p);
}

template <typename T, int kSize>
cudaError_t launch_bias(const Attention& p, cudaStream_t stream) {
  return p.relative_bias == nullptr ? launch_instance<T, kSize, false>(p, stream)
                                    : launch_instance<T, kSize, true>(p, stream);
}

template <typename T>
cudaError_t launch_size(const Attention& p, cudaStream_t stream) {
  switch (p.size) {
    case 32:
      return launch_bias<T, 32>(p, stream);
    case 64:
      return launch_bias<T, 64>(p, stream);
    case 128:
      return launch_bias<T, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t launch_attention(const Attention& p, cudaStream_t stream) {
  if (p.queries == 0 || p.heads == 0) return cudaSuccess;
  switch (p.dtype) {
    case Dtype::kHalf:
      return launch_size<__half>(p, stream);
    case Dtype::kBFloat16:
      return launch_size<__nv_bfloat16>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace minilm_fast::cuda
