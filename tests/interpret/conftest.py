"""Triton kernels interpreted on the CPU: ``TRITON_INTERPRET=1 pytest tests/interpret``.

Triton reads the variable when it is imported, so that these tests need a session of their own.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
