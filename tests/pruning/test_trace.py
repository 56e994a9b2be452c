"""What each operation does to axes, seen from outside: networks lose half of their units.

A network without units must compute what the same network computes with the units at zero.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
import torchvision
from torch import nn
from torch.nn.utils import parametrize

from spamprune.errors import PruningError
from spamprune.pruning.assemble import assemble
from spamprune.pruning.axes.axis import leaves
from spamprune.pruning.axes.trace import trace
from spamprune.pruning.compaction import apply, masked, verify
from spamprune.pruning.importance import ScoreImportance
from spamprune.pruning.plan import Target, plan
from spamprune.pruning.units import KINDS, groups, importance

IMAGE = (2, 3, 8, 8)
TOKENS = (2, 5, 16)
ROW = (3, 6)


def disturbed(model):
    """Return the model in float64 and evaluation mode, nothing in it zero, one or symmetric."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.3 * noise + 0.05)
    return model


def random_scores(model):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}


def inputs(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pruned(model, example, *, kinds=KINDS, target=None, **options):
    """Plan, apply, and check the outputs; return the plan and the small network."""
    found = plan(
        model, example, random_scores(model), target or Target(ratio=0.5), kinds=kinds, **options
    )
    small = apply(model, found)
    apart = verify(model, small, found, example, tolerance=1e-8)
    assert apart <= 1e-8 or not found.comparable
    return found, small


class Net(nn.Module):
    """Layers by name and a forward pass as a function of the network and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self._forward(self, x)


def chain(*layers):
    """Return layers one after another, each followed by a ReLU but the last."""
    return lambda: nn.Sequential(*(m for layer in layers for m in (layer(), nn.ReLU())))[:-1]


def net(forward, **layers):
    return lambda: Net(forward, **{name: make() for name, make in layers.items()})


def conv(inputs, outputs, size=1, **options):
    return lambda: nn.Conv2d(inputs, outputs, size, **options)


def linear(inputs, outputs, **options):
    return lambda: nn.Linear(inputs, outputs, **options)


def parameter(*shape):
    return lambda: nn.Parameter(torch.randn(shape))


def squeeze_excite(m, x):
    y = m.a(x).relu()
    z = m.expand(m.reduce(y.mean((2, 3), keepdim=True)).relu())
    return m.h((y * z.sigmoid()).mean((2, 3)))


def standardised(m, x):
    w = m.a.weight
    w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.var((1, 2, 3), keepdim=True) + 1e-6).sqrt()
    return m.h(F.conv2d(x, w, m.a.bias).relu())


def shuffled(m, x):
    y = m.g(m.a(x).relu())
    b, c, h, w = y.shape
    y = y.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
    return m.h(m.b(y.relu()))


def split_at_half(m, x):
    y = m.a(x)
    half = y.shape[1] // 2
    return m.h(torch.cat([m.b(y[:, :half]), y[:, half:]], 1).relu())


def through_columns(m, x):
    y = F.unfold(m.a(x).relu(), 3, padding=1)
    return m.h(F.fold(m.w(y.mT).mT, (8, 8), 3, padding=1))


def written_in_place(m, x):
    y, z = m.a(x).relu(), m.b(x)
    z[:, : y.shape[1]] += y
    return m.h(z)


def dynamic(m, x):
    y = m.a(x).relu()
    b, c, h, w = y.shape
    kernel = m.k(y.mean((2, 3))).view(b * c, 1, 3, 3)
    y = F.conv2d(y.reshape(1, b * c, h, w), kernel, padding=1, groups=b * c)
    return m.h(y.view(b, c, h, w))


def twice(m, x):
    y = m.a(x)
    for _ in range(2):
        y = m.n(m.b(y)).relu()
    return m.h(y)


#: Name → network, shape of its input, and the units that each layer keeps at ratio 0.5.
CASES = {
    "linear": (chain(linear(16, 12), linear(12, 3)), TOKENS, {"0": 6}),
    "convolution": (chain(conv(3, 8, 3), conv(8, 6), conv(6, 2)), IMAGE, {"0": 4, "2": 3}),
    "dilated, circular": (
        chain(conv(3, 8, 3, dilation=2, padding_mode="circular", padding=2), conv(8, 2)),
        IMAGE,
        {"0": 4},
    ),
    "one dimension": (
        chain(
            lambda: nn.Conv1d(3, 8, 3),
            lambda: nn.ConvTranspose1d(8, 6, 2),
            lambda: nn.Conv1d(6, 2, 1),
        ),
        (2, 3, 9),
        {"0": 4, "2": 3},
    ),
    "three dimensions": (
        chain(
            lambda: nn.Conv3d(3, 8, 3, padding=1),
            lambda: nn.MaxPool3d(2),
            lambda: nn.BatchNorm3d(8),
            lambda: nn.Conv3d(8, 2, 1),
        ),
        (1, 3, 4, 6, 6),
        {"0": 4},
    ),
    "depthwise": (
        chain(conv(3, 8), conv(8, 8, 3, groups=8), conv(8, 2)),
        IMAGE,
        {"0": 4},
    ),
    "depthwise, two outputs each": (
        chain(conv(3, 8), conv(8, 16, 3, groups=8), conv(16, 2)),
        IMAGE,
        {"0:groups": 4, "2:group_dims": 1},
    ),
    "grouped": (
        chain(conv(3, 8), conv(8, 12, 3, groups=4), conv(12, 2)),
        IMAGE,
        {"0:groups": 2, "0:group_dims": 1, "2:group_dims": 2},
    ),
    "transposed, grouped": (
        chain(
            conv(3, 8),
            lambda: nn.ConvTranspose2d(8, 12, 2, 2),
            lambda: nn.ConvTranspose2d(12, 8, 3, groups=4),
            conv(8, 2),
        ),
        IMAGE,
        {"0": 4, "2:groups": 2, "2:group_dims": 2, "4:group_dims": 1},
    ),
    "concatenation": (
        net(
            lambda m, x: m.h(torch.cat([m.a(x), m.b(x).relu(), m.a(x)], 1)),
            a=conv(3, 8), b=conv(3, 6), h=conv(22, 2),
        ),
        IMAGE,
        {"a": 4, "b": 3},
    ),
    "concatenation, then flat": (
        net(
            lambda m, x: m.h(torch.cat([m.a(x), m.b(x)], 1).flatten(1)),
            a=conv(3, 4), b=conv(3, 2), h=linear(6 * 64, 2),
        ),
        IMAGE,
        {"a": 2, "b": 1},
    ),
    "split": (
        net(
            lambda m, x: (lambda p, q, r: m.h(torch.cat([m.b(p) * q, m.c(r)], 1)))(
                *m.a(x).split(m.sizes, 1)
            ),
            a=conv(3, 24), b=conv(8, 10), c=conv(6, 6, groups=6), h=conv(16, 2),
            sizes=lambda: (8, 10, 6),
        ),
        IMAGE,
        {"a": 4, "a#2": 5, "a#3": 3},
    ),
    "gated halves": (
        net(
            lambda m, x: (lambda v, g: m.h(v * g.sigmoid()))(*m.a(x).chunk(2, -1)),
            a=linear(16, 24), h=linear(12, 3),
        ),
        TOKENS,
        {"a": 6},
    ),
    "torch's gated halves": (
        chain(linear(16, 24), nn.GLU, linear(12, 3)), TOKENS, {"0": 6},
    ),
    "halves by index": (
        net(split_at_half, a=conv(3, 16), b=conv(8, 8), h=conv(16, 3)),
        IMAGE,
        {"a": 4, "a#2": 4, "b": 4},
    ),
    "last channels": (
        net(
            lambda m, x: (lambda y: m.h(m.b(y[:, -m.n :]) * y[:, : m.n]))(m.a(x)),
            a=conv(3, 16), b=conv(8, 8), h=conv(8, 2), n=lambda: 8,
        ),
        IMAGE,
        {"a": 4},
    ),
    "every second channel": (
        net(
            lambda m, x: (lambda y: m.h(y[:, ::2]) + m.g(y[:, 1::2]))(m.a(x).relu()),
            a=conv(3, 16), h=conv(8, 2), g=conv(8, 2),
        ),
        IMAGE,
        {"a": 4},
    ),
    "shuffle": (
        net(
            shuffled,
            a=conv(3, 16), g=conv(16, 16, groups=4), b=conv(16, 8), h=conv(8, 2), groups=lambda: 4,
        ),
        IMAGE,
        {"a:groups": 2, "a:group_dims": 2, "g:group_dims": 2, "b": 4},
    ),
    "torch's shuffle": (
        chain(conv(3, 16), conv(16, 16, groups=4), lambda: nn.ChannelShuffle(4), conv(16, 2)),
        IMAGE,
        {"0:groups": 2, "0:group_dims": 2, "2:group_dims": 2},
    ),
    "pixel shuffle and back": (
        chain(
            conv(3, 24), lambda: nn.PixelShuffle(2), conv(6, 8), lambda: nn.PixelUnshuffle(2),
            conv(32, 2),
        ),
        IMAGE,
        {"0": 3, "4": 4},
    ),
    "columns of patches": (
        net(through_columns, a=conv(3, 12), w=linear(108, 36), h=conv(4, 2)),
        IMAGE,
        {"a": 6, "w": 2},
    ),
    "batch norm": (
        chain(conv(3, 8), lambda: nn.BatchNorm2d(8), conv(8, 2)), IMAGE, {"0": 4},
    ),
    "batch norm without weights": (
        chain(conv(3, 8), lambda: nn.BatchNorm2d(8, affine=False), conv(8, 2)), IMAGE, {"0": 4},
    ),
    "batch norm over tokens": (
        net(
            lambda m, x: m.h(m.n(m.a(x).mT).mT),
            a=linear(16, 12), n=lambda: nn.BatchNorm1d(12), h=linear(12, 3),
        ),
        TOKENS,
        {"a": 6},
    ),
    "instance norm": (
        chain(
            conv(3, 8), lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            conv(8, 2),
        ),
        IMAGE,
        {"0": 4},
    ),
    "PReLU": (
        chain(conv(3, 8), lambda: nn.PReLU(8), conv(8, 6), nn.PReLU, conv(6, 2)),
        IMAGE,
        {"0": 4, "4": 3},
    ),
    "free parameters": (
        net(
            lambda m, x: m.h((m.a(x) + m.shift).relu() * m.gain),
            a=conv(3, 8), shift=parameter(1, 8, 1, 1), gain=parameter(8, 1, 1), h=conv(8, 2),
        ),
        IMAGE,
        {"a": 4},
    ),
    "einsum": (
        net(
            lambda m, x: m.h(torch.einsum("bnc,chd->bnhd", m.a(x).relu(), m.w).flatten(2)),
            a=linear(16, 6), w=parameter(6, 4, 8), h=linear(32, 2),
        ),
        TOKENS,
        {"w": 3, "w:group_dims": 2, "w#2": 4},
    ),
    "squeeze and excite": (
        net(
            squeeze_excite, a=conv(3, 16), reduce=conv(16, 4), expand=conv(4, 16), h=linear(16, 3)
        ),
        IMAGE,
        {"a": 8, "reduce": 2},
    ),
    "weights made standard": (
        net(standardised, a=conv(3, 8, 3), h=conv(8, 2)), IMAGE, {"a": 4},
    ),
    "weights made of data": (
        net(dynamic, a=conv(3, 12), k=linear(12, 108), h=conv(12, 2)), IMAGE, {"a": 6},
    ),
    "residual sum": (
        net(
            lambda m, x: (lambda y: m.h(y + m.c(m.b(y).relu())))(m.a(x)),
            a=linear(16, 12), b=linear(12, 8), c=linear(8, 12), h=linear(12, 3),
        ),
        TOKENS,
        {"a": 6, "b": 4},
    ),
    "sum in place with some channels": (
        net(written_in_place, a=conv(3, 8), b=conv(3, 12), h=conv(12, 2)),
        IMAGE,
        {"a": 4, "b": 2},
    ),
    "one module twice": (
        net(twice, a=conv(3, 8), b=conv(8, 8), n=lambda: nn.BatchNorm2d(8), h=conv(8, 2)),
        IMAGE,
        {"a": 4},
    ),
    "stacked branches": (
        net(
            lambda m, x: m.h((torch.stack([m.a(x), m.b(x)], 1) * m.w.softmax(0)).sum(1)),
            a=conv(3, 8), b=conv(3, 8), w=parameter(2, 1, 1, 1), h=conv(8, 2),
        ),
        IMAGE,
        {"a": 4},
    ),
    "maxima over pairs": (
        net(
            lambda m, x: m.h(m.a(x).unflatten(1, (-1, 2)).amax(2)), a=conv(3, 16), h=conv(8, 2)
        ),
        IMAGE,
        {"a": 4},
    ),
    "size of a dimension": (
        net(
            lambda m, x: (lambda y: m.h(y.reshape(y.size(0) * y.size(1), y.size(-1))))(m.a(x)),
            a=linear(16, 16), h=linear(16, 3),
        ),
        (2, 16, 16),
        {"a": 8},
    ),
    "token and channel mixing": (
        net(
            lambda m, x: m.h((lambda y: y + m.c2(m.c1(y).relu()))(m.t2(m.t1(x.mT).relu()).mT)),
            t1=linear(5, 20), t2=linear(20, 5), c1=linear(16, 24), c2=linear(24, 16),
            h=linear(16, 3),
        ),
        TOKENS,
        {"t1": 10, "c1": 12},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_half_of_the_units_go_and_the_rest_computes_the_same(name):
    make, shape, widths = CASES[name]
    torch.manual_seed(0)
    model = disturbed(make())
    example = inputs(shape)
    found, small = pruned(model, example)
    assert found.comparable
    assert verify(model, small, found, 2 * example, tolerance=1e-10) <= 1e-10
    assert found.widths() == widths


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        (lambda: nn.LayerNorm(12), "layer_norm"),
        (lambda: nn.RMSNorm(12), "rms_norm|mean"),
        (lambda: nn.Softmax(-1), "softmax"),
    ],
)
def test_what_mixes_units_is_followed_but_not_compared(norm, why):
    torch.manual_seed(0)
    model = disturbed(nn.Sequential(nn.Linear(16, 12), norm(), nn.Linear(12, 3)))
    found, small = pruned(model, inputs(TOKENS))
    assert found.widths() == {"0": 6}
    assert not found.comparable
    assert small(inputs(TOKENS)).shape == (2, 5, 3)
    assert getattr(small[1], "normalized_shape", (6,)) == (6,)


def test_group_norm_loses_whole_groups_exactly_and_channels_of_groups_not():
    torch.manual_seed(0)
    model = disturbed(
        nn.Sequential(nn.Conv2d(3, 24, 1), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 2, 1))
    )
    whole, small = pruned(model, inputs(IMAGE), kinds=("group_dims",))
    assert whole.comparable
    assert (small[1].num_groups, small[1].num_channels) == (2, 12)
    inside, small = pruned(model, inputs(IMAGE), kinds=("hidden",))
    assert not inside.comparable
    assert (small[1].num_groups, small[1].num_channels) == (4, 12)


class Text(nn.Module):
    """Tokens, a recurrent layer and a reader of its last state."""

    def __init__(self, kind, outputs, **options):
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.rnn = kind(16, 12, batch_first=True, **options)
        self.head = nn.Linear(outputs, 4)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class OnGPU(nn.Module):
    """One step of a recurrent layer as a GPU takes it, beside what cuDNN would do."""

    def __init__(self, gates):
        super().__init__()
        self.gates = gates
        self.inputs, self.states = nn.Linear(5, gates * 3), nn.Linear(3, gates * 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        assert not torch.backends.cudnn.enabled
        state = x.new_zeros(len(x), self.states.in_features)
        cell = torch.ops.aten._thnn_fused_lstm_cell
        if self.gates == 3:
            cell = torch.ops.aten._thnn_fused_gru_cell
        return self.head(cell(self.inputs(x), self.states(state), state)[0])


@pytest.mark.parametrize("gates", [3, 4])
def test_recurrent_layers_are_followed_on_a_gpu(gates):
    """On a device that holds nothing, for want of one; fused by cuDNN they could not be."""
    model = OnGPU(gates).to("meta")
    found = trace(model, torch.empty(6, 5, device="meta")).tensors
    (hidden,) = leaves(found["head.weight"][1])
    for name in ("inputs.weight", "states.weight", "inputs.bias"):
        assert list(leaves(found[name][0])) == [hidden] * gates
    assert list(leaves(found["states.weight"][1])) == [hidden]
    assert not hidden.fixed
    assert torch.backends.cudnn.enabled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("make", "widths"),
    [
        (lambda: Text(nn.LSTM, 12), {"embed": 8, "rnn": 6}),
        (lambda: Text(nn.LSTM, 24, bidirectional=True), {"embed": 8, "rnn": 6}),
        (lambda: Text(nn.LSTM, 12, num_layers=2), {"embed": 8, "rnn": 6}),
        (lambda: Text(nn.LSTM, 8, proj_size=8), {"embed": 8, "rnn": 6, "rnn#2": 4}),
        (lambda: Text(nn.GRU, 12, num_layers=2), {"embed": 8, "rnn": 6}),
        (lambda: Text(nn.RNN, 12), {"embed": 8, "rnn": 6}),
    ],
    ids=["lstm", "two directions", "two layers", "projected", "gru", "rnn"],
)
def test_recurrent_layers(make, widths, dtype):
    torch.manual_seed(0)
    model = disturbed(make()).to(dtype)
    tokens = torch.randint(0, 10, (2, 6))
    found = plan(model, tokens, random_scores(model), Target(ratio=0.5))
    small = apply(model, found)
    assert verify(model, small, found, tokens) <= (1e-10 if dtype is torch.float64 else 1e-5)
    kept = found.widths()
    assert {k: kept[k] for k in widths} == widths
    assert small.rnn.hidden_size == 6
    assert small.rnn.input_size == 8


def test_weights_that_are_tied_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.mix = nn.Linear(16, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            y = self.embed(x)
            return self.head(y + self.mix(y.relu()))

    torch.manual_seed(0)
    model = disturbed(Tied())
    found, small = pruned(model, torch.arange(6).reshape(2, 3))
    assert found.widths() == {"embed": 8}
    assert small.head.weight is small.embed.weight
    assert small.head.weight.shape == (10, 8)


def torchvision_networks():
    models = torchvision.models
    blocks = models.resnet.BasicBlock
    vit = models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=5)
    nn.init.normal_(vit.heads.head.weight)  # zero at first
    yield "resnet18", models.ResNet(blocks, [1, 1, 1, 1], num_classes=5), 0.4
    yield "densenet", models.DenseNet(4, (2, 3), 8, num_classes=5), 0.4
    yield "mobilenet_v2", models.mobilenet_v2(width_mult=0.25, num_classes=5), 0.5
    yield "mobilenet_v3", models.mobilenet_v3_small(width_mult=0.5, num_classes=5), 0.4
    yield "shufflenet", models.shufflenet_v2_x0_5(num_classes=5), 0.5
    yield "vit", vit, 0.35


@pytest.mark.parametrize(
    ("model", "left"), [pytest.param(m, left, id=n) for n, m, left in torchvision_networks()]
)
def test_torchvision(model, left):
    """``left`` bounds the fraction of the parameters that remain."""
    model = disturbed(model)
    example = inputs((2, 3, 32, 32))
    _, small = pruned(model, example)
    parts, _ = pruned(model, example, kinds=("hidden", "groups", "heads"))
    assert parts.comparable
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert after < left * before
    assert small(example).shape == (2, 5)


@pytest.mark.parametrize(
    "name", ["grouped", "concatenation", "split", "shuffle", "one module twice"]
)
def test_importance_is_the_sum_over_all_that_a_mask_zeroes(name):
    make, shape, _ = CASES[name]
    torch.manual_seed(0)
    model = disturbed(make())
    scores = random_scores(model)
    traced = trace(model, inputs(shape))
    found, _ = groups(model, traced)
    parameters = dict(model.named_parameters())
    nothing = {g.layer: () for g in found}
    for group in found:
        got = importance(parameters, group, scores)
        for unit in range(group.units):
            chosen = nothing | {group.layer: (unit,)}
            alone = assemble(
                model, traced, found, chosen, ranking="uniform", target={}, achieved={}
            )
            zeroed = dict(masked(model, alone).named_parameters())
            expected = sum(
                scores[n].double()[(zeroed[n] == 0) & (p != 0)].sum() for n, p in parameters.items()
            )
            torch.testing.assert_close(got[unit], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
        ),
        lambda: torchvision.models.mobilenet_v2(width_mult=0.25, num_classes=5),
        lambda: torchvision.models.DenseNet(4, (2, 3), 8, num_classes=5),
    ],
    ids=["resnet", "mobilenet", "densenet"],
)
def test_units_and_importances_agree_with_torch_prunings_graph(make):
    """Importances by its dependency groups are ours, where it follows a network rightly."""
    torch.manual_seed(0)
    model = make().eval()
    example = torch.randn(1, 3, 32, 32)
    scores = random_scores(model)
    found, _ = groups(model, trace(model, example))
    ours = {}
    for group in found:
        values = importance(dict(model.named_parameters()), group, scores)
        for piece in group.pieces:
            if piece.dim == 0 and piece.name.endswith("weight"):
                ours[piece.name[: -len(".weight")]] = (piece, values)
    graph = tp.DependencyGraph().build_dependency(model, example)
    names = {module: name for name, module in model.named_modules()}
    head = [m for m in model.modules() if isinstance(m, nn.Linear)]
    theirs = list(graph.get_all_groups(head, [nn.modules.conv._ConvNd, nn.Linear]))
    assert len(theirs) == len(found)
    for group in theirs:
        piece, values = ours[names[group[0].dep.target.module]]
        got = ScoreImportance(scores)(group).double()
        torch.testing.assert_close(got[piece.index], values[piece.unit], rtol=1e-5, atol=1e-5)


class Careless(nn.Module):
    """Keeps what it sees in a forward pass, in attributes of its own."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 12)
        self.head = nn.Linear(12, 3)
        self.sizes = [1, 2]
        self.count = 0
        self.fails = False

    def forward(self, x):
        y = self.fc(x)
        self.count += 1
        self.width = y.shape[-1]
        self.seen = y.shape
        if self.fails:
            raise KeyError("no such thing")
        return self.head(y.view(self.seen).relu())


@pytest.mark.parametrize("fails", [False, True])
def test_a_traced_model_is_left_as_it_was(fails):
    from torch.nn.modules import module as hooks

    model = Careless().train()
    model.head.eval()
    model.fails = fails
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    if fails:
        with pytest.raises(PruningError, match=r"Careless cannot be followed.*KeyError"):
            trace(model, torch.randn(2, 16))
    else:
        trace(model, torch.randn(2, 16))
    for name, module in model.named_modules():
        now = vars(module)
        assert now.keys() == before[name].keys()
        assert all(now[key] is before[name][key] for key in now if key != "training")
    assert (model.training, model.fc.training, model.head.training) == (True, True, False)
    assert not hooks._global_forward_hooks
    assert not hooks._global_forward_pre_hooks
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_that_a_forward_pass_changes_are_as_before(fails):
    def forward(m, x):
        m.calls += 1
        m.seen = m.seen + x.sum()
        assert not fails, "as wanted"
        return m.h(m.a(x))

    model = Net(forward, a=nn.Linear(16, 8), h=nn.Linear(8, 3))
    model.register_buffer("calls", torch.zeros((), dtype=torch.long))
    model.register_buffer("seen", torch.zeros(()))
    model.register_buffer("wide", torch.zeros(1).expand(8))
    seen = model.seen
    if fails:
        with pytest.raises(PruningError, match="as wanted"):
            trace(model, torch.randn(TOKENS))
    else:
        trace(model, torch.randn(TOKENS))
    assert model.seen is seen
    assert (model.calls, model.seen) == (0, 0)


def test_layers_without_shapes_want_a_forward_pass_first():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3))
    with pytest.raises(PruningError, match=r"0\.weight has no shape yet: run the Seq.* once first"):
        trace(model, torch.randn(TOKENS))
    model(torch.randn(TOKENS))
    assert pruned(model.double(), inputs(TOKENS))[0].widths() == {"0": 4}


