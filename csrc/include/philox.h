#pragma once

// Dropout factors from Philox4x32-7 (Salmon et al., SC'11), see minilm_fast/ops/dropout.py. Everything is in an
// anonymous namespace, as in vec.h.

#include <type_traits>

#include "dropout.h"
#include "vec.h"

namespace minilm_fast {
namespace {

// Columns whose factors come from one call: 16 counters of 8 half words.
constexpr int64_t kDropoutBlock = 128;

typedef uint64_t WideVec __attribute__((vector_size(kLanes * 4)));

// A number is 32 bits wide and stands in the lower half of 64 bits, the upper half being anything: one for all lanes,
// or in a vector those of the even or of the odd lanes.
inline uint64_t multiply_low(uint64_t x, uint32_t by) { return (x & 0xffffffffu) * by; }

inline WideVec multiply_low(WideVec x, uint32_t by) {
  const WideVec factor = WideVec{} + by;
#if defined(__AVX512F__)
  return reinterpret_cast<WideVec>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<WideVec>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(factor)));
#else
  return (x & 0xffffffffu) * factor;
#endif
}

template <class A, class B>
inline auto exclusive_or(A a, B b, uint32_t key) {
  return a ^ (b ^ uint64_t{key});
}

#if defined(__AVX512F__)
inline WideVec exclusive_or(WideVec a, WideVec b, uint32_t key) {
  constexpr int kOdd = 0x96;
  return reinterpret_cast<WideVec>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                             _mm512_set1_epi64(key), kOdd));
}
#endif

template <class A, class B, class C, class D>
struct PhiloxState {
  A c0;
  B c1;
  C c2;
  D c3;
};

// The rounds that are left. What is one number for all lanes stays one for as long as it can.
template <int Rounds = 7, class A, class B, class C, class D>
inline auto philox(PhiloxState<A, B, C, D> s, uint32_t key0, uint32_t key1) {
  if constexpr (Rounds == 0) {
    return s;
  } else {
    const auto product0 = multiply_low(s.c0, 0xD2511F53u), product1 = multiply_low(s.c2, 0xCD9E8D57u);
    const auto c0 = exclusive_or(product1 >> 32, s.c1, key0), c2 = exclusive_or(product0 >> 32, s.c3, key1);
    using Next = PhiloxState<std::decay_t<decltype(c0)>, std::decay_t<decltype(product1)>, std::decay_t<decltype(c2)>,
                             std::decay_t<decltype(product0)>>;
    return philox<Rounds - 1>(Next{c0, product1, c2, product0}, key0 + 0x9E3779B9u, key1 + 0xBB67AE85u);
  }
}

inline BitVec join(WideVec even, WideVec odd) {
#if defined(__AVX512F__)
  return reinterpret_cast<BitVec>(_mm512_mask_shuffle_epi32(reinterpret_cast<__m512i>(even), 0xaaaa,
                                                            reinterpret_cast<__m512i>(odd), _MM_PERM_CCAA));
#else
  return reinterpret_cast<BitVec>((even & 0xffffffffu) | (odd << 32));
#endif
}

// The four words of the counters that `state` makes of the even and of the odd lanes of `varying`.
template <class State>
inline void philox_words(const Dropout& dropout, BitVec varying, State state, BitVec* words) {
  const WideVec lanes = reinterpret_cast<WideVec>(varying);
  const auto even = philox(state(lanes), dropout.key[0], dropout.key[1]);
  const auto odd = philox(state(lanes >> 32), dropout.key[0], dropout.key[1]);
  words[0] = join(even.c0, odd.c0);
  words[1] = join(even.c1, odd.c1);
  words[2] = join(even.c2, odd.c2);
  words[3] = join(even.c3, odd.c3);
}

inline BitVec ascending(int64_t first) {
  BitVec lanes = {};
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint32_t>(i);
  return lanes + static_cast<uint32_t>(first);
}

// The greatest word whose upper half is dropped; the threshold must not be 0.
inline uint32_t last_dropped(const Dropout& dropout) { return (dropout.threshold << 16) - 1; }

// Factors of columns [128 * block, 128 * (block + 1)) of a row: 0 or the scale. The same numbers with every
// instruction set.
inline void dropout_factors(const Dropout& dropout, int64_t stream, int64_t row, int64_t block, float* factors) {
  if (dropout.threshold == 0) {
    for (int64_t i = 0; i < kDropoutBlock; ++i) factors[i] = dropout.scale;
    return;
  }
  const uint64_t c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(stream);
  const BitVec last = BitVec{} + last_dropped(dropout);
  const Vec scale = splat(dropout.scale);
  for (int64_t first = 0; first < 16; first += kLanes) {
    BitVec words[4];
    philox_words(
        dropout, ascending(16 * block + first),
        [&](WideVec c0) { return PhiloxState<WideVec, uint64_t, uint64_t, uint64_t>{c0, c1, c2, 0}; }, words);
    for (int i = 0; i < 4; ++i) {
      store(factors + 32 * i + first, (words[i] << 16) <= last ? Vec{} : scale);
      store(factors + 32 * i + 16 + first, words[i] <= last ? Vec{} : scale);
    }
  }
}

}  // namespace
}  // namespace minilm_fast
