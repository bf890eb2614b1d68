#pragma once

#include <utility>

#include "gemm_finish.h"
#include "gemm_kernels.h"
#include "gemm_rows.h"

// Kernels in portable vector code, for whatever width the including file is compiled for. Each result is a sum over
// blocks of ascending k, each block one chain of multiply-adds, whatever the tile it is computed in.
namespace minilm_fast::gemm {
namespace {

constexpr int kPanelVectors = kPanel / kWidth;
constexpr int64_t kStepBytes = kPanel * 4;
constexpr int64_t kChunkSteps = 8;
constexpr int64_t kUnlimited = INT64_MAX / 2;

// How a kernel multiplies one step: the k whose weights fill one 32-bit lane of each feature. A policy has
//   kFormat      the format of the weights,
//   kRowBytes    bytes of a packed row that a step takes,
//   kTileRows, kTilePanels  the largest register tile: accumulators, weights and an element fill the registers,
//   Weights      the weights of a vector of features, and load() that reads them,
//   kBlockSteps  steps that are summed in one chain before they join the sums of the blocks before,
//   Accumulator  the sums of a vector of features, add() a step to it, and total() their final values.
struct Fp32 {
  static constexpr Format kFormat = Format::kFp32;
  static constexpr int64_t kRowBytes = 4;
#if defined(__AVX512F__)
  static constexpr int kTileRows = 8, kTilePanels = 3;
#elif defined(__AVX2__)
  static constexpr int kTileRows = 6, kTilePanels = 1;
#elif defined(__aarch64__)
  static constexpr int kTileRows = 5, kTilePanels = 1;
#else
  static constexpr int kTileRows = 2, kTilePanels = 1;
#endif
  static constexpr int64_t kBlockSteps = 128;
  using Weights = Float;
  using Accumulator = Float;
  using Sum = float;

  static Weights load(const char* p) { return minilm_fast::load(reinterpret_cast<const float*>(p)); }
  static void add(Accumulator& sum, const char* row, Weights w) {
    sum += splat(*reinterpret_cast<const float*>(row)) * w;
  }
  static Float total(const Product&, int64_t, Accumulator sum) { return sum; }
};

// Weights in bf16 and rows rounded to it, multiplied in fp32.
struct Bf16 : Fp32 {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int64_t kRowBytes = 8;
  static constexpr int64_t kBlockSteps = 64;
  struct Weights {
    Float even, odd;
  };

  static Weights load(const char* p) {
    const Int pair = load_int(p);
    return {as_float(pair << 16), as_float(pair & static_cast<int32_t>(0xffff0000))};
  }
  static void add(Accumulator& sum, const char* row, const Weights& w) {
    const float* x = reinterpret_cast<const float*>(row);
    sum += splat(x[0]) * w.even;
    sum += splat(x[1]) * w.odd;
  }
};

inline const char* row_address(const Product& product, int64_t row) {
  return static_cast<const char*>(product.rows.data) + row * product.rows.stride;
}

inline const char* panel_address(const Product& product, int64_t panel) {
  const Weight& weight = *product.weight;
  return weight.panels + (product.column / kPanel + panel) * panel_bytes(weight.format, weight.k);
}

// A part of memory to bring into the second-level cache during a tile's multiplication.
struct Prefetch {
  const char* next;
  int64_t lines_a_chunk;

