// Norms and inner products of masked gradients over lists of tensors, in one pass over memory and
// in fp64. Every chunk has sums of its own, added up in the order of chunks, so that the number of
// threads changes no bit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "common/numbers.h"

namespace {

using partial_kernels::Bf16;
using partial_kernels::Fp16;
using partial_kernels::half_to_float;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of equal length; an element is inside the mask where p and q, those that are there, are not
// 0. Without h nothing is. Steps are in elements, of g, h, p and q. After `length` elements a row
// may go on outside the mask.
struct Plane {
  const void *g, *h;
  const uint8_t *p, *q;
  int64_t rows, length, outside;
  const int64_t *row_step, *step;
};

struct Kernels {
  void (*add_plane)(const Plane& plane, double* out);
  void (*add_scattered)(const void* g, const int64_t* g_at, const void* h, const int64_t* h_at,
                        int64_t n, double* out);
};

#define PK_KERNELS "common/stats.h"
#include "common/foreach_isa.h"

// Elements of one chunk: few enough that a core's L2 cache holds them, many enough that its sums
// cost nothing.
constexpr int64_t chunk = 16384;

struct Dim {
  int64_t size;
  // Of g, h, p and q.
  std::array<int64_t, 4> step;
  int source;
};

// A tensor, the other gradient and the masks, as boxes with the same dimensions.
struct Piece {
  const Kernels* kernels;
  int64_t item_size;
  const char *g, *h = nullptr;
  const uint8_t *p = nullptr, *q = nullptr;
  // Outermost first, two at least.
  std::vector<Dim> dims;
  // Elements outside that end each row.
  int64_t outside = 0;
  std::vector<uint8_t> row_flags, column_flags;
  // Scattered elements, in the tensors' row-major order.
  const int64_t* index = nullptr;
  int64_t indices = 0;
  const Tensor *tensor, *other;

  int64_t rows() const {
    int64_t count = 1;
    for (size_t d = 0; d + 1 < dims.size(); ++d) count *= dims[d].size;
    return count;
  }

  // Whether flat positions are offsets in memory.
  bool in_order() const { return tensor->is_contiguous() && other->is_contiguous(); }
};

const Kernels* kernels_for(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return PK_ISA_FUNCTION(kernels<float>);
    case ScalarType::Double:
      return PK_ISA_FUNCTION(kernels<double>);
    case ScalarType::BFloat16:
      return PK_ISA_FUNCTION(kernels<Bf16>);
    case ScalarType::Half:
      return PK_ISA_FUNCTION(kernels<Fp16>);
    default:
      STD_TORCH_CHECK(false, "gradients must be fp32, fp64, bf16 or fp16");
  }
}

int64_t item_size(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// 1 where the index says.
std::vector<uint8_t> flags(const Tensor& index, int64_t size) {
  std::vector<uint8_t> inside(size_t(size), 0);
  const int64_t *at = index.const_data_ptr<int64_t>(), stride = index.stride(0);
  for (int64_t i = 0; i < index.size(0); ++i) inside[size_t(at[i * stride])] = 1;
  return inside;
}

// A mask of columns gets the elements of each column too, where these follow one another: runs as
// long as those of the tensor.
void widen_columns(Piece& piece) {
  std::vector<Dim>& dims = piece.dims;
  const auto comes_from = [](int source) {
    return [source](const Dim& dim) { return dim.source == source; };
  };
  const auto column = std::find_if(dims.begin(), dims.end(), comes_from(1));
  const bool rows_inside = std::any_of(column, dims.end(), comes_from(0));
  if (column == dims.end() || column + 1 == dims.end() || rows_inside) return;
  int64_t inner = 1;
  for (auto dim = dims.end() - 1; dim != column; --dim) dim->step[3] = inner, inner *= dim->size;
  column->step[3] = inner;
  std::vector<uint8_t> wide;
  wide.reserve(piece.column_flags.size() * size_t(inner));
  for (uint8_t flag : piece.column_flags) wide.insert(wide.end(), size_t(inner), flag);
  piece.column_flags = std::move(wide);
}

// Dimensions in the order of memory, as few as can be.
void simplify(Piece& piece) {
  std::vector<Dim>& dims = piece.dims;
  std::erase_if(dims, [](const Dim& dim) { return dim.size == 1; });
  // What is expanded goes outwards: there it costs nothing.
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
    return uint64_t(a.step[0]) - 1 > uint64_t(b.step[0]) - 1;
  });
  if (!piece.column_flags.empty()) widen_columns(piece);
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    bool adjoins = !merged.empty();
    for (int k = 0; adjoins && k < 4; ++k)
      adjoins = merged.back().step[k] == dim.step[k] * dim.size;
    if (adjoins)
      merged.back() = {merged.back().size * dim.size, dim.step, dim.source};
    else
      merged.push_back(dim);
  }
  while (merged.size() < 2) merged.insert(merged.begin(), Dim{1, {}, -1});
  dims = std::move(merged);
}

