"""Formulas on sums over vectors, worked out with as few launches as the device allows.

Letters: n vectors, K sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import passes
from .fusion import Formula
from .passes import Operand, Pass
from .triton_kernels import TritonKernels, radial_of_step
from .triton_tables import Unfit
from .vectors import WeightVectors


@dataclass(frozen=True)
class Sums:
    """Sums over the vectors of some weights that are still to be taken.

    Args:
        how: the pass that takes them.
        operands: what it reads.
        numbers: ``(n,)`` each, what it takes besides.
    """

    how: Pass
    operands: Sequence[Operand]
    numbers: Sequence[Tensor] = ()


def squares(vectors: WeightVectors, *, exact: bool = False) -> Sums:
    """<w, w>; right to float32 rounding, unless ``exact``."""
    # Metal has no float64.
    in_float64 = exact and vectors.sum_dtype == torch.float64
    how = passes.EXACT_SQUARES if in_float64 else passes.SQUARES
    return Sums(how, [vectors.values()])


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
    length: Tensor,
) -> Sums:
    """<w, w>, <w, Δ> and <direction, direction> with Δ = ``length * direction``."""
    operands = [direction, vectors.values_beside(direction)]
    return Sums(passes.RADIAL_OF_STEP, operands, [length])


def fuses_formulas(vectors: WeightVectors) -> bool:
    """Whether a formula is one launch here: then it pays to give `work_out` long ones."""
    return isinstance(vectors._kernels, TritonKernels) and TritonKernels.failure is None


def work_out(
    vectors: WeightVectors,
    formula: Formula,
    sums: Sums | None,
    arguments: Sequence[Any] = (),
    into: Sequence[Tensor | None] = (),
) -> tuple[Tensor, ...]:
    """``formula(*sums, *arguments)``, entry by entry: one launch where formulas are fused.

    One collective where vectors lie on several ranks; then every rank must call it.

    Args:
        vectors: the index space.
        formula: a function of a module (it is known by its identity) that changes nothing in
            place.
        sums: what it takes first; None: nothing.
        arguments: tensors, ``(n,)`` or of no dimension, and whatever else it takes.
        into: for each result the tensor to write it to, or None; may be shorter.

    Returns:
        The results, ``(n,)`` each.
    """
    kernels = vectors._kernels
    taken: Tensor | None = None
    if isinstance(kernels, TritonKernels):
        try:
            if sums is None or not vectors.cut:
                return _from_slots(kernels, formula, sums, arguments, into)
            # Parts of vectors are added up over ranks first. Before anything can fail: a rank that
            # takes part in a collective twice would wait for ever.
            taken = vectors.sum_(kernels.sums(sums.how, sums.operands, sums.numbers))
            return kernels.rule(formula, taken, arguments, into, from_slots=False)
        except Unfit:
            pass
    rows: Sequence[Tensor] = ()
    if sums is not None:
        if taken is None:
            taken = vectors.sum_(kernels.sums(sums.how, sums.operands, sums.numbers))
        rows = taken.unbind()
    results = formula(*rows, *arguments)
    for destination, result in zip(into, results, strict=False):
        if destination is not None:
            destination.copy_(result)
    return results


def _from_slots(
    kernels: TritonKernels,
    formula: Formula,
    sums: Sums | None,
    arguments: Sequence[Any],
    into: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    if sums is None:
        return kernels.rule(formula, None, arguments, into, from_slots=False)
    slots = kernels.slots(sums.how, sums.operands)
    if sums.how is passes.RADIAL:
        slots = slots[:2]
    if sums.how is passes.RADIAL_OF_STEP:
        formula = _of_step(formula)
    return kernels.rule(formula, slots, [*sums.numbers, *arguments], into, from_slots=True)


@cache
def _of_step(formula: Formula) -> Formula:
    """The same formula of the sums that a launch over a step finds."""

    def of_slots(
        vv: Tensor, vd: Tensor, dd: Tensor, length: Tensor, *arguments: Any
    ) -> tuple[Tensor, ...]:
        return formula(*radial_of_step(vv, vd, dd, length), *arguments)

    return of_slots
