#pragma once

#include <ATen/core/Tensor.h>

#include "gemm.h"

namespace minilm_fast {

// Packs a weight [N, K] (fp32 or bf16) into the blob that the kernels read, the same for every instruction set.
at::Tensor pack_weight(const at::Tensor& weight, int64_t format);

// The weight in a blob; the blob must outlive it. Raises an error that names the operator unless the blob holds
// a weight of that format with out_features rows of in_features.
gemm::Weight open_packed_weight(const char* op, const at::Tensor& blob, int64_t format, int64_t out_features,
                                int64_t in_features);

// Checks x [M, in_features], fp32 or bf16, and returns it with its last dimension contiguous.
at::Tensor check_rows(const char* op, const at::Tensor& x);

gemm::Source source_rows(const at::Tensor& x);

// Packs rows for the kernels, or points at x itself if its rows can be read as they are. `storage` must hold
// row_storage_bytes bytes.
int64_t row_storage_bytes(const gemm::Kernels& kernels, const gemm::Weight& weight, int64_t row_count);
gemm::Rows prepare_rows(const gemm::Kernels& kernels, const gemm::Weight& weight, const gemm::Source& source,
                        int64_t row, int64_t row_count, char* storage);

}  // namespace minilm_fast
