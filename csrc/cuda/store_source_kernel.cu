#include "cuda_device.cuh"
#include "decode_attention_cuda.h"

// Values are copied row by row; keys change to dimension-major on the way through shared memory, so that both sides of
// the copy are contiguous. Numbers are moved as they are, whatever their type.
namespace minilm_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTokens = 64;  // of a block

template <typename Bits>
__global__ void __launch_bounds__(kThreads) store_source_kernel(StoreSource p) {
  const int sequence = blockIdx.z, head = blockIdx.y, first = blockIdx.x * kTokens;
  const int slot = p.slots[sequence], stored = min(p.source_counts[sequence], p.source_capacity);
  if (blockIdx.x == 0 && head == 0 && threadIdx.x == 0) p.source_lengths[slot] = stored;
  const int tokens = min(kTokens, stored - first);
  if (tokens <= 0) return;

  const int64_t token = static_cast<int64_t>(p.cu_seqlens[sequence]) + first;
  const int64_t plane = (static_cast<int64_t>(slot) * p.heads + head) * p.size * p.source_capacity;
  const Bits* k = static_cast<const Bits*>(p.k) + token * p.k_token + head * p.k_head;
  const Bits* v = static_cast<const Bits*>(p.v) + token * p.v_token + head * p.v_head;
  Bits* to_v = static_cast<Bits*>(p.source_v) + plane + static_cast<int64_t>(first) * p.size;
  Bits* to_k = static_cast<Bits*>(p.source_k) + plane + first;
  Bits* tile = reinterpret_cast<Bits*>(shared_memory());
  const int stride = p.size + 4 / static_cast<int>(sizeof(Bits));  // one bank further in each row
  for (int i = threadIdx.x; i < tokens * p.size; i += kThreads) {
    const int row = i / p.size, d = i % p.size;
    to_v[i] = v[row * p.v_token + d];
    tile[row * stride + d] = k[row * p.k_token + d];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kTokens * p.size; i += kThreads) {
    const int d = i / kTokens, row = i % kTokens;
    if (row < tokens) to_k[static_cast<int64_t>(d) * p.source_capacity + row] = tile[row * stride + d];
  }
}

template <typename Bits>
cudaError_t launch_bits(const StoreSource& p, cudaStream_t stream) {
  const int blocks = p.source_capacity == 0 ? 1 : (p.source_capacity + kTokens - 1) / kTokens;
  const size_t shared = kTokens * (p.size * sizeof(Bits) + 4);
  return launch(store_source_kernel<Bits>, dim3(blocks, p.heads, p.batch), dim3(kThreads), shared, stream, p);
}

}  // namespace

cudaError_t launch_store_source(const StoreSource& p, cudaStream_t stream) {
  if (p.batch == 0 || p.heads == 0) return cudaSuccess;
  return p.element_bytes == 4 ? launch_bits<uint32_t>(p, stream) : launch_bits<uint16_t>(p, stream);
}

}  // namespace minilm_fast::cuda
