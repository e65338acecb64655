"""The three networks a second time: NumPy in float64, TensorFlow's NHWC layout, one plain formula after another.

Nothing here comes from the package but the names of tensors. Sources: BigGAN-128 for generator and image
discriminator, google/revisiting-self-supervised for the encoder's trunks, the BigBiGAN paper for what joins them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
Pads = tuple[tuple[int, int], tuple[int, int]]


class Weights:
    """A state dict seen from a prefix; remembers what was read, so that a tensor without effect is noticed."""

    def __init__(self, state: Mapping[str, torch.Tensor], prefix: str = "", used: set[str] | None = None) -> None:
        self.state, self.prefix, self.used = state, prefix, set() if used is None else used

    def at(self, name: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.", self.used)

    def has(self, name: str) -> bool:
        return any(key.startswith(self.prefix + name) for key in self.state)

    def __getitem__(self, name: str) -> Array:
        self.used.add(self.prefix + name)
        return self.state[self.prefix + name].detach().double().numpy()

    def get(self, name: str, default: float) -> Array | float:
        return self[name] if self.has(name) else default

    def unused(self) -> set[str]:
        return set(self.state) - self.used


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight and statistic away from its neutral value, at scales that keep activations near one; float64."""
    module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.normal_(generator=generator)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
            elif name.endswith("running_mean") or name.endswith("bias"):
                tensor.mul_(0.3)
            elif tensor.ndim == 1:  # gains of norms
                tensor.mul_(0.3).add_(1)
            elif tensor.ndim == 0:  # attention's gamma
                tensor.fill_(0.7)
            elif not name.endswith((".u", "u")):
                tensor.div_(tensor[0].numel() ** 0.5)
    return module


