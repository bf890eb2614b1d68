#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "decode_dispatch.h"
#include "tasks.h"

namespace minilm_fast {
namespace {

constexpr char kOp[] = "store_source";

void check_caches(const at::Tensor& k, const at::Tensor& source_k, const at::Tensor& source_v) {
  check_float(kOp, "source_k", source_k);
  check_shape(kOp, "source_k", source_k, {-1, k.size(1), k.size(2), -1});
  check_contiguous(kOp, "source_k", source_k);
  TORCH_CHECK(source_k.size(3) % 16 == 0, kOp, ": the capacity of source_k must be a multiple of 16, got ",
              source_k.size(3));
  check_dtype(kOp, "source_v", source_v, {source_k.scalar_type()});
  check_shape(kOp, "source_v", source_v, {source_k.size(0), k.size(1), source_k.size(3), k.size(2)});
  check_contiguous(kOp, "source_v", source_v);
}

void check_sequences(const at::Tensor& cu_seqlens, const at::Tensor& source_counts, const at::Tensor& slots,
                     int64_t tokens, int64_t slot_count, int64_t capacity) {
  const int64_t batch = source_counts.size(0);
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int32_t* counts = source_counts.const_data_ptr<int32_t>();
  const int32_t* slot = slots.const_data_ptr<int32_t>();
  std::vector<char> used(slot_count);
  for (int64_t i = 0; i < batch; ++i) {
    TORCH_CHECK(starts[i] >= 0 && starts[i] <= starts[i + 1] && starts[i + 1] <= tokens, kOp,
                ": cu_seqlens must ascend from 0 to the ", tokens, " tokens of k, got ", starts[i], ", ",
                starts[i + 1]);
    TORCH_CHECK(counts[i] >= 0 && counts[i] <= starts[i + 1] - starts[i], kOp, ": source_counts[", i, "] is ",
                counts[i], ", the sequence has ", starts[i + 1] - starts[i], " tokens");
    TORCH_CHECK(counts[i] <= capacity, kOp, ": source_counts[", i, "] is ", counts[i], ", source_k holds ", capacity);
    TORCH_CHECK(slot[i] >= 0 && slot[i] < slot_count, kOp, ": slots[", i, "] is ", slot[i], ", there are ", slot_count,
                " slots");
    TORCH_CHECK(!used[slot[i]], kOp, ": slots holds ", slot[i], " twice");
    used[slot[i]] = 1;
  }
}

void store_source(const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens,
                  const at::Tensor& source_counts, const at::Tensor& slots, at::Tensor& source_k, at::Tensor& source_v,
                  at::Tensor& source_lengths) {
  check_float(kOp, "k", k);
  TORCH_CHECK(k.dim() == 3, kOp, ": k must be [tokens, heads, head_dim], got ", k.sizes());
  check_rows_contiguous(kOp, "k", k);
  check_dtype(kOp, "v", v, {k.scalar_type()});
  check_shape(kOp, "v", v, k.sizes());
  check_rows_contiguous(kOp, "v", v);
  check_caches(k, source_k, source_v);
  const int32_t* counts = check_ints(kOp, "source_counts", source_counts, {-1});
  const int64_t batch = source_counts.size(0);
  const int32_t* starts = check_ints(kOp, "cu_seqlens", cu_seqlens, {batch + 1});
  const int32_t* slot = check_ints(kOp, "slots", slots, {batch});
  check_ints(kOp, "source_lengths", source_lengths, {source_k.size(0)});
  check_sequences(cu_seqlens, source_counts, slots, k.size(0), source_k.size(0), source_k.size(3));

  StoreProblem problem{};
  problem.k = k.const_data_ptr();
  problem.v = v.const_data_ptr();
  problem.bf16 = k.scalar_type() == at::kBFloat16;
  problem.k_token = k.stride(0);
  problem.k_head = k.stride(1);
  problem.v_token = v.stride(0);
  problem.v_head = v.stride(1);
  problem.source_k = source_k.data_ptr();
  problem.source_v = source_v.data_ptr();
  problem.cache_bf16 = source_k.scalar_type() == at::kBFloat16;
  problem.heads = k.size(1);
  problem.size = k.size(2);
  problem.source_capacity = source_k.size(3);
  int32_t* lengths = source_lengths.data_ptr<int32_t>();
  for (int64_t i = 0; i < batch; ++i) lengths[slot[i]] = counts[i];
  const StoreKernel store = store_kernel();
  run_tasks(batch * problem.heads, [&](int64_t i) {
    const int64_t sequence = i / problem.heads;
    store(problem, starts[sequence], counts[sequence], slot[sequence], i % problem.heads);
  });
}

}  // namespace
}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("store_source", &minilm_fast::store_source); }
