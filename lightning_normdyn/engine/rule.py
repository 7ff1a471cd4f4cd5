"""What a person constructs: which weights are meant and the numbers of a rule, checked. Nothing
here belongs to a fit, so one callback may serve several."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, get_args

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.invariance.names import normalize_params

from .arguments import Granularity, Params, check_choice
from .flavours import Callback


class Turn(IntEnum):
    """Who acts first of the callbacks that change the same weights in the same phase of a step.

    After a step that is: the projection of the optimizer's own step, a cautious decay, whose mask
    is that step's too, the control of the rotation, which then holds whatever came before, the
    brake on the norm that results, and the replay, which scales what is left.
    """

    FIRST = 0
    DECAY = 1
    ROTATION = 2
    BRAKE = 3
    REPLAY = 4


class Rule(Callback):
    """The configuration of a callback.

    Args:
        params: ``"auto"``, one glob pattern, or a list of them, over the LightningModule's own
            parameter names; ``"!pattern"`` excludes.
        granularity: what counts as one vector; ``"auto"`` follows the normalization behind the
            weight.

    Raises:
        ValueError: for an unknown granularity.
    """

    writes: bool = True
    """Whether ``params="auto"`` means the scale-invariant weights (an error if there are none), or
    every weight of two or more dimensions."""

    rank: ClassVar[int] = Turn.FIRST
    """Who acts first of the callbacks that change the same weights in the same phase: a lower rank
    does. Equal ranks are refused, since what comes out would depend on the order of the list."""

    needs_length: bool = False
    """Whether it can never do anything for a weight that is zero at the start: such a weight is
    refused by name instead of seeming to be treated. A rule that acts as soon as the weight has
    grown needs none."""

    without_zeros: str = ""
    """What a person may do instead, of a rule that refuses a weight in which any single vector is
    zero at the start; empty for one that does not."""

    shows_tables: bool = True
    """Whether it wants the tables printed."""

    numbers: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold the constructor's numbers: stored in checkpoints, shown in tables."""

    marks: ClassVar[tuple[str, ...]] = ()
    """Kinds of events that this callback itself marks in the monitor's history."""

    # `state_key`, and the settings that it was worked out from.
    _known_key: tuple[tuple[str, ...], str] | None = None

    def __init__(self, params: Params = "auto", granularity: str = "auto") -> None:
        # As a list, so that "net.*" and ["net.*"] are one callback in a checkpoint.
        self.params = normalize_params(params)
        self.granularity = check_choice("granularity", granularity, get_args(Granularity))

    def settings(self) -> dict[str, Any]:
        """The constructor's numbers by name."""
        return {name: getattr(self, name) for name in self.numbers}

    def check_optimizer(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        """Refuse an optimizer whose ``weights``, one or more, this rule cannot treat rightly.

        Asked before training, whenever weights join, and after the first real step, which fills the
        optimizer's state.

        Raises:
            NotSupportedError: naming a way out.
        """

    @property
    def refuses_beside(self) -> Mapping[str, str]:
        """The callbacks that it cannot share a weight with: the name of the class, and the reason
        as the end of a sentence.

        It is enough that one of the two names the other.
        """
        return {}

    @property
    def acts(self) -> bool:
        """Whether it is an error to find nothing: not for those who only look."""
        return self.writes

    @property
    def by_name(self) -> bool:
        """Whether ``params`` names weights: not ``"auto"``, and not ``"auto"`` minus some."""
        return self.params != ["auto"] and not all(p.startswith("!") for p in self.params)

    @property
    def kind(self) -> type:
        """The class whose rule this is: a subclass of `AdaptiveWeightShrink` shrinks as well."""
        # In order of inheritance: ..., AdaptiveWeightShrink, NormDynCallback, Rule, Callback.
        classes = type(self).__mro__
        return classes[classes.index(Rule) - 2]

    @property
    def state_key(self) -> str:
        """Identifies this callback's state in a checkpoint: class, params and granularity, so that
        a changed number keeps its counters."""
        # Lightning asks at every hook of every batch.
        settings = *self.params, self.granularity
        if self._known_key is None or self._known_key[0] != settings:
            # In Lightning's own form, but without its help: a rule can be asked before it is
            # loaded.
            arguments = {"params": shown(self.params), "granularity": self.granularity}
            self._known_key = settings, f"{type(self).__qualname__}{arguments!r}"
        return self._known_key[1]


def shown(params: list[str]) -> str:
    """Patterns as a person writes them: a single one without its list."""
    return repr(params[0] if len(params) == 1 else params)
