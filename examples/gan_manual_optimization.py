"""Train a GAN on scikit-learn's digits with manual optimization: two optimizers, each stepping when
the module says so.

    python examples/gan_manual_optimization.py --method aws

The callbacks follow the optimizers' own steps, not the Trainer's count of batches: the generator
steps twice as often as the discriminator here, and each has its own effective learning rates, in
one history.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from data_modules import Digits
from image_classifier import parameter_groups
from running import Run, build_callbacks, fit, parse, parser, positive_int, run_as_script
from torch import Tensor, nn
from torch.nn import functional as F

# alpha = weight_decay / length: both decoupled in AdamW, and the filters' length settles near 1.
PRESETS: dict[str, dict] = {
    "tiny": {"width": 4, "epochs": 1, "max_steps": 12, "log_every": 1},
    "default": {
        "width": 16,
        "epochs": 60,
        "batch_size": 64,
        "lr": 2e-3,
        "weight_decay": 0.5,
        "alpha": 0.5,
        "every_n_steps": 20,
        "log_every": 10,
    },
    "paper": {
        "width": 64,
        "epochs": 1000,
        "batch_size": 128,
        "lr": 2e-4,
        "weight_decay": 0.5,
        "alpha": 0.5,
        "log_every": 50,
    },
}
NOISE = 16  # entries of the generator's input
GENERATOR_STEPS = 2  # per step of the discriminator, which learns faster


class GAN(L.LightningModule):
    """A generator of transposed convolutions and a discriminator of convolutions, both with
    BatchNorm except at their ends.

    Args:
        width: Channels of the widest images.
        lr: Learning rate of both optimizers.
        weight_decay: Decoupled, on all weights.
    """

    def __init__(self, width: int = 16, lr: float = 2e-3, weight_decay: float = 0.5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Unflatten(1, (NOISE, 1, 1)),
            nn.ConvTranspose2d(NOISE, 4 * width, 2, bias=False),  # 1 -> 2
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),  # 2 -> 4
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 1, 4, stride=2, padding=1),  # 4 -> 8
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # 8 -> 4
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # 4 -> 2
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(16 * width, 1),
        )

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        real = batch[0]
        generator_optimizer, discriminator_optimizer = self.optimizers()
        noise = torch.randn(len(real), NOISE, device=self.device)

        self.toggle_optimizer(generator_optimizer)
        loss = F.softplus(
            -self.discriminator(self(noise))
        ).mean()  # -log of the discriminator's belief that it is real
        generator_optimizer.zero_grad()
        self.manual_backward(loss)
        generator_optimizer.step()
        self.untoggle_optimizer(generator_optimizer)
        self.log("train_generator_loss", loss)

        # On the last batch of each round, so that a logging step (every tenth batch here) is a step
        # of both: a weight has no angular update at a step at which its optimizer stands still.
        if (batch_idx + 1) % GENERATOR_STEPS == 0:
            self.toggle_optimizer(discriminator_optimizer)
            loss = (
                F.softplus(-self.discriminator(real)).mean()
                + F.softplus(self.discriminator(self(noise).detach())).mean()
            )
            discriminator_optimizer.zero_grad()
            self.manual_backward(loss)
            discriminator_optimizer.step()
            self.untoggle_optimizer(discriminator_optimizer)
            self.log("train_discriminator_loss", loss)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        settings = {"lr": self.hparams.lr, "betas": (0.5, 0.99)}
        return [
            torch.optim.AdamW(parameter_groups(net, self.hparams.weight_decay), **settings)
            for net in (self.generator, self.discriminator)
        ]


def save_samples(module: GAN, picture: Path) -> None:
    """Draw 64 generated digits; without matplotlib, nothing."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    module.eval()
    with torch.no_grad():
        images = module(
            torch.randn(64, NOISE, generator=torch.Generator().manual_seed(0)).to(module.device)
        ).cpu()
    framed = F.pad(images.view(8, 8, 8, 8), (1, 1, 1, 1), value=float(images.min()))
    sheet = framed.permute(0, 2, 1, 3).reshape(80, 80)
    plt.imsave(picture, sheet.repeat_interleave(6, 0).repeat_interleave(6, 1), cmap="gray_r")
    print(f"samples   {picture}")


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("gan_manual_optimization", __doc__.splitlines()[0])
    p.add_argument("--width", type=positive_int, help="channels")
    args = parse(p, PRESETS, argv)
    torch.set_num_threads(
        1
        # such small matrices are slower on several threads, and much slower while others use the
        # machine
    )
    L.seed_everything(args.seed, verbose=False)
    module = GAN(args.width, args.lr, args.weight_decay)
    data = Digits(args.batch_size, noise=0.0)
    run = fit(
        module,
        data,
        args,
        build_callbacks(args.method, alpha=args.alpha, every_n_steps=args.every_n_steps),
        limit_val_batches=0,
    )
    if run.trainer.is_global_zero:
        save_samples(module, run.out / "samples.png")
    return run


if __name__ == "__main__":
    run_as_script(main)
