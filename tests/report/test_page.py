from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from safetensors.torch import save_file

from spamprune.bayes.curvature import Curvature
from spamprune.bayes.posterior import Posterior
from spamprune.errors import OutputError
from spamprune.report.page import write
from spamprune.report.results import Results, write_results
from spamprune.report.tables import masked_table

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_results: Callable[..., Results]) -> Path:
    """Return a run's folder with everything that a page can show, and its page."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    results = make_results()
    write_results(folder, results)
    (folder / "recipe.yaml").write_text("name: lenet_fmnist  # <recipe>\n", encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv1.weight": (6, 1, 5, 5), "conv1.bias": (6,), "fc.weight": (84, 120)}
    delta = {name: torch.rand(shape, generator=generator) + 0.01 for name, shape in shapes.items()}
    for cell in results.cells[::2]:
        prior = delta if cell.method == "spam" else {n: torch.ones(s) for n, s in shapes.items()}
        h = {name: d.clone() for name, d in delta.items()}
        curvature = Curvature(h, loss=1.0, n_data=10, labels="ef", estimator="sketch")
        (folder / cell.folder).mkdir(parents=True)
        Posterior(curvature, prior, 1.0, -1.0).save(folder / cell.folder / "posterior.safetensors")
    weight = torch.randn(6, 1, 5, 5, generator=generator)
    masked = weight.clone()
    masked[:3] = 0
    bank = {"dense/conv1": weight, "masked/conv1": masked, "compacted/conv1": masked[3:].clone()}
    (folder / "figures").mkdir()
    save_file(bank, folder / "figures" / "filter_banks.safetensors")
    write(folder)
    return folder


def test_page_says_what_was_measured(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "with &lt;tags&gt; &amp; ampersands" in page
    assert "A &amp; B &lt;processor&gt;" in page
    assert "# &lt;recipe&gt;" in page
    # by the fixture's numbers, 10 % of the parameters keep within a point
    assert "Structured: 10.0× fewer bytes and 7.9× fewer MACs at" in page
    assert "sp.load(&#x27;cells/spam-unitwise-0/artifacts/" in page
    figures = {path.stem for path in (run / "figures").glob("*.svg")}
    assert figures == {
        "training",
        "unstructured-0-pruned",
        "unstructured-0-finetuned",
        "finetuning-0",
        "structured-1",
        "precisions",
        "filter_banks",
    }
    assert not list(run.rglob("*.partial"))


def test_page_is_the_same_twice(run: Path) -> None:
    first = (run / "report.html").read_bytes()
    assert write(run).read_bytes() == first


def test_page_without_pruning(tmp_path: Path, make_results: Callable[..., Results]) -> None:
    write_results(tmp_path, make_results({"a": "map"}, 1, masked=False, compacted=False))
    page = write(tmp_path).read_text(encoding="utf-8")
    assert "Unpruned networks" in page
    assert "Structured" not in page
    assert "Parameters</h2>" not in page


@pytest.mark.usefixtures("blank_figures")
def test_page_of_a_pruning_that_failed(
    tmp_path: Path, make_results: Callable[..., Results]
) -> None:
    results = make_results(seeds=1)
    for cell in results.cells:
        cell.dense.accuracy = 99.0
    write_results(tmp_path, results)
    page = write(tmp_path).read_text(encoding="utf-8")
    assert "No smaller network stays within 1 point" in page
    assert "No mask stays within 1 point" in page


def test_best_of_each_column(make_results: Callable[..., Results]) -> None:
    results = make_results(seeds=1)
    for metric in ("accuracy", "nll"):
        table = masked_table(results, 0, "pruned", metric).html()
        row = next(r for r in table.split("<tr>") if "spam-unitwise" in r and ">opd<" in r)
        assert row.count('class="best"') == 6
        other = next(r for r in table.split("<tr>") if ">map<" in r and ">magnitude<" in r)
        assert 'class="best"' not in other


def test_without_results(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"results\.json"):
        write(tmp_path)


def test_without_cells(tmp_path: Path, make_results: Callable[..., Results]) -> None:
    write_results(tmp_path, make_results({}))
    with pytest.raises(OutputError, match="no training"):
        write(tmp_path)


@pytest.mark.usefixtures("blank_figures")
def test_damaged_filter_banks(run: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(run, tmp_path / "damaged")
    path = damaged / "figures" / "filter_banks.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(OutputError, match="filter_banks"):
        write(damaged)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("needs a Chromium to look at the page")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium") / "profile",
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu"],
        )
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(
    run: Path, browser: BrowserContext, width: int, scheme: Literal["light", "dark"]
) -> None:
    page_path = run / "report.html"
    problems: list[str] = []
    requests: list[str] = []
    page = browser.new_page()
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    pictures = page.locator("svg, img")
    boxes = [pictures.nth(i).bounding_box() for i in range(pictures.count())]
    visible = [pictures.nth(i).is_visible() for i in range(pictures.count())]
    widths = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    page.close()
    assert problems == []
    # a picture inside a figure is part of the file
    assert [url for url in requests if not url.startswith("data:")] == [page_path.as_uri()]
    assert len(boxes) == 7
    assert all(visible)
    assert all(box and box["width"] > 300 and box["height"] > 100 for box in boxes)
    assert widths[0] == widths[1]
    assert len(ids) == len(set(ids))
