"""What the examples share around their models: flags, callbacks behind ``--method``, Trainer, and
what they leave and print."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from cifar10 import Cifar10Error
from data_modules import Cifar10, Digits, TensorDataModule
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_normdyn.errors import NormDynError

METHODS = {
    "none": "no weight decay",
    "decay": "the optimizer's own weight decay",
    "aws": "AdaptiveWeightShrink in place of the decay",
    "wrs": "WeightRescaling in place of the decay",
    "projection": "RadialProjection (SGDP, AdamP) with its decoupled decay",
}
PRESETS = ("tiny", "default", "paper")
# For `--optimizer adamw` of the image examples, whatever the preset: SGD's learning rate is far too
# large for it, and a decay that acts has to be of the order of 1 / (lr * steps). alpha =
# weight_decay / length, which settles near 1.
ADAMW = {"lr": 1e-3, "weight_decay": 1.0, "alpha": 1.0}
EXTRAS = {
    "sklearn": "scikit-learn",
    "matplotlib": "matplotlib",
    "wandb": "wandb",
    "jsonargparse": "jsonargparse",
}


class ExampleError(ValueError):
    """Something that the person who started the example can put right; told without a traceback."""


# -------------------------------------------------------------------------------------------- flags


def positive_int(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text}")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0 and finite, got {text}")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or above and finite, got {text}")
    return value


def fractions(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(",") if part)
    if not all(0 < value < 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"must be fractions between 0 and 1 such as 0.3,0.6,0.8, got {text}"
        )
    return values


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that only say that nothing was given."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


def parser(
    name: str, description: str, methods: Mapping[str, str] = METHODS
) -> argparse.ArgumentParser:
    """Give the flags that every example has; an example adds its own and then calls :func:`parse`.

    Args:
        name: Of the example, as it appears in the output folder and in W&B.
        description: Its first docstring line.
        methods: What ``--method`` may be, and what it means.
    """
    p = argparse.ArgumentParser(
        prog=f"{name}.py", description=description, formatter_class=_Formatter
    )
    p.set_defaults(example=name, methods=methods)
    p.add_argument(
        "--method",
        choices=methods,
        default="aws",
        help="; ".join(f"{key}: {text}" for key, text in methods.items()),
    )
    p.add_argument(
        "--preset",
        choices=PRESETS,
        default="default",
        help="tiny: seconds on two cores; paper: the paper's setting, for a GPU",
    )
    training = p.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, help="passes through the training set")
    training.add_argument(
        "--max-steps", type=int, default=-1, help="stop after so many optimizer steps; -1: no limit"
    )
    training.add_argument(
        "--batch-size", type=positive_int, help="examples per optimizer step and device"
    )
    training.add_argument("--lr", type=positive, help="learning rate")
    training.add_argument(
        "--weight-decay", type=not_negative, help="of the optimizer; with --method none it is 0"
    )
    training.add_argument("--alpha", type=positive, help="of AdaptiveWeightShrink")
    training.add_argument(
        "--every-n-steps",
        type=positive_int,
        help="of WeightRescaling: optimizer steps from one rescaling to the next",
    )
    training.add_argument(
        "--seed", type=int, default=0, help="of initialization, order and augmentation"
    )
    place = p.add_argument_group("output and machine")
    place.add_argument(
        "--out",
        type=Path,
        default=argparse.SUPPRESS,
        help="folder for history, pictures and logs (default: runs/EXAMPLE/METHOD)",
    )
    place.add_argument(
        "--logger",
        choices=("wandb", "csv", "none"),
        default="wandb",
        help="W&B is offline unless you are logged in",
    )
    place.add_argument(
        "--no-wandb",
        dest="logger",
        action="store_const",
        const="csv",
        default=argparse.SUPPRESS,
        help="same as --logger csv",
    )
    place.add_argument(
        "--log-every", type=positive_int, help="steps from one measurement to the next"
    )
    place.add_argument("--accelerator", default="auto", help="cpu, gpu, ...")
    place.add_argument("--devices", type=positive_int, default=1, help="how many")
    place.add_argument(
        "--strategy", default="auto", help="for example ddp, with --devices 2 --accelerator cpu"
    )
    place.add_argument("--precision", default="32-true", help="for example bf16-mixed")
    return p


def parse(
    p: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], argv: Sequence[str] | None
) -> argparse.Namespace:
    """Read the flags; what is not given comes from the preset, and what the preset leaves open from
    the preset "default"."""
    p.set_defaults(**presets["default"])
    first = argparse.ArgumentParser(
        add_help=False
    )  # only looks, before any help is shown; what is wrong is told by `p`
    first.add_argument("--preset", default="default")
    first.add_argument("--optimizer")
    asked = first.parse_known_args(argv)[0]
    p.set_defaults(**presets.get(asked.preset, {}))
    if asked.optimizer == "adamw":
        p.set_defaults(**ADAMW)
    args = p.parse_args(argv)
    if args.method == "none":
        args.weight_decay = 0.0
    if "out" not in args:
        args.out = Path("runs") / args.example / args.method
    return args


# ---------------------------------------------------------------------------------------- callbacks


def build_callbacks(
    method: str,
    *,
    alpha: float,
    every_n_steps: int,
    log_every: int | None = None,
    params: str | list[str] = "auto",
    per_vector: bool = False,
) -> list[L.Callback]:
    """Build the callbacks of a method, and the monitor that measures what it does.

    Args:
        method: A key of :data:`METHODS`.
        alpha: Of AdaptiveWeightShrink.
        every_n_steps: Of WeightRescaling, in optimizer steps.
        log_every: Logging steps between two rows of the monitor; None: the Trainer's
            ``log_every_n_steps``.
        params: Which weights the method acts on; the monitor always watches all.
        per_vector: Whether the monitor also keeps single filters.
    """
    from lightning_normdyn import (
        AdaptiveWeightShrink,
        NormDynamicsMonitor,
        RadialProjection,
        WeightRescaling,
    )

    if method == "aws":
        acting: list[L.Callback] = [AdaptiveWeightShrink(alpha, params=params)]
    elif method == "wrs":
        acting = [WeightRescaling(every_n_steps, params=params)]
    elif method == "projection":
        acting = [RadialProjection(params=params)]
    elif method in ("none", "decay"):
        acting = []
    else:
        raise ExampleError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
    return [*acting, NormDynamicsMonitor(log_every, per_vector=per_vector)]


# --------------------------------------------------------------------------------------------- data


def add_image_flags(p: argparse.ArgumentParser) -> None:
    """Add the flags of the examples that classify images: those of the data, and of
    :class:`ImageClassifier`."""
    p.add_argument("--width", type=positive_int, help="channels of the first stage")
    p.add_argument(
        "--optimizer",
        choices=("sgd", "adamw"),
        default="sgd",
        help="adamw means "
        + " ".join(f"--{key.replace('_', '-')} {value:g}" for key, value in ADAMW.items())
        + " unless given",
    )
    p.add_argument(
        "--drops",
        type=fractions,
        metavar="0.6,0.85",
        help="divide the learning rate by 10 at these fractions of the training",
    )
    p.add_argument(
        "--cifar",
        type=Path,
        help="CIFAR-10: cifar-10-python.tar.gz or its folder; without it, scikit-learn's digits",
    )
    p.add_argument(
        "--resolution", type=int, choices=(8, 16, 32), help="edge of the images in pixels"
    )
    p.add_argument(
        "--train-images", type=positive_int, help="use only the first so many training images"
    )


def image_data(args: argparse.Namespace) -> TensorDataModule:
    """Give CIFAR-10 if the person has it, else digits, and say so."""
    if args.cifar is not None:
        return Cifar10(args.cifar, args.batch_size, args.resolution, args.train_images)
    say(
        "No --cifar PATH was given: this run uses scikit-learn's digits, enlarged, instead of "
        "CIFAR-10."
    )
    return Digits(args.batch_size, args.resolution, args.train_images)


# ----------------------------------------------------------------------------------------- training


class Run(NamedTuple):
    """A finished run: the monitor's history, the Trainer, and where its files lie."""

    history: Any
    trainer: L.Trainer
    out: Path