  void fetch_chunk() {
    for (int64_t line = 0; line < lines_a_chunk; ++line, next += kLine) __builtin_prefetch(next, 0, 2);
  }
  static constexpr int64_t kLine = 64;
};

inline Float load_sum(const float* p) { return load(p); }
inline Int load_sum(const int32_t* p) { return load_int(p); }

template <class P, int kRows, int kPanels, int kVectors>
inline void multiply_step(typename P::Accumulator (&sum)[kRows][kVectors], const char* const (&rows)[kRows],
                          const char* weights, int64_t panel_stride, int64_t step) {
  typename P::Weights w[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v)
    w[v] = P::load(weights + v / kPanelVectors * panel_stride + step * kStepBytes + v % kPanelVectors * kVectorBytes);
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) P::add(sum[m][v], rows[m] + step * P::kRowBytes, w[v]);
}

template <class P, int kRows, int kPanels>
void multiply_tile(const Product& product, int64_t row, int64_t panel, Prefetch prefetch, typename P::Sum* sums) {
  constexpr int kVectors = kPanels * kPanelVectors;
  const int64_t bytes = panel_bytes(P::kFormat, product.weight->k), steps = bytes / kStepBytes;
  const char* weights = panel_address(product, panel);
  const char* rows[kRows];
  for (int m = 0; m < kRows; ++m) rows[m] = row_address(product, row + m);
  for (int64_t begin = 0; begin < steps || begin == 0; begin += P::kBlockSteps) {
    const int64_t end = begin + P::kBlockSteps < steps ? begin + P::kBlockSteps : steps;
    typename P::Accumulator sum[kRows][kVectors] = {};
    int64_t step = begin;
    while (step + kChunkSteps <= end) {
      prefetch.fetch_chunk();
      int64_t chunk_end = step + kChunkSteps;
      // Unrolled, the loop would be reordered until the registers do not suffice: its length is hidden.
      __asm__("" : "+r"(chunk_end));
      for (; step < chunk_end; ++step) multiply_step<P, kRows, kPanels>(sum, rows, weights, bytes, step);
    }
    for (; step < end; ++step) multiply_step<P, kRows, kPanels>(sum, rows, weights, bytes, step);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t feature = product.column + panel * kPanel + v * kWidth;
#pragma GCC unroll 8
      for (int m = 0; m < kRows; ++m) {
        typename P::Sum* out = sums + (m * kVectors + v) * kWidth;
        const auto total = P::total(product, feature, sum[m][v]);
        store(out, begin == 0 ? total : total + load_sum(out));
      }
    }
  }
}

template <class P, int kPanels, int... kRows>
auto tile_function(int64_t rows, std::integer_sequence<int, kRows...>) {
  typedef void (*Function)(const Product&, int64_t, int64_t, Prefetch, typename P::Sum*);
  static constexpr Function kTable[] = {multiply_tile<P, kRows + 1, kPanels>...};
  return kTable[rows - 1];
}

// All rows times the panels from `panel` on, kPanels at a time, then what is left with narrower tiles. The weights of
// kPanels panels stay in the second-level cache while the rows pass by.
template <class P, int kPanels>
void multiply_panels(const Product& product, int64_t panel) {
  const int64_t panels = round_up(product.columns, kPanel) / kPanel;
  const int64_t tiles = (product.row_count + P::kTileRows - 1) / P::kTileRows;
  alignas(64) typename P::Sum sums[P::kTileRows * kPanels * kPanel];
  const int64_t group_bytes = kPanels * panel_bytes(P::kFormat, product.weight->k);
  const int64_t chunks = group_bytes / kPanels / kStepBytes / kChunkSteps + 1;
  for (; panel + kPanels <= panels; panel += kPanels) {
    const char* next_group = panel_address(product, panel + kPanels);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * product.row_count / tiles;
      const int64_t rows = (tile + 1) * product.row_count / tiles - row;
      for (int64_t m = row; m < row + rows; ++m)
        for (int64_t p = panel; p < panel + kPanels; ++p)
          __builtin_prefetch(static_cast<char*>(product.out) + (m * product.out_stride + p * kPanel) * 4, 1);
      // Each tile fetches its share of the next group of panels.
      const int64_t share = group_bytes / tiles;
      const Prefetch prefetch = {next_group + tile * share, (share / chunks + Prefetch::kLine - 1) / Prefetch::kLine};
      tile_function<P, kPanels>(rows, std::make_integer_sequence<int, P::kTileRows>())(product, row, panel, prefetch,
                                                                                       sums);
      finish_rows<typename P::Sum>(product, {sums, row, panel, kPanels}, 0, rows);
    }
  }
  if constexpr (kPanels > 1)
    if (panel < panels) multiply_panels<P, kPanels - 1>(product, panel);
}

template <class P>
void multiply(const Product& product) {
  multiply_panels<P, P::kTilePanels>(product, 0);
}

}  // namespace
}  // namespace minilm_fast::gemm
