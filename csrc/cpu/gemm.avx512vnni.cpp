#include <immintrin.h>

#include "gemm_vector.h"

// Kernels on dot products of pairs of bf16 and of quadruples of bytes.
namespace minilm_fast::gemm {
namespace {

inline __m512i splat_lane(const char* row) {
  int32_t lane;
  __builtin_memcpy(&lane, row, sizeof(lane));
  return _mm512_set1_epi32(lane);
}

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
    sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(splat_lane(row)), reinterpret_cast<__m512bh>(w));
  }
  static Float total(const Product&, int64_t, Accumulator sum) { return reinterpret_cast<Float>(sum); }
};

// Unsigned bytes times signed ones. Rows are shifted by 128 to be unsigned; 128 times the sum of a feature's weights is
// taken off at the end.
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
    sum = reinterpret_cast<Int>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), splat_lane(row), w));
  }
  static Int total(const Product& product, int64_t feature, Accumulator sum) {
    return sum - (load_int(product.weight->sums + feature) << 7);
  }
};

}  // namespace

const Kernels kVnniBf16 = {2, 1, pack_rows_bf16<Linear>, multiply<DotBf16>};
const Kernels kVnniInt8 = {1, 1, pack_rows_uint8, multiply<DotInt8>};

}  // namespace minilm_fast::gemm
