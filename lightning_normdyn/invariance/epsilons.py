"""How small the epsilon of a normalization is beside the statistic that it is added to.

With y = x / sqrt(v + eps), a weight in front of the normalization is scale-invariant only as far as
eps / (v + eps) is small. Under common initializations it is not always: MobileNetV3 has eps = 1e-3
beside variances of the same order in its depthwise layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .graph_state import EPSILONS, is_normalization
from .hooks import take_off
from .names import clean_name

# Batches after which nothing is left of a running variance's first value: 0.9**100 with the usual
# momentum.
SETTLED = 100


@dataclass(frozen=True)
class EpsilonShare:
    """What one forward pass said about one normalization.

    Args:
        name: of the module.
        eps: its epsilon.
        median: of the statistic over channels, groups or positions: a variance, or a mean of
            squares.
        smallest: of it.
        share: root mean square of eps / (statistic + eps).
    """

    name: str
    eps: float
    median: float
    smallest: float
    share: float

    def explains(self, rms: float) -> bool:
        """Whether the epsilon is why gradients are as far from orthogonal as this."""
        # They are of the order of the share, and for a weight without a normalization of the order
        # of 1.
        return 10 * self.share >= rms

    def __str__(self) -> str:
        """In words, for a message.

        Example:
            >>> print(EpsilonShare("bn", 1e-3, 0.002, 0.0004, 0.4))
            eps = 0.001 of bn is not small beside the variance that it is added to (median 0.002,
            smallest 0.0004)
        """
        return (
            f"eps = {self.eps:g} of {self.name} is not small beside the variance that it is added "
            f"to (median {self.median:.2g}, smallest {self.smallest:.2g})"
        )


def epsilon_of(module: nn.Module) -> float | None:
    """The constant that a normalization adds to its statistic; None if it names none.

    Example:
        >>> epsilon_of(nn.BatchNorm2d(4)), epsilon_of(nn.Linear(4, 4))
        (1e-05, None)
    """
    if not is_normalization(module):
        return None
    for name in EPSILONS:
        value = getattr(module, name, None)
        # To python True is the number 1, but it is no epsilon.
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    return None


def statistic_of(
    module: nn.Module,
    x: Tensor,
) -> Tensor | None:
    """What a normalization adds its epsilon to, one number for each thing that it normalizes.

    Args:
        module: a normalization.
        x: its input.

    Returns:
        Biased variances, or means of squares for a root-mean-square normalization, in float32 or
        better; None if they are not known.

    Example:
        >>> statistic_of(nn.BatchNorm1d(2), torch.tensor([[1.0, 0.0], [3.0, 0.0]])).tolist()
        [1.0, 0.0]
        >>> statistic_of(nn.GroupNorm(1, 2), torch.tensor([[1.0, 3.0]])).tolist()
        [1.0]
    """
    # The squares of large float16 activations are infinite.
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    # Of a person's own normalization: what it is like shows in its settings and its name.
    groups = getattr(module, "num_groups", None)
    shape = getattr(module, "normalized_shape", None)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and x.ndim >= 2:
        flat = x.transpose(0, 1).flatten(1)
    elif isinstance(module, nn.modules.instancenorm._InstanceNorm) and x.ndim >= 3:
        flat = x.flatten(2)
    elif isinstance(groups, int) and x.ndim >= 2 and x.shape[1] % groups == 0:
        flat = x.reshape(len(x) * groups, -1)
    else:
        # A normalization that names no shape is taken to normalize the last dimension.
        last = len(shape) if isinstance(shape, (tuple, list)) else 1
        if x.ndim < last:
            return None
        flat = x.flatten(x.ndim - last) if last > 1 else x
        if "rms" in type(module).__name__.lower():
            return flat.square().mean(-1).flatten()
    return flat.var(-1, correction=0).flatten()


class EpsilonWatch:
    """Takes the statistics that normalizations see in forward passes.

    Nothing is copied to the host before somebody asks.

    Args:
        module: the network.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, eps=1.0))
        >>> watch = EpsilonWatch(net)
        >>> watch.start()
        >>> _ = net(torch.ones(8, 4))
        >>> watch.stop()
        >>> watch.largest(["1"]).share
        1.0
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._watched: dict[nn.Module, str] = {}  # the normalizations with a hook, and their names
        # By name of the normalization: its epsilon, and a `_summary` of what it is added to.
        self._seen: dict[str, tuple[float, Tensor]] = {}
        # Those that were seen since the last `start`.
        self._fresh: set[str] = set()

    def start(self, names: Iterable[str] | None = None) -> None:
        """Look at the next forward passes of these modules, or of all normalizations."""
        self.stop()
        self._fresh = set()
        chosen = None if names is None else set(names)
        look = self._look  # one bound method for all modules
        for full_name, module in self._module.named_modules():
            name = clean_name(full_name)
            if (chosen is None or name in chosen) and epsilon_of(module) is not None:
                self._watched[module] = name
                module.register_forward_pre_hook(look)

    def stop(self) -> None:
        """Remove every hook; idempotent."""
        if self._watched:
            take_off(self._watched, self._look)
            self._watched = {}

    @torch.no_grad()
    def _look(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
    ) -> None:
        eps = epsilon_of(module)
        x = args[0] if args else None
        if eps is None or not isinstance(x, Tensor) or not x.is_floating_point() or not x.numel():
            return
        statistic = statistic_of(module, x)
        if statistic is not None:
            name = self._watched[module]
            self._seen[name] = eps, _summary(statistic, eps)
            self._fresh.add(name)

    def forget_old(self) -> None:
        """The weights have moved: from now on running statistics count, where there are any."""
        self._fresh = set()

    def largest(self, names: Iterable[str]) -> EpsilonShare | None:
        """Of these normalizations the one whose epsilon matters most; None if none was seen.

        Copies to the host.
        """
        modules = {clean_name(name): module for name, module in self._module.named_modules()}
        shares = []
        for name in names:
            known = self._seen.get(name)
            if name not in self._fresh:
                # Weights have moved since that batch, and running variances have followed them.
                known = _running(modules.get(name)) or known
            if known is not None:
                eps, numbers = known
                shares.append(EpsilonShare(name, eps, *numbers.tolist()))
        return max(shares, key=lambda share: share.share, default=None)


def _summary(
    statistic: Tensor,
    eps: float,
) -> Tensor:
    """Median, smallest, and the root mean square of the share that the epsilon has."""
    share = (eps / (statistic + eps)).square().mean().sqrt()
    return torch.stack([statistic.median(), statistic.min(), share])


def _running(module: nn.Module | None) -> tuple[float, Tensor] | None:
    """The epsilon and the summary of running variances; None while their first value counts."""
    eps = None if module is None else epsilon_of(module)
    variances = getattr(module, "running_var", None)
    batches = getattr(module, "num_batches_tracked", None)
    if eps is None or variances is None or batches is None or int(batches) < SETTLED:
        return None
    return eps, _summary(variances.detach(), eps)
