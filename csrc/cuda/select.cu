// The k largest magnitudes of each row, or of the columns by their sums: exact, ties by position.
//
// A block holds a row as keys in registers and searches the k-th largest bit by bit, by counting. It
// stops as soon as exactly k keys are left above.

#include "device.h"

namespace {

using namespace partial_kernels;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Magnitudes as integers in the same order, from 1 on; NaN is above infinity. 0 is no number.
__device__ __forceinline__ uint32_t key_of(Bf16 value) {
  const uint32_t bits = value.bits & 0x7fffu;
  return (bits > 0x7f80u ? 0x7fffu : bits) + 1;
}
__device__ __forceinline__ uint32_t key_of(Fp16 value) {
  const uint32_t bits = value.bits & 0x7fffu;
  return (bits > 0x7c00u ? 0x7fffu : bits) + 1;
}
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value) & 0x7fffffffu;
  return (bits > 0x7f800000u ? 0x7fffffffu : bits) + 1;
}
__device__ __forceinline__ uint64_t key_of(double value) {
  const uint64_t bits = uint64_t(__double_as_longlong(value)) & 0x7fffffffffffffffu;
  return (bits > 0x7ff0000000000000u ? 0x7fffffffffffffffu : bits) + 1;
}

// Of a row, `items` keys in each thread; the numbers of a warp adjoin.
template <class S, int items>
__global__ void __launch_bounds__(1024) select_rows(const S* x, int64_t row_stride, int columns,
                                                    int k, int64_t* out) {
  using Key = decltype(key_of(S()));
  __shared__ unsigned counts[2][32], more[32], equal[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int first = int(warp * items * 32 + lane);
  x += int64_t(blockIdx.x) * row_stride;
  out += int64_t(blockIdx.x) * k;
  Key keys[items];
#pragma unroll
  for (int j = 0; j < items; ++j) {
    const int i = first + j * 32;
    keys[j] = i < columns ? key_of(x[i]) : Key(0);
  }
  Key least = 0;
  for (int bit = int(sizeof(S)) * 8 - 1; bit >= 0; --bit) {
    const Key candidate = least | Key(1) << bit;
    unsigned count = 0;
#pragma unroll
    for (int j = 0; j < items; ++j) count += keys[j] >= candidate;
    count = __reduce_add_sync(all_lanes, count);
    if (warps > 1) {
      // Of two buffers in turn: nobody writes to what others still read.
      unsigned* shared = counts[bit % 2];
      if (lane == 0) shared[warp] = count;
      __syncthreads();
      count = __reduce_add_sync(all_lanes, lane < warps ? shared[lane] : 0);
    }
    if (count < unsigned(k)) continue;
    least = candidate;
    if (count == unsigned(k)) break;
  }
  // All keys above `least` are taken, and so many equal to it as there is room for, from the first.
  unsigned above = 0, same = 0;
#pragma unroll
  for (int j = 0; j < items; ++j) above += keys[j] > least, same += keys[j] == least;
  above = __reduce_add_sync(all_lanes, above);
  same = __reduce_add_sync(all_lanes, same);
  if (lane == 0) more[warp] = above, equal[warp] = same;
  __syncthreads();
  unsigned more_before = 0, equal_before = 0, total = 0;
  for (unsigned w = 0; w < warps; ++w) {
    if (w < warp) more_before += more[w], equal_before += equal[w];
    total += more[w];
  }
  const unsigned room = unsigned(k) - total, before = (1u << lane) - 1;
  unsigned to = more_before + std::min(equal_before, room);
#pragma unroll
  for (int j = 0; j < items; ++j) {
    const unsigned ties = __ballot_sync(all_lanes, keys[j] == least);
    const bool tie = keys[j] == least && equal_before + __popc(ties & before) < room;
    const unsigned taken = __ballot_sync(all_lanes, keys[j] > least || tie);
    if (taken >> lane & 1) out[to + __popc(taken & before)] = first + j * 32;
    equal_before += __popc(ties);
    to += __popc(taken);
  }
}

// Sums of magnitudes in fp64: a block has 32 columns, its warps take turns at the rows.
template <class S>
__global__ void __launch_bounds__(1024) sum_columns(const S* x, int64_t row_stride, int64_t rows,
                                                    int columns, double* sums) {
  __shared__ double shared[32][32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = int64_t(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = warp; row < rows; row += 32)
      sum += fabs(double(widened(x[row * row_stride + column])));
  }
  shared[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  double total = 0;
  for (int w = 0; w < 32; ++w) total += shared[w][lane];
  sums[column] = total;
}

template <class S, int items>
void select_with(const Queue& queue, const S* x, int64_t row_stride, int64_t rows, int64_t columns,
                 int64_t k, int64_t* out) {
  const auto warps = unsigned(ceil_div(columns, 32 * items));
  STD_TORCH_CHECK(warps <= 32, "there are too many columns, ", columns);
  queue.run(&select_rows<S, items>, dim3(unsigned(rows)), 32 * warps, x, row_stride, int(columns),
            int(k), out);
}

template <class S>
void select_from(const Queue& queue, const S* x, int64_t row_stride, int64_t rows, int64_t columns,
                 int64_t k, int64_t* out) {
  // As many keys as leave a thread of a block of 1024 its registers.
  constexpr int most = sizeof(S) == 8 ? 14 : 28;
  if (rows == 0 || k == 0) return;
  STD_TORCH_CHECK(0 < k && k <= columns, "k must be in [0, ", columns, "], got ", k);
  STD_TORCH_CHECK(rows < (int64_t(1) << 31), "there are too many rows, ", rows);
  constexpr int few = most == 14 ? 4 : 8;
  if (columns <= 32 * few)
    select_with<S, few>(queue, x, row_stride, rows, columns, k, out);
  else
    select_with<S, most>(queue, x, row_stride, rows, columns, k, out);
}

template <class S>
Tensor select_of(const Tensor& x, int64_t k, bool by_column) {
  const Queue queue(x);
  const int64_t rows = x.size(0), columns = x.size(1), stride = rows > 1 ? x.stride(0) : 0;
  const auto* from = static_cast<const S*>(x.data_ptr());
  if (!by_column) {
    Tensor out = torch::stable::new_empty(x, {rows, k}, ScalarType::Long);
    select_from(queue, from, stride, rows, columns, k, out.mutable_data_ptr<int64_t>());
    return out;
  }
  Tensor out = torch::stable::new_empty(x, {k}, ScalarType::Long);
  if (k == 0) return out;
  const Tensor sums = torch::stable::new_empty(x, {columns}, ScalarType::Double);
  auto* data = sums.mutable_data_ptr<double>();
  queue.run(&sum_columns<S>, dim3(unsigned(ceil_div(columns, 32))), 1024, from, stride, rows,
            int(columns), data);
  select_from<double>(queue, data, 0, 1, columns, k, out.mutable_data_ptr<int64_t>());
  return out;
}

Tensor topk_select(const Tensor& x, int64_t k, bool by_column) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) < 2 || x.stride(1) == 1),
                  "x must be a matrix whose rows are contiguous");
  return of_dtype(x.scalar_type(), "x", [&](auto number) {
    return select_of<decltype(number)>(x, k, by_column);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("topk_select_cuda(Tensor x, int k, bool by_column) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, PK_DEVICE, m) {
  m.impl("topk_select_cuda", TORCH_BOX(&topk_select));
}
