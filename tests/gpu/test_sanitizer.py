"""No kernel reads or writes outside its tensors, says compute-sanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from tests.gpu import sanitized
from tests.gpu.toolbox import DRY_RUN

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
TOOL = which("compute-sanitizer") or which("compute-sanitizer", path="/usr/local/cuda/bin")
# What is asked of the driver and not there is no error of ours.
OPTIONS = ("--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9")


def test_no_access_outside_of_a_tensor() -> None:
    if DRY_RUN:
        sanitized.main()
        return
    if TOOL is None:
        pytest.skip("there is no compute-sanitizer")
    # With torch's cache of memory, what lies behind a tensor would be torch's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [TOOL, *OPTIONS, sys.executable, "-m", "tests.gpu.sanitized"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=130
        )
    except subprocess.TimeoutExpired as slow:
        pytest.skip(f"compute-sanitizer took over {slow.timeout:.0f} s")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
