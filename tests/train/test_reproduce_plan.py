"""A plan's pieces are done once, whatever fails, stops or shares the folder."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from maskedtrain.files import OutputError
from maskedtrain.reproduce.plan import Result, Store, execute
from maskedtrain.training.console import Console
from maskedtrain.training.signals import Interrupted


@dataclass
class Work:
    """Counts how often it is done; raises what it is told to."""

    id: str
    kind: str = "some"
    raises: BaseException | None = None
    done: int = 0
    label: str = ""
    seconds: float = 60.0
    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.label = self.label or f"work {self.id}"

    def matches(self, result: Result) -> bool:
        return result["id"] == self.id

    def run(self, folder: Path, label: str, console: Console) -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint").write_text("half")
        self.labels.append(label)
        if self.raises is not None:
            raise self.raises
        self.done += 1
        return {"id": self.id, "seconds": self.seconds}


def run(pieces: list[Work], folder: Path, **options: Any) -> tuple[dict[str, str], str]:
    output = StringIO()
    failures = execute(pieces, Store(folder, **options), Console(output))
    return failures, output.getvalue()


def test_every_piece_is_done_once_and_what_is_done_stays_done(tmp_path: Path):
    pieces = [Work("a"), Work("b")]
    assert run(pieces, tmp_path)[0] == {}
    assert run(pieces, tmp_path)[0] == {}
    assert [piece.done for piece in pieces] == [1, 1]
    assert pieces[1].labels == ["[2/2] work b"]
    assert json.loads((tmp_path / "results" / "a.json").read_text())["id"] == "a"
    assert not (tmp_path / "work" / "a").exists()


def test_the_results_are_all_that_another_machine_needs(tmp_path: Path):
    run([Work("a")], tmp_path / "one")
    (tmp_path / "other").mkdir()
    (tmp_path / "one" / "results").rename(tmp_path / "other" / "results")
    pieces = [Work("a"), Work("b")]
    run(pieces, tmp_path / "other")
    assert [piece.done for piece in pieces] == [0, 1]


def test_work_is_kept_on_request(tmp_path: Path):
    run([Work("a")], tmp_path, keep_work=True)
    assert (tmp_path / "work" / "a" / "checkpoint").exists()


@pytest.mark.parametrize("contents", ['{"id": "a", "sec', '{"id": "b", "seconds": 1}', "[]"])
def test_a_file_that_is_no_result_of_the_piece_does_not_count(tmp_path: Path, contents: str):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text(contents)
    piece = Work("a")
    assert "a.json is damaged, or of other options: once more" in run([piece], tmp_path)[1]
    assert piece.done == 1
    assert "damaged" not in run([piece], tmp_path)[1]


def test_what_a_killed_process_left_of_a_piece_that_is_done_goes(tmp_path: Path):
    # As another process does it between this one's first look and its turn.
    class Late(Work):
        def matches(self, result: Result) -> bool:
            self.looks = getattr(self, "looks", 0) + 1
            return self.looks > 1

    run([Work("a")], tmp_path, keep_work=True)
    late = Late("a")
    run([late], tmp_path)
    assert late.done == 0
    assert not (tmp_path / "work" / "a").exists()


def test_a_failed_piece_is_reported_and_does_not_stop_the_rest(tmp_path: Path):
    pieces = [Work("a", raises=RuntimeError("the data\nare missing")), Work("b")]
    failures, output = run(pieces, tmp_path)
    assert failures == {"work a": "the data are missing"}
    assert "warning: work a failed: the data are missing" in output
    assert pieces[1].done == 1
    assert Store(tmp_path).failure(pieces[0]) == "the data are missing"
    # What it had written is there for the next try, which forgets the failure.
    assert (tmp_path / "work" / "a" / "checkpoint").exists()
    pieces[0].raises = None
    assert run(pieces, tmp_path)[0] == {}
    assert pieces[0].done == 1
    assert Store(tmp_path).failure(pieces[0]) is None


def test_a_piece_that_failed_in_another_process_of_now_is_not_tried_again(tmp_path: Path):
    store, piece = Store(tmp_path), Work("a", raises=RuntimeError("no"))
    execute([piece], store, Console(StringIO()))
    again = Work("a")
    assert execute([again], store, Console(StringIO())) == {"work a": "no"}
    assert again.done == 0


def test_a_signal_ends_the_plan_and_leaves_the_work_to_go_on_with(tmp_path: Path):
    pieces = [Work("a", raises=Interrupted(signal.SIGINT, "stopped at step 3")), Work("b")]
    with pytest.raises(Interrupted, match="stopped in work a; the same command goes on") as stop:
        run(pieces, tmp_path)
    assert stop.value.signum == signal.SIGINT
    assert pieces[1].done == 0
    assert (tmp_path / "work" / "a" / "checkpoint").exists()
    pieces[0].raises = None
    assert run(pieces, tmp_path)[0] == {}


def test_ctrl_c_outside_a_training_ends_the_plan_likewise(tmp_path: Path):
    with pytest.raises(Interrupted, match="stopped in work a; the same command goes on"):
        run([Work("a", raises=KeyboardInterrupt())], tmp_path)


def test_what_cannot_be_written_ends_the_plan(tmp_path: Path):
    pieces = [Work("a", raises=OutputError(28, "No space left on device", "here")), Work("b")]
    with pytest.raises(OutputError, match="cannot write here: No space left"):
        run(pieces, tmp_path)
    assert pieces[1].done == 0


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*(Not a directory|File exists)"):
        run([Work("a")], tmp_path / "file")


def test_what_is_left_is_told_by_pieces_of_the_same_kind(tmp_path: Path):
    pieces = [Work("a", "x", seconds=90), Work("b", "x"), Work("c", "x"), Work("d", "y")]
    _, output = run(pieces, tmp_path)
    lines = [line for line in output.splitlines() if line.startswith("[")]
    assert lines == [
        "[1/4] work a; 4 runs left",
        "[2/4] work b; 3 runs left, 3:00 of work, and 1 runs of unknown length",
        "[3/4] work c; 2 runs left, 1:15 of work, and 1 runs of unknown length",
        "[4/4] work d; 1 runs left",
    ]
    assert "4 of 4 runs are done already" in run(pieces, tmp_path)[1]


# Does twelve pieces, telling of each in a file, and pauses within each.
SHARER = """
import sys, time
from pathlib import Path
from maskedtrain.reproduce.plan import Store, execute
from maskedtrain.training.console import Console
folder, name = Path(sys.argv[1]), sys.argv[2]

