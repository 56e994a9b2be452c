import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from spamprune.bayes.curvature import CurvatureMethod
from spamprune.bayes.posterior import fit_posterior
from spamprune.bayes.spam import SpaM
from spamprune.data import load
from spamprune.data.base import mixed_seed
from spamprune.engine.cell import accelerator
from spamprune.engine.fit import Job, _parameter_groups, fit
from spamprune.engine.methods import ByPrior
from spamprune.errors import TrainingError
from spamprune.models import create
from spamprune.pruning.masks import apply_masks, global_masks
from spamprune.recipe.schema import Arithmetic, Optimiser

CANCER = load("cancer", validation=0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 2))


def train(model, optimiser, epochs=3, **job):
    spam = SpaM(model, len(CANCER.train), precision=2.0, burn_in=None)
    rates = []
    fit(
        model,
        ByPrior(spam),
        Job(CANCER.train, epochs, 64, optimiser, seed=0, **job),
        Accelerator(),
        lambda record: rates.append(record.lr),
    )
    return rates


def test_the_loop_is_plain_sgd_with_the_prior_by_hand():
    model, reference = network(), network()
    train(model, Optimiser(lr=0.05, schedule="constant"), epochs=2)
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    loader = CANCER.train.loader(64, seed=0)
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        torch.manual_seed(mixed_seed(0, epoch))
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(reference(inputs), targets).backward()
            optimizer.step()
            with torch.no_grad():
                for p in reference.parameters():
                    p /= 1 + 0.05 / (1 - 0.9) * 2.0 / len(CANCER.train)
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_cosine_falls_to_its_minimum_and_a_warm_up_rises_first():
    steps = len(CANCER.train.loader(64))
    falling = train(network(), Optimiser(lr=0.1, min_lr=0.001), epochs=8)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == pytest.approx(0.001, abs=0.1 / steps)
    rising = train(network(), Optimiser(lr=0.1, min_lr=0.001, warmup=4), epochs=8)
    assert rising[:3] == sorted(rising[:3])
    assert rising[4:] == falling[4:]
    assert set(train(network(), Optimiser(lr=0.1, schedule="constant"))) == {0.1}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_pruned_weights_stay_exactly_zero(name):
    model = network()
    scores = {n: p.detach().abs() for n, p in model.named_parameters()}
    masks = global_masks(scores, 0.7)
    before = copy.deepcopy(model)
    train(model, Optimiser(name=name, lr=0.01), masks=masks)
    for n, p in model.named_parameters():
        assert (p[~masks[n]] == 0).all()
    kept = masks["0.weight"]
    assert not torch.equal(model[0].weight[kept], before[0].weight[kept])


def test_dropout_is_live_after_every_evidence_step():
    model = network()
    spam = SpaM(model, len(CANCER.train), every=1, steps=2)
    modes = []
    model[2].register_forward_hook(lambda module, *_: modes.append(module.training))
    job = Job(CANCER.train, 3, 64, Optimiser(lr=0.01), seed=0, validation=CANCER.validation)
    fit(model, ByPrior(spam), job, Accelerator())
    steps = len(CANCER.train.loader(64))
    assert sum(modes) == 3 * steps  # live in every training step
    assert len(modes) >= 3 * (2 * steps + 1)  # and off in evidence steps and validation


def test_a_resumed_training_repeats_its_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)
    whole, first, second = network(), network(), network()
    optimiser = Optimiser(lr=0.05, schedule="constant")
    train(whole, optimiser, epochs=4)
    train(first, optimiser, epochs=2, checkpoint=tmp_path / "c.safetensors")
    torch.rand(5)
    train(second, optimiser, epochs=4, checkpoint=tmp_path / "c.safetensors")
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_single_numbers_learn_ten_times_slower_under_sgd():
    model = create("fixup_wrn16_4", depth=10, widen=1, num_classes=10)
    tensors, scalars = _parameter_groups(model, Optimiser(name="sgd", lr=0.1))
    assert all(p.numel() == 1 for p in scalars["params"])
    assert scalars["lr"] == pytest.approx(0.01)
    assert len(tensors["params"]) + len(scalars["params"]) == len(list(model.parameters()))
    (everything,) = _parameter_groups(model, Optimiser(name="adam", lr=0.1))
    assert len(everything["params"]) == len(list(model.parameters()))
    one_unit = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Linear(1, 2))
    assert len(_parameter_groups(one_unit, Optimiser(name="sgd", lr=0.1))) == 1
    model.register_parameter("again", scalars["params"][0])
    _, shared = _parameter_groups(model, Optimiser(name="sgd", lr=0.1))
    assert len(shared["params"]) == len(scalars["params"])


