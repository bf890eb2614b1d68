#pragma once

// What a build of PyTorch with CUDA generates and one without lacks; here for compiling without linking.
#define C10_CUDA_BUILD_SHARED_LIBS
