#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

// What the kernels need of the device: conversions, the instructions without a C++ form, and the launch. The tests
// compile the kernels for a CPU with a model of CUDA's execution, which brings its own forms of the instructions.
namespace minilm_fast::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kLanes = 32;

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Two numbers of 16 bits as an operand register holds them: `low` in the lower half.
template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
  const T pair[2] = {from_float<T>(low), from_float<T>(high)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

template <typename T>
__device__ float to_float(T x);
template <>
__device__ inline float to_float<__half>(__half x) {
  return __half2float(x);
}
template <>
__device__ inline float to_float<__nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

// The converse of pack_pair.
template <typename T>
__device__ inline float2 unpack_pair(uint32_t bits) {
  T pair[2];
  memcpy(pair, &bits, sizeof(bits));
  return {to_float<T>(pair[0]), to_float<T>(pair[1])};
}

#ifdef MINILM_FAST_EMULATE_CUDA

}  // namespace minilm_fast::cuda
#include "emulated_instructions.h"

#else

// Shared memory is laid out at run time only, so that one number says how much a block takes.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes to shared memory, or zeros where `valid` does not hold (then `global` is not read).
__device__ inline void copy_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The same with 4 bytes.
__device__ inline void copy_word_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

// Closes the group of the copies started since the last one.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for this thread's groups of copies but the last `kPending`.
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit numbers: lane i names row i % 8 of matrix i / 8, and gets from each matrix the
// elements 2 * (i % 4) and the next of row i / 4; transposed, of column i / 4.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a b for a [16, 16], b [16, 8]. Lane i holds of the sum the columns 2 * (i % 4) and the next, of row i / 4
// (first two numbers) and of row i / 4 + 8.
template <typename T>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same without a sum to add to.
template <typename T>
__device__ void multiply(float (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ inline void multiply<__half>(float (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};\n"
      : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}
template <>
__device__ inline void multiply<__nv_bfloat16>(float (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};\n"
      : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// sum = start + a b.
template <typename T>
__device__ void multiply_onto(float (&sum)[4], const float (&start)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1);
template <>
__device__ inline void multiply_onto<__half>(float (&sum)[4], const float (&start)[4], const uint32_t (&a)[4],
                                             uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]),
        "f"(start[3]));
}
template <>
__device__ inline void multiply_onto<__nv_bfloat16>(float (&sum)[4], const float (&start)[4], const uint32_t (&a)[4],
                                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};\n"
      : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(start[0]), "f"(start[1]), "f"(start[2]),
        "f"(start[3]));
}

// 2^x, wrong by 2^-22 at most (relative); results below 2^-126 are 0.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// NaN if one of the two is, unlike fmaxf.
__device__ inline float largest_or_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

// In a kernel that was launched early: waits until the kernels before it have ended and what they wrote can be read.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// From here on the next kernel, if launched early, may take what room there is.
__device__ inline void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

}  // namespace minilm_fast::cuda

#endif

namespace minilm_fast::cuda {

// Where a 16-byte chunk of a row lies in a tile of shared memory. Chunks are exchanged within 128 bytes so that eight
// rows read at the same chunk touch all banks.
template <int kRowBytes>
__device__ inline int chunk_offset(int row, int chunk) {
  static_assert(kRowBytes % 16 == 0 && (kRowBytes >= 128 || 128 % kRowBytes == 0), "rows of whole chunks");
  constexpr int kChunks = kRowBytes / 16;
  constexpr int kRowsInLine = kChunks >= 8 ? 1 : 8 / kChunks;
  constexpr int kMask = (kChunks >= 8 ? 8 : kChunks) - 1;
  return row * kRowBytes + (chunk ^ ((row / kRowsInLine) & kMask)) * 16;
}

// The address that load_matrices wants of this lane for [16 rows, 16 columns] at (row, column), such that the four
// registers are those of the left operand of multiply_add; `swapped`, with the second and third register exchanged:
// two pairs of right operands.
template <int kRowBytes>
__device__ inline const unsigned char* matrix_row(const unsigned char* tile, int row, int column, bool swapped) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, matrix = lane / 8;
  const int lower = swapped ? matrix / 2 : matrix % 2, right = swapped ? matrix % 2 : matrix / 2;
  return tile + chunk_offset<kRowBytes>(row + lower * 8 + lane % 8, column / 8 + right);
}

// With `early` the kernel may start before the one before it has ended, if it was compiled for 9.0 or later.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(bool early, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments&&... arguments) {
  // Beyond 48 KiB a kernel must be told.
  const cudaError_t allowed = cudaFuncSetAttribute(
      reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  if (early) {
    // In code for an older architecture, whatever the device, nothing would wait.
    cudaFuncAttributes compiled = {};
    const cudaError_t error = cudaFuncGetAttributes(&compiled, reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
    early = compiled.ptxVersion >= 90;
  }
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &overlap;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch(false, kernel, grid, block, shared, stream, static_cast<Arguments&&>(arguments)...);
}

}  // namespace minilm_fast::cuda
