import torch
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_normdyn import NormDynamicsMonitor


class Net(LightningModule):  # any LightningModule: nothing in it knows of the callback
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 2)
        )

    def training_step(self, x, batch_idx):
        return nn.functional.cross_entropy(self.net(x), torch.bernoulli(x[:, 0].sigmoid()).long())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)


torch.manual_seed(0)
trainer = Trainer(max_epochs=6, callbacks=[NormDynamicsMonitor()], logger=False)
trainer.fit(Net(), DataLoader(torch.randn(3200, 32), batch_size=32))
