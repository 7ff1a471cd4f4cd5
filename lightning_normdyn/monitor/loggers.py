"""Everything that knows a logger class: what each of them can show of a run, and how it wants it.

`publishers` gives one `Publisher` per logger; a logger of an unknown class gets scalars and nothing
else. All of it is for rank zero, and for after the last collective: other ranks have no experiment,
and would wait for ever for one that fails.

Over 500 lines: whatever is published has to be said for each logger, and here one sees which of
them lacks what.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_normdyn.engine.flavours import Logger, Trainer, classes
from lightning_normdyn.engine.lightning_facts import (
    callback_metrics,
    prefix_of,
    progress_bar_metrics,
)
from lightning_normdyn.engine.messages import warn_once
from lightning_normdyn.storage import Location, join, replacing

from .histograms import Histogram
from .history import History
from .history_files import HistoryFiles
from .interactive import can_interact
from .outcome import Outcome, can_draw, facts_of, markdown
from .quantities import OVERVIEW, QUANTITIES
from .row_values import RowValues


class Publisher:
    """Scalars, which every logger takes. Subclasses add what their logger can show besides.

    Args:
        logger: the logger of the Trainer.
    """

    shows_histograms = False
    shows_pictures = False

    def needs_matplotlib(self) -> bool:
        """Whether its pictures are drawn by matplotlib."""
        return self.shows_pictures

    def __init__(self, logger: Logger) -> None:
        self.logger: Any = logger

    def row(
        self,
        values: Mapping[str, float],
        histograms: Mapping[str, Histogram],
        step: int,
    ) -> None:
        """All numbers of a logging step, in one call."""
        self.logger.log_metrics(dict(values), step=step)

    def about(
        self,
        about: Mapping[str, Any],
        label: str,
        step: int,
    ) -> None:
        """What this run consists of: the callbacks' settings and the table of targets."""

    def invitation(self) -> str:
        """What a person should read at the start of a fit about the page of this logger."""
        return ""

    def outcome(self, outcome: Outcome) -> None:
        """What came of it, at the end of a fit, and so far during it."""

    def place_of_layers(self, label: str) -> str:
        """Where a person finds all rows of the end table; empty where that is nowhere."""
        folder = self.folder()
        return "" if folder is None else f"`lightning-normdyn report {folder}`"

    def keep(self, history: History, files: HistoryFiles) -> None:
        """Write the history beside what this logger writes: at checkpoints, at the end of a fit,
        and when it is interrupted."""
        folder = self.folder()
        # A logger that writes to a server only has no files to lie beside.
        if folder is not None:
            history.save(files.place(folder, history))

    def folder(self) -> Location | None:
        """Where this logger's own files lie, a folder or a URL; None where nobody knows."""
        return None

    def alert(self, title: str, text: str) -> None:
        """Something that a person should know now."""

    def _key(self, key: str) -> str:
        """The key with the prefix that this logger puts in front of scalars."""
        prefix = prefix_of(self.logger)
        return f"{prefix}{self.logger.LOGGER_JOIN_CHAR}{key}" if prefix else key


