#include <ATen/ops/empty.h>

#include <limits>
#include <utility>

#include "cuda_operator.h"
#include "decode_attention_cuda.h"

namespace minilm_fast::cuda {
namespace {

void check_cache(const char* op, const char* name, const at::Tensor& cache, const at::Tensor& q,
                 at::IntArrayRef shape) {
  check_tensor(op, name, cache, q, {q.scalar_type()});
  check_shape(op, name, cache, shape);
  check_contiguous(op, name, cache);
  check_aligned(op, name, cache);
}

void check_source(const char* op, const at::Tensor& source_k, const at::Tensor& source_v, const at::Tensor& q) {
  check_cache(op, "source_k", source_k, q, {-1, q.size(1), q.size(2), -1});
  const int64_t slots = source_k.size(0), capacity = source_k.size(3);
  TORCH_CHECK(capacity % 16 == 0, op, ": the capacity of source_k must be a multiple of 16, got ", capacity);
  check_cache(op, "source_v", source_v, q, {slots, q.size(1), capacity, q.size(2)});
}

void check_rows(const char* op, const char* name, const at::Tensor& x, const at::Tensor& q) {
  check_tensor(op, name, x, q, {q.scalar_type()});
  check_shape(op, name, x, q.sizes());
}

template <bool kEarly>
at::Tensor decode_attention(const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any,
                            const at::Tensor& source_k, const at::Tensor& source_v, const at::Tensor& source_lengths,
                            at::Tensor& history_k, at::Tensor& history_v, const at::Tensor& ancestry,
                            const at::Tensor& slots, const at::Tensor& steps, int64_t rows, double scale,
                            const std::optional<at::Tensor>& relative_bias) {
  constexpr char kOp[] = "decode_attention";
  DecodeAttention p{};
  p.dtype = check_numbers(kOp, "q", q_any, q_any);
  check_heads(kOp, "q", q_any);
  check_rows(kOp, "k", k_any, q_any);
  check_rows(kOp, "v", v_any, q_any);
  TORCH_CHECK(rows == 1 || rows == 2, kOp, ": rows must be 1 or 2, got ", rows);
  p.ancestry = check_device_ints(kOp, "ancestry", ancestry, q_any, {-1, -1, -1});
  const int64_t examples = ancestry.size(0), beams = ancestry.size(1), history = ancestry.size(2);
  TORCH_CHECK(q_any.size(0) == examples * beams * rows, kOp, ": q must have ", examples * beams * rows,
              " rows for ancestry ", ancestry.sizes(), " and rows = ", rows, ", got ", q_any.size(0));
  check_source(kOp, source_k, source_v, q_any);
  const int64_t slot_count = source_k.size(0), heads = q_any.size(1), size = q_any.size(2);
  check_cache(kOp, "history_k", history_k, q_any, {slot_count, history, beams, heads, size});
  check_cache(kOp, "history_v", history_v, q_any, history_k.sizes());
  TORCH_CHECK(history <= kMostHistory, kOp, ": history_k must hold at most ", kMostHistory, " steps, got ", history);
  TORCH_CHECK(history * beams <= std::numeric_limits<int32_t>::max() && examples <= 65535 && beams <= 65535, kOp,
              ": ancestry is too large: ", ancestry.sizes());
  p.source_lengths = check_device_ints(kOp, "source_lengths", source_lengths, q_any, {slot_count});
  p.slots = check_device_ints(kOp, "slots", slots, q_any, {examples});
  p.steps = check_device_ints(kOp, "steps", steps, q_any, {examples});
  p.heads = static_cast<int32_t>(heads);
  if (relative_bias.has_value()) set_relative_bias(kOp, *relative_bias, q_any, heads, p);

  const Launching launching(q_any);
  const at::Tensor q = aligned_rows(q_any), k = aligned_rows(k_any), v = aligned_rows(v_any);
  at::Tensor out = at::empty(q.sizes(), q.options());
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.out = out.data_ptr();
  p.q_row = q.stride(0);
  p.q_head = q.stride(1);
  p.k_row = k.stride(0);
  p.k_head = k.stride(1);
  p.v_row = v.stride(0);
  p.v_head = v.stride(1);
  p.source_k = source_k.const_data_ptr();
  p.source_v = source_v.const_data_ptr();
  p.history_k = history_k.data_ptr();
  p.history_v = history_v.data_ptr();
  p.examples = static_cast<int32_t>(examples);
  p.beams = static_cast<int32_t>(beams);
  p.rows = static_cast<int32_t>(rows);
  p.size = static_cast<int32_t>(size);
  p.source_capacity = static_cast<int32_t>(source_k.size(3));
  p.history_capacity = static_cast<int32_t>(history);
  p.scale = static_cast<float>(scale);
  p.early = kEarly;
  check_launch(kOp, launch_decode_attention(p, launching.stream()));
  return out;
}

void store_source(const at::Tensor& k, const at::Tensor& v, const at::Tensor& cu_seqlens,
                  const at::Tensor& source_counts, const at::Tensor& slots, at::Tensor& source_k, at::Tensor& source_v,
                  at::Tensor& source_lengths) {
  constexpr char kOp[] = "store_source";
  check_numbers(kOp, "k", k, k);
  check_heads(kOp, "k", k);
  check_rows(kOp, "v", v, k);
  check_rows_contiguous(kOp, "k", k);
  check_rows_contiguous(kOp, "v", v);
  check_source(kOp, source_k, source_v, k);
  StoreSource p{};
  p.source_counts = check_device_ints(kOp, "source_counts", source_counts, k, {-1});
  const int64_t batch = source_counts.size(0);
  TORCH_CHECK(batch <= 65535 && k.size(1) <= 65535, kOp, ": source_counts or the heads of k are too many");
  p.cu_seqlens = check_device_ints(kOp, "cu_seqlens", cu_seqlens, k, {batch + 1});
  p.slots = check_device_ints(kOp, "slots", slots, k, {batch});
  check_device_ints(kOp, "source_lengths", source_lengths, k, {source_k.size(0)});

  const Launching launching(k);
  p.element_bytes = static_cast<int32_t>(k.element_size());
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_token = k.stride(0);
  p.k_head = k.stride(1);
  p.v_token = v.stride(0);
  p.v_head = v.stride(1);
  p.source_k = source_k.data_ptr();
  p.source_v = source_v.data_ptr();
  p.source_lengths = source_lengths.data_ptr<int32_t>();
  p.batch = static_cast<int32_t>(batch);
  p.heads = static_cast<int32_t>(k.size(1));
  p.size = static_cast<int32_t>(k.size(2));
  p.source_capacity = static_cast<int32_t>(source_k.size(3));
  check_launch(kOp, launch_store_source(p, launching.stream()));
}

}  // namespace
}  // namespace minilm_fast::cuda

MINILM_FAST_CUDA_LIBRARY(m) {
  m.impl("decode_attention", &minilm_fast::cuda::decode_attention<false>);
  m.impl("decode_attention_early", &minilm_fast::cuda::decode_attention<true>);
  m.impl("store_source", &minilm_fast::cuda::store_source);
}
