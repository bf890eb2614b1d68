#include <cmath>

#include "step_linear_tile.cuh"

// The linear layers of a decoding step: norm before, bias, erf-GELU and residual after the product, in one launch.
namespace minilm_fast::cuda {
namespace {

constexpr float kSqrtHalf = 0.70710678118654752440f;

__device__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * kSqrtHalf)); }

__device__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// What becomes of four sums of a row, from `column` on.
template <typename T>
__device__ void finish(const StepLinear& p, int64_t row, int column, float4 sum) {
  if (p.bias != nullptr) sum = add(sum, *reinterpret_cast<const float4*>(p.bias + column));
  if (p.gelu) sum = {gelu(sum.x), gelu(sum.y), gelu(sum.z), gelu(sum.w)};
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row + column;
    const uint2 bits = *reinterpret_cast<const uint2*>(residual);
    const float2 low = unpack_pair<T>(bits.x), high = unpack_pair<T>(bits.y);
    sum = add(sum, {low.x, low.y, high.x, high.y});
  }
  const int64_t place = row * p.outputs + column;
  if (p.out_float)
    *reinterpret_cast<float4*>(static_cast<float*>(p.out) + place) = sum;
  else
    *reinterpret_cast<uint2*>(static_cast<T*>(p.out) + place) = {pack_pair<T>(sum.x, sum.y),
                                                                 pack_pair<T>(sum.z, sum.w)};
}

template <typename T, typename Shape, bool kNorm>
__global__ void __launch_bounds__(Shape::kThreads) step_linear_kernel(StepLinear p) {
  const int first_row = static_cast<int>(blockIdx.y) * Shape::kRows;
  const int first_column = static_cast<int>(blockIdx.x) * Shape::kColumns;
  const float* parts = multiply_step_tile<T, Shape, kNorm>(p, first_row, first_column);
  for (int i = threadIdx.x; i < Shape::kRows * Shape::kColumns / 4; i += Shape::kThreads) {
    const int row = i / (Shape::kColumns / 4), column = i % (Shape::kColumns / 4) * 4;
    if (first_row + row >= p.rows || first_column + column >= p.outputs) continue;
    float4 sum = {0, 0, 0, 0};
#pragma unroll
    for (int part = 0; part < kSplit; ++part) {
      const int place = (part * Shape::kRows + row) * Shape::kSumStride + column;
      sum = add(sum, *reinterpret_cast<const float4*>(parts + place));
    }
    finish<T>(p, first_row + row, first_column + column, sum);
  }
}

using Smallest = StepShape<16, 16, 1, 6>;
using Small = StepShape<32, 32, 1, 4>;
using Tall = StepShape<64, 32, 2, 4>;
using Large = StepShape<64, 64, 2, 3>;

constexpr int kMostShared = 163 << 10;  // of a block, on compute capability 8.0
// What the choice of a tile reckons with: the multiprocessors of an H100 or H200, each of which takes 64 bytes a clock
// from L2, and how many of them L2 can serve at that rate.
constexpr int kMultiprocessors = 132;
constexpr int kServed = 50;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How long the operands take to reach the blocks, in bytes through one multiprocessor; -1 if the tile does not fit.
template <typename Shape>
int64_t cost(const StepLinear& p, bool norm) {
  if (Shape::shared_bytes(norm, step_slabs(p.features)) > kMostShared) return -1;
  const int64_t rows = p.rows < Shape::kRows ? p.rows : Shape::kRows;
  const int64_t bytes = (rows * (norm ? 4 : 2) + Shape::kColumns * 2) * p.features;
  const int64_t blocks = ceil_divide(p.rows, Shape::kRows) * ceil_divide(p.outputs, Shape::kColumns);
  const int64_t of_a_processor = ceil_divide(blocks, kMultiprocessors) * bytes, of_all = blocks * bytes / kServed;
  return of_a_processor > of_all ? of_a_processor : of_all;
}

template <typename T, typename Shape, bool kNorm>
cudaError_t launch_tile(const StepLinear& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_divide(p.outputs, Shape::kColumns)),
                  static_cast<unsigned>(ceil_divide(p.rows, Shape::kRows)));
  return launch(p.early, step_linear_kernel<T, Shape, kNorm>, grid, dim3(Shape::kThreads),
                Shape::shared_bytes(kNorm, step_slabs(p.features)), stream, p);
}

template <typename T, bool kNorm>
cudaError_t launch_cheapest(const StepLinear& p, cudaStream_t stream) {
  cudaError_t (*chosen)(const StepLinear&, cudaStream_t) = nullptr;
  int64_t least = -1;
  const auto consider = [&](int64_t found, cudaError_t (*launch)(const StepLinear&, cudaStream_t)) {
    if (found < 0 || (least >= 0 && found >= least)) return;
    least = found;
    chosen = launch;
  };
  consider(cost<Smallest>(p, kNorm), launch_tile<T, Smallest, kNorm>);
  consider(cost<Small>(p, kNorm), launch_tile<T, Small, kNorm>);
  consider(cost<Tall>(p, kNorm), launch_tile<T, Tall, kNorm>);
  consider(cost<Large>(p, kNorm), launch_tile<T, Large, kNorm>);
  return chosen == nullptr ? cudaErrorInvalidValue : chosen(p, stream);
}

template <typename T>
cudaError_t launch_dtype(const StepLinear& p, cudaStream_t stream) {
  return p.norm_weight != nullptr ? launch_cheapest<T, true>(p, stream) : launch_cheapest<T, false>(p, stream);
}

}  // namespace

cudaError_t launch_step_linear(const StepLinear& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return p.dtype == Dtype::kHalf ? launch_dtype<__half>(p, stream) : launch_dtype<__nv_bfloat16>(p, stream);
}

}  // namespace minilm_fast::cuda
