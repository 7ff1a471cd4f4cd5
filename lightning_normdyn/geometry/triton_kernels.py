"""The primitives of `lightning_normdyn.geometry.kernels` in one launch for all weights of a dtype,
however many they are: Triton programs for NVIDIA GPUs.

torch's kernels are called weight by weight, which costs the host some microseconds each, and takes
a pass over memory for each operation. These read every entry once per phase.

What the programs cannot take goes to torch's kernels, call by call: nothing has been written when
that is decided.

Over 500 lines, because it is one class: what can be launched, and how it is.

Letters: n vectors, W weights, S slots, K sums.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import fusion, passes
from .fusion import Formula, Number, Way
from .kernels import Kernels
from .passes import Operand, Pair, Pass
from .pieces import Runs
from .reduction import Message
from .triton_tables import FIELDS, Addresses, Part, RowTables, Sent, Unfit

WARPS = 4
SCALE_AND_ADD, STRETCH, SHORTENED = range(3)
"""What `triton_programs.write` does."""

MOST_PROGRAMS = 16
"""Of one formula: numbers that are no tensors are part of its program."""

DISPLACEMENTS = frozenset(
    passes.displacement(exact, known=known)
    for exact in (None, torch.float64)
    for known in (False, True)
)


@cache
def programs() -> Any:
    """The module of the programs; with it Triton is imported."""
    # By name and only now: Triton takes half a second to import and is not always installed. The
    # module imports nothing of the package, so no circle can hide here.
    return import_module("lightning_normdyn.geometry.triton_programs")


Launch = tuple[tuple[int, ...], tuple[Any, ...], tuple[Any, ...]]
"""How many programs; their arguments; and what is known when they are compiled."""


@dataclass(frozen=True)
class Asked:
    """What one launch is to find: <a, a>; with b <a, b> and <b, b> (of b - a in place of b if
    ``moved``); with ``ones`` <1, a>; in float64 if ``exact``."""

    a: Operand
    b: Operand | None = None
    moved: bool = False
    ones: bool = False
    exact: bool = False

    @property
    def kinds(self) -> int:
        """K."""
        pair = 0 if self.b is None else 2
        return 1 + pair + self.ones


class TritonKernels(Kernels):
    """The primitives as Triton programs; see `lightning_normdyn.geometry.kernels.Kernels`.

    All launches go to the current stream of the weights' device. Whoever uses another stream orders
    it himself, as with any torch operation.

    Attributes:
        failure: why torch's kernels are used all the same; None: they are not.
        seconds: for each program that this process has compiled, how long that took.
    """

    failure: ClassVar[str | None] = None
    """Of the whole process: a compiler that fails once is not asked again."""
    seconds: ClassVar[dict[Any, float]] = {}
    only_compiles: ClassVar[bool] = False
    """Nothing is launched or written: see `lightning_normdyn.geometry.formulas.compiling_only`."""
    formulas: ClassVar[dict[Any, Any]] = {}
    """For each formula and kind of arguments its program and what was written of it."""

    @property
    def fuses(self) -> bool:
        """What the sums lead to is written by a launch of its own: a row's programs do not wait
        for each other."""
        return False

    @cached_property
    def _tables(self) -> RowTables:
        # Made when first asked for: many an index space is only looked at once.
        return RowTables(self._index, self._values, self._device)

    @cached_property
    def _addresses(self) -> Addresses:
        return Addresses(self._tables)

    def __init__(self, index: Any, values: Sequence[Tensor], hidden: Any, device: Any) -> None:
        super().__init__(index, values, hidden, device)
        self._values = list(values)
        self._slots_of_runs: dict[int, tuple[Runs, Tensor, Tensor]] = {}
        self._sent: dict[int, tuple[Runs, Sent | None]] = {}

    # ---- Sums ----

    def sums(
        self,
        how: Pass,
        operands: Sequence[Operand],
        numbers: Sequence[Tensor | None] = (),
    ) -> Tensor:
        """See `Kernels.sums`."""
        try:
            sums = self.combined(self.slots(how, operands))
        except Unfit:
            return super().sums(how, operands, numbers)
        if how is passes.RADIAL:
            return sums[:2]
        if how is passes.RADIAL_OF_STEP:
            return torch.stack(radial_of_step(*sums, *numbers))
        return sums

    def slots(self, how: Pass, operands: Sequence[Operand]) -> Tensor:
        """What the programs of one kind of sums find, ``(K, S)``. Of `passes.RADIAL` there is one
        more, and of `passes.RADIAL_OF_STEP` it is what `radial_of_step` takes.

        Raises:
            Unfit: for sums, or operands, that there is no program for.
        """
        return self._slots(_as_launched(how, operands))

    def slots_to_send(
        self,
        how: Pass,
        operands: Sequence[Operand],
        runs: Runs,
        room: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """`slots`, and what ranks send each other of them.

        Args:
            how: as for `slots`.
            operands: as for `slots`.
            runs: which vectors' sums are sent together.
            room: for how many other numbers.

        Returns:
            The slots; and ``(room + K * weights,)``: room that is still to be written to, and then
            the sums over ``runs``. Where each of those has one slot, these are written by the
            launch that takes the sums, else by one more.
        """
        asked = _as_launched(how, operands)
        known = self._sent.get(id(runs))
        if known is None:
            # Held with it: another object might get the same id.
            known = self._sent[id(runs)] = runs, self._tables.sent(runs)
        _, sent = known
        size = room + asked.kinds * runs.weights
        message = torch.empty(size, dtype=torch.float64, device=self._device)
        sums = message[room:].view(asked.kinds, runs.weights)
        if sent is not None:
            return self._slots(asked, sent=sent, message=sums), message
        slots = self._slots(asked)
        self._combine_over(slots, runs, sums)
        return slots, message

    def products(
        self,
        pairs: Sequence[Pair],
        *,
        exact: bool,
        copy: tuple[Operand, Operand] | None = None,
    ) -> Tensor:
        """See `Kernels.products`: one launch for each two operands."""
        try:
            return self._all_products(pairs, exact, copy)
        except Unfit:
            return super().products(pairs, exact=exact, copy=copy)

    def _all_products(
        self, pairs: Sequence[Pair], exact: bool, copy: tuple[Operand, Operand] | None
    ) -> Tensor:
        operands, terms = _numbered(pairs, None if copy is None else copy[0])
        launches = []
        wanted = list(range(len(terms)))
        while wanted:
            left, right = _next_operands([terms[i] for i in wanted])
            rows = _rows(left, right)
            asks_ones = any(terms[i] == (left, None) for i in wanted)
            launches.append((left, right, asks_ones))
            wanted = [i for i in wanted if terms[i] not in rows]
        if copy is not None and launches[0][0] != 0:
            raise Unfit("what is to be copied enters no sum")
        found: dict[tuple[int, int | None], Tensor] = {}
        for number, (left, right, ones) in enumerate(launches):
            # The first operand of the first launch is the one to copy.
            destination = None if copy is None or number else copy[1]
            b = None if right is None else operands[right]
            asked = Asked(operands[left], b, ones=ones, exact=exact)
            slots = self._slots(asked, copy=destination)
            sums = self.combined(slots)
            found |= dict(zip(_rows(left, right), sums, strict=False))
            if ones:
                found[left, None] = sums[-1]
        if len(launches) == 1 and list(found) == terms:
            return sums  # as they were written: no copy
        return torch.stack([found[term] for term in terms])

    def _slots(
        self,
        asked: Asked,
        *,
        copy: Operand | None = None,
        sent: Sent | None = None,
        message: Tensor | None = None,
    ) -> Tensor:
        """``(K, S)``: what each program finds; to ``copy`` a, to ``message`` what is ``sent``."""
        a, b = asked.a, asked.b
        tables = self._tables if sent is None else sent
        out = torch.empty(asked.kinds, tables.slots, dtype=torch.float64, device=self._device)
        places = None if sent is None else sent.places
        to = places, message, 0 if message is None else message.shape[1]
        operands = [operand for operand in (a, b, copy) if operand is not None]
        written = [] if copy is None else [len(operands) - 1]
        # The copies are held until the launch: it reads their memory.
        addresses, _copies = self._addresses.of(operands, written=written)
        launches = []
        for part in tables.parts:
            language = _language(part.dtype)
            has_b = None if b is None else language
            is_wide = asked.exact or part.dtype == torch.float64
            sum_dtype = _language(torch.float64 if is_wide else torch.float32)
            arguments = (part.records, addresses, len(a), out, tables.slots, *to)
            flags = asked.moved, asked.ones, copy is not None
            constants = (language, has_b, *flags, sum_dtype)
            launches.append(_over_rows(part, arguments, constants))
        self._launch(programs().sums, launches)
        _count_writes(copy)
        return out

    def combined(self, slots: Tensor) -> Tensor:
        """``(K, n)``: the sums of every vector."""
        tables = self._tables
        out = torch.empty(len(slots), tables.n, dtype=torch.float64, device=self._device)
        if tables.n:
            grid = (-(-tables.n // tables.combining[0]), len(slots))
            given = (slots, slots.shape[1], tables.first, tables.order, tables.n, out)
            self._launch(programs().combine, [(grid, given, (False, *tables.combining))])
        return out

    def _combine_over(self, slots: Tensor, runs: Runs, out: Tensor) -> None:
        """The sums of several vectors together, ``(K, weights)`` of ``runs``, from slots."""
        known = self._slots_of_runs.get(id(runs))
        if known is None:
            # Held with them: another object might get the same id.
            known = self._slots_of_runs[id(runs)] = runs, *self._tables.slots_of(runs)
        _, first, order = known
        if runs.weights:
            sizes = self._tables.combining
            grid = (-(-runs.weights // sizes[0]), len(slots))
            given = (slots, slots.shape[1], first, order, runs.weights, out)
            self._launch(programs().combine, [(grid, given, (False, *sizes))])

    def put_back(self, packed: Tensor, completed: Tensor, message: Message) -> None:
        """See `Kernels.put_back`."""
        try:
            if packed.dtype != torch.float64 or not packed.is_contiguous():
                raise Unfit("a program completes float64 alone")
            # Written where they lie: callers hold views of them.
            rows = packed.view(-1, packed.shape[-1])
            sums = completed.view(len(rows), -1)
            formula = of_completed(_as_they_are, len(rows))
            numbers = message.place, *sums.unbind()
            self.rule(formula, rows, numbers, rows.unbind(), from_slots=False)
        except Unfit:
            super().put_back(packed, completed, message)

    def add_up(self, values: Tensor, runs: Runs) -> Tensor:
        """See `Kernels.add_up`."""
        try:
            if values.dtype != torch.float64 or not values.is_contiguous() or not runs.weights:
                raise Unfit("a program adds up float64 alone")
            lines = values.numel() // values.shape[-1] if values.numel() else 0
            out = values.new_empty(*values.shape[:-1], runs.weights)
            if not lines:
                return out.zero_()
            # Weights are to their vectors what vectors are to their slots.
            grid = (runs.weights, lines)
            given = (values, values.shape[-1], runs.first, runs.order, runs.weights, out)
            self._launch(programs().combine, [(grid, given, (False, 1, 1024))])
        except Unfit:
            return super().add_up(values, runs)
        return out

    # ---- Formulas on numbers per vector ----

    def rule(
        self,
        formula: Formula,
        sums: Tensor | None,
        arguments: Sequence[Any],
        into: Sequence[Tensor | None],
        *,
        from_slots: bool,
    ) -> tuple[Tensor, ...]:
        """``formula(*sums, *arguments)`` in one launch.

        Args:
            formula: see `lightning_normdyn.geometry.fusion`.
            sums: ``(K, S)`` as `slots` gives them, or ``(K, n)`` where they are complete.
            arguments: what the formula takes besides.
            into: for each result where to write it; None: somewhere new.
            from_slots: which of the two ``sums`` are.

        Returns:
            The results, ``(n,)`` each; of the largest of all vectors one number for each program.

        Raises:
            Unfit: for a formula that no program can be written for.
        """
        n = self._tables.n
        count = 0 if sums is None else len(sums)
        way = Way(from_slots)
        program, source = self._program_of(formula, count, arguments, way)
        at_once = self._tables.combining if from_slots else (64, 16)
        programs = -(-n // at_once[0])
        results: list[Tensor] = []
        for number, dtype in enumerate(source.dtypes):
            destination = into[number] if number < len(into) else None
            if destination is None:
                size = programs if source.largest[number] else n
                destination = torch.empty(size, dtype=dtype, device=self._device)
            results.append(destination)
        self._run(program, programs, at_once, sums, arguments, results)
        return tuple(results)

    def totals(
        self,
        formula: Formula,
        sums: Tensor,
        arguments: Sequence[Any],
        starts: Tensor,
        *,
        from_slots: bool = True,
        into: Tensor | None = None,
        adds: bool = False,
    ) -> Tensor:
        """The results of ``formula(*sums, *arguments)``, summed over the vectors of each weight, in
        one launch.

        Args:
            formula: as for `rule`.
            sums: ``(K, S)``, or complete ``(K, m)`` of any m vectors.
            arguments: as for `rule`; ``(m,)`` where sums are complete.
            starts: int32 ``(weights + 1,)``: where the vectors of each weight begin.
            from_slots: which of the two ``sums`` are.
            into: where to write the totals; None: somewhere new.
            adds: whether to what is there.

        Returns:
            ``(J, weights)`` float64.
        """
        way = Way(from_slots, totals=True, adds=adds)
        program, source = self._program_of(formula, len(sums), arguments, way)
        weights = len(starts) - 1
        # In one piece, since they may have to be added up over ranks.
        shape = len(source.dtypes), weights
        totals = into
        if totals is None:
            totals = torch.empty(shape, dtype=torch.float64, device=self._device)
        at_once = self._tables.totalling if from_slots else (1024, 1)
        self._run(program, weights, at_once, sums, arguments, totals.unbind(), starts)
        return totals

    def number_of_totals(
        self,
        formula: Formula,
        sums: int,
        arguments: Sequence[Any],
    ) -> int:
        """J, of `totals` from so many kinds of slots.

        Raises:
            Unfit: as `totals`.
        """
        _, source = self._program_of(formula, sums, arguments, Way(from_slots=True, totals=True))
        return len(source.dtypes)

    def _program_of(
        self,
        formula: Formula,
        sums: int,
        arguments: Sequence[Any],
        way: Way,
    ) -> tuple[Any, fusion.Source]:
        """The program of a formula, and its source."""
        key = (formula, sums, way, fusion.signature(arguments))
        if key not in self.formulas:
            self.formulas[key] = self._written(formula, sums, arguments, way)
        known = self.formulas[key]
        if isinstance(known, Unfit):
            raise known
        program, source = known
        return program, source

    def _run(
        self,
        program: Any,
        programs: int,
        at_once: tuple[int, int],
        sums: Tensor | None,
        arguments: Sequence[Any],
        results: Sequence[Tensor],
        starts: Tensor | None = None,
    ) -> None:
        """Launch a formula's program."""
        passed: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Number):
                passed.append(argument.bits)
            elif isinstance(argument, Tensor):
                if argument.device != self._device or not _is_whole(argument):
                    raise Unfit("numbers lie elsewhere")
                passed.append(argument)
        if not programs:
            return
        tables = self._tables
        # Pointers that a program does not use must be some all the same.
        slots = tables.first if sums is None else sums
        places = tables.first if starts is None else starts
        distance = tables.n if sums is None else sums.shape[1]
        given = (slots, distance, tables.first, tables.order, tables.n, places, *passed, *results)
        self._launch(program, [((programs,), given, at_once)])

    def _written(
        self, formula: Formula, sums: int, arguments: Sequence[Any], way: Way
    ) -> tuple[Any, fusion.Source] | Unfit:
        """The program of a formula and its source, or why there is none: that is kept as well,
        since to find it out takes longer than the formula."""
        # A number that changes at every step would have a program written at every step.
        if sum(other[0] is formula for other in self.formulas) >= MOST_PROGRAMS:
            raise Unfit("the numbers of a formula keep changing")
        try:
            source = fusion.write_source(formula, sums, arguments, way)
        except Unfit as error:
            return error
        name = f"<formula {len(self.formulas)}: {getattr(formula, '__name__', 'unnamed')}>"
        return programs().program_of(source.text, name, source.numbers), source

    # ---- Changes, in place ----

    def scale_(self, tensors: Operand, factor: Tensor) -> None:
        """See `Kernels.scale_`."""
        if not self._writes(tensors, factor=factor):
            super().scale_(tensors, factor)

    def add_scaled_(self, tensors: Operand, coefficient: Tensor, source: Operand) -> None:
        """See `Kernels.add_scaled_`."""
        if not self._writes(tensors, source, coefficient=coefficient):
            super().add_scaled_(tensors, coefficient, source)

    def scale_and_add_(
        self, tensors: Operand, factor: Tensor, coefficient: Tensor, source: Operand
    ) -> None:
        """See `Kernels.scale_and_add_`."""
        if not self._writes(tensors, source, factor=factor, coefficient=coefficient):
            super().scale_and_add_(tensors, factor, coefficient, source)

    def stretch_(
        self,
        tensors: Operand,
        before: Operand,
        stretch: Tensor,
        scale: Tensor,
        added: Tensor | None,
    ) -> None:
        """See `Kernels.stretch_`."""
        numbers = {"factor": scale, "coefficient": added, "stretch": stretch}
        if not self._writes(tensors, before, **numbers, mode=STRETCH):
            super().stretch_(tensors, before, stretch, scale, added)

    def decay_shortened_(
        self,
        tensors: Operand,
        share: Tensor,
        before: Operand,
        shortened: Operand | None,
    ) -> None:
        """See `Kernels.decay_shortened_`; entries that are known beforehand go to torch."""
        is_told = shortened is not None and not self.only_compiles
        if is_told or not self._writes(tensors, before, coefficient=share, mode=SHORTENED):
            super().decay_shortened_(tensors, share, before, shortened)

    def _writes(self, tensors: Operand, *operands: Operand, **numbers: Any) -> bool:
        """`_write`, if the programs can; whether that was done."""
        try:
            self._write(tensors, *operands, **numbers)
        except Unfit:
            # Nothing is to be written where programs are only compiled, by torch neither.
            return self.only_compiles
        return True

    def _write(
        self,
        y: Operand,
        x: Operand | None = None,
        *,
        factor: Tensor | None = None,
        coefficient: Tensor | None = None,
        stretch: Tensor | None = None,
        mode: int = SCALE_AND_ADD,
    ) -> None:
        """Write to ``y`` what `triton_programs.write` says; numbers are ``(n,)``."""
        tables = self._tables
        numbers = []
        for number in (factor, coefficient, stretch):
            numbers.append(None if number is None else number.to(self._device).contiguous())
        operands = [y] if x is None else [y, x]
        addresses, _copies = self._addresses.of(operands, written=[0])
        launches = []
        for part in tables.parts:
            language = _language(part.dtype)
            has_x = None if x is None else language
            own = torch.float64 if part.dtype == torch.float64 else torch.float32
            arguments = (part.records, addresses, len(y), tables.vectors, *numbers)
            constants = (language, has_x, False, mode, _language(own))
            launches.append(_over_rows(part, arguments, constants))
        self._launch(programs().write, launches)
        _count_writes(y)

    # ---- Launches ----

    def _launch(self, program: Any, launches: Sequence[Launch]) -> None:
        with self._on_device():
            # All of them are compiled before the first of them writes.
            for launch in launches:
                self._compile(program, launch)
            # The fit has not begun to write: a launch now would do what its step is to do.
            if self.only_compiles:
                return
            for grid, arguments, constants in launches:
                program[grid](*arguments, *constants, num_warps=WARPS)

    def _compile(self, program: Any, launch: Launch) -> None:
        """Compile a program unless that has been done.

        Raises:
            Unfit: where it does not compile.
        """
        if TritonKernels.failure is not None:
            raise Unfit(TritonKernels.failure)
        if self._device.type != "cuda":
            return  # the interpreter compiles nothing
        grid, arguments, constants = launch
        kinds = [_kind_of(argument) for argument in arguments]
        variant = (program, self._device, *kinds, *map(str, constants))
        if variant in self.seconds:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "lightning-normdyn: this step needs a GPU program that has not been compiled. Run "
                "it once before capturing it in a CUDA graph, or set NORMDYN_KERNELS=torch."
            )
        start = time.perf_counter()
        try:
            program.warmup(*arguments, *constants, num_warps=WARPS, grid=grid)
        # Whatever it is (a compiler that is missing, a driver that is too old): torch's kernels
        # come to the same result.
        except Exception as error:
            TritonKernels.failure = f"Triton cannot compile here ({type(error).__name__}: {error})"
            raise Unfit(TritonKernels.failure) from error
        self.seconds[variant] = time.perf_counter() - start

    def _on_device(self) -> AbstractContextManager[Any]:
        # Triton launches on the current device, whatever the addresses say.
        if self._device.type == "cuda":
            return torch.cuda.device(self._device)
        return nullcontext()


