"""One update of one optimizer: its phases, and what callbacks have done for it so far.

A handler gets the `Step` and acts through it. What it multiplies before the update is noted there,
so that it can be taken back if the update never comes (an exception, a checkpoint in between).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from .decay import DecayOwner
from .same_weights import SameWeights
from .scaling import Scaling


class Phase(IntEnum):
    """The order of events within a step, whatever the order in which callbacks register."""

    RESOLVE = 0  # ready: find out which weights are meant (first step, or param groups changed)
    MEASURE = 10  # ready: sums over w_t, the weight that the gradient was taken at
    LR_DROP = 20  # ready: rescale weights, state and this step's gradients
    SHRINK = 30  # ready: w <- f w
    SNAPSHOT = 40  # ready: copy the shrunk weight, where somebody asks for it
    # stepped: the first real step has filled the optimizer's state; last moment for an error
    LOOK_AGAIN = 45
    PROJECT = 50  # stepped: on w' - s
    MEASURE_STEP = 60  # stepped: angle of the step
    RESCALE = 70  # stepped: last, so that no step's angle contains it


class Ids:
    """The ids of some weights, worked out anew only where it is others that are asked for: which
    weights have a gradient is nearly always the same.

    Example:
        >>> first, second = torch.ones(2), torch.ones(2)
        >>> ids = Ids()
        >>> ids.of([first, second]) is ids.of([first, second]), len(ids.of([second]))
        (True, 1)
    """

    def __init__(self) -> None:
        # The weights as well, so that an id is not given to another object meanwhile.
        self._weights = SameWeights([])
        self._ids: frozenset[int] = frozenset()

    def of(self, weights: Sequence[Tensor]) -> frozenset[int]:
        """The ids of ``weights``; the same object as long as these are the same."""
        if not self._weights.are_in([weights]):
            self._weights, self._ids = SameWeights([weights]), frozenset(map(id, weights))
        return self._ids


_SHAPE = attrgetter("shape")
_DTYPE = attrgetter("dtype")
_IS_CPU = attrgetter("is_cpu")


class _Memory(NamedTuple):
    """What the newest snapshots were written to.

    Args:
        ids: of the weights.
        forms: shape and dtype of each storage.
        buffers: the copies.
    """

    ids: list[int]
    forms: list[tuple[torch.Size, torch.dtype]]
    buffers: list[Tensor]


class Snapshots:
    """The copies of one optimizer's weights, of one step at a time; each weight is copied once.

    Example:
        >>> weight, copies = torch.ones(2), Snapshots()
        >>> copies.request_snapshot({weight: weight})
        >>> copies.take_snapshots()
        >>> weight.mul_(3)
        tensor([3., 3.])
        >>> copies.snapshot(weight)
        tensor([1., 1.])
    """

    def __init__(self) -> None:
        self._requests: dict[Tensor, Tensor] = {}
        # By id: to hash a tensor calls Python, and a step looks for each weight several times. The
        # optimizer holds the weights while copies of them are kept.
        self._copies: dict[int, Tensor] = {}
        self._buffers: dict[int, Tensor] = {}
        self._newest = _Memory([], [], [])

    def request_snapshot(self, storages: Mapping[Tensor, Tensor]) -> None:
        """Ask, before phase SNAPSHOT, that the shrunk weights of this step be copied.

        Args:
            storages: weight -> this rank's plain storage of it; asked for twice, a weight is copied
                once.
        """
        self._requests.update(storages)

    def early_snapshot(self, weights: Sequence[Tensor], storages: Sequence[Tensor]) -> list[Tensor]:
        """Memory for this step's snapshot of ``weights``, in their order.

        For one who reads the weights anyway and copies them on the way. Only for a handler in a
        phase after which nothing `acts_between` it and SNAPSHOT; it must copy all.

        Args:
            weights: each of them once.
            storages: this rank's plain storage of each.
        """
        ids = list(map(id, weights))
        # Nearly always one handler asks, for all weights of its plan.
        if not self._copies:
            memory = self._memory_for(ids, storages)
            self._copies.update(zip(ids, memory, strict=True))
            return memory
        for number, storage in zip(ids, storages, strict=True):
            if number not in self._copies:
                self._copies[number] = self._buffer(number, storage)
        return self.snapshots_of(weights)

    def take_snapshots(self) -> None:
        """Copy what was asked for and is not there yet."""
        if not self._requests:
            return
        requests, self._requests = self._requests, {}
        missing = {
            weight: storage
            for weight, storage in requests.items()
            if id(weight) not in self._copies
        }
        # One call for all of them: on a GPU that is a few launches instead of one per weight.
        if missing:
            storages = list(missing.values())
            torch._foreach_copy_(self.early_snapshot(list(missing), storages), storages)

    def snapshot(self, weight: Tensor) -> Tensor:
        """The copy of the storage of ``weight`` that was taken in this step's SNAPSHOT phase."""
        return self._copies[id(weight)]

    def snapshots_of(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """As `snapshot`, of many weights."""
        return list(map(self._copies.__getitem__, map(id, weights)))

    def forget_snapshots(self) -> None:
        """The step is over, or never came."""
        self._copies.clear()

    def _memory_for(self, ids: list[int], storages: Sequence[Tensor]) -> list[Tensor]:
        """Memory for copies of all ``storages``, that of the last time where they are alike."""
        forms = list(zip(map(_SHAPE, storages), map(_DTYPE, storages), strict=True))
        newest = self._newest
        are_kept = all(map(_IS_CPU, storages))
        # A few comparisons of whole lists: to look at the buffer of each weight takes ten times as
        # long.
        if are_kept and newest.ids == ids and newest.forms == forms:
            return list(newest.buffers)
        buffers = [self._buffer(*entry) for entry in zip(ids, storages, strict=True)]
        self._newest = _Memory(ids, forms, list(buffers)) if are_kept else _Memory([], [], [])
        return buffers

    def _buffer(self, number: int, storage: Tensor) -> Tensor:
        # A CPU fetches new memory page by page from the system, which takes three times as long as
        # the copy, so it is kept. An accelerator's allocator keeps what is freed, and there others
        # can use it between two steps.
        if storage.device.type != "cpu":
            return torch.empty_like(storage)
        buffer = self._buffers.get(number)
        if buffer is None or buffer.shape != storage.shape or buffer.dtype != storage.dtype:
            buffer = self._buffers[number] = torch.empty_like(storage)
        return buffer


class Bracket(Snapshots, ABC):
    """What a handler may ask of the `StepBracket` of its step.

    Attributes:
        ids: of the weights that had a gradient in its last step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ids = Ids()

    @property
    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The torch optimizer."""

    @abstractmethod
    def decay_owners(self) -> dict[Tensor, DecayOwner]:
        """Who applies the decay of each weight that somebody has claimed."""

    @abstractmethod
    def acts_between(self, first: Phase, last: Phase, *, before_rank: int | None = None) -> bool:
        """Whether some handler is called after phase ``first`` and before phase ``last``, or in
        ``last`` with a rank below ``before_rank``.

        If so, weights may change in between.
        """


class HostCopy:
    """A copy of a tensor on the host: from a GPU it arrives while the next steps run.

    Args:
        tensor: what to copy, as it is at this point of the device's work.

    Example:
        >>> HostCopy(torch.ones(2)).get()
        tensor([1., 1.])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._host = tensor.clone()
            return
        # Pinned: a non-blocking copy to the host is asynchronous only if its memory is.
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(tensor.device))

    @property
    def arrives_later(self) -> bool:
        """Whether `get` might have to wait if it is called at once; the same on every rank."""
        return self._event is not None

    def get(self) -> Tensor:
        """The copy; waits until the device has come to the point where it was asked for."""
        if self._event is not None:
            self._event.synchronize()
        # An accelerator other than CUDA has been copied on its own device only.
        return self._host.cpu()


@dataclass
class Step:
    """One update of one optimizer, as handlers see it.

    Args:
        bracket: the bracket it belongs to.
        number: 1-based count of real steps of this optimizer since the bracket was attached, this
            one included.
        skipped: None, or a 0/1 float tensor on the device: whether a fused optimizer skips this
            update inside its kernel (GradScaler found an inf).
        stepped: the weights that have a gradient at ``ready``; a callable is asked when somebody
            wants to know, at most once and before the update, which may free or replace gradients.

    Attributes:
        scalings: what was multiplied for it.
        happened: whether it is known that the update was made, and not skipped.
    """

    bracket: Bracket
    number: int
    skipped: Tensor | None = None
    stepped: Sequence[Tensor] | Callable[[], Sequence[Tensor]] = ()

    def __post_init__(self) -> None:
        self.scalings: list[Scaling] = []
        self.happened = False
        self._is_updated = False
        self._undo: list[Callable[[], None]] = []
        self._notes: list[Callable[[], None]] = []
        self._counts: list[Callable[[], None]] = []

    @property
    def optimizer(self) -> Optimizer:
        """The torch optimizer that steps."""
        return self.bracket.optimizer

    @cached_property
    def with_gradient(self) -> Set[int]:
        """Ids of the weights that had a gradient at ``ready``.

        Raises:
            RuntimeError: after the update, if nobody has asked before it: a handler said that it
                would not ask (see `StepBracket.add`).
        """
        # Not in every step: one that nobody acts in does not ask.
        stepped = self.stepped
        if callable(stepped):
            if self._is_updated:
                raise RuntimeError(
                    "Which weights had a gradient was not noted before the update: "
                    "`reads_gradients` said that nobody would ask."
                )
            stepped = stepped()
        return self.bracket.ids.of(stepped)

    # ------------------------------------------------------------------------- for handlers

    def scale(self, scaling: Scaling) -> None:
        """Multiply weights at ``ready`` so that it can be taken back.

        If this step raises, or a checkpoint is saved before its update, the next step finds the
        weights as they are and goes straight to the update, or divides them by the factor first.
        """
        self.scalings.append(scaling)
        scaling.apply()

    def undo_with(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` if this step raises and the next one has to begin anew.

        For what else than `scale` is done at ``ready``.
        """
        self._undo.append(undo)

    def when_done(self, note: Callable[[], None]) -> None:
        """Call ``note`` as soon as it is known that this step has happened.

        That is after the update, or when a fused optimizer has told the host that it did not skip
        it.
        """
        if self.happened:
            note()
        else:
            self._notes.append(note)

    def when_updated(self, count: Callable[[], None]) -> None:
        """Call ``count`` after the update, at once if it has been made, whether or not a fused
        optimizer skipped it.

        For counts that are 0 where it did.
        """
        if self._is_updated:
            count()
        else:
            self._counts.append(count)

    def unless_skipped(self, value: Tensor, otherwise: float) -> Tensor:
        """``value``, or ``otherwise`` everywhere if the update is skipped on the device.

        No host synchronization.
        """
        if self.skipped is None:
            return value
        is_skipped = self.skipped.to(value.device) > 0
        return torch.where(is_skipped, torch.full_like(value, otherwise), value)

    # ----------------------------------------------------------------------- for the bracket

    def note_gradients(self) -> Set[int]:
        """Have `with_gradient` known from here on."""
        return self.with_gradient

    def mark_updated(self) -> None:
        """The update has been made, or skipped inside of the kernel."""
        self._is_updated = True
        for scaling in self.scalings:
            scaling.forget_gradients()
        counts, self._counts = self._counts, []
        for count in counts:
            count()

    def mark_happened(self) -> None:
        """It is known that the update was not skipped."""
        self.happened = True
        notes, self._notes = self._notes, []
        for note in notes:
            note()

    def seal(self, held_until: object | None = None) -> None:
        """Everything is ready for the update: what is written from now on, others write.

        ``held_until`` as in `lightning_normdyn.optimizers.scaling.Scaling.seal`.
        """
        for scaling in self.scalings:
            scaling.seal(held_until)

    def take_back(self, *, gradients_count: bool) -> None:
        """Make the weights what they were before this step, up to one rounding.

        Those that it has stepped stay. ``gradients_count`` as in
        `lightning_normdyn.optimizers.scaling.Scaling.take_back`.
        """
        if self.happened:
            return
        # All are judged first: taking one back writes to weights that another looks at.
        for scaling in self.scalings:
            scaling.judge()
        for scaling in reversed(self.scalings):
            scaling.take_back(gradients_count=gradients_count)
        for undo in reversed(self._undo):
            undo()


Handler = Callable[[Step], None]
