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
  const uint32_t threshold = static_cast<uint32_t>(__builtin_nearbyint(probability * 65536.0));
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          threshold,
          threshold >= 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - threshold))};
}

typedef uint64_t WideVec __attribute__((vector_size(kLanes * 4)));

// 32-bit numbers, the even lanes of a vector in one and the odd lanes in the other, each in the lower half of 64 bits;
// the upper halves are anything.
struct Halves {
  WideVec even, odd;
};

inline WideVec wide(uint64_t x) { return WideVec{} + x; }

// The products of the lower halves of x with a 32-bit number.
inline WideVec multiply_low(WideVec x, uint32_t by) {
#if defined(__AVX512F__)
  return reinterpret_cast<WideVec>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(wide(by))));
#elif defined(__AVX2__)
  return reinterpret_cast<WideVec>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(wide(by))));
#else
  return (x & 0xffffffffu) * wide(by);
#endif
}

inline BitVec join(Halves x) { return reinterpret_cast<BitVec>((x.even & 0xffffffffu) | (x.odd << 32)); }

// Philox4x32-7 of the counters (c0, c1, c2, 0), in place; the fourth word of the result goes to c3.
inline void philox(const Dropout& dropout, Halves& c0, Halves& c1, Halves& c2, Halves& c3) {
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
  c3 = Halves{};
  const auto turn = [&](WideVec& x0, WideVec& x1, WideVec& x2, WideVec& x3) {
    const WideVec product0 = multiply_low(x0, 0xD2511F53u), product1 = multiply_low(x2, 0xCD9E8D57u);
    x0 = (product1 >> 32) ^ x1 ^ wide(k0);
    x2 = (product0 >> 32) ^ x3 ^ wide(k1);
    x1 = product1;
    x3 = product0;
  };
  for (int round = 0; round < 7; ++round) {
    turn(c0.even, c1.even, c2.even, c3.even);
    turn(c0.odd, c1.odd, c2.odd, c3.odd);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Factors of columns [128 * block, 128 * (block + 1)) of a row: 0 or the scale. The same numbers with every
// instruction set.
inline void dropout_factors(const Dropout& dropout, int64_t stream, int64_t row, int64_t block, float* factors) {
  for (int64_t first = 0; first < 16; first += kLanes) {
    BitVec lanes = {};
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(16 * block + first + i);
    const WideVec counters = reinterpret_cast<WideVec>(lanes);
    Halves c0{counters, counters >> 32}, c3;
    Halves c1{wide(static_cast<uint32_t>(row)), wide(static_cast<uint32_t>(row))};
    Halves c2{wide(static_cast<uint32_t>(stream)), wide(static_cast<uint32_t>(stream))};
    philox(dropout, c0, c1, c2, c3);
    const BitVec words[4] = {join(c0), join(c1), join(c2), join(c3)};
    const BitVec threshold = BitVec{} + dropout.threshold;
    for (int i = 0; i < 8; ++i) {
      const BitVec half = i % 2 ? words[i / 2] >> 16 : words[i / 2] & 0xffffu;
      store(factors + 16 * i + first, half < threshold ? Vec{} : splat(dropout.scale));
    }
  }
}

}  // namespace
}  // namespace minilm_fast
