// The kernels of conf.cpp; those of sm_90 where the code is for sm_90a.
#include "emulator/tests/warp_kernels.cu"
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#include "emulator/tests/hopper_kernels.cu"
#endif
