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
from .reduction import all_reduce
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
        completed: ``(K, size)``, the sums of vectors that lie on several ranks, in the place that
            ``place`` says; None: there are none, or they are in ``values``.
        place: int64 ``(n,)``; -1: in ``values``.
    """

    values: Tensor
    from_slots: bool
    completed: Tensor | None = None
    place: Tensor | None = None


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
            slots, message = _slots_of(kernels, sums), vectors.message
            parts = kernels.combined_over(slots, message.parts)
            sums = Taken(slots, True, parts, message.place)
        if isinstance(sums, Sums):
            return _from_slots(kernels, formula, sums, arguments, ())
        return _of_taken(kernels, formula, sums, arguments, ())
    # What comes next needs results of the right form, so torch makes some of zeros.
    count = 0
    if sums is not None:
        count = sums.how.results if isinstance(sums, Sums) else len(sums.values)
    rows = torch.zeros(count, vectors.n, dtype=vectors.sum_dtype, device=vectors.device)
    return formula(*rows, *_plain(arguments))


def _plain(arguments: Sequence[Any]) -> list[Any]:
    return [each.value if isinstance(each, Number) else each for each in arguments]


def take_with_totals(
    vectors: WeightVectors,
    sums: Sums,
    formula: Formula,
    constants: Sequence[Any] = (),
) -> tuple[Taken, Tensor]:
    """Sums for `work_out`, and over the vectors of each weight the totals of what a formula makes
    of them; in one collective, which every rank must call.

    Args:
        vectors: the index space.
        sums: what to take.
        formula: of the sums, the number of entries of each vector, and the constants.
        constants: no tensors.

    Returns:
        The sums, and ``(J, weights)``.
    """

    def summarize(rows: Tensor, length: Tensor) -> Tensor:
        return torch.stack(formula(*rows, length, *constants))

    kernels = vectors._kernels
    # Elsewhere vectors are summarized before they are complete and after, in one message.
    is_simple = vectors.everywhere or not vectors.cut
    if isinstance(kernels, TritonKernels) and is_simple:
        taken = _taken(vectors, sums)
        try:
            return taken, vectors.over_ranks(_totals(vectors, formula, taken, constants))
        except Unfit:
            totals = vectors.totals(summarize(_complete(vectors, taken), vectors.length))
            return taken, totals
    packed = sums.take(kernels)
    totals = vectors.complete_with_totals(packed, summarize)
    return Taken(packed, from_slots=False), totals


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
    if taken.completed is not None:
        arguments = [taken.place, *taken.completed.unbind(), *arguments]
        formula = of_completed(formula, len(taken.completed))
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
    numbers = [vectors.length, *constants]
    if vectors.spoken is not None:
        formula, numbers = _of_spoken(formula), [*numbers, vectors.spoken]
    if taken.completed is not None:
        numbers = [taken.place, *taken.completed.unbind(), *numbers]
        formula = of_completed(formula, len(taken.completed))
    return kernels.totals(formula, taken.values, numbers, vectors.starts)


def _over_ranks(vectors: WeightVectors, sums: Sums) -> Taken:
    """Sums of vectors of which parts lie on several ranks."""
    kernels = vectors._kernels
    if isinstance(kernels, TritonKernels) and vectors.cut and not sums.rates:
        # Every rank sends a message of the same form, whichever kernels it has for its part.
        with suppress(Unfit):
            slots = _slots_of(kernels, sums)
            message = vectors.message
            parts = kernels.combined_over(slots, message.parts)
            completed = all_reduce(parts, message.group)
            return Taken(slots, True, completed, message.place)
    return Taken(vectors.sum_(sums.take(kernels)), from_slots=False)


def _complete(vectors: WeightVectors, taken: Taken) -> Tensor:
    """The sums of each vector, ``(K, n)``."""
    kernels = vectors._kernels
    values = taken.values
    if taken.from_slots and isinstance(kernels, TritonKernels):
        values = kernels.combined(values)
    # Vectors on several ranks have only their part in the slots of this one.
    if taken.completed is not None:
        vectors.put_back(values, taken.completed, vectors.message)
    return values


@cache
def _of_spoken(formula: Formula) -> Formula:
    """The same formula of the vectors that a rank speaks for, 0 of the others."""

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
