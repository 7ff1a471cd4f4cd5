import torch

from lightning_normdyn import Partition, Phase, Step, StepBracket, WeightVectors
from lightning_normdyn.functional import shrink_factor

conv = torch.nn.Conv2d(3, 8, 3, bias=False)
model = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
vectors = WeightVectors([conv.weight], [Partition.filters(tuple(conv.weight.shape))])


def shrink(step: Step) -> None:
    vectors.scale_(shrink_factor(vectors.norms(), lr=0.1, alpha=2.5e-3))


StepBracket.of(optimizer).add(Phase.SHRINK, shrink)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
print(vectors.norms())
