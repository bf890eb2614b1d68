#pragma once

#include <cstdint>

#include "isa.h"

// Products of rows with a packed weight, y = activation(x w^T + b): the interface between the operators, which know
// tensors and threads, and the kernels, which know instruction sets.
//
// A weight [n, k] is packed in panels of 16 output features, zeros beyond n and k. A panel holds, for each group of
// consecutive k that one 32-bit lane holds, the 16 features side by side: fp32 [k][16], bf16 [k/2][16][2], int8
// [k/4][16][4]. That is the operand of an FMA, of a two- or four-way dot product and (but for fp32, which is split on
// the way) of a matrix tile alike, so a packed weight serves every instruction set.
namespace minilm_fast::gemm {

enum class Format : int { kFp32 = 0, kBf16 = 1, kInt8 = 2 };
constexpr int kFormats = 3;

constexpr int64_t kPanel = 16;

// In an anonymous namespace, so that no copy compiled for a greater instruction set stands in for another.
namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The k of a packed weight: a whole number of matrix-tile rows of 64 bytes, but for fp32.
constexpr int64_t padded_k(Format format, int64_t k) {
  return format == Format::kFp32 ? k : round_up(k, format == Format::kBf16 ? 32 : 64);
}

constexpr int64_t panel_bytes(Format format, int64_t k) {
  return padded_k(format, k) * kPanel * (format == Format::kFp32 ? 4 : format == Format::kBf16 ? 2 : 1);
}

}  // namespace

struct Weight {
  Format format;
  int64_t n;
  int64_t k;
  const char* panels;
  const float* scales;  // int8: of each feature
  const int32_t* sums;  // int8: of each feature's integers
};

// Rows in the form that a kernel reads.
struct Rows {
  const void* data;
  int64_t stride;       // bytes from one row to the next
  const float* scales;  // int8: of each row
};

// One call: all rows times the features [column, column + columns); column is a multiple of kPanel.
struct Product {
  const Weight* weight;
  const float* bias;  // of feature 0, or null
  Rows rows;
  int64_t row_count;
  int64_t column;
  int64_t columns;
  void* out;           // of the first row and the first column
  int64_t out_stride;  // elements from one row to the next
  bool out_bf16;
  bool gelu;
};

// Source rows, fp32 or bf16, the last dimension contiguous.
struct Source {
  const void* data;
  int64_t stride;  // elements from one row to the next
  bool bf16;
};

struct Kernels {
  int64_t row_element_bytes;  // of a packed row
  int64_t row_k_multiple;     // a packed row has a multiple of so many elements
  int64_t row_multiple;       // packed rows are readable up to a multiple of this; those beyond may hold anything
  bool reads_fp32;            // fp32 rows need no packing
  void (*pack_rows)(const Source& source, int64_t row_count, int64_t k, void* rows, float* scales);
  void (*multiply)(const Product& product);

  int64_t row_bytes(int64_t k) const { return round_up(k, row_k_multiple) * row_element_bytes; }
};

const Kernels& kernels(Isa isa, Format format);

}  // namespace minilm_fast::gemm
