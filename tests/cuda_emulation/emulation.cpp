#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulated_instructions.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
// What a block may have on compute capability 9.0, which is more than on 8.0.
constexpr size_t kMostShared = 227 << 10;
// Bytes behind a block's shared memory that it must leave alone.
constexpr size_t kGuard = 256;
constexpr size_t kAlignment = 128;

struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
};

struct Warp {
  int arrived = 0;
  long turn = 0;  // how many exchanges there have been
  const char* kind = nullptr;
  alignas(16) unsigned char inputs[kLanes * kExchangeBytes];
  alignas(16) unsigned char outputs[kLanes * kExchangeBytes];
};

struct Fibre {
  int thread = 0;
  std::unique_ptr<unsigned char[]> stack;
  jmp_buf state;
  bool started = false, done = false;
  const long* turn = nullptr;  // runs on when this is no longer `waited`
  long waited = 0;
  bool waited_for_previous = false;
  std::vector<std::vector<Copy>> copies;
};

// What a GPU leaves open, and a right kernel does not depend on.
struct Schedule {
  bool backwards = false;  // threads of a block, and blocks, from the last to the first
  bool far = false;        // a warp runs as far as it can before the next one does, not all to their next exchange
  bool early = false;      // asynchronous copies are carried out where they start, not where they are waited for
};

struct Block {
  std::vector<Fibre> fibres;
  std::vector<Warp> warps;
  int arrived = 0;
  long turn = 0;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  const std::function<void()>* thread = nullptr;
  bool early = false;  // launched so that it may start before the kernel before it has ended
};

Block block;
Fibre* current = nullptr;
jmp_buf scheduler;
ucontext_t outer;
std::string failure;
Schedule schedule;
void (*kernel_before)() = nullptr;

unsigned char* aligned_shared() {
  const auto address = reinterpret_cast<uintptr_t>(block.shared.data());
  return block.shared.data() + (kAlignment - address % kAlignment) % kAlignment;
}

// Fibres start through ucontext, whose switches ask the kernel each time, and go on through setjmp.
void enter() {
  (*block.thread)();
  current->done = true;
  longjmp(scheduler, 1);
}

void resume(Fibre& fibre) {
  current = &fibre;
  threadIdx = dim3(fibre.thread);
  if (setjmp(scheduler) != 0) return;
  if (fibre.started) longjmp(fibre.state, 1);
  fibre.started = true;
  ucontext_t inner;
  getcontext(&inner);
  inner.uc_stack.ss_sp = fibre.stack.get();
  inner.uc_stack.ss_size = kStackBytes;
  inner.uc_link = nullptr;
  makecontext(&inner, enter, 0);
  swapcontext(&outer, &inner);
}

void wait_for(const long& turn) {
  current->turn = &turn;
  current->waited = turn;
  Fibre* self = current;
  if (setjmp(self->state) == 0) longjmp(scheduler, 1);
}

bool ready(const Fibre& fibre) { return !fibre.done && (fibre.turn == nullptr || *fibre.turn != fibre.waited); }

void run_block() {
  const int count = static_cast<int>(blockDim.x);
  block.arrived = 0;
  block.warps.assign(count / kLanes, Warp());
  std::fill(block.shared.begin(), block.shared.end(), 0xff);
  block.fibres.resize(count);
  for (int i = 0; i < count; ++i) {
    Fibre& fibre = block.fibres[i];
    if (!fibre.stack) fibre.stack.reset(new unsigned char[kStackBytes]);
    fibre.thread = i;
    fibre.started = fibre.done = false;
    fibre.turn = nullptr;
    fibre.waited_for_previous = false;
    fibre.copies.assign(1, {});
  }
  int done = 0;
  while (done < count) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      if (schedule.far && moved && i % kLanes == 0) break;
      Fibre& fibre = block.fibres[schedule.backwards ? count - 1 - i : i];
      if (!ready(fibre)) continue;
      moved = true;
      resume(fibre);
      if (!failure.empty()) throw std::runtime_error(failure);
      done += fibre.done;
      if (fibre.done && block.early && !fibre.waited_for_previous)
        throw std::runtime_error("a kernel that was launched early did not wait for the one before");
    }
    if (!moved) throw std::runtime_error("threads wait for others that never come");
  }
  const unsigned char* guard = aligned_shared() + block.shared_bytes;
  if (std::any_of(guard, guard + kGuard, [](unsigned char byte) { return byte != 0xff; }))
    throw std::runtime_error("a block wrote behind its shared memory");
}

