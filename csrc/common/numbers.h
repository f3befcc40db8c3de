// Numbers and vectors of them that kernels share.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace partial_kernels {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is in memory. The kernels compute in float or double.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Where no instruction does it.
inline float half_to_float(Fp16 value) {
  return float(c10::Half(value.bits, c10::Half::from_bits()));
}
inline Fp16 float_to_half(float value) { return {c10::Half(value).x}; }

// `n` floats, anywhere in memory; the compiler splits what is wider than a register.
template <int n>
struct FloatsOf {
  typedef float type __attribute__((vector_size(4 * n), aligned(4), may_alias));
};
template <int n>
using Floats = typename FloatsOf<n>::type;

}  // namespace partial_kernels
