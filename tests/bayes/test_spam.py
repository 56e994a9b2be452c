import copy
import pickle

import pytest
import timm.optim
import torch
import torch.nn.functional as F
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.likelihood import Regression
from spamprune.bayes.posterior import fit_posterior, load_posterior
from spamprune.bayes.prior import Prior
from spamprune.bayes.spam import SpaM
from spamprune.errors import PosteriorError


def problem(n=64):
    torch.manual_seed(0)
    inputs = torch.randn(n, 5)
    targets = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    return model, [(inputs, targets)]


def optimisers(parameters):
    return {
        "sgd": torch.optim.SGD(parameters, lr=0.3),
        "momentum": torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
        "nesterov": torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True),
        "adam": torch.optim.Adam(parameters, lr=0.003),
        "amsgrad": torch.optim.Adam(parameters, lr=0.02, amsgrad=True),
        "adamp": timm.optim.AdamP(parameters, lr=0.003),
    }


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov", "adam", "amsgrad", "adamp"])
def test_shrinking_settles_where_the_penalised_loss_is_stationary(name):
    model, [(inputs, targets)] = problem()
    spam = SpaM(model, 64, prior="unitwise", precision=5.0, burn_in=None)
    spam.prior.factors()[0].add_(torch.linspace(-1, 1, 8)[:, None])
    spam.load_state_dict(spam.state_dict())  # strengths follow the changed prior
    optimizer = optimisers(list(model.parameters()))[name]
    for step in range(4000):
        optimizer.param_groups[0]["lr"] *= 0.998 if step > 2000 else 1
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        spam.shrink(optimizer)
    loss = F.cross_entropy(model(inputs), targets) + spam.penalty()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 2e-3


def test_shrinking_is_stable_for_any_precision():
    model, [(inputs, targets)] = problem()
    spam = SpaM(model, 64, precision=1e9, burn_in=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(50):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        spam.shrink(optimizer)
    assert all(p.abs().max() < 1e-4 for p in model.parameters())


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Rprop,
        torch.optim.Adamax,
        lambda p: torch.optim.RMSprop(p, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.9),
        torch.optim.RAdam,
        *(timm.optim.get_optimizer_class(n) for n in ("adopt", "radam", "lars", "novograd")),
        *(timm.optim.get_optimizer_class(n, bind_defaults=False) for n in ("muon", "radamlegacy")),
        lambda p: timm.optim.create_optimizer_v2(list(p), opt="lookahead_adamw", lr=0.1),
    ],
)
def test_shrink_refuses_an_optimiser_whose_step_it_does_not_know(make):
    model, [(inputs, targets)] = problem()
    optimizer = make(model.parameters())
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    with pytest.raises(PosteriorError, match=rf"{type(optimizer).__name__}.*penalty"):
        SpaM(model, 64).shrink(optimizer)


