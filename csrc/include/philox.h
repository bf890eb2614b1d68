#pragma once

// Dropout factors from Philox4x32-7 (Salmon et al., SC'11), see minilm_fast/ops/dropout.py. Everything is in an
// anonymous namespace, as in vec.h.

#include "vec.h"

namespace minilm_fast {
namespace {

// Columns whose factors come from one call: 16 counters of 8 half words.
constexpr int64_t kDropoutBlock = 128;

struct Dropout {
  uint32_t key[2];
  uint32_t threshold;  // a half word below it is dropped; 0: nothing is
  float scale;         // factor of what is kept
};

inline Dropout make_dropout(double probability, uint64_t seed) {
  const uint32_t threshold = static_cast<uint32_t>(probability * 65536.0 + 0.5);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          threshold,
          threshold >= 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - threshold))};
}

typedef uint64_t WideVec __attribute__((vector_size(kLanes * 4)));

// Upper and lower halves of the products of each lane with a constant.
inline void multiply(BitVec x, uint32_t by, BitVec& high, BitVec& low) {
#if defined(__AVX2__)
  const WideVec factor = WideVec{} + by;
#if defined(__AVX512F__)
  const auto times = [&](WideVec v) {
    return reinterpret_cast<WideVec>(
        _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(factor)));
  };
#else
  const auto times = [&](WideVec v) {
    return reinterpret_cast<WideVec>(_mm256_mul_epu32(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(factor)));
  };
#endif
  const WideVec lanes = reinterpret_cast<WideVec>(x);
  const WideVec even = times(lanes), odd = times(lanes >> 32);
  constexpr uint64_t kLow = 0xffffffffu;
  high = reinterpret_cast<BitVec>((even >> 32) | (odd & ~kLow));
  low = reinterpret_cast<BitVec>((even & kLow) | (odd << 32));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(x[i]) * by;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Factors of columns [128 * block, 128 * (block + 1)) of a row: 0 or the scale. The same numbers with every
// instruction set.
inline void dropout_factors(const Dropout& dropout, int64_t stream, int64_t row, int64_t block, float* factors) {
  for (int64_t first = 0; first < 16; first += kLanes) {
    BitVec c0 = {}, c1 = BitVec{} + static_cast<uint32_t>(row), c2 = BitVec{} + static_cast<uint32_t>(stream), c3 = {};
    for (int i = 0; i < kLanes; ++i) c0[i] = static_cast<uint32_t>(16 * block + first + i);
    uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
    for (int round = 0; round < 7; ++round) {
      BitVec high0, low0, high1, low1;
      multiply(c0, 0xD2511F53u, high0, low0);
      multiply(c2, 0xCD9E8D57u, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const BitVec words[4] = {c0, c1, c2, c3};
    const BitVec threshold = BitVec{} + dropout.threshold;
    for (int i = 0; i < 8; ++i) {
      const BitVec half = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
      store(factors + 16 * i + first, half < threshold ? Vec{} : splat(dropout.scale));
    }
  }
}

}  // namespace
}  // namespace minilm_fast