class WandbPublisher(Publisher):
    """Weights & Biases: histograms, config, tables, charts and pictures, summary, alerts."""

    shows_histograms = True
    shows_pictures = True

    def row(
        self,
        values: Mapping[str, float],
        histograms: Mapping[str, Histogram],
        step: int,
    ) -> None:
        """Scalars and histograms share a call: each one makes a row in W&B."""
        # Imported only where there is such a logger: wandb is optional.
        import wandb

        # Counts and edges: the values themselves never left the device.
        shown = {
            key: wandb.Histogram(np_histogram=(np.array(h.counts), np.array(h.edges)))
            for key, h in histograms.items()
        }
        self.logger.log_metrics({**values, **shown}, step=step)

    def about(
        self,
        about: Mapping[str, Any],
        label: str,
        step: int,
    ) -> None:
        """Settings under ``normdyn`` in the run's config, facts about the weights as a table: a
        config of hundreds of weights would hide the settings that runs are compared by."""
        # A resumed run may have other settings, and without the flag W&B refuses to change any.
        self.logger.experiment.config.update(
            {f"normdyn{label}": {"callbacks": dict(about["callbacks"])}}, allow_val_change=True
        )
        table = _wandb_table(facts_of(about))
        self.logger.log_metrics({f"normdyn_tables/targets{label}": table}, step=step)

    def invitation(self) -> str:
        """The command that lays out a page of which the useful charts come first."""
        run = self.logger.experiment
        if getattr(run, "disabled", False):
            return ""
        # An offline run does not know its entity yet.
        place = f"{run.entity or 'ENTITY'}/{run.project or 'PROJECT'}"
        needed = ""
        if find_spec("wandb_workspaces") is None:
            needed = " (`pip install 'lightning-normdyn[workspace]'`)"
        return (
            f"lightning-normdyn: W&B's own page sorts charts by name; for one with the overview "
            f"first: `python -m lightning_normdyn workspace {place}`{needed}"
        )

    def place_of_layers(self, label: str) -> str:
        """Its own table."""
        if getattr(self.logger.experiment, "disabled", False):
            return ""
        return f"table `normdyn_tables/layers{label}` in W&B"

    def needs_matplotlib(self) -> bool:
        """Charts of plotly take the place of pictures."""
        return not can_interact()

    def outcome(self, outcome: Outcome) -> None:
        """One row with everything at the last step; the last overview in the summary."""
        shown: dict[str, Any] = {}
        if outcome.layers:
            shown[f"normdyn_tables/layers{outcome.label}"] = _wandb_table(outcome.layers)
        for name, media in self._media(outcome).items():
            shown[f"normdyn_pictures/{name}"] = media
        if outcome.is_final:
            shown |= _wandb_charts(outcome)
        self.logger.log_metrics(shown, step=outcome.step)
        run = self.logger.experiment
        # What the last logging step left there may be older than the end of the fit.
        run.summary.update({self._key(key): value for key, value in outcome.final.items()})

    def _media(self, outcome: Outcome) -> dict[str, Any]:
        """The pictures by name: interactive where plotly is installed."""
        import wandb

        media: dict[str, Any] = {}
        media |= {name: wandb.Plotly(figure) for name, figure in outcome.interactive.items()}
        if not media:
            return {name: wandb.Image(pixels) for name, pixels in outcome.pictures.items()}
        for name, pixels in outcome.still_pictures.items():
            media[name] = wandb.Image(pixels)
        return media

    def folder(self) -> Location | None:
        """Beside, and not in, the folder that is uploaded: with per_vector a history may be
        large."""
        run = self.logger.experiment
        # A disabled run's folder is a temporary one, where nobody would find the history.
        if getattr(run, "disabled", False):
            return None
        return Path(run.dir).parent

    def alert(self, title: str, text: str) -> None:
        """A W&B alert."""
        # By default alerts of one title within a minute are dropped; a second weight's would be
        # one.
        self.logger.experiment.alert(title=title, text=text, level="WARN", wait_duration=0.001)


class TensorBoardPublisher(Publisher):
    """TensorBoard: histograms, figures, and tables as text."""

    shows_histograms = True
    shows_pictures = True

    def row(
        self,
        values: Mapping[str, float],
        histograms: Mapping[str, Histogram],
        step: int,
    ) -> None:
        """Scalars in one call, then the histograms."""
        super().row(values, histograms, step)
        for key, (edges, counts) in histograms.items():
            occupied = [i for i, count in enumerate(counts) if count]
            # Geometric means, since the bins are evenly spaced on a logarithmic scale.
            middles = [(a * b) ** 0.5 for a, b in pairwise(edges)]
            # `add_histogram` would bin the values itself, and only their counts are here.
            self.logger.experiment.add_histogram_raw(
                self._key(key),
                min=edges[occupied[0]],
                max=edges[occupied[-1] + 1],
                num=sum(counts),
                sum=sum(c * m for c, m in zip(counts, middles, strict=True)),
                sum_squares=sum(c * m * m for c, m in zip(counts, middles, strict=True)),
                bucket_limits=edges[1:],
                bucket_counts=counts,
                global_step=step,
            )

    def about(
        self,
        about: Mapping[str, Any],
        label: str,
        step: int,
    ) -> None:
        """As text: TensorBoard's hyperparameters bring a metric ``hp_metric`` that nobody asked
        for."""
        lines = []
        for name, table in about["callbacks"].items():
            settings = [f"{key} = `{json.dumps(value)}`" for key, value in table.items()]
            lines.append(f"- {name}: {', '.join(settings)}")
        experiment = self.logger.experiment
        experiment.add_text(self._key(f"normdyn/callbacks{label}"), "\n".join(lines))
        experiment.add_text(self._key(f"normdyn/targets{label}"), markdown(facts_of(about)))

    def outcome(self, outcome: Outcome) -> None:
        """Figures and the table."""
        experiment = self.logger.experiment
        step = outcome.step
        for name, pixels in outcome.pictures.items():
            key = self._key(f"normdyn/{name}")
            experiment.add_image(key, pixels, global_step=step, dataformats="HWC")
        experiment.add_text(
            self._key(f"normdyn/layers{outcome.label}"), markdown(outcome.layers), global_step=step
        )

    def folder(self) -> Location | None:
        """Beside the event file."""
        return str(self.logger.log_dir)


