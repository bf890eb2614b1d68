#include "gemm_kernels.h"
#include "gemm_rows.h"
#include "gemm_tiles.h"

// bf16 and int8 on matrix tiles. Packed rows and a panel's weights are tiles one after another.
namespace minilm_fast::gemm {
namespace {

struct Bf16 {
  static constexpr Format kFormat = Format::kBf16;
  using Sum = float;
};

struct Int8 {
  static constexpr Format kFormat = Format::kInt8;
  using Sum = int32_t;
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
  const int64_t steps = operands.panel_stride / kTileBytes;
  const int64_t finish_rows_a_step = (pending.rows + steps - 1) / steps;
  zero_sums();
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
  store_sums<kRowTiles, kPanels>(sums);
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
    // Each block of rows fetches its share of every step of the next panels. Where there is one block, the processor
    // does as well by itself.
    const int64_t lines = product_.row_count > kTileRows ? kPanels * kTileBytes / kLine : 0;
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
  const TileRegisters registers;
  Multiplication<E>(product).run();
}

}  // namespace

const Kernels kAmxBf16 = {2, 32, kTileRows, false, pack_rows_bf16<Tiled>, multiply<Bf16>};
const Kernels kAmxInt8 = {1, 64, kTileRows, false, pack_rows_int8<Tiled>, multiply<Int8>};

}  // namespace minilm_fast::gemm
