#pragma once

#include <utility>

#include "gemm_finish.h"
#include "gemm_kernels.h"
#include "gemm_rows.h"

// Kernels in portable vector code, for whatever width the including file is compiled for. Each result is one chain of
// multiply-adds over ascending k, whatever the tile it is computed in.
namespace minilm_fast::gemm {
namespace {

// The largest register tile: accumulators, one step's weights and one broadcast element fill the registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTilePanels = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1;
#elif defined(__aarch64__)
constexpr int kTileRows = 5, kTilePanels = 1;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
constexpr int kPanelVectors = kPanel / kWidth;

// How a kernel reads the 16 lanes of 32 bits that hold a panel's weights of one or two consecutive k.
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

inline const char* row_address(const Product& product, int64_t row) {
  return static_cast<const char*>(product.rows.data) + row * product.rows.stride;
}

inline const char* panel_address(const Product& product, int64_t panel) {
  const Weight& weight = *product.weight;
  return weight.panels + (product.column / kPanel + panel) * panel_bytes(weight.format, weight.k);
}

template <class Element, int kRows, int kPanels>
void multiply_floats(const Product& product, int64_t row, int64_t panel, float* sums) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t k = product.weight->k;
  const int64_t bytes = panel_bytes(Element::kFormat, k);
  const char* weights = panel_address(product, panel);
  const float* rows[kRows];
  for (int m = 0; m < kRows; ++m) rows[m] = reinterpret_cast<const float*>(row_address(product, row + m));
  Float sum[kRows][kVectors] = {};
  for (int64_t i = 0; i < k; i += Element::kValues) {
    Float w[kVectors][Element::kValues];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      Element::widen(weights + v / kPanelVectors * bytes + v % kPanelVectors * kVectorBytes, w[v]);
    weights += kPanel * 4;
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 2
      for (int j = 0; j < Element::kValues; ++j) {
        const Float x = splat(rows[m][i + j]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[m][v] += x * w[v][j];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(sums + (m * kVectors + v) * kWidth, sum[m][v]);
}

typedef void (*TileFunction)(const Product& product, int64_t row, int64_t panel, float* sums);

template <class Element, int kPanels, int... kRows>
TileFunction tile_function(int64_t rows, std::integer_sequence<int, kRows...>) {
  static constexpr TileFunction kTable[] = {multiply_floats<Element, kRows + 1, kPanels>...};
  return kTable[rows - 1];
}

// All rows times the panels from `panel` on, kPanels at a time, then what is left with narrower tiles. The weights of
// kPanels panels stay in the second-level cache while the rows pass by.
template <class Element, int kPanels>
void multiply_panels(const Product& product, int64_t panel) {
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  const int64_t tiles = (product.row_count + kTileRows - 1) / kTileRows;
  alignas(64) float sums[kTileRows * kPanels * kPanel];
  for (; panel + kPanels <= panels; panel += kPanels) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * product.row_count / tiles;
      const int64_t rows = (tile + 1) * product.row_count / tiles - row;
      tile_function<Element, kPanels>(rows, std::make_integer_sequence<int, kTileRows>())(product, row, panel, sums);
      finish_rows<float>(product, {sums, row, panel, kPanels}, 0, rows);
    }
  }
  if constexpr (kPanels > 1)
    if (panel < panels) multiply_panels<Element, kPanels - 1>(product, panel);
}

template <class Element>
void multiply_floats(const Product& product) {
  multiply_panels<Element, kTilePanels>(product, 0);
}

void multiply_int8(const Product& product) {
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

}  // namespace
}  // namespace minilm_fast::gemm
