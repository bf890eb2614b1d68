#include "attention_cuda.h"
#include "attention_dispatch.cuh"
#include "attention_gradients.cuh"
#include "cuda_device.cuh"

// Two kernels, each gradient owned by one of them. One takes rows as the forward pass does and gives their gradients of
// q; it also leaves two numbers a row to the other, which takes columns, visits the rows that see one of them, and
// gives the gradients of k and v. The gradient of the bias, where wanted, is the first one's. While a tile is used, the
// next one is on its way. A warp leaves out the tiles in which it has nothing to do, and applies the mask only where
// not all rows see all columns.
namespace minilm_fast::cuda {
namespace {

template <typename T, int kSize, bool kBias, bool kDropout>
struct RowKernel {
  using Shape = GradientShape<kSize, kBias, kDropout>;
  static constexpr int kWarpRows = 16 * Shape::kRowBlocks;
  static constexpr int kRows = kAttentionWarps * kWarpRows;
  // Blocks of threads that are to fit on a multiprocessor.
  static constexpr int kResident = kSize == 32 && !kDropout ? 3 : 2;
  static constexpr int kStageBytes = Shape::kTileBytes;
  static constexpr int kSharedBytes = 2 * kStageBytes + 2 * kRows * Shape::kRowBytes;
};

template <typename T, int kSize, bool kBias, bool kDropout, bool kBiasGradient>
__global__ void __launch_bounds__(kAttentionThreads, RowKernel<T, kSize, kBias, kDropout>::kResident)
    attention_row_gradients_kernel(AttentionGradients p) {
  using Kernel = RowKernel<T, kSize, kBias, kDropout>;
  using Shape = GradientShape<kSize, kBias, kDropout>;
  const Sequence sequence(p.forward, blockIdx.z);
  const int head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int block_row = sequence.first_row + static_cast<int>(blockIdx.x) * Kernel::kRows;
  if (block_row >= sequence.length) return;
  const int columns = sequence.longest(block_row, min(block_row + Kernel::kRows, sequence.length));
  const HeadRows<T> k = head_rows<T>(p.forward.k, p.forward.k_token, p.forward.k_head, head);
  const HeadRows<T> v = head_rows<T>(p.forward.v, p.forward.v_token, p.forward.v_head, head);
  unsigned char* shared = shared_memory();
  unsigned char* queries = shared + 2 * Kernel::kStageBytes;
  unsigned char* gradients = queries + Kernel::kRows * Shape::kRowBytes;
  const int first = sequence.shift + block_row, count = sequence.length - block_row;
  stage_rows<T, kSize, Kernel::kRows>(head_rows<T>(p.forward.q, p.forward.q_token, p.forward.q_head, head), first,
                                      count, queries);
  stage_rows<T, kSize, Kernel::kRows>(head_rows<T>(p.grad_out, p.grad_token, p.grad_head, head), first, count,
                                      gradients);
  if (columns > 0) stage_tile<T, kSize>(k, v, sequence.first, sequence.length, shared);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  queries += warp * Kernel::kWarpRows * Shape::kRowBytes;
  gradients += warp * Kernel::kWarpRows * Shape::kRowBytes;
  const int first_row = block_row + warp * Kernel::kWarpRows;
  const int stop = min(first_row + Kernel::kWarpRows, sequence.length);
  int most = 0, least = 0;  // a warp beyond the end sees nothing
  if (first_row < stop) {
    most = sequence.longest(first_row, stop);
    least = sequence.shortest(first_row, stop);
  }
  RowGradients<T, kSize, kBias, kDropout, kBiasGradient> rows(p, sequence, head, first_row, queries, gradients);
  unsigned char* bias_shared = shared + Kernel::kSharedBytes;
  if (kBiasGradient) rows.begin_bias(p, head, gradients, bias_shared);
  if (stop > sequence.end) rows.see_themselves(queries, gradients, k, v);

#pragma unroll 1
  for (int column = 0; column < columns; column += Shape::kOthers) {
    wait_copies<0>();
    // Also: all warps are done with what the next copies replace.
    __syncthreads();
    const int odd = column / Shape::kOthers % 2, next = column + Shape::kOthers;
    if (next < columns)
      stage_tile<T, kSize>(k, v, sequence.first + next, sequence.length - next,
                           shared + (1 - odd) * Kernel::kStageBytes);
    commit_copies();
    const unsigned char* tile = shared + odd * Kernel::kStageBytes;
    if (kDropout && column < most) rows.draw(column);
    if (next <= least)
      rows.add_full(tile, column);
    else if (column < most)
      rows.add_partial(tile, column, most - column);
  }

  if (kBiasGradient) {
    rows.finish_bias();
    __syncthreads();
    add_bias_sums(p, head, bias_shared, kAttentionWarps);
  }
  if (first_row >= sequence.length) return;
  rows.finish(queries, p.forward.scale);
  __syncwarp();
  store_rows<T, kSize, Kernel::kWarpRows>(queries, static_cast<T*>(p.dq) + sequence.shift * p.dq_token + head * kSize,
                                          p.dq_token, first_row, sequence.length);
}

template <typename T, int kSize, bool kBias, bool kDropout>
struct ColumnKernel {
  using Shape = GradientShape<kSize, kBias, kDropout>;
  static constexpr int kWarpColumns = 16 * Shape::kColumnBlocks;
  static constexpr int kColumns = kAttentionWarps * kWarpColumns;
  static constexpr int kKeptBytes = kDropout ? KeptTile::kWords * static_cast<int>(sizeof(uint32_t)) : 0;
  static constexpr int kStageBytes = Shape::kKeptOffset + kKeptBytes;
  static_assert(128 % kColumns == 0, "a block's columns are some of 128");
  static constexpr int kSharedBytes = 2 * kStageBytes + 2 * kColumns * Shape::kRowBytes;

