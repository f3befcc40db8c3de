"""What a build leaves behind, with and without a compiler or torch; no network is needed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

from partial_kernels import __version__

ROOT = Path(__file__).parents[2]
LIBRARY = f"partial_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
FAILURE = "partial_kernels/_C_failure.txt"
CUDA_LIBRARY = LIBRARY.replace("_C", "_C_cuda")
CUDA_FAILURE = "partial_kernels/_C_cuda_failure.txt"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))[0]

needs_compiler = pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} not found")


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    defaults = {"PARTIAL_KERNELS_BUILD": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **defaults, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def build(project: Path, out: Path, **env: str) -> subprocess.CompletedProcess[str]:
    offline = ("--no-index", "--no-build-isolation", "--no-deps", "--verbose")
    return run(sys.executable, "-m", "pip", "wheel", *offline, "-w", out, ".", cwd=project, **env)


def unpack(wheels: Path) -> Path:
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheels)
    return wheels


def status(package_root: Path) -> dict[str, str]:
    """native_status() of the packages in this folder, in a process of their own."""
    script = (
        "import dataclasses, json, partial_kernels as pk; from partial_kernels import _native\n"
        "print(json.dumps(dataclasses.asdict(_native.native_status()) | {'file': pk.__file__}))"
    )
    # Without site, the finder of an editable install cannot lend its own library.
    torch_site = sysconfig.get_path("platlib")
    done = run(sys.executable, "-S", "-c", script, cwd=package_root, PYTHONPATH=torch_site)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(package_root)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, not of what was built from them, in a path with a space."""
    folder = tmp_path_factory.mktemp("new comer")
    built = shutil.ignore_patterns("__pycache__", "_C*", "*.egg-info")
    for name in ("csrc", "partial_kernels", "python", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def native(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of a build that succeeded."""
    out = tmp_path_factory.mktemp("native")
    done = build(project, out, PARTIAL_KERNELS_BUILD="require")
    assert done.returncode == 0, done.stdout + done.stderr
    return unpack(out)


@needs_compiler
def test_wheel_holds_both_packages_and_the_library(native: Path) -> None:
    files = {str(path.relative_to(native)) for path in native.rglob("*") if path.is_file()}
    tops = {name.split("/")[0] for name in files if not name.endswith(".whl")}
    assert tops == {"partial_kernels", "maskedtrain", f"maskedtrain-{__version__}.dist-info"}
    for root in (ROOT, ROOT / "python"):
        for package in ("partial_kernels", "maskedtrain"):
            sources = {str(path.relative_to(root)) for path in root.glob(f"{package}/**/*.py")}
            assert sources <= files
    assert {LIBRARY, "partial_kernels/py.typed", "maskedtrain/py.typed"} <= files
    assert "maskedtrain/reproduce/report.html.jinja" in files
    assert FAILURE not in files
    assert not [name for name in files if name.endswith((".o", ".cpp", ".h", ".ninja"))]


@needs_compiler
def test_library_of_the_wheel_loads(native: Path) -> None:
    found = status(native)
    assert found["available"], found["reason"]


@needs_compiler
def test_library_that_does_not_load_is_a_reason(native: Path, tmp_path: Path) -> None:
    shutil.copytree(native / "partial_kernels", tmp_path / "partial_kernels")
    (tmp_path / LIBRARY).write_bytes(b"not a library")
    found = status(tmp_path)
    assert not found["available"]
    assert "does not load" in found["reason"]


@needs_compiler
def test_neither_library_nor_failure_outlives_the_next_build(project: Path, native: Path) -> None:
    library, failure = project / LIBRARY, project / FAILURE

    def build_in_place(**env: str) -> tuple[bool, bool]:
        done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **env)
        assert done.returncode == 0, done.stderr
        return library.exists(), failure.exists()

    assert build_in_place() == (True, False)
    assert build_in_place(CXX="/bin/false") == (False, True)
    assert build_in_place() == (True, False)
    library.unlink()


@needs_compiler
def test_only_what_changed_is_compiled(project: Path, native: Path) -> None:
    op, header = project / "csrc/cpu/index_check.cpp", project / "csrc/common/touched.h"
    header.parent.mkdir(exist_ok=True)
    header.touch()
    op.write_text('#include "common/touched.h"\n' + op.read_text())

    def compiled() -> list[str]:
        done = run(sys.executable, "setup.py", "build_ext", cwd=project)
        assert done.returncode == 0, done.stderr
        return [line.split()[-1] for line in done.stdout.splitlines() if "] compile " in line]

    assert compiled() == ["csrc/cpu/index_check.cpp"]
    assert compiled() == []
    header.write_text("// changed\n")
    assert compiled() == ["csrc/cpu/index_check.cpp"]


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "/bin/false"}, "compile csrc/module.cpp"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler"),
        ({"PARTIAL_KERNELS_BUILD": "0"}, "switched off by PARTIAL_KERNELS_BUILD=0"),
    ],
)
def test_pure_wheel_says_why(
    project: Path, tmp_path: Path, env: dict[str, str], reason: str
) -> None:
    done = build(project, tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("partial_kernels._C is missing") == 1
    wheel = unpack(tmp_path)
    assert not (wheel / LIBRARY).exists()
    found = status(wheel)
    assert not found["available"]
    assert reason in found["reason"]


def test_cuda_library_is_built_where_torch_has_cuda_and_nvcc_is(
    project: Path, tmp_path: Path
) -> None:
    # What setup.py sees of a torch with CUDA, and a compiler that says what it was asked for.
    torch = Path(sysconfig.get_path("platlib"), "torch")
    site, asked, nvcc = tmp_path / "torch", tmp_path / "asked", tmp_path / "nvcc"
    site.mkdir()
    (site / "__init__.py").touch()
    (site / "include").symlink_to(torch / "include")
    nvcc.write_text(
        f'#!/bin/sh\necho "$@" >> {asked}\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
    )
    nvcc.chmod(0o755)

    def built(cuda: str, nvcc: Path) -> str:
        (site / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
        env = {"PYTHONPATH": str(tmp_path), "NVCC": str(nvcc), "CXX": "/bin/false"}
        done = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=project, **env)
        assert done.returncode == 0, done.stderr
        library, failure = project / CUDA_LIBRARY, project / CUDA_FAILURE
        assert library.exists() != failure.exists()
        return "" if library.exists() else failure.read_text().strip()

    assert built("None", nvcc) == "torch is built without CUDA"
    assert built("'13.0'", tmp_path / "none") == f"there is no {tmp_path / 'none'} on the PATH"
    assert built("'13.0'", Path("/bin/false")).startswith("compiling failed:")
    assert not asked.exists()
    assert built("'13.0'", nvcc) == ""
    *compiled, linked = asked.read_text().splitlines()
    assert {command.split("-c ")[1].split()[0] for command in compiled} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.cu")
    }
    for code in ("compute_80,code=sm_80", "compute_90,code=sm_90", "compute_100,code=compute_100"):
        assert all(f"-gencode=arch={code}" in command for command in compiled)
    assert "-ltorch_cuda" in linked
    (project / CUDA_LIBRARY).unlink()


def test_required_library_fails_the_build(project: Path, tmp_path: Path) -> None:
    done = build(project, tmp_path, CXX="/bin/false", PARTIAL_KERNELS_BUILD="require")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))


def test_torch_is_a_build_requirement_only_where_it_is_missing(
    project: Path, tmp_path: Path
) -> None:
    # As in pip's isolated build: setuptools is there, the environment's packages are hidden.
    environment, isolated = tmp_path / "environment", tmp_path / "isolated"
    venv.create(environment)
    isolated.mkdir()
    packages = Path(setuptools.__file__).parents[1]
    for path in (*packages.glob("setuptools*"), packages / "_distutils_hack"):
        (isolated / path.name).symlink_to(path)
    (isolated / "sitecustomize.py").write_text(
        "import sys, sysconfig\n"
        "hidden = sysconfig.get_path('platlib')\n"
        "sys.path[:] = [path for path in sys.path if path != hidden]\n"
    )

    def requirements(mode: str) -> list[str]:
        script = (
            "import json, setuptools.build_meta as backend\n"
            "print(json.dumps(backend.get_requires_for_build_wheel()))"
        )
        python = environment / "bin/python"
        env = {"PYTHONPATH": str(isolated), "PARTIAL_KERNELS_BUILD": mode}
        done = run(python, "-c", script, cwd=project, **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert requirements("1") == ["torch>=2.11"]
    assert requirements("0") == []
    (site,) = environment.glob("lib/python*/site-packages")
    header = site / "torch/include/torch/csrc/stable/version.h"
    header.parent.mkdir(parents=True)
    (site / "torch/__init__.py").touch()
    header.write_text("#define TORCH_VERSION_2_10_0\n")
    assert requirements("1") == ["torch>=2.11"]
    header.write_text("#define TORCH_VERSION_2_11_0\n")
    assert requirements("1") == []
