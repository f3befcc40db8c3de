// Compiles one file of kernels once for each ISA, in namespaces portable, avx2 and avx512:
//
//   #define PK_KERNELS "common/family.h"   // has neither #include nor #pragma once
//   #include "common/foreach_isa.h"
//   ... PK_ISA_FUNCTION(kernel)(arguments) ...
//
// Within it PK_AVX512 or PK_AVX2 is 1 where that ISA's intrinsics may be used. What the file needs
// is included before, so that no inline function of a library is compiled for more than it asked
// for: the linker keeps one copy of those, perhaps the one that this processor cannot run.

#define PK_AVX2 0
#define PK_AVX512 0
namespace portable {
#include PK_KERNELS
}

#if defined(__x86_64__)

#undef PK_AVX2
#define PK_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2,f16c")
#endif
namespace avx2 {
#include PK_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#undef PK_AVX512
#define PK_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(                                                       \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi,bmi2,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,bmi,bmi2,f16c,prefer-vector-width=512")
#endif
namespace avx512 {
#include PK_KERNELS
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

#undef PK_AVX2
#undef PK_AVX512
#undef PK_KERNELS
