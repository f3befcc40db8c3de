// Squared norms and inner products of masked gradients in fp64, over all tensors in two launches:
// every block sums its share, then one block for each tensor adds these up. Shares and the order of
// all sums depend on the tensors' shapes and strides alone: the same bits on every device.

#include "regions.h"

namespace {

using namespace partial_kernels;

// Gradient, other gradient, mask.
constexpr int streams = 3;
constexpr unsigned items_by_thread = 16;

// |p g|^2, |p h|^2, <p g, p h>, |g|^2 of a share of tensor `source`.
struct Partial {
  double sums[4];
  int64_t source;
};

// What a region's elements count in.
struct Counts {
  int64_t source;
  // In the sums over the mask, which may leave some of them out; in the sum over all.
  bool inside, all;
};
using Regions = Batch<streams, Counts, items_by_thread>;

template <class S>
__global__ void __launch_bounds__(region_threads)
    sum_regions(const __grid_constant__ Regions batch, Partial* partials) {
  __shared__ double shared[region_threads / 32];
  const int r = batch.region_of_block();
  const Counts counts = batch.extra[r];
  double sums[4] = {0, 0, 0, 0};
  batch.visit<false>(r, [&](const Item<streams>& item) {
#pragma unroll
    for (int i = 0; i < item_size; ++i) {
      if (!(item.kept >> i & 1)) continue;
      const double g = widened(*item.at<const S>(0, i));
      if (counts.all) sums[3] = fma(g, g, sums[3]);
      const bool masked = item.region.base[2];
      if (!counts.inside || (masked && !*item.at<const bool>(2, i))) continue;
      const double h = widened(*item.at<const S>(1, i));
      sums[0] = fma(g, g, sums[0]);
      sums[1] = fma(h, h, sums[1]);
      sums[2] = fma(g, h, sums[2]);
    }
  });
  for (double& sum : sums) sum = block_sum(sum, shared);
  if (threadIdx.x == 0)
    partials[blockIdx.x] = {{sums[0], sums[1], sums[2], sums[3]}, counts.source};
}

// Of each tensor, the shares in their order.
__global__ void __launch_bounds__(region_threads)
    add_partials(const Partial* partials, int64_t count, double* out, int64_t tensors) {
  __shared__ double shared[region_threads / 32];
  for (int which = 0; which < 4; ++which) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += region_threads)
      if (partials[i].source == int64_t(blockIdx.x)) sum += partials[i].sums[which];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[which * tensors + blockIdx.x] = sum;
  }
}

using Tensors = std::vector<Tensor>;

struct Piece {
  Region<streams> region;
  Counts counts;
  ScalarType dtype;
};

Tensor stats(const Tensors& grads, const Selections& others, const Selections& rows,
             const Selections& cols, const Selections& elements, const std::vector<int64_t>& source,
             int64_t count) {
  const size_t pieces = grads.size();
  STD_TORCH_CHECK(others.size() == pieces && rows.size() == pieces && cols.size() == pieces &&
                      elements.size() == pieces && source.size() == pieces,
                  "lists must have one entry per gradient");
  std::vector<Piece> found;
  int64_t blocks = 0;
  const std::optional<Tensor> none;
  for (size_t i = 0; i < pieces; ++i) {
    STD_TORCH_CHECK(0 <= source[i] && source[i] < count, "source must be in [0, ", count, ")");
    const Tensor* other = others[i] ? &*others[i] : nullptr;
    STD_TORCH_CHECK(!other || other->scalar_type() == grads[i].scalar_type(),
                    "two gradients must have one dtype");
    const auto add = [&](const auto& row, const auto& col, const auto& element, bool inside,
                         bool all) {
      bool any = false;
      const auto region =
          region_of<streams>({&grads[i], inside ? other : nullptr}, row, col, element, any);
      if (!any) return;
      found.push_back({region, {source[i], inside, all}, grads[i].scalar_type()});
      blocks += Regions::blocks_of(region);
    };
    // Some elements by their places are read by themselves, beside all; others in one pass.
    const bool by_mask = elements[i] && elements[i]->scalar_type() == ScalarType::Bool;
    const bool by_place = other && (rows[i] || cols[i] || (elements[i] && !by_mask));
    if (by_place) add(rows[i], cols[i], elements[i], true, false);
    add(none, none, other && by_mask ? elements[i] : none, other && !by_place, true);
  }
  // Of one dtype after the other; the order of a tensor's shares does not depend on the others'.
  std::ranges::stable_sort(found, {}, &Piece::dtype);
  const Queue queue(grads[0]);
  Tensor out = torch::stable::new_empty(grads[0], {4, count}, ScalarType::Double);
  const Tensor memory = torch::stable::new_empty(
      grads[0], {int64_t(sizeof(Partial)) * blocks}, torch::headeronly::ScalarType::Byte);
  auto* partials = static_cast<Partial*>(memory.data_ptr());
  Regions batch;
  batch.clear();
  Partial* to = partials;
  for (size_t i = 0; i < found.size(); ++i) {
    batch.add(found[i].region, found[i].counts);
    if (!batch.full() && i + 1 < found.size() && found[i + 1].dtype == found[i].dtype) continue;
    of_dtype(found[i].dtype, "gradients", [&](auto number) {
      queue.run(&sum_regions<decltype(number)>, dim3(batch.blocks), region_threads, batch, to);
    });
    to += batch.blocks;
    batch.clear();
  }
  if (count)
    queue.run(&add_partials, dim3(unsigned(count)), region_threads, partials, blocks,
              out.mutable_data_ptr<double>(), count);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(partial_kernels, m) {
  m.def(
      "masked_stats_cuda(Tensor[] grads, Tensor?[] other_grads, Tensor?[] rows, Tensor?[] cols, "
      "Tensor?[] elements, int[] source, int count) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, PK_DEVICE, m) {
  m.impl("masked_stats_cuda", TORCH_BOX(&stats));
}
