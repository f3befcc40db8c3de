// Linear layers whose weight has blocks of zeros, fp32: only the other blocks are read, multiplied
// and given a gradient. Sums run in an order that the number of threads does not change.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "common/isa.h"
#include "common/numbers.h"

namespace {

using partial_kernels::ceil_div;
using partial_kernels::Floats;
using torch::stable::Tensor;

// Consecutive rows of the packed matrix, max_run at most, of one block or of several.
struct Run {
  int64_t begin, length;
};
constexpr int64_t max_run = 128;

// Some columns of it: the rows that hold anything, one after the other.
struct Strip {
  const float* panel;
  const Run *begin, *end;
  int64_t columns;
};

struct Kernels {
  int64_t (*strip_width)(int64_t block_size);
  void (*times_strip)(const float* a, int64_t lda, int64_t count, const Strip& b, int64_t width,
                      const float* bias, float* c, int64_t ldc);
  void (*outer_product)(const float* dy, int64_t ldy, const float* x, int64_t ldx, int64_t tokens,
                        int64_t rows, int64_t columns, float* out, int64_t ldo);
};

#define PK_KERNELS "common/blocksparse.h"
#include "common/foreach_isa.h"

// Rows of a that stay in a core's L2 cache while the strips pass by; tokens whose part of dy and x
// stays in the L3 cache while the blocks do.
constexpr int64_t product_rows = 96, outer_tokens = 512;

// Blocks of a matrix [rows, columns], which may be stored transposed.
struct Blocks {
  const bool* bitmap;
  int64_t row_stride, column_stride, size;

  bool operator()(int64_t row, int64_t column) const {
    return bitmap[row * row_stride + column * column_stride];
  }
};

// The matrix b [inner, columns] cut into strips, without the rows in which a strip has no block.
// Where blocks are narrower than a strip, what is between them counts as zeros.
struct Packed {
  int64_t width;
  std::vector<Run> runs;
  std::vector<int64_t> first_run, first_row;
  Tensor panels;

  Packed(const Kernels& kernels, const Tensor& like, const float* b, int64_t inner_stride,
         int64_t column_stride, int64_t inner, int64_t columns, const Blocks& blocks)
      : width(kernels.strip_width(blocks.size)), panels(like) {
    const int64_t strips = ceil_div(columns, width), size = blocks.size;
    int64_t rows = 0;
    for (int64_t s = 0; s < strips; ++s) {
      first_run.push_back(int64_t(runs.size()));
      first_row.push_back(rows);
      const int64_t last = (std::min((s + 1) * width, columns) - 1) / size;
      for (int64_t k = 0; k * size < inner; ++k) {
        bool any = false;
        for (int64_t n = s * width / size; n <= last; ++n) any |= blocks(k, n);
        if (!any) continue;
        const int64_t past = std::min((k + 1) * size, inner);
        rows += past - k * size;
        for (int64_t begin = k * size; begin < past; begin += max_run) {
          const int64_t length = std::min(max_run, past - begin);
          const bool adjoins = int64_t(runs.size()) > first_run.back() &&
                               runs.back().begin + runs.back().length == begin &&
                               runs.back().length + length <= max_run;
          if (adjoins)
            runs.back().length += length;
          else
            runs.push_back({begin, length});
        }
      }
    }
    first_run.push_back(int64_t(runs.size()));
    panels = torch::stable::new_empty(like, {rows, width});
    float* packed = panels.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        float* to = packed + first_row[s] * width;
        for (int64_t r = first_run[s]; r < first_run[s + 1]; ++r)
          for (int64_t k = runs[r].begin, past = k + runs[r].length; k < past; k += size) {
            const int64_t length = std::min(size, past - k);
            pack(b, inner_stride, column_stride, blocks, s * width, columns, k, length, to);
            to += length * width;
          }
      }
    });
  }

  // Rows k ... k + length, all of one block row, of the columns of the strip that starts at `first`.
  void pack(const float* b, int64_t inner_stride, int64_t column_stride, const Blocks& blocks,
            int64_t first, int64_t columns, int64_t k, int64_t length, float* to) const {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t n = first + i;
      const bool inside = n < columns && blocks(k / blocks.size, n / blocks.size);
      const float* from = b + k * inner_stride + n * column_stride;
      for (int64_t j = 0; j < length; ++j)
        to[j * width + i] = inside ? from[j * inner_stride] : 0.0f;
    }
  }

  Strip strip(int64_t s, int64_t columns) const {
    return {panels.const_data_ptr<float>() + first_row[s] * width, runs.data() + first_run[s],
            runs.data() + first_run[s + 1], std::min(width, columns - s * width)};
  }
};

