"""Two processes, each with half of the data, against one with all of it."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from spamprune.bayes.curvature import exact, kron, sketch
from spamprune.bayes.curvature.batches import accumulate
from spamprune.bayes.likelihood import CLASSIFICATION
from spamprune.errors import PosteriorError
from tests.bayes import reference

SEEDS = 60


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (40,), generator=generator)


def shard(rank):
    """Return unequal halves: 16 samples in batches of 8, and 24."""
    inputs, targets = data()
    part = slice(0, 16) if rank == 0 else slice(16, 40)
    return list(zip(inputs[part].split(8), targets[part].split(8), strict=True))


def passes(batches, seeds):
    """Return what each way of passing over the data finds, in this process's group."""
    model = network()

    def step(inputs, targets):
        return CLASSIFICATION.losses(model(inputs), targets).detach().sum()

    totals = accumulate(model, batches, step, likelihood=CLASSIFICATION)
    exact = sketch(model, batches, n_data=40, group=1)
    sketches = [sketch(model, batches, n_data=40, labels="ef", seed=s) for s in range(seeds)]
    return {
        "totals": (totals.loss, totals.seen),
        "exact": exact.diag,
        "sketches": [s.diag["0.weight"] for s in sketches],
        "error": [s.error["0.weight"] for s in sketches],
    }


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        found = passes(shard(rank), SEEDS)
        found["samples"] = sketch(network(), shard(rank), n_data=40, samples=12, group=1).diag
        # an empty shard is no error as long as some process has data, and in all if none has
        found["lopsided"] = sketch(network(), shard(0) if rank else [], n_data=16, group=1).diag
        # the same data and the same signs twice would give what one process gives
        found["twins"] = sketch(network(), shard(0), n_data=16, seed=7).diag["0.weight"]
        with pytest.raises(PosteriorError, match="no batches"):
            sketch(network(), [], n_data=40)
        found["squares"] = {
            labels: exact(network(), shard(rank), n_data=40, labels=labels).diag
            for labels in ("ef", "ggn")
        }
        found["lopsided squares"] = exact(network(), shard(0) if rank else [], n_data=16).diag
        blocks = kron(network(), shard(rank), n_data=40).kron
        found["factors"] = {n: (b.outputs, b.inputs) for n, b in blocks.items()}
        with pytest.raises(PosteriorError, match="do not agree"):
            kron(network(), shard(0) if rank else [], n_data=16)
        torch.save(found, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def test_totals_and_exact_sums_equal_those_of_one_process(ranks):
    alone = passes(shard(0) + shard(1), 0)
    for found in ranks:
        assert found["totals"][0] == pytest.approx(alone["totals"][0], rel=1e-12)
        assert found["totals"][1] == alone["totals"][1] == 40
        for name, diag in alone["exact"].items():
            torch.testing.assert_close(found["exact"][name], diag, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("labels", ["ef", "ggn"])
def test_exact_squares_equal_those_of_one_process(ranks, labels):
    alone = exact(network(), shard(0) + shard(1), n_data=40, labels=labels)
    for found in ranks:
        for name, diag in alone.diag.items():
            torch.testing.assert_close(found["squares"][labels][name], diag, rtol=1e-12, atol=1e-15)


def test_squares_of_a_process_without_data(ranks):
    alone = exact(network(), shard(0), n_data=16)
    for found in ranks:
        for name, diag in alone.diag.items():
            torch.testing.assert_close(found["lopsided squares"][name], diag)


def test_factors_equal_those_of_one_process(ranks):
    alone = kron(network(), shard(0) + shard(1), n_data=40)
    for found in ranks:
        assert found["factors"].keys() == alone.kron.keys()
        for name, block in alone.kron.items():
            outputs, inputs = found["factors"][name]
            torch.testing.assert_close(outputs, block.outputs)
            torch.testing.assert_close(inputs, block.inputs)


def test_samples_count_for_each_process_and_scale_by_all(ranks):
    model, (inputs, targets) = network().eval(), data()
    seen = [*range(12), *range(16, 28)]
    expected = reference.squared(model, inputs[seen], targets[seen])
    for name, diag in expected.items():
        torch.testing.assert_close(ranks[0]["samples"][name], 40 / 24 * diag)


def test_a_process_without_data_takes_part(ranks):
    model, (inputs, targets) = network().eval(), data()
    for name, diag in reference.squared(model, inputs[:16], targets[:16]).items():
        for found in ranks:
            torch.testing.assert_close(found["lopsided"][name], diag)


def test_the_sketch_is_the_same_in_all_processes_and_unbiased(ranks):
    for ours, theirs in zip(ranks[0]["sketches"], ranks[1]["sketches"], strict=True):
        assert torch.equal(ours, theirs)
    model, (inputs, targets) = network().eval(), data()
    truth = reference.squared(model, inputs, targets)["0.weight"]
    values = torch.stack(ranks[0]["sketches"])
    allowed = 4.5 * values.std(0) / SEEDS**0.5
    assert ((values.mean(0) - truth).abs() <= allowed).all()
    stated = torch.tensor(ranks[0]["error"]).square().mean().sqrt()
    true = (values - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert 0.7 < stated / true < 1.6


def test_processes_draw_signs_of_their_own(ranks):
    alone = sketch(network(), shard(0), n_data=16, seed=7).diag["0.weight"]
    assert not torch.allclose(ranks[0]["twins"], alone)