def test_spans_are_parts_of_one_schedule():
    whole, parts = network(), network()
    optimiser = Optimiser(name="sgd", lr=0.05, momentum=0.0)
    rates = train(whole, optimiser, epochs=4)
    split = train(parts, optimiser, epochs=4, span=(1, 3)) + train(
        parts, optimiser, epochs=4, span=(4, 4)
    )
    assert split == rates
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_masks_that_grow_hold_from_then_on_and_survive_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)

    def cut(model, epochs, path, seen):
        masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()}

        def after(epoch):
            if epoch == 2:
                masks["0.weight"][0] = False
                apply_masks(model, masks)
            seen.append((epoch, model[0].weight[0].abs().max().item()))

        train(
            model,
            Optimiser(lr=0.05, schedule="constant"),
            epochs=epochs,
            masks=masks,
            after_epoch=after,
            checkpoint=path,
        )

    whole, first, second = network(), network(), network()
    seen: list[tuple[int, float]] = []
    cut(whole, 4, None, seen)
    assert [size == 0 for _, size in seen] == [False, True, True, True]
    cut(first, 2, tmp_path / "c.safetensors", [])
    cut(second, 4, tmp_path / "c.safetensors", [])
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


DIGITS = load("digits", validation=0.1)


def convolutional():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()]
    layers += [nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


FLOAT32, BFLOAT16 = Arithmetic(), Arithmetic(precision="bf16")


def train_digits(model, arithmetic=FLOAT32, epochs=2, **job):
    spam = SpaM(model, len(DIGITS.train), every=1, steps=2)
    settings = Job(
        DIGITS.train,
        epochs,
        64,
        Optimiser(lr=0.05, schedule="constant"),
        seed=0,
        channels_last=arithmetic.channels_last,
        **job,
    )
    return fit(model, ByPrior(spam), settings, accelerator(arithmetic))


def test_frozen_norms_keep_their_statistics_and_train_their_scales():
    model, reference = convolutional(), convolutional()
    for net in (model, reference):
        net[1].running_mean += 0.3
    before = copy.deepcopy(model[1])
    train_digits(model, epochs=1, norms="frozen")
    assert torch.equal(model[1].running_mean, before.running_mean)
    assert torch.equal(model[1].running_var, before.running_var)
    assert not torch.equal(model[1].weight, before.weight)
    assert model[1].num_batches_tracked == 0
    # the first step by hand, as an affine map per channel
    inputs, targets = next(iter(DIGITS.train.loader(64, seed=0)))
    norm = reference[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    hidden = reference[0](inputs) * scale[:, None, None] + shift[:, None, None]
    expected = F.cross_entropy(reference[2:](hidden), targets)
    reference.train()
    reference[1].eval()
    torch.testing.assert_close(F.cross_entropy(reference(inputs), targets), expected)
    train_digits(model, epochs=1)
    assert model[1].num_batches_tracked > 0


def test_bfloat16_is_for_the_passes_only():
    """Weights, their optimiser's state, the prior and the curvature stay in float32."""
    exact, mixed = convolutional(), convolutional()
    kinds = []
    mixed[0].register_forward_hook(lambda m, _, out: kinds.append((m.training, out.dtype)))
    (reference, *_), (record, *_) = (
        train_digits(exact),
        train_digits(mixed, Arithmetic(precision="bf16")),
    )
    assert {dtype for training, dtype in kinds if training} == {torch.bfloat16}
    assert {dtype for training, dtype in kinds if not training} == {torch.float32}  # evidence
    assert all(
        p.dtype == torch.float32
        for p in (*mixed.parameters(), *mixed.buffers())
        if p.is_floating_point()
    )
    assert record.loss != reference.loss
    assert record.loss == pytest.approx(reference.loss, rel=0.02)
    assert record.log_evidence == pytest.approx(reference.log_evidence, rel=0.02)


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_curvature_under_autocast_is_summed_in_float32(estimator):
    model, method = convolutional(), CurvatureMethod(estimator=estimator)
    loader = DIGITS.train.loader(64)
    plain = fit_posterior(model, loader, curvature=method).curvature
    with torch.autocast("cpu", torch.bfloat16):
        mixed = fit_posterior(model, loader, curvature=method).curvature
    assert mixed.loss == pytest.approx(plain.loss, rel=0.01)
    for name, diag in mixed.diag.items():
        assert diag.dtype == torch.float32
        assert (diag - plain.diag[name]).norm() < 0.1 * plain.diag[name].norm()


def test_precision_is_the_recipe_s_in_one_process_after_another(monkeypatch):
    assert accelerator(BFLOAT16).mixed_precision == "bf16"
    here = accelerator(Arithmetic(precision="auto"))
    assert here.mixed_precision == ("bf16" if torch.cuda.is_available() else "no")
    assert accelerator().mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(TrainingError, match=r"launched with mixed precision 'fp16'.*arithmetic"):
        accelerator()


def test_a_resumed_training_repeats_its_arithmetic(tmp_path, monkeypatch):
    arithmetic = Arithmetic(precision="bf16", channels_last=True)
    monkeypatch.setattr("spamprune.engine.fit.CHECKPOINT_SECONDS", 0)
    whole, first, second = convolutional(), convolutional(), convolutional()
    train_digits(whole, arithmetic, epochs=4)
    assert whole[3].weight.is_contiguous(memory_format=torch.channels_last)
    path = tmp_path / "c.safetensors"
    train_digits(first, arithmetic, epochs=2, checkpoint=path)
    train_digits(second, arithmetic, epochs=4, checkpoint=path)
    for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
