"""The monitor: norms, effective learning rates and angular updates of every weight, in the loggers
and in memory."""

from collections.abc import Sequence
from typing import Any, ClassVar

from lightning_normdyn.engine.arguments import Granularity, Params, check_count
from lightning_normdyn.engine.callback import NormDynCallback
from lightning_normdyn.engine.flavours import LightningModule, Trainer
from lightning_normdyn.engine.value_checks import Check, record
from lightning_normdyn.engine.worker import Worker, during
from lightning_normdyn.errors import did_you_mean
from lightning_normdyn.monitor.history_files import KeepsHistory
from lightning_normdyn.monitor.measure import Look, StepGauge, sum_norms
from lightning_normdyn.monitor.passed_steps import STATE as PASSED_STEPS
from lightning_normdyn.monitor.passed_steps import PassedSteps
from lightning_normdyn.monitor.quantities import monitored
from lightning_normdyn.monitor.recording import Recording
from lightning_normdyn.optimizers.recognition import applied_rate
from lightning_normdyn.optimizers.rehearsal import rehearsed
from lightning_normdyn.optimizers.step import Phase, Step


class MonitorWorker(Worker["NormDynamicsMonitor"]):
    """Measures the steps of one optimizer that the recording asks for."""

    part: Recording

    STATE: ClassVar[Check] = staticmethod(record({"passed": PASSED_STEPS}, closed=True))

    def prepare(self) -> None:
        """Nothing is measured yet."""
        self._gauge: StepGauge | None = None
        self._look: Look | None = None
        self._passed = PassedSteps()
        # The gauge of the plan whose place this one takes measures weights that may be gone.
        self.part.gauges.pop(self.plan.index, None)

    @during(Phase.MEASURE)
    def before(self, step: Step) -> None:
        """Note with which numbers the step is taken, and sum over the weights that the gradient
        was taken at, if it is to be measured."""
        number = self.plan.number(step)
        self._passed.note(number, self.plan.optimizer.param_groups)
        self._look = self.part.look_at(self.plan.index, number)
        if self._look is not None:
            # Before anything is multiplied in this step, like the norms.
            log_scale = self.session.combined.published(self.plan, "log_scale")
            self._ready_gauge().before(step, log_scale)

    def reads_gradients(self, step: Step) -> bool:
        """Of the steps that are measured only."""
        return self._look is not None

    @during(Phase.MEASURE_STEP)
    def after(self, step: Step) -> None:
        """Measure how the step moved them."""
        # Forgotten first: if measuring fails, the next step must not find this look.
        look = self._look
        self._look = None
        if look is None or self._gauge is None:
            return
        combined = self.session.combined
        sums = self._gauge.after(step, combined.published(self.plan, "target_angle"))
        # Only a history of single vectors holds the decay, and it costs a pass over the weights.
        decay = None
        if self.rule.per_vector_history:
            decay = combined.applied_decay(self.plan, step, sums.norm, sums.std)
        measured = self._gauge.measure(
            step,
            sums,
            look,
            now=self.session.clock.now,
            histograms=self.part.shows_histograms,
            applied_decay=decay,
            passed=self._passed,
        )
        self.part.add(measured)
        # What lies before the newest row is in its sums.
        newest = self.part.ledger.lasting.counted.get(self.plan.index)
        if newest is not None:
            self._passed.forget(newest)

    def rehearse(self, step: Step) -> None:
        """All sums of a step that is measured, what is made of them, and the norms at the end of a
        fit."""
        plan, combined = self.plan, self.session.combined
        if self.part.is_off:
            return
        like = rehearsed(step, plan.vectors.storages())
        # One of its own: that of the fit knows which steps it has measured.
        gauge = self._new_gauge()
        gauge.before(like, combined.published(plan, "log_scale"))
        measured = gauge.measure(
            like,
            gauge.after(like, combined.published(plan, "target_angle")),
            Look(due=False, overdue=False),
            now=0,
            histograms=self.part.shows_histograms,
            applied_decay=None,
            passed=PassedSteps(),
        )
        measured.reduce()
        sum_norms(plan)

    def _ready_gauge(self) -> StepGauge:
        """Made at the first measured step, and not with the worker: which quantities apply depends
        on what other callbacks do, and all have made their plans only by then."""
        if self._gauge is None:
            self._say_unknown_rate()
            self._gauge = self._new_gauge()
            self.part.gauges[self.plan.index] = self._gauge
        return self._gauge

    def _new_gauge(self) -> StepGauge:
        return StepGauge(
            self.plan,
            self.session.combined.effects(self.plan.targets, besides=self.rule),
            self.rule.quantities,
            keeps_vectors=self.rule.per_vector_history,
        )

    def _say_unknown_rate(self) -> None:
        """Whoever misses a curve must find out why it is not there."""
        plan = self.plan
        rates = [applied_rate(plan.optimizer, plan.group_of(t), t.weight) for t in plan.targets]
        # One weight is enough: the sentence is about the optimizer.
        if any(rate is None for rate in rates):
            name = type(plan.optimizer).__name__
            self.session.say_once(
                f"The learning rate that {name} applies in its next step cannot be told from its "
                f"param groups and its state. Until it can be, effective_lr, direction_lr and "
                f"predictions are left out for its weights; norms and angles are measured."
            )

    def state(self) -> dict[str, Any]:
        """The steps since the newest row: what is expected of a weight rests on every one."""
        return {"passed": self._passed.state()}

    def load(self, state: dict[str, Any]) -> None:
        """As `state` gave it."""
        self._passed.load(state["passed"])

    def inherit(self, earlier: Any) -> None:
        """The steps since the newest row were those of the same optimizer."""
        self._passed = earlier._passed


