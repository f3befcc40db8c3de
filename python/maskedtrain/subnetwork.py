"""``SubNetwork``: a mask over the parameters of a super-network, as something one can run and
train.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskedtrain.layers.base import Active, Copier, MaskedModule
from maskedtrain.layers.norm import SwitchNorm
from maskedtrain.layers.zeroed import check_full_width, zeroed
from maskedtrain.patterns import matching_names, near
from maskedtrain.widths import Ratios, width_masks, widths_of
from partial_kernels import Full, Index, Mask
from partial_kernels.masks import union

__all__ = ["SubNetwork"]


class SubNetwork:
    """Part of a super-network: parameter name -> mask.

    A parameter that is not named is ``Full``, or has the mask that its layer implies (a bias
    follows its weight's rows); ``None`` puts it outside: it counts as zero in the forward pass and
    is not trained. Parameters that belong to other sub-networks alone (another's ``SwitchNorm``
    branch), or that the model gets later, are outside.

    Args:
        model: the super-network. Its parameters must stay the same objects.
        masks: masks by parameter name, as in ``model.named_parameters()``.
        name: what the sub-network is called in logs and by ``SwitchNorm``.

    Raises:
        ValueError: unknown parameter name, or a mask that does not fit its parameter.

    Example:
        >>> masks = {"0.weight": pk.Prefix(64), "2.weight": pk.Prefix(None, 64)}
        >>> core = SubNetwork(model, masks, name="core")
        >>> with core.activate():
        ...     loss = criterion(model(x), y)
        >>> loss.backward()
        >>> optimizer.step(core)
    """

    _alive: ClassVar[WeakSet[SubNetwork]] = WeakSet()

    def __init__(self, model: nn.Module, masks: Mapping[str, Mask | None], *, name: str) -> None:
        self.model = model
        self.name = name
        known = dict(model.named_parameters(remove_duplicate=False))
        for parameter in masks:
            if parameter not in known:
                raise ValueError(
                    f"the model has no parameter {parameter!r}{near(parameter, known)}"
                )
        self._given = dict(masks)
        self._settle()
        SubNetwork._alive.add(self)

    def _settle(self) -> None:
        """Settle every parameter's mask, and how each module gets to know it."""
        known, masks = dict(self.model.named_parameters(remove_duplicate=False)), self._given
        if gone := sorted(masks.keys() - known.keys()):
            raise ValueError(
                f"sub-network {self.name!r} has masks of parameters that the model no longer has: "
                f"{', '.join(gone)}; make it after the change"
            )
        self.masks: dict[str, Mask | None] = {}
        self._aware: list[tuple[MaskedModule, Active]] = []
        self._plain: list[tuple[nn.Module, dict[str, Mask | None]]] = []
        for prefix, module in self.model.named_modules():
            self._add_module(prefix, module, masks)
        self._by_parameter: dict[nn.Parameter, Mask | None] = {}
        # The masks given come again for their other names: the walk meets a shared module once.
        for parameter, mask in (*self.masks.items(), *masks.items()):
            earlier = self._by_parameter.setdefault(known[parameter], mask)
            if earlier != mask:
                raise ValueError(
                    f"{parameter} is tied to a parameter with another mask: {earlier}, {mask}"
                )
        for parameter, mask in self._by_parameter.items():
            if isinstance(mask, Index):
                # To be found there by compiled calls, which would copy them in each.
                for axis in ("rows", "cols"):
                    mask.on(parameter.device, axis)
        self._leave_out()

    def _leave_out(self) -> None:
        """Let modules know of the droppable children that are wholly outside; nothing in these
        will run.
        """
        outside: dict[nn.Module, dict[str, None]] = {
            module: {n: None for n, child in module.droppable().items() if self._is_outside(child)}
            for module in self.model.modules()
            if isinstance(module, MaskedModule)
        }
        if not any(outside.values()):
            return
        running: set[nn.Module] = set()
        _reach(self.model, outside, running)
        self._plain = [(module, partial) for module, partial in self._plain if module in running]
        self._aware = [
            (module, replace(active, masks={**active.masks, **outside.get(module, {})}))
            for module, active in self._aware
            if module in running
        ]

    def _is_outside(self, child: nn.Module) -> bool:
        parameters = list(child.parameters())
        return bool(parameters) and all(self.mask_of(p) is None for p in parameters)

    @classmethod
    def layers_changed(cls, layers: Iterable[nn.Module]) -> None:
        """Have every sub-network follow layers that became others in place: their new parameters
        get the masks that they would have in a sub-network made now.
        """
        changed = set(layers)
        for subnet in list(cls._alive):
            if not changed.isdisjoint(subnet.model.modules()):
                subnet._settle()

    def _add_module(self, prefix: str, module: nn.Module, masks: Mapping[str, Mask | None]) -> None:
        """Settle the masks of one module's own parameters, and how the module gets to know them."""
        dot = f"{prefix}." if prefix else ""
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        named = {name: masks[dot + name] for name in own if dot + name in masks}
        aware = isinstance(module, MaskedModule)
        implied = module.implied_masks(named) if aware else {}
        settled = {name: named.get(name, implied.get(name, Full())) for name in own}
        for name, mask in settled.items():
            # What a SwitchNorm said of its branches stands when the walk reaches them.
            self.masks.setdefault(dot + name, mask)
            if mask is None:
                continue
            try:
                mask.check(own[name].shape)
            except ValueError as error:
                raise ValueError(f"{dot + name}: {error}") from None
        if aware:
            for foreign in module.foreign_parameters(self.name):
                self.masks[dot + foreign] = masks.get(dot + foreign)
            follows = frozenset(name for name in implied if settled[name] == implied[name])
            self._aware.append((module, Active(self.name, settled, follows)))
        elif own:
            partial = {
                name: mask
                for name, mask in settled.items()
                if mask is None or mask.numel(own[name].shape) < own[name].numel()
            }
            self._plain.append((module, partial))

    @classmethod
    def full(cls, model: nn.Module, *, name: str = "full") -> SubNetwork:
        """The super-network itself: everything but what belongs to other sub-networks alone."""
        return cls(model, {}, name=name)

    @classmethod
    def width(
        cls,
        model: nn.Module,
        ratio: float | Mapping[str, float],
        *,
        name: str = "core",
        round_to: int = 16,
        separate_norm: bool = True,
    ) -> SubNetwork:
        """The narrow network of the first ``ratio`` of every hidden width; smaller ratios are
        nested.

        Args:
            model: one with ``width_masks(kept) -> {parameter name: mask}``, where
                ``kept(name, total)`` says which of a width's channels or neurons stay, such as the
                models of ``maskedtrain.models``.
            ratio: in (0, 1], for all widths; or by pattern of their names, as in
                ``{"layer4*": 0.25, "*": 0.5}``, where the first that matches counts and widths
                that none matches stay whole.
            round_to: widths become multiples of it where the layer allows (see ``active_count``).
            separate_norm: give the sub-network batch norms of its own (adds parameters to the
                model's ``SwitchNorm`` layers: make the optimizer afterwards).
        """
        kept = Ratios({"*": ratio} if isinstance(ratio, float | int) else ratio, round_to)
        masks = width_masks(model, kept)
        kept.check_used()
        if separate_norm:
            for prefix, module in model.named_modules():
                weight = f"{prefix}.weight"
                mask = masks.get(weight)
                if isinstance(module, SwitchNorm) and mask is not None:
                    module.add_branch(name, mask)
                    del masks[weight]
        return cls(model, masks, name=name)

    @classmethod
    def neurons(cls, model: nn.Module, kept: Mapping[str, Tensor], *, name: str) -> SubNetwork:
        """The network of any neurons of some widths; the others stay whole.

        Batch norms are the super-network's own, over the channels that stay.

        Args:
            model: as for ``width``.
            kept: by name of the width (``widths_of`` lists them), sorted int64 positions of the
                neurons or channels that stay.
            name: what the sub-network is called.

        Raises:
            ValueError: there is no width of this name, or positions are no part of it.

        Example:
            >>> half = SubNetwork.neurons(mlp, {"hidden.0": torch.arange(0, 500, 2)}, name="half")
        """
        widths = widths_of(model)
        for width in kept:
            if width not in widths:
                raise ValueError(f"the model has no width {width!r}{near(width, widths)}")
        return cls(model, width_masks(model, lambda width, _: kept.get(width)), name=name)

    def without(self, patterns: Sequence[str], *, name: str = "core") -> SubNetwork:
        """This sub-network less all parameters that a pattern matches.

        A branch of a ``Sum``, or a block of a ``ResNet`` whose skip connection is the identity, of
        which nothing is left is not computed; elsewhere parameters outside count as zero.

        Args:
            patterns: of names as in ``model.named_parameters()``, as in ``fnmatch``.
            name: what the new sub-network is called; this one's, if it has norms of its own that
                the new one is to use.

        Raises:
            ValueError: a pattern matches no parameter, or one that has another name, too, which
                none matches.

        Example:
            >>> core = SubNetwork.full(model).without(["wide.*"])
        """
        known = dict(self.model.named_parameters(remove_duplicate=False))
        found = matching_names("patterns", patterns, known, "parameter")
        outside: dict[str, Mask | None] = dict.fromkeys(found)
        gone = {known[parameter] for parameter in outside}
        for parameter, tensor in known.items():
            if tensor in gone and parameter not in outside:
                raise ValueError(f"{parameter} is tied to a parameter that is left out; name both")
        return SubNetwork(self.model, {**self._given, **outside}, name=name)

    def change(self, masks: Mapping[str, Mask | None]) -> None:
        """Become the sub-network of other masks, as the object it is: who holds it follows.

        Raises:
            ValueError: as when one is made; nothing has changed then.
        """
        vars(self).update(vars(SubNetwork(self.model, masks, name=self.name)))

    def __repr__(self) -> str:
        return f"SubNetwork({self.name!r}, {self.numel():,} parameters)"

    def mask_of(self, parameter: nn.Parameter) -> Mask | None:
        """The mask of one of the model's parameters; None where it is outside."""
        return self._by_parameter.get(parameter)

    def numel(self) -> int:
        """Number of parameters inside."""
        return sum(
            0 if mask is None else mask.numel(parameter.shape)
            for parameter, mask in self._by_parameter.items()
        )

    def issubset(self, other: SubNetwork) -> bool:
        """Whether every element of this sub-network is in the other, of the same model.

        Norms that a sub-network has for itself (``SwitchNorm`` branches) are left out of the
        comparison.
        """
        if other.model is not self.model:
            raise ValueError("the sub-networks belong to different models")
        own = {
            parameter
            for module in self.model.modules()
            if isinstance(module, SwitchNorm)
            for parameter in module.parameters()
            if self.name in module.branches
        }
        for parameter, mask in self._by_parameter.items():
            if mask is None or parameter in own:
                continue
            outer = other.mask_of(parameter)
            if outer is None or not mask.issubset(outer, parameter.shape):
                return False
        return True

    @staticmethod
    def union(first: SubNetwork, *others: SubNetwork, name: str = "union") -> SubNetwork:
        """The parameters that at least one of the sub-networks of one model holds."""
        masks = dict(first.masks)
        parameters = dict(first.model.named_parameters(remove_duplicate=False))
        for subnet in others:
            if subnet.model is not first.model:
                raise ValueError("the sub-networks belong to different models")
            for parameter, mask in subnet.masks.items():
                earlier = masks.get(parameter)
                if earlier is None or mask is None:
                    masks[parameter] = mask if earlier is None else earlier
                else:
                    masks[parameter] = union(earlier, mask, parameters[parameter].shape)
        return SubNetwork(first.model, masks, name=name)

    @contextmanager
    def activate(self) -> Iterator[SubNetwork]:
        """Within it, ``model(x)`` computes the sub-network alone; an outer activation rests. Not
        thread-safe: it sets the modules.
        """
        before = [module.active for module, _ in self._aware]
        with ExitStack() as stack:
            try:
                # Not by nn.Module's own setattr, which looks for parameters first: 2 us each.
                for module, active in self._aware:
                    vars(module)["active"] = active
                for module, partial in self._plain:
                    stack.enter_context(zeroed(module, partial))
                yield self
            finally:
                for (module, _), active in zip(self._aware, before, strict=True):
                    vars(module)["active"] = active

    def extract(self, *, share: bool = False) -> nn.Module:
        """The sub-network as a module of its own, of plain ``torch.nn`` layers with the model's
        structure.

        The model's own container classes stay; none of this package's layers is left, so that
        nothing is masked any more and outputs equal the active sub-network's. A ``Sum`` stays one
        of the branches that are left, and is the branch where that is one; a stage of a ``ResNet``
        is the sequence of its blocks that are left, under their own names.

        Args:
            share: parameters and buffers are views onto the super-network's storage instead of
                copies, so that training the extracted module trains the super-network's part. Needs
                masks that are views.
        """
        if share:
            self._check_views()
        copier = Copier(share=share)
        for module, partial in self._plain:
            check_full_width(module, partial)
            for name, parameter in module.named_parameters(recurse=False):
                copier.memo[id(parameter)] = copier.parameter(parameter, partial.get(name, Full()))
        if share:
            copier.memo.update((id(buffer), buffer) for buffer in self.model.buffers())
        # No module is to be copied in the guise that an outer activation may have given it.
        with SubNetwork.full(self.model).activate():
            # What has children copies them, after what is in them.
            for module, active in sorted(self._aware, key=lambda pair: len([*pair[0].modules()])):
                copier.memo[id(module)] = module.plain(active.masks, self.name, copier)
            return copier.module(self.model)

    def _check_views(self) -> None:
        for name, parameter in self.model.named_parameters():
            mask = self.masks.get(name)
            if mask is not None and mask.views(parameter) is None:
                raise ValueError(
                    f"share=True needs masks that are views (Full, Prefix); {name} has {mask}"
                )

    def flops(self, *inputs: Any, training: bool = False) -> int:
        """FLOPs (2 per multiply-add) of a forward pass on inputs of these shapes, counted by torch.

        Nothing is computed and nothing changes: the pass runs on fake tensors.

        Args:
            inputs: example inputs of the model; only shapes and dtypes matter.
            training: count a backward pass (of the output's sum) too.
        """
        counter = FlopCounterMode(display=False)
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        fakes = FakeTensorMode(allow_non_fake_inputs=True)  # the masks' own tensors stay real
        # torch has no formula for attention's fused kernel on the CPU: it would count as nothing.
        plain = sdpa_kernel(SDPBackend.MATH)
        with fakes as mode, self.activate(), plain, counter, torch.set_grad_enabled(training):
            # Fake twins, so that a forward in training mode cannot move running statistics.
            state: dict[str, Tensor] = {
                n: mode.from_tensor(tensor) for n, tensor in tensors.items()
            }
            fake = tuple(mode.from_tensor(i) if isinstance(i, Tensor) else i for i in inputs)
            output = torch.func.functional_call(self.model, state, fake)
            if training:
                wanted = [tensor for tensor in state.values() if tensor.requires_grad]
                torch.autograd.grad(output.sum(), wanted, allow_unused=True)
        return counter.get_total_flops()


def _reach(
    module: nn.Module, left_out: Mapping[nn.Module, Collection[str]], found: set[nn.Module]
) -> None:
    """Find the modules within this one that a forward pass may call."""
    found.add(module)
    for name, child in module.named_children():
        if child not in found and name not in left_out.get(module, ()):
            _reach(child, left_out, found)
