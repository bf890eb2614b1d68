#pragma once

#include "attention_bias_sums.cuh"
#include "attention_mask.cuh"
#include "attention_tiles.cuh"
#include "philox.cuh"

// The gradients that one warp owns: those of 16 or 32 rows of q, or of as many rows of k and v. The warp's own rows are
// left operands; the others come in tiles, of which 16 rows are taken at a time: their square of scores and that of the
// gradients of probabilities lie in registers as multiply_add leaves them, [own rows, others], and are left operands
// themselves for the sums. What is taken off the gradients of probabilities is where their products start from.
namespace minilm_fast::cuda {

template <int kSize, bool kBias, bool kDropout>
struct GradientShape {
  static constexpr int kOthers = kAttentionColumns;  // of a tile
  static constexpr int kRowBytes = kSize * 2;
  static constexpr int kMatrixBytes = kOthers * kRowBytes;
  static constexpr int kTileBytes = 2 * kMatrixBytes;
  // What follows behind a tile of rows: two numbers a row and, with dropout, what is kept of 128 columns.
  static constexpr int kStatisticsBytes = 2 * kOthers * static_cast<int>(sizeof(float));
  static constexpr int kKeptOffset = kTileBytes + kStatisticsBytes;
  // Blocks of 16 rows of a warp: two halve what is read from shared memory for each product, where they fit into
  // registers.
  static constexpr int kRowBlocks = kSize == 128 || kBias ? 1 : 2;
  static constexpr int kColumnBlocks = kSize == 32 ? 2 : 1;
  // Squares of a tile whose instructions may be mixed, for which other instances have too few registers.
  static constexpr int kUnrolled = kSize != 32 || kBias ? 1 : kDropout ? 2 : 4;
};

template <int kBlocks>
using Square = float[kBlocks][2][4];

// [16 * kBlocks, kSize] of shared memory as left operands, kept in registers where there are enough.
template <typename T, int kSize, int kBlocks, bool kKept>
class LeftRows {
 public:
  __device__ explicit LeftRows(const unsigned char* rows) : rows_(rows) {
    if constexpr (kKept) {
#pragma unroll
      for (int d = 0; d < kSize / 16; ++d) load(d, kept_[d]);
    }
  }

  // square = start + rows x others, for the 16 others of a tile from `other` on.
  __device__ void multiply_others(Square<kBlocks>& square, const Square<kBlocks>& start, const unsigned char* tile,
                                  int offset, int other) const {
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d) {
      uint32_t a[kBlocks][4], b[4];
      operand(d, a);
      load_matrices(b, tile_matrix<kSize * 2>(tile, offset, other, d));
#pragma unroll
      for (int i = 0; i < kBlocks; ++i)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          if (d == 0)
            multiply_onto<T>(square[i][t], start[i][t], a[i], b[2 * t], b[2 * t + 1]);
          else
            multiply_add<T>(square[i][t], a[i], b[2 * t], b[2 * t + 1]);
        }
    }
  }

 private:
  __device__ void load(int d, uint32_t (&a)[kBlocks][4]) const {
    const int offset = lane_matrix_offset<kSize * 2>(false);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) load_matrices(a[i], tile_matrix<kSize * 2>(rows_, offset, i * 16, d));
  }

  __device__ void operand(int d, uint32_t (&a)[kBlocks][4]) const {
    if constexpr (kKept)
      memcpy(a, kept_[d], sizeof(a));
    else
      load(d, a);
  }

  const unsigned char* rows_;
  uint32_t kept_[kKept ? kSize / 16 : 1][kBlocks][4];
};

template <typename T, int kBlocks>
__device__ void pack_square(const Square<kBlocks>& square, uint32_t (&a)[kBlocks][4]) {
#pragma unroll
  for (int b = 0; b < kBlocks; ++b)
#pragma unroll
    for (int r = 0; r < 4; ++r) a[b][r] = pack_pair<T>(square[b][r / 2][r % 2 * 2], square[b][r / 2][r % 2 * 2 + 1]);
}

// Gradients of rows of q and, where wanted, of the bias; the others are keys and values.
template <typename T, int kSize, bool kBias, bool kDropout, bool kBiasGradient>
class RowGradients {
  using Shape = GradientShape<kSize, kBias, kDropout>;
  static constexpr int kBlocks = Shape::kRowBlocks;
  static constexpr int kDims = kSize / 8;

