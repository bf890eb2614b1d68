#pragma once

// relation_kl on matrix tiles where both sides are symmetric and their scores are bounded: what is made of the scores
// of 32 rows with 32 columns. The vector work is cut into chunks, between which the caller places products of tiles:
// the processor then does both at once.

#include "amx_tile.h"
#include "relation_kl_tile.h"

namespace minilm_fast {
namespace {

constexpr int kSquareSide = 2 * static_cast<int>(kTileSide);
constexpr int kSquare = kSquareSide * kSquareSide;
constexpr int kChunks = 8;

// 2^x to 5e-7 for -100 <= x <= 100, without regard to larger numbers; 2^0 is exactly 1. The exponent in sixteenths
// picks one of 16 powers, a parabola does the rest.
class BoundedExp2 {
 public:
  BoundedExp2() {
    for (int i = 0; i < kLanes; ++i) {
      const float power = static_cast<float>(__builtin_exp2(i / 16.0));
      uint32_t bits;
      std::memcpy(&bits, &power, sizeof(bits));
      // Without what the shift below leaves of i in the mantissa.
      table_[i] = static_cast<int32_t>(bits - (static_cast<uint32_t>(i) << 19));
    }
  }

  Vec operator()(Vec x) const {
    const Vec shifted = x + kShift;
    return finish(shifted, x - (shifted - kShift));
  }

  // Of a product that is not rounded.
  Vec operator()(Vec score, Vec factor) const {
    const Vec shifted = _mm512_fmadd_ps(score, factor, splat(kShift));
    return finish(shifted, _mm512_fmsub_ps(score, factor, shifted - kShift));
  }

 private:
  static constexpr float kShift = 0x1.8p19f;  // adding it leaves x in sixteenths in the low bits

  // `rest`: what is beyond the sixteenths.
  Vec finish(Vec shifted, Vec rest) const {
    const __m512i bits = reinterpret_cast<__m512i>(shifted);
    const __m512i power = _mm512_permutexvar_epi32(bits, reinterpret_cast<__m512i>(table_));
    const Vec p = reinterpret_cast<Vec>(_mm512_add_epi32(_mm512_slli_epi32(bits, 19), power));
    return p * rest * (rest * 0.24022643f + 0.69318772f) + p;
  }

