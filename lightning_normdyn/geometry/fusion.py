"""A formula on numbers per vector, ``(n,)`` tensors, as the text of one GPU program.

Written with torch, a rule of a dozen operations is a dozen launches, each of which costs the host
more than the device. So the formula is run once on tensors without numbers, the operations are
noted, and one program is written that does all of them. There is no second version of a formula
that could differ from the first.

Letters: n vectors, S slots of sums.
"""

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .triton_tables import Unfit

Formula = Callable[..., tuple[Tensor, ...]]
"""From ``(n,)`` tensors, numbers and None to ``(n,)`` tensors, entry by entry, in place of
nothing."""


@dataclass(frozen=True)
class Number:
    """A number that a formula takes and that may be another at every step: told when the program is
    launched. A plain number is part of the program, so that each value is a program of its own.

    Args:
        value: what the formula gets where torch works it out; in a program a float64.
    """

    value: float

    @property
    def bits(self) -> int:
        """What is handed to the program, which would take a float for a float32."""
        (bits,) = struct.unpack("q", struct.pack("d", self.value))
        return int(bits)


aten = torch.ops.aten
_TYPES = {
    torch.float64: "tl.float64",
    torch.float32: "tl.float32",
    torch.int64: "tl.int64",
    torch.bool: "tl.int1",
}
_INFIX = {
    aten.add.Tensor: "+", aten.sub.Tensor: "-", aten.mul.Tensor: "*", aten.div.Tensor: "/",
}  # fmt: skip
_COMPARED = {
    aten.eq: "==", aten.ne: "!=", aten.lt: "<", aten.le: "<=", aten.gt: ">", aten.ge: ">=",
}  # fmt: skip
_LOGICAL = {
    aten.bitwise_and: "&", aten.bitwise_or: "|", aten.logical_and: "&", aten.logical_or: "|",
}  # fmt: skip
_CALLS = {
    aten.sqrt: "tl.sqrt", aten.abs: "tl.abs", aten.log: "tl.log", aten.exp: "tl.exp",
    aten.floor: "tl.floor", aten.atan: "atan", aten.tan: "tan", aten.log1p: "log1p",
    aten.sin: "sin",
}  # fmt: skip
_SECOND_WINS = {
    # The second of two numbers is taken unless this holds; a NaN wins in a maximum, loses in fmax.
    aten.maximum: "({0} >= {1}) | ({0} != {0})",
    aten.minimum: "({0} <= {1}) | ({0} != {0})",
    aten.fmax: "({0} >= {1}) | ({1} != {1})",
    aten.fmin: "({0} <= {1}) | ({1} != {1})",
}
_LARGEST = (aten.amax, aten.max)
_SAME = {aten.clone, aten.alias, aten.detach, aten._to_copy, aten.lift_fresh_copy}


@dataclass(frozen=True)
class Source:
    """A program for one formula and one kind of arguments.

    Args:
        text: of a function ``rule(slots, S, first, order, n, starts, i0, i1, ..., o0, ..., V, B)``.
        dtypes: of its results.
        largest: of which results each program writes only the largest of its vectors.
        numbers: names of the arguments that are each a `Number`.
    """

    text: str
    dtypes: tuple[torch.dtype, ...]
    largest: tuple[bool, ...]
    numbers: tuple[str, ...]


@dataclass(frozen=True)
class Way:
    """What a program does beside its formula.

    Args:
        from_slots: whether each sum is still to be added up from the slots of its vector.
        totals: whether the results are to be summed over the vectors of each weight, float64.
        adds: whether to totals that are there already.
    """

    from_slots: bool
    totals: bool = False
    adds: bool = False