void carry_out(const Copy& copy) {
  if (copy.valid)
    std::memcpy(copy.shared, copy.global, copy.bytes);
  else
    std::memset(copy.shared, 0, copy.bytes);
}

}  // namespace

unsigned char* shared_memory() { return aligned_shared(); }

void report(const char* message) {
  failure = message;
  longjmp(scheduler, 1);
}

void synchronize_block() {
  if (++block.arrived < static_cast<int>(block.fibres.size())) {
    wait_for(block.turn);
  } else {
    block.arrived = 0;
    ++block.turn;
  }
}

void exchange(const char* kind, const void* input, size_t input_bytes, void* output, size_t output_bytes,
              Compute compute) {
  const int lane = current->thread % kLanes;
  Warp& warp = block.warps[current->thread / kLanes];
  if (warp.arrived > 0 && std::strcmp(warp.kind, kind) != 0) report("lanes of a warp meet in different exchanges");
  warp.kind = kind;
  if (input_bytes > 0) std::memcpy(warp.inputs + lane * kExchangeBytes, input, input_bytes);
  if (++warp.arrived < kLanes) {
    wait_for(warp.turn);
  } else {
    compute(warp.inputs, warp.outputs);
    warp.arrived = 0;
    ++warp.turn;
  }
  if (output_bytes > 0) std::memcpy(output, warp.outputs + lane * kExchangeBytes, output_bytes);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0) report("an asynchronous copy goes to an unaligned address");
  if (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)
    report("an asynchronous copy is from an unaligned one");
  const Copy copy{shared, global, bytes, valid};
  if (schedule.early)
    carry_out(copy);
  else
    current->copies.back().push_back(copy);
}

void commit_copies() { current->copies.emplace_back(); }

// The kernel before ends as late as it can: when all threads of the first block wait for it, what they copy being
// copied.
void wait_for_previous() {
  current->waited_for_previous = true;
  if (!block.early) return;
  for (std::vector<Copy>& group : current->copies) {
    for (const Copy& copy : group) carry_out(copy);
    group.clear();
  }
  synchronize_block();
  if (kernel_before == nullptr) return;
  kernel_before();
  kernel_before = nullptr;
}

void wait_copies(int pending) {
  std::vector<std::vector<Copy>>& groups = current->copies;
  const size_t closed = groups.size() - 1;
  const size_t finished = closed > static_cast<size_t>(pending) ? closed - pending : 0;
  for (size_t i = 0; i < finished; ++i)
    for (const Copy& copy : groups[i]) carry_out(copy);
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(finished));
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return emulation::failure.c_str();
  }
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value >= 0 && static_cast<size_t>(value) <= emulation::kMostShared ? cudaSuccess : cudaErrorInvalidValue;
}

namespace emulation {
namespace {

bool launchable(dim3 grid, dim3 size) {
  return size.x > 0 && size.x <= 1024 && size.x % kLanes == 0 && size.y == 1 && size.z == 1 && grid.x > 0 &&
         grid.y > 0 && grid.z > 0 && grid.y <= 65535 && grid.z <= 65535;
}

void run_grid(size_t shared_bytes) {
  block.shared_bytes = shared_bytes;
  block.shared.resize(shared_bytes + kAlignment + kGuard);
  const long count = static_cast<long>(gridDim.x) * gridDim.y * gridDim.z;
  for (long i = 0; i < count; ++i) {
    const unsigned at = static_cast<unsigned>(schedule.backwards ? count - 1 - i : i);
    blockIdx = dim3(at % gridDim.x, at / gridDim.x % gridDim.y, at / gridDim.x / gridDim.y);
    run_block();
  }
}

}  // namespace
}  // namespace emulation

cudaError_t emulated_launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (!emulation::launchable(config.gridDim, config.blockDim)) return cudaErrorInvalidValue;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  emulation::block.thread = &thread;
  emulation::block.early = config.numAttrs > 0;
  emulation::failure.clear();
  try {
    emulation::run_grid(config.dynamicSmemBytes);
  } catch (const std::runtime_error& error) {
    emulation::failure = error.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

extern "C" __attribute__((visibility("default"))) void emulation_set_schedule(bool backwards, bool far, bool early) {
  emulation::schedule = {backwards, far, early};
}

// What the kernel before an early one does, to be called once.
extern "C" __attribute__((visibility("default"))) void emulation_set_kernel_before(void (*function)()) {
  emulation::kernel_before = function;
}
