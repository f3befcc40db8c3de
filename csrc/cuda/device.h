// What CUDA kernels are written with: the device's language, its 16-bit numbers, launches. Where the
// tests run without a GPU, an emulation on the CPU takes the place of all three.
//
// Products and sums are fused where fma() is written and nowhere else (nvcc -fmad=false), so that
// results are the same bits here and there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "common/numbers.h"

#ifdef PK_EMULATED
#include "emulated.h"
#define PK_DEVICE CPU
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define PK_DEVICE CUDA
#endif

namespace partial_kernels {

// The arithmetic of a number in memory.
template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

__device__ __forceinline__ float widened(float value) { return value; }
__device__ __forceinline__ double widened(double value) { return value; }
__device__ __forceinline__ float widened(Bf16 value) {
  return __uint_as_float(uint32_t(value.bits) << 16);
}

// Rounded to nearest even.
template <class S>
__device__ __forceinline__ S narrowed(Arithmetic<S> value) {
  return S(value);
}

#ifdef PK_EMULATED
inline float widened(Fp16 value) { return half_to_float(value); }
template <>
inline Fp16 narrowed<Fp16>(float value) {
  return float_to_half(value);
}
template <>
inline Bf16 narrowed<Bf16>(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Launches on the device of a tensor, in order.
class Queue {
 public:
  explicit Queue(const torch::stable::Tensor&) {}

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), dim3 blocks, unsigned threads,
           const Arguments&... arguments) const {
    emulated::run(blocks, threads, [&] { kernel(arguments...); });
  }
};
#else
__device__ __forceinline__ float widened(Fp16 value) {
  return __half2float(__ushort_as_half(value.bits));
}
template <>
__device__ __forceinline__ Fp16 narrowed<Fp16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}
template <>
__device__ __forceinline__ Bf16 narrowed<Bf16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}

class Queue {
 public:
  explicit Queue(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), dim3 blocks, unsigned threads,
           const Arguments&... arguments) const {
    kernel<<<blocks, threads, 0, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};
#endif

// Calls run(S()) for the numbers S of a tensor's type; `what` is the tensor, for the error.
template <class Run>
auto of_dtype(torch::headeronly::ScalarType dtype, const char* what, const Run& run) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      return run(float());
    case ScalarType::Double:
      return run(double());
    case ScalarType::BFloat16:
      return run(Bf16());
    case ScalarType::Half:
      return run(Fp16());
    default:
      STD_TORCH_CHECK(false, what, " must be fp32, fp64, bf16 or fp16");
  }
}

constexpr unsigned all_lanes = 0xffffffff;

// The sum over a block, in one order, in every thread; `shared` has room for one value by warp.
template <class V>
__device__ __forceinline__ V block_sum(V value, V* shared) {
  for (int offset = 16; offset > 0; offset /= 2)
    value += __shfl_xor_sync(all_lanes, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  V total = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += shared[warp];
  return total;
}

}  // namespace partial_kernels
