import pytest

from partial_kernels._native import native_status

status = native_status()


@pytest.mark.skipif(not status.available, reason=f"no compiled library: {status.reason}")
def test_info_says_how_the_library_was_built() -> None:
    info = status.info
    assert info is not None
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["cxx_standard"] >= 20
    assert info["isa"][0] == "baseline"
    assert info["torch_abi"] == "2.11"
    assert tuple(map(int, info["torch_headers"].split(".")[:2])) >= (2, 11)
    assert info["cuda_archs"] == []
