"""Match of the encoder's trunk, ResNet or RevNet, from the average pool back to the image."""

from __future__ import annotations

from typing import Any

from weights_conversion.algebra import Layer, Poly, of_layer, same_pads
from weights_conversion.errors import ConversionError
from weights_conversion.layers import LayerTable
from weights_conversion.patterns import State, expect, mismatch, parts_of

Facts = dict[str, Any]


def match_trunk(state: State, output: Poly, table: LayerTable) -> Facts:
    """Fields of `EncoderConfig`; writes the weights under `trunk.`; norms are noted, not written."""
    relu = output.only
    last_relu = relu is not None and relu.kind == "Relu"
    normed = relu.input if last_relu and relu is not None else output
    last = state.norm("trunk.norm", "last batch norm of the trunk", normed)
    facts = _revnet(state, last, table) if last.kind == "Concat" else _resnet(state, last)
    return {**facts, "last_relu": last_relu}


class _Choice:
    """A setting that several layers decide together, each leaving one or more possibilities."""

    def __init__(self, name: str, *values: str):
        self.name, self.values = name, values
        self.left = set(values)

    def narrow(self, where: str, possible: set[str], found: Layer) -> None:
        if not possible & self.left:
            raise mismatch(where, f"{self.name} {' or '.join(sorted(self.left))} as elsewhere", found)
        self.left &= possible

    @property
    def value(self) -> str:
        return next(value for value in self.values if value in self.left)


