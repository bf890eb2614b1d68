#pragma once

#include <cmath>

#include "attention_mask.cuh"
#include "attention_tiles.cuh"
#include "cuda_device.cuh"
#include "exp2.cuh"
#include "philox.cuh"

// The rows of one warp: their queries, their running softmax and the sums of values. Scores and sums lie in registers
// as multiply_add leaves them: of each eight columns, lane i holds the columns 2 * (i % 4) and the next, of row i / 4
// (`half` 0) and of row i / 4 + 8 (`half` 1) of each block of 16 rows.
namespace minilm_fast::cuda {

// Of a lane's probabilities of a row in a tile. What is taken off the exponents has no effect on a result but for
// overflow, and the largest number of fp16 is just below 2^16.
constexpr float kLargestSum = 32768.0f;

template <int kSize, bool kBias, bool kDropout>
struct AttentionShape {
  static constexpr int kColumns = kAttentionColumns;
  // Blocks of 16 rows of a warp. Two halve what is read from shared memory for each product, where they fit into
  // registers.
  static constexpr int kBlocks = kSize == 128 || kBias ? 1 : 2;
  static constexpr int kWarpRows = kBlocks * 16;
  static constexpr int kRows = kAttentionWarps * kWarpRows;
  static constexpr int kRowBytes = kSize * 2;
  static constexpr int kMatrixBytes = kColumns * kRowBytes;
  static constexpr int kStageBytes = 2 * kMatrixBytes;  // keys, then values
  // Blocks of threads that are to fit on a multiprocessor.
  static constexpr int kResident = kSize == 32 && !kDropout ? 3 : 2;
  // One exponential of so many is a polynomial. At size 32 the special-function unit is what takes longest.
  static constexpr int kPolynomialEvery = kSize == 32 && !kDropout ? 16 : 0;
  // Two stages and the queries; the results take the place of the first stage.
  static constexpr int kSharedBytes = 2 * kStageBytes + kRows * kRowBytes;
  static_assert(kRows * kRowBytes <= kStageBytes, "room for the results");
};

template <typename T, int kSize, bool kBias, bool kDropout>
class WarpRows {
  using Shape = AttentionShape<kSize, kBias, kDropout>;
  static constexpr int kBlocks = Shape::kBlocks;
  static constexpr int kPairs = Shape::kColumns / 8;
  static constexpr int kDims = kSize / 8;
  using Scores = float[kBlocks][kPairs][4];

 public:
  // `first_row` is one of the sequence, `scale` in powers of two. The warp's queries are the first rows of `queries`,
  // where they stay: they take no registers but while keys are multiplied.
  __device__ WarpRows(const Sequence& sequence, int first_row, float scale, const DistanceBias& bias,
                      const KeptElements& elements, unsigned char* queries)
      : sequence_(sequence),
        bias_(bias),
        elements_(elements),
        queries_(queries),
        first_row_(first_row),
        scale_(scale == 0.0f ? 1.0f : fabsf(scale)) {
    if (scale <= 0.0f) scale_queries(scale == 0.0f ? 0u : 0xffffffffu);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest_[b][half] = -INFINITY;
        if (kBias) position_[b][half] = row(b, half) < sequence.length ? bias.positions[row(b, half)] : 0;
      }
  }

  // What pseudo rows see of themselves, before anything else; rows of `k` and `v` are tokens.
  __device__ void see_themselves(const HeadRows<T>& k, const HeadRows<T>& v) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, column = lane % 4 * 2;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool own = row(b, half) >= sequence_.end && row(b, half) < sequence_.length;
        const int64_t token = sequence_.first + (own ? row(b, half) : 0);
        const int place = b * 16 + half * 8 + lane / 4;
        float score = multiply_row<T, kSize>(queries_, place, k.data + token * k.stride) * scale_;
        if (!own) continue;
        if (kBias) score += bias_.table[0] * kLog2OfE;
        largest_[b][half] = score;
        // The lanes of a row hold parts of its sum.
        sum_[b][half] = lane % 4 == 0 ? 1.0f : 0.0f;
        if (kDropout && !elements_.one(sequence_.shift + row(b, half), row(b, half))) continue;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const float2 value = pair_at(v.data + token * v.stride + d * 8 + column);
          values_[b][d][2 * half] = value.x;
          values_[b][d][2 * half + 1] = value.y;
        }
      }
  }

  // Before the tile of 64 columns from `first_column` on is added.
  __device__ void draw(int first_column) { kept_.draw(elements_, sequence_.shift + row(0, 0), first_column); }

  // Adds 64 columns from `first_column` on, all of which all rows see. But for the first tile, a maximum is not sought:
  // probabilities are taken with the one that there is, and only if they are too large, everything is done again with
  // maxima of the rows concerned.
  __device__ void add_full(const unsigned char* stage, int first_column) {
    uint32_t p[kPairs / 2][kBlocks][4];
    float sums[kBlocks][2];
    weigh(stage, first_column, first_column == 0 ? ~0u : 0u, p, sums);
    if (first_column != 0 && too_large(sums)) weigh(stage, first_column, rows_too_large(sums), p, sums);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) sum_[b][half] += sums[b][half];
    const int lane_offset = lane_matrix_offset<Shape::kRowBytes>(false);
