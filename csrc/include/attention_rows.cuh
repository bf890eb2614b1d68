#pragma once

#include <cmath>

#include "attention_mask.cuh"
#include "cuda_device.cuh"
#include "exp2.cuh"

// The rows of one warp: their queries, their running softmax and the sums of values. Scores and sums lie in registers
// as multiply_add leaves them: of each eight columns, lane i holds the columns 2 * (i % 4) and the next, of row i / 4
// (`half` 0) and of row i / 4 + 8 (`half` 1) of each block of 16 rows.
namespace minilm_fast::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = kAttentionWarps * kLanes;
constexpr int kAttentionColumns = 64;  // of a tile
constexpr float kLog2OfE = 1.44269504088896340736f;
constexpr float kLogOf2 = 0.69314718055994530942f;
// A running maximum is raised only when a score exceeds it by this, in powers of two: what it is has no effect on the
// result but for overflow, and fp16 holds probabilities up to 2^15.
constexpr float kSlack = 8.0f;

template <int kSize, bool kBias>
struct AttentionShape {
  static constexpr int kColumns = kAttentionColumns;
  // Blocks of 16 rows of a warp. Two halve what is read from shared memory for each product, where they fit into
  // registers.
  static constexpr int kBlocks = kSize == 128 || kBias ? 1 : 2;
  static constexpr int kWarpRows = kBlocks * 16;
  static constexpr int kRows = kAttentionWarps * kWarpRows;
  static constexpr int kRowBytes = kSize * 2;
  static constexpr int kMatrixBytes = kColumns * kRowBytes;
  static constexpr int kStageBytes = 2 * kMatrixBytes;   // keys, then values
  static constexpr int kResident = kSize == 32 ? 3 : 2;  // blocks of threads that are to fit on a multiprocessor
  // One exponential of so many is a polynomial. At size 32 the special-function unit is what takes longest.
  static constexpr int kPolynomialEvery = kSize == 32 ? 8 : 0;
  static_assert(kRows * kRowBytes <= kStageBytes, "queries and results take the place of a stage");
};

// Where load_matrices finds [16 rows, 16 columns] of a tile: `step` counts 16 columns, `row` is a multiple of 8, and
// `lane_offset` is chunk_offset of what this lane names of the first matrix.
template <int kRowBytes>
__device__ inline const unsigned char* tile_matrix(const unsigned char* tile, int lane_offset, int row, int step) {
  return tile + (lane_offset ^ (step * 32)) + row * kRowBytes;
}

template <int kRowBytes>
__device__ inline int lane_matrix_offset(bool swapped) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, upper = lane / 16, odd = lane / 8 % 2;
  return chunk_offset<kRowBytes>((swapped ? upper : odd) * 8 + lane % 8, swapped ? odd : upper);
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

template <typename T, int kSize, bool kBias>
class WarpRows {
  using Shape = AttentionShape<kSize, kBias>;
  static constexpr int kBlocks = Shape::kBlocks;
  static constexpr int kPairs = Shape::kColumns / 8;
  static constexpr int kDims = kSize / 8;
  using Scores = float[kBlocks][kPairs][4];