def test_a_trace_is_the_same_every_time():
    make, shape, _ = CASES["shuffle"]
    torch.manual_seed(0)
    model = disturbed(make())
    first, second = (pruned(model, inputs(shape))[0] for _ in range(2))
    assert first == second


class Wrapped:
    """An output that nobody can look into."""

    def __init__(self, logits):
        self.logits = logits


def test_outputs_without_tensors_are_refused():
    model = Net(lambda m, x: Wrapped(m.h(m.a(x))), a=nn.Linear(16, 8), h=nn.Linear(8, 3))
    with pytest.raises(PruningError, match="returns a Wrapped, in which no tensor is found"):
        trace(model, torch.randn(TOKENS))


def test_outputs_of_which_some_hide_tensors_are_refused():
    def forward(m, x):
        y = m.a(x)
        return {"logits": m.h(y), "sizes": (y.shape, 1.0, None, "an output"), "more": m.wrap(y)}

    model = Net(forward, a=nn.Linear(16, 8), h=nn.Linear(8, 3))
    model.wrap = Wrapped
    with pytest.raises(PruningError, match="returns a Wrapped, in which no tensor is found"):
        trace(model, torch.randn(TOKENS))
    model.wrap = torch.relu
    assert [len(shape) for shape in trace(model, torch.randn(TOKENS)).outputs] == [3, 3]