class MLflowPublisher(Publisher):
    """MLflow: settings as parameters, everything else as artifacts under ``normdyn``."""

    shows_pictures = True

    def about(
        self,
        about: Mapping[str, Any],
        label: str,
        step: int,
    ) -> None:
        """A parameter of an MLflow run never changes; a resumed run keeps those of its start."""
        client = self.logger.experiment
        run = self.logger.run_id
        known = client.get_run(run).data.params
        settings = {}
        for name, table in about["callbacks"].items():
            for key, value in table.items():
                parameter = f"normdyn{label}/{name}/{key}"
                # One parameter with another value, and MLflow would refuse all of them.
                if parameter not in known:
                    settings[parameter] = value
        self.logger.log_hyperparams(settings)
        client.log_dict(run, dict(about), f"normdyn/about{label}.json")

    def outcome(self, outcome: Outcome) -> None:
        """Figures and the table."""
        client = self.logger.experiment
        run = self.logger.run_id
        for name, pixels in outcome.pictures.items():
            client.log_image(run, pixels, f"normdyn/{name}.png")
        client.log_dict(run, {"layers": outcome.layers}, f"normdyn/layers{outcome.label}.json")

    def keep(self, history: History, files: HistoryFiles) -> None:
        """As an artifact."""
        from tempfile import TemporaryDirectory

        client = self.logger.experiment
        run = self.logger.run_id
        there = {Path(artifact.path).name for artifact in client.list_artifacts(run, "normdyn")}
        # What a fit continues is not fetched to be compared: a run that goes on from a checkpoint
        # goes on in its newest history.
        name = files.name(f"MLflow {run}", there.__contains__, lambda name: True)
        # A folder, and not a temporary name: MLflow calls an artifact by the name of its file.
        with TemporaryDirectory() as folder:
            client.log_artifact(run, str(history.save(Path(folder) / name)), "normdyn")


class CSVPublisher(Publisher):
    """CSV: pictures and the history beside ``metrics.csv``."""

    shows_pictures = True

    def outcome(self, outcome: Outcome) -> None:
        """PNG files."""
        for name, pixels in outcome.pictures.items():
            _write_png(join(self.logger.log_dir, f"{name}.png"), pixels)

    def folder(self) -> Location | None:
        """Beside ``metrics.csv``."""
        return str(self.logger.log_dir)


# The first that fits counts, so that a subclass of a logger gets what its base class can show.
# Lightning's own loggers by name, since there may be two classes of one name; others by class.
_PUBLISHERS: tuple[tuple[str | type[Any], type[Publisher]], ...] = (
    ("WandbLogger", WandbPublisher),
    ("TensorBoardLogger", TensorBoardPublisher),
    ("MLFlowLogger", MLflowPublisher),
    ("CSVLogger", CSVPublisher),
)


def publishers(loggers: Iterable[Logger]) -> list[Publisher]:
    """One publisher per logger."""
    return [_publisher_of(logger)(logger) for logger in loggers]


def _publisher_of(logger: Logger) -> type[Publisher]:
    for known, publisher in _PUBLISHERS:
        kinds = classes("loggers", known) if isinstance(known, str) else known
        if isinstance(logger, kinds):
            return publisher
    # A logger that nobody here knows takes scalars, as every logger does.
    return Publisher


def publish_row(
    loggers: Iterable[Logger],
    values: Mapping[str, float],
    histograms: Mapping[str, Histogram],
    step: int,
) -> None:
    """One call per logger and logging step."""
    for publisher in publishers(loggers):
        publisher.row(values, histograms, step)


def publish_to_trainer(trainer: Trainer, row: Mapping[str, float]) -> None:
    """Give other callbacks (EarlyStopping, ModelCheckpoint) and the progress bar the numbers that
    they may use.

    Not through ``LightningModule.log``: that method belongs to the user, who may have overridden
    it, and a name logged there by a callback and by the user is an error or a mix of both.
    Lightning's own tables of the current values take ours beside the user's, and the prefix keeps
    the names apart. The tables are written without being asked for: asking computes the user's
    metrics.

    Args:
        trainer: of the fit; call it on every rank, since every rank's callbacks decide by these
            values.
        row: values by log key.
    """
    # Not every row has every number: what was told before it still stands.
    for key, value in told_to_trainer(row).items():
        quantity = QUANTITIES[key.removeprefix(f"{OVERVIEW}/")]
        if quantity.callback_metric:
            # On the host: EarlyStopping and ModelCheckpoint would wait for any other device.
            metric = torch.tensor(value, dtype=torch.float32, device="cpu")
            callback_metrics(trainer)[key] = metric
        if quantity.progress_bar is not None:
            shown_as, factor = quantity.progress_bar
            progress_bar_metrics(trainer)[shown_as] = factor * value


