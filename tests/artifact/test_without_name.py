"""Networks of a user's class: what an artifact does not hold is refused or compared, never lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import is_parametrized
from torchmetrics.classification import MulticlassAccuracy

from spamprune.artifact import load, read_config, save
from spamprune.errors import ArtifactError
from tests.artifact.cases import Net, assert_same, edit

X = (4, 4)


class Holder(nn.Module):
    """A layer, and attributes by name."""

    def __init__(self, **attributes: Any):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        for key, value in attributes.items():
            setattr(self, key, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward_twice(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Fourier(nn.Module):
    """Random features, not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.randn(2, 16)
        self.inner = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.table
        return self.inner(torch.cat([phase.sin(), phase.cos()], -1))


class Mode(Enum):
    FIRST = 1
    SECOND = 2


@dataclass
class Settings:
    act: str = "relu"
    table: Any = None


class ByClass(Holder):
    act = "relu"


class Stateful(Holder):
    def get_extra_state(self) -> object:
        return {"scale": 2.0}


def made(**attributes: Any) -> Callable[[], nn.Module]:
    return partial(Holder, **attributes)


# -- refused when they are saved without a factory


def _hook(model: nn.Module) -> None:
    model.inner.register_forward_hook(lambda *_: None)


def _pre_hook(model: nn.Module) -> None:
    model.inner.register_forward_pre_hook(lambda *_: None)


def _wrap(model: nn.Module) -> None:
    forward = model.inner.forward
    model.inner.forward = lambda x: 2 * forward(x)


def _swap_methods(model: nn.Module) -> None:
    model.forward = model.inner.forward


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_hook, "'inner' has forward hooks, which are code"),
        (_pre_hook, "'inner' has forward hooks, which are code"),
        (_wrap, "'inner' has its own 'forward', which is code"),
        (_swap_methods, "'the model' has its own 'forward', which is code"),
    ],
)
def test_code_added_later_is_refused(
    change: Callable[[nn.Module], None], words: str, tmp_path: Path
) -> None:
    model = Holder()
    change(model)
    with pytest.raises(ArtifactError, match=words):
        save(model, tmp_path / "net")
    assert list(tmp_path.iterdir()) == []


def test_plain_tensors_and_hidden_parameters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"'table' of 'the model' is a plain tensor.*buffer"):
        save(Fourier(), tmp_path / "net")
    for hidden in ([nn.Linear(2, 2)], {"w": nn.Parameter(torch.zeros(1))}):
        with pytest.raises(ArtifactError, match=r"'layers'.*nn.ModuleList"):
            save(Holder(layers=hidden), tmp_path / "net")


@pytest.mark.parametrize("by", [None, "factory"])
def test_metrics_of_a_training_module_say_nothing_of_it(by: str | None, tmp_path: Path) -> None:
    def factory() -> nn.Module:
        return Holder(accuracy=MulticlassAccuracy(4))

    model = factory()
    model.accuracy(model(torch.randn(*X)), torch.arange(4))  # which keeps what it has seen
    save(model, tmp_path / "a", factory=factory if by else None)
    assert_same(load(tmp_path / "a", factory=factory), model, X)


def test_extra_state_is_refused(tmp_path: Path) -> None:
    for factory in (None, Stateful):
        with pytest.raises(ArtifactError, match=r"get_extra_state.*buffers"):
            save(Stateful(), tmp_path / "net", factory=factory)


# -- compared with what the factory builds

PAIRS: list[tuple[str, Any, Any]] = [
    ("text", "gelu", "relu"),
    ("none", None, "relu"),
    ("filled", "relu", None),
    ("dict", {"k": 3.0}, {"k": 1.0}),
    ("nested", {"k": [{"x": 3.0}]}, {"k": [{"x": 1.0}]}),
    ("key", {1: "x"}, {"1": "x"}),
    ("set", {1, 2}, {1, 3}),
    ("enum", Mode.FIRST, Mode.SECOND),
    ("function", F.relu, F.gelu),
    ("partial", partial(F.softmax, dim=0), partial(F.softmax, dim=1)),
    ("class", nn.ReLU, nn.GELU),
    ("dataclass", Settings("gelu"), Settings("relu")),
    ("object", Settings(), object()),
    ("dtype", torch.float16, torch.float32),
    ("tensors", [torch.ones(3)], [torch.zeros(3)]),
    ("integers", {"x": torch.tensor([1, 2])}, {"x": torch.tensor([2, 1])}),
    ("array", np.arange(3), np.arange(1, 4)),
    ("long", "x" * 500, "x" * 499 + "y"),
    ("infinite", float("-inf"), float("inf")),
]


