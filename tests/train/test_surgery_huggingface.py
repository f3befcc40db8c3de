"""``width`` and ``lowrank`` on models of the ``transformers`` package, small and untrained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskedtrain import MaskedLinear, SubNetwork, lowrank, width
from maskedtrain.layers import LFCLinear, MaskedModule
from maskedtrain.methods import ATS
from maskedtrain.optim import MaskedAdamW
from maskedtrain.surgery import Heads
from tests.train.toolbox import assert_equal, snapshot

transformers = pytest.importorskip("transformers")

# Sizes of both models, and of the batch: 2 rows of 7 tokens.
VOCABULARY, WIDTH, HIDDEN, LAYERS, TOKENS = 50, 32, 64, 2, 14


def llama() -> Any:
    """Gated MLP, rotary positions, 4 query heads on 2 key heads, no biases."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    """Output tied to the embedding; the hidden layers are named like those of attention."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


GATED = ("*.gate_proj", "*.up_proj", "*.down_proj")
HEADS = Heads("*.q_proj", "*.k_proj", head_dim=8)
BERT_HEADS = Heads("*.query", "*.key", head_dim=8)
Model = tuple[Any, list[Any], list[str]]

# Groups whose first is a feed-forward block, and targets of low rank, [64, 32] and [32, 32] each.
MODELS: dict[str, tuple[Callable[[], Any], list[Any], list[str]]] = {
    "llama": (llama, [GATED, HEADS], ["*.up_proj", "*.q_proj"]),
    "bert": (
        bert,
        [("*.intermediate.dense", "*.output.dense"), BERT_HEADS],
        ["*.intermediate.dense", "*.query"],
    ),
}


def made(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    model = make().double().eval()
    # Weights of their usual size leave the outputs of an untrained model all alike.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def case(request: pytest.FixtureRequest) -> Model:
    make, groups, targets = request.param
    return made(make), groups, targets


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(seed))


def zero_off(model: nn.Module, subnet: SubNetwork) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mask = subnet.masks[name]
            parameter.mul_(0 if mask is None else mask.dense(parameter.shape))


def test_a_narrow_network_is_the_model_with_zeros(case: Model) -> None:
    model, groups, _ = case
    matrices = len(groups[0])
    original, x = copy.deepcopy(model), tokens()
    core = width(model, groups, ratio=0.25)
    assert torch.equal(model(x).logits, original(x).logits)
    assert_equal(snapshot(model), snapshot(original))
    changed = [name for name, module in model.named_modules() if type(module) is MaskedLinear]
    assert len(changed) == LAYERS * (matrices + 2)
    whole = original(x).logits
    zero_off(original, core)
    expected = original(x).logits
    assert not torch.allclose(expected, whole, rtol=1e-2)
    with core.activate():
        y = model(x).logits
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    extracted = core.extract()
    assert not any(isinstance(module, MaskedModule) for module in extracted.modules())
    torch.testing.assert_close(extracted(x).logits, y, rtol=1e-10, atol=1e-10)
    # Each matrix has lost three quarters of its rows or columns; heads keep their shape.
    full = SubNetwork.full(model)
    saved = LAYERS * matrices * 2 * TOKENS * WIDTH * (HIDDEN - HIDDEN // 4)
    assert full.flops(x) - core.flops(x) == saved
    assert core.issubset(full)


def test_a_low_rank_core_is_the_model_with_factors(case: Model) -> None:
    model, _, targets = case
    original, x = copy.deepcopy(model), tokens()
    core = lowrank(model, targets, ratio=0.25)
    layers = [name for name, module in model.named_modules() if type(module) is LFCLinear]
    assert len(layers) == LAYERS * 2
    with torch.no_grad():
        for name in layers:
            factors = model.get_submodule(name)
            original.get_submodule(name).weight.copy_(factors.v @ factors.u)
    expected = original(x).logits
    with core.activate():
        y = model(x).logits
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, model(x).logits, rtol=1e-2)
    extracted = core.extract()
    assert not any(isinstance(module, MaskedModule) for module in extracted.modules())
    torch.testing.assert_close(extracted(x).logits, y, rtol=1e-10, atol=1e-10)
    # Rank 8: [64, 32] and [32, 32] become 8 x (64 + 32) and 8 x (32 + 32).
    weights, factors = 64 * 32 + 32 * 32, 8 * (64 + 32 + 32 + 32)
    saved = LAYERS * 2 * TOKENS * (weights - factors)
    assert SubNetwork.full(original).flops(x) - core.flops(x) == saved
    full = SubNetwork.full(model)
    assert core.issubset(full) and not full.issubset(core)


def train(model: Any, core: SubNetwork) -> None:
    method = ATS([SubNetwork.full(model), core])
    optimizer = MaskedAdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(4):
        before, x = snapshot(model), tokens(step)
        plan = method.plan(step)
        plan.backward(lambda x=x: model(x, labels=x).loss)
        optimizer.step(plan.update)
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            mask = plan.update.mask_of(parameter)
            moved = parameter != before[name]
            inside = torch.zeros_like(moved) if mask is None else mask.dense(parameter.shape)
            assert not moved[~inside].any(), name
            assert moved[inside].any() or "pooler" in name or not inside.any(), name


def test_training_steps_leave_what_is_outside_alone(case: Model) -> None:
    model, groups, targets = case
    low = copy.deepcopy(model)
    train(model.train(), width(model, groups, ratio=0.25))
    train(low.train(), lowrank(low, targets, ratio=0.25))


def test_generation_uses_the_active_core() -> None:
    model = made(llama)
    core = width(model, [GATED], ratio=0.25)
    extracted: Any = core.extract()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with core.activate():
        found = model.generate(tokens(), **settings)
    assert torch.equal(found, extracted.generate(tokens(), **settings))
    assert not torch.equal(found, model.generate(tokens(), **settings))


def test_layers_that_are_no_linear_are_named() -> None:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=1, n_head=2)
    with pytest.raises(
        ValueError, match=r"no nn\.Linear, but transformer\.h\.0\.mlp\.c_fc.*Conv1D"
    ):
        width(transformers.GPT2LMHeadModel(config), [("*.c_fc", "*.mlp.c_proj")], ratio=0.5)
