#include <immintrin.h>

#include "gemm_finish.h"
#include "gemm_kernels.h"
#include "gemm_rows.h"

// Kernels on matrix tiles of 16 rows of 64 bytes: 32 bf16 or 64 int8 of k, or 16 sums. Packed rows and a panel's
// weights are such tiles one after another. Tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
namespace minilm_fast::gemm {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kLine = 64;

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

// Sums that wait to be finished: done a few rows at a time between the matrix products of the next ones, which leave
// the vector units idle.
template <class Sum>
struct Pending {
  const Product& product;
  Sums<Sum> sums;
  int64_t next = 0;
  int64_t rows = 0;

  void finish_up_to(int64_t end) {
    end = end < rows ? end : rows;
    if (next < end) finish_rows(product, sums, next, end);
    next = end > next ? end : next;
  }
};

#define MULTIPLY_TILES(sum, rows, weights)   \
  if constexpr (E::kFormat == Format::kBf16) \
    _tile_dpbf16ps(sum, rows, weights);      \
  else                                       \
    _tile_dpbssd(sum, rows, weights)

// Many rows pass by the weights in the first-level cache, and should not drive them out; a few rows stay there.
#define LOAD_ROWS(tile, address)              \
  if constexpr (kRowTiles == 2)               \
    _tile_stream_loadd(tile, address, kLine); \
  else                                        \
    _tile_loadd(tile, address, kLine)

// What one block of tiles multiplies: addresses, and the lines of the next panels to fetch in each step.
struct Operands {
  const char* rows;
  int64_t row_tile_stride;
  const char* weights;
  int64_t panel_stride;
  const char* prefetch;
  int64_t prefetch_lines;
  char* out;
  int64_t out_stride;
};

// Sums of kRowTiles * 16 rows and kPanels panels, as [rows][kPanels * 16].
template <class E, int kRowTiles, int kPanels>
void multiply_tiles(const Operands& operands, typename E::Sum* sums, Pending<typename E::Sum>& pending) {
  static_assert(kRowTiles * kPanels <= 4, "four tiles of sums");
  const int64_t steps = operands.panel_stride / kTileBytes;
  const int64_t finish_rows_a_step = (pending.rows + steps - 1) / steps;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    const char* rows = operands.rows + step * kTileBytes;
    const char* weights = operands.weights + step * kTileBytes;
    LOAD_ROWS(4, rows);
    _tile_loadd(6, weights, kLine);
    MULTIPLY_TILES(0, 4, 6);
    if constexpr (kRowTiles == 2) {
      LOAD_ROWS(5, rows + operands.row_tile_stride);
      MULTIPLY_TILES(1, 5, 6);
    }
    if constexpr (kPanels >= 2) {
      _tile_loadd(7, weights + operands.panel_stride, kLine);
      MULTIPLY_TILES(2, 4, 7);
      if constexpr (kRowTiles == 2) {
        MULTIPLY_TILES(3, 5, 7);
      }
    }
    if constexpr (kPanels == 4) {
      _tile_loadd(6, weights + 2 * operands.panel_stride, kLine);
      MULTIPLY_TILES(1, 4, 6);
      _tile_loadd(7, weights + 3 * operands.panel_stride, kLine);
      MULTIPLY_TILES(3, 4, 7);
    }
    const char* prefetch = operands.prefetch + step * kPanels * kTileBytes;
    for (int64_t line = 0; line < operands.prefetch_lines; ++line) _mm_prefetch(prefetch + line * kLine, _MM_HINT_T1);
    for (int64_t m = step * kRowTiles * kTileRows / steps; m < (step + 1) * kRowTiles * kTileRows / steps; ++m)
      for (int p = 0; p < kPanels; ++p) __builtin_prefetch(operands.out + m * operands.out_stride + p * kLine, 1);
    pending.finish_up_to((step + 1) * finish_rows_a_step);
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

#undef LOAD_ROWS
#undef MULTIPLY_TILES

template <class E>
class Multiplication {
 public:
  explicit Multiplication(const Product& product)
      : product_(product),
        panel_bytes_(panel_bytes(E::kFormat, product.weight->k)),
        weights_(product.weight->panels + product.column / kPanel * panel_bytes_),
        pending_{product, {buffers_[0], 0, 0, 0}} {}

  void run() {
    if (product_.row_count > kTileRows)
      multiply_panels<2, 2>(0);
    else
      multiply_panels<1, 4>(0);
    pending_.finish_up_to(pending_.rows);
  }

 private:
  // kRowTiles * kPanels tiles of sums at a time; kPanels panels stay in the first-level cache while the rows pass by.
  template <int kRowTiles, int kPanels>
  void multiply_panels(int64_t panel) {
    const int64_t panels = round_up(product_.columns, kPanel) / kPanel;
    for (; panel + kPanels <= panels; panel += kPanels) {
      int64_t row = 0;
      for (; row + (kRowTiles - 1) * kTileRows < product_.row_count; row += kRowTiles * kTileRows)
        multiply_block<kRowTiles, kPanels>(row, panel);
      if (row < product_.row_count) multiply_block<1, kPanels>(row, panel);
    }
    if constexpr (kPanels > 1)
      if (panel < panels) multiply_panels<kRowTiles, kPanels / 2>(panel);
  }

  template <int kRowTiles, int kPanels>
  void multiply_block(int64_t row, int64_t panel) {
    const char* weights = weights_ + panel * panel_bytes_;
    // Each block of rows fetches its share of every step of the next panels.
    const int64_t lines = kPanels * kTileBytes / kLine;
    const int64_t first = lines * row / product_.row_count;
    const int64_t next = row + kRowTiles * kTileRows;
    const int64_t last = next >= product_.row_count ? lines : lines * next / product_.row_count;
    const Operands operands = {static_cast<const char*>(product_.rows.data) + row * product_.rows.stride,
                               kTileRows * product_.rows.stride,
                               weights,
                               panel_bytes_,
                               weights + kPanels * panel_bytes_ + first * kLine,
                               last - first,
                               static_cast<char*>(product_.out) + (row * product_.out_stride + panel * kPanel) * 4,
                               product_.out_stride * 4};
    typename E::Sum* sums = pending_.sums.data == buffers_[0] ? buffers_[1] : buffers_[0];
    multiply_tiles<E, kRowTiles, kPanels>(operands, sums, pending_);
    const int64_t rows = next <= product_.row_count ? kRowTiles * kTileRows : product_.row_count - row;
    pending_.sums = {sums, row, panel, kPanels};
    pending_.next = 0;
    pending_.rows = rows;
  }

  const Product& product_;
  const int64_t panel_bytes_;
  const char* weights_;
  alignas(64) typename E::Sum buffers_[2][4 * kTileRows * kPanel];
  Pending<typename E::Sum> pending_;
};

template <class E>
void multiply(const Product& product) {
  const TileConfig config;
  _tile_loadconfig(&config);
  Multiplication<E>(product).run();
  _tile_release();
}

}  // namespace

const Kernels kAmxBf16 = {2, kTileRows, pack_rows_bf16<Tiled>, multiply<Bf16>};
const Kernels kAmxInt8 = {1, kTileRows, pack_rows_int8<Tiled>, multiply<Int8>};

}  // namespace minilm_fast::gemm
