"""The worker: what a rule does to the targets of one optimizer, with everything that belongs to one
fit. A rule is its numbers, and a worker that reads like the paper."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from lightning_normdyn.optimizers.checks import check_decay_takeover
from lightning_normdyn.optimizers.decay import Decay, DecayOwner, DecayRule
from lightning_normdyn.optimizers.group_numbers import Group, Number
from lightning_normdyn.optimizers.step import Phase, Step

from .effect import Effect, NoEffect, UnknownEffect
from .plan import Plan, Target
from .selection import AnyRule, Selection
from .value_checks import Check, record

# Phases in which a handler finds weights to look at. Whoever acts in others changes them.
LOOKING = frozenset(
    {Phase.RESOLVE, Phase.MEASURE, Phase.SNAPSHOT, Phase.LOOK_AGAIN, Phase.MEASURE_STEP}
)
# What a subclass may override without doing anything else to a weight.
SAYING = frozenset(
    {
        "treatment",
        "treatments",
        "state",
        "load",
        "inherit",
        "forget",
        "rehearse",
        "reads_gradients",
    }
)

Method = TypeVar("Method", bound=Callable[..., None])


def during(phase: Phase) -> Callable[[Method], Method]:
    """Mark a method of a `Worker` as the one that acts in ``phase`` of every real step.

    The method gets the step, and lets a NormDynError through: in the first step that ends the fit,
    later the rule stops acting on this optimizer and says so.
    """

    def mark(method: Method) -> Method:
        method.phase = phase  # type: ignore[attr-defined]
        return method

    return mark


class Worker(Generic[AnyRule]):
    """Acts on the targets of one optimizer, from the moment they are known until they change.

    It is made at the optimizer's first real step, and made anew when weights join or leave. A
    subclass has a method marked by `during` for each phase in which it acts, and in `prepare` it
    takes what it needs: state of each vector from ``plan.state``, counters from ``plan.counter``,
    the decay of its targets by `claim_decay`.

    Args:
        part: the callback's part in the fit: its numbers (``part.rule``) and what is known of the
            fit (``part.session``).
        plan: the targets, as vectors.
    """

    phases: ClassVar[dict[Phase, str]] = {}
    """The method of each phase in which it acts."""

    STATE: ClassVar[Check] = staticmethod(record({}, closed=True))
    """What `state` may look like in a checkpoint."""

    _unstated: ClassVar[bool] = False
    """Whether `effect` was inherited from a class that did something else."""

    def __init__(self, part: Selection[AnyRule], plan: Plan) -> None:
        self.part = part
        self.rule = part.rule
        self.session = part.session
        self.plan = plan
        self.prepare()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Of the base's, too: an override needs no mark, since a phase names its method.
        cls.phases = dict(cls.phases)
        for name, method in vars(cls).items():
            if hasattr(method, "phase"):
                cls.phases[method.phase] = name
        cls._unstated = cls._changes_what_is_done()

    @classmethod
    def _changes_what_is_done(cls) -> bool:
        """Whether a class below the one that defines `effect` overrides methods of the rule itself,
        or acts in a further phase."""
        classes = cls.__mro__[: cls.__mro__.index(Worker)]
        # From the class to its bases: those above the one that states an effect are what it speaks
        # of, those below may have changed it.
        below: dict[str, Any] = {}
        while classes and "effect" not in vars(classes[0]):
            below.update(vars(classes[0]))
            classes = classes[1:]
        rule: set[str] = set()
        for each in classes:
            for name, value in vars(each).items():
                if callable(value) or isinstance(value, property):
                    rule.add(name)
        if not rule:  # nobody has said anything: `effect` of the base class decides
            return False
        changed = (rule - SAYING) & below.keys()
        return bool(changed) or any(hasattr(value, "phase") for value in below.values())

    # -- what a rule adds

    def prepare(self) -> None:
        """Take what the worker needs, as the last thing when it is made: part, rule, session and
        plan are there."""

    def rehearse(self, step: Step) -> None:
        """On a GPU whose programs have to be compiled: ask for everything that is launched in a
        step, before the first callback writes to a weight. Nothing is launched or written
        meanwhile, and what comes out is any numbers."""

    def reads_gradients(self, step: Step) -> bool:
        """Whether, in a phase after the update, it will ask which of its weights had a gradient in
        this step; asked right before the update.

        To be overridden by who acts in few steps: finding out takes time for every weight.
        """
        return True

    def effect(self, target: Target) -> Effect:
        """What is done to ``target`` at present: predictions, records and tables rest on it.

        Unless a subclass says it, a rule that changes weights has an effect that nobody has
        derived, so there is no prediction.
        """
        # A rule may act although its phases are those of looking: then it acts there.
        if self.rule.writes or self.rule.acts or not LOOKING.issuperset(self.phases):
            return UnknownEffect(type(self.rule).__name__)
        return NoEffect()

    def treatment(self, target: Target) -> str:
        """How the tables say what happens to ``target``; nothing where nothing does."""
        return "" if isinstance(self.effect(target), NoEffect) else type(self.rule).__name__

    def treatments(self) -> list[str]:
        """`treatment` of all targets, in their order; where that takes sums over vectors, every
        rank must call it."""
        return [self.treatment(target) for target in self.plan.targets]

    def correct_decays(
        self,
        plan: Plan,
        decays: Sequence[Decay],
        rates: Tensor,
    ) -> None:
        """Put right, in this very step, what `effect` can only say of the usual case.

        Args:
            plan: somebody's plan for the same optimizer.
            decays: what is known of the decay of each of its targets.
            rates: ``(targets,)``, the ``rate`` of each; to be changed in place.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold of this worker besides the state per vector: plain tensors,
        numbers and strings."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave before the interruption."""

    def inherit(self, earlier: Any) -> None:
        """Go on from the worker of the same class whose place this one takes."""

    def forget(self, name: str) -> None:
        """Another weight has taken the place of the one that was called ``name``."""

    # -- what it offers

    def claim_decay(self, owner: DecayOwner, holds: Callable[[], bool] | None = None) -> None:
        """Take over the weight decay of the targets, and of no other weight in their param groups,
        for as long as the plan is in force; see `StepBracket.claim_decay`.

        Args:
            owner: as which callback.
            holds: asked at every step; None: always.

        Raises:
            NotSupportedError: for a decay that cannot be taken over.
        """
        plan = self.plan
        claimed = plan.claimed
        check_decay_takeover(plan.optimizer, claimed)
        # The same objects at every step, by which it is known that nothing has changed.
        nothing: dict[Tensor, Any] = {}
        remove = plan.bracket.claim_decay(
            self, owner, lambda: claimed if holds is None or holds() else nothing
        )
        plan.on_close(remove)

    def decoupled_decay(
        self,
        group: Group,
        decay: DecayRule,
        setting: str,
    ) -> Number:
        """λ of a param group as ``decay`` applies it in this step.

        Args:
            group: as it is now.
            decay: of this callback.
            setting: what a person wrote for it, to be named where the decay that the group has now
                cannot be turned into a decoupled one; the targets then have none, and it is said
                once.
        """
        optimizer = self.plan.optimizer
        rate = decay.applied(optimizer, group)
        if rate is not None:
            return rate
        # Fit start refuses this. A schedule can still bring it about, and a step raises nothing.
        self.session.say_once(
            f"{setting} cannot turn the weight decay {group['weight_decay']} that "
            f"{type(optimizer).__name__} has now into a decoupled one, so its targets have none "
            f"from here on.",
            about=(self.rule.state_key, "weight decay"),
        )
        return 0.0

    def stated_reads_gradients(self) -> Callable[[Step], bool] | None:
        """`reads_gradients`, if it still speaks of what is done: None for a subclass that changes
        that without saying what it is."""
        return None if self._unstated else self.reads_gradients

    def stated_effect(self, target: Target) -> Effect:
        """`effect`, if it is still true: a subclass that changes what is done, and does not say
        what that is, does something unknown."""
        stated = None if self._unstated else self.effect(target)
        return stated if isinstance(stated, Effect) else UnknownEffect(type(self.rule).__name__)
