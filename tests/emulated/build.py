"""Builds the CUDA kernels for the CPU: ``python -m tests.emulated.build LIBRARY``.

They run in an emulation of CUDA's device language (``emulated.h``), as a library that
``PARTIAL_KERNELS_EMULATED`` names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shlex import split

import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent


FLAGS = split(
    "-std=c++20 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas "
    "-Wno-clobbered -DPK_EMULATED -DTORCH_TARGET_VERSION=0x020b000000000000"
)


def main(library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    folder = library.parent
    folder.mkdir(parents=True, exist_ok=True)
    headers = [*HERE.glob("*.h"), *ROOT.glob("csrc/common/*.h"), *ROOT.glob("csrc/cuda/*.h")]
    newest = max(path.stat().st_mtime for path in headers)
    compile_one = [
        *split(os.environ.get("CXX", "c++")),
        *FLAGS,
        *(f"-I{ROOT / name}" for name in ("csrc", "csrc/cuda", "tests/emulated")),
        *("-isystem", torch_root / "include"),
        *split(os.environ.get("CXXFLAGS", "")),
    ]
    objects: list[Path] = []
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        made = folder / f"{source.stem}.o"
        objects.append(made)
        if made.exists() and made.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        subprocess.run([*compile_one, "-x", "c++", "-c", source, "-o", made], check=True)
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    link = [*split(os.environ.get("CXX", "c++")), "-shared", *objects, "-o", library, *libraries]
    subprocess.run([*link, *split(os.environ.get("LDFLAGS", ""))], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