def told_to_trainer(row: Mapping[str, float]) -> dict[str, float]:
    """What of a row `publish_to_trainer` publishes."""
    # Of a row of the monitor its overview alone: every key of the others would be looked for among
    # those of all weights.
    values = row.overview if isinstance(row, RowValues) else row
    told = {}
    for quantity in QUANTITIES.values():
        if quantity.callback_metric or quantity.progress_bar is not None:
            key = f"{OVERVIEW}/{quantity.name}"
            if key in values:
                told[key] = values[key]
    return told


def publish_about(
    loggers: Iterable[Logger], about: Mapping[str, Any], label: str, step: int
) -> None:
    """What the run consists of.

    Args:
        loggers: the Trainer's.
        about: ``"callbacks"``: settings by callback; ``"targets"``: facts by weight. Plain JSON.
        label: as in `Outcome`.
        step: the x axis.
    """
    _tell(loggers, "the callbacks' settings", lambda publisher: publisher.about(about, label, step))


def invitations(loggers: Iterable[Logger]) -> list[str]:
    """What a person should read at the start of a fit about the pages of these loggers."""
    texts: list[str] = []
    _tell(loggers, "a glance", lambda publisher: texts.append(publisher.invitation()))
    return [text for text in texts if text]


def publish_history(
    loggers: Iterable[Logger],
    history: History,
    files: HistoryFiles,
) -> None:
    """Write the history beside each logger's own files; what stood there of this fit is replaced.

    Args:
        loggers: the Trainer's.
        history: all rows so far; nothing is written of an empty one.
        files: of this fit, the same at every call.
    """
    # An empty file would take the name that the first fit with rows should have.
    if len(history):
        _tell(loggers, "the history", lambda publisher: publisher.keep(history, files))


def places_of_layers(loggers: Iterable[Logger], label: str) -> list[str]:
    """Where a person finds all rows of the end table, on rank zero."""
    places: list[str] = []
    _tell(loggers, "a glance", lambda publisher: places.append(publisher.place_of_layers(label)))
    return [place for place in places if place]


def can_show_outcome(loggers: Iterable[Logger]) -> bool:
    """Whether a logger shows the table of layers or pictures."""
    return any(publisher.shows_pictures for publisher in publishers(loggers))


def publish_outcome(loggers: Iterable[Logger], outcome: Outcome) -> None:
    """What came of the fit, or has come of it so far; the history itself is a matter of
    `publish_history`."""
    if not len(outcome.history):
        return
    # Only who would get pictures must hear why there are none, and that once.
    lacking = any(publisher.needs_matplotlib() for publisher in publishers(loggers))
    if outcome.is_final and lacking and not can_draw():
        warn_once(
            "matplotlib is not installed: the loggers get no pictures, only numbers, tables and "
            "charts. `pip install matplotlib`"
        )
    _tell(loggers, "pictures and tables", lambda publisher: publisher.outcome(outcome))


def publish_alert(
    loggers: Iterable[Logger],
    title: str,
    text: str,
) -> None:
    """Tell a person now, where a logger can."""
    # Only W&B has alerts; the others' method does nothing.
    _tell(loggers, "an alert", lambda publisher: publisher.alert(title, text))


def can_show_histograms(loggers: Iterable[Logger]) -> bool:
    """Whether binning is worth its cost; the same on all ranks."""
    # By the loggers' classes: only rank zero has an experiment, and all ranks must decide alike.
    return any(publisher.shows_histograms for publisher in publishers(loggers))


def _tell(
    loggers: Iterable[Logger],
    what: str,
    tell: Callable[[Publisher], None],
) -> None:
    """Call ``tell`` with the publisher of each logger. A picture that cannot be drawn or sent is no
    reason to end a training run: say so and go on."""
    for publisher in publishers(loggers):
        try:
            tell(publisher)
        # Ctrl-C and an exit are no Exception: they end the run, as the person wants.
        except Exception as error:
            name = type(publisher.logger).__name__
            warn_once(
                f"{name} did not get {what} ({type(error).__name__}: {error}). The training is not "
                "affected."
            )


def _wandb_charts(outcome: Outcome) -> dict[str, Any]:
    """A chart of W&B's own for each quantity, with all layers, by key."""
    import wandb

    charts = {}
    for quantity in outcome.shown_in("chart"):
        curves = outcome.chart(quantity)
        charts[f"normdyn_charts/{quantity}{outcome.label}"] = wandb.plot.line_series(
            [steps.tolist() for steps, _ in curves.values()],
            [values.tolist() for _, values in curves.values()],
            keys=list(curves),
            title=f"{quantity} of all layers",
            xname="step",
        )
    return charts


def _wandb_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows with the same keys as a table of W&B."""
    import wandb

    return wandb.Table(columns=[*rows[0]], data=[[*row.values()] for row in rows])


def _write_png(path: Location, pixels: Any) -> None:
    from matplotlib.image import imsave

    with replacing(path) as file:
        # Without the format matplotlib follows a setting of the person's, which may say PDF.
        imsave(file, pixels, format="png")
