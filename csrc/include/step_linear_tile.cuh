#pragma once

#include "cuda_device.cuh"
#include "row_norm.cuh"
#include "step_cuda.h"

// The products of a block of rows with a block of outputs. Features come in slabs of 128, several of which are on their
// way at a time; of each slab every fourth warp takes a quarter, so that few rows and outputs still keep four warps
// busy. What the four have summed is added in the end, in order: a result is the same in every shape of tile.
namespace minilm_fast::cuda {

constexpr int kSlab = 128;
constexpr int kSlabBytes = 2 * kSlab;  // of a row
constexpr int kSplit = 4;

template <int kRowsOfTile, int kColumnsOfTile, int kRowWarps, int kStagesOfTile>
struct StepShape {
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kColumns = kColumnsOfTile;
  static constexpr int kStages = kStagesOfTile;
  static constexpr int kThreads = kRowWarps * kSplit * kLanes;
  static constexpr int kWarpRows = kRows / kRowWarps;
  static constexpr int kRowBytes = kRows * kSlabBytes;        // of a slab of x
  static constexpr int kColumnBytes = kColumns * kSlabBytes;  // of a slab of the weight
  static constexpr int kSumStride = kColumns + 8;             // lanes store their sums without bank conflicts
  static constexpr int kSumBytes = kSplit * kRows * kSumStride * static_cast<int>(sizeof(float));

  // With a norm all slabs of x are there at once. The sums take the place of the operands.
  static int shared_bytes(bool norm, int slabs) {
    const int operands = (norm ? slabs : kStages) * kRowBytes + kStages * kColumnBytes;
    return operands > kSumBytes ? operands : kSumBytes;
  }
};

inline int step_slabs(int features) { return (features + kSlab - 1) / kSlab; }

// Starts to copy a slab of `kLines` rows, of which `lines` exist; zeros stand for what does not.
template <typename T, int kLines, int kThreads>
__device__ void stage_slab(const T* source, int64_t stride, int lines, int features, int slab, unsigned char* to) {
  constexpr int kChunks = kSlab / kStepChunk;
#pragma unroll
  for (int i = threadIdx.x; i < kLines * kChunks; i += kThreads) {
    const int line = i / kChunks, chunk = i % kChunks, feature = slab * kSlab + chunk * kStepChunk;
    const bool valid = line < lines && feature < features;
    copy_async(to + chunk_offset<kSlabBytes>(line, chunk), source + (valid ? line * stride + feature : 0), valid);
  }
}

// Normalises the rows of a block to slabs in shared memory and, if `normal` is not null, to there. A warp takes kAtOnce
// rows at a time, so that it waits for memory once for all of them.
template <typename T, typename Shape, int kAtOnce, int kSpans>
__device__ void normalise_rows(const StepLinear& p, int first_row, T* normal, unsigned char* slabs) {
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int first = warp * kAtOnce; first < Shape::kRows; first += Shape::kThreads / kLanes * kAtOnce) {
    LaneRow<kSpans> rows[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      const int row = min(first_row + first + r, p.rows - 1);
      rows[r].load(static_cast<const float*>(p.x) + row * p.x_row, p.features);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      rows[r].normalise(p.norm_weight, p.norm_bias, p.eps, p.features);
#pragma unroll
      for (int s = 0; s < kSpans; ++s) {
        if (s * kSlab >= p.features) continue;
        const int place = s * Shape::kRowBytes + chunk_offset<kSlabBytes>(first + r, lane / 2) + lane % 2 * 8;
        *reinterpret_cast<uint2*>(slabs + place) = rows[r].template packed<T>(s);
      }
      const int64_t row = first_row + first + r;
      if (normal != nullptr && row < p.rows) rows[r].store(normal + row * p.features, p.features);
    }
  }
}

template <typename T, typename Shape>
struct StepProduct {
  static constexpr int kBlocks = Shape::kWarpRows / 16;
  float sums[kBlocks][Shape::kColumns / 8][4] = {};

