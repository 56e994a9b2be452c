import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spamprune import scores
from spamprune.bayes.curvature import Curvature
from spamprune.bayes.curvature.blocks import Kronecker
from spamprune.bayes.posterior import load_posterior, posterior_from
from spamprune.bayes.prior import Prior
from spamprune.errors import PosteriorError
from tests.bayes.reference import kronecker


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def posterior(model, prior="unitwise"):
    """A Kronecker layer, a diagonal one, and a normalisation that the curvature leaves out."""
    outputs, inputs, bias = (torch.randn(1, n, 8) for n in (4, 3, 4))
    kron = {
        "0.weight": Kronecker(outputs @ outputs.mT, inputs @ inputs.mT, (4, 3)),
        "0.bias": Kronecker(bias @ bias.mT, None, (4,)),
    }
    diag = {name: block.diag for name, block in kron.items()}
    diag |= {"2.weight": torch.rand(2, 4), "2.bias": torch.rand(2)}
    curvature = Curvature(
        diag,
        loss=3.5,
        n_data=20,
        labels="ggn",
        estimator="kron",
        kron=kron,
        how={"0.weight": "kron: linear", "0.bias": "kron: linear", "2.weight": "exact: linear"},
        error={"2.bias": 0.25},
    )
    prior = Prior(model, prior, 0.5)
    for factor in prior.factors():
        factor.add_(torch.randn_like(factor))
    return posterior_from(model, curvature, prior, 2.0)


def test_precision_is_of_each_parameter_s_own_kind():
    fitted = posterior(network())
    precision, delta = fitted.precision(), fitted.prior_precision
    dense = kronecker(fitted.curvature.kron["0.weight"], delta["0.weight"].double(), 2.0)
    torch.testing.assert_close(
        precision["0.weight"].double(), dense.diagonal().reshape(4, 3), rtol=1e-5, atol=1e-5
    )
    expected = fitted.curvature.diag["2.weight"] / 2 + delta["2.weight"]
    torch.testing.assert_close(precision["2.weight"], expected)
    assert torch.equal(precision["1.weight"], delta["1.weight"])
    assert list(precision) == [name for name, _ in network().named_parameters()]


def test_coverage_tells_of_every_parameter():
    assert posterior(network()).coverage() == {
        "0.weight": "kron: linear",
        "0.bias": "kron: linear",
        "1.weight": "excluded: prior precision only",
        "1.bias": "excluded: prior precision only",
        "2.weight": "exact: linear",
        "2.bias": "kron",
    }


def test_a_posterior_with_kronecker_factors_survives_its_file(tmp_path):
    model = network()
    fitted = posterior(model)
    fitted.save(tmp_path / "p.safetensors")
    loaded = load_posterior(tmp_path / "p.safetensors")
    loaded.check(model)
    assert loaded.coverage() == fitted.coverage()
    for key in ("loss", "n_data", "labels", "estimator", "how", "error"):
        assert getattr(loaded.curvature, key) == getattr(fitted.curvature, key)
    assert (loaded.temperature, loaded.log_evidence) == (fitted.temperature, fitted.log_evidence)
    for name, precision in fitted.precision().items():
        assert torch.equal(loaded.precision()[name], precision)
    assert loaded.curvature.kron.keys() == fitted.curvature.kron.keys()
    assert loaded.curvature.kron["0.bias"].inputs is None


def test_a_posterior_from_a_file_follows_the_network_to_its_device():
    """On tensors that only pretend to be on a GPU, whose devices are checked all the same."""
    found = posterior(network())
    assert found.on(network()) is found
    with FakeTensorMode(allow_non_fake_inputs=True):
        away = nn.Sequential(
            nn.Linear(3, 4, device="cuda"),
            nn.LayerNorm(4, device="cuda"),
            nn.Linear(4, 2, device="cuda"),
        )
        moved = found.on(away)
        tensors = [*moved.prior_precision.values(), *moved.curvature.diag.values()]
        tensors += [block.outputs for block in moved.curvature.kron.values()]
        assert {t.device.type for t in tensors} == {"cuda"}
        for score in (scores.opd, scores.obd):
            assert {t.device.type for t in score(away, found).values()} == {"cuda"}
    with pytest.raises(PosteriorError, match="lacks parameter"):
        found.on(nn.Sequential(*network(), nn.Linear(2, 2)))


def test_files_of_older_versions_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    posterior(network()).save(path)
    tensors = load_file(path)
    save_file(tensors, path, {"format": "spamprune-posterior-1", "posterior": "{}"})
    with pytest.raises(PosteriorError, match="no posterior of this version"):
        load_posterior(path)
    about = {"temperature": 1.0, "log_evidence": 0.0, "loss": 0.0, "n_data": 1}
    about |= {"labels": "ef", "estimator": "kron", "how": {}, "error": {}}
    del tensors["curvature/0.weight"]
    metadata = {"format": "spamprune-posterior-2", "posterior": json.dumps(about)}
    save_file(tensors, path, metadata)
    with pytest.raises(PosteriorError, match="damaged"):
        load_posterior(path)


def test_excluded_parameters_score_by_their_prior():
    model = network()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    fitted = posterior(model)
    square = model[1].weight.detach().square()
    torch.testing.assert_close(
        scores.opd(model, fitted)["1.weight"], fitted.prior_precision["1.weight"] * square
    )
    assert torch.equal(scores.obd(model, fitted)["1.weight"], torch.zeros(4))
    expected = 0.5 * fitted.curvature.diag["0.weight"] * model[0].weight.detach().square()
    torch.testing.assert_close(scores.obd(model, fitted)["0.weight"], expected)
