import torch
from lightning import Fabric

from lightning_normdyn import Partition, Phase, Step, StepBracket, WeightVectors
from lightning_normdyn.functional import angle_from_sums

fabric = Fabric(accelerator="cpu", devices=1)
conv = torch.nn.Conv2d(3, 8, 3, bias=False)
model, optimizer = (
    torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8)),
    torch.optim.AdamW(conv.parameters(), lr=1e-3),
)
vectors = WeightVectors([conv.weight], [Partition.filters(tuple(conv.weight.shape))])
bracket = StepBracket.of(optimizer)


def keep(step: Step) -> None:
    bracket.request_snapshot(vectors.storages())


def measure(step: Step) -> None:
    angle = angle_from_sums(*vectors.displacement(vectors.snapshots(bracket)))
    print(f"step {step.number}: turned by {angle.square().mean().sqrt():.2e} rad")


bracket.add(Phase.MEASURE, keep)
bracket.add(Phase.MEASURE_STEP, measure)
model, optimizer = fabric.setup(model, optimizer)
for _ in range(3):
    optimizer.zero_grad()
    fabric.backward(model(torch.randn(4, 3, 8, 8)).square().mean())
    optimizer.step()