  __device__ void add(const unsigned char* rows, const unsigned char* columns) {
    const int warp = static_cast<int>(threadIdx.x) / kLanes;
    const int row = warp / kSplit * Shape::kWarpRows, first = warp % kSplit * (kSlab / kSplit);
#pragma unroll
    for (int d = 0; d < kSlab / kSplit; d += 16) {
      uint32_t x[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
        load_matrices(x[m], matrix_row<kSlabBytes>(rows, row + m * 16, first + d, false));
#pragma unroll
      for (int n = 0; n < Shape::kColumns / 8; n += 2) {
        uint32_t w[4];
        load_matrices(w, matrix_row<kSlabBytes>(columns, n * 8, first + d, true));
#pragma unroll
        for (int m = 0; m < kBlocks; ++m) {
          multiply_add<T>(sums[m][n], x[m], w[0], w[1]);
          multiply_add<T>(sums[m][n + 1], x[m], w[2], w[3]);
        }
      }
    }
  }

  __device__ void store(float* shared) const {
    const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
    const int row = warp % kSplit * Shape::kRows + warp / kSplit * Shape::kWarpRows + lane / 4;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int n = 0; n < Shape::kColumns / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int place = (row + m * 16 + half * 8) * Shape::kSumStride + n * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(shared + place) = {sums[m][n][2 * half], sums[m][n][2 * half + 1]};
        }
  }
};

// Leaves the sums of the four parts of the features in shared memory, [kSplit, kRows, kSumStride].
template <typename T, typename Shape, bool kNorm>
__device__ const float* multiply_step_tile(const StepLinear& p, int first_row, int first_column) {
  unsigned char* shared = shared_memory();
  const int slabs = (p.features + kSlab - 1) / kSlab;
  unsigned char* rows = shared + Shape::kStages * Shape::kColumnBytes;
  const auto* weight = static_cast<const T*>(p.weight) + static_cast<int64_t>(first_column) * p.features;
  const auto* x = static_cast<const T*>(p.x) + first_row * p.x_row;
  const auto stage_weight = [&](int slab) {
    if (slab < slabs)
      stage_slab<T, Shape::kColumns, Shape::kThreads>(weight, p.features, p.outputs - first_column, p.features, slab,
                                                      shared + slab % Shape::kStages * Shape::kColumnBytes);
  };
  const auto stage_rows = [&](int slab) {
    if (!kNorm && slab < slabs)
      stage_slab<T, Shape::kRows, Shape::kThreads>(x, p.x_row, p.rows - first_row, p.features, slab,
                                                   rows + slab % Shape::kStages * Shape::kRowBytes);
    commit_copies();
  };
  // What an early kernel may read before the one before has ended is the weight.
  for (int s = 0; p.early && s < Shape::kStages - 1; ++s) stage_weight(s);
  wait_for_previous();
  for (int s = 0; s < Shape::kStages - 1; ++s) {
    if (!p.early) stage_weight(s);
    stage_rows(s);
  }
  let_next_start();
  if constexpr (kNorm) {
    T* normal = first_column == 0 ? static_cast<T*>(p.normal) : nullptr;
    if (p.features <= 3 * kLaneSpan)
      normalise_rows<T, Shape, 4, 3>(p, first_row, normal, rows);
    else
      normalise_rows<T, Shape, 2, kMostStepNorm / kLaneSpan>(p, first_row, normal, rows);
  }
  StepProduct<T, Shape> product;
  for (int slab = 0; slab < slabs; ++slab) {
    wait_copies<Shape::kStages - 2>();
    // Also: nobody reads any more what the next copies replace.
    __syncthreads();
    stage_weight(slab + Shape::kStages - 1);
    stage_rows(slab + Shape::kStages - 1);
    const int place = slab % Shape::kStages;
    product.add(rows + (kNorm ? slab : place) * Shape::kRowBytes, shared + place * Shape::kColumnBytes);
  }
  wait_copies<0>();
  __syncthreads();
  product.store(reinterpret_cast<float*>(shared));
  __syncthreads();
  return reinterpret_cast<const float*>(shared);
}

}  // namespace minilm_fast::cuda