 public:
  // `first_row` is one of the sequence; `queries` and `gradients` hold the warp's rows of q and grad_out. Leaves what
  // the gradients of columns need of these rows in `statistics`.
  __device__ RowGradients(const AttentionGradients& p, const Sequence& sequence, int head, int first_row,
                          unsigned char* queries, const unsigned char* gradients)
      : sequence_(sequence),
        first_row_(first_row),
        scale_(p.forward.scale * kLog2OfE),
        elements_(p.forward.dropout, head),
        factor_(p.forward.dropout.scale),
        queries_(queries),
        gradients_(gradients) {
    if (kBias) bias_ = distance_bias(p.forward, head, sequence.first);
    const HeadRows<T> out = head_rows<T>(p.out, p.out_token, p.out_head, head);
    const int64_t statistics = head * p.forward.queries + sequence.shift;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = b * 16 + half * 8 + lane / 4;
        // Rows beyond the end are taken for the last: nothing of them is kept.
        const int row = min(first_row + place, sequence.length - 1);
        const float level = -multiply_row<T, kSize>(gradients, place, out.data + (sequence.shift + row) * out.stride);
        exponent_[b][half] = -p.forward.lse[statistics + row] * kLog2OfE;
        level_[b][half] = level;
        if (kBias) position_[b][half] = bias_.positions[row];
        if (lane % 4 == 0 && first_row + place < sequence.length) {
          p.statistics[statistics + row] = exponent_[b][half];
          p.statistics[p.forward.heads * p.forward.queries + statistics + row] = level;
        }
      }
  }

  // Before anything is added, if the gradient of the bias is wanted; `shared` is the block's room for it.
  __device__ void begin_bias(const AttentionGradients& p, int head, const unsigned char* gradients,
                             unsigned char* shared) {
    const HeadRows<T> g = head_rows<T>(p.grad_out, p.grad_token, p.grad_head, head);
    float norm = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int place = i * 8 + static_cast<int>(threadIdx.x) % kLanes / 4;
      const int64_t row = sequence_.shift + min(first_row_ + place, sequence_.length - 1);
      norm = fmaxf(norm, multiply_row<T, kSize>(gradients, place, g.data + row * g.stride));
    }
