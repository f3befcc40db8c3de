// In-place SGD and AdamW on regions of a list of tensors. Elements do not depend on each other, so
// that the number of threads changes no bit; each is computed by one thread, in chunks that are
// shared out by the bytes they move. Everything is checked before anything is written.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "common/numbers.h"

namespace {

using partial_kernels::Bf16;
using partial_kernels::Fp16;
using partial_kernels::ceil_div;
using partial_kernels::float_to_half;
using partial_kernels::half_to_float;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the kernels share with this file.

// Of parameters and gradients; the states and the arithmetic are fp64 for fp64, else fp32.
enum class Dtypes { fp32, bf16, bf16_fp32, fp16, fp16_fp32, fp64 };

// Parameter, gradient and the states that there are; null for the others.
using Pointers = std::array<char*, 4>;
using Offsets = std::array<const int64_t*, 4>;
using Strides = std::array<int64_t, 4>;

// Some of the elements [line_size index, line_size (index + 1)): lane k where bit k of mask is set.
inline constexpr int64_t line_size = 16;
struct Line {
  int32_t index;
  uint32_t mask;
};

struct SgdOptions {
  double lr, momentum;
  bool nesterov;
  double weight_decay;
};

struct AdamWOptions {
  double decay, one_minus_beta1, beta2, one_minus_beta2, correction2, eps, minus_rate;
};

struct Kernels {
  void (*run)(const void* options, const Pointers& base, int64_t n);
  void (*list)(const void* options, const Pointers& base, const Offsets& offsets,
               const Strides& strides, int64_t n);
  void (*masked)(const void* options, const Pointers& base, const Line* lines, int64_t count,
                 int64_t ahead, const Strides& jump);
  int64_t (*find_lines)(const uint8_t* bits, int64_t first, int64_t n, Line* lines);
};

#define PK_KERNELS "common/adam.h"
#include "common/foreach_isa.h"

// Elements, lines or positions that make up a chunk of work.
constexpr int64_t run_chunk = 16384, line_chunk = 1024, mask_chunk = 65536, position_chunk = 4096;
// Bytes that are worth a thread.
constexpr int64_t grain = 1 << 19;
// Scattered lines are asked for this many lines ahead, rows of a region two rows ahead: the
// processor's own prefetching stops at every gap. Into the second cache, to which more misses can be
// under way than to the first.
constexpr int64_t lines_ahead = 24, rows_ahead = 2;
// Rows of more bytes than this need no help.
constexpr int64_t long_row = 16384;
// Runs shorter than this, of a list of indices, are masked lines of a longer one.
constexpr int64_t short_run = 64;
// Elements whose offsets are written out at a time.
constexpr int64_t offset_block = 256;

// Parameter, gradient, two states; the bits of a mask, whose distances are in bits.
constexpr size_t streams = 5;
using Bytes = std::array<int64_t, streams>;

// One dimension: as many positions, each so many bytes from the last, or those that an index names.
struct Dim {
  int64_t size;
  Bytes stride;
  const int64_t* index;
};

// The elements to update in one tensor: rows, each made of the same elements of adjoining memory
// (`run`, `lines`, `elements`) or of any (`list`).
struct Region {
  enum class Kind { run, lines, elements, strided, indexed, strided_elements, positions, unravel };
  Kind kind;
  std::array<char*, 4> base;
  const uint8_t* bits;
  // Slowest first. A row is one setting of them; `unravel` has all dimensions here.
  std::vector<Dim> outer;
  // Elements of a row (lines, positions), and where they are.
  int64_t inner;
  Dim along;
  std::vector<Line> lines;
  std::vector<int64_t> copies[2];
  int64_t rows, rows_per_item, inner_per_item, parts, items, item_bytes, first_byte;
  bool ask_ahead;
  const void* options;
  Kernels kernels;
  Bytes size;
  // Whether a stream holds the elements at the positions alone.
  std::array<bool, streams> packed;

  Bytes offset(int64_t row) const {
    Bytes at{};
    for (auto dim = outer.rbegin(); dim != outer.rend(); ++dim) {
      int64_t i = row;
      if (&*dim != outer.data()) {
        row /= dim->size;
        i -= row * dim->size;
      }
      if (dim->index) i = dim->index[i];
      for (size_t s = 0; s < streams; ++s) at[s] += i * dim->stride[s];
    }
    return at;
  }

