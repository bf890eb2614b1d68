#pragma once

#include "gelu.h"
#include "gemm.h"
#include "vector.h"

// What follows the sums of a product: scales, bias, activation, conversion.
namespace minilm_fast::gemm {
namespace {

// A register tile's place in a product: rows [row, row + rows), panels [panel, panel + panels) of its columns. The
// sums are [rows][panels * kPanel].
struct Tile {
  int64_t row;
  int64_t rows;
  int64_t panel;
  int64_t panels;
};

inline Float load_sum(const Product&, int64_t, Float, const float* sum) { return load(sum); }

// The products are kept from contraction with what follows: results do not depend on the instruction set.
inline Float load_sum(const Product& product, int64_t row, Float feature_scale, const int32_t* sum) {
  const Float scaled = rounded(to_float(load_int(sum)) * product.rows.scales[row]);
  return rounded(scaled * feature_scale);
}

template <class Sum, class Out>
void finish_tile_as(const Product& product, const Tile& tile, const Sum* sums) {
  Out* out = static_cast<Out*>(product.out) + tile.row * product.out_stride;
  const int64_t width = tile.panels * kPanel;
  for (int64_t v = 0; v < width; v += kWidth) {
    const int64_t column = tile.panel * kPanel + v;
    const int64_t left = product.columns - column;
    if (left <= 0) return;
    Float bias = {}, scale = {};
    if (product.bias) bias = load_part(product.bias + product.column + column, left);
    if (product.weight->scales) scale = load(product.weight->scales + product.column + column);
    for (int64_t m = 0; m < tile.rows; ++m) {
      Float y = load_sum(product, tile.row + m, scale, sums + m * width + v);
      if (product.bias) y += bias;
      if (product.gelu) y = gelu(y);
      store_part(out + m * product.out_stride + column, y, left);
    }
  }
}

template <class Sum>
__attribute__((noinline)) void finish_tile(const Product& product, const Tile& tile, const Sum* sums) {
  if (product.out_bf16)
    finish_tile_as<Sum, uint16_t>(product, tile, sums);
  else
    finish_tile_as<Sum, float>(product, tile, sums);
}

}  // namespace
}  // namespace minilm_fast::gemm
