// The extension module. Operators register themselves in their own files (TORCH_LIBRARY_IMPL); their schemas
// are defined in Python (minilm_fast/ops).
#include <torch/extension.h>

#include "isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled operators of minilm_fast";
  m.def(
      "isa", [] { return minilm_fast::isa_name(minilm_fast::current_isa()); },
      "Name of the CPU instruction set in use");
  m.def("set_isa", &minilm_fast::set_isa, "Lower or restore the CPU instruction set (for tests)");
}