// bias + a b, a [T, K] with contiguous rows.
Tensor product(const Tensor& a, const float* b, int64_t inner_stride, int64_t column_stride,
               int64_t columns, const Blocks& blocks, const std::optional<Tensor>& bias) {
  const Kernels& kernels = *PK_ISA_FUNCTION(kernels);
  const int64_t tokens = a.size(0), inner = a.size(1), lda = a.stride(0);
  const Packed packed(kernels, a, b, inner_stride, column_stride, inner, columns, blocks);
  const int64_t strips = ceil_div(columns, packed.width);
  // With room for a whole last strip.
  std::vector<float> padded;
  if (bias) {
    const float* from = bias->const_data_ptr<float>();
    padded.assign(size_t(strips * packed.width), 0.0f);
    for (int64_t n = 0; n < columns; ++n) padded[size_t(n)] = from[n * bias->stride(0)];
  }
  Tensor c = torch::stable::new_empty(a, {tokens, columns});
  const float* from = a.const_data_ptr<float>();
  float* to = c.mutable_data_ptr<float>();
  const int64_t chunks = ceil_div(tokens, product_rows);
  torch::stable::parallel_for(0, chunks * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / strips * product_rows, s = item % strips;
      const int64_t first = s * packed.width;
      kernels.times_strip(from + t * lda, lda, std::min(product_rows, tokens - t),
                          packed.strip(s, columns), packed.width,
                          bias ? padded.data() + first : nullptr, to + t * columns + first,
                          columns);
    }
  });
  return c;
}

Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
               const Tensor& bitmap, int64_t size) {
  const Blocks transposed{bitmap.const_data_ptr<bool>(), bitmap.stride(1), bitmap.stride(0), size};
  return product(x, weight.const_data_ptr<float>(), weight.stride(1), weight.stride(0),
                 weight.size(0), transposed, bias);
}

Tensor dx(const Tensor& dy, const Tensor& weight, const Tensor& bitmap, int64_t size) {
  const Blocks blocks{bitmap.const_data_ptr<bool>(), bitmap.stride(0), bitmap.stride(1), size};
  return product(dy, weight.const_data_ptr<float>(), weight.stride(0), weight.stride(1),
                 weight.size(1), blocks, std::nullopt);
}

// Some rows of a matrix, cut into panels as wide as a block, one after the other: a row after a row of
// the matrix would often take the same place in the cache.
struct Panels {
  int64_t width, columns, rows;
  Tensor memory;

  Panels(const Tensor& of, int64_t rows, int64_t width)
      : width(width),
        columns(of.size(1)),
        rows(rows),
        memory(torch::stable::new_empty(of, {ceil_div(columns, width) * width * rows})) {}

  // That of this column, the first of a block.
  float* at(int64_t column) const { return memory.mutable_data_ptr<float>() + column * rows; }

  void fill(const Tensor& of, int64_t first, int64_t count) const {
    constexpr int64_t some = 16;
    const int64_t step = of.stride(0);
    const float* from = of.const_data_ptr<float>() + first * step;
    torch::stable::parallel_for(0, ceil_div(count, some), 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * some; t < std::min(end * some, count); t += some)
        for (int64_t column = 0; column < columns; column += width)
          for (int64_t i = t; i < std::min(t + some, count); ++i)
            std::memcpy(at(column) + i * width, from + i * step + column,
                        size_t(4 * std::min(width, columns - column)));
    });
  }
};

Tensor dweight(const Tensor& dy, const Tensor& x, const Tensor& bitmap, int64_t size) {
  const Kernels& kernels = *PK_ISA_FUNCTION(kernels);
  const int64_t tokens = x.size(0), inputs = x.size(1), outputs = dy.size(1);
  const Blocks blocks{bitmap.const_data_ptr<bool>(), bitmap.stride(0), bitmap.stride(1), size};
  Tensor out = torch::stable::new_empty(x, {outputs, inputs});
  float* to = out.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, outputs, 64, [&](int64_t begin, int64_t end) {
    std::memset(to + begin * inputs, 0, size_t(4 * (end - begin) * inputs));
  });
  struct Block {
    int64_t row, column;
  };
  std::vector<Block> active;
  for (int64_t i = 0; i * size < outputs; ++i)
    for (int64_t j = 0; j * size < inputs; ++j)
      if (blocks(i, j)) active.push_back({i * size, j * size});
  const int64_t chunk = std::min(tokens, outer_tokens);
  const Panels dy_panels(dy, chunk, size), x_panels(x, chunk, size);
  for (int64_t t = 0; t < tokens; t += chunk) {
    const int64_t count = std::min(chunk, tokens - t);
    dy_panels.fill(dy, t, count);
    x_panels.fill(x, t, count);
    torch::stable::parallel_for(0, int64_t(active.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const auto [row, column] = active[size_t(item)];
        kernels.outer_product(dy_panels.at(row), size, x_panels.at(column), size, count,
                              std::min(size, outputs - row), std::min(size, inputs - column),
                              to + row * inputs + column, inputs);
      }
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def(
      "blocksparse_forward_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor bitmap, int size)"
      " -> Tensor");
  m.def("blocksparse_dx_cpu(Tensor dy, Tensor weight, Tensor bitmap, int size) -> Tensor");
  m.def("blocksparse_dweight_cpu(Tensor dy, Tensor x, Tensor bitmap, int size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("blocksparse_forward_cpu", TORCH_BOX(&forward));
  m.impl("blocksparse_dx_cpu", TORCH_BOX(&dx));
  m.impl("blocksparse_dweight_cpu", TORCH_BOX(&dweight));
}
