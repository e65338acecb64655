"""What a module holds and how its graph is written, as data; needs no TensorFlow."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Projection = Literal["auto", "always", "never"]
Statistics = Literal["accumulated", "moving"]

# Multiples of the base width (BigGAN's tables).
GENERATOR_WIDTHS = {32: (4, 4, 4, 4), 64: (16, 16, 8, 4, 2), 128: (16, 16, 8, 4, 2, 1)}
DISCRIMINATOR_WIDTHS = {32: (4, 4, 4, 4), 64: (1, 2, 4, 8, 16), 128: (1, 2, 4, 8, 16, 16)}
DISCRIMINATOR_DOWN = {32: 2, 64: 4, 128: 5}  # how many of the first blocks halve the resolution


@dataclass(frozen=True)
class MLPSpec:
    """Residual MLP of `layers / 2` blocks.

    "pre":  h = linear(act(norm(x))); h = linear(act(norm(h))); x + h   (first_activation, last_activation apply)
    "post": h = act(norm(linear(x))); h = norm(linear(h)); act(x + h)
    """

    width: int = 24
    layers: int = 4
    activation: Literal["relu", "leaky_relu"] = "relu"
    slope: float = 0.2
    order: Literal["pre", "post"] = "pre"
    first_activation: bool = False
    last_activation: bool = True
    projection: Projection = "auto"
    norm: Literal["none", "batch"] = "none"
    norm_eps: float = 1e-3
    bias: bool = True


@dataclass(frozen=True)
class GeneratorSpec:
    resolution: Literal[32, 64, 128] = 32
    base_channels: int = 4
    z_chunks: tuple[int, ...] = (5, 5, 5, 5)
    class_dim: int = 6  # 0: no class vector; the gain and offset linears then have biases
    class_first: bool = False  # concat [class vector, z chunk] in place of [z chunk, class vector]
    attention_resolution: int = 16
    bn_eps: float = 1e-4
    upsampled: Literal["nearest", "bilinear", "bilinear-aligned", "bilinear-asymmetric"] = "bilinear"
    upsampled_size: int = 64
    spectral_norm: bool = True
    ema: bool = True
    statistics: Statistics = "accumulated"


@dataclass(frozen=True)
class EncoderSpec:
    architecture: Literal["resnet", "revnet"] = "resnet"
    resolution: int = 64
    depths: tuple[int, ...] = (2, 1, 1)
    base_channels: int = 8
    block: Literal["bottleneck", "basic"] = "bottleneck"  # resnet only
    head: MLPSpec = MLPSpec(width=32)
    output: Literal["stochastic", "deterministic", "tanh"] = "stochastic"
    default_output: Literal["z_sample", "z_mean"] = "z_sample"
    latent: Literal["split", "two"] = "split"  # one linear split into mean and deviation, or two linears
    stem_padding: Literal["explicit", "same"] = "explicit"
    strided_padding: Literal["explicit", "same"] = "explicit"
    pool_padding: Literal["zero", "ignore", "same"] = "zero"
    shortcut: Literal["preactivated", "raw"] = "preactivated"
    bn_eps: float = 1e-3
    bn_affine: bool = True
    statistics: Statistics = "accumulated"
    last_relu: bool = True
    feature_norm_eps: float = 1e-3
    feature_norm_affine: bool = False
    feature_norm_statistics: Statistics = "accumulated"
    spectral_norm: bool = False
    ema: bool = True

    @property
    def num_features(self) -> int:
        return self.base_channels * (4 if self.block == "bottleneck" else 1) * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True)
class DiscriminatorSpec:
    base_channels: int = 4
    attention_resolution: int = 16
    z_mlp: MLPSpec = MLPSpec(width=16)
    joint_mlp: MLPSpec = MLPSpec(width=20)
    combine: Literal["concat_fh", "concat_hf", "sum", "product"] = "concat_fh"
    first_relu: bool = False
    last_skip: bool = True
    spectral_norm: bool = True
    ema: bool = False


@dataclass(frozen=True)
class Style:
    """Ways of writing one and the same function. No field changes an output beyond rounding."""

    batch_norm: Literal["chain", "chain_add", "biggan", "sub_div", "fused", "fused_v1"] = "biggan"
    statistics_shape: Literal["flat", "nhwc"] = "flat"  # [C] or [1, 1, 1, C]
    counter: Literal["scalar", "vector", "guarded"] = "scalar"  # shape [], shape [1], max(counter, 1)
    conv: Literal["same", "pad_valid", "explicit"] = "same"
    linear: Literal["matmul", "transposed"] = "matmul"  # weights [in, out], or [out, in]
    bias: Literal["bias_add", "add_v2", "add"] = "bias_add"
    add: Literal["add_v2", "add", "add_n"] = "add_v2"
    relu: Literal["op", "maximum"] = "op"
    leaky_relu: Literal["op", "maximum"] = "op"
    pooling: Literal["mean", "avgpool", "flat"] = "mean"  # flat: over the second axis of [N, positions, C]
    halving: Literal["avgpool", "slices", "space_to_depth", "reshape"] = "avgpool"
    upsample: Literal["resize", "tile", "depth_to_space", "broadcast"] = "resize"
    padded_image: bool = False  # the generator's last convolution has unused channels, as padded for TPUs
    generator_skip: Literal["upsample_conv", "conv_upsample"] = "upsample_conv"
    first_skip: Literal["pool_conv", "conv_pool"] = "pool_conv"  # first block of the discriminator
    attention: Literal["matmul", "einsum"] = "matmul"
    split: Literal["split", "split_v", "slice"] = "split"
    class_broadcast: Literal["fill_matmul", "tile", "gather", "constant_row"] = "fill_matmul"
    gain: Literal["one_plus", "plus_one"] = "one_plus"
    softplus: Literal["op", "log1p_exp", "log_one_plus_exp"] = "op"
    noise: Literal["random_normal", "raw", "tfp", "sample_axis", "broadcast"] = "random_normal"
    crelu: Literal["two_relus", "concat_first"] = "two_relus"
    score: Literal["squeeze", "reshape", "slice", "sum"] = "squeeze"
    variables: Literal["resource", "reference"] = "resource"
    scopes: Literal["deepmind", "other"] = "deepmind"
    clutter: tuple[Literal["identity", "squeeze", "reshape", "stop_gradient", "prevent_gradient", "cast"], ...] = ()
    branch: Literal["none", "switch", "if"] = "none"  # training branch of batch norm behind a constant condition
    condition: Literal["constant", "logical", "placeholder", "constants", "select"] = "constant"
    outside: bool = False  # batch statistics are computed before the branch that would take them
    eps_placeholder: bool = False  # batch-norm eps through PlaceholderWithDefault
    assignments: bool = False  # u0 and accumulators assigned on control edges
    u0_read_back: bool = False  # u is read from its variable after its assignment
    stripped: bool = False  # attributes at their defaults are left out, as `hub.create_module_spec` does
    functions: Literal["none", "by_value", "captured"] = "none"  # blocks in PartitionedCall, StatefulPartitionedCall
    dynamic_shapes: bool = True  # Shape, StridedSlice and Pack feed Reshape and resize; else -1 and constants
    train_graph: bool = False  # a second MetaGraph tagged "train"
    shared_encode: bool = True  # `default` is an output of the graph of `encode`; else a graph of its own
    assets: bool = False
    dead_code: bool = False  # losses, summaries' inputs and optimiser-like nodes that no signature reaches


@dataclass(frozen=True)
class ModuleSpec:
    """A whole module: three networks and the way their graph is written."""

    generator: GeneratorSpec = GeneratorSpec()
    encoder: EncoderSpec = EncoderSpec()
    discriminator: DiscriminatorSpec = DiscriminatorSpec()
    style: Style = Style()
    spectral_norm_eps: float = 1e-4
    # v / (|v| + eps), or v / sqrt(max(|v|^2, eps))
    spectral_norm_form: Literal["eps_added", "rsqrt_maximum"] = "eps_added"
    stdev_offset: float = 0.0  # outside the known family: softplus(x) + offset
    sample_activation: bool = False  # outside the known family: tanh on z_sample alone
    departures: tuple[str, ...] = ()  # outside the known family; `forms.FORMS` lists them
    attention_scale: float = 1.0  # outside the known family unless 1: factor on the attention logits
    tags: tuple[str, ...] = ()

    @property
    def z_dim(self) -> int:
        return sum(self.generator.z_chunks)


@dataclass(frozen=True)
class Signature:
    inputs: dict[str, tuple[int | None, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int | None, ...]] = field(default_factory=dict)


def documented_signatures(spec: ModuleSpec) -> dict[str, Signature]:
    """Names and shapes of inputs and outputs, as printed from the published ResNet-50 module."""
    g, e, z = spec.generator, spec.encoder, (None, spec.z_dim)
    image, large = (None, g.resolution, g.resolution, 3), (None, e.resolution, e.resolution, 3)
    upsampled = (None, g.upsampled_size, g.upsampled_size, 3)
    features = {"avepool_feat": (None, e.num_features), "bn_crelu_feat": (None, 2 * e.num_features)}
    latents = {name: z for name in ("default", "z_sample", "z_mean", "z_stdev")}
    return {
        "generate": Signature({"z": z}, {"default": image, "upsampled": upsampled}),
        "encode": Signature({"x": large}, {**latents, **features}),
        "discriminate": Signature({"x": image, "z": z}, {f"score_{name}": (None,) for name in ("x", "z", "xz")}),
        "default": Signature({"x": large}, {"default": z}),
    }
