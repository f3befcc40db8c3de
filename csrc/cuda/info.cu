// How this library was built, for Python to read.

#include <torch/headeronly/version.h>

#define PK_TEXT_OF(x) #x
#define PK_TEXT(x) PK_TEXT_OF(x)

extern "C" __attribute__((visibility("default"))) const char* partial_kernels_cuda_info() {
#ifdef PK_EMULATED
  return "emulated on the CPU";
#else
  return "nvcc " PK_TEXT(__CUDACC_VER_MAJOR__) "." PK_TEXT(__CUDACC_VER_MINOR__)
         " for architectures " PK_TEXT(PK_ARCHITECTURES) ", with headers of torch " TORCH_VERSION;
#endif
}
