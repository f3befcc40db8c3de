"""What ``width`` and ``lowrank`` refuse, and that nothing has changed then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations, prune

from maskedtrain import MaskedLinear, lowrank, width
from maskedtrain.surgery import Heads
from tests.train.surgery_toolbox import FEED_FORWARD, Attention, Block, blocks, kinds
from tests.train.toolbox import assert_equal, noise, snapshot


class Tuned(nn.Linear):
    """A linear layer with behaviour of its own."""


def with_fc1(layer: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Two blocks; the second one's first layer is another."""
    model = blocks()
    model[1].fc1 = layer(model[1].fc1)
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"a": Block(), "embedding": nn.Embedding(32, 6)})
    model["a"].fc1.weight = model["embedding"].weight  # pyright: ignore
    return model


def tied_bias() -> nn.Module:
    block, norm = Block(), nn.LayerNorm(32)
    norm.bias = block.fc1.bias
    return nn.Sequential(block, norm)


def own_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda input: input
    return layer


def old_weight_norm(layer: nn.Linear) -> nn.Module:
    return nn.utils.weight_norm(layer)


REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, type[Exception], str]] = {
    "nothing": (
        blocks,
        [("*.fc_1", "*.fc2")],
        ValueError,
        r"'\*\.fc_1' matches no nn\.Linear; near it are '\*\.fc1', '\*\.fc2'",
    ),
    "container": (
        blocks,
        [("*.act", "*.fc2")],
        ValueError,
        r"'\*\.act' matches no nn\.Linear, but 0\.act, which is a torch\..*GELU",
    ),
    "second-group": (
        blocks,
        [FEED_FORWARD, ("*.fc3", "*.fc4")],
        ValueError,
        r"'\*\.fc3' matches no",
    ),
    "no-linear": (nn.Identity, [FEED_FORWARD], ValueError, "no nn.Linear; the model has none"),
    "no-groups": (blocks, [], ValueError, "at least one width"),
    "a-string": (blocks, ["*.fc1"], ValueError, "producers and their consumer, got '"),
    "no-consumer": (blocks, [("*.fc1",)], ValueError, "producers and their consumer, got"),
    "consumer-missing": (
        blocks,
        [("*.fc1", "0.fc2")],
        ValueError,
        r"0\.fc1 matches '\*\.fc1', but no nn\.Linear matches '0\.fc2' likewise",
    ),
    "producer-missing": (
        lambda: nn.Sequential(Block(), nn.ModuleDict({"fc1": nn.Linear(6, 32)})),
        [("*.fc2", "*.fc1", "*.fc2")],
        ValueError,
        r"1\.fc1 matches '\*\.fc1', but no nn\.Linear matches '\*\.fc2' likewise",
    ),
    "query-missing": (
        lambda: nn.Sequential(Attention(), nn.ModuleDict({"k_proj": nn.Linear(4, 8)})),
        [Heads("*.q_proj", "*.k_proj", head_dim=8)],
        ValueError,
        r"1\.k_proj matches '\*\.k_proj', but no nn\.Linear matches '\*\.q_proj' likewise",
    ),
    "sizes": (
        lambda: with_fc1(lambda layer: nn.Linear(6, 30)),
        [FEED_FORWARD],
        ValueError,
        r"1\.fc1 must give the 32 features that 1\.fc2 takes, got 30",
    ),
    "twice": (blocks, [FEED_FORWARD, ("0.fc1", "0.fc2")], ValueError, r"0\.fc1 must be in one"),
    "consumer-twice": (
        lambda: nn.Sequential(Block(), Block()),
        [("0.fc1", "0.fc2"), ("1.fc1", "0.fc2")],
        ValueError,
        r"0\.fc2 must be in one group once",
    ),
    "heads-and-width": (
        blocks,
        [FEED_FORWARD, Heads("*.fc1", "*.fc2", head_dim=2)],
        ValueError,
        r"0\.fc1 must be in one group once",
    ),
    "head-dim": (
        lambda: nn.Sequential(Attention()),
        [Heads("*.q_proj", "*.k_proj", head_dim=12)],
        ValueError,
        r"0\.q_proj must give a multiple of head_dim = 12 features, got 32",
    ),
    "tied": (tied, [FEED_FORWARD], ValueError, r"tied to a parameter with another mask"),
    "tied-bias": (tied_bias, [FEED_FORWARD], ValueError, "tied to a parameter with another mask"),
    "other-name": (
        lambda: nn.Sequential(*[Block()] * 2),
        [("1.fc1", "1.fc2")],
        ValueError,
        r"1\.fc1\.weight is tied to a parameter with another mask",
    ),
    "root": (lambda: nn.Linear(6, 3), [("*", "*")], ValueError, "no nn.Linear; the model has none"),
    "subclass": (
        lambda: with_fc1(lambda layer: Tuned(6, 32)),
        [FEED_FORWARD],
        TypeError,
        r"1\.fc1 is a \S+\.Tuned, whose behaviour would be lost",
    ),
    "parametrized": (
        lambda: with_fc1(parametrizations.weight_norm),
        [FEED_FORWARD],
        TypeError,
        r"1\.fc1 is a \S+\.ParametrizedLinear",
    ),
    "weight-norm": (
        lambda: with_fc1(old_weight_norm),
        [FEED_FORWARD],
        TypeError,
        r"1\.fc1 computes its weight or bias from bias, weight_g, weight_v",
    ),
    "pruned": (
        lambda: with_fc1(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
        [FEED_FORWARD],
        TypeError,
        r"1\.fc1 computes its weight or bias from bias, weight_orig",
    ),
    "own-forward": (
        lambda: with_fc1(own_forward),
        [FEED_FORWARD],
        TypeError,
        r"1\.fc1 has a forward of its own",
    ),
    "torch-attention": (
        lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}),
        [Heads("*.in_proj", "*.out_proj", head_dim=4)],
        ValueError,
        r"'\*\.in_proj' matches no nn\.Linear; near it are '\w+\.out_proj'",
    ),
    "torch-attention-output": (
        lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 8)}),
        [("b", "a.out_proj")],
        TypeError,
        r"a\.out_proj is a torch\..*NonDynamicallyQuantizableLinear",
    ),
}