@rank_zero_only
def say(*words: object) -> None:
    print(*words, flush=True)


def build_logger(args: argparse.Namespace) -> Logger | bool:
    """Give the logger asked for; W&B works offline unless the person is logged in."""
    if args.logger == "none":
        return False
    if args.logger == "wandb":
        try:
            import wandb
        except ImportError:
            say("W&B is not installed (pip install wandb): logging to CSV.")
        else:
            online = _wandb_credentials()
            settings = wandb.Settings(console="off", silent=not online)
            return WandbLogger(
                project="lightning-normdyn",
                name=f"{args.example}-{args.method}",
                # W&B writes from a process of its own, which keeps the folder it was started in
                save_dir=args.out.absolute(),
                mode="online" if online else "offline",
                settings=settings,
            )
    return CSVLogger(args.out, name="csv", version="")


def _wandb_credentials() -> bool:
    """Whether the person is logged in to W&B; never asks and never uses the network."""
    import os

    import wandb

    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"] == "online"
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # W&B before it could be told not to ask
        return bool(wandb.api.api_key)


def build_trainer(
    args: argparse.Namespace, callbacks: Sequence[L.Callback], **extra: Any
) -> L.Trainer:
    # Data held in memory need no worker processes, and a short run has few batches: both hints are
    # beside the point here.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings(
        "ignore", message=".*The number of training batches.*is smaller than the logging interval.*"
    )
    settings: dict[str, Any] = {
        "max_epochs": args.epochs,
        "max_steps": args.max_steps,
        "log_every_n_steps": args.log_every,
        "accelerator": args.accelerator,
        "devices": args.devices,
        "strategy": args.strategy,
        "precision": args.precision,
        "logger": build_logger(args),
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": args.out,
    }
    try:
        return L.Trainer(**{**settings, **extra}, callbacks=list(callbacks))
    except (
        ValueError,
        MisconfigurationException,
    ) as error:  # an unknown accelerator, precision or strategy, or more devices than there are
        raise ExampleError(f"the Trainer does not take these flags: {error}") from error


