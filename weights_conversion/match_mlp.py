"""Match of a residual MLP, from its output back to its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bigbigan.config import MLPConfig
from weights_conversion.algebra import Layer, Poly, equal, of_layer
from weights_conversion.errors import ConversionError
from weights_conversion.patterns import State, affine, mismatch, parts_of

ACTIVATIONS = ("Relu", "LeakyRelu")


@dataclass
class Block:
    """linear1, its activation, linear2, and a skip; polynomials as found."""

    first: Poly  # linear1 with what follows it, up to the activation
    second: Poly  # linear2 with what follows it, up to the sum
    skip: Poly | None  # projection
    has_skip: bool
    inputs: Poly
    activated: Poly | None  # what the activation before linear1 takes, if there is one


def match_mlp(
    state: State, name: str, where: str, output: Poly, is_input: Callable[[Poly], bool]
) -> tuple[MLPConfig, Poly]:
    """Configuration, and the polynomial that is the input; weights are written under `name`."""
    last, poly, kinds = None, output, []
    if (layer := output.only) is not None and layer.kind in ACTIVATIONS:
        last, poly = layer, _residual(layer.input)
        kinds.append(_activation(layer))
    blocks: list[Block] = []
    post = False
    while True:
        block = _block(f"{where}, {len(blocks) + 1} blocks from the end", poly, is_input)
        blocks.insert(0, block)
        kinds += [_activation(layer) for layer in _activations(block)]
        if is_input(block.inputs):
            break
        if block.activated is None:  # post-activation: the block before ends in its activation
            layer = block.inputs.only
            if layer is None or layer.kind not in ACTIVATIONS:
                raise mismatch(where, "an activation between residual blocks", block.inputs)
            post, poly = True, layer.input
            kinds.append(_activation(layer))
        else:
            poly = block.inputs
        if len(blocks) > 32:
            raise ConversionError(f"{where}: more than 32 residual blocks")
    if len(set(kinds)) != 1:
        raise mismatch(where, f"one kind of activation, not {sorted(set(kinds))}", output)
    # One block from raw input to activation is both; a norm behind linear2 tells.
    post = post or (len(blocks) == 1 and last is not None and blocks[0].activated is None and _scaled(blocks[0].second))
    return _write(state, name, where, blocks, last, post, kinds[0]), blocks[0].inputs


def _residual(poly: Poly) -> Poly:
    """The residual sum under a batch norm, or the sum itself with its bias."""
    layer = poly.single
    if layer is not None and layer.kind == "Add" and not equal(poly.terms[(layer,)], 1):
        return of_layer(layer)
    return poly


def _scaled(poly: Poly) -> bool:
    return not all(equal(c, 1) for m, c in poly.terms.items() if m)


def _activation(layer: Layer) -> str:
    if layer.kind == "LeakyRelu" and layer.slope != 0.2:
        raise mismatch("residual MLP", "a leaky ReLU of slope 0.2", layer)
    return {"Relu": "relu", "LeakyRelu": "leaky_relu"}[layer.kind]


def _activations(block: Block) -> list[Layer]:
    second = block.second.single
    first = block.first.single
    assert second is not None and first is not None
    return [x for x in (second.input.only, first.input.only if block.activated is not None else None) if x is not None]


def _block(where: str, poly: Poly, is_input: Callable[[Poly], bool]) -> Block:
    parts = parts_of(poly)
    if parts is None:
        return _branch(where, poly, None, is_input)
    errors = []
    for main, skip in (parts, parts[::-1]):
        try:
            return _branch(where, main, skip, is_input)
        except ConversionError as error:
            errors.append(error)
    raise errors[0]


def _branch(where: str, main: Poly, skip: Poly | None, is_input: Callable[[Poly], bool]) -> Block:
    second = affine(where, main, "Dense")
    inner = second.input.only
    if inner is None or inner.kind not in ACTIVATIONS:
        raise mismatch(where, "an activation before the second linear layer", second.input)
    first = affine(where, inner.input, "Dense")
    y = first.input
    act = y.only if y.only is not None and y.only.kind in ACTIVATIONS else None
    candidates: list[tuple[Poly, Poly | None]] = []
    if skip is not None:
        if skip.single is not None and skip.single.kind == "Dense":
            candidates.append((skip.single.input, skip))
        candidates.append((skip, None))
    elif act is not None and not is_input(y):
        candidates.append((_residual(act.input) if not is_input(act.input) else act.input, None))
    else:
        candidates.append((y, None))
    for inputs, projection in candidates:
        if y.key() == inputs.key():
            return Block(inner.input, main, projection, skip is not None, inputs, None)
        if act is not None and _is_norm_of(act.input, inputs):
            return Block(inner.input, main, projection, skip is not None, inputs, act.input)
    raise mismatch(f"{where}, first linear layer", f"the block's input, {candidates[0][0]}, activated or not", first)


def _is_norm_of(poly: Poly, inputs: Poly) -> bool:
    if poly.key() == inputs.key():
        return True
    layer = inputs.only
    return layer is not None and poly.single is layer


def _write(
    state: State, name: str, where: str, blocks: list[Block], last: Layer | None, post: bool, activation: str
) -> MLPConfig:
    pres = [(b.activated, b.inputs) for b in blocks if b.activated is not None]
    trivial = all(a.key() == x.key() for a, x in pres) and not any(_scaled(b.first) for b in blocks)
    trivial = trivial and not (post and any(_scaled(b.second) for b in blocks))
    if not post and last is not None and last.input.single is not None:
        trivial = trivial and not _scaled(last.input)
    norm = not trivial
    widths = {b.second.shape[-1] for b in blocks} | {b.first.shape[-1] for b in blocks}
    if len(widths) != 1:
        raise ConversionError(f"{where}: layers of several widths, {sorted(widths)}")
    (width,) = widths
    differ = [b.inputs.shape[-1] != width for b in blocks]
    projected = [b.skip is not None for b in blocks]
    if projected == differ and any(differ):
        projection = "auto"
    elif all(projected):
        projection = "always"
    elif not any(projected):
        projection = "never" if any(differ) else "auto"
    else:
        raise ConversionError(f"{where}: some blocks have a linear skip and some have not: {projected}")
    if any(not b.has_skip and not d for b, d in zip(blocks, differ, strict=True)):
        raise ConversionError(f"{where}: a block of one width has no skip")
    raw = [b.activated is None for b in blocks]
    if any(raw[1:]) and not all(raw):
        raise ConversionError(f"{where}: some blocks activate their input and some do not: {raw}")
    firsts = [b.first for b in blocks]
    plain = [*([] if norm else firsts), *([] if norm and post else [b.second for b in blocks])]
    bias = any(np.any(p.const != 0) for p in (*plain, *(b.skip for b in blocks if b.skip is not None)))
    config = MLPConfig(
        width, 2 * len(blocks), activation, "post" if post else "pre",  # type: ignore[arg-type]
        first_activation=not raw[0] if not post else False,
        last_activation=last is not None if not post else True,
        projection=projection, norm="batch" if norm else "none", bias=bool(bias),  # type: ignore[arg-type]
    )  # fmt: skip
    for i, block in enumerate(blocks):
        _write_block(state, f"{name}.{i}", f"{where}, block {i}", block, config)
    if norm and not post and last is not None:
        state.norm(f"{name}.{len(blocks)}", where, last.input)
    return config


def _write_block(state: State, name: str, where: str, block: Block, config: MLPConfig) -> None:
    norm, post = config.norm == "batch", config.order == "post"
    if norm and not post and block.activated is not None:
        state.norm(f"{name}.norm1", where, block.activated)
    first, second = block.first, block.second
    if norm:
        layer = state.norm(f"{name}.norm1" if post else f"{name}.norm2", where, first)
        first = of_layer(layer)
        if post:
            second = of_layer(state.norm(f"{name}.norm2", where, second))
    state.linear(f"{name}.linear1", where, first, config.bias)
    state.linear(f"{name}.linear2", where, second, config.bias)
    if block.skip is not None:
        state.linear(f"{name}.skip", where, block.skip, config.bias)
