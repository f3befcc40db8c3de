"""partial_kernels::first_unsorted, the C++ op, against the same question asked in PyTorch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partial_kernels._native import native_status

status = native_status()
pytestmark = pytest.mark.skipif(
    not status.available, reason=f"no compiled library: {status.reason}"
)


def native(index: torch.Tensor, upper: int) -> int:
    return torch.ops.partial_kernels.first_unsorted(index, upper)


def reference(index: torch.Tensor, upper: int) -> int:
    wrong = (index < 0) | (index >= upper)
    wrong[1:] |= index[1:] <= index[:-1]
    return int(wrong.nonzero()[0]) if wrong.any() else -1


def test_the_library_answers_for_cpu_tensors() -> None:
    op = "partial_kernels::first_unsorted"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


any_list = st.lists(st.integers(-2, 12), max_size=12)
sorted_list = st.lists(st.integers(0, 30), max_size=12, unique=True).map(sorted)


@given(
    elements=any_list | sorted_list,
    upper=st.integers(0, 32),
    stride=st.integers(1, 3),
    offset=st.integers(0, 2),
)
def test_equals_reference_at_any_stride(
    elements: list[int], upper: int, stride: int, offset: int
) -> None:
    storage = torch.full((offset + stride * len(elements),), -7)
    index = storage[offset::stride]
    index.copy_(torch.tensor(elements, dtype=torch.int64))
    assert native(index, upper) == reference(index, upper)


@pytest.mark.parametrize(
    ("elements", "upper", "position"),
    [
        ([], 0, -1),
        ([0, 1, 2], 3, -1),
        ([0, 1, 2], 2, 2),
        ([-1, 0], 3, 0),
        ([0, 2, 2], 3, 2),
        ([0, 2, 1], 3, 2),
        ([0, 2**63 - 1], 2**63 - 1, 1),
        ([-(2**63)], 2**63 - 1, 0),
    ],
)
def test_position(elements: list[int], upper: int, position: int) -> None:
    assert native(torch.tensor(elements, dtype=torch.int64), upper) == position


def test_expanded_index_repeats_its_element() -> None:
    assert native(torch.zeros(1, dtype=torch.int64).expand(4), 1) == 1


def test_column_of_a_matrix() -> None:
    assert native(torch.arange(12).reshape(4, 3)[:, 1], 11) == -1


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "index must be 1-D, got 2-D"),
        (torch.zeros(2, dtype=torch.int32), "index must be int64, got Int"),
        (torch.zeros(2), "index must be int64, got Float"),
    ],
)
def test_wrong_shape_or_dtype(index: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        native(index, 3)
