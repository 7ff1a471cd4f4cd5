"""The LightningModule behind the image examples: cross entropy, accuracy, SGD or AdamW,
learning-rate drops."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Split the parameters as the papers do: weights (also of BatchNorm) decay, biases do not."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if not name.endswith("bias")],
            "weight_decay": weight_decay,
            "name": "weights",
        },
        {
            "params": [p for name, p in named if name.endswith("bias")],
            "weight_decay": 0.0,
            "name": "biases",
        },
    ]
    return [group for group in groups if group["params"]]


class ImageClassifier(L.LightningModule):
    """Train ``self.network`` (images to logits), which a subclass sets; the callbacks see ordinary
    modules and an ordinary optimizer.

    Args:
        optimizer: "sgd" or "adamw".
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: On all weights; coupled in SGD, decoupled in AdamW.
        drops: When to divide the learning rate, as fractions of the whole training.
        drop_factor: By how much.
    """

    network: nn.Module

    def __init__(
        self,
        optimizer: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        drops: tuple[float, ...] = (),
        drop_factor: float = 10.0,
    ) -> None:
        super().__init__()
        self.optimizer, self.lr, self.momentum, self.weight_decay = (
            optimizer,
            lr,
            momentum,
            weight_decay,
        )
        self.drops, self.drop_factor = drops, drop_factor

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.log("val_loss", F.cross_entropy(logits, labels), sync_dist=True)
        self.log(
            "val_accuracy",
            (logits.argmax(1) == labels).float().mean(),
            prog_bar=True,
            sync_dist=True,
        )

    def configure_optimizers(self) -> dict:
        groups = parameter_groups(self, self.weight_decay)
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=self.lr, momentum=self.momentum
            )
        elif self.optimizer == "adamw":
            optimizer = torch.optim.AdamW(groups, lr=self.lr)
        else:
            raise ValueError(f"`optimizer` must be 'sgd' or 'adamw', got {self.optimizer!r}.")
        steps = self.trainer.estimated_stepping_batches
        milestones = [max(1, round(fraction * steps)) for fraction in self.drops]
        scheduler = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, milestones, gamma=1 / self.drop_factor
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
