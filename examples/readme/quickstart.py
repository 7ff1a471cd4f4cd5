from digits_resnet import Digits, ResidualDigits  # any LightningModule and its data
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_normdyn import AdaptiveWeightShrink, NormDynamicsMonitor

callbacks = [AdaptiveWeightShrink(2.5e-3), NormDynamicsMonitor()]
trainer = Trainer(max_epochs=3, callbacks=callbacks, logger=WandbLogger(project="normdyn", offline=True), log_every_n_steps=5)
trainer.fit(ResidualDigits(), datamodule=Digits())
