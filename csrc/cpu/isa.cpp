#include "common/isa.h"

#include <atomic>

namespace partial_kernels {

namespace {

Isa best() {
  for (Isa candidate : {Isa::avx512, Isa::avx2})
    if (has_isa(candidate)) return candidate;
  return Isa::portable;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

bool has_isa(Isa wanted) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return wanted == Isa::portable || (wanted == Isa::avx2 ? avx2 : avx512);
#else
  return wanted == Isa::portable;
#endif
}

Isa isa() { return current().load(std::memory_order_relaxed); }

bool set_isa(Isa wanted) {
  if (!has_isa(wanted)) return false;
  current().store(wanted, std::memory_order_relaxed);
  return true;
}

}  // namespace partial_kernels