  void step(int64_t item) const;
  void step_row(const Pointers& at, int64_t first_bit, int64_t begin, int64_t end,
                const Strides& jump) const;
  void step_positions(int64_t begin, int64_t end) const;
};

void Region::step(int64_t item) const {
  const int64_t part = item % parts, first = item / parts * rows_per_item;
  const int64_t last = std::min(first + rows_per_item, rows);
  const int64_t begin = part * inner_per_item, end = std::min(begin + inner_per_item, inner);
  if (kind == Kind::positions || kind == Kind::unravel) return step_positions(begin, end);
  Bytes now = offset(first);
  // The places of the rows to come.
  std::array<Bytes, rows_ahead> next;
  for (int64_t i = 0; ask_ahead && i < rows_ahead; ++i)
    next[size_t(i)] = offset(std::min(first + 1 + i, rows - 1));
  for (int64_t row = first; row < last; ++row) {
    Pointers at{};
    Strides jump{};
    for (size_t s = 0; s < 4; ++s)
      if (base[s]) {
        at[s] = base[s] + now[s];
        if (ask_ahead) jump[s] = next[rows_ahead - 1][s] - now[s];
      }
    if (ask_ahead && kind == Kind::run)
      for (size_t s = 0; s < 4; ++s)
        if (at[s])
          for (int64_t byte = 0; byte < inner * size[s]; byte += 64)
            __builtin_prefetch(at[s] + jump[s] + byte, 0, 2);
    step_row(at, now[4], begin, end, jump);
    if (ask_ahead) {
      now = next[0];
      std::copy(next.begin() + 1, next.end(), next.begin());
      next.back() = offset(std::min(row + 1 + rows_ahead, rows - 1));
    } else if (row + 1 < last) {
      now = offset(row + 1);
    }
  }
}

void Region::step_row(const Pointers& row, int64_t first_bit, int64_t begin, int64_t end,
                      const Strides& jump) const {
  const auto at = [&](int64_t i) {
    Pointers moved{};
    for (size_t s = 0; s < 4; ++s)
      if (row[s]) moved[s] = row[s] + i * along.stride[s];
    return moved;
  };
  const Strides strides{along.stride[0], along.stride[1], along.stride[2], along.stride[3]};
  switch (kind) {
    case Kind::run:
      kernels.run(options, at(begin), end - begin);
      break;
    case Kind::lines:
      kernels.masked(options, row, lines.data() + begin, end - begin, ask_ahead ? 0 : lines_ahead,
                     jump);
      break;
    case Kind::elements: {
      std::array<Line, mask_chunk / line_size> found;
      const int64_t count = kernels.find_lines(bits, first_bit + begin, end - begin, found.data());
      if (count) kernels.masked(options, at(begin), found.data(), count, lines_ahead, {});
      break;
    }
    case Kind::strided:
      kernels.list(options, at(begin), {}, strides, end - begin);
      break;
    case Kind::indexed: {
      const int64_t* index = along.index + begin;
      kernels.list(options, row, {index, index, index, index}, strides, end - begin);
      break;
    }
    case Kind::strided_elements: {
      std::array<int64_t, offset_block> found;
      const Offsets offsets{found.data(), found.data(), found.data(), found.data()};
      int64_t count = 0;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t bit = first_bit + i * along.stride[4];
        if (bits[bit / 8] >> (bit % 8) & 1) found[size_t(count++)] = i;
        if (count == offset_block || i + 1 == end) {
          kernels.list(options, row, offsets, strides, count);
          count = 0;
        }
      }
      break;
    }
    case Kind::positions:
    case Kind::unravel:
      break;
  }
}

void Region::step_positions(int64_t begin, int64_t end) const {
  Pointers at{base[0], base[1], base[2], base[3]};
  Strides strides{along.stride[0], along.stride[1], along.stride[2], along.stride[3]};
  Offsets offsets{};
  const int64_t* index = along.index + begin;
  std::array<std::array<int64_t, offset_block>, 4> found;
  for (size_t s = 0; s < 4; ++s) {
    if (packed[s]) {
      at[s] += begin * strides[s];
    } else if (kind == Kind::positions) {
      offsets[s] = index;
    } else {
      offsets[s] = found[s].data();
      strides[s] = 1;
    }
  }
  if (kind == Kind::positions) return kernels.list(options, at, offsets, strides, end - begin);
  for (int64_t i = 0; i < end - begin; i += offset_block) {
    const int64_t count = std::min(offset_block, end - begin - i);
    for (int64_t k = 0; k < count; ++k) {
      const Bytes bytes = offset(index[i + k]);
      for (size_t s = 0; s < 4; ++s) found[s][size_t(k)] = bytes[s];
    }
    kernels.list(options, at, offsets, strides, count);
    for (size_t s = 0; s < 4; ++s)
      if (packed[s]) at[s] += count * strides[s];
  }
}

