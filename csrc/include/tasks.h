#pragma once

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace minilm_fast {

// Runs task(i) for i in [0, count), each thread taking the next one when it is free: tasks differ in length. Which
// thread runs a task has no influence on results.
template <class Task>
void run_tasks(int64_t count, const Task& task) {
  const int64_t threads = count < at::get_num_threads() ? count : at::get_num_threads();
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i);
  });
}

}  // namespace minilm_fast
