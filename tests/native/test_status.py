import importlib
import os
import subprocess
import sys

import pytest

from partial_kernels._native import native_status

status = native_status()


@pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}")
def test_info_says_how_the_library_was_built() -> None:
    info = status.info
    assert info is not None
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["cxx_standard"] >= 20
    assert info["isas"][0] == "portable"
    assert info["isa"] == os.environ.get("PARTIAL_KERNELS_ISA", info["isas"][-1])
    assert info["torch_abi"] == "2.11"
    assert tuple(map(int, info["torch_headers"].split(".")[:2])) >= (2, 11)


@pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}")
def test_the_isa_can_be_chosen() -> None:
    library = importlib.import_module("partial_kernels._C")
    isas, first = library.build_info()["isas"], library.isa()
    for name in isas:
        library.set_isa(name)
        assert library.isa() == name
    with pytest.raises(ValueError, match=r"this processor runs .*'portable'.*, got 'neon'"):
        library.set_isa("neon")
    assert library.isa() == isas[-1]
    library.set_isa(first)


@pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}")
@pytest.mark.parametrize("wanted", ["portable", "neon"])
def test_the_environment_chooses_the_isa_or_the_library_does_not_load(wanted: str) -> None:
    program = (
        "from partial_kernels._native import native_status as s; print(s().reason or s().info)"
    )
    environment = {**os.environ, "PARTIAL_KERNELS_ISA": wanted}
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    expected = {"portable": "'isa': 'portable'", "neon": "PARTIAL_KERNELS_ISA: this processor"}
    assert expected[wanted] in found.stdout


_OUTDATED = """
import warnings
import torch

complete = torch._ops._OpNamespace.__getattr__

def without_one(self, name):
    if name == "topk_select_cpu":
        raise AttributeError(name)
    return complete(self, name)

torch._ops._OpNamespace.__getattr__ = without_one
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import partial_kernels as pk
print([str(one.message) for one in caught])
print(pk.explain("topk_select", torch.ones(2, 3), 1))
print(pk.explain("masked_linear", torch.ones(2, 3), torch.ones(4, 3), mask=pk.Index([1])).backend)
"""


@pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}")
def test_a_library_older_than_a_kernel_is_a_reason() -> None:
    command = [sys.executable, "-c", _OUTDATED]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    warning, *choice, other = found.splitlines()
    missing = "the compiled library is older than the package and has no topk_select_cpu"
    assert f"partial_kernels.select: {missing}" in warning
    assert choice[0] == "topk_select: reference"
    assert f"  not native: {missing}; run `pip install -e .`" in choice
    assert other == "native"
