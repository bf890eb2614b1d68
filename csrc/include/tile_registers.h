#pragma once

#include <immintrin.h>

#include <cstdint>

namespace minilm_fast {
namespace {

// Configures all eight matrix-tile registers (AMX) as 16 rows of 64 bytes for as long as it lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct __attribute__((packed)) {
      uint8_t palette = 1, start_row = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // The intrinsic tells the compiler of its first bytes only.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

}  // namespace
}  // namespace minilm_fast
