"""Residual networks: torchvision's names and sizes, the paper's FLOPs, one graph a sub-network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from maskedtrain import MaskedConv2d, MaskedLinear, SubNetwork, SwitchNorm, models
from maskedtrain.models import ResNet, resnet8, resnet18, resnet34, resnet50
from maskedtrain.models.resnet import BasicBlock, Config
from tests.train.toolbox import noise


def small(**options: Any) -> ResNet:
    torch.manual_seed(0)
    return ResNet(BasicBlock, (1, 1), **{"width": 8, **options})


def torchvision_names(blocks: tuple[int, ...], convs: int) -> set[str]:
    """Names of torchvision's ResNets, from its layout."""

    def norm(prefix: str) -> set[str]:
        kinds = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return {f"{prefix}.{kind}" for kind in kinds}

    names = {"conv1.weight", "fc.weight", "fc.bias", *norm("bn1")}
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for i in range(1, convs + 1):
                names |= {f"{prefix}.conv{i}.weight", *norm(f"{prefix}.bn{i}")}
        # Where the resolution or the width changes; bottlenecks widen in the first stage, too.
        if stage > 1 or convs == 3:
            names |= {f"layer{stage}.0.downsample.0.weight", *norm(f"layer{stage}.0.downsample.1")}
    return names


RESNETS = [
    (resnet18, (2, 2, 2, 2), 2, 11_689_512, 11_173_962),
    (resnet34, (3, 4, 6, 3), 2, 21_797_672, 21_282_122),
    (resnet50, (3, 4, 6, 3), 3, 25_557_032, 23_520_842),
]


