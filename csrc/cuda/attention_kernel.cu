#include "attention_cuda.h"
#include "attention_dispatch.cuh"
#include "attention_mask.cuh"
#include "attention_rows.cuh"
#include "cuda_device.cuh"

// A block takes one head and 64 or 128 rows of a sequence, each warp 16 or 32 of them, and visits the columns that one
// of its rows sees, 64 at a time. While a tile of keys and values is used, the next one is on its way. A warp leaves
// out the tiles that none of its rows sees, and applies the mask only where not all rows see all of it.
namespace minilm_fast::cuda {
namespace {

template <typename T, int kSize, bool kBias, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, AttentionShape<kSize, kBias, kDropout>::kResident)
    attention_forward_kernel(Attention p) {
  using Shape = AttentionShape<kSize, kBias, kDropout>;
  const Sequence sequence(p, blockIdx.z);
  const int head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int block_row = sequence.first_row + static_cast<int>(blockIdx.x) * Shape::kRows;
  if (block_row >= sequence.length) return;
  const int columns = sequence.longest(block_row, min(block_row + Shape::kRows, sequence.length));
  unsigned char* shared = shared_memory();

  unsigned char* queries = shared + 2 * Shape::kStageBytes;
  const HeadRows<T> k = head_rows<T>(p.k, p.k_token, p.k_head, head), v = head_rows<T>(p.v, p.v_token, p.v_head, head);
  stage_rows<T, kSize, Shape::kRows>(head_rows<T>(p.q, p.q_token, p.q_head, head), sequence.shift + block_row,
                                     sequence.length - block_row, queries);
  if (columns > 0) stage_tile<T, kSize>(k, v, sequence.first, sequence.length, shared);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  DistanceBias bias = {};
  if (kBias) bias = distance_bias(p, head, sequence.first);
  const int first_row = block_row + warp * Shape::kWarpRows;
  const int stop = min(first_row + Shape::kWarpRows, sequence.length);
  int most = 0, least = 0;  // a warp beyond the end sees nothing
  if (first_row < stop) {
    most = sequence.longest(first_row, stop);
    least = sequence.shortest(first_row, stop);
  }
  WarpRows<T, kSize, kBias, kDropout> rows(sequence, first_row, p.scale * kLog2OfE, bias, KeptElements(p.dropout, head),
                                           queries + warp * Shape::kWarpRows * Shape::kRowBytes);
  if (stop > sequence.end) rows.see_themselves(k, v);

#pragma unroll 1
  for (int column = 0; column < columns; column += Shape::kColumns) {
    wait_copies<0>();
    // Also: all warps are done with what the next copies replace.
    __syncthreads();
    const int odd = column / Shape::kColumns % 2;
    const int next = column + Shape::kColumns;
    if (next < columns)
      stage_tile<T, kSize>(k, v, sequence.first + next, sequence.length - next,
                           shared + (1 - odd) * Shape::kStageBytes);
    commit_copies();
    const unsigned char* stage = shared + odd * Shape::kStageBytes;
    if (kDropout && column < most) rows.draw(column);
    if (next <= least)
      rows.add_full(stage, column);
    else if (column < most)
      rows.add_partial(stage, column, most - column);
  }

  __syncthreads();
  if (first_row >= sequence.length) return;
  // Read again, so that it takes no register before.
  const int64_t row = Sequence(p, blockIdx.z).shift, stride = static_cast<int64_t>(p.heads) * kSize;
  unsigned char* results = shared + warp * Shape::kWarpRows * Shape::kRowBytes;
  rows.finish(results, p.lse + head * p.queries + row, p.dropout.scale);
  __syncwarp();
  store_rows<T, kSize, Shape::kWarpRows>(results, static_cast<T*>(p.out) + row * stride + head * kSize, stride,
                                         first_row, sequence.length);
}

template <typename T, int kSize, bool kBias, bool kDropout>
struct ForwardLaunch {
  static cudaError_t run(const Attention& p, cudaStream_t stream) {
    using Shape = AttentionShape<kSize, kBias, kDropout>;
    const dim3 grid((p.max_seqlen + Shape::kRows - 1) / Shape::kRows, p.heads, p.batch);
    return launch(attention_forward_kernel<T, kSize, kBias, kDropout>, grid, dim3(kAttentionThreads),
                  Shape::kSharedBytes, stream, p);
  }
};

}  // namespace

cudaError_t launch_attention(const Attention& p, cudaStream_t stream) {
  if (p.queries == 0 || p.heads == 0) return cudaSuccess;
  return launch_attention_instance<ForwardLaunch>(p, p, stream);
}

}  // namespace minilm_fast::cuda