@pytest.mark.parametrize(("saved", "built"), [p[1:] for p in PAIRS], ids=[p[0] for p in PAIRS])
def test_changed_attributes_are_refused(saved: Any, built: Any, tmp_path: Path) -> None:
    model, other = Holder(value=saved), made(value=built)
    with pytest.raises(ArtifactError, match=r"'the model' has value = .*, built with"):
        save(model, tmp_path / "net", factory=other)
    folder = save(model, tmp_path / "net")
    assert_same(model, load(folder, factory=made(value=saved)), X)
    # none can tell whether the network computes with it, so it is said and not refused
    with pytest.warns(UserWarning, match=r"has value = .* in 'the model', the model built has"):
        load(folder, factory=other)
    folder = save(model, tmp_path / "net", factory=made(value=saved))
    with pytest.warns(UserWarning, match=r"has value = .* in 'the model', the model built has"):
        load(folder, factory=other)


def test_attributes_of_torch_and_of_the_class(tmp_path: Path) -> None:
    folder = save(nn.Sequential(nn.GELU("tanh")), tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"approximate = 'tanh' in '0'.*has 'none'"):
        load(folder, factory=lambda: nn.Sequential(nn.GELU()))
    model = ByClass(act="gelu")
    with pytest.raises(ArtifactError, match="has act = 'gelu', built with 'relu'"):
        save(model, tmp_path / "act", factory=ByClass)
    with pytest.warns(UserWarning, match=r"act = text \w{16} in 'the model'.*has text"):
        load(save(model, tmp_path / "act"), factory=ByClass)


def test_what_is_not_for_others_is_not_in_the_file(tmp_path: Path) -> None:
    model = Holder(token="hunter2", settings={"password": ["hunter2"]}, raw=b"hunter2")
    folder = save(model, tmp_path / "net")
    content = (folder / "config.json").read_text()
    assert "hunter2" not in content
    assert "password" not in content


def test_containers_filled_since_they_were_built_are_no_difference(tmp_path: Path) -> None:
    factory = made(history={}, seen=[])
    model = Holder(history={"loss": [0.3]}, seen=[{"step": 1}])
    for by in (None, factory):
        assert_same(model, load(save(model, tmp_path / "net", factory=by), factory=factory), X)


