#pragma once

#include "cuda_device.cuh"

// The products of a tile of keys with the 16 rows of a block, by one warp. Scores and results lie in registers as
// multiply_add leaves them: of each eight columns, lane i holds the columns 2 * (i % 4) and the next, of row i / 4 and
// of row i / 4 + 8.
namespace minilm_fast::cuda {

constexpr int kTileBytes = 4096;

template <typename T, int kSize>
struct TileShape {
  static constexpr int kKeys = kTileBytes / (kSize * static_cast<int>(sizeof(T)));
  static constexpr int kKeyBytes = kSize * static_cast<int>(sizeof(T));  // a row of a tile that holds key after key
  static constexpr int kDimBytes = kTileBytes / kSize;  // a row of a tile that holds dimension after dimension
  static constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  static constexpr int kScores = kKeys / 8;
  static constexpr int kResults = kSize / 8;
};

template <typename T, int kSize>
class Products {
  using Shape = TileShape<T, kSize>;

 public:
  __device__ explicit Products(const unsigned char* q) {
#pragma unroll
    for (int i = 0; i < kSize / 16; ++i) load_matrices(q_[i], matrix_row<Shape::kKeyBytes>(q, 0, i * 16, false));
  }

  // scores [16, keys] = q k^T, the tile [size, keys] or [keys, size].
  template <bool kDimensionMajor>
  __device__ void scores(float (&out)[Shape::kScores][4], const unsigned char* tile) const {
#pragma unroll
    for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
#pragma unroll
    for (int d = 0; d < kSize / 16; ++d)
#pragma unroll
      for (int n = 0; n < Shape::kScores; n += 2) {
        uint32_t k[4];
        if (kDimensionMajor)
          load_matrices_transposed(k, matrix_row<Shape::kDimBytes>(tile, d * 16, n * 8, false));
        else
          load_matrices(k, matrix_row<Shape::kKeyBytes>(tile, n * 8, d * 16, true));
        multiply_add<T>(out[n], q_[d], k[0], k[1]);
        multiply_add<T>(out[n + 1], q_[d], k[2], k[3]);
      }
  }

  // out [16, size] += weights [16, keys] v, the tile [keys, size].
  __device__ void accumulate(float (&out)[Shape::kResults][4], const float (&weights)[Shape::kScores][4],
                             const unsigned char* tile) const {
#pragma unroll
    for (int n = 0; n < Shape::kScores; n += 2) {
      const uint32_t w[4] = {pack_pair<T>(weights[n][0], weights[n][1]), pack_pair<T>(weights[n][2], weights[n][3]),
                             pack_pair<T>(weights[n + 1][0], weights[n + 1][1]),
                             pack_pair<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
      for (int d = 0; d < Shape::kResults; d += 2) {
        uint32_t v[4];
        load_matrices_transposed(v, matrix_row<Shape::kKeyBytes>(tile, n * 8, d * 8, false));
        multiply_add<T>(out[d], w, v[0], v[1]);
        multiply_add<T>(out[d + 1], w, v[2], v[3]);
      }
    }
  }

 private:
  uint32_t q_[kSize / 16][4];
};

// fp32 keeps its full precision: no tensor cores. Loops stay rolled where they may: it is here that compiling takes
// long.
template <int kSize>
class Products<float, kSize> {
  using Shape = TileShape<float, kSize>;

 public:
  __device__ explicit Products(const unsigned char* q) : q_(q) {}

  template <bool kDimensionMajor>
  __device__ void scores(float (&out)[Shape::kScores][4], const unsigned char* tile) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, row = lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
#pragma unroll 2
    for (int d = 0; d < kSize; ++d) {
      const float upper = at<Shape::kKeyBytes>(q_, row, d), lower = at<Shape::kKeyBytes>(q_, row + 8, d);
#pragma unroll
      for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = n * 8 + column + i;
          const float k = kDimensionMajor ? at<Shape::kDimBytes>(tile, d, key) : at<Shape::kKeyBytes>(tile, key, d);
          out[n][i] = fmaf(upper, k, out[n][i]);
          out[n][i + 2] = fmaf(lower, k, out[n][i + 2]);
        }
    }
  }

  __device__ void accumulate(float (&out)[Shape::kResults][4], const float (&weights)[Shape::kScores][4],
                             const unsigned char* tile) const {
    const int lane = static_cast<int>(threadIdx.x) % kLanes, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::kScores; ++n)
#pragma unroll 1
      for (int pair = 0; pair < 4; ++pair)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float upper = __shfl_sync(kFullWarp, weights[n][j], lane / 4 * 4 + pair);
          const float lower = __shfl_sync(kFullWarp, weights[n][2 + j], lane / 4 * 4 + pair);
#pragma unroll
          for (int d = 0; d < Shape::kResults; ++d)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float v = at<Shape::kKeyBytes>(tile, n * 8 + pair * 2 + j, d * 8 + column + i);
              out[d][i] = fmaf(upper, v, out[d][i]);
              out[d][i + 2] = fmaf(lower, v, out[d][i + 2]);
            }
        }
  }

 private:
  template <int kRowBytes>
  __device__ static float at(const unsigned char* tile, int row, int column) {
    return reinterpret_cast<const float*>(tile + chunk_offset<kRowBytes>(row, column / 4))[column % 4];
  }

  const unsigned char* q_;
};

}  // namespace minilm_fast::cuda
