r"""The weight-normalization family of the AWS paper, as parametrizations of
torch.nn.utils.parametrize.

Each replaces a weight by a function of a *direction* tensor whose length the network cannot see,
filter by filter:

- :func:`weight_normalization`: :math:`g\,w/\lVert w\rVert` (eq. 23). Leaves ``original0``, the
  gain, and ``original1``.
- :func:`centered_weight_normalization`: :math:`g\,(w-\bar w)/\lVert w-\bar w\rVert` (eq. 24).
  Leaves ``original0``, the gain, and ``original1``.
- :func:`weight_standardization`: :math:`(w-\bar w)/\mathrm{std}` (eq. 25). Leaves ``original``.
- :func:`bounded_weight_normalization`: :math:`\rho\,w/\lVert w\rVert` with a fixed :math:`\rho`
  (Hoffer et al.). Leaves ``original``.

``original1`` and ``original`` are directions: the tensors that AdaptiveWeightShrink,
WeightRescaling and RadialProjection act on, never the gain. They live under
``<layer>.parametrizations.<name>.`` and are new parameters where a gain is split off, so build the
optimizer afterwards.

A filter is a slice of dim 0; of dim 1 within each group for transposed convolutions. A filter that
is zero gives a zero weight. Norms are taken in float32 at least.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_normdyn.errors import NoTargetsError, NotSupportedError

__all__ = [
    "bounded_weight_normalization",
    "centered_weight_normalization",
    "is_weight_standardized",
    "remove_weight_normalizations",
    "weight_normalization",
    "weight_standardization",
]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def weight_normalization(module: ModuleT, name: str | Sequence[str] = "weight") -> ModuleT:
    r"""Weight normalization (WN): :math:`W' = g\,W/\lVert W\rVert` per filter, with a learned gain
    :math:`g` (AWS paper, eq. 23).

    The gain starts as the norm of each filter, so the network computes what it did before.

    Args:
        module: a layer, or a whole model.
        name: a parameter of ``module``; or one glob pattern or a list of them over the parameter
            names of a model, where ``*`` crosses dots, ``"!pattern"`` excludes, and parameters of
            fewer than two dimensions are left out.

    Returns:
        ``module`` itself, changed in place.

    Raises:
        NoTargetsError: nothing matches.
        NotSupportedError: a weight that is tied to another name, already parametrized, lazy, not of
            floating point, or 1-D and named.

    Example:
        >>> layer = weight_normalization(torch.nn.Linear(3, 4))
        >>> [(name, tuple(p.shape)) for name, p in layer.parametrizations.named_parameters()]
        [('weight.original0', (4, 1)), ('weight.original1', (4, 3))]
    """
    return _register(module, name, _WeightNormalization)


def centered_weight_normalization(module: ModuleT, name: str | Sequence[str] = "weight") -> ModuleT:
    r"""Centered weight normalization (CWN): :math:`W' = g\,(W-\bar W)/\lVert W-\bar W\rVert` per
    filter (AWS paper, eq. 24).

    The gain starts as the norm of each centred filter: only the filters' means are lost.

    Args:
        module: a layer, or a whole model.
        name: as in :func:`weight_normalization`.

    Returns:
        ``module`` itself, changed in place.

    Raises:
        NoTargetsError: nothing matches.
        NotSupportedError: as in :func:`weight_normalization`, and filters of one entry.

    Example:
        >>> layer = centered_weight_normalization(torch.nn.Linear(3, 4))
        >>> layer.weight.mean(1).abs().max().item() < 1e-6
        True
    """
    return _register(module, name, _CenteredWeightNormalization)


def weight_standardization(
    module: ModuleT, name: str | Sequence[str] = "weight", *, eps: float = 0.0
) -> ModuleT:
    r"""Weight standardization (WS): :math:`W' = (W-\bar W)/(\mathrm{std}+\epsilon)` per filter (AWS
    paper, eq. 3 and 25).

    The standard deviation is biased (divided by the number of entries). The paper has no
    :math:`\epsilon`; the code that circulates adds 1e-5. Any ``eps`` breaks the scale invariance by
    about :math:`\epsilon/\mathrm{std}`, so it is 0 here: a constant filter gives 0.
    AdaptiveWeightShrink with ``statistic="auto"`` uses the standard deviation for these weights.

    Args:
        module: a layer, or a whole model.
        name: as in :func:`weight_normalization`.
        eps: >= 0, in weight units.

    Returns:
        ``module`` itself, changed in place. It computes something else than before, so follow each
        layer by a normalization.

    Raises:
        ValueError: ``eps`` is negative.
        NoTargetsError: nothing matches.
        NotSupportedError: as in :func:`weight_normalization`, and filters of one entry.

    Example:
        >>> layer = weight_standardization(torch.nn.Linear(3, 4))
        >>> torch.allclose(layer.weight.std(1, correction=0), torch.ones(4))
        True
    """
    if eps < 0:
        raise ValueError(f"`eps` must be >= 0, got {eps}.")
    return _register(module, name, partial(_WeightStandardization, eps=eps))


def bounded_weight_normalization(
    module: ModuleT, name: str | Sequence[str] = "weight", *, length: float | None = None
) -> ModuleT:
    r"""Bounded weight normalization: :math:`W' = \rho\,W/\lVert W\rVert` per filter, with one fixed
    length :math:`\rho` per layer.

    Hoffer et al., *Norm matters*: like weight normalization, but nothing can grow: the gain is not
    learned.

    Args:
        module: a layer, or a whole model.
        name: as in :func:`weight_normalization`.
        length: :math:`\rho`, > 0; ``None``: the root mean square of the norms of the layer's
            filters now. Kept in the state_dict.

    Returns:
        ``module`` itself, changed in place.

    Raises:
        ValueError: ``length`` is not positive.
        NoTargetsError: nothing matches.
        NotSupportedError: as in :func:`weight_normalization`.

    Example:
        >>> layer = bounded_weight_normalization(torch.nn.Linear(3, 4), length=2.0)
        >>> torch.allclose(layer.weight.norm(dim=1), torch.full((4,), 2.0))
        True
    """
    if length is not None and not 0 < length < math.inf:
        raise ValueError(f"`length` must be > 0, got {length}.")
    return _register(module, name, partial(_BoundedWeightNormalization, length=length))


def remove_weight_normalizations(module: ModuleT, name: str | Sequence[str] = "*") -> ModuleT:
    """Turn weights that this module's functions have parametrized into plain parameters again, with
    the values that the layers use now.

    Args:
        module: a layer, or a whole model.
        name: patterns over the names of the weights (``conv1.weight``), as in
            :func:`weight_normalization`.

    Returns:
        ``module`` itself, changed in place.

    Raises:
        NoTargetsError: nothing matches.

    Example:
        >>> layer = remove_weight_normalizations(weight_normalization(torch.nn.Linear(3, 4)))
        >>> [name for name, _ in layer.named_parameters()]
        ['bias', 'weight']
    """
    # All are looked up first: removing one changes the modules that are walked through.
    parametrized = {}
    for prefix, owner in module.named_modules():
        if not parametrize.is_parametrized(owner):
            continue
        for tensor_name, chain in owner.parametrizations.items():
            # Those of somebody else stay.
            if isinstance(chain[0], _FilterParametrization):
                full_name = f"{prefix}.{tensor_name}".removeprefix(".")
                parametrized[full_name] = (owner, tensor_name)
    for full_name in _matching(name, list(parametrized)):
        owner, tensor_name = parametrized[full_name]
        parametrize.remove_parametrizations(owner, tensor_name, leave_parametrized=True)
    return module


def is_weight_standardized(module: nn.Module, name: str) -> bool:
    """Whether the parameter ``name`` of ``module`` is the direction of a weight-standardized
    weight.

    Any parametrization says so by an attribute ``statistic = "std"``.

    Args:
        module: the model.
        name: full name of a parameter, e.g. ``"conv1.parametrizations.weight.original"``.

    Example:
        >>> layer = weight_standardization(torch.nn.Linear(3, 4))
        >>> model = torch.nn.Sequential(layer, torch.nn.Linear(4, 2))
        >>> names = ("0.parametrizations.weight.original", "1.weight")
        >>> [is_weight_standardized(model, name) for name in names]
        [True, False]
    """
    try:
        owner = module.get_submodule(name.rpartition(".")[0])
    except AttributeError:  # a name from before the model was wrapped
        return False
    # By an attribute and not by class: a person's own parametrization can say so, too.
    return isinstance(owner, parametrize.ParametrizationList) and any(
        getattr(step, "statistic", None) == "std" for step in owner
    )


# ---- The parametrizations ----


class _FilterParametrization(nn.Module):
    """A function of a direction tensor, filter by filter.

    A filter's entries lie along ``dims``, after ``_split`` has separated the groups of a transposed
    convolution.
    """

    # The size of the direction tensor that its gradient depends on.
    statistic: ClassVar[str] = "norm"
    centered: ClassVar[bool] = False

    def __init__(self, owner: nn.Module, name: str, weight: Tensor) -> None:
        super().__init__()
        self.groups: int | None = None
        self.dims = tuple(range(1, weight.dim()))
        if isinstance(owner, nn.modules.conv._ConvTransposeNd) and name == "weight":
            # (C_in, C_out/groups, ...) becomes (groups, C_in/groups, C_out/groups, ...): a filter
            # has one group and one output channel.
            self.groups = owner.groups
            self.dims = (1, *range(3, weight.dim() + 1))
        divided = self._split(weight)
        entries = math.prod(divided.shape[d] for d in self.dims)
        if self.centered and entries == 1:
            raise NotSupportedError(
                f"A centred filter of one entry is always 0; got a weight of shape "
                f"{tuple(weight.shape)}. Exclude it by `name`."
            )

    def _split(self, weight: Tensor) -> Tensor:
        # The square of a large float16 entry is infinite.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.groups is None:
            return wide
        return wide.reshape(self.groups, -1, *wide.shape[1:])

    def _join(self, filters: Tensor, like: Tensor) -> Tensor:
        if self.groups is not None:
            filters = filters.flatten(0, 1)
        return filters.to(like.dtype)

    def _direction(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The filters, centred or not, and their norms, which broadcast against them."""
        filters = self._split(weight)
        if self.centered:
            filters = filters - filters.mean(self.dims, keepdim=True)
        return filters, torch.linalg.vector_norm(filters, dim=self.dims, keepdim=True)

    def right_inverse(self, weight: Tensor) -> Any:
        # What replaces a weight starts as that weight, of whatever length.
        return weight


