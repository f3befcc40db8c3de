// Linear layers of a sub-network: some rows and columns of a weight. Leading ones are used where they
// are, others are gathered; products are torch's. Of the weight's gradient each row is written once.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

namespace {

using torch::stable::Tensor;
using Index = std::optional<Tensor>;

// Bytes that are worth a thread.
constexpr int64_t grain = 1 << 16;

int64_t length(const Index& index, int64_t leading) { return index ? index->size(0) : leading; }

// Positions along a dimension, null for leading ones. What they point to must exist.
const int64_t* positions(const Index& index, int64_t size, int64_t leading) {
  if (!index) {
    STD_TORCH_CHECK(0 <= leading && leading <= size, "must keep 0 to ", size, ", got ", leading);
    return nullptr;
  }
  const int64_t count = index->size(0);
  STD_TORCH_CHECK(count <= 1 || index->stride(0) == 1, "an index must be contiguous");
  const int64_t* at = index->const_data_ptr<int64_t>();
  int64_t previous = -1;
  for (int64_t i = 0; i < count; previous = at[i++])
    STD_TORCH_CHECK(at[i] > previous && at[i] < size, "an index must ascend in [0, ", size, ")");
  return at;
}

// A tensor on memory that somebody else owns.
Tensor view(const Tensor& of, void* data, int64_t rows, int64_t columns, int64_t row_step,
            int64_t column_step) {
  return torch::stable::from_blob(data, {rows, columns}, {row_step, column_step}, of.device(),
                                  of.scalar_type());
}

// W[S, C]: in place where both are leading parts, else a copy.
struct Selected {
  const Tensor& weight;
  int64_t rows, columns, row_step, step;
  void* data;
  std::optional<Tensor> copy;

  Tensor matrix() const { return view(weight, data, rows, columns, row_step, step); }
  Tensor transposed() const { return view(weight, data, columns, rows, step, row_step); }
};

// Its elements, each an U by its size.
template <class U>
Tensor gathered(const Tensor& weight, int64_t rows, int64_t columns, const int64_t* row_at,
                const int64_t* column_at) {
  const int64_t row_step = weight.stride(0), step = weight.stride(1);
  const U* from = static_cast<const U*>(weight.const_data_ptr());
  Tensor out = torch::stable::new_empty(weight, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  U* to = static_cast<U*>(out.mutable_data_ptr());
  const int64_t rows_each = std::max<int64_t>(1, grain / int64_t(columns * sizeof(U) + 1));
  torch::stable::parallel_for(0, rows, rows_each, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const U* row = from + (row_at ? row_at[r] : r) * row_step;
      U* into = to + r * columns;
      if (!column_at && step == 1)
        std::memcpy(into, row, size_t(columns) * sizeof(U));
      else
        for (int64_t c = 0; c < columns; ++c) into[c] = row[(column_at ? column_at[c] : c) * step];
    }
  });
  return out;
}

Tensor gathered(const Tensor& weight, int64_t rows, int64_t columns, const int64_t* row_at,
                const int64_t* column_at) {
  switch (weight.element_size()) {
    case 2:
      return gathered<uint16_t>(weight, rows, columns, row_at, column_at);
    case 4:
      return gathered<uint32_t>(weight, rows, columns, row_at, column_at);
    default:
      return gathered<uint64_t>(weight, rows, columns, row_at, column_at);
  }
}

Selected selected(const Tensor& weight, int64_t rows, int64_t columns, const Index& row_index,
                  const Index& column_index) {
  const int64_t* row_at = positions(row_index, weight.size(0), rows);
  const int64_t* column_at = positions(column_index, weight.size(1), columns);
  if (!row_at && !column_at)
    return {weight, rows, columns, weight.stride(0), weight.stride(1), weight.data_ptr(), {}};
  Tensor copy = gathered(weight, rows, columns, row_at, column_at);
  void* data = copy.data_ptr();
  return {weight, rows, columns, columns, 1, data, std::move(copy)};
}

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               int64_t rows, const Index& row_index, const Index& column_index) {
  const int64_t tokens = x.size(0), columns = x.size(1), kept = length(row_index, rows);
  const Selected w = selected(weight, kept, columns, row_index, column_index);
  Tensor y = torch::stable::new_empty(x, {tokens, kept});
  if (!bias) {
    multiply(y, x, w.transposed());
    return y;
  }
  // As a column, of which the rows of the weight are selected, too.
  const Tensor column = view(*bias, bias->data_ptr(), bias->size(0), 1, bias->stride(0), 1);
  const Selected b = selected(column, kept, 1, row_index, std::nullopt);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(y.get(), b.transposed().get(), x.get(),
                                                  w.transposed().get(), 1, 1));
  return y;
}

