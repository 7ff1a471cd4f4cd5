"""Train a ResNet with weight standardization, as in the AWS paper: its effective learning rate is
lr over the deviation.

    python examples/ws_resnet.py --norm bn --method aws
    python examples/ws_resnet.py --cifar cifar-10-python.tar.gz --norm gn --method decay

Each convolution works with its filters minus their mean, divided by their standard deviation.
AdaptiveWeightShrink then goes by that deviation (``statistic="auto"`` finds it), and so do the
curves ``weight_std`` and ``effective_lr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from image_classifier import ImageClassifier
from running import Run, add_image_flags, parse, parser, run_as_script, train_on_images
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn.parametrizations import weight_standardization

# alpha and decay of the preset "paper" are the AWS paper's (its text and tables 1 to 3), of
# "default" ones that act within 1000 steps.
PRESETS: dict[str, dict] = {
    "tiny": {
        "width": 8,
        "resolution": 8,
        "epochs": 1,
        "max_steps": 4,
        "batch_size": 32,
        "log_every": 1,
    },
    "default": {
        "width": 8,
        "resolution": 16,
        "train_images": 8000,
        "epochs": 8,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 5e-3,
        "alpha": 0.5,
        "every_n_steps": 20,
        "drops": "0.6,0.85",
        "log_every": 10,
    },
    "paper": {
        "width": 64,
        "resolution": 32,
        "train_images": None,
        "epochs": 100,
        "batch_size": 256,
        "weight_decay": 1e-4,
        "alpha": 2.5e-3,
        "drops": "0.3,0.6,0.9",
        "log_every": 50,
    },
}
GROUPS = 4  # of GroupNorm


def normalization(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "bn" else nn.GroupNorm(GROUPS, channels)


def standardized(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Give a convolution whose filters are standardized before use; the trained parameter is the
    raw filter."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    weight_standardization(conv)
    return conv


class StandardizedBlock(nn.Module):
    """A residual block of standardized convolutions, each with BatchNorm or GroupNorm."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = standardized(inputs, outputs, 3, stride)
        self.norm1 = normalization(norm, outputs)
        self.conv2 = standardized(outputs, outputs, 3)
        self.norm2 = normalization(norm, outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.extend(
                [standardized(inputs, outputs, 1, stride), normalization(norm, outputs)]
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class StandardizedResNet(ImageClassifier):
    """A stem and three stages of one block each, all convolutions weight-standardized.

    Args:
        norm: "bn" (BatchNorm) or "gn" (GroupNorm).
        width: Channels of the first stage; a multiple of 4 for GroupNorm.
        channels: Of the images.
        classes: Of the data.
        training: Arguments of :class:`ImageClassifier`.
    """

    def __init__(
        self, norm: str = "bn", width: int = 64, channels: int = 3, classes: int = 10, **training
    ) -> None:
        super().__init__(**training)
        self.save_hyperparameters()
        self.network = nn.Sequential(
            standardized(channels, width, 3),
            normalization(norm, width),
            nn.ReLU(),
            StandardizedBlock(width, width, 1, norm),
            StandardizedBlock(width, 2 * width, 2, norm),
            StandardizedBlock(2 * width, 4 * width, 2, norm),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("ws_resnet", __doc__.splitlines()[0])
    p.add_argument(
        "--norm",
        choices=("bn", "gn"),
        default="bn",
        help="BatchNorm or GroupNorm behind each standardized convolution",
    )
    add_image_flags(p)
    args = parse(p, PRESETS, argv)
    if args.width % GROUPS:
        p.error(
            f"argument --width: must be a multiple of {GROUPS}, the groups of GroupNorm, got "
            f"{args.width}"
        )
    return train_on_images(args, partial(StandardizedResNet, args.norm))


if __name__ == "__main__":
    run_as_script(main)
