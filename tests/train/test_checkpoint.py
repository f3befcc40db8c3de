"""A checkpoint is complete and exact or it is not used, and no failure harms an earlier one."""

from __future__ import annotations

import collections
import enum
import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskedtrain import files
from maskedtrain.files import OutputError, atomic_write
from maskedtrain.training.checkpoint import Checkpoint, CheckpointError, Checkpoints

FILES = ["weights.safetensors", "state.pt", "manifest.json"]


def content(step: int) -> tuple[dict[str, torch.Tensor], dict]:
    generator = torch.Generator().manual_seed(step)
    weights = {"fc.weight": torch.randn(7, 5, generator=generator), "fc.bias": torch.ones(7) * step}
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.randn(7, 5, generator=generator)}
    return weights, {"optimizer": {"state": {0: moments}}, "epoch": step // 10}


def assert_is(checkpoint: Checkpoint, step: int) -> None:
    weights, state = content(step)
    assert checkpoint.step == step
    assert checkpoint.weights.keys() == weights.keys()
    assert all(torch.equal(checkpoint.weights[name], weights[name]) for name in weights)
    assert checkpoint.state["epoch"] == state["epoch"]
    saved, loaded = (s["optimizer"]["state"][0] for s in (state, checkpoint.state))
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    """Steps 10 and 20; a report is an error."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", report=pytest.fail)
    for step in (10, 20):
        checkpoints.save(step, *content(step))
    return checkpoints


def test_round_trip(saved: Checkpoints) -> None:
    assert saved.steps() == [10, 20]
    assert names(saved.folder) == ["step-00000010", "step-00000020"]
    assert names(saved.folder / "step-00000020") == sorted(FILES)
    assert_is(saved.load(), 20)
    assert_is(saved.load(10), 10)
    assert saved.load().path == saved.folder / "step-00000020"
    manifest = json.loads((saved.load().path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["step"] == 20
    assert manifest["versions"]["torch"] == torch.__version__


def test_weights_of_every_layout_and_tie_are_exact(tmp_path: Path) -> None:
    base = torch.randn(4, 6, 2, 2)
    tied = torch.nn.Parameter(torch.randn(3, 4))
    weights = {
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": base[:, :, 0, 0].T,
        "view": base[1],
        "overlapping_view": base[1:3],
        "expanded": torch.tensor([1.5]).expand(4),
        "encoder": tied,
        "decoder": tied,
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "empty_too": torch.empty(0),
        "bf16": torch.randn(5).bfloat16(),
        "bool": torch.tensor([True, False]),
        "special": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
    }
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, weights, {})
    loaded = checkpoints.load().weights
    assert loaded.keys() == weights.keys()
    for name, value in weights.items():
        assert loaded[name].dtype == value.dtype
        assert loaded[name].shape == value.shape
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (loaded[name], value)]
        assert torch.equal(*bits), name
    assert safetensors.torch.load_file(path / "weights.safetensors").keys() == weights.keys()


def test_a_tied_model_loads_strictly_and_stays_tied(tmp_path: Path) -> None:
    def model() -> torch.nn.ModuleDict:
        embedding, output = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, bias=False)
        output.weight = embedding.weight
        return torch.nn.ModuleDict({"embedding": embedding, "output": output})

    trained, restored = model(), model()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, trained.state_dict(), {})
    restored.load_state_dict(checkpoints.load().weights, strict=True)
    assert restored["embedding"].weight is restored["output"].weight
    assert all(map(torch.equal, restored.parameters(), trained.parameters()))


def test_loaded_tensors_are_no_window_onto_the_file(saved: Checkpoints) -> None:
    checkpoint = saved.load()
    for tensor in (*checkpoint.weights.values(), checkpoint.state["optimizer"]["state"][0]["step"]):
        tensor.zero_()
    assert_is(saved.load(), 20)


def test_state_of_torch_and_python_survives(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4]),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10),
    ]
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedules": [schedule.state_dict() for schedule in schedules],
        "python": random.getstate(),
        "numpy": np.random.default_rng(3).bit_generator.state,
        "torch": torch.get_rng_state(),
        "values": [None, True, 2**100, 0.1, float("inf"), "ß", b"\0", (1, (2,)), {3: 4}],
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {}, state)
    loaded = checkpoints.load().state
    for key in ("schedules", "python", "numpy", "values"):
        assert loaded[key] == state[key]
    assert torch.equal(loaded["torch"], state["torch"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [0, {"b": np.float64(1)}]}, r"state\['a'\]\[1\]\['b'\] must be .*numpy.float64"),
        ({"a": np.zeros(2)}, r"state\['a'\] must be .*, got numpy.ndarray"),
        ({"a": collections.defaultdict(int)}, r"state\['a'\] must be .*, got .*defaultdict"),
        ({"a": {(1, 2): 3}}, r"state\['a'\] must have plain keys, got a tuple: \(1, 2\)"),
        ({"a": Colour.RED}, r"state\['a'\] must be .*Colour"),
        ({"a": lambda: 0}, r"state\['a'\] must be .*, got function"),
    ],
)
def test_state_that_would_need_unpickling_is_refused(saved, state, message) -> None:
    with pytest.raises(TypeError, match=message):
        saved.save(30, {}, state)
    assert names(saved.folder) == ["step-00000010", "step-00000020"]


@pytest.mark.parametrize("value", [np.zeros(2), [1.0], torch.eye(2).to_sparse()])
def test_weights_that_are_no_dense_tensors_are_refused(saved, value) -> None:
    with pytest.raises(TypeError, match=r"weights\['w'\] must be a dense tensor, got"):
        saved.save(30, {"w": value}, {})
    assert names(saved.folder) == ["step-00000010", "step-00000020"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_last must be >= 1, got 0"):
        Checkpoints(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match=r"step must be >= 0, got -1"):
        Checkpoints(tmp_path).save(-1, {}, {})


def test_keep_last_and_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 7):
        checkpoints.save(step, *content(step), keep=step == 2)
    assert checkpoints.steps() == [2, 5, 6]
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]


def test_going_back_removes_the_later_ones(saved: Checkpoints) -> None:
    saved.save(30, *content(30), keep=True)
    saved.save(15, *content(15))
    assert saved.steps() == [10, 15]
    assert_is(saved.load(), 15)


def test_the_same_step_again_replaces(saved: Checkpoints) -> None:
    weights, state = content(20)
    saved.save(20, {"other": weights["fc.bias"]}, state)
    assert saved.steps() == [10, 20]
    assert list(saved.load().weights) == ["other"]
    assert names(saved.folder) == ["step-00000010", "step-00000020"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [flip, truncate, grow, os.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_reported_and_the_previous_one_used(saved, name, damage) -> None:
    damage(saved.folder / "step-00000020" / name)
    reports: list[str] = []
    checkpoints = Checkpoints(saved.folder, report=reports.append)
    assert_is(checkpoints.load(), 10)
    assert len(reports) == 1
    assert "step-00000020" in reports[0]
    assert name in reports[0]
    with pytest.raises(CheckpointError, match=name):
        checkpoints.load(20)
    # The run goes on from step 10 and overwrites what was damaged.
    checkpoints.save(20, *content(20))
    assert_is(checkpoints.load(), 20)
    assert len(reports) == 1


def test_the_report_is_a_warning_by_default(saved: Checkpoints) -> None:
    flip(saved.folder / "step-00000020" / "state.pt")
    with pytest.warns(UserWarning, match=r"step-00000020: state.pt does not match its checksum"):
        assert_is(Checkpoints(saved.folder).load(), 10)


# The fixture is one for all examples: each leaves the checkpoints as it found them.
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_no_flipped_byte_changes_what_is_loaded(saved: Checkpoints, data: st.DataObject) -> None:
    path = saved.folder / "step-00000020" / data.draw(st.sampled_from(FILES))
    intact = path.read_bytes()
    position = data.draw(st.integers(0, len(intact) - 1))
    flipped = intact[position] ^ data.draw(st.integers(1, 255))
    path.write_bytes(intact[:position] + bytes([flipped]) + intact[position + 1 :])
    try:
        reports: list[str] = []
        assert_is(Checkpoints(saved.folder, report=reports.append).load(), 10 if reports else 20)
        # Only what is not needed to restore, as a version or a space, may go unnoticed.
        assert reports or path.name == "manifest.json"
    finally:
        path.write_bytes(intact)


def test_a_future_format_is_not_guessed_at(saved: Checkpoints) -> None:
    path = saved.folder / "step-00000020" / "manifest.json"
    path.write_text(json.dumps({"format": 2, "layout": "unknown"}))
    with pytest.warns(UserWarning, match=r"format 2, not 1; a newer version of maskedtrain"):
        assert_is(Checkpoints(saved.folder).load(), 10)


def test_a_renamed_folder_is_not_taken_for_another_step(saved: Checkpoints) -> None:
    (saved.folder / "step-00000020").rename(saved.folder / "step-00000030")
    with pytest.warns(UserWarning, match=r"its manifest is of step 20"):
        assert_is(Checkpoints(saved.folder).load(), 10)


def test_nothing_usable_says_what_was_found(saved: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7 in .*: has 10, 20"):
        saved.load(7)
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .*nowhere: it has none"):
        Checkpoints(tmp_path / "nowhere").load()
    assert Checkpoints(tmp_path / "nowhere").steps() == []
    for step in (10, 20):
        truncate(saved.folder / f"step-{step:08d}" / "state.pt")
    with pytest.raises(CheckpointError, match=r"00000020: state.pt has .*00000010: state.pt has"):
        Checkpoints(saved.folder, report=lambda line: None).load()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch):
    """`full_disk(name)`: the file of that name takes half of its bytes, then the disk is full."""

    def install(name: str) -> None:
        def opened(path, mode):
            file = open(path, mode)  # noqa: SIM115
            if Path(path).name == name:
                write = file.write

                class Full:
                    def __enter__(self):
                        return self

                    def __exit__(self, *exception):
                        file.close()

                    def write(self, data):
                        write(data[: len(data) // 2])
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

                return Full()
            return file

        monkeypatch.setattr(files, "open", opened, raising=False)

    return install


@pytest.mark.parametrize("step", [20, 30])
@pytest.mark.parametrize("name", FILES)
def test_a_full_disk_leaves_the_earlier_ones(saved, full_disk, monkeypatch, name, step) -> None:
    full_disk(name)
    with pytest.raises(OutputError) as caught:
        saved.save(step, *content(step))
    path = saved.folder / f"step-{step:08d}"
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert caught.value.errno == errno.ENOSPC
    assert names(saved.folder) == ["step-00000010", "step-00000020"]
    assert_is(saved.load(), 20)
    monkeypatch.undo()
    saved.save(30, *content(30))
    assert_is(saved.load(), 30)


@pytest.mark.parametrize("function", ["fsync", "rename", "mkdir"])
def test_a_failing_system_call_leaves_the_earlier_ones(saved, monkeypatch, function) -> None:
    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OutputError, match=r"cannot write .*step-00000030: Input/output error"):
        saved.save(30, *content(30))
    monkeypatch.undo()
    assert names(saved.folder) == ["step-00000010", "step-00000020"]
    assert_is(saved.load(), 20)


def test_everything_is_on_the_disk_before_it_is_visible(saved: Checkpoints, monkeypatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    Checkpoints(saved.folder, keep_last=2).save(30, *content(30))
    assert events == [
        *(f"sync {name}" for name in FILES),
        "sync .step-00000030.tmp",
        "rename to step-00000030",
        "sync checkpoints",
        # Step 10 goes only now.
        "rename to .step-00000010.tmp",
    ]


def test_a_real_limit_of_the_system_on_file_size(saved: Checkpoints) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(OutputError, match=r"step-00000030: File too large"):
            saved.save(30, {"w": torch.zeros(100_000)}, {})
        with pytest.raises(OutputError, match=r"step-00000030: File too large"):
            saved.save(30, {}, {"w": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(saved.folder) == ["step-00000010", "step-00000020"]


def test_a_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*/file/run/step-00000001: Not a direct"):
        Checkpoints(tmp_path / "file" / "run").save(1, {}, {})


def test_an_interrupt_leaves_nothing_behind(saved: Checkpoints, monkeypatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        saved.save(30, *content(30))
    assert names(saved.folder) == ["step-00000010", "step-00000020"]


def test_old_ones_that_cannot_be_removed_are_reported(tmp_path: Path, monkeypatch) -> None:
    reports: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep_last=1, report=reports.append)
    checkpoints.save(1, *content(1))

    def fail(path: Path) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(shutil, "rmtree", fail)
    checkpoints.save(2, *content(2))
    assert reports == [f"cannot remove old checkpoints in {tmp_path}: Permission denied"]
    assert checkpoints.steps() == [2]
    monkeypatch.undo()
    checkpoints.save(3, *content(3))
    assert names(tmp_path) == ["step-00000003"]


# One process forks the savers, so that torch is imported once. `kill_at(n)` dies, by SIGKILL, just
# before its n-th operation on the file system; `kill_after(s)` is killed after a random time.
CRASHES = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from maskedtrain.training.checkpoint import Checkpoints

folder = Path(sys.argv[1])
torch.set_num_threads(1)

def save(step):
    values = torch.full((20_000,), float(step))
    Checkpoints(folder, keep_last=1).save(step, {"w": values}, {"step": step, "v": values})

def check(least):
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps()[-1] >= least
    for step in checkpoints.steps():
        loaded = checkpoints.load(step)
        assert loaded.state["step"] == step
        assert all((t == step).all() for t in (loaded.weights["w"], loaded.state["v"]))

def fork(body):
    if (child := os.fork()) == 0:
        body()
        os._exit(0)
    return child

def kill_at(n, step):
    count = 0
    def hook(event, arguments):
        nonlocal count
        if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
            count += 1
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(step)

for again in (False, True):
    for n in range(1, 1000):
        newest = Checkpoints(folder).steps()[-1:] or [0]
        if newest == [0]:
            save(1)
            newest = [1]
        step = newest[0] + (not again)
        status = os.waitpid(fork(lambda: kill_at(n, step)), 0)[1]
        check(newest[0])
        if status == 0:
            break
    assert n > 10, n
    print("crash points:", n - 1)

def forever(step):
    while True:
        save(step)
        step += random.random() < 0.5

for _ in range(20):
    newest = Checkpoints(folder).steps()[-1]
    child = fork(lambda: forever(newest))
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    check(newest)
save(10**6)
assert all(name.startswith("step-") for name in os.listdir(folder)), os.listdir(folder)
print("done")
"""


def test_sigkill_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", CRASHES, tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith("done\n")


def test_atomic_write_keeps_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as file:  # noqa: PT012
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_atomic_write_errors_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for path, reason in [
        (folder, "Is a directory"),
        (folder / "missing" / "file", "No such file or directory"),
    ]:
        with pytest.raises(OutputError) as caught, atomic_write(path) as file:
            file.write(b"x")
        assert str(caught.value) == f"cannot write {path}: {reason}"
    assert names(tmp_path) == ["folder"]
    assert names(folder) == []