def _kind_of(argument: Any) -> Any:
    """What a compiled program knows of an argument."""
    if isinstance(argument, Tensor):
        # Of memory that begins at a multiple of 16 bytes more is loaded at once.
        return argument.dtype, argument.data_ptr() % 16 == 0
    # Triton hands over a whole number in as many bits as it needs.
    return isinstance(argument, int) and not -(2**31) <= argument < 2**31


def _as_launched(how: Pass, operands: Sequence[Operand]) -> Asked:
    """The launch that takes these sums.

    Raises:
        Unfit: for sums that there is no program for.
    """
    a, *others = operands
    b = others[0] if others else None
    if how is passes.SQUARES or how is passes.PRODUCTS:
        return Asked(a, b)
    if how is passes.EXACT_SQUARES:
        return Asked(a, exact=True)
    if how is passes.MOMENTS:
        # In float64 the mean need not be taken out first.
        return Asked(a, ones=True, exact=True)
    if how in DISPLACEMENTS:
        # Always in float64, which costs no pass.
        return Asked(a, b, moved=True, exact=True)
    if how is passes.RADIAL:
        return Asked(a, b, moved=True)
    if how is passes.RADIAL_OF_STEP:
        # In float64, since <w, direction> is a small difference of two of these sums.
        direction, after = a, others[0]
        return Asked(after, direction, exact=True)
    raise Unfit("no program takes these sums")