def write_source(
    formula: Formula,
    sums: int,
    arguments: Sequence[Any],
    way: Way,
) -> Source:
    """The program that does what ``formula(*sums, *arguments)`` does.

    Args:
        formula: what to do.
        sums: how many sums per vector it takes, float64 each.
        arguments: tensors, ``(n,)`` or of no dimension, whose numbers do not matter, and `Number`;
            everything else becomes part of the program. A tensor that the formula only takes
            entries of, by indices, may have any length.
        way: what else it does.

    Raises:
        Unfit: for an operation that is not known here.

    Example:
        >>> source = write_source(lambda ww: (ww.sqrt(),), 1, (), Way(from_slots=False))
        >>> print(source.text.splitlines()[-2])
            v0 = (tl.sqrt(s0)).to(tl.float64)
    """
    traced = _traced(formula, sums, arguments)
    lines: list[str] = []
    if way.from_slots:
        lines.append("low = tl.load(first + v, mask=there, other=0)")
        lines.append("high = tl.load(first + v + 1, mask=there, other=0)")
    names: dict[Node, str] = {}
    results: Sequence[Node] = ()
    inputs: list[str] = []
    passed = [argument for argument in arguments if isinstance(argument, (Tensor, Number))]
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            number = len(names)
            if number < sums:
                names[node] = f"s{number}"
                value = _sum(number, from_slots=way.from_slots)
            else:
                is_number = isinstance(passed[len(inputs)], Number)
                inputs.append(f"i{len(inputs)}")
                names[node] = f"a{len(inputs)}"
                value = _number(inputs[-1]) if is_number else _loaded(node, inputs[-1])
            # What is only looked up in is not read vector by vector: it may be shorter.
            if _is_looked_up(node):
                names[node] = inputs[-1]
            elif node.users:
                lines.append(f"{names[node]} = {value}")
        elif node.op == "get_attr":
            names[node] = _constant(getattr(traced, node.target))
        elif node.op == "call_function":
            names[node] = f"v{sum(name.startswith('v') for name in names.values())}"
            dtype = _type(node)
            lines.append(f"{names[node]} = ({_expression(node, names)}).to({dtype})")
        else:
            assert node.op == "output"
            results = node.args[0]
    largest = tuple(_is_largest(node) for node in results)
    outputs = [f"o{i}" for i in range(len(results))]
    values = [names[node] for node in results]
    if way.totals:
        if any(largest):
            raise Unfit("the largest of all vectors has no total")
        lines = _per_weight(lines, values, outputs, adds=way.adds)
    else:
        lines = _per_vector(lines, values, outputs, largest)
    given = ["slots", "S", "first", "order", "n", "starts", *inputs, *outputs]
    head = f"def rule({', '.join(given)}, V: tl.constexpr, B: tl.constexpr):"
    text = "\n".join([head, *(f"    {line}" for line in lines)]) + "\n"
    numbers = [name for name, of in zip(inputs, passed, strict=True) if isinstance(of, Number)]
    dtypes = tuple(node.meta["val"].dtype for node in results)
    return Source(text, dtypes, largest, tuple(numbers))


def _per_vector(
    lines: list[str],
    values: Sequence[str],
    outputs: Sequence[str],
    largest: Sequence[bool],
) -> list[str]:
    """V vectors for each program, and their results."""
    stores = []
    for value, output, is_largest in zip(values, outputs, largest, strict=True):
        if is_largest:
            # One number for each program: the host takes the largest of these few.
            stores.append(f"tl.store({output} + tl.program_id(0), tl.max({value}, 0))")
        else:
            stores.append(f"tl.store({output} + v, {value}, mask=there)")
    return ["v = tl.program_id(0) * V + tl.arange(0, V)", "there = v < n", *lines, *stores]


def _per_weight(
    lines: list[str],
    values: Sequence[str],
    outputs: Sequence[str],
    *,
    adds: bool,
) -> list[str]:
    """The vectors of one weight for each program, V at a time, and the sums of their results."""
    # V at a time and in a fixed order: the same bits every time, without atomics.
    totals = [f"t{i}" for i in range(len(outputs))]
    head = ["weight = tl.program_id(0)", "stop = tl.load(starts + weight + 1)"]
    head += [f"{total} = tl.zeros([V], dtype=tl.float64)" for total in totals]
    head.append("for begin in range(tl.load(starts + weight), stop, V):")
    body = ["v = begin + tl.arange(0, V)", "there = v < stop", *lines]
    for value, total in zip(values, totals, strict=True):
        body.append(f"{total} += tl.where(there, {value}.to(tl.float64), 0.0)")
    tail = []
    for output, total in zip(outputs, totals, strict=True):
        value = f"tl.sum({total}, 0)"
        if adds:
            value = f"tl.load({output} + weight) + {value}"
        tail.append(f"tl.store({output} + weight, {value})")
    return [*head, *(f"    {line}" for line in body), *tail]


def _is_largest(node: Node) -> bool:
    """Whether a result is the largest of all vectors."""
    target = getattr(node.target, "overloadpacket", None)
    return target in _LARGEST and node.meta["val"].ndim == 0


def _is_looked_up(node: Node) -> bool:
    """Whether a formula only takes entries of this argument, by indices."""
    users = list(node.users)
    return bool(users) and all(
        user.target is aten.index.Tensor and user.args[0] is node for user in users
    )


def _constant(value: Tensor) -> str:
    """A number that a formula has made a tensor of."""
    if value.ndim:
        raise Unfit("a formula has a constant of its own")
    return _literal(value.tolist(), value.dtype)


