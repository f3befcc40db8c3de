"""Builds partial_kernels._C and, where torch has CUDA and nvcc is there, partial_kernels._C_cuda
from csrc/ with ninja; everything else is in pyproject.toml.

Where that fails, pure Python is installed and partial_kernels/_C_failure.txt says why, or
_C_cuda_failure.txt. PARTIAL_KERNELS_BUILD=0 skips the native build, PARTIAL_KERNELS_BUILD=require
makes failure fatal. PARTIAL_KERNELS_CUDA_ARCHS lists what is compiled for, NVCC the compiler.
"""

import os
import re
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from shutil import which
from sysconfig import get_path

from setuptools import Extension, errors, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("PARTIAL_KERNELS_BUILD", "1")
ARCHITECTURES = os.environ.get("PARTIAL_KERNELS_CUDA_ARCHS", "80;90;100").split(";")
NVCC = os.environ.get("NVCC", "nvcc")


def sources(*patterns: str) -> list[str]:
    return [str(path) for pattern in patterns for path in sorted(Path("csrc").glob(pattern))]


# By library: the suffix of the rules it is built by, and what it is built from.
LIBRARIES = {
    "partial_kernels._C": ("", sources("*.cpp", "cpu/*.cpp")),
    "partial_kernels._C_cuda": ("_cuda", sources("cuda/*.cu")),
}


def find_torch() -> Path | None:
    """Folder of an installed torch >= 2.11: headers and libraries only, nothing is imported."""
    # pip's build isolation hides the environment it installs into; sysconfig still names it.
    for spec in (find_spec("torch"), PathFinder.find_spec("torch", [get_path("platlib")])):
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            header = root / "include/torch/csrc/stable/version.h"
            if header.exists() and "TORCH_VERSION_2_11_0" in header.read_text():
                return root
    return None


def without_cuda() -> str | None:
    """Why there can be no CUDA library."""
    torch = find_torch()
    version = (torch / "version.py").read_text() if torch else ""
    if not re.search(r"^cuda\b.*= *['\"]", version, re.MULTILINE):
        return "torch is built without CUDA"
    return None if which(NVCC) else f"there is no {NVCC} on the PATH"


def compile_library(filename: str, rules: str, files: list[str]) -> Path:
    """Bring build/native/filename up to date, compiling only what changed."""
    import pybind11

    if (torch := find_torch()) is None:
        raise errors.CompileError("no torch >= 2.11 to build against")
    paths = {"torch": torch, "pybind11": pybind11.get_include(), "python": get_path("include")}
    variables = {name: quote(str(path)) for name, path in paths.items()}
    variables |= {k: os.environ[k] for k in ("CXX", "CXXFLAGS", "LDFLAGS") if k in os.environ}
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    # Of the last also what later devices compile for themselves.
    codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
    variables |= {"NVCC": NVCC, "codes": " ".join(codes), "archs": "_".join(ARCHITECTURES)}
    objects = {f"build/native/{Path(source).with_suffix('.o')}": source for source in files}
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    lines += [f"build {name}: compile{rules} {source}" for name, source in objects.items()]
    lines += [f"build build/native/{filename}: link{rules} {' '.join(objects)}"]
    script = Path(f"build/native/build{rules}.ninja")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("\n".join(["include csrc/rules.ninja", *lines, ""]))
    status, output = subprocess.getstatusoutput(f"{quote(sys.executable)} -m ninja -f {script}")
    print(output)
    if status:
        raise errors.CompileError("\n".join(["compiling failed:", *output.splitlines()[-20:]]))
    return script.with_name(filename)


class BuildNative(build_ext):
    def run(self) -> None:
        self.extensions = [one for one in self.extensions if self.build_one(one.name)]

    def build_one(self, name: str) -> bool:
        """Whether the library is there afterwards."""
        library = Path(self.get_ext_fullpath(name))
        failure = library.with_name(f"{name.rpartition('.')[2]}_failure.txt")
        # Nothing of an earlier build may outlive this one.
        library.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)
        rules, files = LIBRARIES[name]
        try:
            if MODE == "0":
                raise errors.CompileError("switched off by PARTIAL_KERNELS_BUILD=0")
            if rules and (why := without_cuda()):
                failure.write_text(f"{why}\n", encoding="utf-8")
                return False
            self.copy_file(str(compile_library(library.name, rules, files)), str(library))
        except (errors.CompileError, ImportError, OSError) as error:
            if MODE == "require":
                raise
            failure.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"{name} is missing, and with it its compiled kernels, see {failure}")
            return False
        return True


setup(
    ext_modules=[Extension(name, files) for name, (_, files) in LIBRARIES.items()],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if MODE == "0" or find_torch() else ["torch>=2.11"],
)
