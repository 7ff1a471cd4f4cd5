"""The command line: ``lightning-normdyn demo | inspect | forecast | report | workspace``, or
``python -m lightning_normdyn`` where scripts are not on the path.

Results go to stdout. Progress goes to stderr, and only to a person: it is silent in a pipe or a
log.
Exit codes: 0 done, 1 the work failed, 2 usage.

Over 500 lines, most of them help texts and arguments: they stand here, and not with the work that a
command does, because that brings torch along.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_normdyn import __version__
from lightning_normdyn.errors import NormDynError
from lightning_normdyn.storage import is_remote

if TYPE_CHECKING:
    from torch import Tensor, nn

_EXAMPLES = """examples:
  lightning-normdyn demo
  lightning-normdyn inspect my_project.nets:LitResNet --input-shape 3,32,32 --set depth=18
  lightning-normdyn forecast my_project.nets:LitResNet --steps 20000 --input-shape 3,32,32
  lightning-normdyn report runs/decay/history.npz lightning_logs/version_0 -o report.html
  lightning-normdyn workspace my-team/my-project
"""

_DEMO = """Train a small residual network on scikit-learn's digits twice, with weight
decay and with AdaptiveWeightShrink, and write pictures of both and a report.
Takes about a minute on two cores; needs matplotlib and scikit-learn
(pip install 'lightning-normdyn[examples]').

examples:
  lightning-normdyn demo
  lightning-normdyn demo --preset tiny --out runs/demo
"""

_INSPECT = """Say of every weight whether the loss is blind to its length, per filter, group
or layer, and why. The model is built, run once in training mode on random
inputs, and thrown away; its code is executed.

examples:
  lightning-normdyn inspect my_project.nets:LitResNet --input-shape 3,32,32 --set depth=18
  lightning-normdyn inspect examples/digits_resnet.py:ResidualDigits --input-shape 1,8,8
  lightning-normdyn inspect my_project.text:CharGPT --input-shape 64 --integers 256
"""

_FORECAST = """Say of every param group how long its weights will remember, how far
they will turn in a step, and what its schedule will do to their norms, before
anything is trained. The LightningModule is built, and its configure_optimizers
is called on a Trainer that knows the number of steps; its code is executed.
With --input-shape, or an example_input_array, the norms of scale-invariant
weights are followed, too.

examples:
  lightning-normdyn forecast my_project.nets:LitResNet --steps 20000 --input-shape 3,32,32
  lightning-normdyn forecast my_project.nets:LitResNet --steps 20000 --steps-per-epoch 391
"""

_REPORT = """Write one self-contained HTML file about one or several runs: what to look at
first, charts to hover over, zoom and pick layers in, comparisons, a sortable
table of all layers. The charts need plotly (pip install
'lightning-normdyn[report]'); without it, and with --still, they are pictures.

RUN is a history file (.npz), or a folder: the folder of a logger, where it lies
beside the log, or one with any number of runs any number of levels below it.
LABEL=RUN names it.

With --compare, print and write what every other run does against the first:
how far its weights turn, and how much its decay takes of them, at equal
fractions of both; and the sizes of weights and steps by param group.

examples:
  lightning-normdyn report runs/decay/history.npz -o report.html
  lightning-normdyn report decay=runs/decay aws=runs/aws -o report.html
  lightning-normdyn report wandb/offline-run-20260101_120000-abcdefgh
  lightning-normdyn report lightning_logs
  lightning-normdyn report narrow=runs/width64 wide=runs/width512 --compare
"""

_WORKSPACE = """Lay out the W&B page of a project: the overview first, then one chart per quantity
with all layers, also of runs to come. W&B's own page sorts hundreds of charts by
name. Needs a login (wandb login) and wandb-workspaces
(pip install 'lightning-normdyn[workspace]'); prints where the page is.

