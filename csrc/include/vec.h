#pragma once

// Vectors of floats as wide as the instruction set that the including file is compiled for. Everything is in an
// anonymous namespace, so that a function compiled for AVX-512 never replaces its namesake in another file.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC's own headers leave the lanes that an instruction overwrites uninitialised, and warn of it once inlined.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace minilm_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));

// A bfloat16 in memory: the upper half of a float.
struct Bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vec load(const Bf16* p) {
  HalfVec half;
  std::memcpy(&half, p, sizeof(half));
  return reinterpret_cast<Vec>(__builtin_convertvector(half, BitVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

// Rounds to nearest even; a NaN stays a NaN.
inline void store(Bf16* p, Vec v) {
  const BitVec bits = reinterpret_cast<BitVec>(v);
  const BitVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const BitVec quiet = (bits >> 16) | 0x40u;
  const HalfVec half = __builtin_convertvector(v == v ? rounded : quiet, HalfVec);
  std::memcpy(p, &half, sizeof(half));
}

// The first `count` lanes, 0 <= count < kLanes; the others are zero and their memory is not touched.
template <class T>
inline Vec load_partial(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
inline void store_partial(T* p, Vec v, int64_t count) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

#if defined(__AVX512F__)
inline Vec load_partial(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p);
}

inline void store_partial(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), v);
}
#endif

template <class T>
inline Vec load_first(const T* p, int64_t count) {
  return count >= kLanes ? load(p) : load_partial(p, count);
}

template <class T>
inline void store_first(T* p, Vec v, int64_t count) {
  if (count >= kLanes)
    store(p, v);
  else
    store_partial(p, v, count);
}

inline Vec lane_index() {
  Vec v = {};
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<float>(i);
  return v;
}

// `value` in the first `count` lanes, `other` in the rest.
inline Vec first_lanes(int64_t count, Vec value, Vec other) {
  return lane_index() < splat(static_cast<float>(count)) ? value : other;
}

// Of two numbers the greater; a NaN in `b` comes through.
inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

inline Vec absolute(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(x) & 0x7fffffffu); }

// Lane i of the result is lane table[i] of a, or lane table[i] - kLanes of b.
inline Vec shuffle(Vec a, Vec b, IntVec table) {
#if defined(__clang__)
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[i] < kLanes ? a[table[i]] : b[table[i] - kLanes];
  return v;
#else
  return __builtin_shuffle(a, b, table);
#endif
}

template <int Step>
inline IntVec rotation() {
  IntVec table = {};
  for (int i = 0; i < kLanes; ++i) table[i] = (i + Step) % kLanes;
  return table;
}

template <int Step = kLanes / 2>
inline float sum(Vec v) {
  v = v + shuffle(v, v, rotation<Step>());
  if constexpr (Step > 1)
    return sum<Step / 2>(v);
  else
    return v[0];
}

template <int Step = kLanes / 2>
inline float largest(Vec v) {
  v = maximum(v, shuffle(v, v, rotation<Step>()));
  if constexpr (Step > 1)
    return largest<Step / 2>(v);
  else
    return v[0];
}

// One round of the butterfly that transposes a square of vectors: swaps the off-diagonal blocks of size Step.
template <int Step>
inline void swap_blocks(Vec* rows) {
  IntVec low = {}, high = {};
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i & Step ? (i ^ Step) + kLanes : i;
    high[i] = i & Step ? i + kLanes : i ^ Step;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Vec a = rows[i], b = rows[i + Step];
    rows[i] = shuffle(a, b, low);
    rows[i + Step] = shuffle(a, b, high);
  }
}

inline void transpose(Vec* rows) {
  swap_blocks<1>(rows);
  swap_blocks<2>(rows);
  if constexpr (kLanes > 4) swap_blocks<4>(rows);
  if constexpr (kLanes > 8) swap_blocks<8>(rows);
}

// 2^x to 1e-7 for x <= 127, zero below -126 (and so for -infinity). A NaN stays a NaN. 2^0 is exactly 1.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ);
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  // Minimax polynomial of relative error 2.0e-9 on [0, 1].
  Vec p = r * 2.161291594e-4f + 1.246784617e-3f;
  p = p * r + 9.675451594e-3f;
  p = p * r + 5.548528061e-2f;
  p = p * r + 2.402293056e-1f;
  p = p * r + 6.931470444e-1f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(normal, p, x);  // p * 2^floor(x)
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x + kRound;
  const Vec r = x - (shifted - kRound);
  // Minimax polynomial of relative error 2.6e-9 on [-1/2, 1/2].
  Vec p = r * 1.559467702e-4f + 1.340664385e-3f;
  p = p * r + 9.617692976e-3f;
  p = p * r + 5.550310551e-2f;
  p = p * r + 2.402265278e-1f;
  p = p * r + 6.93147215e-1f;
  p = p * r + 1.0f;
  const BitVec scaled = reinterpret_cast<BitVec>(p) + (reinterpret_cast<BitVec>(shifted) << 23);
  const BitVec tiny = reinterpret_cast<BitVec>(x < splat(-126.0f));
  return reinterpret_cast<Vec>(scaled & ~tiny);
#endif
}

// e^x to 1e-7 for -87 <= x <= 88, e^-87 below: the argument is reduced in two parts so that large ones keep their
// accuracy.
inline Vec exponential(Vec x) {
  x = maximum(splat(-87.0f), x);
  constexpr float kRound = 12582912.0f;
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  Vec r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in products with n
  r = r + n * 2.12194440e-4f;
  Vec p = r * 1.381459865e-3f + 8.36871688e-3f;
  p = p * r + 4.166838805e-2f;
  p = p * r + 1.666652063e-1f;
  p = p * r + 4.999999345e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const BitVec exponent = reinterpret_cast<BitVec>(shifted) << 23;
  return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(p) + exponent);
}

// Phi(-a) / exp(-a^2 / 2) for a >= 0, Phi being the normal distribution function: G(1 / (1 + 0.35 a)) with a minimax
// polynomial G of relative error 3.2e-8.
inline Vec scaled_normal_tail(Vec a) {
  const Vec t = 1.0f / (a * 0.35f + 1.0f);
  Vec g = t * -2.914592358e-2f + 1.43971664e-1f;
  g = g * t - 2.55714182e-1f;
  g = g * t + 1.591740748e-1f;
  g = g * t - 2.310977441e-2f;
  g = g * t + 1.055079777e-1f;
  g = g * t + 1.198328744e-1f;
  g = g * t + 1.398618687e-1f;
  g = g * t + 1.396214044e-1f;
  return g * t;
}

// x * Phi(x) as max(x, 0) - |x| Phi(-|x|): accurate in both tails.
inline Vec gelu(Vec x) {
  const Vec a = -maximum(splat(-16.0f), -absolute(x));
  const Vec tail = scaled_normal_tail(a) * exponential(a * a * -0.5f);
  return maximum(splat(0.0f), x) - a * tail;
}

// Phi(x) + x Phi'(x), from its value at -|x|, which is small in the tail.
inline Vec gelu_derivative(Vec x) {
  const Vec a = -maximum(splat(-16.0f), -absolute(x));
  const Vec lower = (scaled_normal_tail(a) - a * 0.398942280f) * exponential(a * a * -0.5f);
  return x > splat(0.0f) ? 1.0f - lower : lower;
}

}  // namespace
}  // namespace minilm_fast
