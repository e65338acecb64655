"""Match of the generator, from the image back to the latent."""

from __future__ import annotations

from typing import get_args, get_type_hints

import numpy as np

from bigbigan.config import GENERATOR_CHANNELS, GeneratorConfig
from weights_conversion.algebra import Hint, Layer, Poly, of_layer, vector
from weights_conversion.errors import ConversionError
from weights_conversion.layers import LayerTable
from weights_conversion.patterns import FoundNorm, State, affine, attention, expand, expect, mismatch, parts_of

Chunk = tuple[int, int]


def match_generator(outputs: dict[str, Poly], table: LayerTable, state: State) -> GeneratorConfig:
    """Configuration; writes the state dict of `bigbigan.generator.Generator`."""
    image = expect("image", outputs["default"], "Tanh")
    conv = state.conv("conv", "last convolution", table.narrow(image.input), 3, bias=True)
    relu = expect("last ReLU", conv.input, "Relu")
    x: Poly = of_layer(state.norm("norm", "last batch norm", relu.input))
    names: list[str] = []
    chunks: list[Chunk] = []
    widths, attention_side = [x.shape[-1]], 0
    sides = list(GENERATOR_CHANNELS)
    if image.shape[1] not in sides or image.shape[1] != image.shape[2]:
        raise mismatch("image", f"a side of {sides}", image)
    count = len(GENERATOR_CHANNELS[image.shape[1]]) - 1
    for i in reversed(range(count)):
        where = f"generator block {i}"
        under = attention(state, "attention", where, table, x)
        if under is not None:
            attention_side, x = x.shape[1], under
        x, pair = _block(state, f"blocks.{i}", where, x)
        names += [f"blocks.{i}.norm1.norm", f"blocks.{i}.norm2.norm"]
        if len(set(pair)) != 1:
            raise ConversionError(f"{where}: its two norms take different parts of z, {pair}")
        chunks.insert(0, pair[0])
        widths.insert(0, x.shape[-1])
    chunks.insert(0, _seed(state, x))
    eps = state.common_eps([*names, "norm"], GeneratorConfig.bn_eps)
    state.settle_norms(names, eps)
    if not state.settle_norms(["norm"], eps):
        size = state.norms["norm"].scale.size
        state.put("norm.weight", np.ones(size))
        state.put("norm.bias", np.zeros(size))
    _check(widths, chunks, image)
    mode, size = _upsampled(outputs.get("upsampled", outputs["default"]), image)
    return GeneratorConfig(
        resolution=image.shape[1],  # type: ignore[arg-type]
        image_channels=image.shape[3],
        base_channels=widths[-1] // GENERATOR_CHANNELS[image.shape[1]][-1],
        z_chunks=tuple(high - low for low, high in chunks),
        shared_dim=_shared(table),
        attention_resolution=attention_side,
        bn_eps=eps,
        upsample_mode=mode,  # type: ignore[arg-type]
        upsample_size=size,
    )


