"""say what is installed and which backends run, and check them"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import partial_kernels as pk
from maskedtrain.commands._options import parse
from maskedtrain.training.console import Console
from partial_kernels._core import crossovers, discovery
from partial_kernels._core.tables import device_name
from partial_kernels._core.testing import assert_within_budget, assert_zero_outside
from partial_kernels._native import cuda_status, native_status

_OPTIONAL = ("triton", "scikit-learn", "matplotlib", "tensorboard", "tokenizers", "sacrebleu")


@dataclass(frozen=True)
class Options:
    """Say what is installed and which backends run, and check them."""


def main(arguments: Sequence[str], console: Console) -> None:
    parse(Options, arguments, command="doctor")
    for name, text in _lines():
        console.print(f"{name:<16} {text}")
    console.print()
    for device in _devices():
        _check(device)
        console.print(f"self-check       {device}: masked results equal the dense computation's")


def _lines() -> Iterator[tuple[str, str]]:
    yield "maskedtrain", pk.__version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads, CPU {_cpu()}"
    yield "CUDA", _cuda()
    native = native_status()
    if native.info is not None:
        yield "compiled library", _library(native.info)
    if (cuda := cuda_status()).info is not None:
        yield "CUDA library", cuda.info["built"]
    yield from discovery.unavailable().items()
    for package in _OPTIONAL:
        yield package, _version(package)
    yield "crossovers", "; ".join(map(_crossovers, _devices()))
    yield "kernel families", ", ".join(discovery.families())


def _devices() -> list[torch.device]:
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [torch.device(kind) for kind in kinds]


def _crossovers(device: torch.device) -> str:
    """Which tables say where the dense product is faster there; one that is damaged is an error."""
    files = crossovers.TABLES.files(device_name(device))
    for file in files:
        crossovers.TABLES.read(file)
    return f"{device}: {', '.join(map(str, files)) or 'as shipped'}"


def _library(info: dict[str, Any]) -> str:
    isas = ", ".join(info["isas"])
    return (
        f"{info['compiler']}, C++{info['cxx_standard']}; for torch >= {info['torch_abi']}, with "
        f"headers of {info['torch_headers']}; CPU code {info['isa']} (of {isas})"
    )


def _cpu() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" if torch.version.cuda else "this torch is built without it"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{torch.version.cuda}: {', '.join(names)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _check(device: torch.device) -> None:
    """Forward and gradient of a masked layer against the dense one with zeros; raises if they
    differ.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 40, generator=generator).to(device)
    masks: list[pk.Mask] = [
        pk.Element(torch.rand(48, 40, generator=generator) < 0.5),
        pk.Block(torch.rand(3, 3, generator=generator) < 0.5, 16),
        pk.Prefix(32, 16),
        pk.Index(list(range(0, 48, 3)), list(range(1, 40, 2))),
    ]
    try:
        for mask in masks:
            _check_mask(mask, weight, generator)
    except AssertionError as error:
        raise RuntimeError(f"self-check failed on {device}: {error}") from error


def _check_mask(mask: pk.Mask, weight: torch.Tensor, generator: torch.Generator) -> None:
    part = mask.restrict(weight)
    x = torch.randn(64, part.shape[1], generator=generator).to(weight.device)
    dy = torch.randn(64, part.shape[0], generator=generator).to(weight.device)
    trained = weight.clone().requires_grad_()
    y = pk.masked_linear(x, trained, mask=mask)
    y.backward(dy)
    assert trained.grad is not None
    assert_within_budget(y, F.linear(x, part), F.linear(x.double(), part.double()), what=f"{mask}")
    dense = mask.dense(weight.shape, weight.device)
    assert_zero_outside(trained.grad, dense, what=f"gradient of {mask}")
    # Off a mask that is not compact the dense gradient is not zero: compare inside alone.
    inside = mask.restrict(dense)
    budget = (dy.T @ x) * inside, (dy.double().T @ x.double()) * inside
    assert_within_budget(mask.restrict(trained.grad), *budget, what=f"gradient of {mask}")
