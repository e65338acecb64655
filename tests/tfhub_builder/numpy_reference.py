"""`generate` and `encode` of plainly written modules, computed in NumPy (float64) from the variables bundle alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .spec import ModuleSpec

Array = np.ndarray


class Bundle:
    """Variables by DeepMind-like name, as inference sees them: averages, spectral norm, sums over counter."""

    def __init__(self, values: Mapping[str, Array], spectral_norm_eps: float):
        self.values = {name: np.asarray(value, np.float64) for name, value in values.items()}
        self.eps = spectral_norm_eps

    def trained(self, name: str) -> Array:
        return self.values.get(f"{name}/ema_0.9999", self.values.get(name))

    def weight(self, scope: str) -> Array:
        w, u = self.trained(f"{scope}/w"), self.values.get(f"{scope}/u0")
        if u is None:
            return w
        matrix = w.reshape(-1, w.shape[-1])
        v = u @ matrix.T
        v = v / (np.linalg.norm(v) + self.eps)
        u = v @ matrix
        return w / (v @ matrix @ (u / (np.linalg.norm(u) + self.eps)).T).item()

    def linear(self, scope: str, x: Array) -> Array:
        bias = self.trained(f"{scope}/b")
        return x @ self.weight(scope) + (0 if bias is None else bias)

    def conv(self, scope: str, x: Array, stride: int = 1) -> Array:
        """Zero padding by half the kernel."""
        bias = self.trained(f"{scope}/b")
        return conv2d(x, self.weight(scope), stride) + (0 if bias is None else bias)

    def norm(self, scope: str, x: Array, eps: float) -> Array:
        """Standardised, without gain and offset."""
        count = self.values[f"{scope}/accumulation_counter"]
        mean, var = (self.values[f"{scope}/accumulated_{kind}"] / count for kind in ("mean", "var"))
        return (x - mean) / np.sqrt(var + eps)

    def affine_norm(self, scope: str, x: Array, eps: float) -> Array:
        return self.norm(scope, x, eps) * self.trained(f"{scope}/scale") + self.trained(f"{scope}/offset")

    def conditional_norm(self, scope: str, x: Array, condition: Array, eps: float) -> Array:
        gain, offset = (self.linear(f"{scope}/{kind}", condition)[:, None, None] for kind in ("scale", "offset"))
        return self.norm(scope, x, eps) * (1 + gain) + offset


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def conv2d(x: Array, w: Array, stride: int) -> Array:
    half = w.shape[0] // 2
    return np.einsum("nhwcij,ijco->nhwo", windows(x, w.shape[0], stride, half), w, optimize=True)


def windows(x: Array, size: int, stride: int, pad: int) -> Array:
    """[N, H', W', C, size, size]."""
    x = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def max_pool(x: Array, size: int, stride: int, pad: int = 0) -> Array:
    """Borders are zeros."""
    return windows(x, size, stride, pad).max((-1, -2))


def double(x: Array) -> Array:
    return x.repeat(2, 1).repeat(2, 2)


def double_bilinear(x: Array) -> Array:
    """Half-pixel centres: each new pixel lies a quarter from its nearest old one."""
    for axis in (1, 2):
        edge = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded, size = np.pad(x, edge, mode="edge"), x.shape[axis]
        before, after = padded.take(range(size), axis), padded.take(range(2, size + 2), axis)
        pair = np.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = pair.reshape([2 * n if i == axis else n for i, n in enumerate(x.shape)])
    return x


def attend(bundle: Bundle, scope: str, x: Array) -> Array:
    n, height, width, channels = x.shape
    theta = bundle.conv(f"{scope}/theta", x).reshape(n, height * width, -1)
    phi = max_pool(bundle.conv(f"{scope}/phi", x), 2, 2).reshape(n, height * width // 4, -1)
    g = max_pool(bundle.conv(f"{scope}/g", x), 2, 2).reshape(n, height * width // 4, -1)
    logits = theta @ phi.transpose(0, 2, 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    o = (weights @ g).reshape(n, height, width, channels // 2)
    return x + bundle.trained(f"{scope}/gamma") * bundle.conv(f"{scope}/o_conv", o)


def generate(bundle: Bundle, spec: ModuleSpec, z: Array) -> dict[str, Array]:
    """`upsampled` is right for the bilinear mode at twice the size."""
    g, root = spec.generator, "GenEncWrapper/Generator"
    chunks = np.split(z.astype(np.float64), np.cumsum(g.z_chunks)[:-1], 1)
    row = np.broadcast_to(bundle.trained(f"{root}/linear/w"), (len(z), g.class_dim))
    x = bundle.linear(f"{root}/GenZ/G_linear", chunks[0]).reshape(len(z), 4, 4, -1)
    for i, chunk in enumerate(chunks[1:]):
        scope, condition = f"{root}/GBlock_{i}".removesuffix("_0"), np.concatenate([chunk, row], 1)
        h = relu(bundle.conditional_norm(f"{scope}/BatchNorm", x, condition, g.bn_eps))
        h = bundle.conv(f"{scope}/conv0", double(h))
        h = relu(bundle.conditional_norm(f"{scope}/BatchNorm_1", h, condition, g.bn_eps))
        x = bundle.conv(f"{scope}/conv1", h) + bundle.conv(f"{scope}/conv_sc", double(x))
        if x.shape[1] == g.attention_resolution:
            x = attend(bundle, f"{root}/attention", x)
    x = relu(bundle.affine_norm(f"{root}/BatchNorm", x, g.bn_eps))
    image = np.tanh(bundle.conv(f"{root}/conv_2d", x))
    return {"default": image, "upsampled": double_bilinear(image)}


def encode(bundle: Bundle, spec: ModuleSpec, x: Array, noise: Array) -> dict[str, Array]:
    """For the ResNet with explicit padding and a pre-activation head of ReLUs."""
    e, root = spec.encoder, "GenEncWrapper/Encoder"
    x = max_pool(bundle.conv(f"{root}/initial_conv", x.astype(np.float64), 2), 3, 2, 1)
    for stage, depth in enumerate(e.depths):
        for unit in range(depth):
            scope, stride = f"{root}/stage_{stage}/unit_{unit}", 2 if stage and not unit else 1
            h = relu(bundle.affine_norm(f"{scope}/norm_0", x, e.bn_eps))
            shortcut = x
            if f"{scope}/shortcut/w" in bundle.values:
                shortcut = bundle.conv(f"{scope}/shortcut", h, stride)
            h = bundle.conv(f"{scope}/conv_0", h)
            h = bundle.conv(f"{scope}/conv_1", relu(bundle.affine_norm(f"{scope}/norm_1", h, e.bn_eps)), stride)
            h = bundle.conv(f"{scope}/conv_2", relu(bundle.affine_norm(f"{scope}/norm_2", h, e.bn_eps)))
            x = shortcut + h
    features = relu(bundle.affine_norm(f"{root}/final_norm", x, e.bn_eps)).mean((1, 2))
    normalised = bundle.norm(f"{root}/feature_norm", features, e.feature_norm_eps)
    h = features
    for i in range(e.head.layers // 2):
        scope = f"{root}/head/block_{i}"
        inner = bundle.linear(f"{scope}/linear_0", h if i == 0 else relu(h))
        skip = bundle.linear(f"{scope}/skip", h) if f"{scope}/skip/w" in bundle.values else h
        h = skip + bundle.linear(f"{scope}/linear_1", relu(inner))
    mean, raw = np.split(bundle.linear(f"{root}/latent", relu(h)), 2, 1)
    stdev = np.log1p(np.exp(raw))
    sample = mean + stdev * noise
    return {
        "default": sample,
        "z_sample": sample,
        "z_mean": mean,
        "z_stdev": stdev,
        "avepool_feat": features,
        "bn_crelu_feat": np.concatenate([relu(normalised), relu(-normalised)], 1),
    }
