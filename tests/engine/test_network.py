from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

import spamprune as sp
from spamprune import models
from spamprune.data import DataSet, load
from spamprune.engine import network
from spamprune.engine.bench import initial_model, load_data
from spamprune.errors import ArtifactError, DataError, ModelError
from spamprune.recipe.schema import Recipe
from tests.data.conftest import image_root  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def digits() -> DataSet:
    return load("digits")


def test_a_random_network_fits_the_data_and_depends_on_the_seed(digits: DataSet) -> None:
    first, again, other = (
        network.find("test_resnet", digits, random=True, seed=seed).model for seed in (1, 1, 2)
    )
    assert network.fit_data(network.Network(first), digits) is digits
    state = first.state_dict()
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in state.items())
    assert not torch.equal(state["fc.weight"], other.state_dict()["fc.weight"])
    source = models.source_of(first)
    assert source is not None
    assert source.kwargs == {"num_classes": 10, "in_chans": 1}


def test_weights_come_from_a_safetensors_file(digits: DataSet, tmp_path: Path) -> None:
    model = models.create("test_resnet", num_classes=10, in_chans=1)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    found = network.find("test_resnet", digits, weights=path)
    assert all(
        torch.equal(tensor, found.model.state_dict()[key])
        for key, tensor in model.state_dict().items()
    )
    colour = replace(digits, shape=(3, 8, 8))
    with pytest.raises(ModelError, match=r"'conv1.0.weight' is \(16, 1, 3, 3\) there, \(16, 3"):
        network.find("test_resnet", colour, weights=path)
    incomplete = {k: t for k, t in model.state_dict().items() if k != "fc.bias"}
    save_file(incomplete, path)
    with pytest.raises(ModelError, match=r"'fc\.bias' is missing there"):
        network.find("test_resnet", digits, weights=path)
    path.write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be read"):
        network.find("test_resnet", digits, weights=path)


def test_pretrained_weights_are_timm_s_from_safetensors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image_root: Path,  # noqa: F811
) -> None:
    torch.manual_seed(3)
    weights = models.create("test_resnet").state_dict()
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    data = load("image_folder", root=image_root)
    with pytest.raises(ModelError, match="tells 1000 classes apart, and image_folder has 2"):
        network.find("test_resnet", data)
    found = network.find("test_resnet", replace(data, classes=1000))
    assert asked[0] == ("timm/test_resnet.r160_in1k", "model.safetensors")
    assert (found.base_model, found.licence) == ("timm/test_resnet.r160_in1k", "apache-2.0")
    assert torch.equal(found.model.state_dict()["fc.weight"], weights["fc.weight"])


def test_what_cannot_be_downloaded_names_the_way_out(
    digits: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: str) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ModelError, match=r"\(no network\): give --weights .*--random") as caught:
        network.find("resnet10t", digits)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no pretrained weights of 'lenet'"):
        network.find("lenet", digits)


def test_an_artifact_brings_its_weights(digits: DataSet, tmp_path: Path) -> None:
    model = models.create("test_resnet", num_classes=10, in_chans=1)
    folder = tmp_path / "a"
    sp.save(model, folder, base_model="owner/name", licence="mit")
    found = network.find(str(folder), digits)
    assert (found.base_model, found.licence) == ("owner/name", "mit")
    assert torch.equal(found.model.state_dict()["fc.weight"], model.state_dict()["fc.weight"])
    with pytest.raises(ModelError, match="weights of its own"):
        network.find(str(folder), digits, random=True)
    with pytest.raises(ArtifactError, match="is missing"):
        network.find("no/where", digits)


def test_images_are_prepared_as_the_network_says(image_root: Path) -> None:  # noqa: F811
    data = load("image_folder", root=image_root)
    found = network.find("test_vit", data, random=True)
    fitting = network.fit_data(found, data)
    assert fitting.shape == (3, 160, 160)
    assert fitting.preprocessing is not None
    assert fitting.preprocessing["crop_pct"] == 0.95
    grey = network.Network(models.create("test_resnet", num_classes=2, in_chans=1))
    with pytest.raises((DataError, ModelError)):
        network.fit_data(grey, data)


def test_what_is_wrong_is_named(digits: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="unknown model"):
        network.find("resnett", digits)
    with pytest.raises(ModelError, match="choose one"):
        network.find("test_resnet", digits, random=True, weights=tmp_path)
    with pytest.raises(ModelError, match="does not fit"):
        network.fit_data(network.Network(models.create("lenet")), digits)