#pragma unroll
    for (int i = 4; i < kLanes; i *= 2) norm = fmaxf(norm, __shfl_xor_sync(kFullWarp, norm, i));
    bias_sums_.begin(p, shared, kAttentionWarps, sqrtf(norm));
  }

  // After everything is added.
  __device__ void finish_bias() { bias_sums_.finish(); }

  // What pseudo rows see of themselves.
  __device__ void see_themselves(const unsigned char* queries, const unsigned char* gradients, const HeadRows<T>& k,
                                 const HeadRows<T>& v) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = b * 16 + half * 8 + lane / 4, row = first_row_ + place;
        const bool own = row >= sequence_.end && row < sequence_.length;
        const int64_t token = sequence_.first + (own ? row : 0);
        const T* key = k.data + token * k.stride;
        const float score = multiply_row<T, kSize>(queries, place, key);
        float gradient = multiply_row<T, kSize>(gradients, place, v.data + token * v.stride);
        if (!own) continue;
        if (kDropout) gradient *= elements_.one(sequence_.shift + row, row) ? factor_ : 0.0f;
        float exponent = exponent_[b][half];
        if (kBias) exponent += bias_.table[0] * kLog2OfE;
        const float ds = exp2_approximate(fmaf(score, scale_, exponent)) * (gradient + level_[b][half]);
        if (kBiasGradient && lane % 4 == 0) bias_sums_.add(ds, 0);
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const float2 pair = pair_at(key + d * 8 + lane % 4 * 2);
          sums_[b][d][2 * half] = ds * pair.x;
          sums_[b][d][2 * half + 1] = ds * pair.y;
        }
      }
  }

  // Before the tile of 64 columns from `first_column` on is added.
  __device__ void draw(int first_column) {
    kept_.draw(elements_, sequence_.shift + first_row_ + static_cast<int>(threadIdx.x) % kLanes / 4, first_column);
  }

  // Adds 64 columns from `first_column` on, all of which all rows see.
  __device__ void add_full(const unsigned char* tile, int first_column) {
#pragma unroll Shape::kUnrolled
    for (int n = 0; n < Shape::kOthers; n += 16) add<false>(tile, first_column, n);
  }

  // Adds columns of which not all rows see all; none sees more than the first `columns`.
  __device__ void add_partial(const unsigned char* tile, int first_column, int columns) {
#pragma unroll 1
    for (int n = 0; n < min(columns, Shape::kOthers); n += 16) add<true>(tile, first_column, n);
  }

  // Leaves the gradients in the first rows of `shared`, which are this warp's.
  __device__ void finish(unsigned char* shared, float scale) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) put_sums<T>(sums_[b], scale, scale, shared, b * 16);
  }

 private:
  template <bool kMasked>
  __device__ void add(const unsigned char* tile, int first_column, int n) {
    Square<kBlocks> scores, gradients, zeros = {}, levels;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int i = 0; i < 8; ++i) levels[b][i / 4][i % 4] = kDropout ? 0.0f : level_[b][i % 4 / 2];
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    queries_.multiply_others(scores, zeros, tile, swapped_offset_, n);
    gradients_.multiply_others(gradients, levels, tile + Shape::kMatrixBytes, swapped_offset_, n);
    int positions[4] = {};
    if (kBias) add_bias(scores, first_column + n, positions);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Columns of this lane from here on are hidden.
        int end = 0;
        if (kMasked)
          end = sequence_.prefix(first_row_ + b * 16 + half * 8 + lane / 4) - first_column - n - lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& score = scores[b][j / 2][2 * half + j % 2];
          const float exponent = kBias ? score + exponent_[b][half] : fmaf(score, scale_, exponent_[b][half]);
          float p = exp2_approximate(exponent);
          if (kMasked && j / 2 * 8 + j % 2 >= end) p = 0.0f;
          float gradient = gradients[b][j / 2][2 * half + j % 2];
          if (kDropout)
            gradient = fmaf(gradient, kept_(b, half, j / 2, j % 2, n / 16) ? factor_ : 0.0f, level_[b][half]);
          score = p * gradient;
          if (kBiasGradient) bias_sums_.add(score, positions[j] - position_[b][half]);
        }
      }
    uint32_t a[kBlocks][4];
    pack_square<T, kBlocks>(scores, a);
    add_products<T, 0, kBlocks>(sums_, a, tile, offset_, n);
  }

  // Leaves the positions of this lane's four columns.
  __device__ void add_bias(Square<kBlocks>& scores, int first_column, int (&positions)[4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = first_column + j / 2 * 8 + lane % 4 * 2 + j % 2;
      positions[j] = bias_.positions[min(column, sequence_.length - 1)];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = scores[b][j / 2][2 * half + j % 2];
          score = fmaf(score, scale_, bias_(position_[b][half], positions[j]));
        }
    }
  }

  Sequence sequence_;
  DistanceBias bias_;
  int first_row_;
  float scale_;
  KeptElements elements_;
  float factor_;  // of what is kept
  KeptInTile<kBlocks> kept_;
  BiasSums bias_sums_;
  LeftRows<T, kSize, kBlocks, true> queries_, gradients_;
  int offset_ = lane_matrix_offset<Shape::kRowBytes>(false),
      swapped_offset_ = lane_matrix_offset<Shape::kRowBytes>(true);
  int position_[kBlocks][2];
  float exponent_[kBlocks][2], level_[kBlocks][2];  // what is added to the scores and to the gradients
  float sums_[kBlocks][kDims][4] = {};
};

// What dropout keeps of 64 rows and 128 columns, drawn by all threads of a block: a word is what a lane needs of 16
// rows and one column of 16, with a bit for each 16 columns.
struct KeptTile {
  static constexpr int kWords = kAttentionColumns / 16 * 64;

  // `row` is the first one, of q.
  __device__ static void draw(const KeptElements& elements, int row, int block, unsigned char* tile) {
    auto* words = reinterpret_cast<uint32_t*>(tile);
#pragma unroll
    for (int i = 0; i < kWords; i += kAttentionThreads) {
      const int word = i + static_cast<int>(threadIdx.x);
      words[word] = elements.of_rows(row + word / 64 * 16 + word % 4 * 2, block, word / 4 % 16);
    }
  }

