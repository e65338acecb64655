"""Residual MLP, as in the encoder's head and in H and J of the discriminator."""

from __future__ import annotations

import tensorflow as tf

from .layers import Tensor, Writer
from .spec import MLPSpec


def activation(w: Writer, spec: MLPSpec, x: Tensor) -> Tensor:
    if w.departs("elu"):
        return tf.nn.elu(x)
    if w.departs("relu6"):
        return tf.nn.relu6(x)
    if w.departs("gelu"):
        return tf.nn.gelu(x)
    if w.departs("swish"):
        return x * tf.sigmoid(x)
    return w.relu(x) if spec.activation == "relu" else w.leaky_relu(x, spec.slope)


def norm(w: Writer, spec: MLPSpec, name: str, x: Tensor) -> Tensor:
    if w.departs("layer_norm"):
        with w.scope(name):
            mean, var = tf.nn.moments(x, [-1], keepdims=True)
            gain = w.trained("gain", w.variables.vector(w.name("gain"), x.shape[-1], 0.6, 1.4))
            return (x - mean) * tf.math.rsqrt(var + 1e-5) * gain
    return w.batch_norm(name, x, spec.norm_eps) if spec.norm == "batch" else x


def block(w: Writer, spec: MLPSpec, x: Tensor, first: bool) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return w.linear(name, x, spec.width, bias=spec.bias, gain=0.9)

    differs = x.shape[-1] != spec.width
    if w.departs("post_inner"):
        h = activation(w, spec, linear("linear_1", activation(w, spec, linear("linear_0", x))))
        return w.add(linear("skip", x) if differs else x, h)
    if w.departs("projection_activated"):
        h = activation(w, spec, x)
        return w.add(linear("linear_1", activation(w, spec, linear("linear_0", h))), linear("skip", h))
    skip: Tensor | None = x
    if spec.projection == "always" or (spec.projection == "auto" and differs):
        skip = linear("skip", x)
    elif differs:
        skip = None
    if spec.order == "pre":
        h = x
        if spec.first_activation or not first:
            h = activation(w, spec, norm(w, spec, "norm_0", h))
        h = activation(w, spec, norm(w, spec, "norm_1", linear("linear_0", h)))
        h = linear("linear_1", h)
        return h if skip is None else w.add(h, skip)
    h = activation(w, spec, norm(w, spec, "norm_0", linear("linear_0", x)))
    h = norm(w, spec, "norm_1", linear("linear_1", h))
    return activation(w, spec, h if skip is None else w.add(h, skip))


def residual_mlp(w: Writer, name: str, spec: MLPSpec, x: Tensor) -> Tensor:
    """[N, D] -> [N, width]."""

    def body(x: Tensor) -> Tensor:
        with w.scope(name):
            if w.departs("outer_linears"):
                x = activation(w, spec, w.linear("first", x, spec.width))
            for i in range(spec.layers // 2):
                with w.scope(f"block_{i}"):
                    x = block(w, spec, x, first=i == 0)
            if spec.order == "pre" and spec.last_activation:
                x = activation(w, spec, norm(w, spec, "norm", x))
            return activation(w, spec, w.linear("last", x, spec.width)) if w.departs("outer_linears") else x

    return w.call(body, x)