Piece make_piece(const Tensor& g, const std::optional<Tensor>& h, const std::optional<Tensor>& rows,
                 const std::optional<Tensor>& cols, const std::optional<Tensor>& elements) {
  Piece piece{};
  piece.kernels = kernels_for(g.scalar_type());
  piece.item_size = item_size(g.scalar_type());
  piece.g = static_cast<const char*>(g.const_data_ptr());
  piece.tensor = &g;
  const bool scattered = h && elements && elements->scalar_type() == ScalarType::Long;
  const bool bitmap = h && elements && !scattered;
  if (scattered) {
    piece.other = &*h;
    piece.index = elements->const_data_ptr<int64_t>();
    piece.indices = elements->size(0);
  } else if (h) {
    piece.h = static_cast<const char*>(h->const_data_ptr());
    if (bitmap) piece.p = static_cast<const uint8_t*>(elements->const_data_ptr());
    if (rows) piece.row_flags = flags(*rows, g.size(0));
    if (cols) piece.column_flags = flags(*cols, g.size(1));
  }
  for (int d = 0; d < g.dim(); ++d) {
    Dim dim{g.size(d), {g.stride(d), piece.h ? h->stride(d) : 0, 0, 0}, d};
    if (bitmap) dim.step[2] = elements->stride(d);
    if (d == 0 && !piece.row_flags.empty()) dim.step[2] = 1;
    if (d == 1 && !piece.column_flags.empty()) dim.step[3] = 1;
    piece.dims.push_back(dim);
  }
  simplify(piece);
  if (!piece.row_flags.empty()) piece.p = piece.row_flags.data();
  if (!piece.column_flags.empty()) piece.q = piece.column_flags.data();
  return piece;
}

// Whether `next`, all of it outside the mask, continues the rows of `piece`: then it becomes part
// of it, so that memory is read in order.
bool joined(Piece& piece, const Piece& next) {
  const bool plain = piece.h && !next.h && !piece.p && !piece.q && !next.index;
  if (!plain || piece.dims.size() != 2 || next.dims.size() != 2 || piece.outside) return false;
  const Dim &rows = piece.dims[0], &run = piece.dims[1];
  const Dim &next_rows = next.dims[0], &next_run = next.dims[1];
  const bool fits = run.size > 0 && rows.size == next_rows.size &&
                    rows.step[0] == next_rows.step[0] && run.step[0] == 1 &&
                    next_run.step[0] == 1 &&
                    piece.item_size == next.item_size &&
                    piece.g + run.size * piece.item_size == next.g &&
                    run.size + next_run.size <= chunk;
  if (fits) piece.outside = next_run.size;
  return fits;
}

// A share of one piece: some columns of some rows of its box, and some of its scattered elements.
struct Item {
  const Piece* piece;
  int64_t column;
  int64_t row, rows, begin, length, index, indices;
};

void add_items(const Piece& piece, int64_t column, std::vector<Item>& items) {
  const int64_t rows = piece.rows(), length = piece.dims.back().size;
  if (rows == 0 || length == 0) return;
  const bool in_order = piece.index && rows == 1 && piece.in_order();
  const int64_t rows_each = std::max<int64_t>(1, chunk / (length + piece.outside));
  const int64_t length_each = rows_each > 1 || piece.outside ? length : chunk;
  int64_t index = 0;
  for (int64_t row = 0; row < rows; row += rows_each)
    for (int64_t begin = 0; begin < length; begin += length_each) {
      Item item{&piece, column, row, std::min(rows_each, rows - row), begin,
                std::min(length_each, length - begin), index, 0};
      if (in_order) {
        // While these elements are in the cache.
        const int64_t* last = piece.index + piece.indices;
        index = std::lower_bound(piece.index + index, last, begin + item.length) - piece.index;
        item.indices = index - item.index;
      }
      items.push_back(item);
    }
  for (; index < piece.indices; index += chunk)
    items.push_back({&piece, column, 0, 0, 0, 0, index, std::min(chunk, piece.indices - index)});
}

