#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "gemm_vector.h"

// The int8 kernel without a byte dot product: rows are packed as int16, weights widened to it, and pairs of products
// summed by a multiply-add of int16 where there is one.
namespace minilm_fast::gemm {
namespace {

#ifdef __SSE2__

// Each lane of `low` and `high` has half of a feature's four k: lanes 2 i and 2 i + 1 are those of feature i.
struct IntPair {
  Int low, high;
};

inline IntPair widen(const char* p) {
#if defined(__AVX512BW__)
  const __m256i* half = reinterpret_cast<const __m256i*>(p);
  return {reinterpret_cast<Int>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(half))),
          reinterpret_cast<Int>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(half + 1)))};
#elif defined(__AVX2__)
  const __m128i* half = reinterpret_cast<const __m128i*>(p);
  return {reinterpret_cast<Int>(_mm256_cvtepi8_epi16(_mm_loadu_si128(half))),
          reinterpret_cast<Int>(_mm256_cvtepi8_epi16(_mm_loadu_si128(half + 1)))};
#else
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {reinterpret_cast<Int>(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8)),
          reinterpret_cast<Int>(_mm_srai_epi16(_mm_unpackhi_epi8(bytes, bytes), 8))};
#endif
}

inline Int multiply_add_int16(Int x, Int y) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Int>(_mm512_madd_epi16(reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
#elif defined(__AVX2__)
  return reinterpret_cast<Int>(_mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
#else
  return reinterpret_cast<Int>(_mm_madd_epi16(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(y)));
#endif
}

// Four int16 of a row in every pair of lanes.
inline Int splat_four(const char* row) {
  int64_t four;
  __builtin_memcpy(&four, row, sizeof(four));
  typedef int64_t Long __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Int>(four - Long{});
}

// Sums of neighbouring lanes, of `low` and then of `high`.
inline Int sum_pairs(Int low, Int high) {
#if defined(__AVX512F__)
  const __m512i x = reinterpret_cast<__m512i>(low), y = reinterpret_cast<__m512i>(high);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return reinterpret_cast<Int>(
      _mm512_add_epi32(_mm512_permutex2var_epi32(x, even, y), _mm512_permutex2var_epi32(x, odd, y)));
#elif defined(__AVX2__)
  const __m256i sums = _mm256_hadd_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
  return reinterpret_cast<Int>(_mm256_permute4x64_epi64(sums, 0xd8));
#else
  const __m128 x = reinterpret_cast<__m128>(low), y = reinterpret_cast<__m128>(high);
  return reinterpret_cast<Int>(_mm_shuffle_ps(x, y, 0x88)) + reinterpret_cast<Int>(_mm_shuffle_ps(x, y, 0xdd));
#endif
}

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int64_t kRowBytes = 8;
  static constexpr int64_t kBlockSteps = kUnlimited;
#if defined(__AVX512F__)
  static constexpr int kTileRows = 6, kTilePanels = 2;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 2, kTilePanels = 1;
#else
  static constexpr int kTileRows = 1, kTilePanels = 1;
#endif
  using Weights = IntPair;
  using Accumulator = IntPair;
  using Sum = int32_t;

  static Weights load(const char* p) { return widen(p); }
  static void add(Accumulator& sum, const char* row, const Weights& w) {
    const Int x = splat_four(row);
    sum.low += multiply_add_int16(x, w.low);
    sum.high += multiply_add_int16(x, w.high);
  }
  static Int total(const Product&, int64_t, const Accumulator& sum) { return sum_pairs(sum.low, sum.high); }
};

inline void multiply_int8(const Product& product) { multiply<Int8>(product); }

#else

inline void multiply_int8(const Product& product) {
  const int64_t padded = padded_k(Format::kInt8, product.weight->k);
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int8_t* weights = reinterpret_cast<const int8_t*>(panel_address(product, panel));
    for (int64_t m = 0; m < product.row_count; ++m) {
      const int16_t* x = reinterpret_cast<const int16_t*>(row_address(product, m));
      int32_t sums[kPanel] = {};
      for (int64_t i = 0; i < padded; i += 4)
        for (int64_t j = 0; j < kPanel; ++j)
          for (int64_t l = 0; l < 4; ++l) sums[j] += x[i + l] * weights[i * kPanel + j * 4 + l];
      finish_rows<int32_t>(product, {sums, m, panel, 1}, 0, 1);
    }
  }
}

#endif

}  // namespace
}  // namespace minilm_fast::gemm
