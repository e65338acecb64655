"""Match of the discriminator: F on images, H on latents, J on both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from bigbigan.config import DISCRIMINATOR_CHANNELS, DiscriminatorConfig
from weights_conversion.algebra import Layer, Poly, equal, of_layer
from weights_conversion.errors import ConversionError
from weights_conversion.layers import LayerTable
from weights_conversion.match_encoder import settle_head
from weights_conversion.match_mlp import match_mlp
from weights_conversion.patterns import State, affine, attention, expect, mismatch, parts_of

MLP_EPS = 1e-3  # of `bigbigan.layers.ResidualMLP`


def match_discriminator(outputs: dict[str, Poly], table: LayerTable, state: State) -> DiscriminatorConfig:
    """Configuration; writes the state dict of `bigbigan.discriminator.Discriminator`."""
    if missing := {"score_x", "score_z", "score_xz"} - set(outputs):
        raise ConversionError(f"it has no {', '.join(sorted(missing))}, and the port has three scores")
    f = _features(state, state.linear("score_x", "score_x", outputs["score_x"]).input)
    h = state.linear("score_z", "score_z", outputs["score_z"]).input
    top = state.linear("score_xz", "score_xz", outputs["score_xz"]).input
    z_mlp, z = match_mlp(state, "h", "H", h, lambda p: p.only is not None and p.only.kind == "Input")
    combiner = _Combiner(f, h)
    joint, _ = match_mlp(state, "j", "J", top, combiner)
    if combiner.swapped:
        _swap(state, f.shape[-1], h.shape[-1])
    facts = _image_part(state, f, table)
    settle_head(state, "h", MLP_EPS)
    settle_head(state, "j", MLP_EPS)
    return DiscriminatorConfig(
        z_dim=z.shape[-1],
        z_mlp=z_mlp,
        joint_mlp=joint,
        combine=combiner.kind,  # type: ignore[arg-type]
        scores=("x", "z", "xz"),
        **facts,  # type: ignore[arg-type]
    )


def _features(state: State, poly: Poly) -> Poly:
    """F's features, a sum over positions, which score_x may take as a mean or with scales of its own."""
    mean = poly.single
    if mean is None or mean.kind != "Mean" or not equal(poly.const, 0):
        return poly
    area = mean.input.shape[1] * mean.input.shape[2]
    scale = np.broadcast_to(poly.terms[(mean,)] / area, (poly.shape[-1],))
    weight = state.tensors["score_x.weight"]
    state.tensors["score_x.weight"] = (weight.double() * torch.from_numpy(scale.copy())).float()
    return of_layer(mean).scale(float(area))


@dataclass
class _Combiner:
    """Recognises what J takes; remembers how F(x) and H(z) are joined in it."""

    f: Poly
    h: Poly
    kind: str = ""
    swapped: bool = False

    def __call__(self, poly: Poly) -> bool:
        keys = [self.f.key(), self.h.key()]
        layer = poly.only
        found = [p.key() for p in layer.inputs] if layer is not None and layer.kind in ("Concat", "Add") else []
        if found in (keys, keys[::-1]) and layer is not None:
            self.kind = "concat" if layer.kind == "Concat" else "sum"
            self.swapped = self.kind == "concat" and found != keys
        elif poly.monomials and poly.key() == (self.f * self.h).key():
            self.kind = "product"
        else:
            return False
        return True


def _swap(state: State, f: int, h: int) -> None:
    """[H, F] becomes [F, H] in whatever J applies to its input."""
    for name in ("linear1.weight", "skip.weight"):
        if (weight := state.tensors.get(f"j.0.{name}")) is not None and weight.shape[1] == f + h:
            state.tensors[f"j.0.{name}"] = weight.roll(-h, dims=1).contiguous()
    norm = state.norms.get("j.0.norm1")
    if norm is not None and norm.scale.size == f + h:
        norm.scale, norm.shift = np.roll(norm.scale, -h), np.roll(norm.shift, -h)
        values = {k: getattr(norm.hint, k) for k in ("var", "mean")}
        values = {k: np.roll(v, -h) if v is not None and v.size == f + h else v for k, v in values.items()}
        norm.hint = type(norm.hint)(values["var"], norm.hint.eps, values["mean"])


@dataclass
class _Block:
    x: Poly  # input
    main: Poly
    conv1: Layer
    skip: Poly | None
    relu: bool
    downsample: bool
    attended: bool
    output: Poly


