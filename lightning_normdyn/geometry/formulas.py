"""Formulas on sums over vectors, worked out with as few launches as the device allows.

Letters: n vectors, K sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import passes
from .fusion import Formula, Number
from .kernels import Kernels
from .passes import Operand, Pass
from .reduction import Message, all_reduce, alone
from .triton_kernels import TritonKernels, of_completed, radial_of_step
from .triton_tables import Unfit
from .vectors import WeightVectors


@dataclass(frozen=True)
class Sums:
    """Sums over the vectors of some weights that are still to be taken.

    Args:
        how: the pass that takes them.
        operands: what it reads.
        rates: ``(n,)`` each: the step is minus this times the direction that is read.
    """

    how: Pass
    operands: Sequence[Operand]
    rates: Sequence[Tensor] = ()

    def take(self, kernels: Kernels) -> Tensor:
        """This rank's part of them, ``(K, n)``."""
        return kernels.sums(self.how, self.operands, [-rate for rate in self.rates])


def squares(vectors: WeightVectors, *, exact: bool = False) -> Sums:
    """<w, w>; right to float32 rounding, unless ``exact``."""
    # Metal has no float64.
    in_float64 = exact and vectors.sum_dtype == torch.float64
    how = passes.EXACT_SQUARES if in_float64 else passes.SQUARES
    return Sums(how, [vectors.values()])


def products(vectors: WeightVectors, others: Operand) -> Sums:
    """<w, w>, <w, x> and <x, x> with x = ``others``; right to float32 rounding."""
    return Sums(passes.PRODUCTS, [vectors.values(), others])


def moments(vectors: WeightVectors) -> Sums:
    """<w, w> and <1, w>."""
    return Sums(passes.MOMENTS, [vectors.values()])


def displacement(vectors: WeightVectors, before: Operand) -> Sums:
    """<w, w>, <w, Δ> and <Δ, Δ> with w = ``before``, all in float64."""
    how = passes.displacement(vectors.sum_dtype)
    return Sums(how, [before, vectors.values_beside(before)])


def radial(vectors: WeightVectors, before: Operand) -> Sums:
    """<w, w> and <w, Δ> with w = ``before``."""
    return Sums(passes.RADIAL, [before, vectors.values_beside(before)])


def radial_part_of_step(
    vectors: WeightVectors,
    direction: Operand,
    rate: Tensor,
) -> Sums:
    """<w, w>, <w, Δ> and <direction, direction> with Δ = ``-rate * direction``, as SGD steps."""
    operands = [direction, vectors.values_beside(direction)]
    return Sums(passes.RADIAL_OF_STEP, operands, [rate])


@dataclass(frozen=True)
class Taken:
    """Sums that have been taken, and completed over ranks.

    Args:
        values: ``(K, n)``; or ``(K, S)``, still to be added up from the slots of each vector.
        from_slots: which of the two.
        message: which vectors lie on several ranks; None: there are none, or their sums are in
            ``values``.
        completed: ``(K, size)``, their sums, as they were sent.
    """

    values: Tensor
    from_slots: bool
    message: Message | None = None
    completed: Tensor | None = None

    def of(self, formula: Formula, arguments: Sequence[Any]) -> tuple[Formula, Sequence[Any]]:
        """The same formula of what lies here, and what it takes behind ``values``."""
        if self.message is None or self.completed is None:
            return formula, arguments
        numbers = self.message.place, *self.completed.unbind(), *arguments
        return of_completed(formula, len(self.completed)), numbers


def fuses_formulas(vectors: WeightVectors) -> bool:
    """Whether a formula is one launch here: then it pays to give `work_out` long ones."""
    return isinstance(vectors._kernels, TritonKernels) and TritonKernels.failure is None


