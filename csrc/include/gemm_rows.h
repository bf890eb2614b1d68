#pragma once

#include "gemm.h"
#include "vector.h"

// Packing of rows.
namespace minilm_fast::gemm {
namespace {

// Calls body(i, x) for each vector of a row's k elements, zeros in the place of what is missing in the last.
template <class T, class Body>
inline void for_each_vector(const T* row, int64_t k, Body body) {
  int64_t i = 0;
  for (; i + kWidth <= k; i += kWidth) body(i, load(row + i));
  if (i < k) body(i, load_part(row + i, k - i));
}

template <class PackRow>
inline void pack_each_row(const Source& source, int64_t row_count, PackRow pack_row) {
  for (int64_t m = 0; m < row_count; ++m) {
    if (source.bf16)
      pack_row(m, static_cast<const uint16_t*>(source.data) + m * source.stride);
    else
      pack_row(m, static_cast<const float*>(source.data) + m * source.stride);
  }
}

inline void pack_rows_fp32(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    float* out = static_cast<float*>(rows) + m * k;
    for_each_vector(row, k, [&](int64_t i, Float x) { store_part(out + i, x, k - i); });
  });
}

// Rounded to bf16, but stored as fp32: for kernels that multiply in fp32.
inline void pack_rows_bf16_as_fp32(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  const int64_t padded = padded_k(Format::kBf16, k);
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    float* out = static_cast<float*>(rows) + m * padded;
    for_each_vector(row, k, [&](int64_t i, Float x) { store(out + i, as_float(round_to_bf16(x))); });
    for (int64_t i = round_up(k, kWidth); i < padded; ++i) out[i] = 0.0f;
  });
}

// Where element i of a row is stored, from the row's start: one after another, or in matrix tiles of 16 rows of 64
// bytes, tile after tile along k.
struct Linear {
  static constexpr int64_t row(int64_t m, int64_t padded, int64_t) { return m * padded; }
  static constexpr int64_t element(int64_t i, int64_t) { return i; }
};

struct Tiled {
  static constexpr int64_t row(int64_t m, int64_t padded, int64_t bytes) {
    return m / 16 * 16 * padded + m % 16 * (64 / bytes);
  }
  static constexpr int64_t element(int64_t i, int64_t bytes) {
    const int64_t width = 64 / bytes;
    return i / width * 16 * width + i % width;
  }
};

template <class Layout>
void pack_rows_bf16(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  const int64_t padded = padded_k(Format::kBf16, k);
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    uint16_t* out = static_cast<uint16_t*>(rows) + Layout::row(m, padded, 2);
    for_each_vector(row, k, [&](int64_t i, Float x) { store(out + Layout::element(i, 2), x); });
    for (int64_t i = round_up(k, kWidth); i < padded; i += kWidth) store(out + Layout::element(i, 2), Float{});
  });
}

// The largest |x| of a row; an infinity or a NaN if it holds one. Magnitudes are ordered as their bits are.
template <class T>
float largest_magnitude(const T* row, int64_t k) {
  Int largest = {};
  for_each_vector(row, k, [&](int64_t, Float x) { largest = maximum(largest, as_int(absolute(x))); });
  int32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits = largest[i] > bits ? largest[i] : bits;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// x / scale as correctly rounded as by a division, where neither nor the correction leaves the normal range: the
// quotient by the inverse and one correction, exact in the multiply-add.
inline Float divide(Float x, float scale, float inverse) {
#if defined(__FMA__) || defined(__aarch64__)
  const Float quotient = x * inverse;
  const Float remainder = x - quotient * scale;
  return quotient + remainder * inverse;
#else
  return x / scale;
#endif
}

// Symmetric int8: scale = max|x| / 127, integers x / scale rounded half to even, plus `offset`. A row with a NaN or an
// infinity gets the scale NaN and the integers 0, so that all its results are NaN.
template <class Layout, class Integer, class T>
void quantize_row(const T* row, int64_t k, int32_t offset, Integer* out, float& row_scale) {
  typedef Integer Narrow __attribute__((vector_size(kWidth * sizeof(Integer)), aligned(1), may_alias));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  constexpr int32_t kRoundBits = 0x4b400000;
  constexpr float kSmall = 1e-20f;
  const auto write = [&](int64_t i, Int q) {
    *reinterpret_cast<Narrow*>(out + Layout::element(i, sizeof(Integer))) = __builtin_convertvector(q + offset, Narrow);
  };
  const float largest = largest_magnitude(row, k);
  const float scale = largest / 127.0f;
  const bool finite = largest - largest == 0.0f;
  row_scale = finite ? scale : __builtin_nanf("");
  int64_t done = 0;
  if (finite && scale > kSmall) {
    const float inverse = 1.0f / scale;
    for_each_vector(row, k,
                    [&](int64_t i, Float x) { write(i, as_int(divide(x, scale, inverse) + kRound) - kRoundBits); });
    done = round_up(k, kWidth);
  } else if (finite && scale > 0.0f) {
    for_each_vector(row, k, [&](int64_t i, Float x) {
      // A scale below the normal range is so coarse that the quotient can pass 127.
      const Float q = minimum(splat(127.0f), maximum(splat(-127.0f), x / scale));
      write(i, as_int(q + kRound) - kRoundBits);
    });
    done = round_up(k, kWidth);
  }
  for (int64_t i = done; i < padded_k(Format::kInt8, k); i += kWidth) write(i, Int{});
}

template <class Layout, class Integer>
void quantize_rows(const Source& source, int64_t row_count, int64_t k, int32_t offset, Integer* rows, float* scales) {
  const int64_t padded = padded_k(Format::kInt8, k);
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    quantize_row<Layout>(row, k, offset, rows + Layout::row(m, padded, sizeof(Integer)), scales[m]);
  });
}

template <class Layout>
void pack_rows_int8(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows<Layout>(source, row_count, k, 0, static_cast<int8_t*>(rows), scales);
}

// Shifted by 128 to unsigned, for the dot product of unsigned with signed bytes.
inline void pack_rows_uint8(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows<Linear>(source, row_count, k, 128, static_cast<uint8_t*>(rows), scales);
}

inline void pack_rows_int16(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows<Linear>(source, row_count, k, 0, static_cast<int16_t*>(rows), scales);
}

}  // namespace
}  // namespace minilm_fast::gemm
