// The elements of equally shaped tensors that a mask selects, as a kernel finds them.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

#include "device.h"

namespace partial_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Selections = std::vector<std::optional<Tensor>>;

// Dimensions that strides leave apart.
constexpr int max_dims = 5;
// Elements that one thread takes at a time.
constexpr int item_size = 4;
constexpr unsigned region_threads = 256;
// What a kernel's arguments may take, from sm_70 on.
constexpr size_t argument_bytes = 32764;

// The streams are tensors that are walked together; the last is the mask, if there is one.
template <int streams>
struct Region {
  // Null where a stream is absent.
  char* base[streams];
  // Slowest first. The last runs within an item.
  int64_t size[max_dims];
  // In bytes.
  int64_t stride[streams][max_dims];
  // Of up to two dimensions: the places kept.
  const int64_t* index[2];
  // Row-major positions of the elements kept, whose number is `count`; else null.
  const int64_t* positions;
  int64_t count;
  // The streams that hold those elements alone, and how far they move from one to the next.
  bool packed[streams];
  int64_t packed_stride[streams];
  // The dimensions that have an index, else -1.
  int8_t index_dim[2];
  int8_t dims;
  // Whether the elements of an item adjoin in every stream, and items are aligned.
  bool adjoins;
};

// Items of a region.
template <int streams>
constexpr int64_t items_of(const Region<streams>& region) {
  if (region.positions) return ceil_div(region.count, item_size);
  int64_t items = ceil_div(region.size[region.dims - 1], item_size);
  for (int d = 0; d < region.dims - 1; ++d) items *= region.size[d];
  return items;
}

__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  // 64-bit divisions take a hundred instructions.
  return uint64_t(a | b) >> 32 ? a / b : int64_t(uint32_t(a) / uint32_t(b));
}

template <int streams>
__device__ __forceinline__ int64_t place(const Region<streams>& region, int dim, int64_t i) {
  if (region.index_dim[0] == dim) return region.index[0][i];
  if (region.index_dim[1] == dim) return region.index[1][i];
  return i;
}

// Moves by the first `dims` dimensions to number i of them, in row-major order.
template <int streams>
__device__ __forceinline__ void move(const Region<streams>& region, int dims, int64_t i,
                                     char* (&at)[streams]) {
  // Not unrolled: there is most often one, and each division is long.
#pragma unroll 1
  for (int d = dims - 1; d >= 0; --d) {
    int64_t here = i;
    if (d > 0) {
      i = divide(here, region.size[d]);
      here -= i * region.size[d];
    }
    here = place(region, d, here);
    for (int s = 0; s < streams; ++s) at[s] += here * region.stride[s][d];
  }
}

// The `item_size` elements that a thread takes at a time, or fewer.
template <int streams>
struct Item {
  const Region<streams>& region;
  char* start[streams];
  // Of each element, its place in the last dimension, or its position.
  int64_t place[item_size];
  // The number of the first.
  int64_t first;
  // Bit i: element i is there and in the mask.
  unsigned kept;
  // Whether all are there and adjoin, each stream's from its element 0.
  bool adjoins;

  template <class S>
  __device__ __forceinline__ S* at(int stream, int i) const {
    return reinterpret_cast<S*>(bytes_at(stream, i));
  }

  __device__ __forceinline__ char* bytes_at(int s, int i) const {
    if (region.packed[s]) return start[s] + i * region.packed_stride[s];
    return start[s] + place[i] * region.stride[s][region.dims - 1];
  }
};

// Positions where strides leave dimensions apart: an item is one element.
template <int streams>
__device__ __forceinline__ bool one_by_one(const Region<streams>& region) {
  return region.positions && region.dims > 1;
}