  // Starts to copy rows of q and grad_out and their statistics, and draws what is kept of them.
  __device__ static void stage(const AttentionGradients& p, const Sequence& sequence, int head, int row, int stop,
                               unsigned char* stage) {
    const int block = static_cast<int>(blockIdx.x) * kColumns / 128;
    if (kDropout)
      KeptTile::draw(KeptElements(p.forward.dropout, head), sequence.shift + row, block, stage + Shape::kKeptOffset);
    const int first = sequence.shift + row;
    stage_tile<T, kSize>(head_rows<T>(p.forward.q, p.forward.q_token, p.forward.q_head, head),
                         head_rows<T>(p.grad_out, p.grad_token, p.grad_head, head), first, stop - row, stage);
    const int thread = static_cast<int>(threadIdx.x), place = thread % Shape::kOthers, which = thread / Shape::kOthers;
    copy_word_async(stage + Shape::kTileBytes + thread * sizeof(float),
                    p.statistics + (which * p.forward.heads + head) * p.forward.queries + first + place,
                    row + place < stop);
  }
};

template <typename T, int kSize, bool kBias, bool kDropout>
__global__ void __launch_bounds__(kAttentionThreads, 2) attention_column_gradients_kernel(AttentionGradients p) {
  using Kernel = ColumnKernel<T, kSize, kBias, kDropout>;
  using Shape = GradientShape<kSize, kBias, kDropout>;
  static_assert(kAttentionThreads == 2 * Shape::kOthers, "a thread copies one of the statistics");
  const Sequence sequence(p.forward, blockIdx.z);
  const int head = blockIdx.y, warp = static_cast<int>(threadIdx.x) / kLanes;
  const int block_column = static_cast<int>(blockIdx.x) * Kernel::kColumns;
  if (block_column >= sequence.length) return;
  SeeingRows<Shape::kOthers> next(sequence, block_column);
  unsigned char* shared = shared_memory();
  unsigned char* keys = shared + 2 * Kernel::kStageBytes;
  unsigned char* values = keys + Kernel::kColumns * Shape::kRowBytes;
  const int first = sequence.first + block_column, count = sequence.length - block_column;
  stage_rows<T, kSize, Kernel::kColumns>(head_rows<T>(p.forward.k, p.forward.k_token, p.forward.k_head, head), first,
                                         count, keys);
  stage_rows<T, kSize, Kernel::kColumns>(head_rows<T>(p.forward.v, p.forward.v_token, p.forward.v_head, head), first,
                                         count, values);
  if (next.any()) Kernel::stage(p, sequence, head, next.row, next.stop, shared);
  commit_copies();
  wait_copies<0>();
  __syncthreads();

  keys += warp * Kernel::kWarpColumns * Shape::kRowBytes;
  values += warp * Kernel::kWarpColumns * Shape::kRowBytes;
  const int first_column = block_column + warp * Kernel::kWarpColumns;
  const int last = min(first_column + Kernel::kWarpColumns, sequence.length);
  ColumnGradients<T, kSize, kBias, kDropout> columns(p, sequence, head, first_column, keys, values);
  if (last > max(sequence.end, sequence.first_row)) columns.see_themselves(p, head, keys, values);

#pragma unroll 1
  for (int odd = 0; next.any(); odd ^= 1) {
    const int row = next.row, stop = next.stop;
    next.advance();
    wait_copies<0>();
    // Also: all warps are done with what the next copies replace.
    __syncthreads();
    if (next.any()) Kernel::stage(p, sequence, head, next.row, next.stop, shared + (1 - odd) * Kernel::kStageBytes);
    commit_copies();
    const unsigned char* tile = shared + odd * Kernel::kStageBytes;
    if (first_column >= last) continue;
    if (row + Shape::kOthers <= stop && sequence.shortest(row, row + Shape::kOthers) >= last)
      columns.add_full(tile, row);
    else
      columns.add_partial(tile, row, min(row + Shape::kOthers, stop));
  }

  if (first_column >= last) return;
  columns.finish(keys, values, p.forward.scale);
  __syncwarp();
  const int64_t token = sequence.first;
  store_rows<T, kSize, Kernel::kWarpColumns>(keys, static_cast<T*>(p.dk) + token * p.dk_token + head * kSize,
                                             p.dk_token, first_column, sequence.length);
  store_rows<T, kSize, Kernel::kWarpColumns>(values, static_cast<T*>(p.dv) + token * p.dv_token + head * kSize,
                                             p.dv_token, first_column, sequence.length);
}

dim3 grid_of(const AttentionGradients& p, int count) {
  return dim3((p.forward.max_seqlen + count - 1) / count, p.forward.heads, p.forward.batch);
}

template <typename T, int kSize, bool kBias, bool kDropout, bool kBiasGradient>
cudaError_t launch_rows(const AttentionGradients& p, cudaStream_t stream) {
  using Kernel = RowKernel<T, kSize, kBias, kDropout>;
  const int more = kBiasGradient ? BiasSums::bytes(p.forward.distance_limit, kAttentionWarps) : 0;
  return launch(attention_row_gradients_kernel<T, kSize, kBias, kDropout, kBiasGradient>, grid_of(p, Kernel::kRows),
                dim3(kAttentionThreads), Kernel::kSharedBytes + more, stream, p);
}

template <typename T, int kSize, bool kBias, bool kDropout>
struct BackwardLaunch {
  static cudaError_t run(const AttentionGradients& p, cudaStream_t stream) {
    using Columns = ColumnKernel<T, kSize, kBias, kDropout>;
    const cudaError_t error = kBias && p.bias_sums != nullptr
                                  ? launch_rows<T, kSize, kBias, kDropout, kBias>(p, stream)
                                  : launch_rows<T, kSize, kBias, kDropout, false>(p, stream);
    if (error != cudaSuccess) return error;
    return launch(attention_column_gradients_kernel<T, kSize, kBias, kDropout>, grid_of(p, Columns::kColumns),
                  dim3(kAttentionThreads), Columns::kSharedBytes, stream, p);
  }
};

}  // namespace

cudaError_t launch_attention_backward(const AttentionGradients& p, cudaStream_t stream) {
  if (p.forward.max_seqlen == 0 || p.forward.batch == 0 || p.forward.heads == 0) return cudaSuccess;
  return launch_attention_instance<BackwardLaunch>(p.forward, p, stream);
}

}  // namespace minilm_fast::cuda