examples:
  lightning-normdyn workspace my-team/my-project
  lightning-normdyn workspace my-team/my-project --name "AWS against decay"
  lightning-normdyn workspace my-team/my-project --layers runs/decay/history.npz
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: what stands behind ``lightning-normdyn``; those of this process if
            None.

    Returns:
        the exit code: 0 done, 1 the work failed. Wrong usage leaves by ``SystemExit(2)``.

    Example:
        >>> main(["report", "nowhere.npz"])
        1
    """
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has seen enough (`... | head`). Python must not complain about it at exit
        # either, when it flushes what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # SystemExit: the model's code may call sys.exit, which must not end this without a word.
    except (Exception, SystemExit) as error:
        if options.traceback:
            raise
        print(f"error: {_in_words(error)}", file=sys.stderr)
        return 1


def _in_words(error: BaseException) -> str:
    """What a person should read of an error."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"`{error.filename}`: {error.strerror}"
    if isinstance(error, (NormDynError, OSError)):
        return str(error)
    # Nobody foresaw it: its text alone may tell nothing ('missing' of a KeyError).
    return f"{error} ({type(error).__name__}; run again with --traceback to see where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-normdyn",
        description="See the effective learning rate of a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lightning-normdyn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(
        name: str, run: Callable[[argparse.Namespace], None], summary: str, description: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--traceback", action="store_true", help="show where an error comes from"
        )
        command.set_defaults(command=run)
        return command

    demo = add_command("demo", _demo, "train a small network twice and look at it", _DEMO)
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs") / "demo",
        help="folder to write to (default: runs/demo)",
    )
    demo.add_argument(
        "--preset",
        choices=("tiny", "default"),
        default="default",
        help="tiny: a few seconds, too short to see much",
    )

    inspect = add_command("inspect", _inspect, "which weights are scale-invariant", _INSPECT)
    _add_model(inspect)

    forecast = add_command("forecast", _forecast, "what a run will do to its norms", _FORECAST)
    forecast.add_argument(
        "--steps",
        metavar="N",
        type=_positive,
        required=True,
        help="optimizer steps of the run",
    )
    forecast.add_argument(
        "--steps-per-epoch",
        metavar="N",
        type=_positive,
        help="optimizer steps of an epoch, for schedulers that go by epochs",
    )
    _add_model(forecast)

    report = add_command("report", _report, "one HTML file about runs", _REPORT)
    report.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="history file, or a folder of runs; LABEL=RUN names it",
    )
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report.html"),
        help="file to write (default: report.html)",
    )
    report.add_argument(
        "--still",
        action="store_true",
        help="pictures in place of interactive charts: a smaller page that needs no JavaScript",
    )
    report.add_argument(
        "--compare",
        action="store_true",
        help="hold the other runs against the first, weight by weight",
    )

    workspace = add_command(
        "workspace", _workspace, "lay out the W&B page of a project", _WORKSPACE
    )
    workspace.add_argument(
        "project", metavar="ENTITY/PROJECT", type=_project, help="of W&B; the runs are in it"
    )
    workspace.add_argument(
        "--name",
        default="Weight dynamics",
        help="what to call the page (default: Weight dynamics)",
    )
    workspace.add_argument(
        "--layers",
        metavar="RUN",
        help="history file or folder of a run: lists its layers in the order of the network",
    )
    return parser


def _add_model(command: argparse.ArgumentParser) -> None:
    """How a person names a model and what it is called with."""
    command.add_argument(
        "model",
        metavar="MODULE:CLASS",
        type=_model_name,
        help="importable module, or file.py, and the class of the model in it",
    )
    command.add_argument(
        "--input-shape",
        metavar="N,N,...",
        type=_shape,
        action="append",
        help="of one example, without the batch; once per input of the model",
    )
    command.add_argument(
        "--batch-size",
        metavar="N",
        type=_positive,
        default=8,
        help="examples in the batch (default: 8)",
    )
    command.add_argument(
        "--integers",
        metavar="HIGH",
        type=_positive,
        help="inputs are whole numbers below HIGH (token ids), not normal numbers",
    )
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="argument of the class; once per argument",
    )


