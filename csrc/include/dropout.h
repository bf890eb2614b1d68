#pragma once

#include <cstdint>

namespace minilm_fast {

// Which elements dropout keeps, see minilm_fast/ops/dropout.py.
struct Dropout {
  uint32_t key[2];
  uint32_t threshold;  // a half word below it is dropped; 0: nothing is
  float scale;         // factor of what is kept
};

// As in vec.h, so that every instruction set has its own.
namespace {

inline Dropout make_dropout(double probability, uint64_t seed) {
  const uint32_t threshold = static_cast<uint32_t>(__builtin_nearbyint(probability * 65536.0));
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
          threshold,
          threshold >= 65536 ? 0.0f : static_cast<float>(65536.0 / (65536.0 - threshold))};
}

}  // namespace
}  // namespace minilm_fast
