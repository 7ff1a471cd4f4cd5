"""Functions that Triton's language lacks, or has on the GPU only, in float64 and in plain
arithmetic: the same code runs in its interpreter, which the tests compare with numpy.

Triton reaches CUDA's own (``libdevice``), but its interpreter does not, so nothing that calls them
could be tested without a GPU. These need no table, no branch and no memory.

Errors are bounds on the relative error, found from the terms that a series leaves out plus one
rounding (1.1e-16) for each operation that matters. Like `triton_programs` this file imports nothing
of the package and can be read without Triton.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows
    triton = None


def program(*args: Any, **options: Any) -> Any:
    """`triton.jit`; without Triton what is decorated stays a plain function."""
    if triton is not None:
        return triton.jit(*args, **options)
    return args[0] if args else program


@program
def constant(number: tl.constexpr, like):
    """A number with all its digits: by itself it would be a float32 in a program."""
    return tl.full(like.shape, number, tl.float64)


@program
def atan2(y, x):
    """The angle of the point (x, y), in (-π, π]; signs of zeros count, as in torch.

    atan(t) for t in [0, 1] is 4 atan(u) with t halved twice, tan(a / 2) = t / (1 + √(1 + t²)); then
    u <= tan(π/16) = 0.199, and 13 terms of u - u³/3 + u⁵/5 ... leave out less than 0.199²⁶ / 27 =
    2e-20 of it. Two halvings and the sum: below 1e-15.
    """
    y, x = y.to(tl.float64), x.to(tl.float64)
    high, wide = tl.abs(y), tl.abs(x)
    large = tl.maximum(high, wide)
    # Equal ones apart: infinity over infinity, and 0 over 0.
    one, none = constant(1.0, y), constant(0.0, y)
    t = tl.where(high == wide, one, tl.minimum(high, wide) / tl.where(large > 0.0, large, one))
    t = tl.where(large > 0.0, t, none)
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    t = t / (1.0 + tl.sqrt(1.0 + t * t))
    square, series = t * t, none
    for term in tl.static_range(13):
        series = constant(1.0 / (25 - 2 * term), y) - square * series
    angle = 4.0 * t * series
    half_turn = constant(3.141592653589793, y)
    angle = tl.where(high > wide, 0.5 * half_turn - angle, angle)
    # By the sign bit: -0 lies on the negative side.
    angle = tl.where(x.to(tl.int64, bitcast=True) < 0, half_turn - angle, angle)
    angle = tl.where(y.to(tl.int64, bitcast=True) < 0, -angle, angle)
    return tl.where((x != x) | (y != y), x + y, angle)


@program
def atan(x):
    """See `atan2`."""
    return atan2(x, constant(1.0, x))


@program
def reduced(x):
    """k and the sine and cosine of x - k π/2, which lies in [-π/4, π/4].

    With π/2 in three parts, of which k times the first two is exact (33 bits each, k below 2²⁰),
    nothing is lost up to 1e6. 9 terms of the series of sine and 10 of cosine leave out less than
    0.786¹⁸ / 19! = 1.1e-19 and 0.786²⁰ / 20! = 4e-21.
    """
    quarter = tl.floor(x * constant(0.6366197723675814, x) + 0.5)
    rest = x - quarter * constant(1.5707963267341256, x)
    rest = rest - quarter * constant(6.077100506303966e-11, x)
    rest = rest - quarter * constant(2.0222662487959506e-21, x)
    square = rest * rest
    sine, cosine = constant(1.0, x), constant(1.0, x)
    for term in tl.static_range(8):
        # Each term is the one before it, times -x² over two more factors of the factorial.
        sine = 1.0 - square * sine / ((16 - 2 * term) * (17 - 2 * term))
    for term in tl.static_range(9):
        cosine = 1.0 - square * cosine / ((17 - 2 * term) * (18 - 2 * term))
    return quarter, rest * sine, cosine


@program
def tan(x):
    """The tangent; NaN beyond 1e6. `reduced` and a quotient: below 1e-15."""
    x = x.to(tl.float64)
    quarter, sine, cosine = reduced(x)
    is_odd = quarter != 2.0 * tl.floor(0.5 * quarter)
    tangent = tl.where(is_odd, -cosine, sine) / tl.where(is_odd, sine, cosine)
    return tl.where(tl.abs(x) < 1e6, tangent, float("nan"))


@program
def sin(x):
    """The sine; NaN beyond 1e6. By `reduced`: below 1e-15."""
    x = x.to(tl.float64)
    quarter, sine, cosine = reduced(x)
    turned = quarter - 4.0 * tl.floor(0.25 * quarter)
    value = tl.where((turned == 1.0) | (turned == 3.0), cosine, sine)
    value = tl.where(turned >= 2.0, -value, value)
    return tl.where(tl.abs(x) < 1e6, value, float("nan"))


@program
def log1p(x):
    """ln(1 + x), right also where x is lost beside the 1.

    u = 1 + x as it is stored stands for x' = u - 1, which is exact, and ln(u) / x' hardly changes
    from x' to x: ln(u) x / x'. One logarithm and two more roundings: below 1e-15.
    """
    x = x.to(tl.float64)
    u = 1.0 + x
    kept = u - 1.0
    # Where nothing of x is left in u, it is its own logarithm.
    is_lost = kept == 0.0
    scaled = tl.log(u) * (x / tl.where(is_lost, constant(1.0, x), kept))
    scaled = tl.where(is_lost, x, scaled)
    return tl.where(u == float("inf"), u, scaled)


@program
def whole_power(x, N: tl.constexpr):
    """x to the power N, at most 127 or at least -127: at most 13 products, below 1.5e-14."""
    SIZE: tl.constexpr = N if N >= 0 else -N
    x = x.to(tl.float64)
    power = constant(1.0, x)
    for bit in tl.static_range(7):
        if (SIZE >> bit) & 1:
            power = power * x
        x = x * x
    if N < 0:
        power = 1.0 / power
    return power