def test_shrink_refuses_an_optimiser_of_other_parameters():
    model, _ = problem()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(PosteriorError, match="moves none of the model's parameters"):
        SpaM(model, 64).shrink(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shrink_refuses_numbers_that_round_it_to_nothing(dtype):
    model = nn.Sequential(nn.Linear(4, 4).to(dtype))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(PosteriorError, match=rf"0\.weight is {dtype}, in which .* penalty\(\)"):
        SpaM(model, 100).shrink(optimiser)


def test_shrink_leaves_alone_what_adam_has_not_stepped_yet():
    model, [(inputs, _)] = problem()
    optimizer = torch.optim.Adam(model.parameters())
    model[0](inputs).sum().backward()
    optimizer.step()
    before = [p.clone() for p in model.parameters()]
    SpaM(model, 64, precision=100.0).shrink(optimizer)
    moved = [not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, False]
    assert len(optimizer.state) == 2


def test_the_penalty_is_the_formula():
    model, _ = problem()
    spam = SpaM(model, 64, prior="scalar", precision=3.0, temperature=2.0)
    expected = 2.0 * 0.5 * 3.0 * sum(p.square().sum() for p in model.parameters()) / 64
    torch.testing.assert_close(spam.penalty(), expected)


def test_updates_come_when_they_are_due():
    model, loader = problem()
    spam = SpaM(model, 64, burn_in=2, every=3, last=9, steps=5)
    due = [epoch for epoch in range(1, 15) if spam.update(epoch, loader) is not None]
    assert due == [3, 6, 9]
    assert SpaM(model, 64, burn_in=None).update(5, loader) is None


@pytest.mark.parametrize("update", ["adam", "exact", "mackay"])
def test_an_update_raises_the_evidence_and_changes_the_penalty(update):
    model, loader = problem()
    spam = SpaM(model, 64, prior="parameterwise", update=update, every=1)
    before = spam.penalty().item()
    step = spam.update(1, loader)
    assert step is not None
    assert step.after > step.before
    assert spam.penalty().item() != before


METHODS = [
    CurvatureMethod(estimator="exact"),
    CurvatureMethod(labels="ggn", draws=2),
    CurvatureMethod(structure="kron"),
    CurvatureMethod(structure="kron", labels="ggn"),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("update", ["adam", "mackay"])
@pytest.mark.parametrize("prior", ["scalar", "layerwise", "unitwise", "parameterwise"])
def test_every_prior_goes_with_every_curvature(prior, update, method):
    model, loader = problem()
    spam = SpaM(model, 64, prior=prior, update=update, curvature=method, every=1, steps=20)
    step = spam.update(1, loader)
    assert step.after > step.before
    assert set(spam.posterior(loader).precision()) == dict(model.named_parameters()).keys()


def test_updates_see_a_part_of_the_data_and_the_posterior_all():
    model, ((inputs, targets),) = problem()
    loader = [(inputs[:32], targets[:32]), (inputs[32:], targets[32:])]
    method = CurvatureMethod(estimator="exact", samples=32)
    spam = SpaM(model, 64, curvature=method, every=1)
    first, whole = SpaM(model, 64, every=1), spam.posterior(loader)
    first.curvature = CurvatureMethod(estimator="exact")
    spam.update(1, loader)
    first.update(1, loader[:1])
    for ours, theirs in zip(spam.prior.factors(), first.prior.factors(), strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = fit_posterior(model, loader, n_data=64, curvature=CurvatureMethod(estimator="exact"))
    for name, diag in whole.curvature.diag.items():
        torch.testing.assert_close(diag, expected.curvature.diag[name])


def test_parameters_that_were_unfrozen_since_are_named():
    model, data = problem()
    first, *_ = model.parameters()
    first.requires_grad_(False)
    spam = SpaM(model, 64, every=1)
    first.requires_grad_(True)
    with pytest.raises(PosteriorError, match="frozen, unfrozen or replaced since"):
        spam.update(1, data)


def test_parameters_that_were_replaced_since_are_named():
    model, data = problem()
    spam = SpaM(model, 64, every=1)
    model[2] = nn.Linear(8, 2)
    with pytest.raises(PosteriorError, match=r"^2\.bias, 2\.weight: frozen, unfrozen or replaced"):
        spam.update(1, data)
    with pytest.raises(PosteriorError, match=r"^2\.bias, 2\.weight: frozen, unfrozen or replaced"):
        spam.posterior(data)
    with pytest.raises(PosteriorError, match="replaced since the prior was made"):
        spam.penalty()
    with pytest.raises(PosteriorError, match="replaced since the prior was made"):
        spam.shrink(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("prior", ["scalar", "unitwise"])
def test_a_pickled_spam_goes_on_the_same(prior):
    model, data = problem()
    spam = SpaM(model, 64, prior=prior, every=1, steps=10)
    other = pickle.loads(pickle.dumps(spam))
    assert other.update(1, data) == spam.update(1, data)
    assert other.mean_log_precision() == spam.mean_log_precision()


def test_noise_needs_a_loader_that_begins_anew():
    model, [(inputs, _)] = problem()
    spam = SpaM(model, 64, likelihood=Regression(1.0), every=1, steps=10)
    with pytest.raises(PosteriorError, match="used up"):
        spam.update(1, iter([(inputs, torch.randn(64, 2))]))
    strength = spam.prior.precision()["0.weight"] / 64
    penalty = torch.autograd.grad(spam.penalty(), model[0].weight)[0]
    torch.testing.assert_close(penalty, strength * model[0].weight)


def test_a_state_of_other_targets_is_refused():
    model, _ = problem()
    of_numbers, of_classes = SpaM(model, 64, likelihood=Regression(0.3)), SpaM(model, 64)
    for taker, giver in ((of_numbers, of_classes), (of_classes, of_numbers)):
        with pytest.raises(PosteriorError, match="another kind of likelihood"):
            taker.load_state_dict(giver.state_dict())


def test_a_prior_of_another_model_is_refused_before_the_fit():
    model, data = problem()
    prior = Prior(nn.Linear(5, 2), "scalar")
    with pytest.raises(PosteriorError, match=r"the prior lacks parameter '0\.weight'"):
        fit_posterior(model, data, n_data=64, prior=prior)


def test_a_loader_of_unknown_length_asks_for_n_data():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(5), 0)])

    with pytest.raises(PosteriorError, match="give n_data"):
        fit_posterior(problem()[0], torch.utils.data.DataLoader(Stream()))


def test_mean_precisions_leave_out_what_is_masked():
    model, _ = problem()
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    spam = SpaM(model, 64, masks=masks)
    name, factor = next(iter(masks)), spam.prior.factors()[0]
    factor[0] = 5.0
    masks[name][0] = False
    assert spam.mean_log_precision()[0] == pytest.approx(factor[1:].mean().item())


def test_masks_may_be_of_some_parameters():
    model, loader = problem()
    mask = torch.zeros(8, 5, dtype=torch.bool)
    spam = SpaM(model, 64, masks={"0.weight": mask}, every=1)
    assert spam.update(1, loader) is not None
    assert len(spam.mean_log_precision()) == 4


def test_the_noise_of_a_regression_is_learned():
    """In a linear model the update's fixed point is ``σ² = RSS / (N − γ)``, all in closed form."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 3, dtype=torch.float64)
    targets = inputs @ torch.tensor([[1.0], [-2.0], [0.5]]).double()
    targets = targets + 0.5 * torch.randn(200, 1, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(inputs, targets).solution.mT)
    spam = SpaM(
        model,
        200,
        prior="scalar",
        curvature=CurvatureMethod(labels="ggn", estimator="exact"),
        likelihood=Regression(4.0),
        update="mackay",
        every=1,
    )
    for epoch in range(1, 6):
        spam.update(epoch, [(inputs, targets)])
    squares = (model(inputs) - targets).square().sum().item()
    delta = spam.prior.factors()[0].exp().item()
    curvature = inputs.square().sum(0) / spam.likelihood.noise
    gamma = (curvature / (curvature + delta)).sum().item()
    assert spam.likelihood.noise == pytest.approx(squares / (200 - gamma), rel=1e-4)
    assert spam.likelihood.noise == pytest.approx(0.25, rel=0.3)
    again = SpaM(model, 200, prior="scalar", likelihood=Regression())
    again.load_state_dict(spam.state_dict())
    assert again.likelihood == spam.likelihood


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_shrink_leaves_alone_what_was_frozen_since(optimiser):
    model, [(inputs, targets)] = problem()
    spam = SpaM(model, 64, precision=100.0)
    optimizer = optimisers(list(model.parameters()))[optimiser]
    for frozen in (False, True):
        model[0].requires_grad_(not frozen)
        before = model[0].weight.clone()
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        spam.shrink(optimizer)
        assert torch.equal(model[0].weight, before) == frozen


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior": "unitwise"}, "needs a parameterwise prior"),
        ({"curvature": CurvatureMethod(structure="kron")}, "needs structure 'diag'"),
    ],
)
def test_the_closed_form_is_refused_where_there_is_none(arguments, message):
    with pytest.raises(PosteriorError, match=message):
        SpaM(problem()[0], 64, update="exact", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"update": "newton"}, "unknown update 'newton': one of adam"),
        ({"n_data": 0}, "n_data must be a positive number, not 0"),
        ({"precision": float("inf")}, "precision must be a positive number, not inf"),
        ({"n_data": -5}, "n_data must be a positive number, not -5"),
        ({"temperature": 0}, "temperature must be a positive number, not 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number, not nan"),
        ({"every": 0}, "every must be a positive number"),
        ({"steps": 0}, "steps must be a positive number"),
        ({"lr": -1.0}, "lr must be a positive number"),
        ({"damping": 1.5}, "damping must be at least 0 and less than 1, not 1.5"),
        ({"masks": {"0.weigth": None}}, "'0.weigth', which is no .*: did you mean '0.weight'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(PosteriorError, match=message):
        SpaM(problem()[0], **{"n_data": 64, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_data": 0}, "n_data must be a positive number, not 0"),
        ({"temperature": 0}, "temperature must be a positive number, not 0"),
        ({"temperature": -1}, "temperature must be a positive number, not -1"),
        ({"prior": "unitwise"}, r"give spamprune\.Prior\(model, 'unitwise'\)"),
    ],
)
def test_a_posterior_of_numbers_that_make_no_sense_is_refused(arguments, message):
    model, loader = problem()
    with pytest.raises(PosteriorError, match=message):
        fit_posterior(model, loader, **{"n_data": 64, **arguments})


def test_a_restored_spam_goes_on_the_same():
    model, loader = problem()
    first = SpaM(model, 64, prior="unitwise", every=1, steps=10)
    first.update(1, loader)
    second = SpaM(model, 64, prior="unitwise", every=1, steps=10)
    second.load_state_dict(first.state_dict())
    first.update(2, loader)
    second.update(2, loader)
    for a, b in zip(first.prior.factors(), second.prior.factors(), strict=True):
        assert torch.equal(a, b)


def test_the_posterior_is_curvature_plus_prior():
    model, loader = problem()
    posterior = fit_posterior(model, loader, n_data=64, prior=2.5, temperature=4.0)
    for name, precision in posterior.precision().items():
        torch.testing.assert_close(precision, posterior.curvature.diag[name] / 4 + 2.5)


def test_a_posterior_survives_its_file(tmp_path):
    model, loader = problem()
    posterior = SpaM(model, 64, prior="unitwise").posterior(loader)
    posterior.save(tmp_path / "p.safetensors")
    loaded = load_posterior(tmp_path / "p.safetensors")
    assert loaded.log_evidence == posterior.log_evidence
    for name, precision in posterior.precision().items():
        assert torch.equal(loaded.precision()[name], precision)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_posteriors_that_do_not_belong_are_refused_by_name(tmp_path):
    model, loader = problem()
    posterior = fit_posterior(model, loader, n_data=64)
    posterior.check(copy.deepcopy(model))
    with pytest.raises(PosteriorError, match=r"'0\.weight'.*before it was pruned"):
        posterior.check(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    with pytest.raises(PosteriorError, match=r"lacks parameter '3\.weight'"):
        posterior.check(nn.Sequential(*model, nn.Linear(2, 2)))
    with pytest.raises(PosteriorError, match="n_data"):
        fit_posterior(model, loader)
    (tmp_path / "bad").write_bytes(b"\x00" * 20)
    with pytest.raises(PosteriorError, match="cannot read"):
        load_posterior(tmp_path / "bad")
