#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace minilm_fast {

// Memory aligned to a cache line that grows and is kept: fresh pages cost more than the work of a small call.
// Made to be thread_local; a call of `get` invalidates what the previous one gave.
class Scratch {
 public:
  char* get(size_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      memory_.reset(static_cast<char*>(::operator new[](bytes, std::align_val_t(kAlignment))));
      capacity_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Deleter {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t(kAlignment)); }
  };

  std::unique_ptr<char[], Deleter> memory_;
  size_t capacity_ = 0;
};

}  // namespace minilm_fast
