"""Train a ResNet18 on CIFAR-10 with weight decay, AdaptiveWeightShrink, WeightRescaling or
RadialProjection.

    python examples/cifar_resnet18.py --cifar cifar-10-python.tar.gz --method wrs
    python examples/cifar_resnet18.py --cifar cifar-10-python.tar.gz --preset paper  # on a GPU

``--arch wrs`` is the WRS paper's variant with BatchNorm after every convolution, so that all its
filters are scale-invariant. ``--arch original`` has shortcuts without BatchNorm: three convolutions
whose length the loss does see. The table at the start of the run tells them apart, and the
callbacks leave them to the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from image_classifier import ImageClassifier
from running import Run, add_image_flags, parse, parser, run_as_script, train_on_images
from torch import Tensor, nn
from torch.nn import functional as F

# alpha = weight_decay / (1 - momentum), see digits_resnet.py; tau (every_n_steps) of ResNet18 with
# SGD: WRS paper, table S1.
PRESETS: dict[str, dict] = {
    "tiny": {
        "width": 4,
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
        "alpha": 5e-2,
        "every_n_steps": 20,
        "drops": "0.6,0.85",
        "log_every": 10,
    },
    "paper": {
        "width": 64,
        "resolution": 32,
        "train_images": None,
        "epochs": 200,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "alpha": 5e-3,
        "drops": "0.3,0.6,0.8",
        "log_every": 50,
    },
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; where the shape changes, a 1x1 shortcut with BatchNorm
    or without."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm_in_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            if norm_in_shortcut:
                self.shortcut.append(nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(ImageClassifier):
    """ResNet18 in its CIFAR form (3x3 stem, no pooling before the blocks).

    Args:
        arch: "wrs" (BatchNorm after every convolution) or "original" (shortcuts without).
        width: Channels of the first stage; 64 in the paper.
        channels: Of the images.
        classes: Of the data.
        training: Arguments of :class:`ImageClassifier`.
    """

    def __init__(
        self, arch: str = "wrs", width: int = 64, channels: int = 3, classes: int = 10, **training
    ) -> None:
        super().__init__(**training)
        self.save_hyperparameters()
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            for stride in (1 if stage == 0 else 2, 1):
                blocks.append(BasicBlock(inputs, outputs, stride, norm_in_shortcut=arch == "wrs"))
                inputs = outputs
        self.network = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(inputs, classes),
        )


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("cifar_resnet18", __doc__.splitlines()[0])
    p.add_argument(
        "--arch",
        choices=("wrs", "original"),
        default="wrs",
        help="BatchNorm after every convolution, or shortcuts without",
    )
    add_image_flags(p)
    args = parse(p, PRESETS, argv)
    return train_on_images(args, partial(ResNet18, args.arch))


if __name__ == "__main__":
    run_as_script(main)
