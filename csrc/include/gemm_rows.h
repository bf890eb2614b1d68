#pragma once

#include "gemm.h"
#include "vector.h"

// Packing of rows. Writes are whole vectors: they may run over the end of a row into the next one, which is written
// after it, and over the end of the last one by less than 64 bytes.
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
    for_each_vector(row, k, [&](int64_t i, Float x) { store(out + i, x); });
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

inline void pack_rows_bf16(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  const int64_t padded = padded_k(Format::kBf16, k);
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    uint16_t* out = static_cast<uint16_t*>(rows) + m * padded;
    for_each_vector(row, k, [&](int64_t i, Float x) { store(out + i, x); });
    for (int64_t i = round_up(k, kWidth); i < padded; ++i) out[i] = 0;
  });
}

template <class T>
float largest_magnitude(const T* row, int64_t k, bool& finite) {
  Float largest = {}, difference = {};
  for_each_vector(row, k, [&](int64_t, Float x) {
    const Float magnitude = absolute(x);
    largest = magnitude > largest ? magnitude : largest;
    difference += x - x;  // NaN from then on, where x is a NaN or infinite
  });
  float result = 0.0f;
  finite = true;
  for (int i = 0; i < kWidth; ++i) {
    result = largest[i] > result ? largest[i] : result;
    finite &= difference[i] == 0.0f;
  }
  return result;
}

// Symmetric int8: scale = max|x| / 127, integers x / scale rounded half to even, plus `offset`. A row with a NaN or an
// infinity gets the scale NaN and the integers 0, so that all its results are NaN.
template <class Integer>
void quantize_rows(const Source& source, int64_t row_count, int64_t k, int32_t offset, Integer* rows, float* scales) {
  typedef Integer Narrow __attribute__((vector_size(kWidth * sizeof(Integer)), aligned(1), may_alias));
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const int64_t padded = padded_k(Format::kInt8, k);
  pack_each_row(source, row_count, [&](int64_t m, const auto* row) {
    bool finite;
    const float scale = largest_magnitude(row, k, finite) / 127.0f;
    scales[m] = finite ? scale : __builtin_nanf("");
    Integer* out = rows + m * padded;
    const auto write = [&](int64_t i, Int q) {
      *reinterpret_cast<Narrow*>(out + i) = __builtin_convertvector(q + offset, Narrow);
    };
    int64_t done = 0;
    if (finite && scale > 0.0f) {
      for_each_vector(row, k, [&](int64_t i, Float x) {
        const Int q = as_int(x / scale + kRound) - 0x4b400000;
        write(i, q > 127 ? splat_int(127) : q < -127 ? splat_int(-127) : q);
      });
      done = round_up(k, kWidth);
    }
    for (int64_t i = done; i < padded; i += kWidth) write(i, Int{});
  });
}

inline void pack_rows_int8(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows(source, row_count, k, 0, static_cast<int8_t*>(rows), scales);
}

// Shifted by 128 to unsigned, for the dot product of unsigned with signed bytes.
inline void pack_rows_uint8(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows(source, row_count, k, 128, static_cast<uint8_t*>(rows), scales);
}

inline void pack_rows_int16(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows(source, row_count, k, 0, static_cast<int16_t*>(rows), scales);
}

}  // namespace
}  // namespace minilm_fast::gemm