def _image_part(state: State, f: Poly, table: LayerTable) -> dict[str, object]:
    mean = affine("F, features", f, "Mean")
    area = mean.input.shape[1] * mean.input.shape[2]
    if not np.allclose(f.terms[(mean,)], area, rtol=1e-6) or not equal(f.const, 0):
        raise mismatch("F, features", f"a sum over {area} positions", f)
    x: Poly = expect("F, last ReLU", mean.input, "Relu").input
    blocks: list[_Block] = []
    while x.only is None or x.only.kind != "Input":
        where = f"F, block {len(blocks) + 1} from the end"
        under = attention(state, "f.attention", where, table, x)
        block = _block(where, under if under is not None else x, table)
        block.attended = under is not None
        blocks.insert(0, block)
        x = block.x
        if len(blocks) > 16:
            raise ConversionError("F: more than 16 blocks")
    resolution, base = x.shape[1], blocks[0].output.shape[-1]
    widths = DISCRIMINATOR_CHANNELS.get(resolution, ())
    found = [block.output.shape[-1] for block in blocks]
    first = found[0] // widths[0] if widths else 0
    if found != [first * n for n in widths]:
        raise ConversionError(f"F: channels {found} at {resolution} pixels are not BigGAN's {widths}")
    base = first
    halvings = 2 if resolution == 32 else len(widths) - 1
    if [b.downsample for b in blocks] != [i < halvings for i in range(len(blocks))]:
        raise ConversionError(f"F: blocks that halve the resolution: {[b.downsample for b in blocks]}")
    if not all(b.relu for b in blocks[1:]):
        raise ConversionError("F: a block after the first does not begin with a ReLU")
    last_skip = _write(state, blocks, x.shape[-1])
    sides = [b.output.shape[1] for b in blocks if b.attended]
    return {
        "resolution": resolution,
        "image_channels": x.shape[-1],
        "base_channels": base,
        "attention_resolution": sides[0] if sides else 0,
        "first_relu": blocks[0].relu,
        "last_skip": last_skip,
    }


def _write(state: State, blocks: list[_Block], channels: int) -> bool:
    """Weights of the blocks; whether blocks that keep their shape have identity skips."""
    identities = set()
    widths = [channels, *(block.output.shape[-1] for block in blocks)]
    for i, (block, (inputs, outputs)) in enumerate(zip(blocks, itertools.pairwise(widths), strict=True)):
        where, name = f"F, block {i}", f"f.blocks.{i}"
        relu2 = expect(where, block.conv1.input, "Relu")
        conv1 = state.conv(f"{name}.conv1", where, relu2.input, 3, bias=True)
        if conv1.stride != 1 or conv1.pads != (1, 1, 1, 1):
            raise mismatch(where, "a 3x3 convolution of stride 1", conv1)
        second = f"{name}.conv2.conv" if block.downsample else f"{name}.conv2"
        state.conv(second, where, block.main, 3, bias=True)
        if block.downsample or inputs != outputs:
            if block.skip is None or block.skip.single is None or block.skip.single.kind != "Conv":
                raise mismatch(f"{where}, skip", "a 1x1 convolution", block.output)
            state.conv(f"{name}.shortcut", f"{where}, skip", block.skip, 1, bias=True)
        else:
            if block.skip is not None and block.skip.key() != block.x.key():
                raise mismatch(f"{where}, skip", "the block's input", block.skip)
            identities.add(block.skip is not None)
    if len(identities) > 1:
        raise ConversionError("F: some blocks that keep their shape have skips and some have not")
    return identities.pop() if identities else DiscriminatorConfig.last_skip


def _block(where: str, x: Poly, table: LayerTable) -> _Block:
    output, pooled = x, x.only
    parts = parts_of(x)
    if parts is None and pooled is not None and pooled.kind == "AvgPool":  # pooled after the sum
        inner = parts_of(pooled.input)
        if inner is not None:
            a, b = (table.average_pool(p, (*pooled.shape[:3], p.shape[-1]), pooled.name) for p in inner)
            parts = a, b
    errors: list[ConversionError] = []
    for main, skip in (parts, parts[::-1]) if parts else ((x, None),):
        try:
            return _branch(where, main, skip, output, table)
        except ConversionError as error:
            errors.append(error)
    raise errors[0]


def _branch(where: str, main: Poly, skip: Poly | None, output: Poly, table: LayerTable) -> _Block:
    layer = main.single
    downsample = layer is not None and layer.kind == "AvgPool"
    if downsample and layer is not None:
        conv = expect(where, layer.input, "Conv")
        main = of_layer(conv).scale(main.terms[(layer,)]).shift(main.const)
    conv2 = affine(where, main, "Conv")
    if conv2.kernel.shape[:2] != (3, 3) or conv2.stride != 1 or conv2.pads != (1, 1, 1, 1):
        raise mismatch(where, "a 3x3 convolution of stride 1", main)
    conv1 = affine(where, expect(where, conv2.input, "Relu").input, "Conv")
    if conv1.kernel.shape[:2] != (3, 3):
        raise mismatch(where, "a 3x3 convolution", conv1)
    y = conv1.input
    relu = y.only if y.only is not None and y.only.kind == "Relu" else None
    candidates = [(relu.input, True)] if relu is not None else []
    for x, activated in [*candidates, (y, False)]:
        if _fits(skip, x, downsample, table):
            return _Block(x, main, conv2, skip, activated, downsample, False, output)
    raise mismatch(f"{where}, skip", f"the block's input {y} before its ReLU, pooled and convolved", skip or main)


def _fits(skip: Poly | None, x: Poly, downsample: bool, table: LayerTable) -> bool:
    if skip is None:
        return True
    if not downsample and skip.key() == x.key():
        return True
    conv = skip.single
    if conv is None or conv.kind != "Conv" or conv.kernel.shape[:2] != (1, 1):
        return False
    if downsample:
        shape = (x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3])
        x = table.average_pool(x, shape, conv.name)
    return conv.input.key() == x.key()