// Lists of the op's arguments.
using Tensors = std::vector<Tensor>;
using Selections = std::vector<std::optional<Tensor>>;

struct Arguments {
  const Tensors &params, &grads;
  std::array<const Tensors*, 2> states;
  const Selections &rows, &cols, &elements;
};

// Of a mask's n bits, the first of which is the lowest of the first byte; with what kernels may read
// behind them.
int64_t bytes_of_bits(int64_t n) { return ceil_div(n, 8) + 16; }

Tensor mask_bits(const Tensor& mask) {
  const int64_t n = mask.numel();
  STD_TORCH_CHECK(mask.is_contiguous() && mask.scalar_type() == ScalarType::Bool,
                  "a mask must be contiguous and bool");
  Tensor out = torch::stable::new_zeros(mask, {bytes_of_bits(n)}, ScalarType::Byte);
  const auto* from = static_cast<const uint8_t*>(mask.const_data_ptr());
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    // The product brings the lowest bits of eight bytes, each 0 or 1, together in the top one.
    uint64_t eight;
    std::memcpy(&eight, from + i, sizeof eight);
    to[i / 8] = uint8_t(eight * 0x0102040810204080 >> 56);
  }
  for (; i < n; ++i) to[i / 8] = uint8_t(to[i / 8] | from[i] << (i % 8));
  return out;
}

Dtypes dtypes_of(const Tensor& param, const Tensor& grad) {
  const ScalarType p = param.scalar_type(), g = grad.scalar_type();
  if (p == ScalarType::Float && g == p) return Dtypes::fp32;
  if (p == ScalarType::Double && g == p) return Dtypes::fp64;
  if (p == ScalarType::BFloat16 && g == p) return Dtypes::bf16;
  if (p == ScalarType::BFloat16 && g == ScalarType::Float) return Dtypes::bf16_fp32;
  if (p == ScalarType::Half && g == p) return Dtypes::fp16;
  if (p == ScalarType::Half && g == ScalarType::Float) return Dtypes::fp16_fp32;
  STD_TORCH_CHECK(false, "parameters of ", torch::headeronly::toString(p), " with gradients of ",
                  torch::headeronly::toString(g), " are not supported");
}

// A dimension's index list: sorted, within the dimension; a copy of it where it is strided.
const int64_t* checked_index(const Tensor& index, int64_t upper, std::vector<int64_t>& copy) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long,
                  "a selection must be a 1-D int64 index or a bool mask");
  const auto* from = index.const_data_ptr<int64_t>();
  const int64_t length = index.size(0), stride = index.stride(0);
  // It increases, so its ends tell.
  STD_TORCH_CHECK(length == 0 || (from[0] >= 0 && from[(length - 1) * stride] < upper),
                  "indices must lie in [0, ", upper, ")");
  if (length <= 1 || stride == 1) return from;
  copy.resize(size_t(length));
  for (int64_t i = 0; i < length; ++i) copy[size_t(i)] = from[i * stride];
  return copy.data();
}

bool adjoin(const Dim& slow, const Dim& fast) {
  if (slow.index || fast.index) return false;
  for (size_t s = 0; s < streams; ++s)
    if (slow.stride[s] != fast.stride[s] * fast.size) return false;
  return true;
}

// Joins neighbours that are one dimension to every stream.
void merge(std::vector<Dim>& dims) {
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    if (!merged.empty() && adjoin(merged.back(), dim)) {
      const int64_t size = merged.back().size * dim.size;
      merged.back() = dim;
      merged.back().size = size;
    } else {
      merged.push_back(dim);
    }
  }
  dims = std::move(merged);
}

// Whether its elements adjoin in every stream that there is.
bool dense(const Region& region, const Dim& dim) {
  for (size_t s = 0; s < 4; ++s)
    if (region.base[s] && dim.stride[s] != region.size[s]) return false;
  return !region.bits || dim.stride[4] == 1;
}