def test_classes_stay_where_the_output_is_the_place_of_the_best():
    model = Net(lambda m, x: m.h(m.a(x)).argmax(-1), a=nn.Linear(16, 8), h=nn.Linear(8, 4))
    found = plan(model, torch.randn(TOKENS), random_scores(model), Target(ratio=0.5))
    assert found.widths() == {"a": 4}
    with pytest.raises(PruningError, match="no floating-point numbers"):
        verify(model, apply(model, found), found, torch.randn(TOKENS))


def test_infinite_logits_are_compared():
    def forward(m, x):
        return m.h(m.a(x)).masked_fill(m.closed, -math.inf)

    model = Net(forward, a=nn.Linear(16, 8), h=nn.Linear(8, 4)).double()
    model.register_buffer("closed", torch.tensor([True, False, False, False]))
    _, small = pruned(model, inputs(TOKENS))
    assert small.a.out_features == 4


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.h(m.a(x).flip(-1)), "flip"),
        (lambda m, x: m.h(m.a(x).cumsum(-1)), "cumsum"),
        (lambda m, x: m.h(m.a(x).sort(-1).values), "sort"),
        (lambda m, x: m.h(torch.cummax(m.a(x), -1).values), "cummax"),
        (lambda m, x: m.h(m.a(x)[..., torch.arange(12)]), "index"),
        (lambda m, x: m.h(m.a(x).view(2, 5, 3, 4).mT.reshape(2, 5, 12)), "plain number"),
    ],
)
def test_what_cannot_be_followed_is_left_whole_with_the_reason_and_the_rest_goes(forward, why):
    torch.manual_seed(0)
    model = disturbed(
        Net(
            lambda m, x: m.o(m.b(forward(m, x)).relu()),
            a=nn.Linear(16, 12),
            h=nn.Linear(12, 10),
            b=nn.Linear(10, 8),
            o=nn.Linear(8, 3),
        )
    )
    found, _ = pruned(model, inputs(TOKENS))
    assert found.widths() == {"h": 5, "b": 4}
    assert any(note.startswith("a: ") and why in note for note in found.notes)