// Item number `item`, or the element `part` of it where they are taken one by one. Elements outside
// the mask are left out, or are not.
template <bool leave_out, int streams>
__device__ __forceinline__ Item<streams> item_of(const Region<streams>& region, int64_t item,
                                                 int part) {
  constexpr int mask = streams - 1;
  Item<streams> found{region, {}, {}, 0, 0, false};
  for (int s = 0; s < streams; ++s) found.start[s] = region.base[s];
  if (region.positions) {
    found.first = item * item_size + part;
#pragma unroll
    for (int i = 0; i < item_size; ++i) {
      if (found.first + i >= region.count || (i > 0 && one_by_one(region))) continue;
      found.kept |= 1u << i;
      found.place[i] = region.positions[found.first + i];
    }
    if (one_by_one(region) && found.kept) {
      move(region, region.dims, found.place[0], found.start);
      found.place[0] = 0;
    }
    for (int s = 0; s < streams; ++s)
      if (region.packed[s]) found.start[s] = region.base[s] + found.first * region.packed_stride[s];
    return found;
  }
  const int last = region.dims - 1;
  const int64_t size = region.size[last], items = ceil_div(size, item_size);
  const int64_t row = last ? divide(item, items) : 0;
  found.first = (item - row * items) * item_size;
  move(region, last, row, found.start);
  const bool whole = found.first + item_size <= size;
#pragma unroll
  for (int i = 0; i < item_size; ++i) {
    if (!whole && found.first + i >= size) continue;
    found.kept |= 1u << i;
    found.place[i] = place(region, last, found.first + i);
  }
  if (leave_out && region.base[mask] && region.adjoins && whole) {
    // Four bytes, each 0 or 1.
    const auto bytes = *found.template at<const uint32_t>(mask, 0);
    found.kept = (bytes | bytes >> 7 | bytes >> 14 | bytes >> 21) & 15;
  } else if (leave_out && region.base[mask]) {
    const unsigned there = found.kept;
    found.kept = 0;
#pragma unroll
    for (int i = 0; i < item_size; ++i)
      if (there >> i & 1 && *found.template at<const bool>(mask, i)) found.kept |= 1u << i;
  }
  found.adjoins = region.adjoins && found.kept == (1u << item_size) - 1;
  return found;
}

inline const int64_t* index_data(const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long,
                  "an index must be 1-D int64");
  STD_TORCH_CHECK(index.size(0) < 2 || index.stride(0) == 1, "an index must be contiguous");
  return index.const_data_ptr<int64_t>();
}