 public:
  // `first_row` is one of the sequence, `scale` in powers of two; the queries of the warp are the first rows of
  // `queries`.
  __device__ WarpRows(const Sequence& sequence, int first_row, float scale, const DistanceBias& bias,
                      const unsigned char* queries)
      : sequence_(sequence), bias_(bias), first_row_(first_row), scale_(scale == 0.0f ? 1.0f : fabsf(scale)) {
    // The maximum is sought before the scale is applied, so the scale's sign goes to the queries.
    const uint32_t kept = scale == 0.0f ? 0u : 0xffffffffu, sign = scale < 0.0f ? 0x80008000u : 0u;
    const int lane_offset = lane_matrix_offset<Shape::kRowBytes>(false);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d) {
        load_matrices(q_[b][d], tile_matrix<Shape::kRowBytes>(queries, lane_offset, b * 16, d));
#pragma unroll
        for (int i = 0; i < 4; ++i) q_[b][d][i] = (q_[b][d][i] & kept) ^ sign;
      }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest_[b][half] = -INFINITY;
        prefix_[b][half] = sequence.prefix(row(b, half)) - static_cast<int>(threadIdx.x) % 4 * 2;
        if (kBias) position_[b][half] = row(b, half) < sequence.length ? bias.positions[row(b, half)] : 0;
      }
  }

  // What pseudo rows see of themselves, before anything else; `k` and `v` are this head's of the sequence's first
  // token.
  __device__ void see_themselves(const T* k, int64_t k_token, const T* v, int64_t v_token) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, column = lane % 4 * 2;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool own = row(b, half) >= sequence_.end && row(b, half) < sequence_.length;
        const int64_t token = own ? row(b, half) : 0;
        float score = 0.0f;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const float2 query = unpack_pair<T>(q_[b][d / 2][half + d % 2 * 2]);
          const float2 key = pair_at(k + token * k_token + d * 8 + column);
          score = fmaf(query.x, key.x, fmaf(query.y, key.y, score));
        }
        score += __shfl_xor_sync(kFullWarp, score, 1);
        score += __shfl_xor_sync(kFullWarp, score, 2);
        if (!own) continue;
        score *= scale_;
        if (kBias) score += bias_.table[0] * kLog2OfE;
        largest_[b][half] = score;
        // The lanes of a row hold parts of its sum.
        sum_[b][half] = lane % 4 == 0 ? 1.0f : 0.0f;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const float2 value = pair_at(v + token * v_token + d * 8 + column);
          values_[b][d][2 * half] = value.x;
          values_[b][d][2 * half + 1] = value.y;
        }
      }
  }

  // Adds the columns from `first_column` on. kMasked: not all rows see all 64; none sees more than the first `columns`.
  template <bool kMasked>
  __device__ void add(const unsigned char* stage, int first_column, int columns) {
    Scores scores;
    multiply_keys<kMasked>(scores, stage, columns);
    if (kBias) add_bias<kMasked>(scores, first_column, columns);
    if (kMasked) hide(scores, first_column, columns);
    raise_maximum<kMasked>(scores, columns);
    multiply_values<kMasked>(scores, stage + Shape::kMatrixBytes, columns);
  }

  // Leaves the results in the first rows of `shared`, which are this warp's, and the log-sum-exps at `lse`, which
  // points at row 0 of the sequence.
  __device__ void finish(unsigned char* shared, float* lse) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = sum_[b][half];
        sum += __shfl_xor_sync(kFullWarp, sum, 1);
        sum += __shfl_xor_sync(kFullWarp, sum, 2);
        const float inverse = 1.0f / sum;
        const int place = b * 16 + half * 8 + lane / 4;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const uint32_t pair = pack_pair<T>(values_[b][d][2 * half] * inverse, values_[b][d][2 * half + 1] * inverse);
          memcpy(shared + chunk_offset<Shape::kRowBytes>(place, d) + lane % 4 * 4, &pair, sizeof(pair));
        }
        if (lane % 4 == 0 && row(b, half) < sequence_.length)
          lse[row(b, half)] = (largest_[b][half] + log2f(sum)) * kLogOf2;
      }
  }

 private:
  __device__ int row(int block, int half) const {
    return first_row_ + block * 16 + half * 8 + static_cast<int>(threadIdx.x) % kLanes / 4;
  }

  __device__ static float2 pair_at(const T* place) { return unpack_pair<T>(*reinterpret_cast<const uint32_t*>(place)); }

  // Of a tile that is masked, whether the 16 columns to which those from 8 * n on belong are not looked at.
  template <bool kMasked>
  __device__ static bool left_out(int n, int columns) {
    return kMasked && n / 2 * 16 >= columns;
  }

  template <bool kMasked>
  __device__ void multiply_keys(Scores& scores, const unsigned char* keys, int columns) const {
    const int lane_offset = lane_matrix_offset<Shape::kRowBytes>(true);
#pragma unroll
    for (int n = 0; n < kPairs; n += 2) {
      if (left_out<kMasked>(n, columns)) continue;
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d) {
        uint32_t k[4];
        load_matrices(k, tile_matrix<Shape::kRowBytes>(keys, lane_offset, n * 8, d));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          if (d == 0) {
            multiply<T>(scores[b][n], q_[b][d], k[0], k[1]);
            multiply<T>(scores[b][n + 1], q_[b][d], k[2], k[3]);
          } else {
            multiply_add<T>(scores[b][n], q_[b][d], k[0], k[1]);
            multiply_add<T>(scores[b][n + 1], q_[b][d], k[2], k[3]);
          }
        }
      }
    }
  }

  template <bool kMasked>
  __device__ void add_bias(Scores& scores, int first_column, int columns) const {
#pragma unroll
    for (int n = 0; n < kPairs; ++n) {
      if (left_out<kMasked>(n, columns)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = first_column + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i;
        const int position = column < sequence_.length ? bias_.positions[column] : 0;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& score = scores[b][n][2 * half + i];
            score = fmaf(score, scale_, bias_(position_[b][half], position));
          }
      }
    }
  }

  __device__ void hide(Scores& scores, int first_column, int columns) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Columns of this lane from here on are hidden.
        const int end = prefix_[b][half] - first_column;
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          if (left_out<true>(n, columns)) continue;
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (n * 8 + i >= end) scores[b][n][2 * half + i] = -INFINITY;
        }
      }
  }

  template <bool kMasked>
  __device__ void raise_maximum(const Scores& scores, int columns) {
    bool raised = false;
    float larger[kBlocks][2];
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = scores[b][0][2 * half];
#pragma unroll
        for (int n = 0; n < kPairs; ++n) {
          if (left_out<kMasked>(n, columns)) continue;
          most = largest_or_nan(most, largest_or_nan(scores[b][n][2 * half], scores[b][n][2 * half + 1]));
        }
        most = largest_or_nan(most, __shfl_xor_sync(kFullWarp, most, 1));
        most = largest_or_nan(most, __shfl_xor_sync(kFullWarp, most, 2));
        if (!kBias) most *= scale_;
        const float before = largest_[b][half];
        // So put, a maximum that is no number is taken over.
        larger[b][half] = most <= before + kSlack ? before : most;
        raised |= !(most <= before + kSlack);
      }
    if (!__any_sync(kFullWarp, raised)) return;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // 1 for a row whose maximum stays, unless it has seen nothing yet.
        const float factor =
            larger[b][half] == largest_[b][half] ? 1.0f : exp2_approximate(largest_[b][half] - larger[b][half]);
        largest_[b][half] = larger[b][half];
        sum_[b][half] *= factor;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          values_[b][d][2 * half] *= factor;
          values_[b][d][2 * half + 1] *= factor;
        }
      }
  }

  // Probabilities and their products with the values. Masked scores all go to the special-function unit, which makes 0
  // of -infinity.
  template <bool kMasked>
  __device__ void multiply_values(Scores& scores, const unsigned char* values, int columns) {
    const int lane_offset = lane_matrix_offset<Shape::kRowBytes>(false);
    const float unit = kBias ? 1.0f : scale_;
#pragma unroll
    for (int n = 0; n < kPairs; n += 2) {
      if (left_out<kMasked>(n, columns)) continue;
      uint32_t p[kBlocks][4];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int half = r % 2, place = n + r / 2;
          float pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float exponent = fmaf(scores[b][place][2 * half + i], unit, -largest_[b][half]);
            pair[i] = exp2_shared_out<kMasked ? 0 : Shape::kPolynomialEvery>(exponent, place * 4 + 2 * half + i);
            sum_[b][half] += pair[i];
          }
          p[b][r] = pack_pair<T>(pair[0], pair[1]);
        }
#pragma unroll
      for (int d = 0; d < kDims; d += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, tile_matrix<Shape::kRowBytes>(values, lane_offset, n * 8, d / 2));
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          multiply_add<T>(values_[b][d], p[b], v[0], v[1]);
          multiply_add<T>(values_[b][d + 1], p[b], v[2], v[3]);
        }
      }
    }
  }

  Sequence sequence_;
  DistanceBias bias_;
  int first_row_;
  float scale_;
  uint32_t q_[kBlocks][kSize / 16][4];
  int position_[kBlocks][2];
  int prefix_[kBlocks][2];
  float largest_[kBlocks][2];
  float sum_[kBlocks][2] = {};
  float values_[kBlocks][kDims][4] = {};
};

}  // namespace minilm_fast::cuda
