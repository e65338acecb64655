"""BigGAN's generator with one learned class vector."""

from __future__ import annotations

import tensorflow as tf

from .layers import Tensor, Writer
from .spec import GENERATOR_WIDTHS

raw = tf.raw_ops


def attention(w: Writer, x: Tensor) -> Tensor:
    """x + gamma * o, where queries see keys and values on a 2x2 max-pooled grid, without scaling."""
    with w.scope("attention"):
        _, height, width, channels = x.shape
        positions = height * width
        theta = w.conv("theta", x, channels // 8, 1, bias=False)
        phi = tf.nn.max_pool2d(w.conv("phi", x, channels // 8, 1, bias=False), 2, 2, "VALID")
        g = tf.nn.max_pool2d(w.conv("g", x, channels // 2, 1, bias=False), 2, 2, "VALID")
        theta = w.reshape(theta, [positions, channels // 8])
        theta = theta if w.spec.attention_scale == 1 else theta * w.spec.attention_scale
        phi = w.reshape(phi, [positions // 4, channels // 8])
        g = w.reshape(g, [positions // 4, channels // 2])
        if w.style.attention == "einsum":
            weights = tf.nn.softmax(raw.Einsum(inputs=[theta, phi], equation="nqc,nkc->nqk"))
            o = raw.Einsum(inputs=[weights, g], equation="nqk,nkc->nqc")
        else:
            weights = tf.nn.softmax(tf.matmul(theta, phi, transpose_b=True))
            o = tf.matmul(weights, g)
        o = w.conv("o_conv", w.reshape(o, [height, width, channels // 2]), channels, 1, bias=False)
        gamma = w.trained("gamma", w.variables.vector(w.name("gamma"), 1, 0.5, 0.9).reshape(()))
        return w.add(gamma * o, x)


def class_rows(w: Writer, z: Tensor) -> Tensor:
    """The one learned class vector for each row of z, [N, class_dim]."""
    size = w.spec.generator.class_dim
    with w.scope("linear"):
        row = w.trained("w", w.variables.weight(w.name("w"), (1, size), 1, 1.0))
        batch = tf.shape(z)[0]
        if w.style.class_broadcast == "tile":
            return tf.tile(row, tf.stack([batch, 1]))
        if w.style.class_broadcast == "gather":
            return tf.gather(row, tf.fill([batch], 0))
        if w.style.class_broadcast == "constant_row":
            return row + tf.zeros(tf.stack([batch, 1]))
        return tf.matmul(tf.fill(tf.stack([batch, 1]), 1.0), row)


def generator_block(w: Writer, name: str, x: Tensor, condition: Tensor, outputs: int) -> Tensor:
    """norm - relu - upsample - conv - norm - relu - conv, beside upsample - 1x1 conv."""
    eps = w.spec.generator.bn_eps

    def body(x: Tensor, condition: Tensor) -> Tensor:
        with w.scope(name):
            h = w.relu(w.batch_norm("BatchNorm", x, eps, condition=condition))
            h = w.conv("conv0", w.double(h), outputs, 3)
            h = w.relu(w.batch_norm("BatchNorm_1", h, eps, condition=condition))
            h = w.conv("conv1", h, outputs, 3)
            if w.style.generator_skip == "upsample_conv":
                return w.add(h, w.conv("conv_sc", w.double(x), outputs, 1))
            return w.add(h, w.double(w.conv("conv_sc", x, outputs, 1)))

    return w.call(body, x, condition)


def generator(w: Writer, z: Tensor) -> Tensor:
    """[N, z_dim] -> image [N, R, R, 3] in [-1, 1]."""
    spec = w.spec.generator
    widths = [spec.base_channels * multiple for multiple in GENERATOR_WIDTHS[spec.resolution]]
    with w.scope("GenEncWrapper"), w.scope("Generator"):
        if w.departs("normalised_z"):
            z = z * tf.math.rsqrt(tf.maximum(tf.reduce_sum(tf.square(z), 1, keepdims=True), 1e-12)) * 4.0
        chunks = w.split(z, spec.z_chunks)
        conditions = chunks[1:]
        if spec.class_dim:
            rows = class_rows(w, z)
            conditions = [tf.concat([rows, c] if spec.class_first else [c, rows], -1) for c in conditions]
        with w.scope("GenZ"):
            x = w.linear("G_linear", chunks[0], 4 * 4 * widths[0])
        x = w.reshape(x, [4, 4, widths[0]])
        for i, (condition, outputs) in enumerate(zip(conditions, widths[1:], strict=True)):
            x = generator_block(w, f"GBlock_{i}" if i else "GBlock", x, condition, outputs)
            if x.shape[1] == spec.attention_resolution:
                x = attention(w, x)
        x = w.relu(w.batch_norm("BatchNorm", x, spec.bn_eps))
        if w.departs("clipped"):
            return tf.clip_by_value(w.conv("conv_2d", x, 3, 3), -1.0, 1.0)
        if w.departs("sigmoid"):
            return 2.0 * tf.sigmoid(w.conv("conv_2d", x, 3, 3)) - 1.0
        return (
            tf.tanh(w.conv("conv_2d", x, 8, 3))[..., :3]
            if w.style.padded_image
            else tf.tanh(w.conv("conv_2d", x, 3, 3))
        )


def upsampled(w: Writer, image: Tensor) -> Tensor:
    """The image at `upsampled_size`."""
    mode, side = w.spec.generator.upsampled, w.spec.generator.upsampled_size
    size = tf.constant([side, side])
    if w.style.dynamic_shapes:
        size = tf.shape(image)[1:3] * tf.constant(side // image.shape[1])
    if w.departs("bicubic"):
        y = raw.ResizeBicubic(images=image, size=size)
    elif w.departs("bicubic_half_pixel"):
        y = raw.ResizeBicubic(images=image, size=size, half_pixel_centers=True)
    elif w.departs("area"):
        y = raw.ResizeArea(images=image, size=size)
    elif mode == "nearest":
        y = raw.ResizeNearestNeighbor(images=image, size=size)
    else:
        y = raw.ResizeBilinear(
            images=image, size=size, align_corners=mode == "bilinear-aligned", half_pixel_centers=mode == "bilinear"
        )
    y.set_shape([None, side, side, 3])
    return y
