// One translation unit, since what takes time is to read PyTorch's headers.
#include "../../csrc/cuda/attention.cpp"
#include "../../csrc/cuda/beam.cpp"
#include "../../csrc/cuda/decode_attention.cpp"
#include "../../csrc/cuda/lm_head_topk.cpp"
#include "../../csrc/cuda/relation_kl.cpp"
#include "../../csrc/cuda/step_linear.cpp"
