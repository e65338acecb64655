"""ResNet-v2 and RevNet trunks with a residual MLP head."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from .layers import Tensor, Writer, v1
from .mlp import residual_mlp

raw = tf.raw_ops
LAST_GAIN = 0.5  # of the last convolution of a unit: keeps deep trunks near unit scale


def stem(w: Writer, x: Tensor, channels: int) -> Tensor:
    """7x7 convolution and 3x3 max-pool, strides 2: no bias, norm or relu."""
    spec = w.spec.encoder
    if w.departs("image_normalised"):
        x = ((x + 1.0) / 2.0 - np.array([0.485, 0.456, 0.406], np.float32)) / np.array(
            [0.229, 0.224, 0.225], np.float32
        )
    if w.departs("image_resized"):
        x = raw.ResizeBilinear(images=x, size=[spec.resolution, spec.resolution])
    x = w.conv("initial_conv", x, channels, 7, stride=2, padding=spec.stem_padding, bias=False)
    if w.departs("stem_norm"):
        x = w.relu(norm(w, "stem_norm", x))
    if spec.pool_padding == "same":
        return tf.nn.max_pool2d(x, 3, 2, "SAME")
    value = 0.0 if spec.pool_padding == "zero" else tf.float32.min
    x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=value)
    return tf.nn.max_pool2d(x, 3, 2, "VALID")


def norm(w: Writer, name: str, x: Tensor) -> Tensor:
    spec = w.spec.encoder
    return w.batch_norm(name, x, spec.bn_eps, affine=spec.bn_affine)


def norm_relu_conv(
    w: Writer, index: int, x: Tensor, outputs: int, kernel: int, stride: int = 1, gain: float = 1.3
) -> Tensor:
    x = w.relu(norm(w, f"norm_{index}", x))
    padding = w.spec.encoder.strided_padding
    return w.conv(f"conv_{index}", x, outputs, kernel, stride=stride, padding=padding, bias=False, gain=gain)


def resnet_unit(w: Writer, name: str, x: Tensor, outputs: int, stride: int) -> Tensor:
    """Pre-activation unit, bottleneck or basic; a projection where the stride or the width changes."""
    spec = w.spec.encoder

    def body(x: Tensor) -> Tensor:
        with w.scope(name):
            h = w.relu(norm(w, "norm_0", x))
            shortcut = x
            if stride > 1 or x.shape[-1] != outputs:
                source = h if spec.shortcut == "preactivated" else x
                shortcut = w.conv("shortcut", source, outputs, 1, stride=stride, padding="same", bias=False)
            padding = spec.strided_padding
            if spec.block == "basic":
                h = w.conv("conv_0", h, outputs, 3, stride=stride, padding=padding, bias=False)
                h = norm_relu_conv(w, 1, h, outputs, 3, gain=LAST_GAIN)
            else:
                h = w.conv("conv_0", h, outputs // 4, 1, bias=False)
                h = norm_relu_conv(w, 1, h, outputs // 4, 3, stride)
                h = norm_relu_conv(w, 2, h, outputs, 1, gain=LAST_GAIN)
            return w.add(h, shortcut)

    return w.call(body, x)


def revnet_unit(w: Writer, name: str, x: Tensor) -> Tensor:
    """concat[x2, x1 + f(x2)], where f is a bottleneck on half of the channels."""
    channels = x.shape[-1]

    def body(x: Tensor) -> Tensor:
        with w.scope(name):
            x1, x2 = w.split(x, (channels // 2, channels // 2))
            h = norm_relu_conv(w, 0, x2, channels // 8, 1)
            h = norm_relu_conv(w, 1, h, channels // 8, 3)
            h = norm_relu_conv(w, 2, h, channels // 2, 1, gain=LAST_GAIN)
            return tf.concat([x2, w.add(x1, h)], -1)

    return w.call(body, x)


def widen(w: Writer, x: Tensor) -> Tensor:
    """2x2 mean-pool, then zero channels: half of the width on each side."""
    half = x.shape[-1] // 2
    return tf.pad(w.halve(x), [[0, 0], [0, 0], [0, 0], [half, half]])


def trunk(w: Writer, x: Tensor) -> Tensor:
    """[N, R, R, 3] -> avepool_feat [N, num_features]."""
    spec = w.spec.encoder
    widening = 4 if spec.block == "bottleneck" else 1
    first = spec.base_channels * widening
    x = stem(w, x, first if spec.architecture == "revnet" else spec.base_channels)
    for stage, depth in enumerate(spec.depths):
        if spec.architecture == "revnet" and stage > 0:
            x = widen(w, x)
        for unit in range(depth):
            if w.departs("late_strides"):
                last = unit == depth - 1 and stage < len(spec.depths) - 1
                x = resnet_unit(w, f"stage_{stage}/unit_{unit}", x, first * 2**stage, 2 if last else 1)
                continue
            name = f"stage_{stage}/unit_{unit}"
            if spec.architecture == "revnet":
                x = revnet_unit(w, name, x)
            else:
                x = resnet_unit(w, name, x, first * 2**stage, 2 if stage > 0 and unit == 0 else 1)
    x = norm(w, "final_norm", x)
    return w.spatial_mean(w.relu(x) if spec.last_relu else x)


def crelu_features(w: Writer, features: Tensor) -> Tensor:
    """[relu(h), relu(-h)] of the batch-normalised features, [N, 2 * num_features]."""
    spec = w.spec.encoder
    h = w.batch_norm(
        "feature_norm", features, spec.feature_norm_eps, affine=spec.feature_norm_affine,
        statistics=spec.feature_norm_statistics,
    )  # fmt: skip
    if w.style.crelu == "concat_first":
        return w.relu(tf.concat([h, -h], -1))
    return tf.concat([w.relu(h), w.relu(-h)], -1)


def softplus(w: Writer, x: Tensor) -> Tensor:
    if w.departs("stdev_exp"):
        return tf.exp(0.5 * x)
    if w.departs("stdev_sqrt"):
        return tf.sqrt(tf.nn.softplus(x))
    if w.departs("stdev_clipped"):
        return tf.minimum(tf.nn.softplus(x), 2.0) + 1e-3
    if w.style.softplus == "log1p_exp":
        return tf.math.log1p(tf.exp(x))
    return tf.math.log(1.0 + tf.exp(x)) if w.style.softplus == "log_one_plus_exp" else tf.nn.softplus(x)


def standard_normal(w: Writer, like: Tensor) -> Tensor:
    """N(0, 1) noise of the shape of `like`."""
    shape = tf.shape(like)
    if w.departs("truncated_normal"):
        return tf.raw_ops.TruncatedNormal(shape=shape, dtype=tf.float32)
    if w.style.noise == "broadcast":  # as MultivariateNormalDiag of tensorflow_probability 0.8
        batch = tf.broadcast_dynamic_shape(shape[:-1], tf.shape(like * 2.0)[:-1])
        event = tf.broadcast_dynamic_shape(shape[-1:], [like.shape[-1]])
        noise = v1.random_normal(tf.concat([[1], batch, event], 0))
        return tf.reshape(noise, tf.concat([batch, event], 0))
    if w.style.noise == "raw":
        return tf.raw_ops.RandomStandardNormal(shape=shape, dtype=tf.float32)
    if w.style.noise in ("tfp", "sample_axis"):  # as a distribution's sample(): one leading sample axis
        noise = v1.random_normal(tf.concat([[1], shape], 0))
        return tf.reshape(noise, shape) if w.style.noise == "tfp" else noise
    return v1.random_normal(shape)


def encoder(w: Writer, x: Tensor) -> dict[str, Tensor]:
    """[N, R, R, 3] -> the outputs of `encode`."""
    spec, z_dim = w.spec.encoder, w.spec.z_dim
    with w.scope("GenEncWrapper"), w.scope("Encoder"):
        features = trunk(w, x)
        crelu = crelu_features(w, features)
        h = residual_mlp(w, "head", spec.head, features)
        if spec.output != "stochastic":
            mean = w.linear("latent", h, z_dim)
            mean = tf.tanh(mean) if spec.output == "tanh" else mean
            stdev, sample = tf.zeros_like(mean), tf.identity(mean)
        else:
            if spec.latent == "two":
                mean, raw_stdev = w.linear("latent_mean", h, z_dim), w.linear("latent_stdev", h, z_dim)
            else:
                mean, raw_stdev = w.split(w.linear("latent", h, 2 * z_dim), (z_dim, z_dim))
            stdev = softplus(w, raw_stdev)
            if w.spec.stdev_offset:
                stdev = stdev + w.spec.stdev_offset
            sample = tf.reshape(mean + stdev * standard_normal(w, mean), tf.shape(mean))
            sample.set_shape([None, z_dim])
            if w.spec.sample_activation:
                sample = tf.tanh(sample)
    latents = {"z_sample": sample, "z_mean": mean, "z_stdev": stdev}
    default = tf.identity(latents[spec.default_output])
    return {"default": default, **latents, "avepool_feat": features, "bn_crelu_feat": crelu}
