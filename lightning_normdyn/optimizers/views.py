"""What steps when an optimizer does, each as a torch optimizer of the model's own weights.

A strategy may step something else than the weights: torch's ZeroRedundancyOptimizer a share of them
on every rank, DeepSpeed flat float32 tensors. A view then shows the optimizer that there would be
on one process.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_normdyn.errors import NotSupportedError
from lightning_normdyn.geometry.flat import FlatSlice, forget, remember, survey_fsdp
from lightning_normdyn.geometry.pieces import Master, private, untested

from .step_view import ParamGroup, part_of, split_groups
from .wrappers import second_phase, steps_in_two_phases, without_framework

_VIEWS: WeakKeyDictionary[Any, list[Optimizer]] = WeakKeyDictionary()


def torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """What steps when ``optimizer`` does, each as a torch optimizer of the model's own weights.

    That is the optimizer itself, inside whatever Lightning, Fabric or a strategy has wrapped around
    it. Where a strategy steps something else than the weights it is a view, which has the class,
    the param groups, the state and the step hooks that the optimizer would have on one process: one
    for torch's ZeroRedundancyOptimizer, one for each part that DeepSpeed steps on its own.

    An optimizer that a person has put around another one steps itself: what it does to the weights
    after the inner step (Lookahead) belongs to its step. The exception is one in two phases (SAM):
    its first moves the weights aside for a second gradient, its second moves them back and lets the
    inner optimizer make the step.

    Raises:
        NotSupportedError: if there is none, or a way of stepping that is not understood.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1)
        >>> torch_optimizers(optimizer) == [optimizer]
        True
    """
    inner = without_framework(optimizer)
    # Views are kept: a bracket is found by the optimizer that it was made for.
    if inner in _VIEWS:
        return _VIEWS[inner]
    kind = type(inner)
    if kind.__module__.startswith("deepspeed.runtime."):
        return _VIEWS.setdefault(inner, _deepspeed_views(inner))
    if any(c.__name__ == "ZeroRedundancyOptimizer" for c in kind.__mro__):
        return _VIEWS.setdefault(inner, [_zero_redundancy_view(inner)])
    if not isinstance(inner, Optimizer):
        raise NotSupportedError(
            f"{type(optimizer).__name__} is not a torch optimizer and wraps none. Use a "
            "torch.optim.Optimizer."
        )
    if steps_in_two_phases(inner):
        return [second_phase(inner)]
    return [inner]


def survey(module: nn.Module, optimizers: Iterable[Any] = ()) -> None:
    """Learn where the parameters lie that FSDP or DeepSpeed has flattened.

    Call it once after wrapping; without them it does nothing.

    Args:
        module: the outermost FSDP module, or any other.
        optimizers: as the strategy has wrapped them.

    Raises:
        NotSupportedError: for ``use_orig_params=False`` and for parameters that another strategy
            has sharded before.
    """
    # An earlier fit may have used another strategy.
    forget(module.parameters())
    for optimizer in optimizers:
        for view in torch_optimizers(optimizer):
            if isinstance(view, _DeepSpeedView):
                remember(view._places)
    survey_fsdp(module)


def groups_for_step(
    optimizer: Optimizer,
    groups: Sequence[ParamGroup],
    taken: Collection[Tensor],
    *,
    write_through: bool,
) -> list[ParamGroup] | None:
    """What a step is to see in place of ``groups`` so that it does not decay some weights.

    Args:
        optimizer: one of `torch_optimizers`.
        groups: those of the object that steps: the optimizer itself, or what a strategy steps in
            its place.
        taken: these weights, as the model has them.
        write_through: as for `lightning_normdyn.optimizers.step_view.split_groups`.

    Returns:
        As `lightning_normdyn.optimizers.step_view.split_groups`.
    """
    if isinstance(optimizer, _DeepSpeedView):
        return optimizer.groups_for_step(groups, taken, write_through)
    return split_groups(groups, taken, write_through=write_through)


def steps_as_one(optimizer: Optimizer) -> bool:
    """Whether all weights of ``optimizer`` are stepped as one tensor.

    Its weight decay is then on for all of them or off for all.
    """
    return isinstance(optimizer, _DeepSpeedView)


def accumulates(model: Any) -> bool:
    """Whether what is called a step now only adds to the gradients.

    DeepSpeed's engine accumulates by itself, after it was told to step.
    """
    name = "is_gradient_accumulation_boundary"
    # Asked in every batch, and a module takes longer than its class to find out that it has none.
    if isinstance(model, nn.Module) and not hasattr(type(model), name):
        return False
    is_boundary = getattr(model, name, None)
    return is_boundary is not None and not is_boundary()


class _OneProcessView:
    """An optimizer as it would be on one process.

    It never steps; it only tells, and passes hooks on.
    """

    # Weak: the registry of views must not keep optimizers alive.
    _target: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_target" not in vars(self):
            raise AttributeError(name)
        return getattr(self._target(), name)

    def __repr__(self) -> str:
        return f"{type(self).__name__} as seen on one process"


def _new_view(view: type[_OneProcessView], target: Optimizer) -> Any:
    """A ``view`` that passes for an instance of the class of ``target``."""
    kind = type(target)
    # Derived from the class of the target, so that the optimizer is recognized by its step.
    view_class = type(kind.__name__, (view, kind), {"__module__": kind.__module__})
    made: Any = object.__new__(view_class)
    made._target = ref(target)
    return made


# ------------------------------------------------------------------ torch's ZeroRedundancyOptimizer


def _zero_redundancy_view(outer: Any) -> Any:
    inner, overlap = private(outer, "optim", "_overlap_with_ddp")
    # Then the inner optimizer steps one bucket at a time.
    if overlap:
        raise NotSupportedError(
            "ZeroRedundancyOptimizer(overlap_with_ddp=True) steps inside of DDP's backward pass, "
            "where no gradient is final. Use overlap_with_ddp=False."
        )
    view = _new_view(_ZeroRedundancyView, inner)
    view._outer = ref(outer)
    return view


class _ZeroRedundancyView(_OneProcessView):
    """Every rank holds all weights and gradients and updates some, which are then sent to all.

    So every rank treats all weights alike, as under DDP: at ``ready`` inside the inner step, at
    ``stepped`` after the outer one, when the others' updates have arrived.
    """

    _outer: Any

    @property
    def param_groups(self) -> Any:
        return self._outer().param_groups

    @property
    def state(self) -> Any:
        return self._target().state

    @property
    def _optimizer_step_post_hooks(self) -> Any:
        return self._outer()._optimizer_step_post_hooks

    def register_step_pre_hook(self, hook: Any) -> Any:
        return self._target().register_step_pre_hook(
            lambda _, args, kwargs: hook(self, args, kwargs)
        )

    def register_step_post_hook(self, hook: Any) -> Any:
        return self._outer().register_step_post_hook(
            lambda _, args, kwargs: hook(self, args, kwargs)
        )


# --------------------------------------------------------------------------------------- DeepSpeed


# Options under which the optimizer's weights or gradients lie elsewhere than these views look.
_UNTESTED_DEEPSPEED = (
    "cpu_offload",
    "offload_optimizer",
    "swap_optimizer",
    "zenflow",
    "torch_autocast_gradscaler",
    "use_muon",
)


def _deepspeed_views(optimizer: Any) -> list[Optimizer]:
    name = type(optimizer).__name__
    if name not in ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"):
        raise NotSupportedError(
            f"DeepSpeed's {name} is not understood (ZeRO stages 1, 2 and 3 are, and stage 0 in "
            "float32). Use stage 1, 2 or 3, or precision='32-true'."
        )
    switched_on = [key for key in _UNTESTED_DEEPSPEED if getattr(optimizer, key, None)]
    if switched_on:
        raise NotSupportedError(
            f"DeepSpeed with {switched_on[0]} was not tested. Leave it out of the DeepSpeed "
            "configuration."
        )
    find_parts = _deepspeed_stage3 if name.endswith("3") else _deepspeed_stage12
    views = []
    for part in find_parts(optimizer):
        view = _new_view(_DeepSpeedView, optimizer.optimizer)
        view._flat, view._group, view._places = part
        view.param_groups = [{**part.group, "params": list(part.places)}]
        views.append(view)
    return views


class _Part(NamedTuple):
    """What DeepSpeed steps at once."""

    flat: Tensor  # this rank's float32 copy of the weights, one behind the other
    group: ParamGroup
    places: dict[Tensor, FlatSlice]


def _deepspeed_stage12(optimizer: Any) -> Iterator[_Part]:
    weights, buffers, masters, sizes, groups = private(
        optimizer,
        "bit16_groups",
        "bit16_groups_flat",
        "single_partition_of_fp32_groups",
        "partition_size",
        "real_dp_process_group",
    )
    for i, group in enumerate(optimizer.optimizer.param_groups):
        places = {}
        for weight in weights[i]:
            # Parameters are views of the flat buffer, whatever the order and the gaps in it.
            offset = (weight.data_ptr() - buffers[i].data_ptr()) // weight.element_size()
            # DeepSpeed's own account of this rank's entries: none where a weight lies elsewhere.
            (mapping,) = private(weight, "_hp_mapping")
            begin, recorded = 0, None
            if mapping is not None:
                begin = mapping.hp_fragment_address.start
                recorded = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            place = _slice_of(weight.shape, offset, sizes[i], groups[i], masters[i], begin)
            start, stop = place.held
            expected = (start, stop - start) if stop > start else None
            if recorded != expected:
                raise untested(
                    f"DeepSpeed holds the entries {recorded} (start, number) of a weight where "
                    f"{(start, stop - start)} was expected"
                )
            places[weight] = place
        yield _Part(masters[i], group, places)


def _deepspeed_stage3(optimizer: Any) -> Iterator[_Part]:
    weights, masters, group_of = private(
        optimizer, "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id"
    )
    for i, master in enumerate(masters):
        # Weights lie one behind the other in a sub-group, each in its chunk of this rank.
        begin = 0
        places = {}
        for weight in weights[i]:
            shape, piece, process_group = private(
                weight, "ds_shape", "ds_tensor", "ds_process_group"
            )
            places[weight] = _slice_of(shape, 0, piece.ds_numel, process_group, master, begin)
            # By the chunk and not by the entries: what lies between their ends is padding.
            begin += piece.ds_numel
        if begin != master.numel():
            raise untested(
                f"a sub-group of DeepSpeed stage 3 has {master.numel()} entries where {begin} were "
                "expected"
            )
        yield _Part(master, optimizer.optimizer.param_groups[group_of[i]], places)


def _slice_of(
    shape: Sequence[int],
    offset: int,
    chunk: int,
    group: Any,
    master: Tensor,
    begin: int,
) -> FlatSlice:
    """A weight whose entries on this rank begin at ``begin`` of ``master``."""
    order = tuple(range(len(shape)))
    place = FlatSlice(tuple(shape), order, offset, chunk, dist.get_rank(group), group)
    start, stop = place.held
    return replace(place, master=Master(master, begin, stop - start))


class _DeepSpeedView(_OneProcessView):
    """One of the flat tensors that DeepSpeed steps one after the other, as the weights in it."""

    _flat: Tensor
    _group: ParamGroup
    _places: dict[Tensor, FlatSlice]
    param_groups: list[ParamGroup]

    def groups_for_step(
        self, groups: Sequence[ParamGroup], taken: Collection[Tensor], write_through: bool
    ) -> list[ParamGroup] | None:
        """See `groups_for_step`.

        A flat tensor has one group only, so none of its weights gets decay from the optimizer.
        """
        is_taken = any(weight in taken for weight in self._places)
        if not is_taken or not self._group.get("weight_decay"):
            return None
        shown = list(groups)
        for i, group in enumerate(groups):
            if self._is_in(group):
                shown[i] = part_of(group, {"weight_decay": 0.0}, write_through=write_through)
        return shown

    def _is_in(self, group: ParamGroup) -> bool:
        return any(p is self._flat for p in group["params"])

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        flat_state = self._target().state.get(self._flat, {})
        state = {}
        for weight, place in self._places.items():
            assert place.master is not None
            state[weight] = dict(flat_state)
            for name, value in flat_state.items():
                if isinstance(value, Tensor) and value.shape == self._flat.shape:
                    state[weight][name] = place.master.of(value)
        return state

    def _steps(self) -> bool:
        """Whether the flat tensor is what steps now."""
        # Its group is looked up each time, since loading a checkpoint makes new ones.
        for group in self._target().param_groups:
            if self._is_in(group):
                self._group = group
                return True
        return False

    def register_step_pre_hook(self, hook: Any) -> Any:
        def hook_of_this_part(_: Any, args: Any, kwargs: Any) -> Any:
            # DeepSpeed steps its flat tensors one after the other with one optimizer.
            if not self._steps():
                return None
            # Schedules change the settings of the group that really steps.
            shown = self.param_groups[0]
            shown.update({**self._group, "params": shown["params"]})
            return hook(self, args, kwargs)

        return self._target().register_step_pre_hook(hook_of_this_part)

    def register_step_post_hook(self, hook: Any) -> Any:
        def hook_of_this_part(_: Any, args: Any, kwargs: Any) -> None:
            if self._steps():
                hook(self, args, kwargs)

        return self._target().register_step_post_hook(hook_of_this_part)
