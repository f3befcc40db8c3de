// Which instructions kernels may use: what the processor has, or less where that is asked for.
#pragma once

namespace partial_kernels {

enum class Isa : int { portable, avx2, avx512 };

inline constexpr const char* isa_names[] = {"portable", "avx2", "avx512"};

// The one in use, at first the best one here.
Isa isa();

// Use another one, in every thread; false, and nothing changes, if the processor lacks it.
bool set_isa(Isa wanted);

// Whether this processor has it.
bool has_isa(Isa wanted);

}  // namespace partial_kernels

// The function of this name that is compiled for the ISA in use (see foreach_isa.h).
#if defined(__x86_64__)
#define PK_ISA_FUNCTION(name)                                         \
  (partial_kernels::isa() == partial_kernels::Isa::avx512 ? &avx512::name \
   : partial_kernels::isa() == partial_kernels::Isa::avx2 ? &avx2::name   \
                                                          : &portable::name)
#else
#define PK_ISA_FUNCTION(name) (&portable::name)
#endif
