#include "packed_weight.h"

#include <ATen/Parallel.h>
#include <ATen/ops/isfinite.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "checks.h"
#include "weight_memory.h"

namespace minilm_fast {
namespace {

using gemm::Format;
using gemm::kPanel;
using gemm::padded_k;
using gemm::panel_bytes;
using gemm::round_up;

constexpr char kMagic[8] = {'m', 'l', 'm', 'f', 'g', 'e', 'm', 'm'};
constexpr int32_t kVersion = 1;
constexpr const char* kFormatNames[] = {"fp32", "bf16", "int8"};

// A blob: the header, the panels, and for int8 the scale and the sum of each feature.
struct Header {
  char magic[8];
  int32_t version;
  int32_t format;
  int64_t n;
  int64_t k;
  char unused[32];
};
static_assert(sizeof(Header) == 64, "panels follow at an aligned offset");

int64_t panels_end(Format format, int64_t n, int64_t k) {
  return sizeof(Header) + round_up(n, kPanel) / kPanel * panel_bytes(format, k);
}

int64_t blob_bytes(Format format, int64_t n, int64_t k) {
  const int64_t vectors = format == Format::kInt8 ? 2 : 0;
  return panels_end(format, n, k) + vectors * round_up(n, kPanel) * 4;
}

// One feature of a panel, from its weights as fp32: `lane` is its place in the panel.
void pack_feature_fp32(const float* w, int64_t k, int64_t lane, float* panel) {
  for (int64_t i = 0; i < k; ++i) panel[i * kPanel + lane] = w[i];
}

void pack_feature_bf16(const float* w, int64_t k, int64_t lane, c10::BFloat16* panel) {
  for (int64_t i = 0; i < k; ++i) panel[i / 2 * 2 * kPanel + lane * 2 + i % 2] = c10::BFloat16(w[i]);
}

void pack_feature_int8(const float* w, int64_t k, int64_t lane, int8_t* panel, float& scale, int32_t& sum) {
  float largest = 0.0f;
  for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(w[i]));
  scale = largest / 127.0f;
  sum = 0;
  if (!(scale > 0.0f)) return;
  for (int64_t i = 0; i < k; ++i) {
    const float q = std::min(127.0f, std::max(-127.0f, std::nearbyint(w[i] / scale)));
    panel[i / 4 * 4 * kPanel + lane * 4 + i % 4] = static_cast<int8_t>(q);
    sum += static_cast<int32_t>(q);
  }
}

void check_format(const char* op, int64_t format) {
  TORCH_CHECK(format >= 0 && format < gemm::kFormats, op, ": format must be 0 (fp32), 1 (bf16) or 2 (int8), got ",
              format);
}

}  // namespace

at::Tensor pack_weight(const at::Tensor& weight, int64_t format_number) {
  check_format("pack_weight", format_number);
  check_float("pack_weight", "weight", weight);
  check_shape("pack_weight", "weight", weight, {-1, -1});
  TORCH_CHECK(weight.numel() > 0, "pack_weight: weight must not be empty, got shape ", weight.sizes());
  const Format format = static_cast<Format>(format_number);
  const at::Tensor w = weight.to(at::kFloat).contiguous();
  TORCH_CHECK(format != Format::kInt8 || at::isfinite(w).all().item<bool>(),
              "pack_weight: weight must be finite to be packed as int8");
  const int64_t n = w.size(0), k = w.size(1);
  at::Tensor blob = weight_memory(blob_bytes(format, n, k));
  char* base = static_cast<char*>(blob.data_ptr());
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.version = kVersion;
  header.format = static_cast<int32_t>(format);
  header.n = n;
  header.k = k;
  std::memcpy(base, &header, sizeof(header));
  const int64_t panels = round_up(n, kPanel) / kPanel, bytes = panel_bytes(format, k);
  float* scales = reinterpret_cast<float*>(base + panels_end(format, n, k));
  int32_t* sums = reinterpret_cast<int32_t*>(scales + panels * kPanel);
  if (format == Format::kInt8) std::memset(scales, 0, panels * kPanel * 8);
  const float* data = w.const_data_ptr<float>();
  at::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      char* panel = base + sizeof(Header) + p * bytes;
      std::memset(panel, 0, bytes);
      for (int64_t feature = p * kPanel; feature < std::min(n, (p + 1) * kPanel); ++feature) {
        const float* row = data + feature * k;
        const int64_t lane = feature % kPanel;
        if (format == Format::kFp32)
          pack_feature_fp32(row, k, lane, reinterpret_cast<float*>(panel));
        else if (format == Format::kBf16)
          pack_feature_bf16(row, k, lane, reinterpret_cast<c10::BFloat16*>(panel));
        else
          pack_feature_int8(row, k, lane, reinterpret_cast<int8_t*>(panel), scales[feature], sums[feature]);
      }
    }
  });
  return blob;
}

