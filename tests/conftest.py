"""Shared by every test."""

from __future__ import annotations

from hypothesis import settings

# A first example pays for lazy imports and compilation; time limits are the runner's business.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
