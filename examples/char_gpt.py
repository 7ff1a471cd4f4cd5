"""Train a small GPT with QK-norm on characters, and see which of a transformer's weights are
scale-invariant: most are not.

    python examples/char_gpt.py --method aws
    python examples/char_gpt.py --text my_book.txt --norm layer --method decay
    python examples/char_gpt.py --method cautious
    python examples/char_gpt.py --norm plain --method rotation

LayerNorm or RMSNorm stands *before* each sublayer, so it makes the sublayer's input independent of
the residual stream's scale, but not the output of its matrices independent of theirs. Only the
query and key projections have a normalization right behind them (per head), so only they have an
effective learning rate in the sense of the papers. The tables at start and end say so, and the
methods leave all other weights to AdamW, but for a cautious decay, which is every matrix's, and for
what steers single steps (rotation, floor, brake), which is meant for the matrices of the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from data_modules import Text
from image_classifier import parameter_groups
from running import (
    METHODS,
    ExampleError,
    Run,
    build_callbacks,
    fit,
    parse,
    parser,
    positive_int,
    run_as_script,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_normdyn import NormDynamicsMonitor, RadialBrake, RotationControl, WeightDecay

# alpha = weight_decay / length: both decoupled, and the projection of a head has a length of about
# sqrt(head_size / 3) at the start.
# None of the papers trains a transformer; "paper" is the size of character models that people train
# on one GPU.
PRESETS: dict[str, dict] = {
    "tiny": {
        "width": 16,
        "layers": 1,
        "heads": 2,
        "context": 16,
        "epochs": 1,
        "max_steps": 4,
        "batch_size": 8,
        "log_every": 1,
    },
    "default": {
        "width": 64,
        "layers": 2,
        "heads": 4,
        "context": 64,
        "epochs": 5,
        "batch_size": 32,
        "lr": 3e-3,
        "weight_decay": 0.5,
        "alpha": 0.2,
        "every_n_steps": 20,
        "log_every": 10,
    },
    "paper": {
        "width": 384,
        "layers": 6,
        "heads": 6,
        "context": 256,
        "epochs": 50,
        "batch_size": 64,
        "lr": 1e-3,
        "weight_decay": 0.1,
        "alpha": 0.02,
        "log_every": 50,
    },
}


STEERED = {
    "corrected": "WeightDecay that falls with the square of the learning rate (AdamC)",
    "cautious": "WeightDecay that spares what the step lengthens, on every matrix",
    "rotation": "RotationControl: each matrix of a block turns by atan(lr), its norm stays",
    "floor": "RotationControl: each matrix of a block turns by at least --angle",
    "brake": "RadialBrake: each matrix of a block keeps half of what a step adds to its norm",
}
BLOCKS = "*blocks*"


def steering_callbacks(method: str, angle: float) -> list[L.Callback]:
    """The callback of a method in :data:`STEERED`, and the monitor; ``angle`` in radians per
    step."""
    acting = {
        "corrected": lambda: WeightDecay(rate="lr_squared"),
        "cautious": lambda: WeightDecay(cautious=True),
        # By name: none of these matrices is scale-invariant, so "auto" would not take them.
        "rotation": lambda: RotationControl("lr", params=BLOCKS),
        "floor": lambda: RotationControl(angle, bound="at_least", norm="free", params=BLOCKS),
        "brake": lambda: RadialBrake(params=BLOCKS),
    }
    return [acting[method](), NormDynamicsMonitor()]


class Attention(nn.Module):
    """Causal attention with RMSNorm on each head's queries and keys (QK-norm), or without."""

    def __init__(self, width: int, heads: int, qk_norm: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> (batch, time, width)
        batch, time, width = x.shape
        shape = (batch, time, self.heads, width // self.heads)
        q = self.query_norm(self.query(x).view(shape)).transpose(1, 2)
        k = self.key_norm(self.key(x).view(shape)).transpose(1, 2)
        v = self.value(x).view(shape).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, norm: type[nn.Module], qk_norm: bool = True) -> None:
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = Attention(width, heads, qk_norm)
        self.mlp_norm = norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Characters ``(batch, time)`` to logits ``(batch, time, characters)``."""

    def __init__(
        self,
        characters: int,
        context: int,
        width: int,
        layers: int,
        heads: int,
        norm: type[nn.Module],
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        self.context = context
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm, qk_norm) for _ in range(layers))
        self.last_norm = norm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.characters(codes) + self.places(torch.arange(codes.shape[1], device=codes.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.last_norm(x))


class CharGPT(L.LightningModule):
    """Predict the next character; AdamW with linear warm-up.

    Args:
        characters: Size of the alphabet.
        context: Characters that the model sees at once.
        width: Of the residual stream.
        layers: Blocks.
        heads: Per block.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm) before each sublayer; "plain": LayerNorm, and
            no norm on queries and keys.
        lr: Learning rate.
        weight_decay: Decoupled, on all weights.
        warmup: Steps over which the learning rate rises.
    """

    def __init__(
        self,
        characters: int,
        context: int = 64,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        norm: str = "rms",
        lr: float = 3e-3,
        weight_decay: float = 0.5,
        warmup: int = 50,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = GPT(
            characters,
            context,
            width,
            layers,
            heads,
            nn.RMSNorm if norm == "rms" else nn.LayerNorm,
            qk_norm=norm != "plain",
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.network(codes)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        codes, following = batch
        return F.cross_entropy(self(codes).flatten(0, 1), following.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(
            parameter_groups(self, self.hparams.weight_decay), lr=self.hparams.lr
        )
        warmup = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / self.hparams.warmup)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}

    @torch.no_grad()
    def write(self, codes: list[int], count: int) -> list[int]:
        """Continue a text by ``count`` characters, each drawn from the model's distribution."""
        self.eval()
        for _ in range(count):
            logits = self(torch.tensor([codes[-self.network.context :]], device=self.device))[0, -1]
            codes = [*codes, int(torch.multinomial(logits.softmax(-1), 1))]
        return codes


