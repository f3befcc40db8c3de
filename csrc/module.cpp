#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include <cstdlib>
#include <string>

#include "common/isa.h"

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

using partial_kernels::Isa;

py::list isas() {
  py::list names;
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (partial_kernels::has_isa(isa)) names.append(partial_kernels::isa_names[int(isa)]);
  return names;
}

const char* isa() { return partial_kernels::isa_names[int(partial_kernels::isa())]; }

void set_isa(const std::string& name) {
  for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512})
    if (name == partial_kernels::isa_names[int(isa)] && partial_kernels::set_isa(isa)) return;
  throw py::value_error("this processor runs " + py::str(isas()).cast<std::string>() + ", got '" +
                        name + "'");
}

py::dict build_info() {
  using namespace py::literals;
  return py::dict("compiler"_a = compiler(), "cxx_standard"_a = __cplusplus / 100 % 100,
                  "isas"_a = isas(), "isa"_a = isa(), "torch_headers"_a = TORCH_VERSION,
                  "torch_abi"_a = abi_target());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  // The ops register themselves with torch when the library is loaded; only this is for Python.
  m.def("build_info", &build_info, "How this library was built: compiler, ISA variants, torch.");
  m.def("isa", &isa, "The instructions in use.");
  m.def("set_isa", &set_isa, "Use those of this name, in every thread; build_info lists them.");
  if (const char* wanted = std::getenv("PARTIAL_KERNELS_ISA"); wanted && *wanted) {
    try {
      set_isa(wanted);
    } catch (const std::exception& error) {
      throw py::import_error(std::string("PARTIAL_KERNELS_ISA: ") + error.what());
    }
  }
}
