// Linear layers with a frozen weight of which a few elements are trained, fp32. The gradient of
// these is a sampled product: what is in memory beside it is one tile of x a thread. Sums run in an
// order that the number of threads does not change.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/numbers.h"

namespace {

using partial_kernels::ceil_div;
using partial_kernels::Floats;
using torch::stable::Tensor;

// Tokens of a tile, with the widest vectors.
constexpr int64_t max_tokens = 128;

struct Kernels {
  // Of a tile.
  int64_t tokens;
  void (*transpose)(const float* from, int64_t ld, int64_t count, int64_t columns, float* to);
  void (*sample)(const float* dy, const float* x, const int64_t* index, int64_t first, int64_t n,
                 float* out);
};

#define PK_KERNELS "common/sampled.h"
#include "common/foreach_isa.h"

// Where the elements of each row begin in a sorted index.
std::vector<int64_t> row_starts(const int64_t* index, int64_t count, int64_t rows,
                                int64_t columns) {
  std::vector<int64_t> starts(size_t(rows + 1), count);
  int64_t row = 0, previous = -1;
  for (int64_t i = 0; i < count; ++i) {
    // Compiled graphs come here with an index that nobody has looked at.
    STD_TORCH_CHECK(index[i] > previous && index[i] < rows * columns,
                    "index must be strictly increasing and within the weight, got ", index[i],
                    " at position ", i);
    previous = index[i];
    for (; row * columns <= index[i]; ++row) starts[size_t(row)] = i;
  }
  return starts;
}

// W + dW.
Tensor merged(const Tensor& weight, const Tensor& values, const Tensor& index) {
  const int64_t size = weight.numel(), count = index.size(0), step = values.stride(0);
  const int64_t* at = index.const_data_ptr<int64_t>();
  row_starts(at, count, weight.size(0), weight.size(1));
  Tensor out = torch::stable::new_empty(weight, weight.sizes());
  const float *from = weight.const_data_ptr<float>(), *added = values.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  // Added while what was copied is in the cache.
  constexpr int64_t chunk = 1 << 14;
  torch::stable::parallel_for(0, ceil_div(size, chunk), 2, [&](int64_t begin, int64_t end) {
    int64_t i = std::lower_bound(at, at + count, begin * chunk) - at;
    for (int64_t first = begin * chunk; first < std::min(end * chunk, size); first += chunk) {
      const int64_t last = std::min(first + chunk, size);
      std::memcpy(to + first, from + first, size_t(4 * (last - first)));
      for (; i < count && at[i] < last; ++i) to[at[i]] += added[i * step];
    }
  });
  return out;
}

// Columns of x that are transposed at a time; rows of the weight that share a transposed part of
// dy. Both are multiples of every ISA's lanes.
constexpr int64_t strip = 64, height = 16;

// (dy^T x)[index], dy [T, O] and x [T, I] with contiguous rows.
Tensor sampled(const Tensor& dy, const Tensor& x, const Tensor& index) {
  const Kernels& kernels = *PK_ISA_FUNCTION(kernels);
  const int64_t tokens = x.size(0), inputs = x.size(1), outputs = dy.size(1);
  const int64_t count = index.size(0), ldx = x.stride(0), ldy = dy.stride(0);
  const int64_t* at = index.const_data_ptr<int64_t>();
  const std::vector<int64_t> starts = row_starts(at, count, outputs, inputs);
  Tensor out = torch::stable::new_zeros(x, {count});
  if (count == 0 || tokens == 0) return out;
  const float *from_x = x.const_data_ptr<float>(), *from_dy = dy.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();

  const int64_t tile_tokens = kernels.tokens, strips = ceil_div(inputs, strip);
  const int64_t tile_size = strips * strip * tile_tokens, tiles = ceil_div(tokens, tile_tokens);
  const int64_t together = std::min<int64_t>(tiles, torch::stable::get_num_threads());
  const Tensor buffer = torch::stable::new_empty(x, {together * tile_size});
  float* transposed = buffer.mutable_data_ptr<float>();

  // Shares of equal cost: that of a block of rows is its elements and what its dy takes.
  const int64_t blocks = ceil_div(outputs, height), per_block = 4 * height;
  const auto cost = [&](int64_t block) {
    return starts[size_t(std::min(block * height, outputs))] + block * per_block;
  };
  const auto first_block = [&](int64_t position) {
    int64_t low = 0, high = blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (cost(middle) < position)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };

  for (int64_t tile = 0; tile < tiles; tile += together) {
    const int64_t some = std::min(together, tiles - tile);
    torch::stable::parallel_for(0, some * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = (tile + item / strips) * tile_tokens, c = item % strips * strip;
        kernels.transpose(from_x + t * ldx + c, ldx, std::min(tile_tokens, tokens - t),
                          std::min(strip, inputs - c),
                          transposed + item / strips * tile_size + c * tile_tokens);
      }
    });
    torch::stable::parallel_for(0, cost(blocks), 1 << 10, [&](int64_t begin, int64_t end) {
      alignas(64) float dy_tile[height * max_tokens];
      const int64_t last = end == cost(blocks) ? blocks : first_block(end);
      for (int64_t k = 0; k < some; ++k)
        for (int64_t block = first_block(begin); block < last; ++block) {
          const int64_t row = block * height, rows = std::min(height, outputs - row);
          if (starts[size_t(row)] == starts[size_t(row + rows)]) continue;
          const int64_t t = (tile + k) * tile_tokens;
          kernels.transpose(from_dy + t * ldy + row, ldy, std::min(tile_tokens, tokens - t), rows,
                            dy_tile);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t first = starts[size_t(row + r)];
            kernels.sample(dy_tile + r * tile_tokens, transposed + k * tile_size, at + first,
                           (row + r) * inputs, starts[size_t(row + r + 1)] - first, to + first);
          }
        }
    });
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("packed_merged_cpu(Tensor weight, Tensor values, Tensor index) -> Tensor");
  m.def("packed_sampled_cpu(Tensor dy, Tensor x, Tensor index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("packed_merged_cpu", TORCH_BOX(&merged));
  m.impl("packed_sampled_cpu", TORCH_BOX(&sampled));
}
