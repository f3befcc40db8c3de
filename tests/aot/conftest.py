"""Triton kernels compiled for GPUs that are not there."""

from __future__ import annotations

import os
from importlib.util import find_spec

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
