#pragma once

#include "gelu.h"
#include "gemm.h"
#include "vector.h"

// What follows the sums of a product: scales, bias, activation, conversion.
namespace minilm_fast::gemm {
namespace {

// Sums of some rows and panels of a product, [rows][panels * kPanel], and their place: row, and panel among the
// product's columns.
template <class Sum>
struct Sums {
  const Sum* data;
  int64_t row;
  int64_t panel;
  int64_t panels;
};

inline Float scaled_sum(const Product&, int64_t, int64_t, const float* sum) { return load(sum); }

// The products are kept from contraction with what follows: results do not depend on the instruction set.
inline Float scaled_sum(const Product& product, int64_t row, int64_t feature, const int32_t* sum) {
  const Float scaled = rounded(to_float(load_int(sum)) * product.rows.scales[row]);
  return rounded(scaled * load(product.weight->scales + feature));
}

template <bool kGelu, class Out, class Sum>
inline Float result(const Product& product, int64_t row, int64_t feature, const Sum* sum, int64_t left) {
  Float y = scaled_sum(product, row, feature, sum);
  if (product.bias) y += load_part(product.bias + feature, left);
  if constexpr (kGelu && sizeof(Out) == 2)
    y = gelu_for_bf16(y);
  else if constexpr (kGelu)
    y = gelu(y);
  return y;
}

template <bool kGelu, class Out, class Sum>
inline void finish_rows_as(const Product& product, const Sums<Sum>& sums, int64_t begin, int64_t end) {
  const int64_t width = sums.panels * kPanel, column = sums.panel * kPanel;
  const int64_t feature = product.column + column, left = product.columns - column;
  for (int64_t m = begin; m < end; ++m) {
    const int64_t row = sums.row + m;
    const Sum* sum = sums.data + m * width;
    Out* out = static_cast<Out*>(product.out) + row * product.out_stride + column;
    if (left >= width) {
      for (int64_t v = 0; v < width; v += kWidth)
        store(out + v, result<kGelu, Out>(product, row, feature + v, sum + v, kWidth));
    } else {
      for (int64_t v = 0; v < left; v += kWidth)
        store_part(out + v, result<kGelu, Out>(product, row, feature + v, sum + v, left - v), left - v);
    }
  }
}

// Writes the results of the rows [begin, end) of the sums.
template <class Sum>
inline void finish_rows(const Product& product, const Sums<Sum>& sums, int64_t begin, int64_t end) {
  if (product.out_bf16) {
    if (product.gelu)
      finish_rows_as<true, uint16_t>(product, sums, begin, end);
    else
      finish_rows_as<false, uint16_t>(product, sums, begin, end);
  } else {
    if (product.gelu)
      finish_rows_as<true, float>(product, sums, begin, end);
    else
      finish_rows_as<false, float>(product, sums, begin, end);
  }
}

}  // namespace
}  // namespace minilm_fast::gemm