class Work:
    kind = "some"
    def __init__(self, id): self.id = self.label = id
    def matches(self, result): return result["id"] == self.id
    def run(self, folder_, label, console):
        with open(folder / "told", "a") as file: file.write(f"{self.id} {name}\\n")
        time.sleep(0.2)
        return {"id": self.id, "seconds": 0.2}

(folder / name).touch()
while len(list(folder.glob("ready*"))) < 2: time.sleep(0.01)
assert execute([Work(f"w{i}") for i in range(12)], Store(folder / "plan"), Console()) == {}
assert len(list((folder / "plan" / "results").iterdir())) == 12
"""


def test_two_processes_share_a_plan(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(SHARER), str(tmp_path)]
    processes = [subprocess.Popen([*command, f"ready{i}"]) for i in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    told = [line.split() for line in (tmp_path / "told").read_text().splitlines()]
    assert sorted(piece for piece, _ in told) == sorted(f"w{i}" for i in range(12))
    assert {name for _, name in told} == {"ready0", "ready1"}


HOLDER = """
import sys, time
from pathlib import Path
from maskedtrain.reproduce.plan import Store

class Work:
    id = "a"

with Store(Path(sys.argv[1])).claimed(Work()) as ours:
    print(ours, flush=True)
    time.sleep(60)
"""


def test_a_piece_is_free_again_when_its_process_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with Store(tmp_path).claimed(Work("a")) as ours:
            assert not ours
        process.kill()
    with Store(tmp_path).claimed(Work("a")) as ours:
        assert ours