// The lines of a row in which the listed groups of `group` elements take part.
std::vector<Line> lines_of(const Dim& listed, int64_t group) {
  std::vector<Line> lines;
  for (int64_t i = 0; i < listed.size; ++i)
    for (int64_t k = listed.index[i] * group, past = k + group; k < past; ++k) {
      const int32_t index = int32_t(k / line_size);
      if (lines.empty() || lines.back().index != index) lines.push_back({index, 0});
      lines.back().mask |= 1u << (k % line_size);
    }
  return lines;
}

// Elements from one row to the next, if that is the same in all streams and the rows are dense;
// else 0.
int64_t pitch_of(const Region& region, const Dim& along, const std::vector<Dim>& outer) {
  if (region.bits || along.index || outer.empty() || outer.back().index ||
      !dense(region, along))
    return 0;
  const int64_t pitch = outer.back().stride[0] / region.size[0];
  for (size_t s = 0; s < 4; ++s)
    if (region.base[s] && outer.back().stride[s] != pitch * region.size[s]) return 0;
  return pitch;
}

// Whether rows leave out so little that it is faster to go through all lines, those left out with
// no lane: gaps cost more than what they save.
bool nearly_whole(const Dim& along, int64_t pitch) {
  return along.size >= 2 * line_size && along.size < pitch && pitch <= line_chunk * line_size &&
         100 * along.size > 55 * pitch;
}

// Chooses the elements that make up a row, and the kernel for them; false if there are none.
bool choose_rows(Region& region, std::vector<Dim> dims, const int64_t* positions, int64_t count) {
  using Kind = Region::Kind;
  for (const Dim& dim : dims)
    if (dim.size == 0) return false;
  if (positions) {
    if (count == 0) return false;
    merge(dims);
    region.inner = count;
    region.kind = dims.size() > 1 ? Kind::unravel : Kind::positions;
    region.along = dims.empty() ? Dim{} : dims[0];
    region.along.index = positions;
    if (dims.size() > 1) region.outer = std::move(dims);
    return true;
  }
  // A dimension of one position only moves the base.
  std::erase_if(dims, [&](const Dim& dim) {
    for (size_t s = 0; dim.size == 1 && dim.index && s < 4; ++s)
      if (region.base[s]) region.base[s] += *dim.index * dim.stride[s];
    return dim.size == 1;
  });
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
  merge(dims);
  if (dims.empty()) {
    dims.push_back({1, {}, nullptr});
    for (size_t s = 0; s < 4; ++s) dims[0].stride[s] = region.size[s];
    dims[0].stride[4] = 1;
  }
  Dim along = dims.back();
  dims.pop_back();
  constexpr int64_t most = int64_t(std::numeric_limits<int32_t>::max()) * line_size;
  int64_t group = 0;
  if (along.index && dense(region, along)) {
    group = 1;
  } else if (!dims.empty() && dims.back().index && along.size < short_run &&
             dense(region, along)) {
    Dim whole = dims.back();
    for (int64_t& stride : whole.stride) stride /= along.size;
    bool adjoins = true;
    for (size_t s = 0; s < streams; ++s)
      adjoins = adjoins && whole.stride[s] * along.size == dims.back().stride[s];
    if (adjoins && dense(region, whole)) {
      group = along.size;
      whole.index = dims.back().index;
      along = whole;
      dims.pop_back();
    }
  }
  if (const int64_t pitch = pitch_of(region, along, dims); !group && nearly_whole(along, pitch)) {
    region.kind = Kind::lines;
    for (int64_t first = 0; first < pitch; first += line_size) {
      const int64_t count = std::clamp(along.size - first, int64_t(0), line_size);
      region.lines.push_back({int32_t(first / line_size), (1u << count) - 1});
    }
    region.inner = int64_t(region.lines.size());
  } else if (group && along.index[along.size - 1] < most / group) {
    region.kind = Kind::lines;
    region.lines = lines_of(along, group);
    region.inner = int64_t(region.lines.size());
  } else {
    const bool unit = dense(region, along);
    region.inner = along.size;
    if (along.index)
      region.kind = Kind::indexed;
    else if (region.bits)
      region.kind = unit ? Kind::elements : Kind::strided_elements;
    else
      region.kind = unit ? Kind::run : Kind::strided;
  }
  region.along = along;
  region.outer = std::move(dims);
  return true;
}

