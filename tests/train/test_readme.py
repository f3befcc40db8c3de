"""What README.md shows works as it stands there, and its numbers are those that come out."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from torch import nn

import partial_kernels as pk
from maskedtrain import MaskedLinear, SubNetwork, cli

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
IN_A_LOOP, OF_ANY_MODEL, IN_PLAIN_TORCH = PYTHON
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.startswith("maskedtrain ")
]
# The commands are the README's; only their training is cut short.
SHORT = {
    "train": ["--max-steps", "2"],
    "reproduce": ["--steps", "2", "--every", "1"],
    "bench": ["--families", "stats", "--training", "none"],
}


@pytest.mark.parametrize("code", [IN_A_LOOP, OF_ANY_MODEL], ids=["loop", "any-model"])
def test_the_code_runs_and_prints_its_numbers(code: str, capsys: pytest.CaptureFixture[str]):
    names: dict[str, object] = {}
    exec(compile(code, README.name, "exec"), names)
    (line,) = (line for line in code.splitlines() if line.startswith("print("))
    claimed = re.findall(r"\d+\.\d+", line.partition("#")[2])
    printed = [float(value) for value in capsys.readouterr().out.split()]
    assert [f"{value:.4f}" for value in printed] == claimed
    assert not any(isinstance(m, MaskedLinear) for m in cast(nn.Module, names["small"]).modules())


def test_masks_by_name_make_a_subnetwork():
    (code,) = re.findall(r"`(SubNetwork\(model, \{.*?\))`", TEXT)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = MaskedLinear(8, 128), MaskedLinear(128, 4)

    core = eval(code, {"SubNetwork": SubNetwork, "pk": pk, "model": Two()})
    assert core.numel() == 64 * 8 + 64 + 4 * 64 + 4


def test_the_commands_make_what_plain_torch_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert [command[0] for command in COMMANDS] == [
        *("doctor", "train", "train", "train", "eval", "extract", "train", "train"),
        *("reproduce", "reproduce", "bench"),
    ]
    for command in COMMANDS:
        if any("path/to/" in argument for argument in command):
            # There are no such data here; every option is right, then.
            with pytest.raises(SystemExit):
                cli.main(command)
            assert "no such file or folder: path/to/" in capsys.readouterr().err
        else:
            cli.main([*command, *SHORT.get(command[0], [])])
    blocked = 'import sys\nsys.modules["maskedtrain"] = sys.modules["partial_kernels"] = None\n'
    code = f"{blocked}{IN_PLAIN_TORCH}\nprint(*logits.shape)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "1 10\n"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT):
        assert (README.parent / target).exists(), target
    for path in re.findall(r"`(tests/\S+\.py)`", TEXT):
        assert (README.parent / path).exists(), path
