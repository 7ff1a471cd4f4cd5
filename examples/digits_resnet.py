"""Train a small residual BatchNorm network on scikit-learn's digits and watch its effective
learning rates.

    python examples/digits_resnet.py --method aws
    python examples/digits_resnet.py --demo  # weight decay, then AWS, in one picture

What to see: under weight decay as well as under AdaptiveWeightShrink the weights find a length at
which each step turns them by the same angle, whatever length they began with. The effective
learning rate rises or falls until then, and this is what the learning rate alone does not tell.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from data_modules import Digits
from image_classifier import ImageClassifier
from running import (
    Run,
    build_callbacks,
    fit,
    parse,
    parser,
    positive,
    positive_int,
    run_as_script,
    say,
)
from torch import Tensor, nn
from torch.nn import functional as F

# alpha is chosen so that the filters, whose length settles near 1, shrink under AWS at the rate at
# which SGD's own (coupled) decay shrinks them: alpha * length = weight_decay / (1 - momentum). They
# start five times as long as torch makes them (init_scale), so that there is a way to go.
PRESETS: dict[str, dict] = {
    "tiny": {"width": 4, "epochs": 1, "max_steps": 12, "log_every": 2},
    "default": {
        "width": 12,
        "epochs": 40,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 5e-3,
        "alpha": 5e-2,
        "every_n_steps": 10,
        "log_every": 4,
        "init_scale": 5.0,
    },
    "paper": {
        "width": 32,
        "epochs": 200,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "alpha": 5e-3,
        "every_n_steps": 20,
        "init_scale": 1.0,
    },
}


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, each convolution followed by BatchNorm: every filter is
    scale-invariant."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        if stride == 1 and inputs == outputs:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualDigits(ImageClassifier):
    """A stem and three residual blocks on images of 8 x 8; only the last linear layer is not
    scale-invariant.

    Args:
        width: Channels of the stem; the blocks have 1, 2 and 4 times as many.
        lr: Learning rate of SGD.
        momentum: Of SGD.
        weight_decay: On all weights, inside the gradient (coupled), as torch's SGD has it.
        drops: When to divide the learning rate by 5, as fractions of the training.
        init_scale: Factor on all convolutions at the start. It leaves the network's function as it
            is, and the length to be shed differs.
    """

    def __init__(
        self,
        width: int = 12,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-3,
        drops: tuple[float, ...] = (0.75,),
        init_scale: float = 1.0,
    ) -> None:
        super().__init__("sgd", lr, momentum, weight_decay, drops, drop_factor=5.0)
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )
        with torch.no_grad():
            for layer in self.network.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.mul_(init_scale)


def train(args: argparse.Namespace) -> Run:
    torch.set_num_threads(
        1
        # such small matrices are slower on several threads, and much slower while others use the
        # machine
    )
    L.seed_everything(args.seed, verbose=False)
    module = ResidualDigits(
        args.width, args.lr, weight_decay=args.weight_decay, init_scale=args.init_scale
    )
    callbacks = build_callbacks(args.method, alpha=args.alpha, every_n_steps=args.every_n_steps)
    return fit(module, Digits(args.batch_size), args, callbacks)


def demo(args: argparse.Namespace) -> dict[str, Run]:
    """Train with weight decay and with AdaptiveWeightShrink, and draw both sets of curves in one
    picture."""
    runs = {}
    for method in ("decay", "aws"):
        one = copy.copy(args)
        one.method, one.out = method, args.out / method
        runs[method] = train(one)
    if runs["aws"].trainer.is_global_zero:
        histories = {
            "weight decay": runs["decay"].history,
            "AdaptiveWeightShrink": runs["aws"].history,
        }
        # Under SGD, which trains both, a direction follows η/‖w‖²: layers with a large η/‖w‖ can be
        # those that turn least.
        quantities = ("angular_update", "direction_lr")
        picture = save_comparison(histories, quantities, args.out / "compare.png")
        if picture is not None:
            say(
                f"\nBoth runs in one picture: {picture}; every layer under AdaptiveWeightShrink: "
                f"{args.out / 'overview.png'}"
            )
    return runs


def save_comparison(histories: dict, quantities: Sequence[str], picture: Path) -> Path | None:
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return None  # said already, for the pictures of the single runs
    from lightning_normdyn.plots import plot_compare, plot_overview

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5))
    for ax, quantity in zip(axes, quantities, strict=True):
        plot_compare(histories, quantity, ax=ax)
    figure.savefig(picture, dpi=120, bbox_inches="tight")
    plt.close(figure)
    plot_overview(histories["AdaptiveWeightShrink"])[0].savefig(
        picture.with_name("overview.png"), dpi=85
    )
    return picture


def main(argv: Sequence[str] | None = None) -> Run | dict[str, Run]:
    p = parser("digits_resnet", __doc__.splitlines()[0])
    p.add_argument("--width", type=positive_int, help="channels of the first layer")
    p.add_argument("--init-scale", type=positive, help="factor on all convolutions at the start")
    p.add_argument(
        "--demo",
        action="store_true",
        help="train with decay and with aws, one after the other, and draw both in one picture",
    )
    args = parse(p, PRESETS, argv)
    if args.demo:
        args.out = (
            Path("runs") / "demo"
            if args.out == Path("runs") / args.example / args.method
            else args.out
        )
        return demo(args)
    return train(args)


if __name__ == "__main__":
    run_as_script(main)