gemm::Weight open_packed_weight(const char* op, const at::Tensor& blob, int64_t format_number, int64_t out_features,
                                int64_t in_features) {
  check_format(op, format_number);
  const Format format = static_cast<Format>(format_number);
  TORCH_CHECK(blob.scalar_type() == at::kByte && blob.dim() == 1 && blob.is_contiguous() &&
                  blob.numel() >= static_cast<int64_t>(sizeof(Header)),
              op, ": weight must be a vector made by pack_weight, got ", blob.scalar_type(), " of shape ",
              blob.sizes());
  const char* base = static_cast<const char*>(blob.const_data_ptr());
  Header header;
  std::memcpy(&header, base, sizeof(header));
  TORCH_CHECK(std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0 && header.version == kVersion &&
                  header.format >= 0 && header.format < gemm::kFormats,
              op, ": weight was not made by this version's pack_weight");
  TORCH_CHECK(header.format == format_number, op, ": weight was packed as ", kFormatNames[header.format],
              ", but format is ", kFormatNames[format_number]);
  TORCH_CHECK(header.n == out_features, op, ": weight has ", header.n, " output features, but ", out_features,
              " are asked for");
  TORCH_CHECK(header.k == in_features, op, ": x has ", in_features, " features, but weight takes ", header.k);
  TORCH_CHECK(blob.numel() == blob_bytes(format, header.n, header.k), op, ": weight is cut off: ", blob.numel(),
              " bytes where ", blob_bytes(format, header.n, header.k), " are due");
  gemm::Weight weight = {format, header.n, header.k, base + sizeof(Header), nullptr, nullptr};
  if (format == Format::kInt8) {
    weight.scales = reinterpret_cast<const float*>(base + panels_end(format, header.n, header.k));
    weight.sums = reinterpret_cast<const int32_t*>(weight.scales + round_up(header.n, kPanel));
  }
  return weight;
}

at::Tensor check_rows(const char* op, const at::Tensor& x) {
  check_float(op, "x", x);
  check_shape(op, "x", x, {-1, -1});
  return x.stride(1) == 1 || x.size(1) == 1 ? x : x.contiguous();
}

PackedRows::PackedRows(const gemm::Kernels& kernels, const gemm::Weight& weight, const gemm::Source& source,
                       int64_t count)
    : kernels_(kernels), format_(weight.format), k_(weight.k), count_(count), source_(source) {}

PackedRows::PackedRows(const gemm::Kernels& kernels, const gemm::Weight& weight, const at::Tensor& x, int64_t first,
                       int64_t count)
    : PackedRows(kernels, weight,
                 gemm::Source{static_cast<const char*>(x.const_data_ptr()) + first * x.stride(0) * x.element_size(),
                              x.stride(0), x.scalar_type() == at::kBFloat16},
                 count) {}

bool PackedRows::in_place() const { return kernels_.reads_fp32 && !source_.bf16; }

// The packed rows, then for int8 the scales.
int64_t PackedRows::storage_bytes() const {
  if (in_place()) return 0;
  return round_up(count_, kRowMultiple) * (kernels_.row_bytes(k_) + 4);
}

void PackedRows::set_storage(char* storage) { storage_ = storage; }

gemm::Rows PackedRows::from(int64_t begin) const {
  if (in_place()) {
    const float* rows = static_cast<const float*>(source_.data);
    return {rows + begin * source_.stride, source_.stride * static_cast<int64_t>(sizeof(float)), nullptr};
  }
  const int64_t stride = kernels_.row_bytes(k_);
  const char* scales = storage_ + round_up(count_, kRowMultiple) * stride;
  return {storage_ + begin * stride, stride, reinterpret_cast<const float*>(scales) + begin};
}

void PackedRows::pack(int64_t begin, int64_t end) const {
  if (in_place()) return;
  const gemm::Rows rows = from(begin);
  const gemm::Source source = {static_cast<const char*>(source_.data) + begin * source_.stride * (source_.bf16 ? 2 : 4),
                               source_.stride, source_.bf16};
  char* to = storage_ + (static_cast<const char*>(rows.data) - storage_);
  float* scales = reinterpret_cast<float*>(storage_ + (reinterpret_cast<const char*>(rows.scales) - storage_));
  kernels_.pack_rows(source, end - begin, k_, to, scales);
}

}  // namespace minilm_fast

TORCH_LIBRARY_IMPL(minilm_fast, CPU, m) { m.impl("pack_weight", &minilm_fast::pack_weight); }
