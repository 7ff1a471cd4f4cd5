"""Train a VGG16 with BatchNorm on CIFAR-10 with weight decay, AdaptiveWeightShrink, WeightRescaling
or RadialProjection.

    python examples/cifar_vgg16_bn.py --cifar cifar-10-python.tar.gz --method wrs
    python examples/cifar_vgg16_bn.py --cifar cifar-10-python.tar.gz --preset paper  # on a GPU

A plain chain of thirteen convolutions, each with BatchNorm: the network of the WRS paper's
pictures. Without shortcuts the gradients differ much from layer to layer, and the early layers'
angular updates with them until the norms have settled.
"""

from __future__ import annotations

from collections.abc import Sequence

from image_classifier import ImageClassifier
from running import Run, add_image_flags, parse, parser, run_as_script, train_on_images
from torch import nn

# alpha = weight_decay / (1 - momentum), see digits_resnet.py; tau (every_n_steps) of VGG16: WRS
# paper, table S1.
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
        "every_n_steps": 40,
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

STAGES = (
    (1, 2),
    (2, 2),
    (4, 3),
    (8, 3),
    (8, 3),
)  # (channels in units of the width, convolutions), each followed by pooling


class VGG16(ImageClassifier):
    """VGG16 with BatchNorm after each convolution and one linear layer, without dropout (WRS paper,
    section B.2).

    Args:
        width: Channels of the first stage; 64 in the paper.
        channels: Of the images.
        classes: Of the data.
        training: Arguments of :class:`ImageClassifier`.
    """

    def __init__(self, width: int = 64, channels: int = 3, classes: int = 10, **training) -> None:
        super().__init__(**training)
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        for factor, convolutions in STAGES:
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(channels, factor * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(factor * width),
                    nn.ReLU(),
                ]
                channels = factor * width
            layers.append(
                nn.MaxPool2d(2, ceil_mode=True)
            )  # images smaller than 32 arrive at one pixel early and stay there
        self.network = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("cifar_vgg16_bn", __doc__.splitlines()[0])
    add_image_flags(p)
    return train_on_images(parse(p, PRESETS, argv), VGG16)


if __name__ == "__main__":
    run_as_script(main)
