"""Cards that say how well a network of timm can be pruned, measured on random weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spamprune import artifact, models
from spamprune.errors import OutputError, PruningError
from spamprune.files import write_text
from spamprune.pruning import cost
from spamprune.pruning.compaction import Plan, apply, verify
from spamprune.pruning.notes import grouped
from spamprune.pruning.plan import Target, plan
from spamprune.pruning.units import DEFAULT_KINDS, KINDS, Kind
from spamprune.recipe import library
from spamprune.report import measure

#: Units inside of blocks: when only these go, mask and compacted network must agree even where
#: normalisation spans the channels of a residual stream.
INNER: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "width")
#: Largest difference of a network that agrees with its masked original.
AGREEMENT = 1e-4
#: A network is pruned in full when it loses this fraction of the ratio in parameters, or more.
FULL = 0.8


class Size(BaseModel):
    """Something measured on the dense and on the pruned network."""

    model_config = ConfigDict(extra="forbid")

    dense: int | float
    pruned: int | float
    remain: float  # the fraction


class Units(BaseModel):
    """Units of one kind, in all layers together."""

    model_config = ConfigDict(extra="forbid")

    layers: int
    units: int
    pruned: int


class Card(BaseModel):
    """How a network was pruned, and what was measured."""

    model_config = ConfigDict(extra="forbid")

    model: str
    family: str  # timm's module
    outcome: Literal["full", "partial", "unsupported"]
    command: str  # that measures it again
    ratio: float
    kinds: list[Kind]
    why: str | None = None  # it is unsupported
    parameters: Size | None = None
    macs: Size | None = None
    latency_ms: Size | None = None  # of one sample
    units: dict[Kind, Units] = {}
    left_whole: list[str] = []  # layers, each with the reason
    difference: float | None = None  # from the masked network, relative to the largest output
    must_agree: bool | None = None  # not where normalisation spans pruned units
    inner_difference: float | None = None  # the same when only units inside of blocks go
    trains: str | None = None  # that it does, or what happens
    reloads: str | None = None  # that it does, bit by bit, or what happens
    plan_seconds: float | None = None
    environment: dict[str, str] = {}


def check(name: str, *, ratio: float = 0.5, kinds: Sequence[Kind] = DEFAULT_KINDS) -> Card:
    """Prune a randomly initialised network of timm in every way that a card tells of.

    Weights that timm initialises to zero or one are disturbed, so that nothing agrees by chance.

    Args:
        name: The network.
        ratio: Fraction of units removed from each layer.
        kinds: Which kinds of units may go.

    Raises:
        ModelError: The network is unknown.
        PruningError: The ratio is no fraction below 1.
    """
    target = Target(ratio=ratio)
    model, example = disturbed(name)
    environment = measure.environment()
    options = "".join(f" --kinds {kind}" for kind in kinds if tuple(kinds) != DEFAULT_KINDS)
    card = Card(
        model=name,
        family=type(model).__module__.rpartition(".")[2],
        outcome="unsupported",
        command=f"spamprune zoo check {name} --ratio {ratio:g}{options}",
        ratio=ratio,
        kinds=list(kinds),
        environment={key: value for key, value in environment.items() if key in _ABOUT},
    )
    scores = {key: p.detach().square() for key, p in model.named_parameters()}
    start = time.perf_counter()
    try:
        chosen = plan(model, example, scores, target, kinds=kinds)
    except PruningError as error:
        return card.model_copy(update={"why": str(error)})
    card.plan_seconds = round(time.perf_counter() - start, 1)
    small = apply(model, chosen)
    pair = torch.cat([example, torch.randn_like(example)])
    card.parameters = _size(cost.params(model), cost.params(small))
    card.macs = _size(cost.macs(model, example), cost.macs(small, example))
    card.latency_ms = _size(*(_milliseconds(m, example) for m in (model, small)))
    card.units = _units(chosen)
    card.left_whole = grouped(note for note in chosen.notes if "at its minimum" not in note)
    card.must_agree = chosen.comparable
    card.difference = _difference(model, small, chosen, pair)
    card.inner_difference = _inner(model, scores, target, pair)
    card.reloads = _reloads(small, pair)
    card.trains = _trains(small, model, pair)
    card.outcome = _outcome(card)
    return card


def disturbed(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights, none of which is special, and one input for it.

    Raises:
        ModelError: The network is unknown.
    """
    torch.manual_seed(0)
    model = models.create(name)
    if getattr(model, "num_classes", None) == 0:  # without a head its outputs are its width
        model = models.create(name, num_classes=1000)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.abs().max() < 1e-3:
                parameter.add_(0.2 * torch.randn_like(parameter))
    settings = getattr(model, "default_cfg", None) or {}
    return model, torch.randn(1, *(settings.get("input_size") or (3, 224, 224)))


