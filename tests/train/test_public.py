"""``import maskedtrain``: its names, its version, what it does not load."""

from __future__ import annotations

import subprocess
import sys

import maskedtrain
import partial_kernels


def test_public_names_are_there() -> None:
    expected = {"MaskedConv2d", "MaskedLinear", "SubNetwork", "SwitchNorm", "Trainer"}
    expected |= {"LFCLinear", "PackedLinear", "TopKLinear"}
    assert expected | {"__version__"} <= set(maskedtrain.__all__)
    for name in maskedtrain.__all__:
        assert hasattr(maskedtrain, name), name


def test_there_is_one_version() -> None:
    assert maskedtrain.__version__ is partial_kernels.__version__


def test_import_is_light() -> None:
    code = "import sys, maskedtrain; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"maskedtrain", "partial_kernels", "torch"} <= loaded
    heavy = {"matplotlib", "tyro", "rich", "sklearn", "safetensors", "tensorboard"}
    assert heavy & loaded == set()
