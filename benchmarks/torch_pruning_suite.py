"""Run torch-pruning's own tests with its magnitude importance and with ours, side by side.

``python benchmarks/torch_pruning_suite.py [--tests DIR]`` prints one Markdown row per test; it
takes about fifteen minutes on one core. Without ``--tests`` the source distribution of the
installed version is fetched from PyPI for them.

The tests run as they are, but for two things: weights that they would download are random ones,
and, for "ours", ``MagnitudeImportance`` and ``GroupMagnitudeImportance`` are ``ScoreImportance``
of the scores ``|θ|^p`` with the same reduction and normalizer. It counts every parameter, so
``bias`` and ``target_types`` have no effect. Some files hold no test but run when they are
collected: they are listed only if they fail. Without a GPU the test that asks for one is left out.

This file is also the pytest plugin that makes these replacements.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary
from xml.etree import ElementTree

import torch
import torch_pruning as tp
import torchvision

from spamprune.pruning.importance import ScoreImportance
from spamprune.scores import magnitude

#: ``torch_pruning.__version__`` lags behind.
VERSION = version("torch-pruning")
_WHOSE = "SPAMPRUNE_SUITE_IMPORTANCE"


class MagnitudeScores(tp.importance.Importance):
    """Stands in for ``GroupMagnitudeImportance``, one object of which may see many models."""

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "mean",
        normalizer: str | None = "mean",
        bias: bool = True,
    ):
        self._p = p
        self._arguments: Any = {"group_reduction": group_reduction, "normalizer": normalizer}
        self._of_model: WeakKeyDictionary[Any, ScoreImportance] = WeakKeyDictionary()

    def __call__(self, group: tp.dependency.Group) -> torch.Tensor | None:
        """Return the importance of each unit."""
        model = group._DG.model
        if model not in self._of_model:
            scores = {name: score.pow(self._p) for name, score in magnitude(model).items()}
            self._of_model[model] = ScoreImportance(scores, **self._arguments)
        return self._of_model[model](group)


def _without_download(build: Callable[..., Any]) -> Callable[..., Any]:
    """Give "pretrained" networks random weights, the same at each call."""

    @functools.wraps(build)
    def built(*args: Any, pretrained: bool = False, **kwargs: Any) -> Any:
        with torch.random.fork_rng(devices=[], enabled=pretrained):
            if pretrained:
                torch.manual_seed(0)
            return build(*args, **kwargs)

    return built


def pytest_configure() -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        build = getattr(torchvision.models, name)
        setattr(torchvision.models, name, _without_download(build))
    if os.environ[_WHOSE] == "ours":
        tp.importance.MagnitudeImportance = MagnitudeScores
        tp.importance.GroupMagnitudeImportance = MagnitudeScores


def fetch_tests(folder: Path) -> Path:
    """Download torch-pruning's source distribution and return its folder of tests."""
    wanted = f"torch-pruning=={VERSION}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*pip, wanted, "--dest", str(folder), "--quiet"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tests,) = folder.glob("*/tests")
    return tests


def run(tests: Path, whose: str) -> dict[str, str]:
    """Return the outcome of each test."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", str(tests), "--quiet", f"--junitxml={report}"]
        command += ["-p", Path(__file__).stem, "--continue-on-collection-errors"]
        if not torch.cuda.is_available():
            command += ["--ignore", str(tests / "test_benchmark.py")]
        here = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = os.environ | {_WHOSE: whose, "PYTHONPATH": here}
        with Path(scratch, "log").open("w") as log:
            subprocess.run(command, cwd=scratch, env=environment, stdout=log, check=False)
        outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            problem = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
            name = ".".join(filter(None, (case.get("classname"), case.get("name"))))
            outcomes[name] = (
                f"passed, {float(case.get('time', 0)):.0f} s"
                if problem is None
                else f"{problem.tag}: {(problem.get('message') or '').splitlines()[0][:100]}"
            )
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, help="torch-pruning's folder of tests")
    given = parser.parse_args().tests
    with tempfile.TemporaryDirectory() as folder:
        tests = given.resolve() if given else fetch_tests(Path(folder))
        stock, ours = run(tests, "stock"), run(tests, "ours")
    print(f"torch-pruning {VERSION}, torch {torch.__version__}\n")
    print("| test | stock | ours |\n| --- | --- | --- |")
    for name in sorted(stock | ours):
        print(f"| {name} | {stock.get(name, 'not run')} | {ours.get(name, 'not run')} |")
    for whose, outcomes in (("stock", stock), ("ours", ours)):
        passed = sum(outcome.startswith("passed") for outcome in outcomes.values())
        print(f"\n{whose}: {passed} of {len(outcomes)} pass")


if __name__ == "__main__":
    main()
