"""F on images, H on latents, J on both, and their three scores."""

from __future__ import annotations

import tensorflow as tf

from .generator import attention
from .layers import Tensor, Writer
from .mlp import residual_mlp
from .spec import DISCRIMINATOR_DOWN, DISCRIMINATOR_WIDTHS


def discriminator_block(w: Writer, name: str, x: Tensor, outputs: int, down: bool, first: bool) -> Tensor:
    """relu - conv - relu - conv - (mean pool), beside (1x1 conv - mean pool), the identity, or nothing."""
    spec = w.spec.discriminator

    def body(x: Tensor) -> Tensor:
        with w.scope(name):
            h = w.relu(x) if spec.first_relu or not first else x
            h = w.conv("conv0", h, outputs, 3)
            h = w.conv("conv1", w.relu(h), outputs, 3)
            h = w.halve(h) if down else h
            if not down and x.shape[-1] == outputs:
                return w.add(h, x) if spec.last_skip else h
            if first and down and w.style.first_skip == "pool_conv":
                return w.add(h, w.conv("conv_sc", w.halve(x), outputs, 1))
            x = w.conv("conv_sc", x, outputs, 1)
            return w.add(h, w.halve(x) if down else x)

    return w.call(body, x)


def image_features(w: Writer, x: Tensor) -> Tensor:
    """F: [N, R, R, 3] -> [N, channels], summed over positions."""
    spec, resolution = w.spec.discriminator, w.spec.generator.resolution
    with w.scope("F"):
        for i, multiple in enumerate(DISCRIMINATOR_WIDTHS[resolution]):
            down = i < DISCRIMINATOR_DOWN[resolution]
            name = f"DBlock_{i}" if i else "DBlock"
            x = discriminator_block(w, name, x, spec.base_channels * multiple, down, first=i == 0)
            if down and x.shape[1] == spec.attention_resolution:
                x = attention(w, x)
        x = w.relu(x)
        if w.style.pooling == "mean":
            return tf.reduce_sum(x, [1, 2])
        if w.style.pooling == "flat":
            return tf.reduce_sum(tf.reshape(x, [-1, x.shape[1] * x.shape[2], x.shape[3]]), 1)
        return w.spatial_mean(x) * float(x.shape[1] * x.shape[2])


def score(w: Writer, name: str, x: Tensor) -> Tensor:
    """[N, D] -> [N]."""
    if w.departs("score_product"):
        with w.scope(name):
            weight = tf.reshape(w.matrix(x.shape[-1], 1, 1.3), [-1])
            return tf.reduce_sum(x * weight, 1) + w.trained("b", w.variables.vector(w.name("b"), 1, -0.15, 0.15))
    y = w.linear(name, x, 1)
    if w.style.score == "squeeze":
        return tf.squeeze(y, [1])
    if w.style.score == "sum":
        return tf.reduce_sum(y, 1)
    return tf.reshape(y, [-1]) if w.style.score == "reshape" else y[:, 0]


def discriminator(w: Writer, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    """Image and latent -> the three scores, [N] each."""
    spec = w.spec.discriminator
    with w.scope("Discriminator"):
        f = image_features(w, x)
        h = residual_mlp(w, "H", spec.z_mlp, z)
        if spec.combine == "sum":
            joint = f + h
        elif spec.combine == "product":
            joint = f * h
        else:
            joint = tf.concat([f, h] if spec.combine == "concat_fh" else [h, f], -1)
        j = residual_mlp(w, "J", spec.joint_mlp, joint)
        return {
            "score_x": score(w, "score_x", f),
            "score_z": score(w, "score_z", h),
            "score_xz": score(w, "score_xz", j),
        }
