#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"

#define __device__
#define __global__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};

// Where the thread that runs is.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

unsigned char* shared_memory();
void synchronize_block();
void report(const char* message);

constexpr int kLanes = 32;
constexpr size_t kExchangeBytes = 64;

// Waits for the other lanes of the warp, each with `bytes` to give. The last to come calls `compute` for all, which
// turns what lane i gave into what it gets, at inputs + i * kExchangeBytes. `kind` tells exchanges apart: lanes that
// meet in different ones are an error.
using Compute = void (*)(const unsigned char* inputs, unsigned char* outputs);
void exchange(const char* kind, const void* input, size_t input_bytes, void* output, size_t output_bytes,
              Compute compute);

template <typename T>
T& at(unsigned char* data, int lane) {
  return *reinterpret_cast<T*>(data + lane * kExchangeBytes);
}
template <typename T>
const T& at(const unsigned char* data, int lane) {
  return *reinterpret_cast<const T*>(data + lane * kExchangeBytes);
}

template <typename T>
struct Indexed {
  T value;
  int source;
};

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(Indexed<T>) <= kExchangeBytes);
  if (mask != 0xffffffffu) report("only whole warps exchange values here");
  const Indexed<T> input = {value, source};
  T output;
  exchange("shuffle", &input, sizeof(input), &output, sizeof(output),
           [](const unsigned char* inputs, unsigned char* outputs) {
             for (int lane = 0; lane < kLanes; ++lane)
               at<T>(outputs, lane) = at<Indexed<T>>(inputs, at<Indexed<T>>(inputs, lane).source % kLanes).value;
           });
  return output;
}

inline int lane() { return static_cast<int>(threadIdx.x % kLanes); }

}  // namespace emulation

inline void __syncthreads() { emulation::synchronize_block(); }
inline void __syncwarp() {
  emulation::exchange("__syncwarp", nullptr, 0, nullptr, 0, [](const unsigned char*, unsigned char*) {});
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  return emulation::shuffle(mask, value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::shuffle(mask, value, emulation::lane() ^ bits);
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  if (mask != 0xffffffffu) emulation::report("only whole warps vote here");
  unsigned result;
  emulation::exchange("vote", &vote, sizeof(vote), &result, sizeof(result),
                      [](const unsigned char* inputs, unsigned char* outputs) {
                        unsigned bits = 0;
                        for (int i = 0; i < emulation::kLanes; ++i)
                          bits |= static_cast<unsigned>(emulation::at<bool>(inputs, i)) << i;
                        for (int i = 0; i < emulation::kLanes; ++i) emulation::at<unsigned>(outputs, i) = bits;
                      });
  return result;
}
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
// To the nearest, ties to even; the ends of the range for what lies beyond, 0 for what is no number.
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : static_cast<int>(nearbyintf(x));
}
// Threads take turns, so nothing comes between.
template <typename T>
T atomicAdd(T* place, T x) {
  const T before = *place;
  *place += x;
  return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated_launch(*config, [&] { kernel(arguments...); });
}