def _own(name: str) -> Any:
    """A module of this package, imported only when a command needs it: torch comes with it, and
    would make ``--help`` and every usage error wait for seconds."""
    return importlib.import_module(f"lightning_normdyn.{name}")


# --------------------------------------------------------------------------------------------- demo


# What the demonstration imports beside torch and Lightning, and what provides it.
_NEEDED_BY_DEMO = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}


def _demo(options: argparse.Namespace) -> None:
    # Beside the package in the source tree, within it in an installed one.
    package = Path(__file__).parent
    places = [folder / "examples" / "digits_resnet.py" for folder in (package.parent, package)]
    example = next(filter(Path.is_file, places), None)
    if example is None:
        raise NormDynError(
            f"the demonstration, digits_resnet.py, is neither in {places[0].parent} nor in "
            f"{places[1].parent}. Install the package again: `pip install --force-reinstall "
            f"'lightning-normdyn[examples]'`."
        )
    missing = [name for key, name in _NEEDED_BY_DEMO.items() if not importlib.util.find_spec(key)]
    if missing:
        raise NormDynError(
            f"the demonstration needs {' and '.join(missing)}. `pip install "
            f"'lightning-normdyn[examples]'`."
        )
    command = [sys.executable, example, "--demo", "--preset", options.preset]
    command += ["--out", options.out, "--logger", "csv"]
    # A person sees the progress of the training; a log gets its last words if it fails.
    watched = sys.stderr.isatty()
    # In a process of its own: the example is a script, and may end by itself.
    done = subprocess.run(
        command, capture_output=not watched, text=True, errors="replace", check=False
    )
    if done.returncode:
        reason = ""
        lines = (done.stderr or "").strip().splitlines()
        if lines:
            reason = f": {lines[-1].removeprefix('error: ')}"
        raise NormDynError(f"the demonstration failed{reason}.")

    folders = {"weight decay": options.out / "decay", "AdaptiveWeightShrink": options.out / "aws"}
    report = _write_report(folders, options.out / "report.html")
    for path in (*sorted(options.out.glob("*.png")), report):
        print(path)


# ------------------------------------------------------------------------------------------ inspect


def _inspect(options: argparse.Namespace) -> None:
    # The last of several values for the same key counts.
    module = _build(options.model, dict(options.set))
    inputs = _inputs(module, options)
    verdicts = _verdicts(module, inputs, options.model)
    # A person gets what fits the terminal, a pipe one line per weight.
    width = None
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
    print(_own("invariance.verdict").targets_table(verdicts, width))


def _verdicts(module: nn.Module, inputs: tuple[Any, ...], model: str) -> Any:
    """What is known of each weight."""
    _say("reading the graph of one forward pass and testing the outputs")
    try:
        return _own("invariance.checks").inspect_module(module, *inputs)
    except NormDynError:
        raise
    except (Exception, SystemExit) as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in inputs if hasattr(each, "shape"))
        raise NormDynError(
            f"`{model}` does not run on inputs of shape {shapes}: {_first_line(error)}. "
            f"Check --input-shape."
        ) from error


