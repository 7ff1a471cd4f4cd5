"""Which weights one callback means in one fit: patterns, what cannot be treated, and how a weight
splits into vectors."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NoTargetsError, NotSupportedError
from lightning_normdyn.geometry.placement import check_weight
from lightning_normdyn.invariance.names import match_patterns
from lightning_normdyn.invariance.verdict import (
    SINGLE_NUMBERS,
    Verdict,
    choose_partition,
    filter_partition,
)
from lightning_normdyn.parametrizations import is_weight_standardized

from .flavours import classes
from .lightning_facts import callbacks_of
from .messages import named, show, warn_once
from .plan import Target
from .rule import Rule, shown
from .session import Session
from .weights import has_sparse_gradient, held_by

AnyRule = TypeVar("AnyRule", bound=Rule)


class Selection(Generic[AnyRule]):
    """Which weights of a fit a callback means.

    Args:
        rule: the callback.
        session: the fit.

    Attributes:
        matched: weights that ``params`` lets in, whoever owns them: known at fit start.
        refused: weights that turned out to be of a kind that cannot be treated.
    """

    def __init__(self, rule: AnyRule, session: Session) -> None:
        self.rule = rule
        self.session, self.weights, self.claims = session, session.weights, session.claims
        self.name = type(rule).__name__
        self.matched: set[Tensor] = set()
        self.refused: set[Tensor] = set()

    def name_of(self, weight: Tensor) -> str:
        """The first name of ``weight`` in the LightningModule."""
        return self.weights.names[weight][0]

    # -- patterns

    def match(self, optimizers: Sequence[Optimizer]) -> list[Tensor]:
        """Hold the patterns against the names of the module, at fit start.

        Returns:
            The weights that a person has named; empty where ``params`` names none.

        Raises:
            NoTargetsError: for a pattern without a match, and for an exact name of a weight that
                trains and that no optimizer holds.
            NotSupportedError: for a named weight that cannot be treated.
        """
        rule = self.rule
        matches = self._matching(self.weights.names, what="weights of two or more dimensions")
        self.matched = set(matches)
        # Here only exclusions can leave nothing: a pattern without a match has raised already. What
        # "auto" finds is not known before the first loss, so `refuse_to_find_nothing` judges that.
        if rule.params != ["auto"] and not matches:
            raise NoTargetsError(
                f'`params={shown(rule.params)}` excludes all that it includes. Leave a "!pattern" '
                f"out, or remove the callback."
            )
        if not rule.by_name:
            lazy = [self.name_of(w) for w in matches if w in self.weights.lazy]
            if lazy and rule.acts:
                warn_once(
                    f"{self.name} leaves lazy parameters alone ({named(lazy)}). Run one forward "
                    f"pass before the fit."
                )
            return []
        # A pattern may catch weights that nobody trains; an exact name is a person's claim.
        owned = {p for optimizer in optimizers for p in held_by(optimizer)}
        for weight in matches:
            name = self.name_of(weight)
            self.check_weight(weight, name)
            if self._is_exact(weight) and weight.requires_grad and weight not in owned:
                raise NoTargetsError(
                    f"`{name}` was asked to be a target, but no optimizer holds it. "
                    "Return it from configure_optimizers, or leave it out."
                )
        return matches

    def match_new(self, new: Mapping[Tensor, Sequence[str]]) -> None:
        """Weights have come during the fit."""
        # A weight that was exchanged for another is no target, although the set would keep it.
        self.matched.intersection_update(self.weights.names)
        # Patterns matched at fit start; since then they may mean layers that are gone.
        self.matched.update(self._matching(new, all_must_match=False))

    def _matching(self, names: Mapping[Tensor, Sequence[str]], **options: Any) -> list[Tensor]:
        """Those of these weights that ``params`` lets in; options as for `match_patterns`."""
        known = self.weights
        # A lazy weight has no shape yet; a person who names it must hear of it.
        weights = [w for w in names if known.is_matrix(w) or w in known.lazy]
        chosen = match_patterns(self.rule.params, [tuple(names[w]) for w in weights], **options)
        return [weights[i] for i in chosen]

    def _is_exact(self, weight: Tensor) -> bool:
        """Whether ``params`` holds one of the weight's names, and not only a pattern that fits."""
        return not set(self.rule.params).isdisjoint(self.weights.names[weight])

    # -- weights and vectors

    def check_weight(self, weight: Tensor, name: str) -> None:
        """Refuse a weight whose vectors cannot be treated, whoever asks for it.

        Raises:
            NotSupportedError: naming a way out.
        """
        check_weight(weight, name)
        # Before the first backward pass only the layer tells that its gradients will be sparse.
        holders = self.weights.holders.get(weight, [])
        if has_sparse_gradient(weight) or any(getattr(m, "sparse", False) for m in holders):
            kind = type(holders[0]).__name__ if holders else "its layer"
            raise NotSupportedError(
                f"`{name}` gets sparse gradients ({kind}): the optimizer does not step untouched "
                f"rows. Use sparse=False, or leave it out with params=[..., '!{name}']."
            )

    def can_treat(self, weight: Tensor) -> bool:
        """Whether ``"auto"`` takes this weight in; a named one is refused with the reason
        instead."""
        try:
            self.check_weight(weight, self.name_of(weight))
        except NotSupportedError:
            return False
        return True

    def select(self, owned: Sequence[Tensor]) -> list[Tensor]:
        """Those of an optimizer's weights that are meant, as far as is known by now."""
        matches = []
        for weight in owned:
            if weight not in self.matched:
                continue
            # The rows of a gain are single numbers, so nothing turns.
            if not self.claims.has_no_direction(weight):
                matches.append(weight)
            elif self._is_exact(weight):
                self._refuse_gain(weight)
        # Who names weights knows better than a search, and finds out by an error what cannot be.
        if self.rule.by_name:
            return matches
        # Under "auto", a rule changes only weights whose length the loss is known not to see; a
        # callback that only measures takes any.
        if self.rule.writes:
            matches = [w for w in matches if self.claims.of(w).partition is not None]
        return [w for w in matches if self.can_treat(w)]

    def _refuse_gain(self, weight: Tensor) -> None:
        """A person named a weight whose rows are single numbers: an error, unless it is known too
        late for one."""
        # In no loss so far: its numbers may turn out to be one vector.
        if self.claims.of(weight).kind == "unknown":
            return
        name = self.name_of(weight)
        self._leave_alone(
            name,
            NotSupportedError(
                f"`{name}` was asked to be a target, but its rows are {SINGLE_NUMBERS}. Leave it "
                f"out of `params`."
            ),
        )

    def _leave_alone(self, name: str, error: NotSupportedError) -> None:
        """Raise ``error`` before every optimizer's first step has been checked; later say it
        once."""
        if not self.session.checked:
            raise error
        text = f"{self.name} leaves `{name}` alone from now on. {error}"
        # One warning a weight: its text may change with what every further loss shows.
        self.session.say_once(text, about=(self, name))

    def target(self, weight: Tensor) -> Target | None:
        """How ``weight`` splits into vectors; None where no loss has read any of them."""
        module, name = self.session.module, self.name_of(weight)
        verdict, shape = self.claims.of(weight), self.weights.shapes[weight]
        # For weights of which nothing is claimed: a person may name them, a monitor measures them.
        fallback = verdict.partition or filter_partition(module, name, shape)
        partition = choose_partition(verdict, self.rule.granularity, fallback)
        # Rows that no loss reads have no gradient; to scale them would change nothing but them.
        if verdict.read is not None:
            partition = partition.only(partition.lengths(shape, verdict.read) > 0)
            if not partition.n:
                return None
        return Target(
            name,
            weight,
            partition,
            verdict,
            by_request=verdict.partition is None,
            weight_standardized=is_weight_standardized(module, name),
        )

    def target_or_none(self, weight: Tensor) -> Target | None:
        """`target`; what later losses contradict is left alone, and said once."""
        try:
            return self.target(weight)
        except NotSupportedError as error:
            self._leave_alone(self.name_of(weight), error)
            return None

    # -- when nothing was found

    def may_come(self) -> list[str]:
        """Names of weights that may become targets later in this fit: they are frozen, no optimizer
        holds them yet, or some of their rows were not read yet."""
        trained, waiting = self._trained(), []
        for weight in self.weights.names:
            if weight not in self.matched or weight in trained or weight in self.weights.lazy:
                continue
            verdict = self.claims.of(weight)
            # Of a frozen weight the graph may have said already that it never will be one.
            is_possible = verdict.partition is not None or verdict.kind == "unknown"
            if is_possible or self.rule.by_name or not self.rule.writes:
                waiting.append(self.name_of(weight))
        return [*waiting, *(verdict.name for verdict in self._waiting_for_rows())]

    def _trained(self) -> set[Tensor]:
        return {w for w in self.session.attachment.weights() if w.requires_grad}

    def _waiting_for_rows(self) -> list[Verdict]:
        """Trained weights that stay untouched until a loss has read their other rows, too."""
        # A named weight is treated at once, and who only measures may do so before all is known.
        if self.rule.by_name or not self.rule.writes:
            return []
        candidates = self.matched & self._trained()
        waiting = []
        # In the module's order, which a set has not.
        for weight in self.weights.names:
            if weight in candidates:
                verdict = self.claims.of(weight)
                if verdict.waits and verdict.norms:
                    waiting.append(verdict)
        return waiting

    def report_waiting(self) -> None:
        """Name the weights that are left alone until a loss has read all their rows."""
        for verdict in self._waiting_for_rows():
            name, reason = verdict.name, verdict.reason
            text = f"{self.name} leaves `{name}` alone until all its rows were read: {reason}."
            self.session.say_once(text, about=(self, name))

    def refuse_to_find_nothing(self) -> None:
        """There is nothing to act on after every optimizer's first step: an error, unless something
        may still come.

        A fit that goes on from a checkpoint has had its first steps: there nothing is refused, as
        nothing would have been without the interruption.

        Raises:
            NoTargetsError: with what is known of each weight.
        """
        waiting = self.may_come()
        if waiting:
            self._say_waiting(waiting)
        elif not self.claims.resumed:
            raise NoTargetsError(
                f"{self._found_nothing()} to act on:\n{self._reasons()}\n"
                "Name weights with params='PATTERN' if you know better, or remove the callback."
            )
        elif not self.claims.losses:  # those have been named one by one
            warn_once(f"{self._found_nothing()} to act on any more:\n{self._reasons()}")

    def _found_nothing(self) -> str:
        kind = "scale-invariant weight" if self.rule.writes else "weight of two or more dimensions"
        return f"{self.name}(params={shown(self.rule.params)}) found no {kind}"

    def _reasons(self) -> str:
        """Why no weight is a target, one a line."""
        weights = self.weights
        reasons = [
            f"  {self.name_of(w)}: a lazy parameter; run one forward pass before the fit"
            for w in weights.lazy
        ]
        verdicts = [self.claims.of(w) for w in weights.names if weights.is_matrix(w)]
        # If nothing is known of any weight, it is one cause for all: no graph was read.
        if any(verdict.known for verdict in verdicts):
            reasons += [f"  {v.name}: {v.reason or v.kind}" for v in verdicts]
        else:
            reasons.append(
                "  no training loss was seen in on_before_backward (call "
                "self.manual_backward(loss))"
            )
        # A large model has hundreds of weights, nearly all for one of a few reasons.
        return "\n".join(reasons[:8])

    def _say_waiting(self, waiting: Sequence[str]) -> None:
        """Nothing to act on yet: name what may still come, so that nobody finds out at the end of
        the fit."""
        text = (
            f"{self._found_nothing()} among the weights that are trained. It does nothing until "
            f"one of those that are frozen, or that no optimizer holds, is trained: "
            f"{named(waiting)}. If none ever will be, name weights with params='PATTERN', or "
            f"remove the callback."
        )
        trainer = self.session.trainer
        frozen = {self.name_of(w) for w in self.weights.names if not w.requires_grad}
        finetuning = classes("callbacks", "BaseFinetuning")
        planned = any(isinstance(c, finetuning) for c in callbacks_of(trainer))
        # Who brings a finetuning callback has meant it so.
        if planned or not frozen.intersection(waiting):
            show(trainer, f"lightning-normdyn: {text}")
        else:
            warn_once(text)
