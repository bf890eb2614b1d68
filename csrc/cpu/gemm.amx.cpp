#include <immintrin.h>

#include "gemm_finish.h"
#include "gemm_kernels.h"
#include "gemm_rows.h"

// Kernels on matrix tiles of 16 rows of 64 bytes: 32 bf16 or 64 int8 of k, or 16 sums. A panel's weights are such tiles
// one after another. Tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
namespace minilm_fast::gemm {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileWidth = 64;

struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t unused[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
  using Sum = float;
};

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  using Sum = int32_t;
};

#define MULTIPLY_TILES(sum, rows, weights)      \
  if constexpr (E::kFormat == Format::kBf16)    \
    _tile_dpbf16ps(sum, rows, weights);         \
  else                                          \
    _tile_dpbssd(sum, rows, weights)

// Sums of kRowTiles * 16 rows and kPanels panels, as [rows][kPanels * 16].
template <class E, int kRowTiles, int kPanels>
void multiply_tiles(const char* rows, int64_t row_stride, const char* weights, int64_t panel_stride, int64_t steps,
                    typename E::Sum* sums) {
  static_assert(kRowTiles * kPanels <= 4, "four tiles of sums");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step, rows += kTileWidth, weights += kTileBytes) {
    _tile_loadd(4, rows, row_stride);
    _tile_loadd(6, weights, 64);
    MULTIPLY_TILES(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, rows + kTileRows * row_stride, row_stride);
      MULTIPLY_TILES(1, 5, 6);
    }
    if constexpr (kPanels >= 2) {
      _tile_loadd(7, weights + panel_stride, 64);
      MULTIPLY_TILES(2, 4, 7);
      if constexpr (kRowTiles == 2) {
        MULTIPLY_TILES(3, 5, 7);
      }
    }
    if constexpr (kPanels == 4) {
      _tile_loadd(6, weights + 2 * panel_stride, 64);
      MULTIPLY_TILES(1, 4, 6);
      _tile_loadd(7, weights + 3 * panel_stride, 64);
      MULTIPLY_TILES(3, 4, 7);
    }
  }
  constexpr int64_t kStride = kPanels * kPanel * 4;
  char* out = reinterpret_cast<char*>(sums);
  _tile_stored(0, out, kStride);
  if constexpr (kRowTiles == 2) _tile_stored(1, out + kTileRows * kStride, kStride);
  if constexpr (kPanels >= 2) _tile_stored(2, out + 64, kStride);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, out + kTileRows * kStride + 64, kStride);
  if constexpr (kPanels == 4) {
    _tile_stored(1, out + 2 * 64, kStride);
    _tile_stored(3, out + 3 * 64, kStride);
  }
  __asm__ volatile("" ::: "memory");
}

#undef MULTIPLY_TILES

template <class E, int kRowTiles, int kPanels>
void multiply_block(const Product& product, int64_t row, int64_t panel) {
  constexpr int64_t kRows = kRowTiles * kTileRows;
  alignas(64) typename E::Sum sums[kRows * kPanels * kPanel];
  const Weight& weight = *product.weight;
  const int64_t bytes = panel_bytes(E::kFormat, weight.k);
  const char* rows = static_cast<const char*>(product.rows.data) + row * product.rows.stride;
  multiply_tiles<E, kRowTiles, kPanels>(rows, product.rows.stride,
                                        weight.panels + (product.column / kPanel + panel) * bytes, bytes,
                                        bytes / kTileBytes, sums);
  const int64_t left = product.row_count - row;
  finish_tile(product, {row, left < kRows ? left : kRows, panel, kPanels}, sums);
}

// kRowTiles * kPanels tiles of sums at a time; kPanels panels stay in the first-level cache while the rows pass by.
template <class E, int kRowTiles, int kPanels>
void multiply_panels(const Product& product, int64_t panel) {
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  for (; panel + kPanels <= panels; panel += kPanels) {
    int64_t row = 0;
    for (; row + (kRowTiles - 1) * kTileRows < product.row_count; row += kRowTiles * kTileRows)
      multiply_block<E, kRowTiles, kPanels>(product, row, panel);
    if (row < product.row_count) multiply_block<E, 1, kPanels>(product, row, panel);
  }
  if constexpr (kPanels > 1)
    if (panel < panels) multiply_panels<E, kRowTiles, kPanels / 2>(product, panel);
}

template <class E>
void multiply(const Product& product) {
  const TileConfig config;
  _tile_loadconfig(&config);
  if (product.row_count > kTileRows)
    multiply_panels<E, 2, 2>(product, 0);
  else
    multiply_panels<E, 1, 4>(product, 0);
  _tile_release();
}

}  // namespace

const Kernels kAmxBf16 = {2, kTileRows, pack_rows_bf16, multiply<Bf16>};
const Kernels kAmxInt8 = {1, kTileRows, pack_rows_int8, multiply<Int8>};

}  // namespace minilm_fast::gemm
