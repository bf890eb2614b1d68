#pragma once

#include <ATen/Parallel.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace minilm_fast {

// Stages that threads pass through together. In a stage every slot has one task. The thread of a slot runs it, or
// another one that waits while that thread has not come: so any number of threads gets to the end, one alone too. Which
// thread runs a task has no influence on results.
class Stages {
 public:
  explicit Stages(int64_t slots) : slots_(slots) {}

  // A thread on its way through the stages.
  class Member {
   public:
    Member(Stages& stages, int64_t slot) : stages_(stages), own_(slot) {}

    // The next stage: task(slot) for every slot, once. Every member runs the same stages. Returns when all tasks of the
    // stage are done.
    template <class Task>
    void run(const Task& task) {
      ++stage_;
      attempt(own_, task);
      for (int64_t wait = 1; !finished(); ++wait) {
        if (wait % kPatience == 0) help(task);
        if (wait < kSpins)
          relax();
        else
          std::this_thread::yield();
      }
    }

   private:
    // Waiting rounds of some 50 ns before a member takes the task of another one, and before it gives up its core.
    static constexpr int64_t kPatience = 32, kSpins = 1024;

    bool finished() const { return stages_.done_.load(std::memory_order_acquire) >= stage_ * stages_.count(); }

    template <class Task>
    void attempt(int64_t slot, const Task& task) {
      std::atomic<int64_t>& started = stages_.slots_[slot].started;
      int64_t before = stage_ - 1;
      if (started.load(std::memory_order_relaxed) != before ||
          !started.compare_exchange_strong(before, stage_, std::memory_order_relaxed))
        return;
      task(slot);
      stages_.done_.fetch_add(1, std::memory_order_acq_rel);
    }

    template <class Task>
    void help(const Task& task) {
      for (int64_t slot = 0; slot < stages_.count(); ++slot) attempt(slot, task);
    }

    static void relax() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      __asm__ volatile("isb");
#endif
    }

    Stages& stages_;
    int64_t own_, stage_ = 0;
  };

 private:
  struct alignas(64) Slot {
    std::atomic<int64_t> started{0};  // stages
  };

  int64_t count() const { return static_cast<int64_t>(slots_.size()); }

  std::vector<Slot> slots_;
  alignas(64) std::atomic<int64_t> done_{0};  // tasks of all stages
};

// program(member) on as many threads as there are slots, or on fewer.
template <class Program>
void run_stages(int64_t slots, const Program& program) {
  Stages stages(slots);
  const auto run = [&](int64_t slot, int64_t) {
    Stages::Member member(stages, slot);
    program(member);
  };
  if (slots == 1)
    run(0, 1);
  else
    at::parallel_for(0, slots, 1, run);
}

inline const pid_t kLoadedBy = getpid();

// How many threads run_stages would get here. OpenMP's threads do not survive a fork: a child that waits for them waits
// forever.
inline int64_t stage_threads() { return at::in_parallel_region() || getpid() != kLoadedBy ? 1 : at::get_num_threads(); }

}  // namespace minilm_fast
