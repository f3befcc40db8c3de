#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include <string>

namespace py = pybind11;

static_assert(TORCH_ABI_VERSION >= TORCH_TARGET_VERSION, "partial_kernels needs torch >= 2.11");

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string abi_target() {
  constexpr unsigned long long target = TORCH_TARGET_VERSION;
  return std::to_string(target >> 56) + "." + std::to_string((target >> 48) & 0xff);
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("compiler"_a = compiler(), "cxx_standard"_a = __cplusplus / 100 % 100,
                  "isa"_a = py::make_tuple("baseline"), "torch_headers"_a = TORCH_VERSION,
                  "torch_abi"_a = abi_target(), "cuda_archs"_a = py::list());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // The ops register themselves with torch when the library is loaded; only this is for Python.
  m.def("build_info", &build_info, "How this library was built: compiler, ISA variants, torch.");
}
