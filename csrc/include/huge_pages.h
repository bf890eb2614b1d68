#pragma once

#if defined(__linux__)
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace minilm_fast {

constexpr size_t kHugePage = size_t{2} << 20;

constexpr size_t round_to(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

// Addresses on a boundary of huge pages: elsewhere the system does not use them. A page takes memory once it is written
// to. MAP_FAILED if there are none; munmap gives them back.
inline void* map_huge_pages(size_t bytes) {
  void* mapped =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return mapped;
  char* start = static_cast<char*>(mapped);
  const uintptr_t address = reinterpret_cast<uintptr_t>(start);
  const size_t before = round_to(address, kHugePage) - address;
  if (before > 0) munmap(start, before);
  munmap(start + before + bytes, kHugePage - before);
  madvise(start + before, bytes, MADV_HUGEPAGE);
  return start + before;
}

}  // namespace minilm_fast
#endif
