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

// Some rows of x in the form that the kernels read: packed into memory that the caller provides, or x itself where the
// kernels can read it as it is.
class PackedRows {
 public:
  // The first `count` rows of a source, which must outlive this.
  PackedRows(const gemm::Kernels& kernels, const gemm::Weight& weight, const gemm::Source& source, int64_t count);

  // The rows [first, first + count) of x, which must outlive this.
  PackedRows(const gemm::Kernels& kernels, const gemm::Weight& weight, const at::Tensor& x, int64_t first,
             int64_t count);

  // Bytes that set_storage() and pack() need; 0 where nothing is to be packed.
  int64_t storage_bytes() const;
  void set_storage(char* storage);

  // Packs the rows [begin, end) of these; `begin` is a multiple of kRowMultiple.
  void pack(int64_t begin, int64_t end) const;

  // The rows from `begin` on, a multiple of kRowMultiple.
  gemm::Rows from(int64_t begin) const;

  static constexpr int64_t kRowMultiple = 32;

 private:
  bool in_place() const;

  const gemm::Kernels& kernels_;
  gemm::Format format_;
  int64_t k_;
  int64_t count_;
  gemm::Source source_;
  char* storage_ = nullptr;
};

}  // namespace minilm_fast
