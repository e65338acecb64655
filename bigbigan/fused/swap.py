"""Fused inference: a network's leaves swapped for others that compute the same in fewer passes.

What is swapped, and why it is equal:

- batch norm behind a convolution: folded into its weights; its ReLU runs inside the convolution, and so does the
  addition of the residual
- any other batch norm with ReLU: one scale and one shift a channel, in one pass
- nearest upsampling by two and a 3x3 convolution: one transposed convolution of 4x4; with many channels a product with
  each of the nine taps on the small image, then sums
- a 3x3 convolution and 2x2 mean pooling: one 4x4 convolution of stride 2 (`layers.box_kernel`)
- gain and offset of a conditional batch norm: one linear layer, with the statistics in it
- channels of zeros between RevNet's stages: constants of the convolution that reads them
- attention: its three input convolutions as one, gamma in its last one, and scores that stay in the cache
- a batch runs in pieces whose activations fit into memory at hand

Sums are made in float64 and rounded once. `bigbigan.fused.kernels` says what runs where.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigbigan.discriminator import ImageDiscriminator
from bigbigan.fused.kernels import CHANNELS_LAST, Kernel, Side, packable
from bigbigan.fused.leaves import (
    Attention,
    ConditionalScaleShiftReLU,
    Convolution,
    Folded,
    Leaf,
    PackedLinear,
    ScaleShiftReLU,
    StreamStem,
    UpsampleConvolution,
    conv_kernel,
    max_pool,
    scale_shift,
    window_of,
)
from bigbigan.generator import Generator
from bigbigan.graph import GraphNetwork
from bigbigan.layers import (
    ConditionalNormReLU,
    DownsampleConv2d,
    NormReLU,
    SelfAttention,
    SpectralNorm,
    UpsampleConv2d,
    box_kernel,
)
from bigbigan.mlp import Linear
from bigbigan.resnet import ResNet, ResNetUnit, StemPool, StridedConv2d
from bigbigan.revnet import RevNet, RevNetStem, RevNetUnit

logger = logging.getLogger(__name__)

PIECE_BYTES = 28 << 20  # of the largest activation: the C library takes fresh pages for every block above 32 MiB
# Freed once, a block of just under 32 MiB makes the GNU C library keep twice as much for the next pass. Else it returns
# activations to the system after each one, and getting them back, as zeros, took a seventh of the time.
FREED_BYTES = 31 << 20
PACKED_LINEAR = 1 << 16  # weights from which packing a linear layer pays
MANY_CHANNELS = 256  # from here an upsampling convolution's multiplications cost more than the sums of its outputs
PLAIN = "take the plain form, load(..., fuse=False)"
M = TypeVar("M", bound=nn.Module)
Sides = WeakKeyDictionary[nn.Module, Side]  # weak: a plain leaf is to go as soon as it is replaced


# ---- what takes whose place ----


def in_float64(make: Callable[..., Tensor], weight: Tensor, *vectors: Tensor) -> Tensor:
    """What is made of [O, …] and of vectors [O] in float64, rounded; a few rows at a time, as all would be large."""
    out: Tensor | None = None
    for rows in (slice(start, start + 64) for start in range(0, len(weight), 64)):
        part = make(weight[rows].double(), *(vector[rows] for vector in vectors))
        out = weight.new_empty(len(weight), *part.shape[1:]) if out is None else out
        out[rows] = part.to(weight.dtype)
    assert out is not None
    return out


def fold_unit(unit: Any, sides: Sides, live: int | None = None) -> None:
    """Norms behind convolutions of a ResNet's or RevNet's unit go into these, ReLU included.

    With `live` all of the unit's input channels but that many are zeros, and the first convolution is of 1x1.
    """
    norms = list(unit.norms)
    for i, norm in enumerate(norms[1:]):
        plain = unit.convs[i]
        scale, shift = scale_shift(norm)
        weight = plain.conv.weight
        if i == 0 and live is not None:
            constant = F.relu(scale_shift(norms[0])[1][live:])  # what norm and ReLU make of zeros
            shift = shift + scale * (weight[:, live:, 0, 0].double() @ constant)
            weight = weight[:, :live]
        weight = in_float64(lambda rows, scale: rows * scale[:, None, None, None], weight, scale)
        kernel = conv_kernel(plain.conv, sides[plain.conv], weight=weight, bias=shift, relu=True)
        unit.convs[i], unit.norms[i + 1] = Convolution(plain, kernel, window_of(plain)), Folded(norm)
    unit.norms[0] = ScaleShiftReLU(norms[0], live)


def taken(conv: nn.Conv2d) -> Tensor:
    """The weight in the order that packing reads, no longer the plain convolution's: two copies are there at most."""
    weight = conv.weight.detach().contiguous(memory_format=CHANNELS_LAST)
    conv.weight = None  # type: ignore[assignment]
    return weight


def strided(plain: StridedConv2d, sides: Sides) -> Leaf:
    kernel = conv_kernel(plain.conv, sides[plain.conv], weight=taken(plain.conv))
    return Convolution(plain, kernel, window_of(plain), "conv.weight")