Tensor dx(const Tensor& dy, const Tensor& weight, int64_t width, int64_t rows,
          const Index& row_index, const Index& column_index) {
  const Selected w = selected(weight, length(row_index, rows), width, row_index, column_index);
  Tensor out = torch::stable::new_empty(dy, {dy.size(0), width});
  multiply(out, dy, w.matrix());
  return out;
}

// Writes every row of `out`: some of its elements from `small`, zeros elsewhere. What lies in small's
// place already, with a row of `out` between its rows, stays there.
template <class U>
void spread(const Tensor& out, const U* small, int64_t rows, int64_t columns, const int64_t* row_at,
            const int64_t* column_at) {
  const int64_t outputs = out.size(0), inputs = out.size(1);
  if (inputs == 0) return;
  U* to = static_cast<U*>(out.data_ptr());
  const int64_t rows_each = std::max<int64_t>(1, grain / int64_t(inputs * sizeof(U) + 1));
  torch::stable::parallel_for(0, outputs, rows_each, [&](int64_t begin, int64_t end) {
    // Which of the rows comes next.
    int64_t r = row_at ? std::lower_bound(row_at, row_at + rows, begin) - row_at : begin;
    for (int64_t o = begin; o < end; ++o) {
      U* row = to + o * inputs;
      if (columns == 0 || r >= rows || (row_at && row_at[r] != o)) {
        std::memset(row, 0, size_t(inputs) * sizeof(U));
        continue;
      }
      if (!small) {
        std::memset(row + columns, 0, size_t(inputs - columns) * sizeof(U));
      } else if (!column_at) {
        std::memcpy(row, small + r * columns, size_t(columns) * sizeof(U));
        std::memset(row + columns, 0, size_t(inputs - columns) * sizeof(U));
      } else {
        std::memset(row, 0, size_t(inputs) * sizeof(U));
        for (int64_t c = 0; c < columns; ++c) row[column_at[c]] = small[r * columns + c];
      }
      ++r;
    }
  });
}

Tensor dweight(const Tensor& dy, const Tensor& x, const Tensor& weight, int64_t rows,
               const Index& row_index, const Index& column_index) {
  const int64_t columns = x.size(1), kept = length(row_index, rows), inputs = weight.size(1);
  const int64_t* row_at = positions(row_index, weight.size(0), rows);
  const int64_t* column_at = positions(column_index, inputs, columns);
  Tensor out = torch::stable::new_empty(weight, {weight.size(0), inputs});
  // Leading rows and columns are written where they belong.
  const bool in_place = !row_at && !column_at;
  const Tensor small = in_place ? view(out, out.data_ptr(), kept, columns, inputs, 1)
                                : torch::stable::new_empty(weight, {kept, columns});
  multiply(small, view(dy, dy.data_ptr(), kept, dy.size(0), dy.stride(1), dy.stride(0)), x);
  const auto spread_as = [&](auto element) {
    using U = decltype(element);
    const U* from = in_place ? nullptr : static_cast<const U*>(small.const_data_ptr());
    spread<U>(out, from, kept, columns, row_at, column_at);
  };
  switch (weight.element_size()) {
    case 2:
      spread_as(uint16_t());
      break;
    case 4:
      spread_as(uint32_t());
      break;
    default:
      spread_as(uint64_t());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def(
      "submatrix_forward_cpu(Tensor x, Tensor weight, Tensor? bias, int rows, Tensor? row_index, "
      "Tensor? col_index) -> Tensor");
  m.def(
      "submatrix_dx_cpu(Tensor dy, Tensor weight, int width, int rows, Tensor? row_index, "
      "Tensor? col_index) -> Tensor");
  m.def(
      "submatrix_dweight_cpu(Tensor dy, Tensor x, Tensor weight, int rows, Tensor? row_index, "
      "Tensor? col_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("submatrix_forward_cpu", TORCH_BOX(&forward));
  m.impl("submatrix_dx_cpu", TORCH_BOX(&dx));
  m.impl("submatrix_dweight_cpu", TORCH_BOX(&dweight));
}
