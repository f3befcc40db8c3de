"""``neurons_of``: which layers make the neurons of a model's widths, and which take them."""

from __future__ import annotations

import pytest
from torch import nn

from maskedtrain.methods._neurons import neurons_of
from maskedtrain.models import MLP, Transformer, resnet8, resnet50


def named(model: nn.Module) -> dict[str, tuple[int, list[str], list[str]]]:
    """(how many, producers, consumers) by width."""
    names = {module: name for name, module in model.named_modules()}
    return {
        width: (n.total, [names[m] for m in n.producers], [names[m] for m in n.consumers])
        for width, n in neurons_of(model).items()
    }


def test_of_an_mlp() -> None:
    assert named(MLP(3, (5, 4), 2)) == {
        "hidden.0": (5, ["hidden.0"], ["hidden.1"]),
        "hidden.1": (4, ["hidden.1"], ["output"]),
    }
    assert named(MLP(3, (), 2)) == {}


def test_a_residual_network_s_norms_make_channels_too() -> None:
    found = named(resnet8(width=4))
    assert list(found) == [f"layer{i}{inner}" for i in (1, 2, 3) for inner in ("", ".0.conv1")]
    assert found["layer2.0.conv1"] == (
        8,
        ["layer2.0.conv1", "layer2.0.bn1"],
        ["layer2.0.conv2"],
    )
    # Along the skip connection.
    total, producers, consumers = found["layer2"]
    assert total == 8
    assert sorted(producers) == [
        *(f"layer2.0.{name}" for name in ("bn2", "conv2", "downsample.0", "downsample.1")),
    ]
    assert sorted(consumers) == ["layer3.0.conv1", "layer3.0.downsample.0"]
    assert found["layer3"][2] == ["fc"]


def test_of_bottlenecks_the_stem_has_a_width_of_its_own() -> None:
    found = named(resnet50(width=4))
    assert found["stem"] == (4, ["conv1", "bn1"], ["layer1.0.conv1", "layer1.0.downsample.0"])
    assert found["layer1.0.conv2"] == (4, ["layer1.0.conv2", "layer1.0.bn2"], ["layer1.0.conv3"])


def test_dimensions_of_queries_and_keys_are_no_neurons() -> None:
    model = Transformer(9, 9, d_model=8, heads=2, ffn=6, encoder_layers=1, decoder_layers=1)
    assert named(model) == {
        f"{part}.layers.0.fc1": (6, [f"{part}.layers.0.fc1"], [f"{part}.layers.0.fc2"])
        for part in ("encoder", "decoder")
    }


def test_a_model_without_widths() -> None:
    with pytest.raises(TypeError, match=r"Linear has no width_masks\(kept\)"):
        neurons_of(nn.Linear(2, 2))