void add_box(const Item& item, double* out) {
  const Piece& piece = *item.piece;
  const std::vector<Dim>& dims = piece.dims;
  const Dim &run = dims.back(), &rows = dims[dims.size() - 2];
  for (int64_t row = item.row, end = item.row + item.rows; row < end;) {
    // Rows up to the next step of a dimension further out.
    const int64_t first = row % rows.size, count = std::min(rows.size - first, end - row);
    std::array<int64_t, 4> offset;
    for (int k = 0; k < 4; ++k) offset[k] = first * rows.step[k] + item.begin * run.step[k];
    int64_t outer = row / rows.size;
    for (size_t d = dims.size() - 2; d-- > 0; outer /= dims[d].size)
      for (int k = 0; k < 4; ++k) offset[k] += outer % dims[d].size * dims[d].step[k];
    const Plane plane{piece.g + offset[0] * piece.item_size,
                      piece.h ? piece.h + offset[1] * piece.item_size : nullptr,
                      piece.p ? piece.p + offset[2] : nullptr,
                      piece.q ? piece.q + offset[3] : nullptr,
                      count,
                      item.length,
                      piece.outside,
                      rows.step.data(),
                      run.step.data()};
    piece.kernels->add_plane(plane, out);
    row += count;
  }
}

// Offsets in memory of flat positions.
std::vector<int64_t> offsets(const Tensor& tensor, const int64_t* index, int64_t n) {
  std::vector<int64_t> found(size_t(n), 0);
  for (int64_t i = 0; i < n; ++i) {
    int64_t position = index[i];
    for (int64_t d = tensor.dim(); d-- > 0; position /= tensor.size(d))
      found[size_t(i)] += position % tensor.size(d) * tensor.stride(d);
  }
  return found;
}

void add_scattered(const Item& item, double* out) {
  const Piece& piece = *item.piece;
  const int64_t *index = piece.index + item.index, *g_at = index, *h_at = index;
  std::vector<int64_t> g_offsets, h_offsets;
  if (!piece.tensor->is_contiguous())
    g_at = (g_offsets = offsets(*piece.tensor, index, item.indices)).data();
  if (!piece.other->is_contiguous())
    h_at = (h_offsets = offsets(*piece.other, index, item.indices)).data();
  const void* h = piece.other->const_data_ptr();
  piece.kernels->add_scattered(piece.g, g_at, h, h_at, item.indices, out);
}

using Selections = std::vector<std::optional<Tensor>>;

Tensor masked_stats(std::vector<Tensor> grads, Selections other_grads, Selections rows,
                    Selections cols, Selections elements, std::vector<int64_t> source,
                    int64_t count) {
  std::vector<Piece> pieces;
  std::vector<int64_t> columns;
  pieces.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    Piece piece = make_piece(grads[i], other_grads[i], rows[i], cols[i], elements[i]);
    if (i > 0 && columns.back() == source[i] && joined(pieces.back(), piece)) continue;
    pieces.push_back(std::move(piece));
    columns.push_back(source[i]);
  }
  std::vector<Item> items;
  for (size_t i = 0; i < pieces.size(); ++i) add_items(pieces[i], columns[i], items);
  std::vector<std::array<double, 4>> sums(items.size());
  torch::stable::parallel_for(0, int64_t(items.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      // Not in place: neighbours in memory belong to another thread.
      std::array<double, 4> sum{};
      if (items[size_t(i)].rows) add_box(items[size_t(i)], sum.data());
      if (items[size_t(i)].indices) add_scattered(items[size_t(i)], sum.data());
      sums[size_t(i)] = sum;
    }
  });
  Tensor out = torch::stable::new_zeros(grads[0], {4, count}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  for (size_t i = 0; i < items.size(); ++i)
    for (int64_t k = 0; k < 4; ++k) to[k * count + items[i].column] += sums[i][size_t(k)];
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def(
      "masked_stats_cpu(Tensor[] grads, Tensor?[] other_grads, Tensor?[] rows, Tensor?[] cols, "
      "Tensor?[] elements, int[] source, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("masked_stats_cpu", TORCH_BOX(&masked_stats));
}