#pragma unroll
    for (int n = 0; n < kPairs; n += 2)
      add_products<T, 0, kBlocks>(values_, p[n / 2], stage + Shape::kMatrixBytes, lane_offset, n * 8);
  }

  // Adds columns of which not all rows see all; none sees more than the first `columns`. Block after block, since masks
  // need registers too.
  __device__ void add_partial(const unsigned char* stage, int first_column, int columns) {
    add_partial_block<0>(stage, first_column, columns);
    if constexpr (kBlocks > 1) add_partial_block<1>(stage, first_column, columns);
  }

  // Leaves the results, times a factor, in the first rows of `shared`, which are this warp's, and the log-sum-exps at
  // `lse`, which points at row 0 of the sequence.
  __device__ void finish(unsigned char* shared, float* lse, float factor) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      float inverse[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float sum = sum_of_row(sum_[b][half]);
        inverse[half] = (kDropout ? factor : 1.0f) / sum;
        if (lane % 4 == 0 && row(b, half) < sequence_.length)
          lse[row(b, half)] = (largest_[b][half] + log2f(sum)) * kLogOf2;
      }
      put_sums<T>(values_[b], inverse[0], inverse[1], shared, b * 16);
    }
  }

 private:
  __device__ int row(int block, int half) const {
    return first_row_ + block * 16 + half * 8 + static_cast<int>(threadIdx.x) % kLanes / 4;
  }

  // Maxima are sought before the scale is applied, so a scale that is not positive makes itself felt here.
  __device__ void scale_queries(uint32_t kept) const {
    auto* words = reinterpret_cast<uint32_t*>(queries_);
    for (int i = static_cast<int>(threadIdx.x) % kLanes; i < Shape::kWarpRows * Shape::kRowBytes / 4; i += kLanes)
      words[i] = (words[i] ^ 0x80008000u) & kept;
    __syncwarp();
  }

  // Of a tile that is masked, whether the 16 columns to which those from 8 * n on belong are not looked at.
  template <bool kMasked>
  __device__ static bool left_out(int n, int columns) {
    return kMasked && n / 2 * 16 >= columns;
  }

  // All exponentials are the special-function unit's, which makes 0 of -infinity.
  template <int kBlock>
  __device__ void add_partial_block(const unsigned char* stage, int first_column, int columns) {
    Scores scores;
    multiply_keys<true, kBlock, kBlock + 1>(scores, stage, columns);
    if (kBias) add_bias<true>(scores, first_column, columns);
    hide<kBlock>(scores, first_column, columns);
    raise_maximum<true, kBlock, kBlock + 1>(scores, columns, ~0u);
    const int lane_offset = lane_matrix_offset<Shape::kRowBytes>(false);
#pragma unroll
    for (int n = 0; n < kPairs; n += 2) {
      if (left_out<true>(n, columns)) continue;
      uint32_t p[kBlocks][4];
      exponentiate<0, kBlock, kBlock + 1>(scores, n, p, sum_);
      add_products<T, kBlock, kBlock + 1>(values_, p, stage + Shape::kMatrixBytes, lane_offset, n * 8);
    }
  }

  // Probabilities of a full tile and their sums, after the maxima of the rows in `rising` were raised.
  __device__ void weigh(const unsigned char* stage, int first_column, unsigned rising,
                        uint32_t (&p)[kPairs / 2][kBlocks][4], float (&sums)[kBlocks][2]) {
    Scores scores;
    multiply_keys<false, 0, kBlocks>(scores, stage, Shape::kColumns);
    if (kBias) add_bias<false>(scores, first_column, Shape::kColumns);
    if (__any_sync(kFullWarp, rising != 0)) raise_maximum<false, 0, kBlocks>(scores, Shape::kColumns, rising);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[b][half] = 0.0f;
#pragma unroll
    for (int n = 0; n < kPairs; n += 2) exponentiate<Shape::kPolynomialEvery, 0, kBlocks>(scores, n, p[n / 2], sums);
  }

  // Of the blocks of rows from kFirst to kStop, as in the functions below.
  template <bool kMasked, int kFirst, int kStop>
  __device__ void multiply_keys(Scores& scores, const unsigned char* keys, int columns) const {
    const int query_offset = lane_matrix_offset<Shape::kRowBytes>(false);
    const int key_offset = lane_matrix_offset<Shape::kRowBytes>(true);
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d) {
      uint32_t q[kBlocks][4];
#pragma unroll
      for (int b = kFirst; b < kStop; ++b)
        load_matrices(q[b], tile_matrix<Shape::kRowBytes>(queries_, query_offset, b * 16, d));
#pragma unroll
      for (int n = 0; n < kPairs; n += 2) {
        if (left_out<kMasked>(n, columns)) continue;
        uint32_t k[4];
        load_matrices(k, tile_matrix<Shape::kRowBytes>(keys, key_offset, n * 8, d));
#pragma unroll
        for (int b = kFirst; b < kStop; ++b) {
          if (d == 0) {
            multiply<T>(scores[b][n], q[b], k[0], k[1]);
            multiply<T>(scores[b][n + 1], q[b], k[2], k[3]);
          } else {
            multiply_add<T>(scores[b][n], q[b], k[0], k[1]);
            multiply_add<T>(scores[b][n + 1], q[b], k[2], k[3]);
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

  template <int kBlock>
  __device__ void hide(Scores& scores, int first_column, int columns) const {
    int first_row = first_row_;
    // Else the prefixes are computed once and kept, for which the registers are too few.
    asm volatile("" : "+r"(first_row));
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows beyond the end are taken for the last, so that their maxima are numbers.
      const int row = min(first_row + kBlock * 16 + half * 8 + lane / 4, sequence_.length - 1);
      // Columns of this lane from here on are hidden.
      const int end = sequence_.prefix(row) - first_column - lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        if (left_out<true>(n, columns)) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (n * 8 + i >= end) scores[kBlock][n][2 * half + i] = -INFINITY;
      }
    }
  }

  // Whether probabilities of a row of the warp are too large, or no numbers.
  __device__ static bool too_large(const float (&sums)[kBlocks][2]) {
    bool found = false;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) found |= !(sums[b][half] <= kLargestSum);
    return __any_sync(kFullWarp, found);
  }

  // The rows of this lane for which that holds: bit 2 * block + half, the same in the four lanes of a row.
  __device__ static unsigned rows_too_large(const float (&sums)[kBlocks][2]) {
    const int first_lane = static_cast<int>(threadIdx.x) % kLanes / 4 * 4;
    unsigned found = 0;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned votes = __ballot_sync(kFullWarp, !(sums[b][half] <= kLargestSum));
        if ((votes >> first_lane & 15u) != 0) found |= 1u << (2 * b + half);
      }
    return found;
  }

  // Raises the maxima of the rows in `rising` to those of the scores.
  template <bool kMasked, int kFirst, int kStop>
  __device__ void raise_maximum(const Scores& scores, int columns, unsigned rising) {
#pragma unroll
    for (int b = kFirst; b < kStop; ++b)
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
        const bool stays = (rising >> (2 * b + half) & 1u) == 0 || most <= before;
        const float factor = stays ? 1.0f : exp2_approximate(before - most);
        if (!stays) largest_[b][half] = most;
        sum_[b][half] *= factor;
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          values_[b][d][2 * half] *= factor;
          values_[b][d][2 * half + 1] *= factor;
        }
      }
  }

  // Probabilities of the 16 columns from 8 * n on, as left operands of their products with values; adds to this lane's
  // part of the sum of each row.
  template <int kPolynomialEvery, int kFirst, int kStop>
  __device__ void exponentiate(const Scores& scores, int n, uint32_t (&p)[kBlocks][4],
                               float (&sums)[kBlocks][2]) const {
    const float unit = kBias ? 1.0f : scale_;
#pragma unroll
    for (int b = kFirst; b < kStop; ++b)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int half = r % 2, place = n + r / 2;
        float pair[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float exponent = fmaf(scores[b][place][2 * half + i], unit, -largest_[b][half]);
          pair[i] = exp2_shared_out<kPolynomialEvery>(exponent, place * 4 + 2 * half + i);
          sums[b][half] += pair[i];
          if (kDropout && !kept_(b, half, r / 2, i, n / 2)) pair[i] = 0.0f;
        }
        p[b][r] = pack_pair<T>(pair[0], pair[1]);
        // Else the compiler packs only where the pair is used, and both numbers take a register until then.
        asm volatile("" : "+r"(p[b][r]));
      }
  }

  Sequence sequence_;
  DistanceBias bias_;
  KeptElements elements_;
  unsigned char* queries_;
  int first_row_;
  float scale_;
  int position_[kBlocks][2];
  KeptInTile<kBlocks> kept_;
  float largest_[kBlocks][2];
  float sum_[kBlocks][2] = {};
  float values_[kBlocks][kDims][4] = {};
};

}  // namespace minilm_fast::cuda