  IntVec table_;
};

// Half of a vector in double precision.
inline __m512d widen(Vec v, int half) {
  const __m512d pairs = reinterpret_cast<__m512d>(v);
  return _mm512_cvtps_pd(
      reinterpret_cast<__m256>(half == 0 ? _mm512_castpd512_pd256(pairs) : _mm512_extractf64x4_pd(pairs, 1)));
}

// Natural logarithm of positive numbers that are not subnormal, to 1e-12.
inline __m512d logarithm(__m512d x) {
  const __m512d m = _mm512_getmant_pd(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512d exponent = _mm512_getexp_pd(x * (4.0 / 3.0));  // one more where the mantissa was halved
  const __m512d s = (m - 1.0) / (m + 1.0), z = s * s;
  __m512d p = z * (1.0 / 15.0) + 1.0 / 13.0;  // the series of the inverse hyperbolic tangent
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  return exponent * kLn2 + 2.0 * s * p;
}

// e^-x of 16 numbers, to 2e-7: the nearest float to the exponent, and a factor for what that lacks.
inline Vec negative_exponential(const double* x) {
  Vec nearest, correction;
  for (int half = 0; half < 2; ++half) {
    const __m512d exponent = _mm512_loadu_pd(x + half * kLanes / 2) * -kLog2E;
    const __m256 rounded = _mm512_cvtpd_ps(exponent);
    const __m256 rest = _mm512_cvtpd_ps((exponent - _mm512_cvtps_pd(rounded)) * kLn2);
    std::memcpy(reinterpret_cast<char*>(&nearest) + half * sizeof(rounded), &rounded, sizeof(rounded));
    std::memcpy(reinterpret_cast<char*>(&correction) + half * sizeof(rest), &rest, sizeof(rest));
  }
  return exp2(nearest) * (correction + 1.0f);
}

// Sums over the columns that the rows of a tile see, a vector of partial sums each.
struct SquareSums {
  Vec total_t[kSquareSide], total_s[kSquareSide], dot[kSquareSide];
};

// The columns of a square: the first `count` are there.
struct SquareColumns {
  bool whole;
  __mmask16 masks[2];

  explicit SquareColumns(int64_t count)
      : whole(count >= kSquareSide), masks{first_bits<__mmask16>(count), first_bits<__mmask16>(count - kTileSide)} {}
};

// Keeps the compiler from merging the product into what is done with it: of equal sides the difference of both products
// must be zero.
inline Vec rounded(Vec product) {
  __asm__("" : "+v"(product));
  return product;
}

// Sums of columns as BoundedSums has them, without a shift: what cancels is far below the rounding of bf16.
struct ColumnSums {
  float *total_t, *total_s, *dot;

  ColumnSums from(int64_t i) const { return {total_t + i, total_s + i, dot + i}; }
};

// Adds the square of scores [32, 32] to the sums of its rows, and if Mirrored to those of its columns. `between(i)` is
// called before chunk i.
template <bool Mirrored, bool Whole, class Between>
inline void see_square(const float* t, const float* s, float factor_t, float factor_s, const SquareColumns& columns,
                       SquareSums& rows, const ColumnSums& column_sums, Between between) {
  const BoundedExp2 power;
  Vec total_t[2] = {}, total_s[2] = {}, dot[2] = {};
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    between(chunk);
    for (int r = chunk * kSquareSide / kChunks; r < (chunk + 1) * kSquareSide / kChunks; ++r) {
      Vec row_t = rows.total_t[r], row_s = rows.total_s[r], row_dot = rows.dot[r];
      for (int c = 0; c < 2; ++c) {
        const int64_t i = r * kSquareSide + c * kLanes;
        const Vec x = rounded(load(t + i) * factor_t), y = rounded(load(s + i) * factor_s), difference = x - y;
        Vec e = power(x), f = power(y);
        if constexpr (!Whole) {
          e = _mm512_maskz_mov_ps(columns.masks[c], e);
          f = _mm512_maskz_mov_ps(columns.masks[c], f);
        }
        row_t += e;
        row_s += f;
        row_dot += e * difference;
        if constexpr (Mirrored) {
          total_t[c] += e;
          total_s[c] += f;
          dot[c] += e * difference;
        }
      }
      rows.total_t[r] = row_t;
      rows.total_s[r] = row_s;
      rows.dot[r] = row_dot;
    }
  }
  if constexpr (Mirrored)
    for (int c = 0; c < 2; ++c) {
      auto add = [&](float* to, Vec v) { store(to + c * kLanes, load(to + c * kLanes) + v); };
      add(column_sums.total_t, total_t[c]);
      add(column_sums.total_s, total_s[c]);
      add(column_sums.dot, dot[c]);
    }
}

// Gradients of a square in bf16. As left operands, 16 rows each: a word has columns j and j + 16. As right ones, for 16
// columns each: line r has rows r and r + 16.
struct SquareGradients {
  alignas(64) uint32_t lefts[2 * kTileWords], rights[2 * kTileWords];
};

// Scores to gradients, of which the mirrored ones are part if Mirrored. `between(i)` is called before chunk i.
template <bool Mirrored, bool Whole, class Between>
inline void take_square(const float* t, const float* s, float factor_t, float factor_s, const SquareColumns& columns,
                        const Reciprocals& rows, const Reciprocals& mirrored, SquareGradients& to, Between between) {
  const BoundedExp2 power;
  const Vec scale_t = splat(factor_t), scale_s = splat(factor_s);
  Vec column_t[2] = {}, column_s[2] = {};
  if constexpr (Mirrored)
    for (int c = 0; c < 2; ++c) {
      column_t[c] = load(mirrored.t + c * kLanes);
      column_s[c] = load(mirrored.s + c * kLanes);
    }
  auto gradient = [&](int r, int c) {
    const int64_t i = r * kSquareSide + c * kLanes;
    const Vec e = power(load(t + i), scale_t), f = power(load(s + i), scale_s);
    const Vec g = f * (rows.s[r] + column_s[c]) - e * (rows.t[r] + column_t[c]);
    if constexpr (Whole) return g;
    return Vec(_mm512_maskz_mov_ps(columns.masks[c], g));
  };
  constexpr int kTileRowsAChunk = static_cast<int>(kTileSide) / kChunks;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    between(chunk);
    for (int r = chunk * kTileRowsAChunk; r < (chunk + 1) * kTileRowsAChunk; ++r) {
      const int lower = r + static_cast<int>(kTileSide);
      const Vec a = gradient(r, 0), b = gradient(r, 1), c = gradient(lower, 0), d = gradient(lower, 1);
      store_words(to.lefts + r * kTileSide, to_words(a, b));
      store_words(to.lefts + lower * kTileSide, to_words(c, d));
      store_words(to.rights + r * kTileSide, to_words(a, c));
      store_words(to.rights + kTileWords + r * kTileSide, to_words(b, d));
    }
  }
}

}  // namespace
}  // namespace minilm_fast
