// Backward of a linear layer from the k largest elements of each row of dy, fp32. Sums run in an
// order that the number of threads does not change.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "common/isa.h"
#include "common/numbers.h"

namespace {

using partial_kernels::ceil_div;
using partial_kernels::Floats;
using torch::stable::Tensor;

struct Kernels {
  int64_t panel_width;
  void (*sparse_rows)(int64_t* next, const int64_t* end_of, const int32_t* column,
                      const float* value, int64_t begin, int64_t end, int32_t limit,
                      const float* panel, float* out);
};

#define PK_KERNELS "common/spmm.h"
#include "common/foreach_isa.h"

// Floats that begin where a cache line does: else every vector would lie in two.
struct Buffer {
  float* data;

  explicit Buffer(int64_t size)
      : data(static_cast<float*>(::operator new(size_t(4 * size), std::align_val_t(64)))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// A sparse matrix by rows: row r has the elements start[r] ... start[r + 1].
struct Sparse {
  std::vector<int64_t> start;
  std::vector<int32_t> column;
  std::vector<float> value;
};

// dy [T, O], of each row the elements at index [T, k].
Sparse by_token(const Tensor& dy, const Tensor& index) {
  const int64_t tokens = dy.size(0), outputs = dy.size(1), k = index.size(1), ld = dy.stride(0);
  const float* from = dy.const_data_ptr<float>();
  const int64_t* at = index.const_data_ptr<int64_t>();
  Sparse rows{std::vector<int64_t>(size_t(tokens + 1)), std::vector<int32_t>(size_t(tokens * k)),
              std::vector<float>(size_t(tokens * k))};
  for (int64_t t = 0; t <= tokens; ++t) rows.start[size_t(t)] = t * k;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      // Compiled graphs come here with an index that nobody has looked at.
      const int64_t least = i > t * k ? at[i - 1] + 1 : 0;
      STD_TORCH_CHECK(least <= at[i] && at[i] < outputs, "index must ascend in each row, in [0, ",
                      outputs, "), got ", at[i]);
      rows.column[size_t(i)] = int32_t(at[i]);
      rows.value[size_t(i)] = from[t * ld + at[i]];
    }
  return rows;
}

// The same, transposed: a row for each output, of the tokens in their order.
Sparse transposed(const Sparse& rows, int64_t outputs) {
  const int64_t tokens = int64_t(rows.start.size()) - 1;
  Sparse columns{std::vector<int64_t>(size_t(outputs + 1)),
                 std::vector<int32_t>(rows.column.size()), std::vector<float>(rows.value.size())};
  for (const int32_t output : rows.column) ++columns.start[size_t(output) + 1];
  for (size_t o = 0; o < size_t(outputs); ++o) columns.start[o + 1] += columns.start[o];
  std::vector<int64_t> next(columns.start.begin(), columns.start.end() - 1);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t i = rows.start[size_t(t)]; i < rows.start[size_t(t) + 1]; ++i) {
      const auto to = size_t(next[size_t(rows.column[size_t(i)])]++);
      columns.column[to] = int32_t(t);
      columns.value[to] = rows.value[size_t(i)];
    }
  return columns;
}

// Rows of a panel that stay in the L2 cache, and of the result beside them; terms that are added up by
// themselves, about, for one running sum of thousands would round far more than plain PyTorch's.
constexpr int64_t max_inner_block = 1024, row_block = 1024, terms = 128;

// a b, b [N, C] with contiguous rows: one panel of b's columns after the other, copied so that its
// rows adjoin.
Tensor product(const Sparse& a, const Tensor& b) {
  const Kernels& kernels = *PK_ISA_FUNCTION(kernels);
  const int64_t rows = int64_t(a.start.size()) - 1, inner = b.size(0), columns = b.size(1);
  const int64_t width = kernels.panel_width, panels = ceil_div(columns, width), ld = b.stride(0);
  const int64_t elements = std::max<int64_t>(int64_t(a.value.size()), 1);
  const int64_t inner_block = std::clamp(terms * rows * inner / elements, terms, max_inner_block);
  Tensor out = torch::stable::new_empty(b, {rows, columns});
  const float* from = b.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  // Where there are few panels, threads share one.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t shares = panels >= 2 * threads ? 1 : threads, share = ceil_div(rows, shares);
  torch::stable::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    const Buffer panel(inner * width), sums(row_block * width);
    std::vector<int64_t> next;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / shares * width, count = std::min(width, columns - first);
      if (item == begin || item % shares == 0)
        for (int64_t n = 0; n < inner; ++n)
          std::memcpy(panel.data + n * width, from + n * ld + first, size_t(4 * count));
      next.assign(a.start.begin(), a.start.end() - 1);
      const int64_t last = std::min((item % shares + 1) * share, rows);
      for (int64_t row = item % shares * share; row < last; row += row_block) {
        const int64_t some = std::min(row_block, last - row);
        std::fill_n(sums.data, some * width, 0.0f);
        for (int64_t n = 0; n < inner; n += inner_block)
          kernels.sparse_rows(next.data(), a.start.data() + 1, a.column.data(), a.value.data(), row,
                              row + some, int32_t(std::min(n + inner_block, inner)), panel.data,
                              sums.data);
        for (int64_t r = 0; r < some; ++r)
          std::memcpy(to + (row + r) * columns + first, sums.data + r * width, size_t(4 * count));
      }
    }
  });
  return out;
}

Tensor dx(const Tensor& dy, const Tensor& index, const Tensor& weight) {
  return product(by_token(dy, index), weight);
}

Tensor dweight(const Tensor& dy, const Tensor& index, const Tensor& x) {
  return product(transposed(by_token(dy, index), dy.size(1)), x);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("topk_row_dx_cpu(Tensor dy, Tensor index, Tensor weight) -> Tensor");
  m.def("topk_row_dweight_cpu(Tensor dy, Tensor index, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("topk_row_dx_cpu", TORCH_BOX(&dx));
  m.impl("topk_row_dweight_cpu", TORCH_BOX(&dweight));
}
