#pragma once

#include "cuda_device.cuh"
#include "lm_head_cuda.h"

// The logits of 64 rows and 128 words by a block of 128 threads: x weight^T over the features, 128 bytes of each row at
// a time, the next ones on their way. The result goes to shared memory, in the place of the operands.
namespace minilm_fast::cuda {

constexpr int kHeadThreads = 128;
constexpr int kHeadRows = 64;
constexpr int kHeadStages = 3;
constexpr int kStepBytes = 128;  // of a row, in a stage
constexpr int kStageBytes = (kHeadRows + kHeadColumns) * kStepBytes;
constexpr int kLogitStride = kHeadColumns + 2;  // two threads a row read it without bank conflicts
constexpr int kHeadShared = kHeadStages * kStageBytes;
static_assert(kHeadRows * kLogitStride * sizeof(float) <= kHeadShared, "the logits replace the operands");

template <typename T>
__device__ void stage_operands(const LmHead& p, int first_row, int first_word, int step, unsigned char* stage) {
  constexpr int kChunk = kHeadChunkBytes / static_cast<int>(sizeof(T));
  constexpr int kChunks = kStepBytes / kHeadChunkBytes;
#pragma unroll
  for (int i = threadIdx.x; i < (kHeadRows + kHeadColumns) * kChunks; i += kHeadThreads) {
    const int line = i / kChunks, chunk = i % kChunks;
    const int feature = (step * kChunks + chunk) * kChunk;
    const bool is_x = line < kHeadRows;
    const int64_t row = is_x ? first_row + line : first_word + line - kHeadRows;
    const bool valid = row < (is_x ? p.rows : p.vocabulary) && feature < p.features;
    const T* source = static_cast<const T*>(is_x ? p.x : p.weight);
    copy_async(stage + chunk_offset<kStepBytes>(line, chunk), source + (valid ? row * p.features + feature : 0), valid);
  }
}

// Warps in two by two; each takes 32 rows and 64 words.
template <typename T>
struct HeadProduct {
  float sums[2][8][4] = {};

  __device__ void add(const unsigned char* stage) {
    const int warp = threadIdx.x / kLanes;
    const int row = warp / 2 * 32, word = kHeadRows + warp % 2 * 64;
#pragma unroll
    for (int d = 0; d < kStepBytes / 2; d += 16) {
      uint32_t x[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_matrices(x[m], matrix_row<kStepBytes>(stage, row + m * 16, d, false));
#pragma unroll
      for (int n = 0; n < 8; n += 2) {
        uint32_t w[4];
        load_matrices(w, matrix_row<kStepBytes>(stage, word + n * 8, d, true));
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_add<T>(sums[m][n], x[m], w[0], w[1]);
          multiply_add<T>(sums[m][n + 1], x[m], w[2], w[3]);
        }
      }
    }
  }

  __device__ void store(float* logits) const {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int row = warp / 2 * 32 + lane / 4, column = warp % 2 * 64 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          logits[(row + m * 16 + i / 2 * 8) * kLogitStride + column + n * 8 + i % 2] = sums[m][n][i];
  }
};

// fp32 keeps its full precision: no tensor cores. Each thread takes 8 rows and every 16th word.
template <>
struct HeadProduct<float> {
  float sums[8][8] = {};

  __device__ void add(const unsigned char* stage) {
    const int row = static_cast<int>(threadIdx.x) / 16 * 8, word = kHeadRows + static_cast<int>(threadIdx.x) % 16;
#pragma unroll 2
    for (int chunk = 0; chunk < kStepBytes / kHeadChunkBytes; ++chunk) {
      float4 x[8];
#pragma unroll
      for (int m = 0; m < 8; ++m) x[m] = at(stage, row + m, chunk);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const float4 w = at(stage, word + n * 16, chunk);
#pragma unroll
        for (int m = 0; m < 8; ++m)
          sums[m][n] = fmaf(x[m].x, w.x, fmaf(x[m].y, w.y, fmaf(x[m].z, w.z, fmaf(x[m].w, w.w, sums[m][n]))));
      }
    }
  }

  __device__ void store(float* logits) const {
    const int row = static_cast<int>(threadIdx.x) / 16 * 8, column = static_cast<int>(threadIdx.x) % 16;
#pragma unroll
    for (int m = 0; m < 8; ++m)
#pragma unroll
      for (int n = 0; n < 8; ++n) logits[(row + m) * kLogitStride + column + n * 16] = sums[m][n];
  }

 private:
  __device__ static float4 at(const unsigned char* stage, int line, int chunk) {
    return *reinterpret_cast<const float4*>(stage + chunk_offset<kStepBytes>(line, chunk));
  }
};

// Leaves the products in shared memory, [kHeadRows, kLogitStride], ready for all threads.
template <typename T>
__device__ float* multiply_tile(const LmHead& p, int first_row, int first_word) {
  unsigned char* shared = shared_memory();
  const int steps = (p.features * static_cast<int>(sizeof(T)) + kStepBytes - 1) / kStepBytes;
  for (int s = 0; s < kHeadStages - 1; ++s) {
    if (s < steps) stage_operands<T>(p, first_row, first_word, s, shared + s * kStageBytes);
    commit_copies();
  }
  HeadProduct<T> product;
  for (int step = 0; step < steps; ++step) {
    wait_copies<kHeadStages - 2>();
    // Also: nobody reads any more what the next copies replace.
    __syncthreads();
    const int ahead = step + kHeadStages - 1;
    if (ahead < steps) stage_operands<T>(p, first_row, first_word, ahead, shared + ahead % kHeadStages * kStageBytes);
    commit_copies();
    product.add(shared + step % kHeadStages * kStageBytes);
  }
  wait_copies<0>();
  __syncthreads();
  float* logits = reinterpret_cast<float*>(shared);
  product.store(logits);
  __syncthreads();
  return logits;
}

}  // namespace minilm_fast::cuda
