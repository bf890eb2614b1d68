#include <cmath>

#include "row_norm.cuh"
#include "step_cuda.h"

// What of a decoding step goes row by row: its embeddings, and a norm alone. A warp takes a row.
namespace minilm_fast::cuda {
namespace {

constexpr int kRowWarps = 4;
constexpr int kSpans = kMostStepNorm / kLaneSpan;
using Row = LaneRow<kSpans>;

__device__ int row_of_warp() {
  return static_cast<int>(blockIdx.x) * kRowWarps + static_cast<int>(threadIdx.x) / kLanes;
}

template <typename T>
__global__ void __launch_bounds__(kRowWarps* kLanes) step_norm_kernel(StepNorm p) {
  wait_for_previous();
  let_next_start();
  const int row = row_of_warp();
  if (row >= p.rows) return;
  Row x;
  x.load(p.x + row * p.x_row, p.channels);
  x.normalise(p.weight, p.bias, p.eps, p.channels);
  x.store(static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.channels, p.channels);
}

template <typename T>
__global__ void __launch_bounds__(kRowWarps* kLanes) step_embedding_kernel(StepEmbedding p) {
  let_next_start();
  const int row = row_of_warp();
  if (row >= p.examples * p.beams * p.rows) return;
  const int hypothesis = row / p.rows, example = hypothesis / p.beams, kind = row % p.rows;
  const int id = kind == 0 ? p.last_ids[hypothesis] : p.mask_id;
  const int at = p.source_lengths[p.slots[example]] + p.steps[example] + kind;
  // Outside the tables there is nothing to read: the row becomes no number, which shows.
  const bool known = id >= 0 && id < p.words && at >= 0 && at < p.positions;
  Row x;
  x.load(p.word + (known ? static_cast<int64_t>(id) * p.channels : 0), p.channels);
  x.add(p.position + (known ? static_cast<int64_t>(at) * p.channels : 0), p.channels);
  if (p.type != nullptr) x.add(p.type, p.channels);
  if (!known) x.v[0].x = NAN;
  x.normalise(p.weight, p.bias, p.eps, p.channels);
  x.store(static_cast<T*>(p.out) + static_cast<int64_t>(row) * p.channels, p.channels);
}

template <typename Problem>
cudaError_t launch_rows(bool early, void (*kernel)(Problem), const Problem& p, int rows, cudaStream_t stream) {
  return launch(early, kernel, dim3((rows + kRowWarps - 1) / kRowWarps), dim3(kRowWarps * kLanes), 0, stream, p);
}

}  // namespace

cudaError_t launch_step_norm(const StepNorm& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return launch_rows(p.early, p.dtype == Dtype::kHalf ? step_norm_kernel<__half> : step_norm_kernel<__nv_bfloat16>, p,
                     p.rows, stream);
}

cudaError_t launch_step_embedding(const StepEmbedding& p, cudaStream_t stream) {
  const int rows = p.examples * p.beams * p.rows;
  if (rows == 0) return cudaSuccess;
  return launch_rows(false,
                     p.dtype == Dtype::kHalf ? step_embedding_kernel<__half> : step_embedding_kernel<__nv_bfloat16>, p,
                     rows, stream);
}

}  // namespace minilm_fast::cuda