def _over_rows(part: Part, arguments: tuple[Any, ...], constants: tuple[Any, ...]) -> Launch:
    return (part.programs,), arguments, (*constants, FIELDS, part.kinds)


def radial_of_step(vv: Tensor, vd: Tensor, dd: Tensor, length: Any) -> tuple[Tensor, ...]:
    """<w, w>, <w, Δ> and <direction, direction> from the sums of v and a direction, with
    w = v - length * direction put in."""
    along = vd - length * dd
    return vv - length * (vd + along), length * along, dd


@cache
def of_completed(formula: Formula, sums: int) -> Formula:
    """The same formula where vectors on several ranks have their sums from a message."""

    def from_message(*numbers: Any) -> tuple[Tensor, ...]:
        own, place = numbers[:sums], numbers[sums]
        completed = numbers[sums + 1 : 2 * sums + 1]
        is_there, where = place >= 0, place.clamp(min=0)
        rows = []
        for mine, of_all in zip(own, completed, strict=True):
            rows.append(torch.where(is_there, of_all[where], mine))
        return formula(*rows, *numbers[2 * sums + 1 :])

    return from_message


def _as_they_are(*rows: Tensor) -> tuple[Tensor, ...]:
    return rows


def _is_whole(tensor: Tensor) -> bool:
    return not tensor.ndim or tensor.is_contiguous()