@pytest.mark.parametrize("own", [{}, {"affine": True}, {"track_running_stats": True}])
def test_instance_norms_know_their_channels(own, recwarn):
    model = disturbed(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, **own), nn.Conv2d(8, 6, 3))
    )
    found, small = pruned(model, inputs(IMAGE))
    assert (found.widths(), small[1].num_features) == ({"0": 4}, 4)
    assert not [w for w in recwarn if "InstanceNorm" in str(w.message)]
    assert small[0](inputs((3, 8, 8))).shape == small[1](small[0](inputs((3, 8, 8)))).shape


class Squared(nn.Module):
    """A parametrisation under which a masked weight is zero."""

    def forward(self, weight):
        return weight * weight


def test_parametrised_layers_are_layers():
    layers = (nn.Conv1d(6, 8, 1), nn.ConvTranspose1d(8, 10, 1), nn.Conv1d(10, 4, 1))
    model = disturbed(nn.Sequential(*layers))
    parametrize.register_parametrization(model[1], "weight", Squared())
    assert pruned(model, inputs((2, 6, 3)))[0].widths() == {"0": 4, "1": 5}
    found, small = pruned(model, inputs((2, 6, 3)), ignored=["1"])
    assert found.widths() == {"0": 4}
    assert (small[1].in_channels, small[1].out_channels) == (4, 10)


