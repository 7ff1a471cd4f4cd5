"""Finding the runs that a path names, and reading them."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from lightning_normdyn.errors import NormDynError
from lightning_normdyn.monitor.history import History, load_history
from lightning_normdyn.storage import is_remote


def runs_in(path: str | os.PathLike[str]) -> list[str | Path]:
    """The runs that a path names: itself, or the histories in a folder, any number of levels down.

    Raises:
        NormDynError: for a folder without one.
    """
    if is_remote(path) or not Path(path).is_dir():
        return [os.fspath(path)]
    folder = Path(path)
    runs: list[Path] = []
    for place, below, files in os.walk(folder):
        # By their names: other .npz files may be data sets.
        own = sorted(fnmatch.filter(files, "history*.npz"))
        runs += [Path(place, name) for name in own]
        # Below a history lie copies of it, beside the logs of its loggers.
        below[:] = [] if own else sorted(below)
    runs = runs or sorted(folder.glob("*.npz"))
    if not runs:
        raise NormDynError(
            f"`{folder}` holds no run, nor does any folder below it; name a history file (.npz)."
        )
    return list(runs)


def load_run(path: str | os.PathLike[str]) -> History:
    """Read a run.

    Args:
        path: a history file (``.npz``), also at a URL (``s3://``), or a folder that holds one, at
            any level below it, as every logger's folder does.

    Raises:
        NormDynError: where there is no such run, several, or a damaged one; nothing in it is
            executed.
    """
    runs = runs_in(path)
    if len(runs) > 1:
        raise NormDynError(
            f"`{path}` holds {len(runs)} runs; name one of {', '.join(map(str, runs[:3]))}."
        )
    (run,) = runs
    if not is_remote(run) and not Path(run).is_file():
        raise NormDynError(f"there is no run `{path}`; name a history file (.npz) or its folder.")
    return load_history(run)