class NormDynamicsMonitor(NormDynCallback, KeepsHistory):
    r"""Logs norm, effective learning rate, angular update and their relatives for every weight, and
    prints what came of them.

    One ``log_metrics`` call per logging step and logger. Keys are ``<quantity>/<parameter name>``,
    averaged over the weight's vectors, and ``normdyn/<quantity>`` over all scale-invariant vectors.
    Loggers get five numbers of each weight (``angular_update``, ``expected_ratio`` or else
    ``balance_ratio`` or else ``norm_drift``, ``weight_norm``, ``effective_lr``, ``direction_lr``)
    and the overview; `history` keeps every quantity.
    `lightning_normdyn.monitor.quantities` is the table of all quantities, with their formulas and
    averages; `markdown_table` there prints it.

    Under SGD the direction follows ``direction_lr``; under Adam-like optimizers it follows
    ``effective_lr``.

    An optimizer that does not step at a logging step (the generator of a GAN, manual accumulation)
    is measured at its next real step. Of an optimizer that steps several times within one batch,
    the first of these steps is measured. A row's ``optimizer_step`` is the number of the measured
    step; of several optimizers in one row, that of the first. Where weights or gradients are not
    finite, the numbers that rest on them are NaN.

    At the end of a fit W&B gets a table of the layers, a chart per main quantity and pictures
    (``normdyn_tables``, ``normdyn_charts``, ``normdyn_pictures``; one can zoom into them where
    plotly is installed), TensorBoard and MLflow get the
    table and the pictures, and CSV gets the pictures beside ``metrics.csv``. The history lies
    beside each of them as ``history.npz``, which ``lightning-normdyn report`` reads; on a
    disk or at a URL (``s3://``). It is written at every checkpoint and when a fit is interrupted,
    too; a second fit of the same run writes ``history.fit2.npz``. Pictures need matplotlib.

    Args:
        every_n_steps: logging steps as the Trainer counts them; None: the Trainer's
            ``log_every_n_steps``.
        quantities: what loggers get in place of these five and of the overview, e.g.
            ``["effective_lr", "coherence"]``: names out of the table (a wrong one is answered with
            all of them). A quantity that is measured by name only is measured then.
        per_vector: also keep every vector's norm and applied decay in `history`, as float32; of
            float64 weights also what float32 leaves of the norm (``weight_norm_rest``).
        histograms: also send histograms over vectors to W&B and TensorBoard:
            ``weight_norm_histogram/<parameter name>`` and ``angular_update_histogram/<parameter
            name>``.
        tables: print the tables at the start and the end of a fit.
        alert: send W&B alerts for weights that collapse.
        pictures_every_n_steps: steps after which loggers get the table of layers, the heat map and
            the pictures of angles, learning rates and norms anew, as far as drawing has taken no
            more than 1 % of the time since the start; None: at the end only.
        params: ``"auto"`` (every weight of two or more dimensions that an optimizer owns, but for
            gains, whose rows are single numbers), a glob pattern, or a list of them.
        granularity: ``"auto"``, ``"filter"``, ``"group"``, ``"layer"`` or ``"column"``.

    Attributes:
        history: the same rows in memory, on rank zero, logger or not
            (`lightning_normdyn.monitor.history.History`). From a GPU a row arrives, here and in the
            loggers, one batch later, under its own step; at an epoch's end and in a checkpoint all
            are there.

    Raises:
        ValueError: for numbers out of range and unknown quantities.

    Example:
        >>> from lightning_normdyn import NormDynamicsMonitor
        >>> NormDynamicsMonitor(50, quantities=["effective_lr", "angular_update"]).every_n_steps
        50
    """

    # It only looks, so it may be put anywhere in the list, and a fit without targets is no error.
    writes = False
    worker = MonitorWorker
    part = Recording
    # What changes no number is left out: a resumed run with other settings is another run.
    numbers = ("every_n_steps", "quantities")

    _member: Recording | None

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        quantities: Sequence[str] | None = None,
        per_vector: bool = False,
        histograms: bool = False,
        tables: bool = True,
        alert: bool = False,
        pictures_every_n_steps: int | None = None,
        params: Params = "auto",
        granularity: Granularity = "auto",
    ) -> None:
        super().__init__(params, granularity)
        # Read from the table at every construction, so that a person may add an entry to it.
        known = [quantity.name for quantity in monitored()]
        # An empty list would leave nothing to log; None is how one asks for everything.
        if quantities is not None and not (quantities and set(quantities) <= set(known)):
            unknown = [name for name in quantities if name not in known]
            hint = did_you_mean(unknown[0], known) if unknown else ""
            raise ValueError(
                f"`quantities` must be None or names out of {known}, got {quantities!r}.{hint}"
            )
        if every_n_steps is not None:
            every_n_steps = check_count("every_n_steps", every_n_steps, 1, "None or ")
        if pictures_every_n_steps is not None:
            pictures_every_n_steps = check_count(
                "pictures_every_n_steps", pictures_every_n_steps, 1, "None or "
            )
        self.every_n_steps = every_n_steps
        self.pictures_every_n_steps = pictures_every_n_steps
        self.quantities = None if quantities is None else list(quantities)
        self.per_vector_history = per_vector
        self.histograms = histograms
        self.tables = self.shows_tables = tables
        self.alert = alert
        # By name: the constructor of NormDynCallback does not call the next one.
        KeepsHistory.__init__(self)

    def end_table(self) -> str | None:
        """The table at the end of a fit as text; None if nothing was measured here. Sharded over
        ranks, all of them must call it."""
        recording = self._member
        return None if recording is None else recording.end_table(recording.layers())

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new history, or go on with that of a checkpoint."""
        super().on_fit_start(trainer, pl_module)
        # Some strategies load a checkpoint before this, others after it: whoever comes second finds
        # both the session and the state.
        self._take_up()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every callback's; the rows can be seen at once, also where no step follows because the
        fit was finished."""
        super().load_state_dict(state_dict)
        self._take_up()

    def _take_up(self) -> None:
        if self._member is not None and self._restored is not None:
            self._member.take_up(self._restored)