@pytest.mark.parametrize(("make", "blocks", "convs", "imagenet", "cifar"), RESNETS)
def test_names_and_sizes_are_torchvisions(
    make: Callable[..., ResNet],
    blocks: tuple[int, ...],
    convs: int,
    imagenet: int,
    cifar: int,
) -> None:
    with torch.device("meta"):
        large = make(num_classes=1000, stem="imagenet")
        little = make()
    assert set(large.state_dict()) == torchvision_names(blocks, convs) == set(little.state_dict())
    assert sum(p.numel() for p in large.parameters()) == imagenet
    assert sum(p.numel() for p in little.parameters()) == cifar
    assert large(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert little(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    for model, resolution, final in ((large, 224, 7), (little, 32, 4)):
        x = torch.empty(1, 3, resolution, resolution, device="meta")
        for stage in ("conv1", "bn1", "maxpool", *model.stages):
            x = model.get_submodule(stage)(x)
        assert x.shape[2:] == (final, final)


def test_every_width_layer_is_aware() -> None:
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    for module in small().modules():
        if isinstance(module, kinds):
            assert isinstance(module, MaskedConv2d | MaskedLinear | SwitchNorm)


def test_initialisation_is_he_for_convolutions_and_torchs_else() -> None:
    model = small(width=64)
    # Of 73,728 draws the standard deviation is known to 0.3 %; fan out is twice fan in.
    spread = model.get_parameter("layer2.0.conv1.weight").detach().std().item()
    assert spread == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    norm = model.bn1
    assert torch.equal(norm.weight, torch.ones(64)) and not norm.bias.any()
    assert 0.9 * 128**-0.5 < model.fc.weight.abs().max().item() <= 128**-0.5


def test_options() -> None:
    model = resnet8(num_classes=7, in_channels=1, width=4)
    assert model(noise(2, 1, 8, 8)).shape == (2, 7)
    assert [model.get_submodule(stage)[0].bn2.num_features for stage in model.stages] == [4, 8, 16]  # pyright: ignore[reportIndexIssue]
    with pytest.raises(ValueError, match=r'stem must be "cifar" or "imagenet", got \'mnist\''):
        resnet8(stem="mnist")


def test_configs_are_found_and_build() -> None:
    assert models.configs()["resnet"] is Config
    for depth, make in ((8, resnet8), (18, resnet18), (34, resnet34), (50, resnet50)):
        config = Config(depth=depth, stem="imagenet", width=8)  # pyright: ignore[reportArgumentType]
        with torch.device("meta"):
            built = config.build(in_channels=1, num_classes=5)
            made = make(in_channels=1, num_classes=5, stem="imagenet", width=8)
        shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
        assert {name: tensor.shape for name, tensor in built.state_dict().items()} == shapes


# Widths


@pytest.mark.parametrize("make", [resnet18, resnet50])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_a_width_core_is_the_network_of_that_width(make: Callable[..., ResNet], stem: str) -> None:
    with torch.device("meta"):
        model, narrow = make(stem=stem, width=32), make(stem=stem, width=16)
    core = SubNetwork.width(model, 0.5).extract()
    shapes = {name: tensor.shape for name, tensor in narrow.state_dict().items()}
    assert {name: tensor.shape for name, tensor in core.state_dict().items()} == shapes


def test_flops_of_the_papers_networks() -> None:
    model = resnet18()
    full, core = SubNetwork.full(model), SubNetwork.width(model, 0.5)
    image = torch.empty(1, 3, 32, 32)
    of_full, of_core = full.flops(image), core.flops(image)
    assert of_full / 1e9 == pytest.approx(1.1108, abs=5e-5)
    assert of_core / 1e9 == pytest.approx(0.2786, abs=5e-5)
    # Forward FLOPs of an epoch of 45,000 images; the paper's Table 3 has 62.7e12 and 31.3e12.
    slimmable = 45_000 * (of_full + of_core)
    ats = 45_000 / 2 * (of_full + of_core)
    assert slimmable == pytest.approx(62.5e12, rel=0.005)
    assert ats == pytest.approx(31.3e12, rel=0.005)
    assert core.flops(image.expand(4, 3, 32, 32)) == 4 * of_core
    # The exact counts, by hand: 2 per multiply-add of every convolution and of the classifier.
    with torch.device("meta"):
        assert SubNetwork.full(resnet18(width=32)).flops(image.to("meta")) == of_core
    assert of_full == by_hand(64) and of_core == by_hand(32)


def by_hand(width: int) -> int:
    """Multiply-adds of ResNet-18 with the CIFAR stem on 32 x 32 images, twice."""
    total = 3 * 9 * width * 32**2
    for stage in range(4):
        w, pixels = width << stage, (32 >> stage) ** 2
        inputs = w if stage == 0 else w // 2
        total += (inputs * w * 9 + 3 * w * w * 9) * pixels
        total += 0 if stage == 0 else inputs * w * pixels
    return 2 * (total + 8 * width * 10)


# torch.compile


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


# Dynamo makes instances of autograd.Function against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_a_sub_network(graphs: list[Any]) -> None:
    model, twin = small(), small()
    subnets, twins = (
        [SubNetwork.full(network), SubNetwork.width(network, 0.5)] for network in (model, twin)
    )
    eager = torch._dynamo.lookup_backend("aot_eager")

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return eager(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = noise(4, 3, 8, 8)
    for step in range(3):
        # Nothing is compiled after the first round.
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            for subnet, other in zip(subnets, twins, strict=True):
                for network, part, forward in ((model, subnet, compiled), (twin, other, twin)):
                    network.zero_grad()
                    with part.activate():
                        forward(x).square().sum().backward()
                for (name, ours), theirs in zip(
                    model.named_parameters(), twin.parameters(), strict=True
                ):
                    assert (ours.grad is None) == (theirs.grad is None), name
                    if name == "fc.weight":
                        # As dy^T x or (x^T dy)^T, which MKL rounds differently on AVX2.
                        torch.testing.assert_close(ours.grad, theirs.grad)
                    elif ours.grad is not None:
                        assert torch.equal(ours.grad, theirs.grad), name
    assert len(graphs) == 2
    for name, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("build", [resnet8, resnet50])
@torch.no_grad()
def test_widths_by_pattern(build: Callable[..., ResNet]) -> None:
    model = build(width=16).eval()
    ratios = {"layer3*": 0.25, "*.conv1": 0.5}
    core = SubNetwork.width(model, ratios, round_to=1)
    extracted = core.extract()
    counts = {n: m.out_channels for n, m in extracted.named_modules() if isinstance(m, nn.Conv2d)}
    whole = {n: m.out_channels for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}

    def kept(name: str, count: int) -> int:
        if name.startswith("layer3"):
            return count // 4
        # The stem's width is that of the first stage, which no pattern names.
        return count // 2 if name.endswith(".conv1") else count

    assert counts == {name: kept(name, count) for name, count in whole.items()}
    images = noise(2, 3, 8, 8)
    with core.activate():
        assert torch.equal(model(images), extracted(images))
    assert core.issubset(SubNetwork.full(model))


def test_a_pattern_that_matches_no_width_is_refused() -> None:
    model = resnet8(width=8)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'layer9\*' matches no width .* has layer1, layer1\.0\."):
        SubNetwork.width(model, {"*": 0.5, "layer9*": 0.5})
    assert list(model.state_dict()) == before
