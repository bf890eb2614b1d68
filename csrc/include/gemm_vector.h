#pragma once

#include "gemm_kernels.h"
#include "vector.h"

// Kernels in portable vector code, for whatever width the including file is compiled for.
namespace minilm_fast::gemm {
namespace {

// Rows and panels of a register tile: with the accumulators, one step's weights and one broadcast fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTilePanels = 4;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kTileRows = kVectorBytes == 32 ? 6 : 5, kTilePanels = 1;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
constexpr int kPanelVectors = kPanel / kWidth;

// One 32-bit lane of rows and weights at a time: fp32 1 value, bf16 2.
struct Fp32 {
  static constexpr Format kFormat = Format::kFp32;
  static constexpr int kValues = 1;
  static void widen(const char* p, Float (&w)[1]) { w[0] = load(reinterpret_cast<const float*>(p)); }
};

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int kValues = 2;
  static void widen(const char* p, Float (&w)[2]) {
    const Int pair = load_int(p);
    w[0] = as_float(pair << 16);
    w[1] = as_float(pair & static_cast<int32_t>(0xffff0000));
  }
};

inline void write(const Product& product, int64_t row, int64_t column, Float y) {
  const int64_t at = row * product.out_stride + column;
  if (product.out_bf16) {
    uint16_t* out = static_cast<uint16_t*>(product.out) + at;
    float values[kWidth];
    store(values, y);
    for (int i = 0; i < kWidth; ++i) out[i] = to_bf16(values[i]);
  } else {
    store(static_cast<float*>(product.out) + at, y);
  }
}

inline void write_part(const Product& product, int64_t row, int64_t column, Float y, int64_t count) {
  const int64_t at = row * product.out_stride + column;
  float values[kWidth];
  store(values, y);
  for (int64_t i = 0; i < count; ++i) {
    if (product.out_bf16)
      static_cast<uint16_t*>(product.out)[at + i] = to_bf16(values[i]);
    else
      static_cast<float*>(product.out)[at + i] = values[i];
  }
}

// Adds the bias, applies the activation and writes one vector; column counts from the product's first.
inline void finish(const Product& product, int64_t row, int64_t column, Float y) {
  const int64_t left = product.columns - column;
  if (product.bias) {
    const float* bias = product.bias + product.column + column;
    float padded[kWidth] = {};
    if (left < kWidth) {
      for (int64_t i = 0; i < left; ++i) padded[i] = bias[i];
      bias = padded;
    }
    y = rounded(y) + load(bias);
  }
  if (product.gelu) y = gelu(y);
  if (left >= kWidth)
    write(product, row, column, y);
  else if (left > 0)
    write_part(product, row, column, y, left);
}

template <class Element, int kRows, int kPanels>
void multiply_tile(const Product& product, int64_t row, int64_t panel) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t k = product.weight->k;
  const int64_t bytes = panel_bytes(Element::kFormat, k);
  const char* weights = product.weight->panels + (product.column / kPanel + panel) * bytes;
  const float* rows[kRows];
  for (int m = 0; m < kRows; ++m)
    rows[m] =
        reinterpret_cast<const float*>(static_cast<const char*>(product.rows.data) + (row + m) * product.rows.stride);
  Float sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < k; i += Element::kValues) {
    Float w[kVectors][Element::kValues];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      Element::widen(weights + v / kPanelVectors * bytes + v % kPanelVectors * kVectorBytes, w[v]);
    weights += kPanel * 4;
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < Element::kValues; ++j) {
        const Float x = splat(rows[m][i + j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[m][v] += x * w[v][j];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) finish(product, row + m, panel * kPanel + v * kWidth, sum[m][v]);
}

template <class Element, int kRows, int kPanels>
void multiply_rows(const Product& product, int64_t row, int64_t panel) {
  for (; row + kRows <= product.row_count; row += kRows) multiply_tile<Element, kRows, kPanels>(product, row, panel);
  if constexpr (kRows > 1)
    if (row < product.row_count) multiply_rows<Element, kRows / 2, kPanels>(product, row, panel);
}

template <class Element, int kPanels>
void multiply_panels(const Product& product, int64_t panel) {
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  for (; panel + kPanels <= panels; panel += kPanels) multiply_rows<Element, kTileRows, kPanels>(product, 0, panel);
  if constexpr (kPanels > 1)
    if (panel < panels) multiply_panels<Element, kPanels / 2>(product, panel);
}

template <class Element>
void multiply_floats(const Product& product) {
  multiply_panels<Element, kTilePanels>(product, 0);
}

inline float element(const Source& source, int64_t row, int64_t i) {
  const int64_t at = row * source.stride + i;
  return source.bf16 ? to_float(static_cast<const uint16_t*>(source.data)[at])
                     : static_cast<const float*>(source.data)[at];
}

void pack_rows_fp32(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  float* out = static_cast<float*>(rows);
  for (int64_t m = 0; m < row_count; ++m)
    for (int64_t i = 0; i < k; ++i) out[m * k + i] = element(source, m, i);
}

void pack_rows_bf16_as_fp32(const Source& source, int64_t row_count, int64_t k, void* rows, float*) {
  const int64_t padded = padded_k(Format::kBf16, k);
  float* out = static_cast<float*>(rows);
  for (int64_t m = 0; m < row_count; ++m) {
    for (int64_t i = 0; i < k; ++i) out[m * padded + i] = to_float(to_bf16(element(source, m, i)));
    for (int64_t i = k; i < padded; ++i) out[m * padded + i] = 0.0f;
  }
}

// Symmetric int8: scale = max|x| / 127, integers rounded half to even. A row with a NaN or an infinity gets the scale
// NaN and integers 0, so that all its results are NaN.
template <class Integer>
void quantize_rows(const Source& source, int64_t row_count, int64_t k, Integer* rows, float* scales) {
  const int64_t padded = padded_k(Format::kInt8, k);
  for (int64_t m = 0; m < row_count; ++m) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < k; ++i) {
      const float magnitude = __builtin_fabsf(element(source, m, i));
      largest = magnitude > largest ? magnitude : largest;
      finite &= magnitude <= 3.4028234e38f;
    }
    const float scale = largest / 127.0f;
    scales[m] = finite ? scale : __builtin_nanf("");
    Integer* out = rows + m * padded;
    for (int64_t i = 0; i < padded; ++i) {
      const float x = i < k && finite && scale > 0.0f ? element(source, m, i) / scale : 0.0f;
      const float q = __builtin_nearbyintf(x);
      out[i] = static_cast<Integer>(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q);
    }
  }
}

