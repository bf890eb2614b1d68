#pragma once

#include "vec.h"

namespace minilm_fast {
namespace {

// The relative bias of one head, continued by kLanes entries on either side so that the biases
// of a vector of consecutive positions are one load whatever the clamp does.
class DistanceBias {
 public:
  static int64_t floats(int64_t limit) { return 2 * limit + 1 + 2 * kLanes; }

  DistanceBias(const float* bias, int64_t limit, float* memory) : table_(memory), limit_(limit) {
    for (int64_t i = 0; i < floats(limit); ++i) table_[i] = bias[clamp(i - kLanes, 0, 2 * limit)];
  }

  float at(int64_t distance) const { return table_[clamp(distance, -limit_, limit_) + limit_ + kLanes]; }

  // Distances `first`, `first + 1`, ...
  Vec consecutive(int64_t first) const {
    return load(table_ + clamp(first, -limit_ - kLanes, limit_) + limit_ + kLanes);
  }

  // Keys at `positions`, of which `count` are there (the others repeat the last).
  Vec between(int64_t query, const int32_t* positions, int64_t count) const {
    if (count > kLanes) count = kLanes;
    bool run = true;
    for (int64_t i = 1; i < count; ++i) run &= positions[i] == static_cast<int64_t>(positions[0]) + i;
    if (run) return consecutive(positions[0] - query);
    Vec v = {};
    for (int64_t i = 0; i < kLanes; ++i) v[i] = at(positions[i < count ? i : count - 1] - query);
    return v;
  }

 private:
  static int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

  float* table_;
  int64_t limit_;
};

}  // namespace
}  // namespace minilm_fast
