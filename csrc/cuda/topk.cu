// Backward of a linear layer from the k largest elements of each row of dy. Both products gather
// whole rows of the other matrix, each thread 16 bytes at a time, and add them up in registers in a
// fixed order; the tokens that kept an output are found in a table of bits, so that nothing is
// sorted and no floating-point atomics are needed.

#include <array>

#include "device.h"

namespace {

using namespace partial_kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Blocks of a multiprocessor that hide its loads; to fit in more the compiler would spill registers.
constexpr unsigned threads = 128, resident_blocks = 8;
// Rows to gather that are listed at a time: those of a warp's bits.
constexpr int list_size = 1024;
// Rows that are summed by themselves, for the errors of one running sum of thousands would add up.
constexpr int block_size = 32;

// Numbers of one load.
template <class S>
constexpr int width = 16 / int(sizeof(S));

template <class S>
struct alignas(16) Vector {
  S values[width<S>];
};

// Adds a row's numbers, `count` of which there are, times a factor.
template <class S, bool adjoins>
__device__ __forceinline__ void add(const S* row, int count, Arithmetic<S> factor,
                                    Arithmetic<S> (&sums)[width<S>]) {
  if constexpr (adjoins) {
    const auto vector = *reinterpret_cast<const Vector<S>*>(row);
#pragma unroll
    for (int i = 0; i < width<S>; ++i) sums[i] = fma(factor, widened(vector.values[i]), sums[i]);
  } else {
    for (int i = 0; i < count; ++i) sums[i] = fma(factor, widened(row[i]), sums[i]);
  }
}

template <class S, bool adjoins>
__device__ __forceinline__ void store(const Arithmetic<S> (&sums)[width<S>], int count, S* to) {
  if constexpr (adjoins) {
    Vector<S> vector;
#pragma unroll
    for (int i = 0; i < width<S>; ++i) vector.values[i] = narrowed<S>(sums[i]);
    *reinterpret_cast<Vector<S>*>(to) = vector;
  } else {
    for (int i = 0; i < count; ++i) to[i] = narrowed<S>(sums[i]);
  }
}

// A matrix with contiguous rows.
template <class S>
struct Matrix {
  S* data;
  int64_t rows, columns, stride;
};

// Adds rows of `from` times factors, block by block of the list, in the columns of this thread.
template <class S, bool adjoins>
__device__ __forceinline__ void add_listed(const Matrix<const S>& from, int64_t column, int count,
                                           const int32_t* places, const Arithmetic<S>* factors,
                                           int listed, Arithmetic<S> (&sums)[width<S>]) {
  if (count <= 0) return;
  for (int first = 0; first < listed; first += block_size) {
    Arithmetic<S> some[width<S>] = {};
    const int end = std::min(listed, first + block_size);
#pragma unroll 4
    for (int i = first; i < end; ++i)
      add<S, adjoins>(from.data + places[i] * from.stride + column, count, factors[i], some);
#pragma unroll
    for (int i = 0; i < width<S>; ++i) sums[i] += some[i];
  }
}

// The columns of a thread: the first, and how many.
template <class S>
__device__ __forceinline__ int columns_of_thread(int64_t columns, int64_t& first) {
  first = (int64_t(blockIdx.y) * threads + threadIdx.x) * width<S>;
  return int(std::min<int64_t>(width<S>, columns - first));
}

// dx: token blockIdx.x gathers the rows of W that it kept.
template <class S, bool adjoins>
__global__ void __launch_bounds__(threads, resident_blocks)
    dx_rows(Matrix<const S> dy, const int64_t* index, int64_t k, Matrix<const S> weight, S* dx) {
  using T = Arithmetic<S>;
  __shared__ int32_t places[list_size];
  __shared__ T factors[list_size];
  const int64_t token = blockIdx.x;
  int64_t column;
  const int count = columns_of_thread<S>(weight.columns, column);
  T sums[width<S>] = {};
  for (int64_t first = 0; first < k; first += list_size) {
    const int listed = int(std::min<int64_t>(list_size, k - first));
    __syncthreads();
    for (int i = int(threadIdx.x); i < listed; i += threads) {
      places[i] = int32_t(index[token * k + first + i]);
      factors[i] = widened(dy.data[token * dy.stride + places[i]]);
    }
    __syncthreads();
    add_listed<S, adjoins>(weight, column, count, places, factors, listed, sums);
  }
  if (count > 0) store<S, adjoins>(sums, count, dx + token * weight.columns + column);
}

// Bit t of row o: token t kept output o.
__global__ void __launch_bounds__(threads)
    mark(const int64_t* index, int64_t k, int64_t count, int64_t words, unsigned* marks) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i >= count) return;
  const int64_t token = i / k;
  atomicOr(&marks[index[i] * words + token / 32], 1u << (token % 32));
}