def _traced(
    formula: Formula,
    sums: int,
    arguments: Sequence[Any],
) -> torch.fx.GraphModule:
    """The operations of a formula, on tensors of any length and without numbers."""
    # Here: it brings half a second of imports, which only those need who have a GPU.
    from torch.fx.experimental.proxy_tensor import make_fx

    blank = [torch.zeros(2, dtype=torch.float64, device="cpu") for _ in range(sums)]
    tensors = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            shape = (2,) if argument.ndim else ()
            tensors.append(torch.zeros(shape, dtype=argument.dtype, device="cpu"))
        elif isinstance(argument, Number):
            tensors.append(torch.zeros((), dtype=torch.float64, device="cpu"))

    def with_constants(*given: Tensor) -> tuple[Tensor, ...]:
        left = iter(given[sums:])
        filled = [next(left) if isinstance(a, (Tensor, Number)) else a for a in arguments]
        return formula(*given[:sums], *filled)

    try:
        traced = make_fx(with_constants, tracing_mode="fake")(*blank, *tensors)
    # Whatever it cannot be run on: with numbers, torch runs it, or says what is wrong with it.
    except Exception as error:
        raise Unfit(f"a formula cannot be traced ({error})") from error
    traced.graph.eliminate_dead_code()
    return traced


def _sum(number: int, *, from_slots: bool) -> str:
    # S is how far apart two kinds of sums lie: the number of slots, or of vectors.
    place = f"slots + {number} * S.to(tl.int64)"
    if from_slots:
        return f"_total({place}, order, low, high, V, B)"
    return f"tl.load({place} + v, mask=there, other=0.0)"


def _loaded(node: Node, pointer: str) -> str:
    value = node.meta["val"]
    # One number for all vectors is read as a block: the interpreter cannot compare scalars.
    place = f"{pointer} + v" if value.ndim else f"{pointer} + v * 0"
    loaded = f"tl.load({place}, mask=there, other=0)"
    return f"{loaded} != 0" if value.dtype == torch.bool else loaded


def _number(name: str) -> str:
    # As a block of integers first: how many bits a number has is found from its value.
    return f"(tl.zeros([V], dtype=tl.int64) + {name}).to(tl.float64, bitcast=True)"


def _type(node: Node) -> str:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise Unfit(f"no program has {node.target}")
    dtype = value.dtype
    if dtype not in _TYPES:
        raise Unfit(f"a formula has numbers of {dtype}")
    return _TYPES[dtype]


def _expression(node: Node, names: dict[Node, str]) -> str:
    target: Any = node.target
    packet = target.overloadpacket
    args, dtype = node.args, node.meta["val"].dtype

    def value(position: int, of: torch.dtype = dtype) -> str:
        return _value(args[position], of, names)

    if packet in _SAME:
        return value(0)
    if packet is aten.mul and dtype == torch.bool:
        return f"{value(0)} & {value(1)}"
    if target in _INFIX and not node.kwargs.get("alpha"):
        return f"{value(0)} {_INFIX[target]} {value(1)}"
    if packet in _COMPARED:
        common = _common_dtype(args)
        return f"{value(0, common)} {_COMPARED[packet]} {value(1, common)}"
    if packet in _LOGICAL and dtype == torch.bool:
        return f"{value(0)} {_LOGICAL[packet]} {value(1)}"
    if packet in (aten.bitwise_not, aten.logical_not):
        return f"{value(0, torch.bool)} == 0"
    if packet in _CALLS:
        return f"{_CALLS[packet]}({value(0)})"
    if packet is aten.atan2:
        return f"atan2({value(0)}, {value(1)})"
    if packet in _SECOND_WINS:
        first, second = value(0), value(1)
        return f"tl.where({_SECOND_WINS[packet].format(first, second)}, {first}, {second})"
    if target is aten.index.Tensor:
        return _looked_up(args, names)
    if _is_largest(node):
        # Of the vectors of one program; those beyond the last are less than all others.
        below = _literal(-math.inf, dtype)
        return f"tl.where(there, {value(0)}, {below})"
    if packet is aten.isnan:
        own = _common_dtype(args)
        return f"{value(0, own)} != {value(0, own)}"
    if packet is aten.neg:
        return f"0.0 - {value(0)}"
    if packet is aten.rsub:
        return f"{value(1)} - {value(0)}"
    if packet is aten.where:
        return f"tl.where({value(0, torch.bool)}, {value(1)}, {value(2)})"
    if packet in (aten.scalar_tensor, aten.full, aten.full_like):
        fill = args[0] if packet is aten.scalar_tensor else args[1]
        return _literal(fill, dtype)
    if packet is aten.new_full:
        return _literal(args[2], dtype)
    if packet in (aten.ones_like, aten.zeros_like):
        return _literal(float(packet is aten.ones_like), dtype)
    if packet is aten.addcdiv and not node.kwargs:
        return f"{value(0)} + {value(1)} / {value(2)}"
    if packet is aten.pow:
        return _power(args, value)
    if packet is aten.clamp:
        return _clamped(value(0), [*args[1:], *node.kwargs.values()], dtype)
    if packet is aten.nan_to_num:
        return _without_nan(value(0), args[1:], dtype)
    raise Unfit(f"no program has {target}")