def test_a_layer_behind_a_pruned_one_may_have_a_spectral_norm():
    norm = nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(nn.Linear(6, 8), norm(nn.Linear(8, 5)), nn.Linear(5, 4)).double().train()
    found, small = pruned(model, inputs(ROW))
    assert found.widths() == {"0": 4}
    assert (small[1].in_features, small[1].out_features) == (4, 5)
    assert any(n.startswith("1: 5 channels left whole: vdot") for n in found.notes)
    vectors = model.state_dict()
    assert all(torch.equal(v, vectors[k]) for k, v in small.state_dict().items() if "._u" in k)
    model[0], model[2] = norm(model[0]), norm(model[2])
    with pytest.raises(
        PruningError, match=r"nothing of Sequential can be pruned: 0: 8 chan.* vdot"
    ):
        pruned(model, inputs(ROW))


def weight_normed():
    layer = nn.utils.weight_norm(nn.Linear(9, 8))
    with torch.no_grad():
        layer(torch.randn(1, 9))  # so that it can be copied
    return layer


@pytest.mark.parametrize(
    ("layer", "operation"),
    [
        (weight_normed, "_weight_norm_interface in 0"),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(9, 8)),
            "_weight_norm_interface in 0.parametrizations.weight.0",
        ),
        (
            lambda: nn.utils.parametrizations.orthogonal(nn.Linear(9, 8)),
            "diagonal in 0.parametrizations.weight.0",
        ),
    ],
    ids=["old weight norm", "weight norm", "orthogonal"],
)
def test_layers_whose_weight_is_computed_as_a_whole_are_noted(layer, operation):
    torch.manual_seed(0)
    model = nn.Sequential(layer(), nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 3)).double()
    found, _ = pruned(model, inputs((2, 9)))
    assert found.widths() == {"2": 3}
    assert found.notes == (f"0: 8 channels left whole: {operation} needs all of its positions",)


