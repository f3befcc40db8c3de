#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace {

using torch::stable::Tensor;

// Position of the first element of `index` outside [0, upper) or not greater than its predecessor;
// -1 where there is none.
int64_t first_unsorted(const Tensor& index, int64_t upper) {
  STD_TORCH_CHECK(index.dim() == 1, "index must be 1-D, got ", index.dim(), "-D");
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Long,
                  "index must be int64, got ", torch::headeronly::toString(index.scalar_type()));
  const auto* element = index.const_data_ptr<int64_t>();
  const int64_t length = index.size(0), stride = index.stride(0);
  // Starting at -1 makes one comparison catch negative elements too.
  int64_t previous = -1;
  for (int64_t i = 0; i < length; ++i, element += stride) {
    if (*element <= previous || *element >= upper) return i;
    previous = *element;
  }
  return -1;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(partial_kernels, CPU, m) {
  m.impl("first_unsorted", TORCH_BOX(&first_unsorted));
}
