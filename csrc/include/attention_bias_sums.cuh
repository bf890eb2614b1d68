#pragma once

#include "attention_cuda.h"
#include "cuda_device.cuh"

// The gradient of the relative bias: sums of gradients of scores by distance, in fixed point, where the order has no
// effect. Each warp adds up its 16 rows in 32 bits in shared memory, in units of its own, and the block adds its warps'
// sums to those in global memory, in 64 bits. All units are powers of two.
namespace minilm_fast::cuda {

// The numbers of a row add up to no more than about this (the probabilities to 1), those of 16 rows to half of 2^31.
constexpr float kWarpBiasUnits = 67108864.0f;  // 2^26

// 2^floor(log2(x)) of a positive normal number.
__device__ inline float power_below(float x) { return __uint_as_float(__float_as_uint(x) & 0x7f800000u); }

class BiasSums {
 public:
  // Of a block: a table and a unit for each warp.
  __host__ __device__ static constexpr int bytes(int limit, int warps) {
    return (2 * limit + 2) * warps * static_cast<int>(sizeof(int));
  }

  // `norm` is the largest of the warp's rows of grad_out.
  __device__ void begin(const AttentionGradients& p, unsigned char* shared, int warps, float norm) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
    limit_ = p.forward.distance_limit;
    const float largest = fmaxf(2.0f * p.forward.dropout.scale * norm * p.bias_units[1], 1e-20f);
    units_ = fminf(power_below(kWarpBiasUnits / largest), p.bias_units[0]);
    if (lane == 0) reinterpret_cast<float*>(shared)[warp] = units_;
    table_ = reinterpret_cast<int*>(shared) + warps + warp * (2 * limit_ + 1);
    for (int i = lane; i <= 2 * limit_; i += kLanes) table_[i] = 0;
    __syncwarp();
  }

  __device__ void add(float gradient, int distance) {
    const int number = __float2int_rn(gradient * units_);
    if (distance <= -limit_)
      nearest_ += number;
    else if (distance >= limit_)
      farthest_ += number;
    else if (number != 0)
      atomicAdd(table_ + limit_ + distance, number);
  }

  // After the last one.
  __device__ void finish() {
    if (nearest_ != 0) atomicAdd(table_, nearest_);
    if (farthest_ != 0) atomicAdd(table_ + 2 * limit_, farthest_);
  }

 private:
  int* table_;
  int limit_;
  float units_;
  // Of this lane: distances beyond the limit are the same for whole tiles.
  int nearest_ = 0, farthest_ = 0;
};

// Adds what a block's warps have summed up to the sums of the head.
__device__ inline void add_bias_sums(const AttentionGradients& p, int head, const unsigned char* shared, int warps) {
  const int count = 2 * p.forward.distance_limit + 1;
  const auto* units = reinterpret_cast<const float*>(shared);
  const auto* numbers = reinterpret_cast<const int*>(shared) + warps;
  auto* sums = reinterpret_cast<unsigned long long*>(p.bias_sums) + static_cast<int64_t>(head) * count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    int64_t sum = 0;
    for (int warp = 0; warp < warps; ++warp)
      sum += numbers[warp * count + i] * static_cast<int64_t>(p.bias_units[0] / units[warp]);
    if (sum != 0) atomicAdd(sums + i, static_cast<unsigned long long>(sum));
  }
}

}  // namespace minilm_fast::cuda
