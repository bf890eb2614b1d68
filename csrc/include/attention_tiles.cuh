#pragma once

#include "attention_cuda.h"
#include "cuda_device.cuh"

// What the kernels of attention share: tiles of rows in shared memory, on their way there and back, and as operands.
namespace minilm_fast::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kLanes;
constexpr int kAttentionColumns = 64;  // of a tile
constexpr float kLog2OfE = 1.44269504088896340736f;
constexpr float kLogOf2 = 0.69314718055994530942f;

// Rows of a head.
template <typename T>
struct HeadRows {
  const T* data;
  int64_t stride;
};

template <typename T>
__device__ inline HeadRows<T> head_rows(const void* data, int64_t token, int64_t head_stride, int head) {
  return {static_cast<const T*>(data) + head * head_stride, token};
}

template <typename T>
__device__ inline float2 pair_at(const T* place) {
  return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(place));
}

// Of four lanes that hold parts of a row.
__device__ inline float sum_of_row(float part) {
  part += __shfl_xor_sync(kFullWarp, part, 1);
  return part + __shfl_xor_sync(kFullWarp, part, 2);
}

// The product of row `row` of a tile in shared memory, the same for four lanes, with another in global memory.
template <typename T, int kSize>
__device__ float multiply_row(const unsigned char* tile, int row, const T* other) {
  const int column = static_cast<int>(threadIdx.x) % 4 * 2;
  float sum = 0.0f;
#pragma unroll
  for (int d = 0; d < kSize / 8; ++d) {
    const int place = chunk_offset<kSize * 2>(row, d) + column * 2;
    const float2 mine = unpack_pair<T>(*reinterpret_cast<const uint32_t*>(tile + place));
    const float2 theirs = pair_at(other + d * 8 + column);
    sum = fmaf(mine.x, theirs.x, fmaf(mine.y, theirs.y, sum));
  }
  return sum_of_row(sum);
}

// What a thread copies of a matrix: one chunk of every kApart rows, which lie so far apart that they are swizzled
// alike.
template <int kSize>
struct CopiedChunk {
  static constexpr int kRowBytes = kSize * 2, kChunks = kRowBytes / 16, kApart = kAttentionThreads / kChunks;
  static_assert(kApart % 8 == 0, "whole rounds of all threads");
  int row, column, place;

  __device__ CopiedChunk() {
    int thread = threadIdx.x;
    // Else what follows from it is computed once and kept, for which the registers are too few.
    asm volatile("" : "+r"(thread));
    row = thread / kChunks;
    column = thread % kChunks * 8;
    place = chunk_offset<kRowBytes>(row, thread % kChunks);
  }

  template <typename T>
  __device__ const T* of(const HeadRows<T>& matrix, int first) const {
    return matrix.data + static_cast<int64_t>(first + row) * matrix.stride + column;
  }
};

// Starts to copy kCount rows of a matrix from `first` on, of which `count` are there, to shared memory; the others
// become zeros, and so does what is beyond the first `size` columns.
template <typename T, int kSize, int kCount>
__device__ void stage_rows(const HeadRows<T>& matrix, int first, int count, unsigned char* shared, int size = kSize) {
  const CopiedChunk<kSize> chunk;
  static_assert(kCount % CopiedChunk<kSize>::kApart == 0, "whole rounds of all threads");
  const T* from = chunk.of(matrix, first);
#pragma unroll
  for (int i = 0; i < kCount; i += chunk.kApart) {
    copy_async(shared + chunk.place + i * kSize * 2, from, chunk.row + i < count && chunk.column < size);
    from += chunk.kApart * matrix.stride;
  }
}

// The same with a tile of two matrices, which come to lie one behind the other.
template <typename T, int kSize>
__device__ void stage_tile(const HeadRows<T>& one, const HeadRows<T>& other, int first, int count,
                           unsigned char* stage) {
  const CopiedChunk<kSize> chunk;
  static_assert(kAttentionColumns % CopiedChunk<kSize>::kApart == 0, "whole rounds of all threads");
  const T *from_one = chunk.of(one, first), *from_other = chunk.of(other, first);
#pragma unroll
  for (int i = 0; i < kAttentionColumns; i += chunk.kApart) {
    const bool there = chunk.row + i < count;
    copy_async(stage + chunk.place + i * kSize * 2, from_one, there);
    copy_async(stage + chunk.place + (kAttentionColumns + i) * kSize * 2, from_other, there);
    from_one += chunk.kApart * one.stride;
    from_other += chunk.kApart * other.stride;
  }
}

