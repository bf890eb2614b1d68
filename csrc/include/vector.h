#pragma once

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

// Vectors as wide as the instruction set that the including file is compiled for. Everything is in an anonymous
// namespace: the same names stand for different types in files compiled for different instruction sets.
namespace minilm_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kWidth = kVectorBytes / 4;

typedef float Float __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef float UnalignedFloat __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef int32_t UnalignedInt __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

inline Float load(const float* p) { return *reinterpret_cast<const UnalignedFloat*>(p); }
inline Int load_int(const void* p) { return *reinterpret_cast<const UnalignedInt*>(p); }
inline void store(float* p, Float x) { *reinterpret_cast<UnalignedFloat*>(p) = x; }
inline void store(int32_t* p, Int x) { *reinterpret_cast<UnalignedInt*>(p) = x; }
inline Float splat(float x) { return x - Float{}; }
inline Int splat_int(int32_t x) { return x - Int{}; }
inline Float as_float(Int x) { return reinterpret_cast<Float>(x); }
inline Int as_int(Float x) { return reinterpret_cast<Int>(x); }
inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }

// Keeps a product from being contracted with a following addition.
inline Float rounded(Float x) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(x));
#elif defined(__x86_64__)
  __asm__("" : "+x"(x));
#elif defined(__aarch64__)
  __asm__("" : "+w"(x));
#else
  __asm__("" : "+m"(x));
#endif
  return x;
}

typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t UnalignedHalf __attribute__((vector_size(kVectorBytes / 2), aligned(1), may_alias));

inline Float load(const uint16_t* bf16) {
  const Half half = *reinterpret_cast<const UnalignedHalf*>(bf16);
  return as_float(__builtin_convertvector(half, Int) << 16);
}

// The first `count` elements, then zeros.
template <class T>
inline Float load_part(const T* p, int64_t count) {
  if (count >= kWidth) return load(p);
  T padded[kWidth] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

// To bf16 in the upper half of each lane: round to nearest even; a NaN stays one.
inline Int round_to_bf16(Float x) {
  const Int bits = as_int(x);
  const Int nearest = bits + 0x7fff + (bits >> 16 & 1);
  return (x == x ? nearest : bits | 0x400000) & static_cast<int32_t>(0xffff0000);
}

inline void store(uint16_t* bf16, Float x) {
#ifdef __AVX512BF16__
  *reinterpret_cast<UnalignedHalf*>(bf16) = reinterpret_cast<Half>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  typedef uint32_t Unsigned __attribute__((vector_size(kVectorBytes)));
  const Unsigned upper = reinterpret_cast<Unsigned>(round_to_bf16(x)) >> 16;
  *reinterpret_cast<UnalignedHalf*>(bf16) = __builtin_convertvector(upper, Half);
#endif
}

template <class T>
inline void store_part(T* p, Float x, int64_t count) {
  if (count >= kWidth) return store(p, x);
  T values[kWidth];
  store(values, x);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

#ifdef __AVX512F__
// The intrinsics without a mask start from an undefined register, of which some compilers warn.
constexpr __mmask16 kAllLanes = 0xffff;
#endif

// Of two numbers; the second argument where one of them is a NaN.
inline Float minimum(Float x, Float y) {
#ifdef __AVX512F__
  return reinterpret_cast<Float>(
      _mm512_maskz_min_ps(kAllLanes, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#else
  return x < y ? x : y;
#endif
}

inline Float maximum(Float x, Float y) {
#ifdef __AVX512F__
  return reinterpret_cast<Float>(
      _mm512_maskz_max_ps(kAllLanes, reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y)));
#else
  return x > y ? x : y;
#endif
}

inline Int maximum(Int x, Int y) {
#ifdef __AVX512F__
  return reinterpret_cast<Int>(
      _mm512_maskz_max_epi32(kAllLanes, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
#else
  return x > y ? x : y;
#endif
}

inline Float absolute(Float x) { return as_float(as_int(x) & 0x7fffffff); }

// Bit i is set where lane i of x is greater than that of y.
inline uint32_t greater_lanes(Float x, Float y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(y), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(x > y));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(x > y));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= static_cast<uint32_t>(x[i] > y[i]) << i;
  return lanes;
#endif
}

// Lanes combined pairwise, halves with halves, so that it takes few steps and the order is fixed.
template <class Combine>
inline float reduce_lanes(Float x, Combine combine) {
  float lanes[kWidth];
  store(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  return lanes[0];
}

inline float sum_lanes(Float x) {
  return reduce_lanes(x, [](float a, float b) { return a + b; });
}

inline float largest_lane(Float x) {
  return reduce_lanes(x, [](float a, float b) { return a > b ? a : b; });
}

// exp(x) for x <= 0, to 2e-7 of the larger of it and exp(-1); below -87, where it leaves the normal range, exp(-87).
// A NaN stays one.
inline Float exp_negative(Float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr float kLog2E = 1.44269504f;
  x = maximum(splat(-87.0f), x);
  const Float shifted = x * kLog2E + kRound;
  const Float r = x * kLog2E - (shifted - kRound);
  // 2^r on [-1/2, 1/2], the minimax polynomial of the relative error, its constant made 1.
  Float p = splat(0.0013276472454890609f);
  p = p * r + 0.009675540961325169f;
  p = p * r + 0.05550713092088699f;
  p = p * r + 0.24022120237350464f;
  p = p * r + 0.6931469440460205f;
  p = p * r + 1.0f;
  return p * as_float((as_int(shifted) << 23) + 0x3f800000);
}

}  // namespace
}  // namespace minilm_fast
