#pragma once

#include <cstdint>
#include <cstring>

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

inline float to_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Round to nearest even; a NaN stays one.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline bool any(Int mask) {
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= mask[i];
  return bits != 0;
}

// exp(x) for x <= 0 (to 2e-7 relative); below -87, where it leaves the normal range, exp(-87). A NaN stays one.
inline Float exp_negative(Float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  x = x < -87.0f ? splat(-87.0f) : x;
  const Float shifted = x * 1.44269504f + kRound;
  const Float n = shifted - kRound;
  Float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Float p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * as_float((as_int(shifted) << 23) + 0x3f800000);
}

// x * Phi(x). Phi(t) - 1/2 = t P(t^2) / Q(t^2), a minimax fit on [0, 5.5] to 7e-9; beyond, Phi is 0 or 1 to fp32.
inline Float gelu(Float x) {
  constexpr float kLimit = 5.5f;
  Float t = x < -kLimit ? splat(-kLimit) : x;
  t = t > kLimit ? splat(kLimit) : t;
  const Float u = t * t;
  Float p = splat(2.2749339875730006e-08f);
  p = p * u + 6.352131356216108e-06f;
  p = p * u + 0.00016882697123089696f;
  p = p * u + 0.004677268577039424f;
  p = p * u + 0.03385276901320986f;
  p = p * u + 0.3989422346212791f;
  Float q = splat(1.1975041815167494e-06f);
  q = q * u + 7.364794221138141e-05f;
  q = q * u + 0.0018844521515943625f;
  q = q * u + 0.028645942792997765f;
  q = q * u + 0.2515222262799513f;
  q = q * u + 1.0f;
  return x * (t * p / q + 0.5f);
}

}  // namespace
}  // namespace minilm_fast