def test_what_cannot_be_read_is_known_by_its_class(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle["itself"] = circle
    model = Holder(circle=circle, array=np.zeros(2, ">f4"))
    factory = made(circle=circle, array=np.zeros(2, ">f4"))
    assert_same(model, load(save(model, tmp_path / "net"), factory=factory), X)


def test_class_attributes_are_set_but_for_those_of_all_modules(tmp_path: Path) -> None:
    class Counting(Holder):
        calls = 0

    model = Counting()
    model.calls = 2
    for by in (None, Counting):
        folder = save(model, tmp_path / "net", factory=by)
        assert load(folder, factory=Counting).calls == 2
    edit(folder, lambda config: config["attributes"][""].update(_version=7))
    with pytest.raises(ArtifactError, match="sets '_version' of 'the model' to 7, but"):
        load(folder, factory=Counting)


def test_modes_say_nothing(tmp_path: Path) -> None:
    class Phased(Holder):
        def train(self, mode: bool = True) -> nn.Module:
            self.phase = "train" if mode else "eval"
            return super().train(mode)

    def factory() -> nn.Module:
        return Phased().train()

    for model in (factory(), factory().eval()):
        assert_same(model, load(save(model, tmp_path / "net"), factory=factory), X)


def test_a_hook_of_the_factory_alone_is_refused(tmp_path: Path) -> None:
    def hooked() -> nn.Module:
        model = Holder()
        _hook(model)
        return model

    folder = save(Holder(), tmp_path / "net")
    with pytest.raises(ArtifactError, match=r"_forward_hooks = \[\] in 'inner'.*<lambda>"):
        load(folder, factory=hooked)
    model = hooked()
    assert_same(model, load(save(model, tmp_path / "on", factory=hooked), factory=hooked), X)


# -- not refused


class OwnCode(Holder):
    """Hooks, methods and attributes that the class itself brings along."""

    def __init__(self, twice: bool = True):
        super().__init__(norm=nn.LayerNorm, device=torch.device("cpu"), act=lambda x: x.exp())
        self.inner.register_forward_hook(self._shift)
        self.inner.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
        if twice:
            self.forward = self.forward_twice

    def _shift(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.act(output)


class Caching(Holder):
    """A table that is made at the first call."""

    def __init__(self) -> None:
        super().__init__(cache={})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.cache.setdefault("scale", torch.full((4,), 3.0))


def test_what_classes_bring_along(tmp_path: Path) -> None:
    model = OwnCode()
    folder = save(model, tmp_path / "own")
    assert_same(model, load(folder, factory=OwnCode), X)
    with pytest.raises(ArtifactError, match="forward = function forward_twice"):
        load(folder, factory=partial(OwnCode, twice=False))
    model = Caching()
    model(torch.zeros(X))
    assert_same(model, load(save(model, tmp_path / "cache"), factory=Caching), X)
    assert_same(model, load(save(model, tmp_path / "two", factory=Caching), factory=Caching), X)
    model = Holder(table=torch.arange(3))
    again = made(table=torch.arange(3))
    assert_same(model, load(save(model, tmp_path / "net", factory=again), factory=again), X)
    model.name = "of a run"
    model.compile()  # adds an attribute
    save(model, tmp_path / "net", factory=again)
    del model.table
    save(model, tmp_path / "net")
    load(tmp_path / "net", factory=again)


class Recurrent(nn.Module):
    def __init__(self, width: int = 6):
        super().__init__()
        self.lstm = nn.LSTM(4, width, num_layers=2, bidirectional=True)
        self.attention = nn.MultiheadAttention(2 * width, 2)
        self.layer = nn.TransformerEncoderLayer(2 * width, 2, 8, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        return self.layer(self.attention(x, x, x)[0])


@pytest.mark.parametrize("factory", [None, Recurrent])
def test_lstm_and_attention(factory: Callable[[], nn.Module] | None, tmp_path: Path) -> None:
    model = Recurrent()
    assert_same(model, load(save(model, tmp_path / "net", factory=factory), factory=Recurrent), X)
    narrow = Recurrent(4)
    assert_same(narrow, load(save(narrow, tmp_path / "net"), factory=Recurrent), X)


class Listing(nn.Module):
    """Parameters and buffers that are used by way of other attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.randn(4))
        self.weights = [self.inner.weight, {"bias": (self.inner.bias,)}]
        self.again = self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights[0] + self.weights[1]["bias"][0] * self.again


@pytest.mark.parametrize("factory", [None, Listing])
def test_attributes_that_hold_parameters(
    factory: Callable[[], nn.Module] | None, tmp_path: Path
) -> None:
    model = Listing()
    loaded = load(save(model, tmp_path / "net", factory=factory), factory=Listing)
    assert_same(model, loaded, X)
    assert loaded.weights[0] is loaded.inner.weight


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 4))


def _old_weight_norm() -> nn.Module:
    return nn.utils.weight_norm(nn.Linear(4, 4))


def _spectral_norm() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(4, 4))


def _old_spectral_norm() -> nn.Module:
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def _orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(4, 4))


def _masked() -> nn.Module:
    return prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)


WRAPS = [
    *(_weight_norm, _old_weight_norm, _spectral_norm, _old_spectral_norm, _orthogonal),
    _masked,
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("with_factory", [False, True])
@pytest.mark.parametrize("layer", WRAPS)
def test_parametrizations_and_norms(
    layer: Callable[[], nn.Module], with_factory: bool, tmp_path: Path
) -> None:
    def factory() -> nn.Module:
        return nn.Sequential(layer(), nn.ReLU())

    model = factory()
    model(torch.randn(X))
    folder = save(model, tmp_path / "net", factory=factory if with_factory else None)
    assert_same(model, load(folder, factory=factory), X)


def test_parametrizations_that_differ(tmp_path: Path) -> None:
    assert is_parametrized(_weight_norm())
    with pytest.raises(ArtifactError, match="is ParametrizedLinear, not Linear as built"):
        save(_weight_norm(), tmp_path / "net", factory=lambda: nn.Linear(4, 4))
    with pytest.raises(ArtifactError, match=r"weight.0' is _WeightNorm, not _SpectralNorm"):
        save(_weight_norm(), tmp_path / "net", factory=_spectral_norm)
    convolution = partial(parametrizations.weight_norm, nn.Conv1d(4, 4, 1))
    with pytest.raises(ArtifactError, match="is ParametrizedLinear, not ParametrizedConv1d"):
        save(_weight_norm(), tmp_path / "net", factory=convolution)


def test_version_2_still_loads(tmp_path: Path) -> None:
    model = Net()
    folder = save(model, tmp_path / "net")
    assert read_config(folder).facts is not None

    def age(config: dict[str, Any]) -> None:
        del config["facts"]
        config["version"] = 2

    edit(folder, age)
    assert_same(model, load(folder, factory=Net), (3, 4))
