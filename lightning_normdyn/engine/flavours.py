"""Lightning comes under two names, ``lightning.pytorch`` and ``pytorch_lightning``: the same code
twice, whose classes know nothing of each other. This file alone knows the names.

A person uses one of them, or both, and imports them before or after this package. So nothing is
imported here; what is loaded is found in ``sys.modules``. A Trainer takes only what derives from
the `Callback` of its own package: our callbacks derive from that of every package that is loaded.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""What a person imports, ``Trainer`` and ``LightningModule`` among it."""

FABRICS = ("lightning.fabric", "lightning_fabric")
"""What stands below each of `PACKAGES`."""


def classes(
    module: str,
    name: str,
    packages: Sequence[str] = PACKAGES,
) -> tuple[Any, ...]:
    """A class, or a function, of every package that is loaded; ``isinstance`` takes them as they
    are.

    Args:
        module: where it lives within a package: ``"loggers"``; empty for the package itself.
        name: what it is called there.
        packages: to look into.

    Returns:
        One for each package that is loaded and has it. Empty if there is none: no object can be an
        instance of it then.

    Example:
        >>> import lightning.pytorch
        >>> [found.__name__ for found in classes("callbacks", "EarlyStopping")][:1]
        ['EarlyStopping']
        >>> classes("callbacks", "Nothing")
        ()
    """
    found = []
    for package in packages:
        home = sys.modules.get(f"{package}.{module}".removesuffix("."))
        # A package that is just being imported does not have all of its names yet.
        value = getattr(home, name, None)
        if value is not None and value not in found:
            found.append(value)
    return tuple(found)


class _Plain:
    """A class whose only base is `object` cannot get others later."""


if TYPE_CHECKING:
    # The packages declare the same, so that one of them can stand for both. Renamed to themselves:
    # only so may other files import them from here.
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch import LightningModule as LightningModule
    from lightning.pytorch import Trainer as Trainer
    from lightning.pytorch.loggers import Logger as Logger
else:
    # Annotations need a name when the code runs. These are not for `isinstance`: see `classes`.
    LightningModule = Trainer = Logger = Any

    class Callback(_Plain):
        """Base of our callbacks: derives from the ``Callback`` of every package that is loaded.

        `join_packages` gives it its bases when a package has been imported. Classes and instances
        that were made before get them as well.
        """


def join_packages() -> None:
    """Have our callbacks derive from the ``Callback`` of every package that is loaded by now."""
    bases = (*classes("", "Callback"), _Plain)
    if Callback.__bases__ != bases:
        Callback.__bases__ = bases


class _Arrivals(MetaPathFinder):
    """Notices when one of the packages is imported; finds nothing itself.

    To look at ``sys.modules`` when an instance is made would be too late: a command line asks
    whether a class is a Callback before it makes one, and an instance may be older than the import.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module as the other finders find it, but that `join_packages` runs after it."""
        if fullname not in PACKAGES:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _Arrivals):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                _join_after(spec)
                return spec
        return None


def _join_after(spec: ModuleSpec) -> None:
    """Call `join_packages` when the module of ``spec`` has been executed."""
    # The loader belongs to this one import, so that its method can be replaced for this one call.
    loader: Any = spec.loader

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        loader.exec_module(module)
        join_packages()

    loader.exec_module = exec_module


join_packages()
sys.meta_path.insert(0, _Arrivals())