def _build(name: str, settings: Mapping[str, Any]) -> nn.Module:
    from torch import nn

    source, _, attribute = name.rpartition(":")
    _say(f"importing {source}")
    with _importing_from_here():
        try:
            imported = _import(source)
        # A script that is no module may end itself, or parse its command line and end.
        except (Exception, SystemExit) as error:
            raise NormDynError(f"`{source}` cannot be imported: {_first_line(error)}.") from error
        if not hasattr(imported, attribute):
            raise NormDynError(f"`{source}` has no `{attribute}`.")
        try:
            module = getattr(imported, attribute)(**settings)
        except (Exception, SystemExit) as error:
            raise NormDynError(
                f"`{attribute}` cannot be built: {_first_line(error)}. Give its arguments with "
                f"--set KEY=VALUE."
            ) from error
    if not isinstance(module, nn.Module):
        raise NormDynError(
            f"`{name}` gives {type(module).__name__}, and a torch.nn.Module or LightningModule is "
            f"needed."
        )
    return module


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    # So that it finds its neighbours, as when it is run.
    sys.path.insert(0, str(path.parent))
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look there.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Find modules in the working folder too, whatever started this process."""
    before = sys.path.copy()
    sys.path.insert(0, os.getcwd())
    try:
        yield
    # As a whole: the imported code may have changed it as well.
    finally:
        sys.path[:] = before


def _inputs(module: nn.Module, options: argparse.Namespace) -> tuple[Any, ...]:
    from torch import Tensor

    if options.input_shape:
        shapes = [(options.batch_size, *shape) for shape in options.input_shape]
        return tuple(_random_input(shape, options.integers) for shape in shapes)
    example = getattr(module, "example_input_array", None)
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, tuple):
        return example
    raise NormDynError(
        f"`{options.model}` has no `example_input_array` of tensors; give --input-shape, e.g. "
        f"--input-shape 3,32,32."
    )


def _random_input(shape: tuple[int, ...], below: int | None) -> Tensor:
    import torch

    # A seed: the same model gets the same verdicts.
    generator = torch.Generator().manual_seed(0)
    if below is None:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return torch.randint(below, shape, generator=generator, dtype=torch.long, device="cpu")


# ----------------------------------------------------------------------------------------- forecast


def _forecast(options: argparse.Namespace) -> None:
    module = _build(options.model, dict(options.set))
    verdicts = []
    # Without inputs, what follows from the schedule can still be told.
    if options.input_shape or getattr(module, "example_input_array", None) is not None:
        verdicts = _verdicts(module, _inputs(module, options), options.model)
    _say("stepping the schedulers ahead")
    try:
        text = _own("monitor.module_forecast").forecast_module(
            module, verdicts, options.steps, steps_per_epoch=options.steps_per_epoch
        )
    except NormDynError:
        raise
    except (Exception, SystemExit) as error:
        raise NormDynError(
            f"the optimizers of `{options.model}` cannot be made without training: "
            f"{_first_line(error)}."
        ) from error
    print(text, end="")


# ------------------------------------------------------------------------------------------- report


def _report(options: argparse.Namespace) -> None:
    if options.output.is_dir():
        raise NormDynError(
            f"`{options.output}` is a folder; name the file to write with -o, e.g. -o "
            f"{options.output / 'report.html'}."
        )
    runs_in = _own("monitor.report.runs").runs_in
    named = []
    for label, path in map(_named_run, options.runs):
        named += [(label, str(place)) for place in runs_in(path)]
    output = os.path.realpath(options.output)
    if any(output == os.path.realpath(path) for _, path in named):
        raise NormDynError(f"`{options.output}` is one of the runs; name another file with -o.")
    places = dict(_distinct(named))
    if options.compare:
        _compare(places, options.output)
    else:
        print(_write_report(places, options.output, still=options.still))


def _compare(places: Mapping[str, str | Path], output: Path) -> None:
    """Print and write what every other run does against the first."""
    ratios = _own("monitor.report.ratios")
    runs = _loaded(places)
    compared = ratios.compared_runs(runs)
    page = ratios.write_comparison(compared, runs, output)
    # A person gets what fits the terminal, a pipe one line per weight.
    width = None if sys.stdout.isatty() else sys.maxsize
    print(ratios.comparison_text(compared, runs, width))
    print(page)


def _loaded(places: Mapping[str, str | Path]) -> dict[str, Any]:
    """The histories of runs, by their labels."""
    runs = {}
    for label, path in places.items():
        _say(f"reading {path}")
        runs[label] = _own("monitor.report.runs").load_run(path)
    return runs


def _write_report(places: Mapping[str, str | Path], output: Path, *, still: bool = False) -> Path:
    """One report of the runs in these places, by their labels."""
    page = _own("monitor.report.page")
    runs = _loaded(places)
    report: Path = page.write_report(runs, output, _say, still=still)
    # A result, and no progress: also a log should say why its page is not what was expected.
    if not still and not page.can_interact():
        print(f"note: {page.NOT_INSTALLED}", file=sys.stderr)
    return report


def _named_run(text: str) -> tuple[str, str]:
    """Label and place of a run; the label is empty where none was given."""
    label, equals, path = text.partition("=")
    # An equals sign may belong to a URL, or to a path (`lr=0.1/history.npz`).
    if not equals or not label or is_remote(text) or Path(text).exists():
        return "", text
    return label, path


# Folders that loggers make: they say nothing of a run by themselves.
_GENERIC = re.compile(r"version_\d+|lightning_logs|checkpoints")


def _distinct(named: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Labels for runs: as given, else as much of the end of the path as tells them apart."""
    parts = [_telling_parts(path) for _, path in named]
    # A root that holds nothing else keeps what it has.
    names = [tuple(part for part in own if not _GENERIC.fullmatch(part)) or own for own in parts]
    used: Counter[str] = Counter()
    for (label, path), own, name in zip(named, parts, names, strict=True):
        others = [other for other in names if other != name]
        length = 1
        while length < len(name) and any(other[-length:] == name[-length:] for other in others):
            length += 1
        if not label:
            label = "/".join(name[-length:])
            # Runs of one folder differ in what the logger calls them.
            if names.count(name) > 1 and own[-1] != name[-1]:
                label += f" ({own[-1].replace('_', ' ')})"
        used[label] += 1
        yield (label if used[label] == 1 else f"{label} ({used[label]})"), path