  // For the 16 rows from `n` on and columns of which this lane holds the first or, `half`, the second.
  __device__ static uint32_t of_lane(const unsigned char* tile, int n, int half) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    return reinterpret_cast<const uint32_t*>(tile)[n * 4 + half * 32 + lane];
  }
};

// Gradients of rows of k and v, which are columns of the scores; the others are queries and rows of grad_out, whose
// statistics follow behind the tile.
template <typename T, int kSize, bool kBias, bool kDropout>
class ColumnGradients {
  using Shape = GradientShape<kSize, kBias, kDropout>;
  static constexpr int kBlocks = Shape::kColumnBlocks;
  static constexpr int kDims = kSize / 8;

 public:
  // `first_column` is one of the sequence; `keys` and `values` hold the warp's rows.
  __device__ ColumnGradients(const AttentionGradients& p, const Sequence& sequence, int head, int first_column,
                             const unsigned char* keys, const unsigned char* values)
      : sequence_(sequence),
        first_column_(first_column),
        scale_(p.forward.scale * kLog2OfE),
        factor_(p.forward.dropout.scale),
        keys_(keys),
        values_(values) {
    if (!kBias) return;
    bias_ = distance_bias(p.forward, head, sequence.first);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i)
      position_[i / 2][i % 2] = bias_.positions[min(column(i / 2, i % 2), sequence.length - 1)];
  }

  // What pseudo rows see of themselves.
  __device__ void see_themselves(const AttentionGradients& p, int head, const unsigned char* keys,
                                 const unsigned char* values) {
    const HeadRows<T> q = head_rows<T>(p.forward.q, p.forward.q_token, p.forward.q_head, head);
    const HeadRows<T> g = head_rows<T>(p.grad_out, p.grad_token, p.grad_head, head);
    const float* statistics = p.statistics + head * p.forward.queries;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = b * 16 + half * 8 + lane / 4, row = first_column_ + place;
        const bool own = row >= max(sequence_.end, sequence_.first_row) && row < sequence_.length;
        // The last row asks if any does.
        const int64_t token = sequence_.shift + (own ? row : sequence_.length - 1);
        const T *query = q.data + token * q.stride, *gradient = g.data + token * g.stride;
        const float score = multiply_row<T, kSize>(keys, place, query);
        float dp = multiply_row<T, kSize>(values, place, gradient);
        if (!own) continue;
        bool kept = true;
        if (kDropout) {
          kept = KeptElements(p.forward.dropout, head).one(static_cast<int>(token), row);
          dp *= kept ? factor_ : 0.0f;
        }
        float exponent = statistics[token];
        if (kBias) exponent += bias_.table[0] * kLog2OfE;
        const float probability = exp2_approximate(fmaf(score, scale_, exponent));
        const float ds = probability * (dp + statistics[p.forward.heads * p.forward.queries + token]);
#pragma unroll
        for (int d = 0; d < kDims; ++d) {
          const float2 query_pair = pair_at(query + d * 8 + lane % 4 * 2);
          const float2 gradient_pair = pair_at(gradient + d * 8 + lane % 4 * 2);
          key_sums_[b][d][2 * half] = ds * query_pair.x;
          key_sums_[b][d][2 * half + 1] = ds * query_pair.y;
          value_sums_[b][d][2 * half] = kept ? probability * gradient_pair.x : 0.0f;
          value_sums_[b][d][2 * half + 1] = kept ? probability * gradient_pair.y : 0.0f;
        }
      }
  }

  // Adds 64 rows from `first_row` on, all of which see all columns.
  __device__ void add_full(const unsigned char* tile, int first_row) {
#pragma unroll Shape::kUnrolled
    for (int n = 0; n < Shape::kOthers; n += 16) add<false>(tile, first_row, n, 0);
  }

  // Adds the rows from `first_row` to `stop`, of which not all see all columns.
  __device__ void add_partial(const unsigned char* tile, int first_row, int stop) {
#pragma unroll 1
    for (int n = 0; first_row + n < stop; n += 16)
      if (sequence_.longest(first_row + n, min(first_row + n + 16, stop)) > first_column_)
        add<true>(tile, first_row, n, stop);
  }

  // Leaves the gradients in the first rows of `keys` and `values`, which are this warp's.
  __device__ void finish(unsigned char* keys, unsigned char* values, float scale) const {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      put_sums<T>(key_sums_[b], scale, scale, keys, b * 16);
      const float factor = kDropout ? factor_ : 1.0f;
      put_sums<T>(value_sums_[b], factor, factor, values, b * 16);
    }
  }

 private:
  __device__ int column(int block, int half) const {
    return first_column_ + block * 16 + half * 8 + static_cast<int>(threadIdx.x) % kLanes / 4;
  }

  template <bool kMasked>
  __device__ void add(const unsigned char* tile, int first_row, int n, int stop) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const auto* statistics = reinterpret_cast<const float*>(tile + Shape::kTileBytes) + n + lane % 4 * 2;
    Square<kBlocks> scores, gradients, zeros = {}, starts;
    float2 exponents[2], levels[2];
    uint32_t kept[2];
    if (kDropout) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        kept[half] = KeptTile::of_lane(tile + Shape::kKeptOffset, n, half) >> (first_column_ % 128 / 16);
    }
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      exponents[t] = *reinterpret_cast<const float2*>(statistics + t * 8);
      levels[t] = *reinterpret_cast<const float2*>(statistics + Shape::kOthers + t * 8);
