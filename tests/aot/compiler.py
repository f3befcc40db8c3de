"""Compiles a kernel as its launch on a GPU would, and says what ptxas made of it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from partial_kernels._core.gpu import Launch

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.bool: "i1",
    torch.uint8: "u8",
}
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
"""Bytes of shared memory that one block of threads may have, by compute capability."""


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes."""

    ptx: str
    shared: int
    """Bytes of shared memory."""
    registers: int
    spilled: int
    """Bytes stored to and loaded from local memory for want of registers."""
    losses: list[str]
    """ptxas' codes of potential losses of performance: C7515 and its like serialise wgmma."""


def compiled(launch: Launch, capability: int, folder: Path) -> Compiled:
    """The kernel for these arguments: sizes and strides specialised as at run time."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    given = dict(zip(kernel.arg_names, launch.args, strict=False))
    values = {**given, **launch.constants, **launch.tile.sizes}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            aligned = True
        elif name in given and isinstance(value, int) and value != 1:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[name] = "constexpr"
            constants[(position,)] = value
            continue
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    target = GPUTarget("cuda", capability, 32)
    binary: Any = triton.compile(source, target=target, options=options)
    return Compiled(binary.asm["ptx"], binary.metadata.shared, *_ptxas(binary.asm["ptx"], folder))


def _ptxas(ptx: str, folder: Path) -> tuple[int, int, list[str]]:
    """Registers, bytes spilled, and the codes of losses that ptxas sees."""
    file = folder / "kernel.ptx"
    file.write_text(ptx)
    architecture = re.search(r"\.target (sm_\w+)", ptx)
    assert architecture is not None
    tool: Any = triton.knobs.nvidia  # pyright: ignore[reportAttributeAccessIssue]
    ptxas = tool.ptxas_blackwell if architecture[1].startswith("sm_10") else tool.ptxas
    command = [ptxas.path, "-v", f"-arch={architecture[1]}", file, "-o", folder / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None, said
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
    return int(registers[1]), spilled, re.findall(r"C75\d\d", said)
