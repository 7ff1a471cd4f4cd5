"""Run a Python script in a fork of this process: the seconds that torch and Lightning take to be
imported are spent once, and not by each script.

A fork has imported what the tests have. That a script works where nothing is imported yet is for
one test of each script to say, which starts a process of its own.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn


def run_script(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """What ``python *words`` prints, run in ``folder``; fails where the script does.

    Args:
        words: the path of a script, or ``-m`` and the name of a module; then their arguments.
        folder: where the script runs.
        environment: all variables that it sees. What is read when Python starts, or when torch is
            imported, has been read already.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _run(words, folder, environment, out.fileno(), err.fileno())
        try:
            _, status = os.waitpid(child, 0)
        except BaseException:  # the test's own time limit
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise
        out.seek(0)
        err.seek(0)
        printed = out.read()
        assert status == 0, printed[-3000:] + err.read()[-3000:]
    return printed


def _run(
    words: Sequence[str], folder: Path, environment: Mapping[str, str], out: int, err: int
) -> NoReturn:
    """In the fork. It ends here whatever happens: above are the tests, which are the parent's."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        # pytest has made errors of some.
        warnings.resetwarnings()
        if words[0] == "-m":
            sys.argv = [*words[1:]]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [*words]
            sys.path.insert(0, str((folder / words[0]).resolve().parent))
            runpy.run_path(str(folder / words[0]), run_name="__main__")
        code = 0
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            code = end.code or 0
        else:
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