void pack_rows_int16(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales) {
  quantize_rows(source, row_count, k, static_cast<int16_t*>(rows), scales);
}

inline Float dequantize(const Product& product, int64_t row, int64_t column, Int sum) {
  const Float scaled = rounded(to_float(sum) * product.rows.scales[row]);
  return rounded(scaled * load(product.weight->scales + product.column + column));
}

void multiply_int8(const Product& product) {
  const int64_t padded = padded_k(Format::kInt8, product.weight->k);
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int8_t* weights =
        reinterpret_cast<const int8_t*>(product.weight->panels) + (product.column / kPanel + panel) * padded * kPanel;
    for (int64_t m = 0; m < product.row_count; ++m) {
      const int16_t* x =
          reinterpret_cast<const int16_t*>(static_cast<const char*>(product.rows.data) + m * product.rows.stride);
      int32_t sum[kPanel] = {};
      for (int64_t i = 0; i < padded; i += 4)
        for (int64_t j = 0; j < kPanel; ++j)
          for (int64_t l = 0; l < 4; ++l) sum[j] += x[i + l] * weights[i * kPanel + j * 4 + l];
      for (int v = 0; v < kPanelVectors; ++v)
        finish(product, m, panel * kPanel + v * kWidth,
               dequantize(product, m, panel * kPanel + v * kWidth, load_int(sum + v * kWidth)));
    }
  }
}

}  // namespace
}  // namespace minilm_fast::gemm
