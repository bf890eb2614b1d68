#pragma once

#include "gemm_finish.h"
#include "tile_registers.h"

// What the kernels on matrix tiles (AMX) share: tiles of 16 rows of 64 bytes, which are 32 bf16 or 64 int8 of k, or 16
// sums. Tile registers: 0 to 3 sums, 4 and 5 rows, 6 and 7 weights.
namespace minilm_fast::gemm {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kLine = 64;

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

// The sums of kRowTiles * 16 rows and kPanels panels, two tiles of rows by up to two panels or one by up to four, as
// [rows][kPanels * 16].
template <int kRowTiles, int kPanels>
void store_sums(void* sums) {
  static_assert(kRowTiles * kPanels <= 4, "four tiles of sums");
  constexpr int64_t kStride = kPanels * kLine;
  char* out = static_cast<char*>(sums);
  _tile_stored(0, out, kStride);
  if constexpr (kRowTiles == 2) _tile_stored(1, out + kTileRows * kStride, kStride);
  if constexpr (kPanels >= 2) _tile_stored(2, out + kLine, kStride);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, out + kTileRows * kStride + kLine, kStride);
  if constexpr (kPanels == 4) {
    _tile_stored(1, out + 2 * kLine, kStride);
    _tile_stored(3, out + 3 * kLine, kStride);
  }
  // The intrinsics do not tell the compiler which memory they use.
  __asm__ volatile("" ::: "memory");
}

inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

}  // namespace
}  // namespace minilm_fast::gemm