def _check(widths: list[int], chunks: list[Chunk], image: Layer) -> None:
    table = GENERATOR_CHANNELS[image.shape[1]]
    if any(width != widths[-1] * n // table[-1] for width, n in zip(widths, table, strict=True)):
        raise ConversionError(f"generator: channels {widths} are no multiple of BigGAN's {table}")
    ends = [0, *(high for _, high in chunks)]
    if any(low != end for (low, _), end in zip(chunks, ends, strict=False)):
        raise ConversionError(f"generator: z is cut into {chunks}, which are not neighbours from the seed on")


def _shared(table: LayerTable) -> int:
    found = {layer.shared for layer in table.layers if layer.kind == "Dense" and layer.shared}
    return found.pop() if len(found) == 1 else 0


def _block(state: State, name: str, where: str, x: Poly) -> tuple[Poly, list[Chunk]]:
    parts = parts_of(x)
    if parts is None:
        raise mismatch(where, "the sum of a residual branch and a skip", x)
    for main, skip in (parts, parts[::-1]):
        up = skip.single
        if up is not None and up.kind == "Upsample" and main.single is not None and main.single.kind == "Conv":
            break
    else:
        raise mismatch(where, "a convolution, and an upsampled 1x1 convolution as its skip", x)
    inner = of_layer(affine(f"{where}, skip", up.input, "Conv"))
    projection = state.conv(
        f"{name}.shortcut", f"{where}, skip", inner.scale(skip.terms[(up,)]).shift(skip.const), 1, bias=True
    )
    conv2 = state.conv(f"{name}.conv2", f"{where}, second convolution", main, 3, bias=True)
    relu2 = expect(f"{where}, second ReLU", conv2.input, "Relu")
    conv1, chunk2 = _conditional(state, f"{name}.norm2", f"{where}, second norm", relu2.input)
    free = of_layer(conv1)
    conv1 = state.conv(f"{name}.conv1.conv", f"{where}, first convolution", free, 3, bias=True, free=True)
    relu1 = expect(f"{where}, first ReLU", expect(f"{where}, upsampling", conv1.input, "Upsample").input, "Relu")
    source, chunk1 = _conditional(state, f"{name}.norm1", f"{where}, first norm", relu1.input)
    if projection.input.only is not source:
        raise mismatch(f"{where}, skip", f"an input #{source.number}", projection)
    return projection.input, [chunk1, chunk2]


def _conditional(state: State, name: str, where: str, poly: Poly) -> tuple[Layer, Chunk]:
    """x * A + B with A and B linear in a chunk of z: the data and the chunk.

    With gain g and offset o: A = r (1 + g) and B = o - mean * A, where r = 1 / sqrt(var + eps).
    """
    poly = expand(poly, keep=poly.shape)
    data = [layer for layer in poly.layers if len(layer.shape) == 4 and layer.shape == poly.shape]
    gains = [m for m in poly.monomials if len(m) == 2]
    if len(data) != 1 or len(gains) != 1 or data[0] not in gains[0]:
        raise mismatch(where, "data times a gain, plus an offset", poly)
    x = data[0]
    gain = next(layer for layer in gains[0] if layer is not x)
    offsets = [m[0] for m in poly.monomials if len(m) == 1 and m[0] not in (x, gain)]
    if len(offsets) != 1:
        raise mismatch(where, "one offset", poly)
    size = poly.shape[-1]
    a1, a0 = vector(poly.coefficient(x, gain), size), vector(poly.coefficient(x), size)
    b1, b0 = vector(poly.coefficient(gain), size), vector(poly.const, size)
    hint = poly.hint if poly.hint.var is not None and poly.hint.var.size == size else Hint()
    r = 1 / np.sqrt(hint.var + hint.eps) if hint.var is not None else np.abs(a1)
    if not (r > 0).all() or not (a1 != 0).all():
        raise mismatch(where, "a batch norm without zero scales", poly)
    mean = -b1 / a1
    chunk = _chunk(f"{where}, gain", gain)
    if _chunk(f"{where}, offset", offsets[0]) != chunk:
        raise mismatch(f"{where}, offset", f"z[{chunk[0]}:{chunk[1]}]", offsets[0])
    state.put(f"{name}.gain.linear.weight", (gain.weight * (a1 / r)).T)
    state.put(f"{name}.gain.linear.bias", a0 / r - 1)
    state.put(f"{name}.offset.linear.weight", (offsets[0].weight * poly.coefficient(offsets[0])).T)
    state.put(f"{name}.offset.linear.bias", b0 + mean * a0)
    found = Hint(1 / r**2 - (hint.eps or 0.0), hint.eps or 0.0, mean)
    state.norms[f"{name}.norm"] = FoundNorm(r, -mean * r, found, affine=False)
    if hint.eps is None:
        state.norms[f"{name}.norm"].hint = Hint(None, None, mean)
    return x, chunk


def _chunk(where: str, layer: Layer) -> Chunk:
    source = layer.input.only if layer.kind == "Dense" else None
    if source is None or source.kind not in ("Slice", "Input"):
        raise mismatch(where, "a linear layer of a part of z", layer)
    if source.kind == "Input":
        return 0, source.shape[-1]
    expect(where, source.input, "Input")
    return source.low, source.high


def _seed(state: State, poly: Poly) -> Chunk:
    move = expect("seed", poly, "Move")
    dense = affine("seed", move.input, "Dense")
    if move.shape[1:3] != (4, 4):
        raise mismatch("seed", "4x4 positions", move)
    columns = move.index[0].reshape(-1)
    size = dense.weight.shape[1]
    if columns.max() >= size:
        raise mismatch("seed", "each image from its own latent", move)
    state.put("seed.weight", (dense.weight * move.input.terms[(dense,)])[:, columns].T)
    state.put("seed.bias", vector(move.input.const, size)[columns])
    return _chunk("seed", dense)


def _upsampled(poly: Poly, image: Layer) -> tuple[str, int]:
    layer = poly.only
    if layer is None or layer.kind not in ("Upsample", "Nearest", "Bilinear") or layer.input.only is not image:
        if poly.only is image:
            return GeneratorConfig.upsample_mode, image.shape[1]
        raise mismatch("upsampled", "the image, resized", poly)
    if layer.kind == "Bilinear" and layer.mode not in get_args(get_type_hints(GeneratorConfig)["upsample_mode"]):
        raise mismatch("upsampled", "a way of resizing that the port has", poly)
    return (layer.mode if layer.kind == "Bilinear" else "nearest"), layer.shape[1]