// The first `size` columns from shared memory to the result, whose row 0 of the sequence `out` points at.
template <typename T, int kSize, int kCount>
__device__ void store_rows(const unsigned char* shared, T* out, int64_t stride, int first_row, int length,
                           int size = kSize) {
  constexpr int kRowBytes = kSize * 2, kChunks = kRowBytes / 16;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x) % kLanes; i < kCount * kChunks; i += kLanes) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (first_row + row >= length || chunk * 8 >= size) continue;
    const auto* from = reinterpret_cast<const uint4*>(shared + chunk_offset<kRowBytes>(row, chunk));
    *reinterpret_cast<uint4*>(out + (first_row + row) * stride + chunk * 8) = *from;
  }
}

// Where load_matrices finds [16 rows, 16 columns] of a tile: `step` counts 16 columns, `row` is a multiple of 8, and
// `lane_offset` is chunk_offset of what this lane names of the first matrix.
template <int kRowBytes>
__device__ inline const unsigned char* tile_matrix(const unsigned char* tile, int lane_offset, int row, int step) {
  return tile + (lane_offset ^ (step * 32)) + row * kRowBytes;
}

template <int kRowBytes>
__device__ inline int lane_matrix_offset(bool swapped) {
  int lane = static_cast<int>(threadIdx.x) % kLanes;
  // Else the offset is computed once and kept, for which the registers are too few.
  asm volatile("" : "+r"(lane));
  const int upper = lane / 16, odd = lane / 8 % 2;
  return chunk_offset<kRowBytes>((swapped ? upper : odd) * 8 + lane % 8, swapped ? odd : upper);
}

// sums += a b for the blocks of 16 rows from kFirst to kStop: `a` are [16 rows, 16 columns] as left operands, `b` the
// 16 rows of a tile from `row` on; `lane_offset` is lane_matrix_offset(false).
template <typename T, int kFirst, int kStop, int kBlocks, int kDims>
__device__ void add_products(float (&sums)[kBlocks][kDims][4], const uint32_t (&a)[kBlocks][4],
                             const unsigned char* tile, int lane_offset, int row) {
#pragma unroll
  for (int d = 0; d < kDims; d += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, tile_matrix<kDims * 16>(tile, lane_offset, row, d / 2));
#pragma unroll
    for (int i = kFirst; i < kStop; ++i) {
      multiply_add<T>(sums[i][d], a[i], b[0], b[1]);
      multiply_add<T>(sums[i][d + 1], a[i], b[2], b[3]);
    }
  }
}

// Sums times a factor, to the rows of `shared` from `row` on; lanes hold them as multiply_add leaves them.
template <typename T, int kDims>
__device__ void put_sums(const float (&sums)[kDims][4], float low, float high, unsigned char* shared, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half == 0 ? low : high;
#pragma unroll
    for (int d = 0; d < kDims; ++d) {
      const uint32_t pair = pack_pair<T>(sums[d][2 * half] * factor, sums[d][2 * half + 1] * factor);
      memcpy(shared + chunk_offset<kDims * 16>(row + half * 8 + lane / 4, d) + lane % 4 * 4, &pair, sizeof(pair));
    }
  }
}

// The relative bias of a head; `table` points at distance 0, `positions` at the first token of the sequence.
struct DistanceBias {
  const float* table;
  const int32_t* positions;
  int limit;

  __device__ float operator()(int row_position, int column_position) const {
    const int distance = column_position - row_position;
    return table[min(max(distance, -limit), limit)] * kLog2OfE;
  }
};

__device__ inline DistanceBias distance_bias(const Attention& p, int head, int first_token) {
  return {p.relative_bias + static_cast<int64_t>(head) * (2 * p.distance_limit + 1) + p.distance_limit,
          p.position_ids + first_token, p.distance_limit};
}

}  // namespace minilm_fast::cuda