def random_images(n: int, channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[n, channels, height, width] in [-1, 1], float64: noise on planes of random offset and slopes."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, channels, height, width, generator=generator, dtype=torch.float64)
    offset, down, across = 2 * torch.rand(3, n, channels, 1, 1, generator=generator, dtype=torch.float64) - 1
    rows, columns = torch.linspace(-1, 1, height).double()[:, None], torch.linspace(-1, 1, width).double()
    return (2 * noise - 1) / 4 + (offset + down * rows + across * columns) / 4


def random_normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nhwc(x: torch.Tensor) -> Array:
    return x.detach().double().numpy().transpose(0, 2, 3, 1)


def nchw(x: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def close(actual: torch.Tensor, expected: Any, tolerance: float = 1e-9) -> None:
    """Same shape, and values within `tolerance`, relative or absolute."""
    expected = torch.as_tensor(np.asarray(expected) if isinstance(expected, float) else expected)
    torch.testing.assert_close(actual.detach(), expected.detach().to(actual.dtype), rtol=tolerance, atol=tolerance)


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def same_pads(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's rule for SAME: the odd zero goes to the end."""
    rest = side % stride
    total = max(kernel - (rest if rest else stride), 0)
    return total // 2, total - total // 2


def pads_of(x: Array, kernel: int, stride: int, rule: str) -> Pads:
    if rule == "same":
        return same_pads(x.shape[1], kernel, stride), same_pads(x.shape[2], kernel, stride)
    return ((kernel - 1) // 2,) * 2, ((kernel - 1) // 2,) * 2


def windows(x: Array, kernel: int, stride: int, pads: Pads, value: float = 0.0) -> Iterator[tuple[int, int, Array]]:
    """For each place (i, j) of the kernel the input under it, [N, H', W', C]."""
    x = np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=value)
    height, width = (stride * ((side - kernel) // stride) + 1 for side in x.shape[1:3])
    for i in range(kernel):
        for j in range(kernel):
            yield i, j, x[:, i : i + height : stride, j : j + width : stride]


def conv2d(x: Array, w: Weights, stride: int = 1, rule: str = "explicit") -> Array:
    kernel = w["weight"]  # [out, in, k, k]
    size = kernel.shape[2]
    places = windows(x, size, stride, pads_of(x, size, stride, rule))
    return sum(span @ kernel[:, :, i, j].T for i, j, span in places) + w.get("bias", 0.0)


def max_pool(x: Array, kernel: int, stride: int, pads: Pads, value: float) -> Array:
    return np.max([span for _, _, span in windows(x, kernel, stride, pads, value)], axis=0)


def mean_pool(x: Array) -> Array:
    """2x2 with stride 2 under SAME: of an odd side the last window holds what is left of it."""
    n, height, width, channels = x.shape
    x = np.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=np.nan)
    return np.nanmean(x.reshape(n, x.shape[1] // 2, 2, x.shape[2] // 2, 2, channels), axis=(2, 4))


def dense(x: Array, w: Weights) -> Array:
    return x @ w["weight"].T + w.get("bias", 0.0)


def standardize(x: Array, w: Weights, eps: float, batch_statistics: bool) -> Array:
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axis=axes) if batch_statistics else w["running_mean"]
    var = ((x - mean) ** 2).mean(axis=axes) if batch_statistics else w["running_var"]
    return (x - mean) / np.sqrt(var + eps)


def batch_norm(x: Array, w: Weights, eps: float, batch_statistics: bool = False) -> Array:
    return standardize(x, w, eps, batch_statistics) * w.get("weight", 1.0) + w.get("bias", 0.0)


def attention(x: Array, w: Weights) -> Array:
    n, height, width, _ = x.shape
    pads = ((0, 0), (0, 0))
    query = conv2d(x, w.at("theta")).reshape(n, height * width, -1)
    key = max_pool(conv2d(x, w.at("phi")), 2, 2, pads, -np.inf).reshape(n, -1, query.shape[2])
    value = max_pool(conv2d(x, w.at("g")), 2, 2, pads, -np.inf)
    value = value.reshape(n, -1, value.shape[3])
    out = np.einsum("nqk,nkc->nqc", softmax(np.einsum("nqd,nkd->nqk", query, key)), value)
    return x + w["gamma"] * conv2d(out.reshape(n, height, width, -1), w.at("o"))


# ---- generator ----


def conditional_norm(x: Array, z: Array, w: Weights, eps: float, batch_statistics: bool) -> Array:
    gain, offset = (dense(z, w.at(f"{name}.linear"))[:, None, None, :] for name in ("gain", "offset"))
    return standardize(x, w.at("norm"), eps, batch_statistics) * (1 + gain) + offset


def generator(
    w: Weights,
    z: Array,
    *,
    chunks: tuple[int, ...],
    attention_block: int | None,
    eps: float,
    batch_statistics: bool = False,
) -> Array:
    """Images [N, S, S, C]; `attention_block` is the number of the block, from 1, that attention follows."""
    ends = np.cumsum(chunks)
    parts = [z[:, end - size : end] for size, end in zip(chunks, ends, strict=True)]
    seed = dense(parts[0], w.at("seed"))
    x = seed.reshape(len(z), 4, 4, seed.shape[1] // 16)
    for i, part in enumerate(parts[1:]):
        block = w.at(f"blocks.{i}")
        h = relu(conditional_norm(x, part, block.at("norm1"), eps, batch_statistics))
        h = conv2d(h.repeat(2, axis=1).repeat(2, axis=2), block.at("conv1.conv"))
        h = relu(conditional_norm(h, part, block.at("norm2"), eps, batch_statistics))
        x = conv2d(h, block.at("conv2")) + conv2d(x.repeat(2, axis=1).repeat(2, axis=2), block.at("shortcut"))
        if i + 1 == attention_block:
            x = attention(x, w.at("attention"))
    return np.tanh(conv2d(relu(batch_norm(x, w.at("norm"), eps, batch_statistics)), w.at("conv")))


# ---- residual MLP ----


def residual_mlp(x: Array, w: Weights, config: Any, eps: float, batch_statistics: bool = False) -> Array:
    """`config` holds the fields of an MLP: width, layers, activation, order, first_activation, …"""

    def active(h: Array, name: str, place: Weights) -> Array:
        if config.norm == "batch":
            h = batch_norm(h, place.at(name), eps, batch_statistics)
        return activate(h)

    def activate(h: Array) -> Array:
        return relu(h) if config.activation == "relu" else np.where(h > 0, h, 0.2 * h)

    for i in range(config.layers // 2):
        block = w.at(str(i))
        same = x.shape[1] == config.width
        if config.projection == "always" or (config.projection == "auto" and not same):
            skip = dense(x, block.at("skip"))
        else:
            skip = x if same else 0.0
        if config.order == "pre":
            h = x if i == 0 and not config.first_activation else active(x, "norm1", block)
            h = active(dense(h, block.at("linear1")), "norm2", block)
            x = dense(h, block.at("linear2")) + skip
        else:
            h = active(dense(x, block.at("linear1")), "norm1", block)
            h = dense(h, block.at("linear2"))
            if config.norm == "batch":
                h = batch_norm(h, block.at("norm2"), eps, batch_statistics)
            x = activate(h + skip)
    if config.order == "pre" and config.last_activation:
        x = active(x, str(config.layers // 2), w)
    return x


# ---- discriminator ----


def image_features(
    w: Weights, x: Array, *, downsample: str, attention_block: int | None, first_relu: bool, last_skip: bool
) -> Array:
    """F(x); `downsample` has a letter a block, "d" where it halves the resolution."""
    for i, letter in enumerate(downsample):
        block = w.at(f"blocks.{i}")
        h = conv2d(relu(x) if i > 0 or first_relu else x, block.at("conv1"))
        if letter == "d":
            h = mean_pool(conv2d(relu(h), block.at("conv2.conv")))
            x = h + mean_pool(conv2d(x, block.at("shortcut")))
        else:
            h = conv2d(relu(h), block.at("conv2"))
            skip = x if last_skip else np.zeros_like(x)
            x = h + (skip if x.shape[3] == h.shape[3] else conv2d(x, block.at("shortcut")))
        if i + 1 == attention_block:
            x = attention(x, w.at("attention"))
    return relu(x).sum(axis=(1, 2))


def discriminator(w: Weights, x: Array, z: Array, config: Any, **image_options: Any) -> dict[str, Array]:
    f = image_features(w.at("f"), x, first_relu=config.first_relu, last_skip=config.last_skip, **image_options)
    scores = {}
    if "x" in config.scores:
        scores["score_x"] = dense(f, w.at("score_x"))[:, 0]
    if "z" in config.scores or "xz" in config.scores:
        h = residual_mlp(z, w.at("h"), config.z_mlp, 1e-3)
    if "z" in config.scores:
        scores["score_z"] = dense(h, w.at("score_z"))[:, 0]
    if "xz" in config.scores:
        joined = {"concat": lambda: np.concatenate([f, h], axis=1), "sum": lambda: f + h, "product": lambda: f * h}
        j = residual_mlp(joined[config.combine](), w.at("j"), config.joint_mlp, 1e-3)
        scores["score_xz"] = dense(j, w.at("score_xz"))[:, 0]
    return scores


# ---- encoder ----


def stem(w: Weights, x: Array, config: Any) -> Array:
    if config.stem == "small":
        return conv2d(x, w.at("0.conv"))
    x = conv2d(x, w.at("0.conv"), 2, config.stem_padding)
    rule = "same" if config.pool_padding == "same" else "explicit"
    # The border of TensorFlow's SAME and of PyTorch's own padding never wins; zeros put before a VALID window may.
    return max_pool(x, 3, 2, pads_of(x, 3, 2, rule), 0.0 if config.pool_padding == "zero" else -np.inf)


def resnet(w: Weights, x: Array, config: Any, batch_statistics: bool) -> Array:
    def norm(h: Array, place: Weights) -> Array:
        return relu(batch_norm(h, place, config.bn_eps, batch_statistics))

    x = stem(w.at("stem"), x, config)
    numbers = iter(range(sum(config.depths)))
    for stage, depth in enumerate(config.depths):
        for i in range(depth):
            unit = w.at(f"units.{next(numbers)}")
            stride = 2 if stage and not i else 1
            pre = norm(x, unit.at("norms.0"))
            if config.block == "bottleneck":
                h = conv2d(pre, unit.at("convs.0.conv"))
                h = conv2d(norm(h, unit.at("norms.1")), unit.at("convs.1.conv"), stride, config.strided_padding)
                h = conv2d(norm(h, unit.at("norms.2")), unit.at("convs.2.conv"))
            else:
                h = conv2d(pre, unit.at("convs.0.conv"), stride, config.strided_padding)
                h = conv2d(norm(h, unit.at("norms.1")), unit.at("convs.1.conv"))
            if stride == 2 or x.shape[3] != h.shape[3]:
                source = pre if config.shortcut == "preactivated" else x
                x = source[:, ::stride, ::stride] @ unit["shortcut.conv.weight"][:, :, 0, 0].T
            x = x + h
    x = batch_norm(x, w.at("norm"), config.bn_eps, batch_statistics)
    return relu(x) if config.last_relu else x


def revnet(w: Weights, x: Array, config: Any, batch_statistics: bool) -> Array:
    x = stem(w.at("stem"), x, config)
    for stage, depth in enumerate(config.depths):
        if stage:
            side = x.shape[3] // 2
            x = np.pad(mean_pool(x), ((0, 0), (0, 0), (0, 0), (side, side)))
        for i in range(depth):
            unit = w.at(f"stages.{stage}.{i}")
            half = x.shape[3] // 2
            x1, h = x[..., :half], x[..., half:]
            x2 = h
            for layer in range(3):
                h = relu(batch_norm(h, unit.at(f"norms.{layer}"), config.bn_eps, batch_statistics))
                h = conv2d(h, unit.at(f"convs.{layer}.conv"))
            x = np.concatenate([x2, x1 + h], axis=3)
    x = batch_norm(x, w.at("norm"), config.bn_eps, batch_statistics)
    return relu(x) if config.last_relu else x


def encoder(w: Weights, x: Array, noise: Array, config: Any, batch_statistics: bool = False) -> dict[str, Array]:
    trunk = resnet if config.architecture == "resnet" else revnet
    pooled = trunk(w.at("trunk"), x, config, batch_statistics).mean(axis=(1, 2))
    h = batch_norm(pooled, w.at("feature_norm"), config.feature_norm_eps, batch_statistics)
    head = residual_mlp(pooled, w.at("head"), config.head, config.bn_eps, batch_statistics)
    latent = dense(head, w.at("latent"))
    if config.output == "stochastic":
        mean, stdev = latent[:, : config.z_dim], np.log1p(np.exp(latent[:, config.z_dim :]))
    else:
        mean = np.tanh(latent) if config.output == "tanh" else latent
        stdev = np.zeros_like(mean)
    return {
        "z_sample": mean + noise * stdev,
        "z_mean": mean,
        "z_stdev": stdev,
        "avepool_feat": pooled,
        "bn_crelu_feat": np.concatenate([relu(h), relu(-h)], axis=1),
    }
