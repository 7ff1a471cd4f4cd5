import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor


class Classifier(LightningModule):  # any LightningModule: nothing in it knows of the callbacks
    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Conv2d(1, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


labels = torch.arange(256) % 2
images = torch.randn(256, 1, 8, 8) + labels[:, None, None, None]
monitor = NormDynamicsMonitor()
callbacks = [AdaptiveWeightShrink(8.7e-3), monitor]  # 5e-4 / (1 - 0.9) / 0.58, see "Which alpha?"
trainer = Trainer(max_epochs=3, callbacks=callbacks, logger=CSVLogger("logs"), log_every_n_steps=4)
trainer.fit(Classifier(), DataLoader(TensorDataset(images, labels), batch_size=32))
print(f"angular update: {monitor.history[-1]['normdyn/angular_update']:.4f} rad per step")
