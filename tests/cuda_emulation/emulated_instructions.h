#pragma once

#include <cstring>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

// The instructions of csrc/include/cuda_device.cuh that have no C++ form.
namespace emulation {

void copy_async(void* shared, const void* global, int bytes, bool valid);
void commit_copies();
void wait_copies(int pending);
void wait_for_previous();

using Registers = uint32_t[4];

// Element `column` of the row that a lane named.
inline uint16_t matrix_element(const unsigned char* inputs, int matrix, int row, int column) {
  return at<const uint16_t*>(inputs, matrix * 8 + row)[column];
}

template <bool kTransposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) report("a row of a matrix is not aligned to 16 bytes");
  exchange("load_matrices", &row, sizeof(row), out, sizeof(out),
           [](const unsigned char* inputs, unsigned char* outputs) {
             for (int lane = 0; lane < kLanes; ++lane)
               for (int matrix = 0; matrix < 4; ++matrix) {
                 uint32_t pair = 0;
                 for (int i = 0; i < 2; ++i) {
                   const int row = lane / 4, column = lane % 4 * 2 + i;
                   const uint16_t element = kTransposed ? matrix_element(inputs, matrix, column, row)
                                                        : matrix_element(inputs, matrix, row, column);
                   pair |= static_cast<uint32_t>(element) << (16 * i);
                 }
                 at<Registers>(outputs, lane)[matrix] = pair;
               }
           });
}

inline float number(__half x) { return __half2float(x); }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
float half_of(uint32_t pair, int i) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * i));
  T value;
  std::memcpy(&value, &bits, sizeof(value));
  return number(value);
}

struct Operands {
  uint32_t a[4], b[2];
  float sum[4];
};

// Where the elements of the operands lie: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <typename T>
void multiply_all(const unsigned char* inputs, unsigned char* outputs) {
  static float a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const Operands& own = at<Operands>(inputs, lane);
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 2; ++i) a[lane / 4 + r % 2 * 8][lane % 4 * 2 + i + r / 2 * 8] = half_of<T>(own.a[r], i);
    for (int r = 0; r < 2; ++r)
      for (int i = 0; i < 2; ++i) b[lane % 4 * 2 + i + r * 8][lane / 4] = half_of<T>(own.b[r], i);
  }
  for (int lane = 0; lane < kLanes; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float sum = at<Operands>(inputs, lane).sum[i];
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      at<float[4]>(outputs, lane)[i] = sum;
    }
}

}  // namespace emulation

namespace minilm_fast::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }
inline void copy_async(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void copy_word_async(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 4, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}
inline void wait_for_previous() { emulation::wait_for_previous(); }
inline void let_next_start() {}
inline void load_matrices(uint32_t (&out)[4], const void* row) { emulation::load_matrices<false>(out, row); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { emulation::load_matrices<true>(out, row); }

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::Operands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {sum[0], sum[1], sum[2], sum[3]}};
  emulation::exchange("multiply_add", &own, sizeof(own), sum, sizeof(sum), emulation::multiply_all<T>);
}

template <typename T>
void multiply(float (&product)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (float& x : product) x = 0.0f;
  multiply_add<T>(product, a, b0, b1);
}

template <typename T>
void multiply_onto(float (&sum)[4], const float (&start)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (int i = 0; i < 4; ++i) sum[i] = start[i];
  multiply_add<T>(sum, a, b0, b1);
}

inline float exp2_approximate(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float largest_or_nan(float a, float b) { return a != a || b != b ? NAN : fmaxf(a, b); }

}  // namespace minilm_fast::cuda
