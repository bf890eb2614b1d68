#pragma once

#include "cuda_device.cuh"
#include "dropout.h"

namespace minilm_fast::cuda {

// Which probabilities of a head dropout keeps (minilm_fast/ops/dropout.py; Philox4x32-7, Salmon et al., SC'11). The
// threshold must not be 0.
class KeptElements {
 public:
  __device__ KeptElements(const Dropout& dropout, int head)
      : key_{dropout.key[0], dropout.key[1]}, last_((dropout.threshold << 16) - 1), head_(head) {}

  // Of the columns 128 * block + 16 * j + lane of row `row`: bit j.
  __device__ uint32_t eight(int row, int block, int lane) const {
    uint32_t c[4] = {static_cast<uint32_t>(16 * block + lane), static_cast<uint32_t>(row), head_, 0};
    uint32_t key0 = key_[0], key1 = key_[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t product0 = uint64_t{c[0]} * 0xD2511F53u, product1 = uint64_t{c[2]} * 0xCD9E8D57u;
      c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
      c[1] = static_cast<uint32_t>(product1);
      c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
      c[3] = static_cast<uint32_t>(product0);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    uint32_t kept = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if ((j % 2 == 0 ? c[j / 2] << 16 : c[j / 2]) > last_) kept |= 1u << j;
    return kept;
  }

  __device__ bool one(int row, int column) const {
    return (eight(row, column / 128, column % 16) >> column % 128 / 16 & 1u) != 0;
  }

  // What a lane holds of the rows or columns of 16, of 128 columns: byte 2 * t + i is that of the row or the column
  // 8 * t + i from `row` or `lane` on.
  __device__ uint32_t of_row(int row, int block, int lane) const {
    uint32_t kept = 0;
#pragma unroll 2
    for (int k = 0; k < 4; ++k) kept |= eight(row, block, lane + k / 2 * 8 + k % 2) << (8 * k);
    return kept;
  }
  __device__ uint32_t of_rows(int row, int block, int lane) const {
    uint32_t kept = 0;
#pragma unroll 2
    for (int k = 0; k < 4; ++k) kept |= eight(row + k / 2 * 8 + k % 2, block, lane) << (8 * k);
    return kept;
  }

 private:
  uint32_t key_[2], last_, head_;
};

// Of what of_row or of_rows gave, element (t, i) of the 16 with the number `j` among the 128.
__device__ inline bool kept_element(uint32_t kept, int t, int i, int j) {
  return (kept >> (8 * (2 * t + i) + j) & 1u) != 0;
}

// What is kept of a warp's rows in a tile of 64 columns, as multiply_add leaves scores.
template <int kBlocks>
class KeptInTile {
 public:
  // The tiles come in order; `row` is this lane's first one, of q.
  __device__ void draw(const KeptElements& elements, int row, int first_column) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t& kept = kept_[b][half];
        if (first_column % 128 == 0)
          kept = elements.of_row(row + b * 16 + half * 8, first_column / 128, static_cast<int>(threadIdx.x) % 4 * 2);
        else
          kept >>= 4;
      }
  }

  // Element (t, i) of the 16 columns with the number `j`.
  __device__ bool operator()(int block, int half, int t, int i, int j) const {
    return kept_element(kept_[block][half], t, i, j);
  }

 private:
  uint32_t kept_[kBlocks][2];
};

}  // namespace minilm_fast::cuda