def fit(
    module: L.LightningModule,
    data: TensorDataModule,
    args: argparse.Namespace,
    callbacks: Sequence[L.Callback],
    **extra: Any,
) -> Run:
    """Train, then leave history and pictures in ``args.out`` and print where everything lies.

    Args:
        module: The model.
        data: Its data.
        args: The flags.
        callbacks: As :func:`build_callbacks` gives them: the monitor is the last.
        extra: Further arguments of the Trainer, or other values for those that the flags set.
    """
    say(f"\n=== {args.example}: {args.method} ({args.methods[args.method]})")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExampleError(
            f"--out {args.out} cannot be made a folder: {error.strerror}."
        ) from error
    data.setup()  # unreadable data are told before a Trainer or a W&B run exists
    trainer = build_trainer(args, callbacks, **extra)
    stopped: SystemExit | None = None
    try:
        trainer.fit(module, data)
    except (
        SystemExit
    ) as stop:  # how Lightning ends after Ctrl-C; what was measured until then is worth keeping
        if not trainer.interrupted:
            raise
        if not len(callbacks[-1].history):  # type: ignore[attr-defined]  # NormDynamicsMonitor
            raise
        stopped = stop
        say(f"\nInterrupted after {trainer.global_step} steps. What was measured until then:")
    finally:
        wandb_folder = _finish_wandb(trainer)
    history = callbacks[-1].history  # type: ignore[attr-defined]  # NormDynamicsMonitor
    if trainer.is_global_zero:
        history.save(args.out / "history.npz")
        print(_results(trainer))
        print(f"history   {args.out / 'history.npz'}")
        for picture in save_pictures(history, args.out):
            print(f"picture   {picture}")
        if wandb_folder is not None:
            print(f"W&B run   {wandb_folder}")
            print(f"          view it here: wandb leet {wandb_folder}")
            print(f"          upload it:    wandb sync {wandb_folder}")
    if stopped is not None:
        raise stopped
    return Run(history, trainer, args.out)


def train_on_images(args: argparse.Namespace, build: Callable[..., L.LightningModule]) -> Run:
    """Train an :class:`ImageClassifier` as the flags of :func:`add_image_flags` say.

    Args:
        args: The flags.
        build: Makes the module from ``width``, ``channels``, ``classes`` and the arguments of
            :class:`ImageClassifier`.
    """
    L.seed_everything(args.seed, verbose=False)
    data = image_data(args)
    module = build(
        width=args.width,
        channels=data.channels,
        classes=data.classes,
        optimizer=args.optimizer,
        lr=args.lr,
        weight_decay=args.weight_decay,
        drops=args.drops,
    )
    return fit(
        module,
        data,
        args,
        build_callbacks(args.method, alpha=args.alpha, every_n_steps=args.every_n_steps),
    )


def _finish_wandb(trainer: L.Trainer) -> Path | None:
    """Close the W&B run, so that a second fit in this process gets one of its own; return its
    folder."""
    if not isinstance(trainer.logger, WandbLogger) or not trainer.is_global_zero:
        return None
    import wandb

    run = trainer.logger.experiment
    folder = Path(run.dir).parent  # run.dir is the folder `files` inside it
    wandb.finish()
    try:
        return folder.relative_to(Path.cwd())
    except ValueError:
        return folder


def _results(trainer: L.Trainer) -> str:
    shown = {
        key: float(value)
        for key, value in trainer.callback_metrics.items()
        if key.startswith(("train_", "val_")) and "_step" not in key
    }
    return "results   " + ", ".join(f"{key} {value:.4g}" for key, value in sorted(shown.items()))


def save_pictures(history: Any, out: Path) -> list[Path]:
    """Draw effective learning rate and angular update per layer; without matplotlib, say so."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("matplotlib is not installed (pip install matplotlib): no pictures.")
        return []
    from lightning_normdyn import plots

    made = []
    for name, draw in (
        ("effective_lr", plots.plot_effective_lr),
        ("angular_update", plots.plot_angular_update),
    ):
        figure, _ = draw(history)
        made.append(out / f"{name}.png")
        figure.savefig(made[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return made


def run_as_script(main: Callable[[], object]) -> None:
    """Run an example; what the person can put right ends in one line instead of a traceback."""
    try:
        main()
    except (ExampleError, Cifar10Error, NormDynError) as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        package = EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        sys.exit(
            f"error: {package} is not installed, and this needs it: pip install {package}, or "
            f"'lightning-normdyn[examples]' for all."
        )
    except KeyboardInterrupt:  # before or after training; Lightning itself answers while it trains
        sys.exit("interrupted")
