#pragma once

// Attention on matrix tiles (AMX): 16 rows of 64 bytes, which are 32 bf16 of a left operand; pairs of bf16 for 16
// columns of a right one; or 16 sums in fp32. Tile registers: 0 and 1 left operands, 2 and 3 right ones, 4 to 7 sums.

#include "attention_tile.h"
#include "tile_registers.h"

namespace minilm_fast {
namespace {

constexpr int64_t kTileSide = 16;
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileWords = kTileSide * kTileSide;  // of 32 bits
constexpr int64_t kTileLine = 64;                      // bytes
constexpr int64_t kAmxKeyBlock = 512;
constexpr int64_t kAmxScoreStride = kAmxKeyBlock + kTileSide;

// The intrinsics do not tell the compiler which memory they use.
inline void memory_fence() { __asm__ volatile("" ::: "memory"); }

// The first `count` bits of a mask, none of them or all where `count` is out of range.
template <class Mask>
inline Mask first_bits(int64_t count) {
  constexpr int64_t kBits = 8 * sizeof(Mask);
  if (count >= kBits) return static_cast<Mask>(~Mask{0});
  return static_cast<Mask>(count <= 0 ? 0u : (1u << count) - 1u);
}

// Lane i of the result combines the lanes of vector i of 16.
template <class Combine>
inline Vec combine_rows(const Vec* rows, Combine combine) {
  Vec v[kTileSide];
  std::memcpy(v, rows, sizeof(v));
  transpose(v);
  for (int half = kTileSide / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = combine(v[i], v[i + half]);
  return v[0];
}

// Of the numbers from p on the first 16, or `count` if there are fewer, each in the lower half of a word.
inline BitVec load_words(const Bf16* p, int64_t count = kLanes) {
  return reinterpret_cast<BitVec>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_bits<__mmask16>(count), p)));
}