def _language(dtype: torch.dtype) -> Any:
    """The name of a dtype in Triton's language."""
    return getattr(programs().tl, str(dtype).removeprefix("torch."))


def _count_writes(written: Operand | None) -> None:
    """Let torch know that these tensors were written to, behind its back: whether an optimizer has
    stepped a weight is told by its version."""
    if written is not None and not TritonKernels.only_compiles:
        torch.autograd.graph.increment_version([t for t in written if t is not None])


# ---- Which products one launch can take ----

Term = tuple[int, int | None]
"""A pair, its operands by number; ``(a, None)``: the sum of the entries of a."""


def _numbered(pairs: Sequence[Pair], first: Operand | None) -> tuple[list[Operand], list[Term]]:
    """The different operands, ``first`` as number 0, and the pairs by their numbers."""
    operands: list[Operand] = [] if first is None else [first]

    def number_of(operand: Operand) -> int:
        for number, known in enumerate(operands):
            # Callers ask for the weights anew for each product: other lists of the same tensors.
            if operand is known or all(x is y for x, y in zip(operand, known, strict=True)):
                return number
        operands.append(operand)
        return len(operands) - 1

    terms: list[Term] = []
    for left, right in pairs:
        if right is None:
            terms.append((number_of(left), None))
        else:
            a, b = sorted((number_of(left), number_of(right)))
            terms.append((a, b))
    return operands, terms


def _next_operands(terms: Sequence[Term]) -> tuple[int, int | None]:
    """The operands of a launch that takes the first of these, and others with it if it can."""
    left, right = terms[0]
    if right is not None and right != left:
        return left, right
    for a, b in terms:
        if b is not None and b != a and left in (a, b):
            # `left` stays in front: only of the operand in front entries are summed as they are.
            return left, b if a == left else a
    return left, None


def _rows(left: int, right: int | None) -> list[Term]:
    """What a launch finds, in this order, without the sum of the entries itself."""
    if right is None:
        return [(left, left), (left, None)]
    a, b = sorted((left, right))
    return [(left, left), (a, b), (right, right), (left, None)]
