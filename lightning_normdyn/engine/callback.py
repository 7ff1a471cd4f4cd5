"""The base of every callback: a configuration (`Rule`) whose Lightning hooks drive its part in a
fit (`Part`). Nothing that belongs to a fit is kept here."""

from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from lightning_normdyn.errors import NormDynError, NotSupportedError

from .flavours import PACKAGES, LightningModule, Trainer, classes
from .messages import warn_once
from .part import Part
from .plan import Plan
from .rule import Rule
from .session import Session
from .state import seal, unseal
from .value_checks import record, table, whole
from .worker import Worker


class NormDynCallback(Rule):
    """Base of the callbacks: a rule, the worker that carries it out, and the hooks of a fit.

    A subclass is a constructor that checks its numbers, and a ``worker``. See `Worker` for what a
    worker may do, and `Rule` for what else a class may say about itself.

    Args:
        params: ``"auto"``, one glob pattern, or a list of them, over the LightningModule's own
            parameter names; ``"!pattern"`` excludes.
        granularity: what counts as one vector; ``"auto"`` follows the normalization behind the
            weight.

    Raises:
        ValueError: for an unknown granularity.
    """

    worker: ClassVar[type[Worker[Any]]] = Worker
    """Made for the targets of each optimizer."""

    part: ClassVar[type[Part[Any]]] = Part
    """Made for each fit; a subclass keeps what belongs to a fit and to no optimizer."""

    # Of the instance, from its first fit or checkpoint on.
    _member: Part[Any] | None = None
    _restored: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what a spawned process gets, is ready for a fit of its own: the Trainer, the
        weights and their hooks stay behind."""
        state = {**vars(self), "_member": None, "_restored": None}
        # Lightning puts methods of the LightningModule on every callback, and with them the module.
        for borrowed in ("log", "log_dict"):
            state.pop(borrowed, None)
        return state

    # -- what a person may ask

    @property
    def plans(self) -> dict[int, Plan]:
        """The targets of the present or last fit, by optimizer."""
        return {} if self._member is None else self._member.plans

    def steps_of(self, index: int) -> int:
        """Real steps of optimizer ``index`` that this callback has seen, over resumes."""
        return 0 if self._member is None else self._member.steps_of(index)

    @property
    def member(self) -> Part[Any]:
        """Its part in the fit that is going on, or that was the last one.

        Raises:
            RuntimeError: before any fit.
        """
        if self._member is None:
            raise RuntimeError(f"{type(self).__name__} has not been in a fit.")
        return self._member

    # -- Lightning's hooks

    def setup(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        """Refuse a Trainer of another package; forget an earlier fit."""
        if not isinstance(trainer, classes("", "Trainer")):
            raise NotSupportedError(
                f"{type(self).__name__} was given to a Trainer of "
                f"`{type(trainer).__module__.split('.')[0]}`; it works with those of "
                f"{' and '.join(map('`{}`'.format, PACKAGES))}."
            )
        if stage == "fit":
            # Not in on_fit_start: the tuner may save and restore a checkpoint before that.
            self._member = self._restored = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Map names, check patterns and optimizers."""
        # One session per fit: whichever callback comes first makes it.
        session = Session.of(trainer, pl_module)
        self._member = self.part(self, self.worker, session)
        session.members.append(self._member)
        self._member.fit_start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bracket the optimizers: only here are weights, optimizer state and callback state
        restored under every strategy."""
        # The tuner's inner fits and sanity checks come before this, so nothing acts in them.
        # Under FSDP and DeepSpeed Lightning loads the state of callbacks after `on_fit_start`.
        self.member.restored, self._restored = self._restored, None
        self.member.train_start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another epoch."""
        self.member.epoch_start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the first forward pass."""
        self.member.batch_start(batch, batch_idx)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Read the graph of a watched forward pass."""
        member = self._member
        if member is not None and member.leads:
            member.session.before_backward(loss)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Count attempts, so that skipped steps can be told."""
        member = self._member
        if member is not None and member.leads:
            member.session.attempts.announce(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print the start table after the first step."""
        self.member.batch_end()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report vectors that had to be left alone, once."""
        self.member.epoch_end()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what came of the fit, and let go of the optimizers."""
        self.member.train_end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        if self._member is not None:
            self._member.interrupted()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Nothing here goes beside `state_dict`; a part in a fit may write files of its own."""
        if self._member is not None:
            self._member.checkpoint_saved()

    def teardown(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        stage: str,
    ) -> None:
        """Leave no hook behind."""
        if self._member is not None:
            self._member.let_go()
            # An evaluation adds nothing to what the fit has left.
            if stage == "fit":
                self._member.torn_down()
        if stage != "fit":
            self._restored = None  # an evaluation that loaded a checkpoint is no resume

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Counters, per-vector state and the table of targets: plain tensors, numbers and
        strings."""
        # Training has not begun, so no member has taken up the checkpoint's state: pass it on.
        if self._restored is not None:
            return seal(self._restored)
        if self._member is not None:
            return seal(self._member.state())
        # Before any fit: a checkpoint of an evaluation still must have a state to load.
        settings = self.settings()
        return seal(
            {"settings": settings, "steps": {}, "per_vector": {}, "targets": {}, "extra": {}}
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state; it is taken up at the first step, when every strategy has restored
        the weights.

        A state that does not fit is not believed: this callback then starts as in a fresh fit, and
        says so.
        """
        try:
            self._restored = unseal(state_dict, self.check_extra)
        except NormDynError as error:
            self._restored = None
            warn_once(
                f"{type(self).__name__} cannot use its state in the checkpoint: {error}. It starts "
                f"as in a fresh fit; resume from another checkpoint if that is not what you want."
            )

    def check_extra(self, extra: Any, where: str) -> None:
        """Refuse, by a NormDynError, what this callback's workers and its part in a fit cannot have
        stored."""
        record({}, {"workers": table(whole(), self.worker.STATE)})(extra, where)
        self.part.STATE(extra, where)