def cards(folder: Path | None = None) -> list[Card]:
    """Return the cards in a folder, by default those that come with spamprune.

    Raises:
        OutputError: One is damaged.
    """
    paths = sorted((folder or library.folder("zoo")).glob("*.yaml"))
    found = []
    for path in paths:
        try:
            found.append(Card.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
            reason = str(error).partition("\n")[0]
            raise OutputError(f"{path} is no card ({reason}): make it anew") from error
    return found


def as_text(card: Card) -> str:
    """Return a card in YAML, without what does not apply."""
    content = card.model_dump(exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def write(card: Card, path: Path) -> None:
    """Write a card, atomically."""
    write_text(path, as_text(card))


def _outcome(card: Card) -> Literal["full", "partial"]:
    assert card.parameters is not None
    apart = card.difference if card.must_agree else card.inner_difference
    full = (
        1 - card.parameters.remain >= FULL * card.ratio
        and (apart is None or apart <= AGREEMENT)
        and card.trains == _YES
        and card.reloads == _SAME
    )
    return "full" if full else "partial"


_ABOUT = ("python", "torch", "timm", "spamprune", "cpu", "threads")
_YES, _SAME = "forward and backward run", "bit-identical in a fresh process"


def _inner(
    model: nn.Module, scores: dict[str, Tensor], target: Target, batch: Tensor
) -> float | None:
    """Return the difference from the masked network where only units inside of blocks go."""
    try:
        chosen = plan(model, batch[:1], scores, target, kinds=INNER)
    except PruningError:  # there are none
        return None
    if not chosen.comparable:
        return None
    return _difference(model, apply(model, chosen), chosen, batch)


def _difference(model: nn.Module, small: nn.Module, chosen: Plan, batch: Tensor) -> float:
    return float(f"{verify(model, small, chosen, batch, tolerance=float('inf')):.1e}")


def _size(dense: float, pruned: float) -> Size:
    return Size(dense=dense, pruned=pruned, remain=round(pruned / dense, 4))


def _milliseconds(model: nn.Module, example: Tensor) -> float:
    return round(1000 * cost.latency(model, example), 2)


def _units(chosen: Plan) -> dict[Kind, Units]:
    """Return how many units there were of each kind, and how many went."""
    found: dict[Kind, Units] = {}
    for group in chosen.groups:
        kind = found.setdefault(group.kind, Units(layers=0, units=0, pruned=0))
        kind.layers += 1
        kind.units += group.units
        kind.pruned += len(group.pruned)
    return found


def _trains(small: nn.Module, model: nn.Module, batch: Tensor) -> str:
    """Return whether a forward and a backward pass in training mode work, else what happens."""
    failure = _backward(small, batch)
    if failure is None:
        return _YES
    if _backward(model, batch) is not None:
        return f"no more than the whole network: {failure}"
    return failure


def _backward(model: nn.Module, batch: Tensor) -> str | None:
    model.train()
    try:
        outputs = [y for y in _tensors(model(batch)) if y.is_floating_point()]
        torch.stack([y.square().sum() for y in outputs]).sum().backward()
    except Exception as error:  # a network may raise anything
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    finally:
        model.eval()
        model.zero_grad()
    return None


def _reloads(small: nn.Module, batch: Tensor) -> str:
    """Return whether another process gets the same outputs from the artifact, else what happens."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        artifact.save(small, Path(folder, "artifact"))
        save_file({"inputs": batch, **_named(small(batch))}, Path(folder, _TENSORS))
        code = "import sys; from spamprune.zoo import replay; replay(sys.argv[1], int(sys.argv[2]))"
        threads = str(torch.get_num_threads())
        done = subprocess.run(
            [sys.executable, "-c", code, folder, threads], capture_output=True, text=True
        )
    return _SAME if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


_TENSORS = "tensors.safetensors"


def replay(folder: str, threads: int) -> None:
    """Load the artifact in ``folder`` and compare its outputs bit by bit with those there.

    Raises:
        PruningError: They differ.
    """
    torch.set_num_threads(threads)
    tensors = load_file(Path(folder, _TENSORS))
    model = artifact.load(Path(folder, "artifact"))
    with torch.no_grad():
        again = _named(model(tensors.pop("inputs")))
    if again.keys() != tensors.keys() or not all(
        torch.equal(tensors[key], tensor) for key, tensor in again.items()
    ):
        raise PruningError("the outputs of the reloaded network differ")


def _named(outputs: object) -> dict[str, Tensor]:
    return {str(i): y.contiguous() for i, y in enumerate(_tensors(outputs))}


def _tensors(outputs: object) -> list[Tensor]:
    return [y for y in tree_leaves(outputs) if isinstance(y, Tensor)]