def add_text_flags(p) -> None:
    p.add_argument(
        "--text", type=Path, help="a UTF-8 text file; without it, Python's own help texts are used"
    )
    p.add_argument(
        "--norm",
        choices=("rms", "layer", "plain"),
        default="rms",
        help="RMSNorm or LayerNorm before each sublayer; plain: LayerNorm, without QK-norm",
    )
    p.add_argument("--angle", type=float, default=4e-3, help="of --method floor, radians per step")
    for flag, words in (
        ("width", "of the residual stream"),
        ("layers", "blocks"),
        ("heads", "per block"),
        ("context", "characters seen at once"),
    ):
        p.add_argument(f"--{flag}", type=positive_int, help=words)


def text_data(args) -> Text:
    if args.width % args.heads:
        raise ExampleError(f"--width {args.width} must be a multiple of --heads {args.heads}.")
    try:
        return Text(args.text, args.batch_size, args.context)
    except ValueError as error:
        raise ExampleError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> Run:
    p = parser("char_gpt", __doc__.splitlines()[0], {**METHODS, **STEERED})
    add_text_flags(p)
    args = parse(p, PRESETS, argv)
    L.seed_everything(args.seed, verbose=False)
    data = text_data(args)
    module = CharGPT(
        len(data.characters),
        args.context,
        args.width,
        args.layers,
        args.heads,
        args.norm,
        lr=args.lr,
        weight_decay=args.weight_decay,
    )
    if args.method in STEERED:
        callbacks = steering_callbacks(args.method, args.angle)
    else:
        callbacks = build_callbacks(args.method, alpha=args.alpha, every_n_steps=args.every_n_steps)
    run = fit(module, data, args, callbacks)
    if run.trainer.is_global_zero:
        print(
            "\nThe model writes:\n"
            + data.decode(
                module.write([data.characters.index("\n")] if "\n" in data.characters else [0], 200)
            )
        )
    return run


if __name__ == "__main__":
    run_as_script(main)
