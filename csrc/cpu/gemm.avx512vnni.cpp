#include <immintrin.h>

#include "gemm_vector.h"

namespace minilm_fast::gemm {
namespace {

// Dot products of four unsigned bytes with four signed ones. Rows are shifted by 128 to be unsigned; 128 times the sum
// of a feature's weights is taken off at the end.
struct DotInt8 {
  static constexpr Format kFormat = Format::kInt8;
  static constexpr int64_t kRowBytes = 4;
  static constexpr int64_t kBlockSteps = kUnlimited;
  static constexpr int kTileRows = 8, kTilePanels = 3;
  using Weights = __m512i;
  using Accumulator = Int;
  using Sum = int32_t;

  static Weights load(const char* p) { return _mm512_loadu_si512(p); }
  static void add(Accumulator& sum, const char* row, Weights w) {
    int32_t four;
    __builtin_memcpy(&four, row, sizeof(four));
    sum = reinterpret_cast<Int>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), _mm512_set1_epi32(four), w));
  }
  static Int total(const Product& product, int64_t feature, Accumulator sum) {
    return sum - (load_int(product.weight->sums + feature) << 7);
  }
};

}  // namespace

const Kernels kVnniInt8 = {1, 64, 1, false, pack_rows_uint8, multiply<DotInt8>};

}  // namespace minilm_fast::gemm
