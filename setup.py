"""Builds partial_kernels._C from csrc/ with ninja; everything else is in pyproject.toml.

Where that fails, pure Python is installed and partial_kernels/_build_failure.txt says why.
PARTIAL_KERNELS_BUILD=0 skips the native build, PARTIAL_KERNELS_BUILD=require makes failure fatal.
"""

import os
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from sysconfig import get_path

from setuptools import Extension, errors, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("PARTIAL_KERNELS_BUILD", "1")
SOURCES = ["csrc/module.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]


def find_torch() -> Path | None:
    """Folder of an installed torch >= 2.11: headers and libraries only, nothing is imported."""
    # pip's build isolation hides the environment it installs into; sysconfig still names it.
    for spec in (find_spec("torch"), PathFinder.find_spec("torch", [get_path("platlib")])):
        for root in map(Path, (spec and spec.submodule_search_locations) or ()):
            header = root / "include/torch/csrc/stable/version.h"
            if header.exists() and "TORCH_VERSION_2_11_0" in header.read_text():
                return root
    return None


def compile_library(filename: str) -> Path:
    """Bring build/native/filename up to date, compiling only what changed."""
    import pybind11

    if (torch := find_torch()) is None:
        raise errors.CompileError("no torch >= 2.11 to build against")
    paths = {"torch": torch, "pybind11": pybind11.get_include(), "python": get_path("include")}
    variables = {name: quote(str(path)) for name, path in paths.items()}
    variables |= {k: os.environ[k] for k in ("CXX", "CXXFLAGS", "LDFLAGS") if k in os.environ}
    objects = {f"build/native/{Path(source).with_suffix('.o')}": source for source in SOURCES}
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    lines += [f"build {name}: compile {source}" for name, source in objects.items()]
    lines += [f"build build/native/{filename}: link {' '.join(objects)}"]
    script = Path("build/native/build.ninja")
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("\n".join(["include csrc/rules.ninja", *lines, ""]))
    status, output = subprocess.getstatusoutput(f"{quote(sys.executable)} -m ninja -f {script}")
    print(output)
    if status:
        raise errors.CompileError("\n".join(["compiling failed:", *output.splitlines()[-20:]]))
    return script.with_name(filename)


class BuildNative(build_ext):
    def run(self) -> None:
        library = Path(self.get_ext_fullpath("partial_kernels._C"))
        failure = library.with_name("_build_failure.txt")
        # Nothing of an earlier build may outlive this one.
        library.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)
        try:
            if MODE == "0":
                raise errors.CompileError("switched off by PARTIAL_KERNELS_BUILD=0")
            self.copy_file(str(compile_library(library.name)), str(library))
        except (errors.CompileError, ImportError, OSError) as error:
            if MODE == "require":
                raise
            failure.write_text(f"{error}\n", encoding="utf-8")
            self.extensions = []
            self.warn(f"partial_kernels comes without its compiled library, see {failure}")


setup(
    ext_modules=[Extension("partial_kernels._C", SOURCES)],
    cmdclass={"build_ext": BuildNative},
    setup_requires=[] if MODE == "0" or find_torch() else ["torch>=2.11"],
)
