// The extension module. Operators register themselves in their own files (TORCH_LIBRARY_IMPL); their schemas
// are defined in Python (minilm_fast/ops).
#include <torch/extension.h>

#include "block_allocator.h"
#include "interface.h"
#include "isa.h"

// An array that the linker keeps, so that the text stands in the file as it is.
extern "C" __attribute__((visibility("default"))) const char minilm_fast_interface[];
__attribute__((used)) const char minilm_fast_interface[] = "minilm_fast-interface:" MINILM_FAST_INTERFACE ";";

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of minilm_fast";
  m.attr("interface") = MINILM_FAST_INTERFACE;
  m.def(
      "isa", [] { return minilm_fast::isa_name(minilm_fast::current_isa()); },
      "Name of the CPU instruction set in use");
  m.def("set_isa", &minilm_fast::set_isa, "Lower or restore the CPU instruction set (for tests)");
  m.def("use_block_allocator", &minilm_fast::use_block_allocator,
        "Take large CPU tensors from blocks that are kept and used again, for good; whether the system allows it");
  m.def(
      "block_statistics",
      [] {
        const minilm_fast::BlockStatistics found = minilm_fast::block_statistics();
        return std::make_tuple(found.used, found.held, found.peak);
      },
      "Bytes of blocks in use, of all blocks, and the most that were in use");
}
