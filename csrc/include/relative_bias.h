#pragma once

#include "vec.h"

namespace minilm_fast {
namespace {

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

inline bool are_consecutive(const int32_t* positions, int64_t count) {
  bool run = true;
  for (int64_t i = 1; i < count; ++i) run &= positions[i] == static_cast<int64_t>(positions[0]) + i;
  return run;
}

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
    if (are_consecutive(positions, count)) return consecutive(int64_t{positions[0]} - query);
    Vec v = {};
    for (int64_t i = 0; i < kLanes; ++i) v[i] = at(positions[i < count ? i : count - 1] - query);
    return v;
  }

 private:
  float* table_;
  int64_t limit_;
};

// Sums by distance for one head, in memory of DistanceBias::floats(limit) floats, which is continued in the same way.
class DistanceSums {
 public:
  DistanceSums(int64_t limit, float* memory) : table_(memory), limit_(limit) {
    std::memset(table_, 0, sizeof(float) * DistanceBias::floats(limit));
  }

  void add(int64_t distance, float x) { table_[clamp(distance, -limit_, limit_) + limit_ + kLanes] += x; }

  // One number for each of the keys at `positions`, of which `count` are there; the other lanes are zero.
  void add(int64_t query, const int32_t* positions, int64_t count, Vec x) {
    if (count > kLanes) count = kLanes;
    if (are_consecutive(positions, count)) {
      float* to = table_ + clamp(int64_t{positions[0]} - query, -limit_ - kLanes, limit_) + limit_ + kLanes;
      store(to, load(to) + x);
    } else {
      for (int64_t i = 0; i < count; ++i) add(int64_t{positions[i]} - query, x[i]);
    }
  }

  // The sums of the distances -limit to limit.
  void write(float* sums) const {
    for (int64_t i = 0; i <= 2 * limit_; ++i) sums[i] = table_[i + kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      sums[0] += table_[i];
      sums[2 * limit_] += table_[2 * limit_ + 1 + kLanes + i];
    }
  }

 private:
  float* table_;
  int64_t limit_;
};

}  // namespace
}  // namespace minilm_fast
