#pragma once

#include "cuda_device.cuh"

// Rows of numbers that a warp normalises. A row lies in registers: of each 128 numbers lane i holds 4 i to 4 i + 3, and
// zeros beyond the end.
namespace minilm_fast::cuda {

constexpr int kLaneSpan = 4 * kLanes;

__device__ inline float sum_over_lanes(float x) {
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) x += __shfl_xor_sync(kFullWarp, x, bit);
  return x;
}

template <int kSpans>
struct LaneRow {
  float4 v[kSpans];

  __device__ static int channel(int span) { return span * kLaneSpan + static_cast<int>(threadIdx.x) % kLanes * 4; }

  __device__ void load(const float* row, int channels) {
#pragma unroll
    for (int s = 0; s < kSpans; ++s)
      v[s] = channel(s) < channels ? *reinterpret_cast<const float4*>(row + channel(s)) : float4{0, 0, 0, 0};
  }

  __device__ void add(const float* row, int channels) {
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      if (channel(s) >= channels) continue;
      const float4 other = *reinterpret_cast<const float4*>(row + channel(s));
      v[s] = {v[s].x + other.x, v[s].y + other.y, v[s].z + other.z, v[s].w + other.w};
    }
  }

  // The variance is that of the deviations, so that a large mean costs no digits.
  __device__ void normalise(const float* weight, const float* bias, float eps, int channels) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int s = 0; s < kSpans; ++s) sum += v[s].x + v[s].y + (v[s].z + v[s].w);
    const float mean = sum_over_lanes(sum) / static_cast<float>(channels);
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      if (channel(s) >= channels) continue;
      v[s] = {v[s].x - mean, v[s].y - mean, v[s].z - mean, v[s].w - mean};
      squares += v[s].x * v[s].x + v[s].y * v[s].y + (v[s].z * v[s].z + v[s].w * v[s].w);
    }
    const float factor = 1.0f / sqrtf(sum_over_lanes(squares) / static_cast<float>(channels) + eps);
#pragma unroll
    for (int s = 0; s < kSpans; ++s) {
      if (channel(s) >= channels) continue;
      const float4 w = *reinterpret_cast<const float4*>(weight + channel(s));
      const float4 b = *reinterpret_cast<const float4*>(bias + channel(s));
      v[s] = {fmaf(v[s].x * factor, w.x, b.x), fmaf(v[s].y * factor, w.y, b.y), fmaf(v[s].z * factor, w.z, b.z),
              fmaf(v[s].w * factor, w.w, b.w)};
    }
  }

  template <typename T>
  __device__ uint2 packed(int span) const {
    return {pack_pair<T>(v[span].x, v[span].y), pack_pair<T>(v[span].z, v[span].w)};
  }

  template <typename T>
  __device__ void store(T* row, int channels) const {
#pragma unroll
    for (int s = 0; s < kSpans; ++s)
      if (channel(s) < channels) *reinterpret_cast<uint2*>(row + channel(s)) = packed<T>(s);
  }
};

}  // namespace minilm_fast::cuda
