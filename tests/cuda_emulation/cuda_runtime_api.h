#pragma once

// A small model of CUDA for the tests: a kernel's source compiles with a C++ compiler and runs on a CPU, one block
// after the other, each thread as a fibre that gives way only where it waits for others. It models what the kernels of
// this project use and nothing else: warps of 32 with all lanes taking part in every exchange, barriers of the whole
// block, dynamic shared memory (filled with NaN before each block), asynchronous copies that are carried out no sooner
// than they are waited for. Waiting that cannot end is an error. It shows wrong results, not what a GPU would make of
// memory that several threads use at a time without a barrier, beyond running the threads in two orders.

#include <cstddef>
#include <cstdint>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;

const char* cudaGetErrorString(cudaError_t error);
