"""Runs that are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# forks before anything is computed: importing takes longer than the runs
_KILLER = """
import os, signal, sys
from pathlib import Path
from spamprune.engine import fit
from spamprune.engine.run import run
from spamprune.recipe import load
fit.CHECKPOINT_SECONDS = 0
save = fit.checkpoint.save
def saving(*arguments):
    global left
    save(*arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
fit.checkpoint.save = saving
for line in sys.stdin:
    recipe, out, left = line.rstrip("\\n").split("\\t")
    left = int(left)
    if not (child := os.fork()):
        os.dup2(2, 1)
        run(load(recipe), Path(out))
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="package")
def kill() -> Iterator[Callable[[Path, Path, int], None]]:
    """Return a function that runs a recipe's file and kills it at one of its checkpoints."""
    with subprocess.Popen(
        [sys.executable, "-c", _KILLER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(recipe: Path, out: Path, checkpoint: int) -> None:
            print(recipe, out, checkpoint, sep="\t", file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == f"{-signal.SIGKILL}\n"

        yield run
