"""What belongs to one fit of the monitor: when it measures, what waits for the host, the rows so
far, their way to loggers and files, and how they go on after an interruption.

Over 500 lines, because all of these replace the same ledger: apart, each would need the others to
know what it may replace.
"""

from collections import ChainMap
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from lightning_normdyn.engine.effect import Effects
from lightning_normdyn.engine.lightning_facts import log_every
from lightning_normdyn.engine.messages import show, warn_once
from lightning_normdyn.engine.part import Part
from lightning_normdyn.engine.session import Session
from lightning_normdyn.engine.value_checks import many, record, whole
from lightning_normdyn.engine.worker import Worker
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.optimizers.step import HostCopy

from . import group_sizes
from .alarms import Alarms
from .foresight import Foresight
from .history import History
from .history_files import HistoryFiles
from .ledger import Ledger, Row
from .loggers import (
    can_show_histograms,
    can_show_outcome,
    invitations,
    places_of_layers,
    publish_about,
    publish_history,
    publish_outcome,
    publish_row,
    publish_to_trainer,
)
from .measure import Look, Measured, StepGauge, mean_norms
from .outcome import Outcome, about_run, as_text, summarize
from .predictions import is_proportional, noise_coherence, relaxation_power
from .quantities import for_loggers, rate_followed
from .refresh import Refresh
from .rows import RowDraft, Sent
from .stand_ins import StandIns
from .verdicts import Grounds, balance_of

_check_position = record({"position": many(whole()), "skipped_steps": whole()})