def _telling_parts(path: str) -> tuple[str, ...]:
    """The parts of a path that may name a run: not the ``history.npz`` that all of them end in."""
    # Path.resolve() stumbles over a link to itself.
    place = Path(path if is_remote(path) else os.path.realpath(path))
    if place.suffix == ".npz":
        place = place.with_suffix("")
    parts = place.parts
    if len(parts) > 2 and parts[-1] == "history":
        return parts[:-1]
    return parts


# ---------------------------------------------------------------------------------------- workspace


def _workspace(options: argparse.Namespace) -> None:
    entity, project = options.project
    layers: list[str] = []
    if options.layers is not None:
        history = _own("monitor.report.runs").load_run(options.layers)
        layers = list(_own("monitor.curves").notes_on_layers(history))
    workspace = _own("monitor.workspace").wandb_workspace(
        entity, project, name=options.name, layers=layers
    )
    _say("sending it to W&B")
    try:
        workspace.save()
    # W&B's client raises what its network and its server say, under a dozen names.
    except Exception as error:
        raise NormDynError(
            f"W&B did not take the workspace for `{entity}/{project}`: {_first_line(error)}. Log "
            f"in with `wandb login`, and check the names."
        ) from error
    print(workspace.url)


# -------------------------------------------------------------------------------------------- words


def _say(text: str) -> None:
    # A log or a pipe has no use for progress.
    if sys.stderr.isatty():
        print(f"{text} ...", file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    kind = type(error).__name__
    lines = str(error).strip().splitlines()
    return f"{kind}: {lines[0].rstrip('.')}" if lines else kind


def _model_name(text: str) -> str:
    source, _, attribute = text.rpartition(":")
    if not source or not attribute.isidentifier():
        raise argparse.ArgumentTypeError(f"MODULE:CLASS is needed, got {text!r}")
    return text


def _project(text: str) -> tuple[str, str]:
    entity, slash, project = text.partition("/")
    if not (entity and slash and project) or "/" in project:
        raise argparse.ArgumentTypeError(f"ENTITY/PROJECT is needed, got {text!r}")
    return entity, project


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_positive(size) for size in text.split(","))


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"whole numbers above 0 are needed, got {text!r}")
    return value


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"KEY=VALUE is needed, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        # A word, e.g. --set norm=batch.
        return key, value


if __name__ == "__main__":
    sys.exit(main())