#pragma unroll
      for (int i = 0; i < 4 * kBlocks; ++i) starts[i / 4][t][i % 4] = i % 2 == 0 ? levels[t].x : levels[t].y;
    }
    keys_.multiply_others(scores, zeros, tile, swapped_offset_, n);
    values_.multiply_others(gradients, kDropout ? zeros : starts, tile + Shape::kMatrixBytes, swapped_offset_, n);
    if (kBias) add_bias(scores, first_row + n);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // How many of the columns this row sees.
      int end = 0;
      if (kMasked) {
        const int row = first_row + n + j / 2 * 8 + lane % 4 * 2 + j % 2;
        end = row < stop ? sequence_.prefix(row) : 0;
      }
      const float added = j % 2 == 0 ? exponents[j / 2].x : exponents[j / 2].y;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &score = scores[b][j / 2][2 * half + j % 2], &gradient = gradients[b][j / 2][2 * half + j % 2];
          const float exponent = kBias ? score + added : fmaf(score, scale_, added);
          score = exp2_approximate(exponent);
          if (kMasked && column(b, half) >= end) score = 0.0f;
          if (kDropout) {
            const bool stays = kept_element(kept[half], j / 2, j % 2, b);
            const float level = j % 2 == 0 ? levels[j / 2].x : levels[j / 2].y;
            gradient = score * fmaf(gradient, stays ? factor_ : 0.0f, level);
            if (!stays) score = 0.0f;
          } else {
            gradient *= score;
          }
        }
    }
    uint32_t a[kBlocks][4];
    pack_square<T, kBlocks>(scores, a);
    add_products<T, 0, kBlocks>(value_sums_, a, tile + Shape::kMatrixBytes, offset_, n);
    pack_square<T, kBlocks>(gradients, a);
    add_products<T, 0, kBlocks>(key_sums_, a, tile, offset_, n);
  }

  __device__ void add_bias(Square<kBlocks>& scores, int first_row) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = first_row + j / 2 * 8 + lane % 4 * 2 + j % 2;
      const int position = bias_.positions[min(row, sequence_.length - 1)];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& score = scores[b][j / 2][2 * half + j % 2];
          score = fmaf(score, scale_, bias_(position, position_[b][half]));
        }
    }
  }

  Sequence sequence_;
  DistanceBias bias_;
  int first_column_;
  float scale_;
  float factor_;  // of what dropout keeps
  LeftRows<T, kSize, kBlocks, kSize != 128> keys_, values_;
  int offset_ = lane_matrix_offset<Shape::kRowBytes>(false),
      swapped_offset_ = lane_matrix_offset<Shape::kRowBytes>(true);
  int position_[kBlocks][2];
  float key_sums_[kBlocks][kDims][4] = {}, value_sums_[kBlocks][kDims][4] = {};
};

}  // namespace minilm_fast::cuda
