"""IST of residual networks and Transformers: blocks that are skipped, copies that are averaged."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskedtrain import SubNetwork
from maskedtrain.methods._dealing import Dealer
from maskedtrain.methods.ist import IST
from maskedtrain.models import ResNet, TextClassifier, Transformer, resnet18
from maskedtrain.models.resnet import BasicBlock, Bottleneck, Stage
from maskedtrain.optim import MaskedAdamW, MaskedSGD
from tests.train.ist_toolbox import (
    CLASSES,
    Loss,
    Processes,
    assert_as_written_out,
    examples,
    mlp,
    train,
)
from tests.train.toolbox import assert_equal, noise, snapshot

SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}


def residual(*blocks: int, block: Any = BasicBlock) -> ResNet:
    torch.manual_seed(0)
    return ResNet(block, blocks or (1, 1, 4), num_classes=CLASSES, width=4)


# Blocks that are skipped


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_stage_is_a_sequence(block: Any) -> None:
    model = residual(2, 2, block=block).eval()
    stage = model.get_submodule("layer2")
    assert isinstance(stage, Stage) and isinstance(stage, nn.Sequential)
    assert list(stage.state_dict()) == list(nn.Sequential(*stage).state_dict())
    x = torch.relu(noise(2, 4 * block.expansion, 8, 8))
    assert torch.equal(stage(x), nn.Sequential(*stage)(x))
    # torchvision's names.
    assert "layer2.1.conv1.weight" in model.state_dict()


def test_a_block_that_is_outside_is_skipped() -> None:
    model = residual()
    part = SubNetwork.full(model).without(["layer3.1.*", "layer3.3.*"], name="part")
    stage: Any = model.get_submodule("layer3")
    calls: list[nn.Module] = []
    for block in stage:
        block.register_forward_hook(lambda module, *_: calls.append(module))
    x = noise(4, 3, 8, 8)
    state = snapshot(model)
    with part.activate():
        y = model(x)
    assert calls == [stage[0], stage[2]]
    gone = [name for name in state if name.startswith(("layer3.1.", "layer3.3."))]
    after = snapshot(model)
    assert gone and all(torch.equal(after[name], state[name]) for name in gone)
    assert not torch.equal(after["layer3.2.bn1.running_mean"], state["layer3.2.bn1.running_mean"])
    shorter = residual(1, 1, 2)
    weights = {n.replace("layer3.2.", "layer3.1."): w for n, w in state.items() if n not in gone}
    shorter.load_state_dict(weights)
    assert torch.equal(shorter(x), y)
    assert part.flops(x) == SubNetwork.full(shorter).flops(x) < SubNetwork.full(model).flops(x)
    assert part.numel() == SubNetwork.full(shorter).numel()


@pytest.mark.parametrize("share", [False, True])
def test_what_is_extracted_has_only_the_blocks_that_are_left(share: bool) -> None:
    model = residual().eval()
    part = SubNetwork.full(model).without(["layer3.1.*"], name="part")
    model.get_submodule("layer3.2").train()
    extracted: Any = part.extract(share=share)
    kept = [name for name in model.state_dict() if not name.startswith("layer3.1.")]
    assert list(extracted.state_dict()) == kept
    assert type(extracted.layer3) is nn.Sequential
    assert [module.training for module in extracted.layer3] == [False, True, False]
    x = noise(2, 3, 8, 8)
    with part.activate():
        assert torch.equal(extracted.eval()(x), model.eval()(x))
    own = model.get_parameter("layer3.2.conv1.weight")
    other = extracted.get_parameter("layer3.2.conv1.weight")
    assert (own.data_ptr() == other.data_ptr()) == share


def test_a_block_that_changes_the_shape_counts_as_zero() -> None:
    model = residual(1, 1).eval()
    part = SubNetwork.full(model).without(["layer2.0.conv*", "layer2.0.bn*"], name="part")
    none = SubNetwork.full(model).without(["layer2.*"], name="none")
    x = noise(2, 3, 8, 8)
    block: Any = model.get_submodule("layer2.0")
    with torch.no_grad():
        stream: Tensor = model.get_submodule("layer1")(torch.relu(model.bn1(model.conv1(x))))
        y = model.fc(torch.relu(block.downsample(stream)).mean((2, 3)))
    with part.activate():
        torch.testing.assert_close(model(x), y)
    with none.activate():
        torch.testing.assert_close(model(x), model.fc.bias.expand(2, CLASSES))


def test_the_blocks_of_the_third_stage_are_dealt_out() -> None:
    model = residual(2, 2, 6)
    assert Dealer(model, 2).blocks == [f"layer3.{i}" for i in range(1, 6)]
    for round in range(4):
        parts = Dealer(model, 2).parts(round)
        held = [{n[:8] for n, m in p.masks.items() if m and n.startswith("layer3.")} for p in parts]
        assert held[0] & held[1] == {"layer3.0"}
        assert held[0] | held[1] == {f"layer3.{i}" for i in range(6)}
        assert sorted(map(len, held)) == [3, 4]
        for part in parts:
            others = [n for n, mask in part.masks.items() if mask is None]
            assert all(name.startswith("layer3.") for name in others)
    # Of one block a worker has it, in turn.
    one = [[p.numel() for p in Dealer(resnet18(width=4), 2).parts(round)] for round in range(2)]
    assert one[0] == one[1][::-1] and one[0][0] > one[0][1]
    some = Dealer(model, 2, blocks=["layer[12].*"]).blocks
    assert some == ["layer1.0", "layer1.1", "layer2.1"]


# Against n processes


def residual_loss(network: nn.Module, step: int, worker: int) -> Tensor:
    x, y = examples(100 * step + worker, 3, 8, 8)
    return F.cross_entropy(network(x), y)


def tokens(seed: int, vocab: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (4, length), generator=generator)


def translation_loss(network: nn.Module, step: int, worker: int) -> Tensor:
    source, target = tokens(100 * step + worker, 11, 6), tokens(100 * step + worker + 50, 13, 5)
    logits = network(source, target[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())


def text_loss(network: nn.Module, step: int, worker: int) -> Tensor:
    words = tokens(100 * step + worker, 11, 6)
    return F.cross_entropy(network(words), words[:, 0] % CLASSES)


def translator() -> Transformer:
    return Transformer(
        11, 13, d_model=8, heads=2, ffn=10, encoder_layers=1, decoder_layers=2, dropout=0.0
    )


def text(encoder: Any) -> TextClassifier:
    sizes = {"d_model": 8, "heads": 2, "ffn": 9, "hidden": (9,)}
    return TextClassifier(11, CLASSES, encoder=encoder, dropout=0.0, **sizes)


CASES: dict[str, tuple[Callable[[], nn.Module], Loss, dict[str, Any]]] = {
    "resnet": (residual, residual_loss, {}),
    "bottlenecks": (lambda: residual(1, 1, 3, block=Bottleneck), residual_loss, {}),
    "resnet-channels": (lambda: residual(1, 1), residual_loss, {"widths": ["*.conv1"]}),
    "resnet-streams": (lambda: residual(1, 1), residual_loss, {"widths": ["layer2*"]}),
    "resnet-both": (
        residual,
        residual_loss,
        {"widths": ["layer3.*.conv1"], "blocks": ["layer3.*"]},
    ),
    "transformer": (translator, translation_loss, {}),
    "encoder": (lambda: text("transformer"), text_loss, {}),
    "bag-of-words": (lambda: text("bag"), text_loss, {}),
}


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize("name", CASES)
def test_it_is_n_processes_that_are_averaged(name: str, rule: str) -> None:
    """Parameters, running statistics and counts of batches, over two rounds of three workers."""
    make, loss, options = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    torch.manual_seed(0)
    other = make().double()
    masked, plain = {
        "sgd": (partial(MaskedSGD, **SGD), partial(torch.optim.SGD, **SGD)),
        # Some gradients are rounding errors of 0, such as those of attention's key biases: a small
        # eps would make steps of them.
        "adamw": (partial(MaskedAdamW, eps=1e-2), partial(torch.optim.AdamW, eps=1e-2)),
    }[rule]
    before = snapshot(model)
    method = IST(model, 3, local_steps=2, seed=1, **options)
    train(method, masked(model.parameters()), range(4), loss)
    for round in range(2):
        workers = Processes(Dealer(other, 3, seed=1, **options).parts(round), plain)
        for step in (2 * round, 2 * round + 1):
            workers.step(step, loss)
        workers.gather()
    assert_as_written_out(model, other)
    for tensor_name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            assert not torch.equal(tensor, before[tensor_name]), tensor_name


def test_attention_and_embeddings_are_shared() -> None:
    model = translator()
    method = IST(model, 2, local_steps=1)
    layers = ["encoder.layers.0", "decoder.layers.0", "decoder.layers.1"]
    dealt = {f"{layer}.{fc}" for layer in layers for fc in ("fc1.weight", "fc1.bias", "fc2.weight")}
    cut = {
        name
        for name, parameter in model.named_parameters()
        if method.parts[0].masks[name].numel(parameter.shape) < parameter.numel()  # pyright: ignore[reportOptionalMemberAccess]
    }
    assert cut == dealt


def test_frozen_parameters_stay_as_they_are() -> None:
    model = residual().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not name.startswith(("conv1", "layer3.2"))
    before = snapshot(model)
    train(
        IST(model, 2, local_steps=2), MaskedSGD(model.parameters(), **SGD), range(3), residual_loss
    )
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 7
    after = snapshot(model)
    assert_equal({n: after[n] for n in frozen}, {n: before[n] for n in frozen})


def test_a_model_that_is_moved_goes_on() -> None:
    """Its buffers are other tensors then."""
    model = residual()
    method = IST(model, 2, local_steps=2)
    model.double()
    other = residual().double()
    for network, m in ((model, method), (other, IST(other, 2, local_steps=2))):
        train(m, MaskedSGD(network.parameters(), **SGD), range(3), residual_loss)
    assert_equal(snapshot(model), snapshot(other))


def test_weights_that_are_loaded_before_the_first_step_are_everyones() -> None:
    model, loaded = mlp(), mlp(seed=1)
    method = IST(model, 2, local_steps=3)
    model.load_state_dict(loaded.state_dict())
    for network, m in ((model, method), (loaded, IST(loaded, 2, local_steps=3))):
        train(m, MaskedSGD(network.parameters(), **SGD), range(2))
    assert_equal(snapshot(model), snapshot(loaded))