def _power(args: Sequence[Any], value: Callable[[int], str]) -> str:
    """A whole power, or a power of a positive number."""
    base, exponent = args
    # By products: through a logarithm a 64th power would lose two digits.
    if not isinstance(exponent, Node):
        if exponent != int(exponent) or abs(exponent) > 127:
            raise Unfit(f"a formula has the power {exponent}")
        return f"whole_power({value(0)}, {int(exponent)})"
    if isinstance(base, Node) or not base > 0:
        raise Unfit("a formula has a power of other numbers")
    return f"tl.exp({value(1)} * tl.log({value(0)}))"


def _looked_up(args: Sequence[Any], names: dict[Node, str]) -> str:
    """Entries of an argument: one index for each vector."""
    table, indices = args
    if len(indices) != 1 or table.op != "placeholder" or not _is_looked_up(table):
        raise Unfit("a formula takes entries of what it has worked out")
    (index,) = indices
    if index.meta["val"].dtype != torch.int64:
        raise Unfit("a formula takes entries by flags")
    loaded = f"tl.load({names[table]} + {names[index]}, mask=there, other=0)"
    return f"{loaded} != 0" if table.meta["val"].dtype == torch.bool else loaded


def _value(
    argument: Any,
    dtype: torch.dtype,
    names: dict[Node, str],
) -> str:
    if isinstance(argument, Node):
        name = names[argument]
        return name if argument.meta["val"].dtype == dtype else f"{name}.to({_TYPES[dtype]})"
    return _literal(argument, dtype)


def _literal(number: Any, dtype: torch.dtype) -> str:
    # As a block of this dtype: by itself a number in a program has the digits of a float32.
    written = repr(number)
    if dtype in (torch.bool, torch.int64):
        written = repr(int(number))
    elif not math.isfinite(number):
        written = f'float("{number}")'
    return f"tl.full([V], {written}, {_TYPES[dtype]})"


def _common_dtype(arguments: Sequence[Any]) -> torch.dtype:
    dtypes = [a.meta["val"].dtype for a in arguments if isinstance(a, Node)]
    common: torch.dtype = dtypes[0]
    for dtype in dtypes[1:]:
        common = torch.promote_types(common, dtype)
    # A boolean that is held against a number: nobody here does that.
    if common == torch.bool and not all(isinstance(a, Node) for a in arguments):
        raise Unfit("a formula compares a flag with a number")
    return common


def _clamped(
    value: str,
    bounds: Sequence[Any],
    dtype: torch.dtype,
) -> str:
    """Between bounds that may be None; a NaN stays one."""
    low, high = [*bounds, None, None][:2]
    for bound, beyond in ((low, "<"), (high, ">")):
        if isinstance(bound, Node):
            raise Unfit("a formula clamps by other numbers")
        if bound is not None:
            limit = _literal(bound, dtype)
            value = f"tl.where({value} {beyond} {limit}, {limit}, {value})"
    return value


def _without_nan(
    value: str,
    replacements: Sequence[Any],
    dtype: torch.dtype,
) -> str:
    extremes = torch.finfo(dtype)
    defaults = (0.0, extremes.max, extremes.min)
    nan, highest, lowest = (
        default if given is None else given
        for given, default in zip([*replacements, None, None, None], defaults, strict=False)
    )
    above, below = _literal(math.inf, dtype), _literal(-math.inf, dtype)
    text = f"tl.where({value} != {value}, {_literal(nan, dtype)}, {value})"
    text = f"tl.where({value} == {above}, {_literal(highest, dtype)}, {text})"
    return f"tl.where({value} == {below}, {_literal(lowest, dtype)}, {text})"


def signature(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What a program for these arguments depends on: the dtypes of tensors, and everything else
    itself."""
    kinds: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kinds.append((argument.dtype, bool(argument.ndim)))
        elif isinstance(argument, Number):
            kinds.append(Number)
        else:
            kinds.append(argument)
    return tuple(kinds)