@pytest.fixture(params=REFUSED.values(), ids=REFUSED)
def refused(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Any, type, str]]:
    make, groups, error, message = request.param
    model = make()
    before = kinds(model)
    yield model, groups, error, message
    assert kinds(model) == before


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_what_is_refused_changes_nothing(refused: tuple[nn.Module, Any, type, str]) -> None:
    model, groups, error, message = refused
    with pytest.raises(error, match=message):
        width(model, groups, ratio=0.5)


def test_near_names_are_those_with_a_like_end() -> None:
    deep = nn.ModuleDict({"prefix": nn.ModuleDict({"fc1": nn.Linear(2, 2)})})
    model = nn.ModuleDict({"very": deep, "a": nn.ModuleDict({"bc": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"near it are 'very\.prefix\.fc1', 'a\.bc'$"):
        width(model, [("b.fc", "*")], ratio=0.5)


@pytest.mark.parametrize("ratio", [0.0, -0.5, 1.5, {"*": 2.0}])
def test_ratios_out_of_range(ratio: Any) -> None:
    model = blocks()
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], got"):
        width(model, [FEED_FORWARD], ratio=ratio)
    assert MaskedLinear not in kinds(model).values()


def test_an_active_sub_network_is_in_the_way() -> None:
    model = blocks()
    core = width(model, [FEED_FORWARD], ratio=0.5)
    with core.activate(), pytest.raises(RuntimeError, match=r"0\.fc1 has an active sub-network"):
        width(model, [FEED_FORWARD], ratio=0.25)
    with pytest.raises(ValueError, match="head_dim must be >= 1, got 0"):
        Heads("*.q", "*.k", head_dim=0)


def test_what_is_not_element_wise_meets_the_narrow_tensor() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    core = width(model, [("0", "2")], ratio=0.5)
    with core.activate(), pytest.raises(RuntimeError, match=r"\[8\].*got input of size.*4\]"):
        model(noise(3, 4))


def twins() -> nn.Module:
    model = blocks()
    model[1].fc1.weight = model[0].fc1.weight
    return model


@pytest.mark.parametrize(
    ("make", "targets", "options", "error", "message"),
    [
        (blocks, ["*.fc1", "*.fc3"], {}, ValueError, r"'\*\.fc3' matches no nn\.Linear; near it"),
        (blocks, ["*.fc1", "*.act"], {}, ValueError, "matches no .*but 0.act, which is a torch"),
        (blocks, "*.fc1", {}, ValueError, "targets must be a list of patterns, got '"),
        (blocks, [], {}, ValueError, r"targets must be a list of patterns, got \[\]"),
        (blocks, ["*.fc1"], {"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0"),
        (blocks, ["*.fc1"], {"ratio": 1.1}, ValueError, r"ratio must be in \(0, 1\], got 1\.1"),
        (blocks, ["*.fc1"], {"init": "magic"}, ValueError, "init must be .*got 'magic'"),
        (tied, ["*.fc1"], {}, ValueError, "tied to a parameter with another mask"),
        (twins, ["*.fc1"], {}, ValueError, r"1\.fc1\.weight is tied to another layer's"),
        (lambda: with_fc1(lambda _: Tuned(6, 32)), ["*.fc1"], {}, TypeError, r"\.Tuned, whose"),
        (
            lambda: nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}),
            ["*.out_proj"],
            {},
            TypeError,
            r"a\.out_proj is a torch\..*NonDynamicallyQuantizableLinear, whose",
        ),
        (
            lambda: with_fc1(parametrizations.weight_norm),
            ["*.fc1"],
            {},
            TypeError,
            r"\.ParametrizedLinear, whose",
        ),
    ],
)
def test_what_lowrank_refuses_changes_nothing(
    make: Callable[[], nn.Module], targets: Any, options: Any, error: type[Exception], message: str
) -> None:
    model = make()
    before, state = kinds(model), snapshot(model)
    with pytest.raises(error, match=message):
        lowrank(model, targets, **{"ratio": 0.5, **options})
    assert kinds(model) == before
    assert_equal(snapshot(model), state)