class Recording(Part[Any]):
    """One fit of a monitor.

    Attributes:
        ledger: all that was recorded so far. It is replaced as a whole, so that a signal handler's
            checkpoint finds the state before a row or the one after it.
    """

    def __init__(
        self,
        rule: Any,
        worker: type[Worker[Any]],
        session: Session,
    ) -> None:
        super().__init__(rule, worker, session)
        self.trainer = session.trainer
        self.clock = session.clock
        self.combined = session.combined
        self.is_off = bool(self.trainer.barebones)
        self.quantities: list[str] | None = rule.quantities
        self.alarms = Alarms(self.trainer, alert=rule.alert)
        self.foresight = Foresight(self.trainer, rule)
        self.stand_ins = StandIns(self.trainer)
        self.ledger = Ledger()
        self.gauges: dict[int, StepGauge] = {}
        self._refreshing = Refresh(None)
        # Of the checkpoint that this fit goes on from, before the first batch.
        self._position: list[int] | None = None
        self._begun_at: int | None = None  # x of the first batch of this fit
        self._continued = False  # whether the history came from a checkpoint
        self._skipped_before = 0  # steps skipped before the checkpoint
        self._invited = False  # whether a person was told where the loggers' pages are
        self._told = 0  # how many targets the loggers know of
        self._files: HistoryFiles | None = None  # where the history lies, once it was written
        self._ended = False  # whether the fit is over, and all has been written

    @property
    def label(self) -> str:
        """What tells this monitor's tables and files from those of others on the same Trainer."""
        recordings = [member for member in self.session.members if isinstance(member, Recording)]
        position = recordings.index(self)
        return f"-{position}" if position else ""

    # -- when to measure

    @property
    def _every(self) -> int:
        """Batches that step from one logging step to the next; 0: there are none."""
        chosen = self.rule.every_n_steps
        return log_every(self.trainer) if chosen is None else chosen

    @property
    def shows_histograms(self) -> bool:
        """Whether they are asked for and a logger can show them."""
        return self.rule.histograms and can_show_histograms(self.trainer.loggers)

    def look_at(self, index: int, number: int) -> Look | None:
        """Whether step ``number`` of an optimizer is to be measured, and why."""
        if self.is_off:
            return None
        now = self.clock.now
        if self._begun_at is None:
            self._begun_at = now
        newest = self.ledger.measured.get(index)
        for result in self._on_their_way():
            # Of the same number: the device skipped that update, or it raised, and this is the same
            # step again.
            if result.plan.index != index or result.optimizer_step == number:
                continue
            if result.step == now:
                return None  # a row holds one step of each optimizer
            if result.look.due:
                newest = result.step
        # The last logging step up to now. An optimizer that was not measured at it or since is due,
        # whenever it steps next.
        every = self._every
        logging_step = (now + 1) // every * every - 1 if every else -1
        overdue = (self._begun_at - 1 if newest is None else newest) < logging_step
        due = overdue or newest is None
        if due or self.trainer.should_stop or self.clock.is_last:
            return Look(due, overdue)
        return None

    def _on_their_way(self) -> list[Measured]:
        sent = self.ledger.sent
        return [*(sent.results if sent else ()), *self.ledger.results]

    def add(self, result: Measured) -> None:
        """Take in a measured step."""
        # The same step again (a fused optimizer's update that was skipped, tried once more within a
        # batch) takes the place of the first.
        others = [r for r in self.ledger.results if r.plan.index != result.plan.index]
        self.ledger = self.ledger.replaced(results=(*others, result))

    # -- from the device to the loggers

    def _send(self, results: tuple[Measured, ...]) -> Sent:
        """One transfer to the host for all optimizers of this batch. Changes nothing; every rank
        must call it."""
        clamped = self.combined.counted("clamped")
        is_kept = self.trainer.is_global_zero
        vectors = [result.kept_vectors(wanted=is_kept) for result in results]
        sums = [result.reduce() for result in results]
        parts = [*sums, *vectors]
        sizes = [part.numel() for part in parts]
        if clamped is not None:
            parts.append(clamped)
        marked = self.combined.events()
        is_overdue = any(result.look.overdue for result in results)
        return Sent(
            results=list(results),
            sizes=sizes,
            numbers=HostCopy(torch.cat([part.to(sums[0]) for part in parts])),
            events=self.ledger.new_events(marked),
            marked=marked,
            skipped_steps=self._skipped_before + self.session.attempts.skipped(),
            shown=bool(self._every) and (is_overdue or self.trainer.should_stop),
        )

    def _receive(self) -> None:
        """Publish what is on its way."""
        sent = self.ledger.sent
        if sent is None:
            return
        draft = self._drafted(self.ledger, sent)
        # Asked of the ledger, whose rows the callback's history shows.
        is_first = not len(self.ledger.history)
        self._show(draft.ledger.replaced(sent=None))
        for warn in draft.concerns:
            warn()
        row = draft.row
        if row is None:
            return
        if self.trainer.is_global_zero:
            if is_first and self.rule.tables:
                self.alarms.idle_decays(self.gauges.values())
            if sent.shown and self.trainer.loggers:
                # A plain dictionary: each key is looked up several times.
                values = dict(row.values.items())
                unbalanced = self.stand_ins.after(row.step, values, self.ledger.history)
                shown = for_loggers(values, self.quantities, unbalanced)
                publish_row(self.trainer.loggers, shown, draft.histograms, row.step)
        publish_to_trainer(self.trainer, row.values)

    def _drafted(self, ledger: Ledger, sent: Sent) -> RowDraft:
        """What becomes of results once their numbers are here. Changes nothing."""
        lasting = ledger.lasting
        draft = self._with_row(lasting, sent)
        if all(result.look.due for result in sent.results):
            return draft
        # Some were measured only because the fit may end here: if it goes on, or is resumed, the
        # row is one without these results.
        return self._with_row(lasting, sent, draft.ledger)

    def _with_row(
        self,
        ledger: Ledger,
        sent: Sent,
        without: Ledger | None = None,
    ) -> RowDraft:
        """`_drafted` for the results that were due; for all of them with ``without`` as what
        lasts of them."""
        draft = RowDraft(ledger, sent, self.alarms)
        draft.fill(only_due=without is None)
        is_marked_elsewhere = any("lr_drop" in m.rule.marks for m in self.session.members)
        draft.finish(marks_drops=not is_marked_elsewhere)
        if draft.row is not None:
            draft.ledger = self._recorded(draft.ledger, draft.row, without)
        return draft

    def _recorded(
        self,
        ledger: Ledger,
        row: Row,
        without: Ledger | None = None,
    ) -> Ledger:
        """The ledger with the row, which on rank zero is in the history too; with ``without`` as
        what lasts if the run goes on."""
        if self.trainer.is_global_zero:
            ledger = ledger.with_row(row)
        else:
            ledger = replace(ledger, last_step=row.step)
        return ledger if without is None else ledger.ending_with(row, without)

    def _show(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.rule.own_history.show(ledger.history)

    def _completed(self) -> Ledger:
        """The ledger as it will be when all that was measured is there; every rank must call it."""
        ledger = self.ledger
        if ledger.sent is not None:
            ledger = self._drafted(ledger, ledger.sent).ledger
        # What an update did in a batch that is not over will be done again after a resume, and
        # measured again.
        following, _ = self.clock.position()
        results = tuple(result for result in ledger.results if result.step < following)
        if results:
            ledger = self._drafted(ledger, self._send(results)).ledger
        return replace(ledger, results=(), sent=None)

    # -- the fit, from its start to its end

    def fit_start(self) -> None:
        """Start a new history."""
        super().fit_start()
        self.rule.history = History()
        self._show(self.ledger)

    def train_start(self) -> None:
        """Put back what other callbacks were promised: the next row may be several epochs away."""
        super().train_start()
        publish_to_trainer(self.trainer, self.ledger.promised)
        self._refreshing = Refresh(self.rule.pictures_every_n_steps)
        self.foresight.begin(self.session.attachment.optimizers, self._counts_of_all())

    def _counts_of_all(self) -> list[int]:
        """Steps of each optimizer, over resumes."""
        return [self.steps_of(index) for index in range(len(self.session.attachment.entries))]

    def batch_start(self, batch: Any, batch_idx: int) -> None:
        """Count on from a checkpoint before the first batch, then as every callback."""
        if self._position is not None:
            self._count_on_from(self._position)
            self._position = None
        self.foresight.tell(self.gauges, self.ledger)
        super().batch_start(batch, batch_idx)

    def epoch_start(self) -> None:
        """Read anew what the callbacks do: it may change from epoch to epoch."""
        super().epoch_start()
        for gauge in self.gauges.values():
            targets = gauge.plan.targets
            gauge.take_effects(self.combined.effects(targets, besides=self.rule))

    def batch_end(self) -> None:
        """Send what was measured in this batch to the host, and publish it when it is there: from a
        GPU one batch later."""
        super().batch_end()
        if self.ledger.sent is not None:
            self._receive()
        results = self.ledger.results
        if not results:
            return
        sent = self._send(results)
        self.ledger = self.ledger.replaced(results=(), sent=sent)
        for result in results:
            # An accelerator's allocator keeps what is freed, and there others can use it until the
            # next logging step.
            if result.values.device.type == "cpu":
                result.gauge.spare = result.values
        # Publishing takes collectives, so what decides must be the same on every rank: never
        # whether it has arrived by now.
        if not sent.numbers.arrives_later:
            self._receive()
        self._publish_about()
        self._refresh()

    def epoch_end(self) -> None:
        """Publish what is still on its way."""
        self._receive()
        self.foresight.tell(self.gauges, self.ledger)
        super().epoch_end()

    def train_end(self) -> None:
        """Add the last step if it was not foreseen, publish what came of the fit, and print the end
        table."""
        self._receive()
        norms = self.current_norms()
        if norms and not self.is_off:
            self._append_final(norms)
        self._publish_about()
        if not self.session.closed:
            self.session.last_look()
        layers = self.layers(dict(ChainMap(*norms.values())))
        text = self.end_table(layers) if self.rule.tables else None
        forecast = self.foresight.at_end(self.gauges, self.ledger, self._counts_of_all())
        sizes = self._group_sizes()
        super().train_end()
        if text:
            show(self.trainer, "\n".join(filter(None, (text, forecast, sizes))))
        if self.trainer.is_global_zero:
            for row in layers:  # a report of this history says what the table says
                about = self.rule.history.meta["targets"][row["weight"]]
                about.update({key: row[key] for key in ("finding", "ratio", "verdict")})
            self._write_history(self.rule.history)
            self._ended = True
            outcome = Outcome(self.rule.history, layers, self.quantities, self.label)
            publish_outcome(self.trainer.loggers, outcome)

    def _group_sizes(self) -> str:
        """How large weights and steps of each param group are, as a table, which the history keeps
        as numbers; empty but on rank zero."""
        if self.is_off or not self.trainer.is_global_zero:
            return ""
        optimizers = self.session.attachment.optimizers
        rows = group_sizes.group_sizes(optimizers, self.gauges, self.ledger.balances)
        if rows:
            self.rule.history.meta["groups"] = group_sizes.as_plain(rows)
        return group_sizes.as_text(rows)

    def interrupted(self) -> None:
        """Keep what was measured until the interruption (Ctrl-C, SIGTERM, an error)."""
        try:
            if not self._ended:  # another callback may have closed the session already
                self._ended = True
                # Of several ranks, the others may be anywhere: nothing that waits for them.
                if self.trainer.world_size == 1:
                    self._receive()
                self._write_history(self.rule.history)
        except Exception as error:
            # The person must see what interrupted the run, and not what came of it here.
            warn_once(
                f"the history of the interrupted fit could not be written ({type(error).__name__}: "
                f"{error})."
            )
        finally:
            super().interrupted()

    def checkpoint_saved(self) -> None:
        """Keep the history beside the logs too: a run that is killed later can then be reported,
        whatever kills it."""
        super().checkpoint_saved()
        if not self._ended:
            self._write_history(self._completed().history)
            # A process that the Trainer started gets no on_exception when it fails.
            self.rule.send_history(self.trainer)

    def torn_down(self) -> None:
        """Send the whole history to the process that called ``fit``, if that is another one."""
        self.rule.send_history(self.trainer)

    def _write_history(self, history: History) -> None:
        """Rank zero: the history so far into a file beside each logger's own."""
        if not self.trainer.is_global_zero or self.is_off:
            return
        if self._files is None:
            self._files = HistoryFiles(self.label, continued=self._continued)
        publish_history(self.trainer.loggers, history, self._files)

    def current_norms(self) -> dict[int, dict[str, float]]:
        """The mean norm of each weight at this moment, by optimizer. Every rank must call it."""
        return {index: mean_norms(plan) for index, plan in self.plans.items()}

    def _append_final(self, norms: dict[int, dict[str, float]]) -> None:
        """The last norms of every optimizer that stepped after its newest row: the fit ended before
        its time (early stopping, a time limit), or another optimizer took the last turn. Its last
        angle is not known any more."""
        for bracket in self.session.attachment.brackets:
            bracket.settle()
        ledger = self.ledger
        last = self.clock.now - 1
        is_newer = ledger.last_step < last
        moved = [i for i in norms if is_newer or self.steps_of(i) > ledger.counted.get(i, 0)]
        if ledger.last_step < 0 or not moved:
            return
        final = {name: norm for index in moved for name, norm in norms[index].items()}
        values = {f"weight_norm/{name}": norm for name, norm in final.items()}
        steps = max(self.steps_of(index) for index in self.plans)
        lasting = ledger.lasting
        if is_newer:
            row = Row(last, steps, values, lasting.events)
            ledger = self._recorded(replace(lasting, events=()), row, lasting)
        elif ledger.ending is None:
            ledger = self._recorded(ledger, Row(last, steps, values, amends=True), lasting)
        else:  # the row that was there, with more keys in it
            row = replace(ledger.ending, values={**values, **ledger.ending.values})
            before = replace(ledger, history=lasting.history)
            ledger = self._recorded(before, row, lasting)
        self._show(ledger)
        not_finite = [name for name, norm in final.items() if not isfinite(norm)]
        if not_finite:
            self.alarms.not_finite(not_finite, last, values)

    # -- what is told of the run as a whole

    def _publish_about(self) -> None:
        """What the run consists of: at its first step, and again when more weights are trained
        (finetuning)."""
        targets = self.targets
        if len(targets) == self._told:
            return
        self._told = len(targets)
        about = about_run(self.session, targets, self._rates_followed())
        meta = self.rule.history.meta
        # What a checkpoint says of a weight is what was true when the run began; only other
        # settings make another run of it.
        known = meta.get("targets", {}) if meta.get("callbacks") == about["callbacks"] else {}
        meta.update({**about, "targets": {**about["targets"], **known}})
        meta["kernels"] = self.session.combined.kernels()
        if self.trainer.is_global_zero:
            publish_about(self.trainer.loggers, about, self.label, max(0, self.ledger.last_step))
            if self.rule.tables and not self._invited:
                self._invited = True
                for text in invitations(self.trainer.loggers):
                    show(self.trainer, text)

    def _rates_followed(self) -> dict[str, str]:
        """By weight, the learning rate that its direction follows."""
        rates = {}
        # Most weights of a param group are alike, and there may be a thousand.
        known: dict[Any, str] = {}
        for plan in self.plans.values():
            for target, group in zip(plan.targets, plan.groups_of(plan.targets), strict=True):
                alike = id(group), target.matrix
                if alike not in known:
                    proportional = is_proportional(plan.optimizer, group, target.matrix)
                    known[alike] = rate_followed(proportional=proportional)
                rates[target.name] = known[alike]
        return rates

    def layers(self, last_norms: dict[str, float] | None = None) -> list[dict[str, Any]]:
        """What came of each weight, for the end table; empty but on rank zero. Sharded over ranks,
        all of them must call it.

        Args:
            last_norms: by weight, at the end of a fit.
        """
        # Every rank takes part in this; what follows is known to rank zero only.
        by_weight = self.combined.treatments()
        treatments = {target.name: by_weight[target.weight] for target in self.targets}
        return self._summarized(treatments, last_norms or {})

    def _summarized(
        self, treatments: dict[str, str], last_norms: dict[str, float]
    ) -> list[dict[str, Any]]:
        return summarize(
            self.targets,
            self.ledger.history,
            self.ledger.courses,
            self._grounds(),
            treatments,
            last_norms,
        )

    def _refresh(self) -> None:
        """Draw the pictures of the run so far, on rank zero, if they are due. No other rank takes
        part, so nothing in here may wait for one."""
        step = self.ledger.last_step
        if not self._refreshing.is_due(step) or not self.trainer.is_global_zero:
            return
        if not can_show_outcome(self.trainer.loggers):
            return
        with self._refreshing.drawing(step):
            try:
                # As the start had it: to ask anew how weights are treated is a collective.
                known = self.rule.history.meta["targets"]
                treatments = {name: facts["treated"] for name, facts in known.items()}
                layers = self._summarized(treatments, {})
                history = self.ledger.history
                outcome = Outcome(history, layers, self.quantities, self.label, is_final=False)
                publish_outcome(self.trainer.loggers, outcome)
            except Exception as error:
                # What only records may never end a fit.
                warn_once(
                    f"pictures could not be drawn during the fit ({type(error).__name__}: {error})."
                )

    def _grounds(self) -> dict[str, Grounds]:
        """By weight, what its verdict rests on beside its curves."""
        grounds = {}
        # Most weights of a param group are alike, and there may be a thousand.
        known: dict[Any, tuple[float | None, float]] = {}
        for gauge in self.gauges.values():
            targets = gauge.plan.targets
            for target, group in zip(targets, gauge.plan.groups_of(targets), strict=True):
                name = target.name
                effects = gauge.effects[name]
                alike = id(group), effects, target.matrix
                if alike not in known:
                    steps = (gauge.plan.optimizer, group, effects, target.matrix)
                    known[alike] = noise_coherence(*steps), relaxation_power(*steps)
                noise, power = known[alike]
                expectation = self.ledger.expectations.get(name)
                grounds[name] = Grounds(
                    rough=expectation is not None and bool(expectation.course["rough"]),
                    optimizer_alone=effects == Effects(),
                    balanced=balance_of(
                        self.ledger.balances.get(name),
                        gauge.entries[name],
                        power,
                        # No loss can pull at a weight whose length it does not see.
                        None if target.scale_invariant else noise,
                        in_16_bits=target.weight.dtype in (torch.bfloat16, torch.float16),
                    ),
                    held_by="RotationControl" if effects.held else "",
                )
        return grounds

    def end_table(self, layers: list[dict[str, Any]]) -> str | None:
        """The table of ``layers`` and what a person should read below it; None without any. Sharded
        over ranks, all of them must call it."""
        clamped = self.combined.counted_by_weight("clamped")
        if not layers:
            return None
        places = places_of_layers(self.trainer.loggers, self.label)
        return as_text(layers, self.rule.history, clamped, self.session, places)

    # -- over an interruption

    def state(self) -> dict[str, Any]:
        """As every callback's; rows that were taken up from a checkpoint go on before the first
        step."""
        state = super().state()
        if self.restored is None or not len(self.ledger.history):
            return state
        return {**state, "extra": {**state["extra"], **self.extra()}}

    def extra(self) -> dict[str, Any]:
        """The ledger as it will be when all that was measured is there. Changes nothing, so a
        signal handler may ask at any moment."""
        # Before the first batch of a fit that goes on, the loops are not yet where the checkpoint
        # was.
        position = self._position or self.clock.position()
        ledger = self._completed()
        state = ledger.state()
        if not self.session.closed:
            counts = self.combined.events()
            happened = ledger.new_events(counts)
            state["events"] = list(dict.fromkeys([*state["events"], *happened]))
            state["jumped"] = sorted(ledger.new_jumps(counts))
        skipped = self._skipped_before + self.session.attempts.skipped()
        return {**state, "position": position, "skipped_steps": skipped}

    def take_up(self, state: dict[str, Any]) -> None:
        """The rows of a checkpoint, before the first step: they can be seen at once, also where no
        step follows because the fit was finished."""
        extra = state.get("extra", {})
        if self.is_off or "history" not in extra:
            return
        try:
            _check_position(extra, "it")
            ledger = Ledger.from_state(extra)
        except NormDynError as error:
            warn_once(
                f"{self.name} starts a new history, because that of the checkpoint cannot be read: "
                f"{error}."
            )
            return
        self._position = extra["position"]
        self._skipped_before = extra["skipped_steps"]
        self._continued = True
        self.rule.history = History()
        self._show(ledger)
        publish_to_trainer(self.trainer, ledger.promised)

    def _count_on_from(self, position: list[int]) -> None:
        """A run that goes on has no row that only its end asked for, and counts from where it
        was."""
        known = self.ledger.lasting
        restored = self.clock.go_on_from(position)
        now = self.clock.now
        if not restored and known.last_step >= now:
            warn_once(
                f"The history of the checkpoint reaches to step {known.last_step}, and this fit "
                f"counts from step {now}, because its loops were not restored with the "
                f"weights. Rows from step {now} on are dropped."
            )
        self._show(known.going_on_at(now))

    def forget(self, name: str) -> None:
        """Another weight has taken the place of the one that was called ``name``."""
        super().forget(name)
        self.ledger = self.ledger.without(name)
        self._told = 0  # described anew to the loggers
