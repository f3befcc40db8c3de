// The k largest magnitudes of each row, or the k columns whose magnitudes have the largest sums. The
// number of threads changes no result.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Candidates {
  uint32_t *keys, *positions;
};

// What a thread keeps from row to row.
struct Scratch {
  uint32_t guess = 0;
  std::vector<uint32_t> keys, positions;

  // For n candidates, and for what a vector writes beyond the last.
  Candidates room(int64_t n) {
    if (const size_t size = size_t(n) + 32; keys.size() < size) {
      keys.resize(size);
      positions.resize(size);
    }
    return {keys.data(), positions.data()};
  }
};

// Of numbers by their bits: fp32 as uint32_t, bf16 as uint16_t.
template <class T>
struct Kernels {
  void (*select_row)(const T* row, int64_t n, int64_t k, Scratch& scratch, int64_t* out);
  void (*add_columns)(const T* from, int64_t ld, int64_t rows, int64_t columns, double* sums);
};

#define PK_KERNELS "common/select.h"
#include "common/foreach_isa.h"

// Elements that are worth a thread.
constexpr int64_t grain = 1 << 15;

template <class T>
void select_rows(const Tensor& x, int64_t k, int64_t* out) {
  const Kernels<T>& kernels = *PK_ISA_FUNCTION(kernels<T>);
  const int64_t rows = x.size(0), n = x.size(1), ld = x.stride(0);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  const int64_t rows_each = std::max<int64_t>(1, grain / n);
  torch::stable::parallel_for(0, rows, rows_each, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t row = begin; row < end; ++row)
      kernels.select_row(from + row * ld, n, k, scratch, out + row * k);
  });
}

template <class T>
void select_columns(const Tensor& x, int64_t k, int64_t* out) {
  const Kernels<T>& kernels = *PK_ISA_FUNCTION(kernels<T>);
  const int64_t rows = x.size(0), n = x.size(1), ld = x.stride(0);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  std::vector<double> sums(size_t(n), 0.0);
  // So many that their sums stay in the L1 cache and memory is read in long runs.
  constexpr int64_t strip = 1024;
  const int64_t columns_each = std::max<int64_t>(64, grain / std::max<int64_t>(rows, 1));
  torch::stable::parallel_for(0, n, columns_each, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += strip)
      kernels.add_columns(from + c, ld, rows, std::min(strip, end - c), sums.data() + c);
  });
  // As integers: not negative, NaN above infinity, and none of them larger than another.
  std::vector<uint64_t> keys(sums.size());
  constexpr uint64_t infinity = 0x7ff0000000000000;
  for (size_t c = 0; c < sums.size(); ++c)
    keys[c] = std::min(std::bit_cast<uint64_t>(sums[c]) & ~(uint64_t(1) << 63), infinity + 1);
  std::vector<int64_t> order(sums.size());
  std::iota(order.begin(), order.end(), 0);
  std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), [&](int64_t a, int64_t b) {
    const uint64_t first = keys[size_t(a)], second = keys[size_t(b)];
    return first > second || (first == second && a < b);
  });
  std::copy(order.begin(), order.begin() + k, out);
  std::sort(out, out + k);
}

// [T, k], or [k] by columns.
Tensor topk_select(const Tensor& x, int64_t k, bool by_column) {
  const int64_t rows = x.size(0), n = x.size(1);
  STD_TORCH_CHECK(0 <= k && k <= n && n <= INT32_MAX && (n <= 1 || x.stride(1) == 1),
                  "k must be in [0, ", n, "] and rows contiguous and short");
  std::vector<int64_t> shape{k};
  if (!by_column) shape.insert(shape.begin(), rows);
  Tensor out = torch::stable::new_empty(x, shape, ScalarType::Long);
  if (k == 0 || (rows == 0 && !by_column)) return out;
  int64_t* to = out.mutable_data_ptr<int64_t>();
  const bool half = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(half || x.scalar_type() == ScalarType::Float, "x must be fp32 or bf16");
  if (by_column)
    half ? select_columns<uint16_t>(x, k, to) : select_columns<uint32_t>(x, k, to);
  else
    half ? select_rows<uint16_t>(x, k, to) : select_rows<uint32_t>(x, k, to);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("topk_select_cpu(Tensor x, int k, bool by_column) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("topk_select_cpu", TORCH_BOX(&topk_select));
}
