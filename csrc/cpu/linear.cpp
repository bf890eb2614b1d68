#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "packed_weight.h"
#include "scratch.h"

namespace minilm_fast {
namespace {

using gemm::round_up;

constexpr int64_t kRowBlock = 64;
constexpr int64_t kColumnBlock = 64;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 19;

struct Call {
  const gemm::Kernels& kernels;
  gemm::Source source;
  gemm::Product product;  // of all rows; `rows` is filled in by each thread

  void run(int64_t row, int64_t row_count, int64_t column, int64_t columns) const {
    static thread_local Scratch scratch;
    const gemm::Weight& weight = *product.weight;
    gemm::Product part = product;
    char* storage = scratch.get(row_storage_bytes(kernels, weight, std::min(row_count, kRowBlock)));
    for (int64_t begin = row; begin < row + row_count; begin += kRowBlock) {
      part.row_count = std::min(kRowBlock, row + row_count - begin);
      part.rows = prepare_rows(kernels, weight, source, begin, part.row_count, storage);
      part.column = column;
      part.columns = columns;
      part.out = static_cast<char*>(product.out) + (begin * product.out_stride + column) * (product.out_bf16 ? 2 : 4);
      kernels.multiply(part);
    }
  }
};

}  // namespace

at::Tensor linear(const at::Tensor& x_any, const at::Tensor& blob, const std::optional<at::Tensor>& bias,
                  int64_t out_features, int64_t format, int64_t activation) {
  const at::Tensor x = check_rows("linear", x_any);
  const gemm::Weight weight = open_packed_weight("linear", blob, format, out_features, x.size(1));
  TORCH_CHECK(activation == 0 || activation == 1, "linear: activation must be 0 (none) or 1 (GELU), got ", activation);
  const int64_t m = x.size(0), n = out_features;
  at::Tensor out = at::empty({m, n}, x.options());
  if (m == 0 || n == 0) return out;

  gemm::Product product = {};
  product.weight = &weight;
  product.bias = bias.has_value() ? check_floats("linear", "bias", *bias, {out_features}) : nullptr;
  product.out = out.data_ptr();
  product.out_stride = n;
  product.out_bf16 = x.scalar_type() == at::kBFloat16;
  product.gelu = activation == 1;
  const Call call = {gemm::kernels(current_isa(), weight.format), source_rows(x), product};

  const int64_t threads = m * n * weight.k <= kSerialWork ? 1 : at::get_num_threads();
  if (m >= threads * kRowBlock / 2) {
    const int64_t rows = round_up((m + threads - 1) / threads, 16);
    at::parallel_for(0, (m + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
      call.run(begin * rows, std::min(m, end * rows) - begin * rows, 0, n);
    });
  } else {
    const int64_t columns = round_up((n + threads - 1) / threads, kColumnBlock);
    at::parallel_for(0, (n + columns - 1) / columns, 1, [&](int64_t begin, int64_t end) {
      call.run(0, m, begin * columns, std::min(n, end * columns) - begin * columns);
    });
  }
  return out;
}

}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("linear", &minilm_fast::linear); }