// Cuts the rows into chunks of about equal work.
void cut(Region& region) {
  using Kind = Region::Kind;
  const bool positions = region.kind == Kind::positions || region.kind == Kind::unravel;
  const bool elements = region.kind == Kind::elements || region.kind == Kind::strided_elements;
  const int64_t chunk = region.kind == Kind::lines ? line_chunk
                        : positions                ? position_chunk
                        : elements                 ? mask_chunk
                                                   : run_chunk;
  region.rows = 1;
  if (!positions)
    for (const Dim& dim : region.outer) region.rows *= dim.size;
  // Moved by one element; what is in a line comes and goes with it.
  int64_t bytes = 0, all_bytes = 0;
  for (size_t s = 0; s < 4; ++s) {
    if (!region.base[s]) continue;
    bytes += region.size[s] * (s == 0 || s == 2 || s == 3 ? 2 : 1);
    all_bytes += region.size[s] * region.inner;
  }
  if (region.kind == Kind::lines || positions) bytes *= line_size;
  region.parts = ceil_div(region.inner, chunk);
  region.inner_per_item = ceil_div(region.inner, region.parts);
  region.rows_per_item = std::max(int64_t(1), std::min(chunk / region.inner, region.rows));
  region.items = region.parts * ceil_div(region.rows, region.rows_per_item);
  region.item_bytes = bytes * region.rows_per_item * region.inner_per_item;
  region.ask_ahead = region.rows > rows_ahead && region.parts == 1 &&
                     (region.kind == Kind::lines ||
                      (region.kind == Kind::run && all_bytes <= 4 * long_row));
}

Region make_region(const Arguments& arguments, size_t i, const void* options,
                   Kernels (*kernels)(Dtypes), bool& empty) {
  const Tensor &param = arguments.params[i], &grad = arguments.grads[i];
  const Dtypes dtypes = dtypes_of(param, grad);
  const ScalarType state = dtypes == Dtypes::fp64 ? ScalarType::Double : ScalarType::Float;
  Region region{};
  region.options = options;
  region.kernels = kernels(dtypes);
  std::array<const Tensor*, 4> tensors{&param, &grad};
  for (size_t k = 0; k < 2; ++k) {
    if (!arguments.states[k]) continue;
    tensors[2 + k] = &(*arguments.states[k])[i];
    STD_TORCH_CHECK(tensors[2 + k]->scalar_type() == state, "states must be ",
                    torch::headeronly::toString(state));
  }
  const auto &rows = arguments.rows[i], &cols = arguments.cols[i], &picked = arguments.elements[i];
  STD_TORCH_CHECK(!picked || (!rows && !cols), "elements cannot be selected by rows or cols, too");
  const bool by_mask = picked && picked->scalar_type() == ScalarType::Byte;
  const bool by_position = picked && !by_mask && picked->dim() == 1;
  STD_TORCH_CHECK(!picked || by_mask || by_position,
                  "a selection must be a 1-D int64 index or a mask's bits");
  const int64_t dim = param.dim(), numel = param.numel();
  STD_TORCH_CHECK((!rows || dim >= 1) && (!cols || dim >= 2), "there are no such dimensions");
  std::vector<Dim> dims(static_cast<size_t>(dim));
  if (by_mask) {
    STD_TORCH_CHECK(picked->numel() == bytes_of_bits(numel), "tensors must have one shape");
    region.bits = picked->const_data_ptr<uint8_t>();
    for (int64_t d = dim, step = 1; d-- > 0; step *= param.size(d)) dims[size_t(d)].stride[4] = step;
  }
  for (size_t s = 0; s < 4; ++s) {
    if (!tensors[s]) continue;
    const Tensor& tensor = *tensors[s];
    region.size[s] = int64_t(tensor.element_size());
    region.base[s] = static_cast<char*>(tensor.data_ptr());
    if (by_position && tensor.dim() == 1 && tensor.size(0) == picked->size(0) && s > 0) {
      region.packed[s] = true;
      continue;
    }
    STD_TORCH_CHECK(tensor.dim() == dim, "tensors must have one shape");
    for (int64_t d = 0; d < dim; ++d) {
      STD_TORCH_CHECK(tensor.size(d) == param.size(d), "tensors must have one shape");
      dims[size_t(d)].size = param.size(d);
      dims[size_t(d)].stride[s] = tensor.stride(d) * region.size[s];
    }
  }
  for (size_t d = 0; d < 2; ++d)
    if (const auto& index = d == 0 ? rows : cols) {
      dims[d].index = checked_index(*index, dims[d].size, region.copies[d]);
      dims[d].size = index->size(0);
    }
  const int64_t* positions =
      by_position ? checked_index(*picked, numel, region.copies[0]) : nullptr;
  empty = numel == 0 || (by_position && picked->size(0) == 0) ||
          !choose_rows(region, std::move(dims), positions, by_position ? picked->size(0) : 0);
  for (size_t s = 0; s < 4; ++s)
    if (region.packed[s]) region.along.stride[s] = tensors[s]->stride(0) * region.size[s];
  if (!empty) cut(region);
  return region;
}

