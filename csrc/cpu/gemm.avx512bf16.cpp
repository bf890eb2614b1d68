#include <immintrin.h>

#include "gemm_vector.h"

namespace minilm_fast::gemm {
namespace {

// Dot products of pairs of bf16.
struct DotBf16 {
  static constexpr Format kFormat = Format::kBf16;
  static constexpr int64_t kRowBytes = 4;
  static constexpr int64_t kBlockSteps = 64;
  static constexpr int kTileRows = 8, kTilePanels = 3;
  using Weights = __m512i;
  using Accumulator = __m512;
  using Sum = float;

  static Weights load(const char* p) { return _mm512_loadu_si512(p); }
  static void add(Accumulator& sum, const char* row, Weights w) {
    int32_t pair;
    __builtin_memcpy(&pair, row, sizeof(pair));
    const __m512i x = _mm512_set1_epi32(pair);
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
  static Float total(const Product&, int64_t, Accumulator sum) { return reinterpret_cast<Float>(sum); }
};

}  // namespace

const Kernels kDotBf16 = {2, 32, 1, false, pack_rows_bf16<Linear>, multiply<DotBf16>};

}  // namespace minilm_fast::gemm
