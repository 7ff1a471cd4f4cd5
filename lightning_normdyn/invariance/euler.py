r"""The Euler test: real gradients contradict a false claim of scale invariance.

If a loss does not change when a weight vector is scaled, its gradient is orthogonal to that vector
(Euler's theorem for functions of degree 0): :math:`\langle w, g\rangle = 0`.

So :math:`z^2 = d \cos^2(w, g)` is pooled over the vectors of a weight and over steps. z is of the
order of 1 for a weight that is not scale-invariant; for the 120 that are in the test networks, the
worst root mean square over 20 steps is 0.005 in float32 and 0.016 in bfloat16. The test can only
withdraw a claim: of the 78 weights that are not scale-invariant, 4 pass.
"""

import math

import torch
from torch import Tensor

# A claim is contradicted if the root mean square of z is above the limit over so many values.
EULER_LIMIT = 0.1
EULER_COUNT = 8

# <w, g> of a weight may be nothing but rounding where |w| |g| is this small beside that of another
# weight of the optimizer. These are 32 roundings of float32, also where weights are stored in
# float64: a gradient so much smaller tells nothing that would matter.
EULER_NOISE = 32 * torch.finfo(torch.float32).eps


def euler_sums(
    ww: Tensor,
    wg: Tensor,
    gg: Tensor,
    length: Tensor,
) -> Tensor:
    r"""What `euler_values` needs of each vector; sum it over the vectors of a weight, on all ranks.

    Args:
        ww: squared norms of the weight vectors, ``(n,)``.
        wg: inner products of weight and gradient.
        gg: squared norms of the gradients.
        length: d, entries per vector.

    Returns:
        ``(3, n)``: :math:`d \langle w, g\rangle^2`, the energy :math:`u = \|w\|^2 \|g\|^2`, and
        :math:`u^2`; zeros for vectors without a gradient and for what is not finite.
    """
    radial = length.to(ww.dtype) * wg.square()
    energy = ww * gg
    counts = torch.isfinite(radial) & torch.isfinite(energy) & (energy > 0)
    values = torch.stack([radial, energy, energy.square()])
    return torch.where(counts, values, torch.zeros_like(values))


def euler_values(sums: Tensor) -> Tensor:
    r"""The mean of :math:`z^2 = d \cos^2(w, g)` of each weight, and over how many values.

    Every vector weighs by its energy :math:`u = \|w\|^2 \|g\|^2`, so that a vector whose gradient
    is rounding noise beside those of its weight's other vectors says nothing. n vectors of equal
    energy count as n values, one that outweighs all others as one: :math:`(\sum u)^2 / \sum u^2`. A
    weight whose gradients are all noise, measured against the weight with the largest, has no
    values.

    Args:
        sums: `euler_sums`, summed over the vectors of each weight: ``(3, weights)``.

    Returns:
        ``(2, weights)``: the means (0 where there is nothing) and the numbers of values.

    Example:
        >>> one = torch.ones(8, dtype=torch.float64)
        >>> sums = euler_sums(one, 0.5 * one, one, 16 * one)
        >>> euler_values(sums.sum(1, keepdim=True)).flatten().tolist()
        [4.0, 8.0]

        The gradient of the third vector is noise, and lies along it:

        >>> noise, along = one.clone(), torch.zeros(8, dtype=torch.float64)
        >>> noise[2], along[2] = 1e-18, 1e-9
        >>> sums = euler_sums(one, along, noise, 16 * one)
        >>> mean, number = euler_values(sums.sum(1, keepdim=True)).flatten().tolist()
        >>> mean < 1e-15, round(number)
        (True, 7)
    """
    radial, energy, squares = sums
    # The energy of the vectors that count.
    typical = squares / energy
    heard = energy > 0
    if typical.numel():
        # Not nanmax: a weight without a gradient is 0 / 0.
        loudest = torch.where(heard, typical, torch.zeros_like(typical)).max()
        heard &= typical > EULER_NOISE**2 * loudest
    values = torch.stack([radial / energy, energy.square() / squares])
    return torch.where(heard, values, torch.zeros_like(values))


def contradiction_in_words(rms: float, count: int) -> str:
    """What ``count`` pooled values with this root mean square say against a claim."""
    return (
        f"the gradient is not orthogonal: rms cos(w, g)*sqrt(d) = {rms:.2g} over {count} "
        f"values (allowed {EULER_LIMIT})"
    )


def rms_of(total: float, number: float) -> float:
    """The root mean square of ``number`` values whose squares add up to ``total``; nan of none."""
    if number:
        return math.sqrt(total / number)
    return math.nan


def whole_values(number: float) -> int:
    """How many values there are, rounded down: vectors of unequal energy make it a fraction."""
    # 8 values are often 7.999..., which are not 7.
    return math.floor(number + 1e-6)