def work_out(
    vectors: WeightVectors,
    formula: Formula,
    sums: Sums | Taken | None,
    arguments: Sequence[Any] = (),
    into: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """``formula(*sums, *arguments)``, entry by entry: one launch where formulas are fused.

    One collective where vectors lie on several ranks; then every rank must call it.

    Args:
        vectors: the index space.
        formula: a function of a module (it is known by its identity) that changes nothing in
            place. Of a result that is `largest_of` all vectors there may be several numbers: the
            largest of these.
        sums: what it takes first; None: nothing.
        arguments: tensors, ``(n,)`` or of no dimension; `Number` for each number that changes from
            step to step; and whatever else it takes. A tensor that the formula only takes entries
            of, by ``(n,)`` indices, may have any length.
        into: for each result the tensor to write it to, or None; may be shorter.

    Returns:
        The results, ``(n,)`` each.
    """
    kernels = vectors._kernels
    if TritonKernels.only_compiles:
        return _compiled(vectors, formula, sums, arguments)
    if isinstance(kernels, TritonKernels):
        # Parts of vectors are added up over ranks first. Before anything can fail: a rank that
        # takes part in a collective twice would wait for ever.
        if isinstance(sums, Sums) and vectors.cut:
            sums = _over_ranks(vectors, sums)
        with suppress(Unfit):
            if isinstance(sums, Sums):
                return _from_slots(kernels, formula, sums, arguments, into)
            return _of_taken(kernels, formula, sums, arguments, into)
    if isinstance(sums, Sums):
        sums = Taken(vectors.sum_(sums.take(kernels)), from_slots=False)
    rows: Sequence[Tensor] = ()
    if sums is not None:
        rows = _complete(vectors, sums).unbind()
    results = formula(*rows, *_plain(arguments))
    for destination, result in zip(into, results, strict=False):
        if destination is not None:
            destination.copy_(result)
    return results


@contextmanager
def compiling_only() -> Iterator[None]:
    """Whatever is worked out or written meanwhile is only compiled, so that a fit does not stop for
    it after its first write; results are any numbers, and no rank waits for another."""
    TritonKernels.only_compiles = True
    try:
        with alone():
            yield
    finally:
        TritonKernels.only_compiles = False


def _compiled(
    vectors: WeightVectors,
    formula: Formula,
    sums: Sums | Taken | None,
    arguments: Sequence[Any],
) -> tuple[Tensor, ...]:
    """Results of the right form, once what `work_out` launches has been compiled."""
    kernels = vectors._kernels
    with suppress(Unfit):
        if not isinstance(kernels, TritonKernels):
            raise Unfit("torch compiles nothing")
        if isinstance(sums, Sums) and vectors.cut:
            sums = _sent_over_ranks(vectors, kernels, sums)
        if isinstance(sums, Sums):
            return _from_slots(kernels, formula, sums, arguments, ())
        return _of_taken(kernels, formula, sums, arguments, ())
    # What comes next needs results of the right form, so torch makes some of zeros.
    count = 0
    if sums is not None:
        count = sums.how.results if isinstance(sums, Sums) else len(sums.values)
    return formula(*_zeros(vectors, count), *_plain(arguments))


def _zeros(vectors: WeightVectors, count: int) -> Tensor:
    return torch.zeros(count, vectors.n, dtype=vectors.sum_dtype, device=vectors.device)


def _plain(arguments: Sequence[Any]) -> list[Any]:
    return [each.value if isinstance(each, Number) else each for each in arguments]


def take_with_totals(
    vectors: WeightVectors,
    sums: Sums,
    formula: Formula,
    constants: Sequence[Any] = (),
    *,
    linear: bool = False,
) -> tuple[Taken, Tensor]:
    """Sums for `work_out`, and over the vectors of each weight the totals of what a formula makes
    of them; in one collective, which every rank must call.

    Args:
        vectors: the index space.
        sums: what to take.
        formula: of the sums, the number of entries of each vector, and the constants.
        constants: no tensors.
        linear: whether what the formula makes of the pieces of a vector adds up to what it makes
            of the vector; then pieces are totalled before the collective, which saves a launch.

    Returns:
        The sums, and ``(J, weights)``.
    """

    def summarize(rows: Tensor, length: Tensor) -> Tensor:
        return torch.stack(formula(*rows, length, *constants))

    kernels = vectors._kernels
    # Elsewhere vectors are summarized before they are complete and after, in one message.
    is_simple = vectors.everywhere or not vectors.cut
    if isinstance(kernels, TritonKernels) and not is_simple:
        # Before the collective, or not at all: every rank takes part in it once.
        with suppress(Unfit):
            return _taken_and_totalled(vectors, kernels, sums, formula, constants, linear=linear)
    if TritonKernels.only_compiles:
        return _totals_compiled(vectors, sums, formula, constants)
    if isinstance(kernels, TritonKernels) and is_simple:
        taken = _taken(vectors, sums)
        try:
            return taken, vectors.over_ranks(_totals(vectors, formula, taken, constants))
        except Unfit:
            totals = vectors.totals(summarize(_complete(vectors, taken), vectors.length))
            return taken, totals
    packed = sums.take(kernels)
    totals = vectors.complete_with_totals(packed, summarize, linear=linear)
    return Taken(packed, from_slots=False), totals


def _taken_and_totalled(
    vectors: WeightVectors,
    kernels: TritonKernels,
    sums: Sums,
    formula: Formula,
    constants: Sequence[Any],
    *,
    linear: bool,
) -> tuple[Taken, Tensor]:
    """`take_with_totals` where some vectors are cut and others lie on one rank: what
    `Reduction.complete_with_totals` does, in three launches; ``linear``: in two.

    Raises:
        Unfit: before the collective.
    """
    message, kinds = vectors.message_with_totals, sums.how.results
    of_some = _of_spoken(formula)
    chosen = message.added if linear else message.others
    numbers = [vectors.length, *constants, chosen.flags]
    of_cut = [message.length, *constants]
    form = kernels.number_of_totals(of_some, kinds, numbers), len(vectors.weights)
    room = form[0] * form[1]
    slots, buffer = kernels.slots_to_send(sums.how, sums.operands, message.parts, room)
    slots = slots[:kinds]
    totals = buffer[:room].view(form)
    kernels.totals(of_some, slots, numbers, vectors.starts, into=totals)
    completed = buffer[room:].view(-1, message.size)[:kinds]
    all_reduce(buffer[: room + completed.numel()], None)
    taken = Taken(slots, True, message, completed)
    if linear:
        return taken, totals
    try:
        kernels.totals(
            formula, completed, of_cut, message.starts, from_slots=False, into=totals, adds=True
        )
    except Unfit:
        summaries = torch.stack(formula(*completed, *of_cut))
        totals.index_add_(-1, message.weight_of, summaries)
    return taken, totals


def _totals_compiled(
    vectors: WeightVectors, sums: Sums, formula: Formula, constants: Sequence[Any]
) -> tuple[Taken, Tensor]:
    """Results of the right form, once what `take_with_totals` launches has been compiled."""
    rows = _zeros(vectors, sums.how.results)
    with suppress(Unfit):
        taken = _taken(vectors, sums)
        return taken, _totals(vectors, formula, taken, constants)
    totals = torch.stack(formula(*rows, vectors.length, *constants))
    return Taken(rows, from_slots=False), vectors.per_weight(totals)


def largest_of(values: Tensor) -> Tensor:
    """The largest of ``(n,)`` numbers that are at least 0; 0 on a rank that holds no vector. A
    formula may have it as a result."""
    return values.amax() if values.numel() else values.new_zeros(())


def _from_slots(
    kernels: TritonKernels,
    formula: Formula,
    sums: Sums,
    arguments: Sequence[Any],
    into: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    slots = _slots_of(kernels, sums)
    if sums.how is passes.RADIAL_OF_STEP:
        formula = _of_step(formula)
    return kernels.rule(formula, slots, [*sums.rates, *arguments], into, from_slots=True)


def _slots_of(kernels: TritonKernels, sums: Sums) -> Tensor:
    slots = kernels.slots(sums.how, sums.operands)
    return slots[:2] if sums.how is passes.RADIAL else slots


def _of_taken(
    kernels: TritonKernels,
    formula: Formula,
    taken: Taken | None,
    arguments: Sequence[Any],
    into: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    if taken is None:
        return kernels.rule(formula, None, arguments, into, from_slots=False)
    formula, arguments = taken.of(formula, arguments)
    return kernels.rule(formula, taken.values, arguments, into, from_slots=taken.from_slots)


def _taken(vectors: WeightVectors, sums: Sums) -> Taken:
    """Sums, completed over ranks, by programs if they can take them."""
    kernels = vectors._kernels
    if isinstance(kernels, TritonKernels) and not vectors.cut:
        with suppress(Unfit):
            return Taken(_slots_of(kernels, sums), from_slots=True)
    return _over_ranks(vectors, sums)


def _totals(
    vectors: WeightVectors, formula: Formula, taken: Taken, constants: Sequence[Any]
) -> Tensor:
    kernels = vectors._kernels
    if not taken.from_slots or not isinstance(kernels, TritonKernels):
        raise Unfit("sums are complete already")
    numbers: Sequence[Any] = [vectors.length, *constants]
    if vectors.spoken is not None:
        formula, numbers = _of_spoken(formula), [*numbers, vectors.spoken]
    formula, numbers = taken.of(formula, numbers)
    return kernels.totals(formula, taken.values, numbers, vectors.starts)


def _over_ranks(vectors: WeightVectors, sums: Sums) -> Taken:
    """Sums of vectors of which parts lie on several ranks."""
    kernels = vectors._kernels
    if isinstance(kernels, TritonKernels) and vectors.cut and not sums.rates:
        # Every rank sends a message of the same form, whichever kernels it has for its part.
        with suppress(Unfit):
            return _sent_over_ranks(vectors, kernels, sums)
    return Taken(vectors.sum_(sums.take(kernels)), from_slots=False)


def _sent_over_ranks(vectors: WeightVectors, kernels: TritonKernels, sums: Sums) -> Taken:
    """`_over_ranks` by programs.

    Raises:
        Unfit: before the collective.
    """
    message, kinds = vectors.message, sums.how.results
    slots, buffer = kernels.slots_to_send(sums.how, sums.operands, message.parts)
    completed = buffer.view(-1, message.size)[:kinds]
    return Taken(slots[:kinds], True, message, all_reduce(completed, message.group))


def _complete(vectors: WeightVectors, taken: Taken) -> Tensor:
    """The sums of each vector, ``(K, n)``."""
    kernels = vectors._kernels
    values = taken.values
    if taken.from_slots and isinstance(kernels, TritonKernels):
        values = kernels.combined(values)
    # Vectors on several ranks have only their part in the slots of this one.
    if taken.message is not None and taken.completed is not None:
        vectors.put_back(values, taken.completed, taken.message)
    return values


@cache
def _of_spoken(formula: Formula) -> Formula:
    """The same formula of the vectors that a rank speaks for, or adds a piece of; 0 of others."""

    def of_spoken(*numbers: Any) -> tuple[Tensor, ...]:
        *given, spoken = numbers
        return tuple(result.where(spoken, 0.0) for result in formula(*given))

    return of_spoken


@cache
def _of_step(formula: Formula) -> Formula:
    """The same formula of the sums that a launch over a step finds."""

    def of_slots(
        vv: Tensor, vd: Tensor, dd: Tensor, rate: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        return formula(*radial_of_step(vv, vd, dd, -rate), *arguments)

    return of_slots
