"""The code that the documents show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from maskedtrain.methods import configs

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = {
    f"{path.relative_to(DOCS).with_suffix('')}-{number}": code
    for path in sorted(DOCS.rglob("*.md"))
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    )
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_runs(name: str) -> None:
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_every_method_has_a_page_and_a_row() -> None:
    """The page shows a stock loop, which ``test_the_code_runs`` runs, and the command."""
    table = (DOCS / "methods.md").read_text()
    for name in configs():
        page = (DOCS / "methods" / f"{name}.md").read_text()
        assert "optimizer.step(plan.update, lr_scale=plan.lr_scale)" in page, name
        assert "maskedtrain train" in page, name
        assert f"(methods/{name}.md)" in table, name
