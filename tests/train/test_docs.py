"""The code that the documents show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = {
    f"{path.stem}-{number}": code
    for path in sorted(DOCS.glob("*.md"))
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    )
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_runs(name: str) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_every_method_is_in_the_table() -> None:
    from maskedtrain.methods import configs

    text = (DOCS / "methods.md").read_text().lower()
    for name in configs():
        assert f"`{name}" in text or f"`layer{name}" in text, name
