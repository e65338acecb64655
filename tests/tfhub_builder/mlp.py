"""Residual MLP, as in the encoder's head and in H and J of the discriminator."""

from __future__ import annotations

from .layers import Tensor, Writer
from .spec import MLPSpec


def activation(w: Writer, spec: MLPSpec, x: Tensor) -> Tensor:
    return w.relu(x) if spec.activation == "relu" else w.leaky_relu(x, spec.slope)


def norm(w: Writer, spec: MLPSpec, name: str, x: Tensor) -> Tensor:
    return w.batch_norm(name, x, spec.norm_eps) if spec.norm == "batch" else x


def block(w: Writer, spec: MLPSpec, x: Tensor, first: bool) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        return w.linear(name, x, spec.width, bias=spec.bias, gain=0.9)

    differs = x.shape[-1] != spec.width
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
            for i in range(spec.layers // 2):
                with w.scope(f"block_{i}"):
                    x = block(w, spec, x, first=i == 0)
            if spec.order == "pre" and spec.last_activation:
                x = activation(w, spec, norm(w, spec, "norm", x))
            return x

    return w.call(body, x)
