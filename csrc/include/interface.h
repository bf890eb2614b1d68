// The number of what the extension and the Python code must agree on: schemas of operators, layouts of packed weights,
// functions of the module. It equals INTERFACE in minilm_fast/ops/_extension.py, which reads it from the file before it
// loads it; both are raised where one of these changes. An operator that is only added needs no new number.
#pragma once

#define MINILM_FAST_INTERFACE "2"