def test_a_recipe_starts_from_a_safetensors_file(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = models.create("test_resnet", num_classes=7, in_chans=1)
    path = tmp_path / "w.safetensors"
    save_file(model.state_dict(), path)
    same = network.start("test_resnet", {"num_classes": 7, "in_chans": 1}, str(path))
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in same.state_dict().items())
    kwargs = {"num_classes": 10, "in_chans": 1}
    torch.manual_seed(5)
    fresh = models.create("test_resnet", **kwargs)
    torch.manual_seed(5)
    other = network.start("test_resnet", kwargs, str(path))
    for key, tensor in other.state_dict().items():
        wanted = fresh if key.startswith("fc.") else model
        assert torch.equal(tensor, wanted.state_dict()[key]), key
    with pytest.raises(ModelError, match=r"conv1\.0\.weight' is \(16, 1, 3, 3\) there"):
        network.start("test_resnet", {"num_classes": 10}, str(path))
    with pytest.raises(ModelError, match=r"no\.safetensors cannot be read"):
        network.start("test_resnet", kwargs, str(tmp_path / "no.safetensors"))
    torch.save(model.state_dict(), tmp_path / "pickle.bin")
    with pytest.raises(ModelError, match=r"pickle\.bin cannot be read"):
        network.start("test_resnet", kwargs, str(tmp_path / "pickle.bin"))


def test_a_recipe_starts_from_an_artifact(tmp_path: Path) -> None:
    model = models.create("lenet")
    sp.save(model, tmp_path / "a")
    same = network.start("lenet", {"num_classes": 3}, str(tmp_path / "a")).state_dict()
    head = [key for key, tensor in same.items() if tensor.shape[0] == 3]
    assert len(head) == 2
    assert all(torch.equal(same[k], t) for k, t in model.state_dict().items() if k not in head)
    with pytest.raises(ArtifactError, match="is missing"):
        network.start("lenet", {}, str(tmp_path))


def test_published_weights_are_adapted_to_classes_and_channels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    weights = models.create("test_resnet").state_dict()
    path = tmp_path / "model.safetensors"
    save_file(weights, path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(path))
    found = network.start("test_resnet", {"num_classes": 10, "in_chans": 1}, "pretrained")
    state = found.state_dict()
    assert state["fc.weight"].shape[0] == 10
    torch.testing.assert_close(state["conv1.0.weight"], weights["conv1.0.weight"].sum(1, True))
    rest = [k for k in state if not k.startswith(("fc.", "conv1.0."))]
    assert all(torch.equal(state[k], weights[k]) for k in rest)
    assert models.source_of(found) == models.Source(
        "test_resnet", {"num_classes": 10, "in_chans": 1}
    )


def test_published_weights_that_may_be_pickles_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(*_: str) -> str:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    settings = get_pretrained_cfg("test_resnet")
    pickled = replace(settings, hf_hub_filename="open_clip_pytorch_model.bin")
    monkeypatch.setattr("timm.models.get_pretrained_cfg", lambda _: pickled)
    with pytest.raises(ModelError, match=r"\.bin, which may hold pickles: give model\.weights"):
        network.start("test_resnet", {}, "pretrained")


def test_a_recipe_s_folder_of_images_is_prepared_for_published_weights(
    image_root: Path,  # noqa: F811
) -> None:
    def of(weights: str | None) -> DataSet:
        return load_data(
            Recipe.model_validate(
                {
                    "name": "transfer",
                    "data": {
                        "name": "image_folder",
                        "root": str(image_root),
                        "image_size": 64,
                        "validation": 0,
                    },
                    "model": {"name": "vit_tiny_patch16_224", "weights": weights},
                    "train": {"map": {"method": "map"}},
                }
            )
        )

    fresh, published = of(None).preprocessing, of("pretrained").preprocessing
    assert fresh is not None
    assert published is not None
    assert published["input_size"] == fresh["input_size"] == (3, 64, 64)
    assert published["mean"] == (0.5, 0.5, 0.5)
    assert published["crop_pct"] == 0.9


@pytest.mark.parametrize("weights", [None, "pretrained"])
def test_arguments_cannot_name_weights(weights: str | None) -> None:
    found = Recipe.model_validate(
        {
            "name": "transfer",
            "data": {"name": "digits"},
            "model": {"name": "resnet18", "kwargs": {"pretrained": True}, "weights": weights},
            "train": {"map": {"method": "map"}},
        }
    )
    with pytest.raises(ModelError, match=r"model\.kwargs has 'pretrained'.*model\.weights"):
        initial_model(found, 0)