def test_units_of_a_layer_whose_weight_is_computed_bear_its_name():
    """The rows of a tall orthogonal matrix are those of the base that its parametrisation keeps."""
    torch.manual_seed(0)
    tall = nn.utils.parametrizations.orthogonal(nn.Linear(6, 8))
    model = nn.Sequential(tall, nn.ReLU(), nn.Linear(8, 5), nn.Linear(5, 3)).double()
    found, small = pruned(model, inputs(ROW))
    assert found.widths() == {"0": 4, "2": 3}
    assert small[0].weight.shape == (4, 6)


@pytest.mark.parametrize("norms", [[nn.InstanceNorm2d(8)], []], ids=["InstanceNorm", "alone"])
def test_channels_that_a_window_goes_over_are_noted(norms):
    norms = [*norms, nn.LocalResponseNorm(3)]
    model = nn.Sequential(nn.Conv2d(2, 8, 3), *norms, nn.Conv2d(8, 5, 3), nn.Conv2d(5, 3, 1))
    found, _ = pruned(model.double(), inputs((2, 2, 9, 9)))
    assert found.widths() == {f"{len(norms) + 1}": 3}
    (note,) = found.notes
    assert note.startswith(f"0: 8 channels left whole: constant_pad_nd in {len(norms)}")


def test_what_a_forward_pass_does_not_use_stays_as_it_is():
    model = Net(lambda m, x: m.h(m.a(x).relu()), a=nn.Linear(16, 8), h=nn.Linear(8, 3)).double()
    model.norm, model.mask_token = nn.LayerNorm(8), nn.Parameter(torch.zeros(1, 1, 8))
    model.unused = nn.Linear(8, 4)
    found, small = pruned(model, inputs(TOKENS))
    assert found.widths() == {"a": 4}
    assert small.norm.weight.shape == small.norm.bias.shape == (8,)
    assert small.mask_token.shape == (1, 1, 8)
    assert any("unused: 4 channels left whole" in note for note in found.notes)


def test_modules_that_run_only_in_training_are_named():
    def forward(m, x):
        y = m.a(x)
        return (m.h(y), m.aux(y)) if m.training else m.h(y)

    model = Net(forward, a=nn.Linear(16, 8), h=nn.Linear(8, 3)).double()
    model.aux = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 3)))
    model.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
    notes = [n for n in pruned(model, inputs(TOKENS))[0].notes if "did not run" in n]
    assert [note.partition(":")[0] for note in notes] == ["aux"]
    model.eval().aux = None
    assert not any("did not run" in n for n in pruned(model, inputs(TOKENS))[0].notes)