def convolution(plain: nn.Conv2d, sides: Sides) -> Leaf:
    return Convolution(plain, conv_kernel(plain, sides[plain], weight=taken(plain)), recovered="weight")


def upsampling(plain: UpsampleConv2d, sides: Sides) -> Leaf:
    conv = plain.conv
    if conv.in_channels >= MANY_CHANNELS:
        return UpsampleConvolution(plain)
    weight = in_float64(box_kernel, conv.weight).flip(2, 3).transpose(0, 1)  # [I, O, 4, 4]
    return Convolution(plain, Kernel(weight, conv.bias, sides[plain], 2, 1, up=True))


def downsampling(plain: DownsampleConv2d, sides: Sides) -> Leaf:
    weight = in_float64(box_kernel, plain.conv.weight) / 4
    return Convolution(plain, Kernel(weight, plain.conv.bias, sides[plain], 2, 1))


def linear(plain: nn.Linear, sides: Sides) -> nn.Module:
    pays = plain.weight.numel() >= PACKED_LINEAR and packable(plain.weight)
    return PackedLinear(plain) if pays else plain


Leaves = dict[type, Callable[[Any, Sides], nn.Module]]
LINEAR: Leaves = {nn.Linear: linear, Linear: linear}
LEAVES: Leaves = {
    nn.Conv2d: convolution,
    StridedConv2d: strided,
    StemPool: lambda plain, sides: max_pool(plain),
    RevNetStem: lambda plain, sides: StreamStem(plain, sides[plain[0]]),
    NormReLU: lambda plain, sides: ScaleShiftReLU(plain),
    ConditionalNormReLU: lambda plain, sides: ConditionalScaleShiftReLU(plain),
    UpsampleConv2d: upsampling,
    DownsampleConv2d: downsampling,
    SelfAttention: lambda plain, sides: Attention(plain, sides[plain]),
}


def swap(module: nn.Module, sides: Sides, leaves: Leaves) -> None:
    """Puts other leaves into the place of all that `leaves` names."""
    for name in [name for name, _ in module.named_children()]:  # of modules, none is to outlive its replacement
        child = getattr(module, name)
        if make := leaves.get(type(child)):
            module.add_module(name, make(child, sides))
        elif not isinstance(child, Leaf) and type(child) not in LEAVES:
            swap(child, sides, leaves)


def fold_units(network: nn.Module, sides: Sides) -> None:
    units: dict[Any, int | None] = {m: None for m in network.modules() if isinstance(m, ResNetUnit | RevNetUnit)}
    for revnet in [m for m in network.modules() if isinstance(m, RevNet)]:
        for stage in list(revnet.stages)[1:]:  # begins with streams half of whose channels are zeros
            first: Any = stage[0]  # type: ignore[index]
            units[first] = first.norms[0].channels // 2
    for unit, live in units.items():
        fold_unit(unit, sides, live)


# ---- networks ----


