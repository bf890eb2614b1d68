#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "packed_weight.h"
#include "scratch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

using gemm::round_up;

// Rows that pass by the weights together: packed, they and their results stay in the second-level cache.
constexpr int64_t kRowBlock = 192;
// Columns of a task are a multiple of this, a whole number of every kernel's tiles.
constexpr int64_t kColumnMultiple = 96;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 19;
// So few rows are packed by one thread, and the columns cut no finer than into one task a thread.
constexpr int64_t kSerialRows = 64;

constexpr int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One call of the operator: all rows and columns. A part's results do not depend on how the whole is cut.
struct Call {
  const gemm::Kernels& kernels;
  const gemm::Weight& weight;
  const at::Tensor& x;
  gemm::Product product;

  void multiply(const PackedRows& rows, int64_t begin, int64_t end, int64_t out_row, int64_t column,
                int64_t columns) const {
    gemm::Product part = product;
    for (; begin < end; begin += kRowBlock, out_row += kRowBlock) {
      part.rows = rows.from(begin);
      part.row_count = std::min(kRowBlock, end - begin);
      part.column = column;
      part.columns = columns;
      part.out = static_cast<char*>(product.out) + (out_row * product.out_stride + column) * (product.out_bf16 ? 2 : 4);
      kernels.multiply(part);
    }
  }

  // Rows [begin, end), packed block by block.
  void run_rows(int64_t begin, int64_t end) const {
    static thread_local Scratch scratch;
    for (; begin < end; begin += kRowBlock) {
      const int64_t count = std::min(kRowBlock, end - begin);
      PackedRows rows(kernels, weight, x, begin, count);
      rows.set_storage(scratch.get(rows.storage_bytes()));
      rows.pack(0, count);
      multiply(rows, 0, count, begin, 0, weight.n);
    }
  }

  // All rows packed first, then tasks of some columns each: every weight is read by one thread only.
  void run_columns(int64_t tasks) const {
    static thread_local Scratch scratch;
    const int64_t m = x.size(0), columns = round_up(ceil_divide(weight.n, tasks), kColumnMultiple);
    PackedRows rows(kernels, weight, x, 0, m);
    rows.set_storage(scratch.get(rows.storage_bytes()));
    const int64_t step = m <= kSerialRows || rows.storage_bytes() == 0 ? round_up(m, PackedRows::kRowMultiple)
                                                                       : PackedRows::kRowMultiple;
    run_tasks(ceil_divide(m, step), [&](int64_t i) { rows.pack(i * step, std::min(m, (i + 1) * step)); });
    run_tasks(ceil_divide(weight.n, columns),
              [&](int64_t i) { multiply(rows, 0, m, 0, i * columns, std::min(columns, weight.n - i * columns)); });
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
  const Call call = {gemm::kernels(current_isa(), weight.format), weight, x, product};

  const int64_t threads = m * n * weight.k <= kSerialWork ? 1 : at::get_num_threads();
  if (threads == 1)
    call.run_rows(0, m);
  else if (m >= 2 * threads * kRowBlock)
    run_tasks(ceil_divide(m, kRowBlock),
              [&](int64_t i) { call.run_rows(i * kRowBlock, std::min(m, (i + 1) * kRowBlock)); });
  else
    call.run_columns(m <= kSerialRows ? threads : 2 * threads);
  return out;
}

}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("linear", &minilm_fast::linear); }