// dW: output blockIdx.x gathers the rows of x of the tokens that kept it, in their order.
template <class S, bool adjoins>
__global__ void __launch_bounds__(threads, resident_blocks)
    dweight_rows(Matrix<const S> dy, const unsigned* marks, int64_t words, Matrix<const S> x,
                 S* dweight) {
  using T = Arithmetic<S>;
  __shared__ int32_t places[list_size];
  __shared__ T factors[list_size];
  __shared__ int total;
  const int64_t output = blockIdx.x;
  const int lane = int(threadIdx.x % 32);
  int64_t column;
  const int count = columns_of_thread<S>(x.columns, column);
  T sums[width<S>] = {};
  for (int64_t first = 0; first < words; first += 32) {
    __syncthreads();
    if (threadIdx.x < 32) {
      unsigned word = first + lane < words ? marks[output * words + first + lane] : 0;
      int to = 0, found = __popc(word);
      for (int other = 0; other < 32; ++other) {
        const int some = __shfl_sync(all_lanes, found, other);
        if (other < lane) to += some;
      }
      if (lane == 31) total = to + found;
      for (; word; word &= word - 1) {
        places[to] = int32_t((first + lane) * 32 + __ffs(word) - 1);
        factors[to] = widened(dy.data[places[to] * dy.stride + output]);
        ++to;
      }
    }
    __syncthreads();
    add_listed<S, adjoins>(x, column, count, places, factors, total, sums);
  }
  if (count > 0) store<S, adjoins>(sums, count, dweight + output * x.columns + column);
}

template <class S>
Matrix<const S> matrix(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && (tensor.size(1) < 2 || tensor.stride(1) == 1),
                  "a matrix must have contiguous rows");
  STD_TORCH_CHECK(tensor.size(0) < (int64_t(1) << 31) && tensor.size(1) < (int64_t(1) << 31),
                  "a matrix has too many rows or columns");
  return {static_cast<const S*>(tensor.data_ptr()), tensor.size(0), tensor.size(1),
          tensor.stride(0)};
}

// Whether 16 bytes can be read at once, everywhere.
template <class S>
bool adjoins(const Matrix<const S>& matrix) {
  return matrix.columns % width<S> == 0 && matrix.stride % width<S> == 0 &&
         reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

template <class S>
dim3 grid(int64_t rows, int64_t columns) {
  return dim3(unsigned(rows), unsigned(ceil_div(columns, int64_t(threads) * width<S>)));
}

struct Dx {
  template <class S>
  static Tensor run(const Tensor& dy, const Tensor& index, const Tensor& weight) {
    const auto from = matrix<S>(weight);
    Tensor dx = torch::stable::new_empty(dy, {dy.size(0), from.columns});
    if (dx.numel() == 0) return dx;
    auto* to = static_cast<S*>(dx.data_ptr());
    Queue(dy).run(adjoins(from) ? &dx_rows<S, true> : &dx_rows<S, false>,
                  grid<S>(dy.size(0), from.columns), threads, matrix<S>(dy),
                  index.const_data_ptr<int64_t>(), index.size(1), from, to);
    return dx;
  }
};

struct Dweight {
  template <class S>
  static Tensor run(const Tensor& dy, const Tensor& index, const Tensor& x) {
    const auto from = matrix<S>(x);
    const int64_t outputs = dy.size(1), words = ceil_div(dy.size(0), 32), kept = index.numel();
    const std::array<int64_t, 2> shape{outputs, from.columns}, bits_shape{outputs, words};
    Tensor dweight = torch::stable::new_empty(dy, shape);
    if (dweight.numel() == 0) return dweight;
    const Queue queue(dy);
    Tensor marks = torch::stable::new_zeros(dy, bits_shape, ScalarType::Int);
    auto* bits = static_cast<unsigned*>(marks.data_ptr());
    if (kept)
      queue.run(&mark, dim3(unsigned(ceil_div(kept, threads))), threads,
                index.const_data_ptr<int64_t>(), index.size(1), kept, words, bits);
    queue.run(adjoins(from) ? &dweight_rows<S, true> : &dweight_rows<S, false>,
              grid<S>(outputs, from.columns), threads, matrix<S>(dy), bits, words, from,
              static_cast<S*>(dweight.data_ptr()));
    return dweight;
  }
};

template <class Product>
Tensor product(const Tensor& dy, const Tensor& index, const Tensor& other) {
  STD_TORCH_CHECK(dy.scalar_type() == other.scalar_type(), "both matrices must have one dtype");
  STD_TORCH_CHECK(index.dim() == 2 && index.scalar_type() == ScalarType::Long &&
                      index.is_contiguous() && index.size(0) == dy.size(0),
                  "index must be [T, k], int64 and contiguous");
  return of_dtype(dy.scalar_type(), "dy", [&](auto number) {
    return Product::template run<decltype(number)>(dy, index, other);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("topk_row_dx_cuda(Tensor dy, Tensor index, Tensor weight) -> Tensor");
  m.def("topk_row_dweight_cuda(Tensor dy, Tensor index, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, PK_DEVICE, m) {
  m.impl("topk_row_dx_cuda", TORCH_BOX(&product<Dx>));
  m.impl("topk_row_dweight_cuda", TORCH_BOX(&product<Dweight>));
}