inline BitVec load_bits(const uint32_t* p) {
  BitVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void store_words(uint32_t* p, BitVec v) { std::memcpy(p, &v, sizeof(v)); }

// Rows of bf16 (row i at rows(i)) as left operands, one tile of 16 rows for every 32 dimensions; what is beyond
// `count` rows or `size` dimensions is zero.
template <class Rows>
inline void pack_rows(Rows rows, int64_t count, int64_t size, uint32_t* tiles) {
  for (int64_t d = 0; d < size; d += kTileDepth, tiles += kTileWords) {
    const __mmask32 mask = first_bits<__mmask32>(size - d);
    for (int64_t i = 0; i < count; ++i) {
      _mm512_storeu_si512(tiles + i * kTileSide, _mm512_maskz_loadu_epi16(mask, rows(i) + d));
      __builtin_prefetch(rows(i + kTileSide) + d);
    }
    for (int64_t i = count; i < kTileSide; ++i) _mm512_storeu_si512(tiles + i * kTileSide, _mm512_setzero_si512());
  }
}

// Rows of bf16 as right operands whose columns are the rows: for every 16 of them one tile for every 32 dimensions.
template <class Rows>
inline void pack_columns(Rows rows, int64_t count, int64_t size, uint32_t* tiles) {
  const int64_t depth = round_up(size, kTileDepth) / kTileDepth;
  for (int64_t j = 0; j < count; j += kTileSide, tiles += depth * kTileWords) {
    pack_rows([&](int64_t i) { return rows(j + i); }, count - j < kTileSide ? count - j : kTileSide, size, tiles);
    for (int64_t k = 0; k < depth; ++k) {
      Vec square[kTileSide];
      std::memcpy(square, tiles + k * kTileWords, sizeof(square));
      transpose(square);
      std::memcpy(tiles + k * kTileWords, square, sizeof(square));
    }
  }
}

// 32 rows of values as right operands, one tile for every 16 dimensions. Line i pairs row i with row i + 16; rows
// beyond `count` are zero, whatever memory holds there.
template <class Rows>
inline void pack_values(Rows rows, int64_t count, int64_t size, uint32_t* tiles) {
  for (int64_t d = 0; d < size; d += kTileSide, tiles += kTileWords)
    for (int64_t i = 0; i < kTileSide; ++i) {
      auto words = [&](int64_t row) {
        if (row >= count) return BitVec{};
        __builtin_prefetch(rows(row + kTileDepth) + d);  // rows lie far apart; one that does not exist is no error
        return load_words(rows(row) + d, size - d);
      };
      store_words(tiles + i * kTileSide, words(i) | (words(i + kTileSide) << 16));
    }
}

// Probabilities of keys i and i + 16 of 32 in one word: rounded to bf16, halves away from zero.
inline BitVec to_words(Vec low, Vec high) {
  const BitVec a = reinterpret_cast<BitVec>(low) + 0x8000u, b = reinterpret_cast<BitVec>(high) + 0x8000u;
  constexpr int kFirstOrBothOthers = 0xf8;
  return reinterpret_cast<BitVec>(_mm512_ternarylogic_epi32(reinterpret_cast<__m512i>(a >> 16),
                                                            reinterpret_cast<__m512i>(b), _mm512_set1_epi32(-0x10000),
                                                            kFirstOrBothOthers));
}

// 2^x to 7e-5 for x <= 0, of which no more is left in bf16.
inline Vec exp2_to_bf16(Vec x) {
  const Vec r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  Vec p = r * 0.07802470028400421f + 0.2260674238204956f;
  p = p * r + 0.695833146572113f;
  p = p * r + 0.9999253153800964f;
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// Scores of one row to probabilities, as words in the place of the first half of the scores; otherwise as
// softmax_row. Their total is that of the numbers before rounding and before the factors, if there are any.
inline void softmax_words(QueryTile& tile, int row, float* scores, int64_t visible, int64_t count, int64_t size,
                          const float* factors) {
  const float top = largest_score(scores, visible, kMinusInfinity) * tile.factor;
  const float now = top > tile.maximum[row] ? top : tile.maximum[row];
  if (now == kMinusInfinity) visible = 0;
  const Vec factor = splat(tile.factor), subtrahend = splat(now);
  auto probability = [&](const float* score) { return exp2(load(score) * factor - subtrahend); };
  Vec totals[2] = {};
  float* words = scores;
  int64_t j = 0;
  for (; j + kTileDepth <= visible; j += kTileDepth, words += kTileSide) {
    const Vec low = probability(scores + j), high = probability(scores + j + kTileSide);
    totals[0] += low;
    totals[1] += high;
    store(words, reinterpret_cast<Vec>(factors == nullptr
                                           ? to_words(low, high)
                                           : to_words(low * load(factors + j), high * load(factors + j + kTileSide))));
  }
  for (; j < count; j += kTileDepth, words += kTileSide) {
    Vec pair[2] = {};
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t left = visible - j - i * kTileSide;
      if (left > 0) pair[i] = first_lanes(left, probability(scores + j + i * kTileSide), Vec{});
      totals[i] += pair[i];
      if (factors != nullptr && left > 0) pair[i] *= load(factors + j + i * kTileSide);
    }
    store(words, reinterpret_cast<Vec>(to_words(pair[0], pair[1])));
  }
  if (visible > 0) raise_maximum(tile, row, now, sum(totals[0] + totals[1]), size);
}

// Scores of Lefts * 16 rows with 64 keys: [rows, kAmxScoreStride] from the given column on.
template <int Lefts>
inline void multiply_keys(const uint32_t* queries, const uint32_t* keys, int64_t depth, float* scores) {
  static_assert(Lefts == 1 || Lefts == 2, "one or two tiles of rows");
  constexpr int64_t kStride = kAmxScoreStride * sizeof(float);
  const int64_t key_tile = depth * kTileWords;
  for (int half = 0; half < Lefts; ++half, keys += 2 * key_tile, scores += 2 * kTileSide) {
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < depth; ++k) {
      const uint32_t* key = keys + k * kTileWords;
      _tile_loadd(0, queries + k * kTileWords, kTileLine);
      _tile_loadd(2, key, kTileLine);
      _tile_dpbf16ps(4, 0, 2);
      _tile_loadd(3, key + key_tile, kTileLine);
      _tile_dpbf16ps(5, 0, 3);
      if constexpr (Lefts == 2) {
        _tile_loadd(1, queries + (depth + k) * kTileWords, kTileLine);
        _tile_dpbf16ps(6, 1, 2);
        _tile_dpbf16ps(7, 1, 3);
      } else {
        _tile_loadd(2, key + 2 * key_tile, kTileLine);
        _tile_dpbf16ps(6, 0, 2);
        _tile_loadd(3, key + 3 * key_tile, kTileLine);
        _tile_dpbf16ps(7, 0, 3);
      }
    }
    _tile_stored(4, scores, kStride);
    _tile_stored(5, scores + kTileSide, kStride);
    float* rest = Lefts == 2 ? scores + kTileSide * kAmxScoreStride : scores + 2 * kTileSide;
    _tile_stored(6, rest, kStride);
    _tile_stored(7, rest + kTileSide, kStride);
  }
}

// Sums over keys of probabilities times values. Probabilities: words [Lefts * 16, kAmxScoreStride], of a row one word
// for keys i and i + 16 of every 32. Values: for every 32 keys (a step) the tiles of pack_values, of which the two
// from the given one on are taken; what comes of the second is of no use if it is not there. Sums: for each tile of
// rows two tiles, one for each 16 dimensions.
template <int Lefts>
inline void multiply_values(const float* probabilities, const uint32_t* values, int64_t steps, int64_t value_step,
                            float* sums) {
  constexpr int64_t kStride = kAmxScoreStride * sizeof(float);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t s = 0; s < steps; ++s, probabilities += kTileSide, values += value_step) {
    _tile_loadd(0, probabilities, kStride);
    _tile_loadd(2, values, kTileLine);
    _tile_loadd(3, values + kTileWords, kTileLine);
    if constexpr (Lefts == 2) {
      _tile_loadd(1, probabilities + kTileSide * kAmxScoreStride, kStride);
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 0, 3);
      _tile_dpbf16ps(6, 1, 2);
      _tile_dpbf16ps(7, 1, 3);
    } else {
      _tile_dpbf16ps(4, 0, 2);
      _tile_dpbf16ps(5, 0, 3);
    }
  }
  _tile_stored(4, sums, kTileLine);
  _tile_stored(5, sums + kTileWords, kTileLine);
  if constexpr (Lefts == 1) return;
  _tile_stored(6, sums + 2 * kTileWords, kTileLine);
  _tile_stored(7, sums + 3 * kTileWords, kTileLine);
}

}  // namespace
}  // namespace minilm_fast
