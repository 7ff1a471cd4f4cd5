"""Names of parameters and modules as a person wrote them, and which of them a pattern means."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from lightning_normdyn.errors import NoTargetsError

# What torch.compile, FSDP and activation checkpointing put into the name of a parameter.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# For each weight all its names.
NamesOfEach = Sequence[tuple[str, ...]]


def clean_name(name: str) -> str:
    """A parameter's or module's name without the wrappers of torch.compile, FSDP and activation
    checkpointing.

    Example:
        >>> clean_name("net._orig_mod.0._fsdp_wrapped_module.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def parameter_names(module: nn.Module) -> dict[Tensor, tuple[str, ...]]:
    """All names of every parameter, without wrappers; a tied weight has several.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> net[1].weight = net[0].weight
        >>> list(parameter_names(net).values())
        [('0.weight', '1.weight')]
    """
    names: dict[Tensor, tuple[str, ...]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = names.get(parameter, ())
        clean = clean_name(name)
        # A wrapper shows a parameter a second time, under what is the same name without it.
        if clean not in known:
            names[parameter] = (*known, clean)
    return names


def normalize_params(params: str | Sequence[str]) -> list[str]:
    """Check the value of a ``params`` argument, and make a list of patterns of it.

    Returns:
        The patterns; ``["auto"]`` for ``"auto"``.

    Raises:
        ValueError: for anything but ``"auto"``, a glob pattern, or a list of them.

    Example:
        >>> normalize_params("layer1.*")
        ['layer1.*']
    """
    expected = "`params` must be 'auto', a glob pattern, or a list of them"
    patterns = [params] if isinstance(params, str) else params
    # Bytes and mappings can be iterated over, too, but give numbers and keys.
    if isinstance(patterns, (bytes, Mapping)) or not isinstance(patterns, Iterable):
        raise ValueError(f"{expected}, got {params!r}.")
    patterns = list(patterns)
    if not patterns:
        raise ValueError("`params` is an empty list. Use 'auto', or name at least one pattern.")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.removeprefix("!"):
            raise ValueError(f"{expected}, got {pattern!r} in it.")
    if "auto" in patterns and len(patterns) > 1:
        raise ValueError(
            f"`params={patterns}` mixes 'auto' with patterns. Only excludes (\"!pattern\") mean "
            "'auto' minus them; leave 'auto' out."
        )
    return patterns


def match_patterns(
    params: str | Sequence[str],
    names: NamesOfEach,
    what: str = "weights",
    *,
    all_must_match: bool = True,
) -> list[int]:
    """Indices of the weights that ``params`` means.

    Patterns are exact names, or else `fnmatch.fnmatchcase` globs on parameter names, so ``*``
    crosses dots. ``"!pattern"`` excludes, after all includes; only excludes mean all of ``names``
    minus them. A tied weight matches under each of its names.

    Args:
        params: as `normalize_params` takes it.
        names: for each weight all its names.
        what: what the names are, for the message.
        all_must_match: whether a pattern that matches nothing is an error.

    Raises:
        NoTargetsError: if a pattern matches nothing.

    Example:
        >>> names = [("conv1.weight",), ("conv2.weight",), ("fc.weight",)]
        >>> match_patterns(["conv*", "!*2*"], names)
        [0]
    """
    patterns = normalize_params(params)
    if patterns == ["auto"]:
        return list(range(len(names)))

    def matching(pattern: str) -> set[int]:
        matches = _indices_matching(pattern, names)
        # A pattern that matches nothing is misspelt, and would leave weights out unnoticed.
        if not matches and all_must_match:
            raise NoTargetsError(_nothing_matches(pattern, names, what))
        return matches

    includes = [matching(p) for p in patterns if not p.startswith("!")]
    excludes = [matching(p[1:]) for p in patterns if p.startswith("!")]
    # Only excludes: all minus them.
    chosen = set(range(len(names)))
    if includes:
        chosen = set().union(*includes)
    return sorted(chosen.difference(*excludes))


def _indices_matching(pattern: str, names: NamesOfEach) -> set[int]:
    # An exact name comes first: it may hold a bracket, which a glob reads as a set of characters.
    exact = {i for i, aliases in enumerate(names) if pattern in aliases}
    if exact:
        return exact
    matches = set()
    for i, aliases in enumerate(names):
        # A tied weight has several names, and a person may know it by any of them.
        if any(fnmatchcase(name, pattern) for name in aliases):
            matches.add(i)
    return matches


def _nothing_matches(
    pattern: str,
    names: NamesOfEach,
    what: str,
) -> str:
    everything = [name for aliases in names for name in aliases]
    shown = ", ".join(everything[:12])
    if len(everything) > 12:
        shown += ", ..."
    near = difflib.get_close_matches(pattern, everything, n=3, cutoff=0.4)
    closest = ""
    if near:
        closest = f" The nearest: {', '.join(near)}."
    return (
        f"`params` has the pattern {pattern!r}, which matches none of the {len(names)} {what}: "
        f"{shown or '(there are none)'}.{closest} Correct the pattern, or use params='auto'."
    )