void check_lengths(const Arguments& arguments) {
  const size_t count = arguments.params.size();
  bool equal = arguments.grads.size() == count && arguments.rows.size() == count &&
               arguments.cols.size() == count && arguments.elements.size() == count;
  for (const Tensors* states : arguments.states)
    equal = equal && (!states || states->size() == count);
  STD_TORCH_CHECK(equal, "lists must have one entry per parameter");
}

// Updates all regions; options[i], or the only one, are those of region i.
template <class Options>
void step(const Arguments& arguments, const std::vector<Options>& options,
          Kernels (*kernels)(Dtypes)) {
  std::vector<Region> regions;
  regions.reserve(arguments.params.size());
  int64_t bytes = 0;
  for (size_t i = 0; i < arguments.params.size(); ++i) {
    bool empty = false;
    Region region =
        make_region(arguments, i, &options[options.size() == 1 ? 0 : i], kernels, empty);
    if (empty) continue;
    region.first_byte = bytes;
    bytes += region.items * region.item_bytes;
    regions.push_back(std::move(region));
  }
  // Each thread has a range of the bytes, and the chunks that start in it.
  torch::stable::parallel_for(0, bytes, grain, [&](int64_t begin, int64_t end) {
    auto region = std::upper_bound(
        regions.begin(), regions.end(), begin,
        [](int64_t byte, const Region& r) { return byte < r.first_byte + r.items * r.item_bytes; });
    for (; region != regions.end() && region->first_byte < end; ++region) {
      const auto item = [&](int64_t byte) {
        return byte <= region->first_byte
                   ? 0
                   : std::min(ceil_div(byte - region->first_byte, region->item_bytes),
                              region->items);
      };
      for (int64_t i = item(begin), last = item(end); i < last; ++i) region->step(i);
    }
  });
}

void sgd(const Tensors& params, const Tensors& grads, const Tensors& momentum_buffers,
         const Selections& rows, const Selections& cols, const Selections& elements, double lr,
         double momentum, bool nesterov, double weight_decay) {
  const Tensors* buffers = momentum != 0 ? &momentum_buffers : nullptr;
  const Arguments arguments{params, grads, {buffers, nullptr}, rows, cols, elements};
  check_lengths(arguments);
  step<SgdOptions>(arguments, {{lr, momentum, nesterov, weight_decay}},
                   PK_ISA_FUNCTION(sgd_kernels));
}

void adamw(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs,
           const Tensors& exp_avg_sqs, const Selections& rows, const Selections& cols,
           const Selections& elements, const std::vector<int64_t>& steps, double lr, double beta1,
           double beta2, double eps, double weight_decay) {
  const Arguments arguments{params, grads, {&exp_avgs, &exp_avg_sqs}, rows, cols, elements};
  check_lengths(arguments);
  STD_TORCH_CHECK(steps.size() == params.size(), "lists must have one entry per parameter");
  std::vector<AdamWOptions> options;
  options.reserve(steps.size());
  for (const int64_t t : steps) {
    // As Python computes them: rounded once more where they become fp32.
    const double correction1 = 1 - std::pow(beta1, double(t));
    const double correction2 = std::pow(1 - std::pow(beta2, double(t)), 0.5);
    options.push_back({1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, correction2, eps,
                       -lr / correction1});
  }
  step(arguments, options, PK_ISA_FUNCTION(adamw_kernels));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def("mask_bits_cpu(Tensor mask) -> Tensor");
  m.def(
      "masked_sgd_cpu(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor?[] rows, Tensor?[] cols, Tensor?[] elements, float lr, float momentum, "
      "bool nesterov, float weight_decay) -> ()");
  m.def(
      "masked_adamw_cpu(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor?[] rows, Tensor?[] cols, Tensor?[] elements, int[] steps, "
      "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("mask_bits_cpu", TORCH_BOX(&mask_bits));
  m.impl("masked_sgd_cpu", TORCH_BOX(&sgd));
  m.impl("masked_adamw_cpu", TORCH_BOX(&adamw));
}