class InPieces:
    """Mixin of networks that take a batch a few images at a time, so that activations stay in memory at hand."""

    piece: int

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        run, (x,) = super().forward, (*inputs, *named.values())  # type: ignore[misc]
        number = max(-(-len(x) // self.piece), 1)
        # Of one size if they need not be much smaller for that: some weights follow the size in which they are read.
        even = next(n for n in range(number, 2 * number + 1) if n == 2 * number or len(x) % n == 0)
        pieces = x.tensor_split(number if len(x) % even else even)
        out = run(x) if len(pieces) == 1 else torch.cat([run(piece) for piece in pieces])
        # oneDNN's ReLU makes zeros of NaN: what a plain network shows of a broken input is put back.
        broken = ~x.sum(dim=list(range(1, x.ndim)), dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
        return out.masked_fill_(broken.view(-1, *[1] * (out.ndim - 1)), torch.nan) if broken.any() else out


class FusedPart:
    """Mixin of a part whose leaves were swapped."""

    fused_for: tuple[torch.device, torch.dtype]

    def forward(self, *inputs: Tensor | None, **named: Tensor | None) -> Any:
        return self.infer(super().forward, *inputs, **named)  # type: ignore[misc]

    def forward_features(self, x: Tensor) -> Tensor:
        return self.infer(super().forward_features, x)  # type: ignore[misc]

    def infer(self, run: Callable[..., Any], *inputs: Tensor | None, **named: Tensor | None) -> Any:
        """What `run` gives, without gradients, and under autocast in the part's own dtype."""
        if torch.compiler.is_compiling():
            self.compile()
        given = [x for x in (*inputs, *named.values()) if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            raise RuntimeError(f"{_name(self)} gives no gradients: {PLAIN}")
        if any(module._forward_hooks for module in self.modules() if module is not self):  # type: ignore[attr-defined]
            raise RuntimeError(f"{_name(self)} overwrites what forward hooks inside it would see: {PLAIN}")
        device, dtype = self.fused_for
        if torch.is_autocast_enabled(device.type):
            inputs = tuple(x if x is None else x.to(dtype) for x in inputs)
            named = {name: x if x is None else x.to(dtype) for name, x in named.items()}
        elif wrong := [x.dtype for x in given if x.dtype != dtype]:
            raise RuntimeError(f"{_name(self)} is {dtype} and its input {wrong[0]}: convert one to the other")
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            out = run(*inputs, **named)
        return out.contiguous() if isinstance(out, Tensor) else out  # images, whose order in memory users rely on

    def compile(self, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{_name(self)} is not compiled or exported: {PLAIN}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = self.__class__.__new__(self.__class__)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> Any:
        raise RuntimeError(f"{_name(self)} is not pickled: load it in each process, or {PLAIN}")

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise RuntimeError(f"{_name(self)} does not train: {PLAIN}")
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        device, dtype = self.fused_for
        moved = fn(torch.empty(0, device=device, dtype=dtype))
        if (moved.device, moved.dtype) != (device, dtype):
            raise RuntimeError(f"{_name(self)} stays {dtype} on {device}: load it as it is to be, or {PLAIN}")
        return self

    def _load_from_state_dict(self, *_: Any) -> None:
        raise RuntimeError(f"{_name(self)} takes no weights: load them into the plain form, then fuse it")


def _name(network: Any) -> str:
    return f"a fused {network.part if hasattr(network, 'part') else 'network'}"


def specialize(module: nn.Module, mixin: type, **attributes: Any) -> None:
    """Puts a mixin in front of the class of one module."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (mixin, cls), {"__module__": __name__})
    for name, value in attributes.items():
        setattr(module, name, value)


def trace(network: nn.Module) -> tuple[Sides, WeakKeyDictionary[nn.Module, int]]:
    """Height and width of what each module reads, and the bytes an image that each gives, from a pass of no images."""
    config, weight = cast(Any, network).config, next(network.parameters())
    x = weight.new_empty(0, config.image_channels, config.resolution, config.resolution)
    z = weight.new_empty(0, config.z_dim)
    sides: Sides = WeakKeyDictionary()
    sizes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            sides[module], sizes[module] = tuple(inputs[0].shape[2:]), math.prod(output.shape[1:]) * 4

    handles = [module.register_forward_hook(hook) for module in network.modules()]
    try:
        network(*([z] if getattr(network, "part", "") == "generator" else [x, z]))
    finally:
        for handle in handles:
            handle.remove()
    return sides, sizes


def largest_activation(network: nn.Module, sizes: Mapping[nn.Module, int]) -> int:
    """Bytes an image, but for the inside of a RevNet's stem, which runs in pieces of its own."""
    stems = [module for module in network.modules() if isinstance(module, RevNetStem)]
    inside = {module for stem in stems for module in stem.modules()}
    return max(sizes[module] for module in network.modules() if module in sizes and module not in inside)


def check_fusible(network: nn.Module) -> None:
    """Raises RuntimeError, naming the reason, for networks that `fuse` does not take."""
    if not hasattr(getattr(network, "config", None), "resolution"):
        raise RuntimeError(
            f"a {type(network).__name__} is not fused by itself: fuse a generator, an encoder or a discriminator, or "
            "a model by its method fuse()"
        )
    if network.training or any(isinstance(m, SpectralNorm) for m in network.modules()):
        raise RuntimeError("only a network of the inference form can be fused, in evaluation mode: call eval() first")
    if network._compiled_call_impl is not None:
        raise RuntimeError("a compiled network is not fused: do one of the two")


@torch.no_grad()
def fuse(network: M) -> M:
    """The network itself, generator, encoder or discriminator, with its leaves swapped; see the module's text.

    Differences to the plain form are of rounding alone. On other devices than the CPU it stays as it is. What is
    swapped is gone from then on: an error on the way, as for want of memory, leaves a network of no use.

    Raises:
        RuntimeError: the network is in training mode, of the training form with spectral norm, or compiled.
    """
    if isinstance(network, FusedPart):
        return network
    check_fusible(network)
    if isinstance(network, GraphNetwork):
        logger.info("the %s is a graph network, which has no fused form: it runs as it is", network.part)
        return network
    weight = next(network.parameters())
    if weight.device.type != "cpu":
        logger.info("nothing is known to be faster on %s than the plain form, which stays", weight.device.type)
        return network
    sides, sizes = trace(network)
    for module in list(network.modules()):
        if isinstance(module, Generator | ImageDiscriminator | ResNet | RevNet):
            specialize(module, InPieces, piece=max(PIECE_BYTES // largest_activation(module, sizes), 1))
    swap(network, sides, LINEAR)  # first, since an encoder's largest are among them: what is held twice adds up
    fold_units(network, sides)
    swap(network, sides, LEAVES)
    for tensor in itertools.chain(network.parameters(), network.buffers()):  # as in `Leaf`
        tensor.data = tensor.data.clone()
    torch.empty(FREED_BYTES, dtype=torch.uint8, device="cpu")
    specialize(network, FusedPart, fused_for=(weight.device, weight.dtype))
    return network
