"""Small networks that use parameters in every way that the curvature engine must follow."""

import timm.layers as tl
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import FrozenBatchNorm2d


class Headed(nn.Module):
    """A module under test between its input and a fixed random projection to three classes."""

    def __init__(self, body, features):
        super().__init__()
        self.body = body
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("head", torch.randn(features, 3, generator=generator) / features**0.5)

    def forward(self, x):
        return torch.tanh(self.body(x)).flatten(1) @ self.head


class Function(nn.Module):
    """A module from parameters and a function of them."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x):
        return self.function(self, x)


class Attention(nn.Module):
    def __init__(self, cross=False, **kwargs):
        super().__init__()
        if cross:
            kwargs |= {"kdim": 3, "vdim": 5}
        self.cross = cross
        self.attention = nn.MultiheadAttention(4, 2, **kwargs)

    def forward(self, x):
        key, value = (x[..., :3], torch.cat([x, x[..., :1]], -1)) if self.cross else (x, x)
        return self.attention(x, key, value, need_weights=False)[0]


class SequenceFirst(nn.Module):
    """Tokens before samples, as in torch's own transformers."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class TiedEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.table.weight

    def forward(self, tokens):
        return self.decoder(torch.tanh(self.table(tokens)))


class _First(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class _Twice(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class _Transpose(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def _token_put_in_place(m, x):
    buffer = torch.zeros(len(x), 6, 4, dtype=x.dtype)
    buffer[:, 1:] = x
    buffer[:, 0] = m.token
    return torch.tanh(buffer @ m.mix)


def _class_token(m, x):
    return torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position


def _biased_attention(m, x):
    bias = m.table[:, torch.arange(25).view(5, 5) % 9].unsqueeze(0)
    q = x.view(-1, 5, 2, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, 2 * q, q, attn_mask=bias)


def _windows_inner(m, x):
    """Fold samples behind tokens: the batch runs fastest in the folded axis."""
    folded = x.transpose(0, 1).reshape(-1, 4)
    return F.linear(folded, m.weight, m.bias).view(5, -1, 4).transpose(0, 1)


def _windows_outer(m, x):
    return F.linear(x.reshape(-1, 4), m.weight, m.bias).view(-1, 5, 4)


def _centred(m, x):
    weight = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight / m.weight.norm())


VECTORS, TOKENS, WORDS = (4,), (5, 4), "words"
LINES, IMAGES, VOLUMES = (4, 7), (4, 5, 6), (4, 4, 3, 5)

#: name: (module, shape of a sample)
CASES = {
    "linear": (lambda: nn.Linear(4, 6), VECTORS),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), VECTORS),
    "linear on tokens": (lambda: nn.Linear(4, 6), TOKENS),
    "linear on windows of tokens": (lambda: nn.Linear(4, 2), (2, 3, 4)),
    "linear, two tokens": (lambda: nn.Linear(4, 6), (2, 4)),
    "wide linear, three tokens": (lambda: nn.Linear(130, 140), (3, 130)),
    "samples fold behind tokens": (
        lambda: Function(_windows_inner, weight=(4, 4), bias=(4,)),
        TOKENS,
    ),
    "samples fold before tokens": (
        lambda: Function(_windows_outer, weight=(4, 4), bias=(4,)),
        TOKENS,
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), LINES),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0)), IMAGES),
    "conv2d, same": (lambda: nn.Conv2d(4, 3, (4, 3), padding="same", dilation=(1, 2)), IMAGES),
    "conv2d, valid": (lambda: nn.Conv2d(4, 3, 3, padding="valid"), IMAGES),
    "conv2d, circular": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), IMAGES),
    "conv2d, reflect": (lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv2d, dilated": (lambda: nn.Conv2d(4, 3, 2, dilation=3, padding=1), IMAGES),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), IMAGES),
    "conv2d, pointwise, strided": (lambda: nn.Conv2d(4, 6, 1, stride=2), IMAGES),
    "conv2d on one pixel": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 1, 1)),
    "conv2d, padding past the image": (
        lambda: nn.Conv2d(4, 6, 5, padding=4, stride=3, dilation=2),
        (4, 2, 3),
    ),
    "conv2d, few positions": (lambda: nn.Conv2d(70, 80, 3, padding=1), (70, 1, 2)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), IMAGES),
    "depthwise, multiplied": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), IMAGES),
    "depthwise, dilated, same": (
        lambda: nn.Conv2d(4, 4, 2, groups=4, padding="same", dilation=3),
        IMAGES,
    ),
    "depthwise on a large image": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 14, 13)),
    "depthwise on one pixel": (lambda: nn.Conv2d(4, 4, 5, groups=4, padding=2), (4, 1, 1)),
    "depthwise conv1d": (lambda: nn.Conv1d(4, 4, 3, groups=4, padding=1), LINES),
    "conv3d": (lambda: nn.Conv3d(4, 3, (2, 3, 3), padding=1, stride=(1, 2, 1)), VOLUMES),
    "conv3d, groups": (lambda: nn.Conv3d(4, 4, 2, groups=2), VOLUMES),
    "conv_transpose1d": (
        lambda: nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1),
        LINES,
    ),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2),
        IMAGES,
    ),
    "conv_transpose2d, output padding past the stride": (
        lambda: nn.ConvTranspose2d(4, 3, 2, stride=1, dilation=3, output_padding=2),
        IMAGES,
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 2, 2), VOLUMES),
    "batch norm": (lambda: nn.BatchNorm2d(4), IMAGES),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), VECTORS),
    "batch norm 3d": (lambda: nn.BatchNorm3d(4), VOLUMES),
    "layer norm": (lambda: nn.LayerNorm(4), TOKENS),
    "layer norm over two axes": (lambda: nn.LayerNorm((5, 4)), TOKENS),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "rms norm": (lambda: nn.RMSNorm(4), TOKENS),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES),
    "timm LayerNorm2d": (lambda: tl.LayerNorm2d(4), IMAGES),
    "timm BatchNormAct2d": (lambda: tl.BatchNormAct2d(4), IMAGES),
    "timm GroupNorm1": (lambda: tl.GroupNorm1(4), IMAGES),
    "timm GroupNormAct": (lambda: tl.GroupNormAct(4, 2), IMAGES),
    "timm LayerNormAct2d": (lambda: tl.LayerNormAct2d(4), IMAGES),
    "timm RmsNorm": (lambda: tl.RmsNorm(4), TOKENS),
    "frozen batch norm": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 1), FrozenBatchNorm2d(3)),
        IMAGES,
    ),
    "timm ScaledStdConv2d": (lambda: tl.ScaledStdConv2d(4, 6, 3), IMAGES),
    "timm StdConv2d": (lambda: tl.StdConv2d(4, 6, 3, padding=1), IMAGES),
    "timm Conv2dSame": (lambda: tl.create_conv2d(4, 6, 3, stride=2, padding="same"), IMAGES),
    "timm MixedConv2d": (
        lambda: tl.create_conv2d(4, 6, [3, 5], padding="", depthwise=False),
        IMAGES,
    ),
    "timm SqueezeExcite": (lambda: tl.SqueezeExcite(4, rd_channels=3), IMAGES),
    "weight made of a parameter": (lambda: Function(_centred, weight=(6, 4, 3, 3)), IMAGES),
    "embedding": (lambda: nn.Embedding(7, 4), WORDS),
    "embedding with padding": (lambda: nn.Embedding(7, 4, padding_idx=2), WORDS),
    "embedding scaled by frequency": (lambda: nn.Embedding(7, 4, max_norm=1.0), WORDS),
    "tied embedding": (TiedEmbedding, WORDS),
    "attention": (lambda: Attention(batch_first=True), TOKENS),
    "attention, tokens first": (lambda: SequenceFirst(Attention()), TOKENS),
    "cross attention": (lambda: Attention(cross=True, batch_first=True), TOKENS),
    "attention with extra keys": (
        lambda: Attention(batch_first=True, add_bias_kv=True),
        TOKENS,
    ),
    "transformer layer, tokens first": (
        lambda: SequenceFirst(nn.TransformerEncoderLayer(4, 2, 6)),
        TOKENS,
    ),
    "attention with a bias table": (lambda: Function(_biased_attention, table=(2, 9)), TOKENS),
    "class token and positions": (
        lambda: Function(_class_token, token=(1, 1, 4), position=(1, 6, 4)),
        TOKENS,
    ),
    "token put in place": (
        lambda: Function(_token_put_in_place, token=(4,), mix=(4, 4)),
        TOKENS,
    ),
    "layer scale": (lambda: Function(lambda m, x: x * m.gamma, gamma=(4,)), TOKENS),
    "layer scale on channels": (
        lambda: Function(lambda m, x: x * m.gamma.reshape(1, -1, 1, 1), gamma=(4,)),
        IMAGES,
    ),
    "layer scale in place": (
        lambda: Function(lambda m, x: (2 * x * m.first).mul_(m.gamma), first=(4,), gamma=(4,)),
        TOKENS,
    ),
    "scalar bias and scale": (
        lambda: Function(lambda m, x: (x + m.bias) * m.scale - m.shift, bias=1, scale=1, shift=()),
        IMAGES,
    ),
    "parameter minus data": (lambda: Function(lambda m, x: m.p - x * m.p, p=(4,)), TOKENS),
    "division": (lambda: Function(lambda m, x: x / (1 + m.p**2), p=(4,)), TOKENS),
    "matrix product": (lambda: Function(lambda m, x: x @ m.w, w=(4, 3)), TOKENS),
    "einsum": (
        lambda: Function(lambda m, x: torch.einsum("btd,de->bte", x, m.w), w=(4, 3)),
        TOKENS,
    ),
    "prelu": (lambda: nn.PReLU(4), IMAGES),
    "bilinear": (
        lambda: Function(lambda m, x: F.bilinear(x, x + 1, m.w), w=(2, 4, 4)),
        TOKENS,
    ),
    "lstm": (
        lambda: _First(nn.LSTM(4, 3, batch_first=True)),
        TOKENS,
    ),
    "called twice": (lambda: _Twice(nn.Linear(4, 4)), TOKENS),
    "convolution called twice": (lambda: _Twice(nn.Conv2d(4, 4, 3, padding=1)), IMAGES),
    "inplace activation": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        IMAGES,
    ),
    "tokens of a batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Flatten(2), _Transpose(), nn.Linear(6, 3)
        ),
        IMAGES,
    ),
    "parameter not used": (
        lambda: Function(lambda m, x: x * m.used, used=(4,), unused=(2,)),
        TOKENS,
    ),
}


def randomise(model, seed=0):
    """Give every parameter and running statistic a value that hides nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.copy_(
                0.5 * noise / max(1, parameter[0].numel() if parameter.dim() else 1) ** 0.5
            )
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2, generator=generator)
    return model


def case(name, samples=6):
    """Return a model in float64 and evaluation mode, inputs and targets."""
    build, shape = CASES[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    if shape == WORDS:
        inputs = torch.randint(0, 7, (samples, 5), generator=generator)
    else:
        inputs = torch.randn(samples, *shape, generator=generator, dtype=torch.float64)
    body = randomise(build().double()).eval()
    features = body(inputs)[0].numel()
    model = Headed(body, features).double().eval()
    return model, inputs, torch.randint(0, 3, (samples,), generator=generator)