def _or_one(norm: Tensor) -> Tensor:
    # A zero filter is divided by 1: it stays zero and gets a finite gradient. A small constant
    # instead would make that gradient enormous.
    return norm + (norm == 0)


class _WeightNormalization(_FilterParametrization):
    def forward(self, gain: Tensor, weight: Tensor) -> Tensor:
        filters, norm = self._direction(weight)
        return self._join(gain.reshape(norm.shape) * (filters / _or_one(norm)), weight)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        _, norm = self._direction(weight)
        # One number per row, whatever the layer: a gain must never look like a vector.
        gain = norm.reshape(-1, *[1] * (weight.dim() - 1))
        return gain.to(weight.dtype), weight


class _CenteredWeightNormalization(_WeightNormalization):
    centered = True


class _WeightStandardization(_FilterParametrization):
    statistic = "std"
    centered = True

    def __init__(self, owner: nn.Module, name: str, weight: Tensor, *, eps: float) -> None:
        super().__init__(owner, name, weight)
        self.eps = eps

    def forward(self, weight: Tensor) -> Tensor:
        filters, norm = self._direction(weight)
        std = norm / math.sqrt(filters.numel() // norm.numel())
        divisor = _or_one(std)
        # Not `+ 0.0`: the search for scale invariance would find an epsilon in the graph.
        if self.eps:
            divisor = divisor + self.eps
        return self._join(filters / divisor, weight)


class _BoundedWeightNormalization(_FilterParametrization):
    length: Tensor

    def __init__(
        self, owner: nn.Module, name: str, weight: Tensor, *, length: float | None
    ) -> None:
        super().__init__(owner, name, weight)
        # A buffer and no parameter: a checkpoint keeps it, and no optimizer moves it.
        rms = self._direction(weight.detach())[1].square().mean().sqrt()
        self.register_buffer("length", rms if length is None else torch.full_like(rms, length))

    def forward(self, weight: Tensor) -> Tensor:
        filters, norm = self._direction(weight)
        return self._join(self.length * (filters / _or_one(norm)), weight)


# ---- One layer or a whole model ----


def _register(
    module: ModuleT, name: str | Sequence[str], make: Callable[[nn.Module, str, Tensor], nn.Module]
) -> ModuleT:
    places = [_owner(module, full_name) for full_name in _weight_names(module, name)]
    # All are made before the first is registered, so that a refusal leaves the model as it was.
    made = [make(*place) for place in places]
    for (owner, tensor_name, _), parametrization in zip(places, made, strict=True):
        parametrize.register_parametrization(owner, tensor_name, parametrization)
    return module


def _weight_names(module: nn.Module, name: str | Sequence[str]) -> list[str]:
    # A parameter of the module itself comes before a pattern, also one that `_owner` refuses.
    is_own = str(name) in module._parameters or parametrize.is_parametrized(module, str(name))
    if isinstance(name, str) and is_own:
        return [name]
    candidates = []
    for full_name, parameter in module.named_parameters(remove_duplicate=False):
        is_direction = ".parametrizations." in f".{full_name}"
        # A lazy parameter has no dims to ask for; it counts as a weight, so that it is refused by
        # name.
        if not is_direction and (is_lazy(parameter) or parameter.dim() > 1):
            candidates.append(full_name)
    return _matching(name, candidates)


def _owner(module: nn.Module, full_name: str) -> tuple[nn.Module, str, Tensor]:
    prefix, _, tensor_name = full_name.rpartition(".")
    owner = module.get_submodule(prefix)
    if parametrize.is_parametrized(owner, tensor_name):
        raise NotSupportedError(
            f"`{full_name}` is parametrized already. Remove that first, or exclude it by `name`."
        )
    weight = owner._parameters[tensor_name]
    assert weight is not None
    if is_lazy(weight):
        raise NotSupportedError(
            f"`{full_name}` is lazy and has no shape yet. Run the model once first."
        )
    if weight.dim() < 2 or not weight.is_floating_point():
        raise NotSupportedError(
            "Only weights of two or more dimensions and a floating dtype can be normalized; "
            f"`{full_name}` has shape {tuple(weight.shape)} and {weight.dtype}. Choose another "
            f"`name`."
        )
    # With duplicates: without them a tied weight shows only its first name.
    names = [n for n, p in module.named_parameters(remove_duplicate=False) if p is weight]
    if len(names) > 1:
        raise NotSupportedError(
            f"{names} are one tensor, and a parametrization would untie them. Exclude each of them "
            f"by '!name'."
        )
    return owner, tensor_name, weight


def _matching(name: str | Sequence[str], candidates: list[str]) -> list[str]:
    patterns = [name] if isinstance(name, str) else list(name)

    def matches(pattern: str) -> set[str]:
        # A name may hold a bracket, which a glob reads as a set of characters: an exact name comes
        # first.
        if pattern in candidates:
            return {pattern}
        matching = {c for c in candidates if fnmatchcase(c, pattern)}
        if not matching:
            near = difflib.get_close_matches(pattern, candidates, 3, cutoff=0) or "nothing"
            raise NoTargetsError(
                f"`name` {pattern!r} matches none of {len(candidates)} weights; nearest: {near}. "
                f"Use '*' for all."
            )
        return matching

    # Who only excludes means all others.
    positive = [p for p in patterns if not p.startswith("!")] or ["*"]
    included = set().union(*map(matches, positive))
    excluded = set().union(*(matches(p[1:]) for p in patterns if p.startswith("!")))
    chosen = [c for c in candidates if c in included - excluded]
    if not chosen:
        raise NoTargetsError(
            f"`name` {patterns} leaves none of the {len(candidates)} weights: {candidates[:3]} ... "
            f"Exclude fewer."
        )
    return chosen
