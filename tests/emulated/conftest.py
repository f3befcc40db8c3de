"""CUDA kernels emulated on the CPU, from a library that ``PARTIAL_KERNELS_EMULATED`` names:
``python -m tests.emulated.build`` makes it. They take CPU tensors there, so that these tests need a
session of their own.
"""

from __future__ import annotations

import os

if "PARTIAL_KERNELS_EMULATED" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