def _paddings(layer: Layer, kernel: int) -> set[str]:
    possible = set()
    if layer.pads == ((kernel - 1) // 2,) * 4:
        possible.add("explicit")
    if layer.pads == same_pads(layer.input.shape[1:3], (kernel, kernel), layer.stride):
        possible.add("same")
    return possible


# ---- stem


def _stem(state: State, x: Poly) -> Facts:
    layer = x.only
    if layer is not None and layer.kind == "MaxPool":
        pads, pool = layer.pads, set()
        if pads == (1, 1, 1, 1) and layer.value in ("zero", "ignore"):
            pool.add(layer.value)
        if layer.value == "same" and pads == (1, 1, 1, 1):
            pool.add("ignore")
        if layer.value == "same" and pads == same_pads(layer.input.shape[1:3], (3, 3), 2):
            pool.add("same")
        if (layer.size, layer.stride) != ((3, 3), 2) or not pool:
            raise mismatch("stem", "a padded 3x3 max-pool of stride 2", x)
        conv = state.conv("trunk.stem.0.conv", "stem", layer.input, 7, bias=False)
        padding = _paddings(conv, 7)
        if conv.stride != 2 or not padding:
            raise mismatch("stem", "a padded 7x7 convolution of stride 2", conv)
        choice = _Choice("padding", "explicit", "same")
        choice.narrow("stem", padding, conv)
        pool_padding = next(value for value in ("zero", "same", "ignore") if value in pool)
        facts = {"stem": "imagenet", "stem_padding": choice.value, "pool_padding": pool_padding}
    else:
        conv = state.conv("trunk.stem.0.conv", "stem", x, 3, bias=False)
        if conv.stride != 1 or conv.pads != (1, 1, 1, 1):
            raise mismatch("stem", "a 3x3 convolution of stride 1", conv)
        facts = {"stem": "small"}
    image = expect("stem", conv.input, "Input")
    if image.shape[1] != image.shape[2]:
        raise mismatch("stem", "square images", image)
    return {**facts, "resolution": image.shape[1], "image_channels": image.shape[3]}


# ---- ResNet


class _Chain:
    """Convolutions of a residual branch, first to last, each behind batch norm and ReLU."""

    def __init__(self, where: str, poly: Poly):
        self.where, self.polys = where, [poly]
        self.normed: list[Poly] = []  # what each ReLU takes
        conv = poly.single
        self.kernels: list[int] = []
        while True:
            if conv is None or conv.kind != "Conv" or conv.kernel.shape[0] != conv.kernel.shape[1]:
                raise mismatch(where, "a convolution", self.polys[0])
            self.kernels.insert(0, conv.kernel.shape[0])
            relu = expect(where, conv.input, "Relu")
            self.normed.insert(0, relu.input)
            source = relu.input.single
            if source is None:
                raise mismatch(where, "a batch norm of one layer", relu.input)
            if len(self.kernels) == (3 if self.kernels[-1] == 1 else 2):
                self.source, self.first_relu = source, relu
                break
            self.polys.insert(0, of_layer(source))
            conv = source
        if tuple(self.kernels) not in ((1, 3, 1), (3, 3)):
            raise mismatch(where, "kernels 1, 3, 1 or 3, 3", poly)

    @property
    def bottleneck(self) -> bool:
        return len(self.kernels) == 3

    def write(self, state: State, name: str, stride: int, padding: _Choice) -> None:
        for i, (poly, normed, kernel) in enumerate(zip(self.polys, self.normed, self.kernels, strict=True)):
            last = i == len(self.polys) - 1
            conv = state.conv(f"{name}.convs.{i}.conv", self.where, poly, kernel, bias=False, free=not last)
            state.norm(f"{name}.norms.{i}", self.where, normed)
            wanted = stride if i == self.kernels.index(3) else 1
            if conv.stride != wanted:
                raise mismatch(self.where, f"stride {wanted} in convolution {i + 1}", conv)
            possible = _paddings(conv, kernel)
            if not possible:
                raise mismatch(self.where, "padding by half the kernel, or SAME", conv)
            if wanted > 1:
                padding.narrow(self.where, possible, conv)


def _resnet(state: State, last: Layer) -> Facts:
    units: list[tuple[_Chain, Poly]] = []  # last first
    x = of_layer(last)
    while True:
        layer = x.only
        if layer is None or layer.kind != "Add":
            break
        if len(units) > 512:
            raise ConversionError("ResNet: more than 512 units")
        units.append(_unit(f"ResNet unit {len(units) + 1} from the end", x))
        x = of_layer(units[-1][0].source)
    if not units:
        raise mismatch("trunk", "a residual unit before the last batch norm", last)
    stem = _stem(state, x)
    units.reverse()
    padding, shortcut = _Choice("padding", "explicit", "same"), _Choice("shortcuts", "preactivated", "raw")
    if len({chain.bottleneck for chain, _ in units}) != 1:
        raise ConversionError("ResNet: bottleneck and basic units in one network")
    expansion = 4 if units[0][0].bottleneck else 1
    base, depths = x.shape[-1], []
    width = base
    for i, (chain, skip) in enumerate(units):
        where, source, output = f"ResNet unit {i}", chain.source, chain.polys[-1]
        stride = source.shape[1] // output.shape[1]
        if stride not in (1, 2) or (stride == 2) != (i > 0 and output.shape[-1] != width):
            raise mismatch(where, "half the resolution at twice the width, from the second stage on", output)
        if i == 0 or stride == 2:
            depths.append(0)
        depths[-1] += 1
        wanted = base * expansion * 2 ** (len(depths) - 1)
        if output.shape[-1] != wanted:
            raise mismatch(where, f"{wanted} channels", output)
        chain.where = where
        chain.write(state, f"trunk.units.{i}", stride, padding)
        name, widened = f"trunk.units.{i}.shortcut.conv", output.shape[-1] != width
        _shortcut(state, name, where, chain, skip, stride, widened, shortcut)
        width = wanted
    return {
        **stem, "architecture": "resnet", "depths": tuple(depths), "base_channels": base,
        "block": "bottleneck" if expansion == 4 else "basic", "strided_padding": padding.value,
        "shortcut": shortcut.value,
    }  # fmt: skip


def _unit(where: str, x: Poly) -> tuple[_Chain, Poly]:
    parts = parts_of(x)
    assert parts is not None
    errors = []
    for main, skip in (parts, parts[::-1]):
        try:
            chain = _Chain(where, main)
        except ConversionError as error:
            errors.append(error)
            continue
        if skip.only is chain.source:
            return chain, skip
        conv = skip.single
        if conv is not None and conv.kind == "Conv" and conv.input.only in (chain.source, chain.first_relu):
            return chain, skip
        errors.append(mismatch(f"{where}, skip", f"#{chain.source.number}, or a 1x1 convolution of it", skip))
    raise errors[-1] if len(errors) < 2 else max(errors, key=lambda e: "skip" in str(e).split(":")[0])


def _shortcut(
    state: State, name: str, where: str, chain: _Chain, skip: Poly, stride: int, widened: bool, choice: _Choice
) -> None:
    if skip.only is chain.source:
        if widened or stride > 1:
            raise mismatch(where, "a projection", skip)
        return
    if not widened and stride == 1:
        raise mismatch(where, "an identity skip where nothing changes shape", skip)
    conv = state.conv(name, f"{where}, skip", skip, 1, bias=False)
    if conv.stride != stride or any(conv.pads):
        raise mismatch(f"{where}, skip", f"stride {stride}", conv)
    choice.narrow(f"{where}, skip", {"raw" if conv.input.only is chain.source else "preactivated"}, conv)


# ---- RevNet


def _revnet(state: State, last: Layer, table: LayerTable) -> Facts:
    streams = list(last.inputs)
    if len(streams) != 2:
        raise mismatch("RevNet", "two streams", last)
    stages: list[list[_Chain]] = [[]]  # last first
    x1, x2 = streams
    while True:
        where = f"RevNet unit {sum(map(len, stages)) + 1} from the end"
        if sum(map(len, stages)) > 512:
            raise ConversionError("RevNet: more than 512 units")
        below = _unpooled(table, x1, x2)
        if below is not None:
            stages.append([])
            x1, x2 = below
            continue
        if _is_halves(x1, x2):
            break
        chain, before = _rev_unit(where, x1, x2)
        stages[-1].append(chain)
        x1, x2 = before, x1
    stem_output = x1.only.input if x1.only is not None else x1
    stem = _stem(state, stem_output)
    stages = [stage[::-1] for stage in stages[::-1]]
    padding = _Choice("padding", "explicit", "same")
    for i, stage in enumerate(stages):
        for j, chain in enumerate(stage):
            chain.where = f"RevNet stage {i}, unit {j}"
            chain.write(state, f"trunk.stages.{i}.{j}", 1, padding)
    width = stem_output.shape[-1]
    if width % 4 or any(c.polys[-1].shape[-1] != width * 2**i // 2 for i, s in enumerate(stages) for c in s):
        raise ConversionError(f"RevNet: widths do not double from {width} on")
    return {
        **stem, "architecture": "revnet", "depths": tuple(map(len, stages)), "base_channels": width // 4,
    }  # fmt: skip


def _rev_unit(where: str, x1: Poly, x2: Poly) -> tuple[_Chain, Poly]:
    """x2 is y + f(x1); gives f and y."""
    parts = parts_of(x2)
    if parts is None:
        raise mismatch(where, "a stream plus a residual function of the other", x2)
    errors = []
    for main, rest in (parts, parts[::-1]):
        try:
            chain = _RevChain(where, main, x1)
        except ConversionError as error:
            errors.append(error)
            continue
        return chain, rest
    raise errors[0]


class _RevChain(_Chain):
    """A bottleneck whose input may be any polynomial, such as a padded stream."""

    def __init__(self, where: str, poly: Poly, source: Poly):
        super().__init__(where, poly)
        if not self.bottleneck:
            raise mismatch(where, "a bottleneck", poly)
        if source.only is not self.source:
            raise mismatch(where, f"a residual function of {source}", self.normed[0])


def _unpooled(table: LayerTable, x1: Poly, x2: Poly) -> tuple[Poly, Poly] | None:
    """The streams before pooling and channel padding: (0, pool(a)) and (pool(b), 0) -> a, b."""
    first, second = x1.only, x2.only
    if first is None or second is None or first.kind != "Concat" or second.kind != "Concat":
        return None
    if len(first.inputs) != 2 or len(second.inputs) != 2:
        return None
    (zero1, a), (b, zero2) = first.inputs, second.inputs
    if zero1.terms or zero2.terms or zero1.shape != a.shape or zero2.shape != b.shape:
        return None
    below = [_unpool(table, pooled) for pooled in (a, b)]
    return None if below[0] is None or below[1] is None else (below[0], below[1])


def _unpool(table: LayerTable, poly: Poly) -> Poly | None:
    """x of pool(x), where pooling was taken into a concatenation."""
    shape = (poly.shape[0], 2 * poly.shape[1], 2 * poly.shape[2], poly.shape[3])
    layer = poly.only
    if not poly.terms:
        return Poly({}, shape)
    if layer is not None and layer.kind == "AvgPool":
        return layer.input
    if layer is None or layer.kind != "Concat":
        return None
    parts = [_unpool(table, part) for part in layer.inputs]
    return None if None in parts else table.concat([p for p in parts if p is not None], shape, layer.name)


def _is_halves(x1: Poly, x2: Poly) -> bool:
    a, b = x1.only, x2.only
    if a is None or b is None or a.kind != "Slice" or b.kind != "Slice" or a.input.key() != b.input.key():
        return False
    half = a.input.shape[-1] // 2
    return (a.low, a.high, b.low, b.high) == (0, half, half, 2 * half)