// The selected elements of the streams but the last; absent ones are null. `any` says if there are.
template <int streams>
Region<streams> region_of(const std::array<const Tensor*, streams - 1>& tensors,
                          const std::optional<Tensor>& rows, const std::optional<Tensor>& cols,
                          const std::optional<Tensor>& elements, bool& any) {
  constexpr int mask = streams - 1;
  struct Dim {
    int64_t size;
    std::array<int64_t, streams> stride;
    const int64_t* index;
  };
  const Tensor& shape = *tensors[0];
  Region<streams> region{};
  const bool by_mask = elements && elements->scalar_type() == ScalarType::Bool;
  const bool by_position = elements && !by_mask;
  std::vector<Dim> dims(static_cast<size_t>(shape.dim()));
  STD_TORCH_CHECK(!elements || (!rows && !cols), "elements cannot be selected by rows, too");
  STD_TORCH_CHECK((!rows || shape.dim() >= 1) && (!cols || shape.dim() >= 2),
                  "there are no such dimensions");
  if (by_position) {
    region.positions = index_data(*elements);
    region.count = elements->size(0);
  }
  std::array<int64_t, streams> bytes{};
  for (int s = 0; s < streams; ++s) {
    const Tensor* tensor = s < mask ? tensors[s] : by_mask ? &*elements : nullptr;
    if (!tensor) continue;
    region.base[s] = static_cast<char*>(tensor->data_ptr());
    bytes[s] = int64_t(tensor->element_size());
    if (by_position && s > 0 && tensor->dim() == 1 && tensor->size(0) == region.count) {
      region.packed[s] = true;
      region.packed_stride[s] = tensor->stride(0) * bytes[s];
      continue;
    }
    STD_TORCH_CHECK(tensor->dim() == shape.dim(), "tensors must have one shape");
    for (size_t d = 0; d < dims.size(); ++d) {
      STD_TORCH_CHECK(tensor->size(int64_t(d)) == shape.size(int64_t(d)),
                      "tensors must have one shape");
      dims[d].size = shape.size(int64_t(d));
      dims[d].stride[s] = tensor->stride(int64_t(d)) * bytes[s];
    }
  }
  for (size_t d = 0; d < 2; ++d)
    if (const auto& index = d == 0 ? rows : cols) {
      dims[d].index = index_data(*index);
      dims[d].size = index->size(0);
    }
  any = !(by_position && region.count == 0) &&
        std::all_of(dims.begin(), dims.end(), [](const Dim& dim) { return dim.size > 0; });
  if (!any) return region;
  std::erase_if(dims, [](const Dim& dim) { return dim.size == 1 && !dim.index; });
  // Positions count in the tensor's own order of dimensions.
  if (!by_position)
    std::stable_sort(dims.begin(), dims.end(),
                     [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
  std::vector<Dim> merged;
  for (const Dim& dim : dims) {
    const bool adjoins =
        !merged.empty() && !dim.index && !merged.back().index &&
        std::equal(dim.stride.begin(), dim.stride.end(), merged.back().stride.begin(),
                   [&](int64_t inner, int64_t outer) { return inner * dim.size == outer; });
    if (adjoins)
      merged.back() = {merged.back().size * dim.size, dim.stride, nullptr};
    else
      merged.push_back(dim);
  }
  if (merged.empty()) merged.push_back({1, bytes, nullptr});
  STD_TORCH_CHECK(merged.size() <= max_dims, "strides leave more than ", max_dims,
                  " dimensions apart");
  region.dims = int8_t(merged.size());
  region.index_dim[0] = region.index_dim[1] = -1;
  int indices = 0;
  for (size_t d = 0; d < merged.size(); ++d) {
    region.size[d] = merged[d].size;
    for (int s = 0; s < streams; ++s) region.stride[s][d] = merged[d].stride[s];
    if (!merged[d].index) continue;
    region.index[indices] = merged[d].index;
    region.index_dim[indices++] = int8_t(d);
  }
  region.adjoins = !by_position && !merged.back().index;
  for (int s = 0; s < streams && region.adjoins; ++s) {
    if (!region.base[s]) continue;
    const int64_t aligned = item_size * bytes[s];
    region.adjoins = merged.back().stride[s] == bytes[s] &&
                     reinterpret_cast<uintptr_t>(region.base[s]) % uint64_t(aligned) == 0;
    for (size_t d = 0; d + 1 < merged.size(); ++d)
      region.adjoins = region.adjoins && merged[d].stride[s] % aligned == 0;
  }
  return region;
}

// Regions that one launch takes: each begins with a block of its own.
template <int streams, class Extra, unsigned items_by_thread>
struct Batch {
  static constexpr size_t most =
      (argument_bytes - 16) / (sizeof(Region<streams>) + sizeof(Extra) + sizeof(uint32_t));
  Region<streams> regions[most];
  Extra extra[most];
  uint32_t first_block[most];
  uint32_t blocks;
  int32_t count;

  static int64_t blocks_of(const Region<streams>& region) {
    return ceil_div(items_of(region), int64_t(region_threads) * items_by_thread);
  }
  void clear() { blocks = 0, count = 0; }
  bool full() const { return count == int32_t(most); }

  void add(const Region<streams>& region, const Extra& more) {
    regions[count] = region;
    extra[count] = more;
    first_block[count++] = blocks;
    const int64_t added = blocks_of(region);
    STD_TORCH_CHECK(blocks + added < (int64_t(1) << 31), "a tensor has too many elements");
    blocks += uint32_t(added);
  }

  // The region that a block works on.
  __device__ int region_of_block() const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_block[middle] <= blockIdx.x)
        low = middle;
      else
        high = middle;
    }
    return low;
  }

  // Calls visit(item) for the items of a thread that have any elements.
  template <bool leave_out, class Visit>
  __device__ __forceinline__ void visit(int r, const Visit& visit) const {
    const Region<streams>& region = regions[r];
    const int64_t items = items_of(region);
    const int64_t first =
        int64_t(blockIdx.x - first_block[r]) * region_threads * items_by_thread + threadIdx.x;
#pragma unroll 1
    for (unsigned i = 0; i < items_by_thread; ++i) {
      const int64_t number = first + int64_t(i) * region_threads;
      if (number >= items) return;
#pragma unroll 1
      for (int part = 0; part < (one_by_one(region) ? item_size : 1); ++part) {
        const auto item = item_of<leave_out>(region, number, part);
        if (item.kept) visit(item);
      }
    }
  }
};

}  // namespace partial_kernels
