"""Architectures as data: frozen dataclasses under the closed schema of `bigbigan.schema`.

Every detail of DeepMind's networks that no public source settles is a named field here with a default and the
reason for it, so that a converter can set it from the module's graph and training can vary it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bigbigan.schema import check_choices, check_range, require

MAX_CONFIG_BYTES = 64 * 1024
PARTS = ("generator", "encoder", "discriminator")


@dataclass(frozen=True)
class MLPConfig:
    """Residual MLP: `layers / 2` blocks of two layers (paper, section 3 and appendix A).

    The paper gives depth, width and "ResNet-style skips" only; the other fields take the ResNet-v2 reading of it.
    """

    width: int = 2048
    layers: int = 8
    activation: Literal["relu", "leaky_relu"] = "relu"
    order: Literal["pre", "post"] = "pre"  # activation before each layer, or after it
    first_activation: bool = False  # "pre" only: the first layer sees its raw input, as in the first block of F
    last_activation: bool = True  # "pre" only: one activation after the last block, as in ResNet-v2
    projection: Literal["auto", "always", "never"] = "auto"  # linear skip where widths differ; "never": no skip there
    norm: Literal["none", "batch"] = "none"  # batch norm beside each activation
    bias: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 1, 65536, "width")
        check_range(self, 2, 64, "layers")
        require(self.layers % 2 == 0, f"MLPConfig.layers is {self.layers}; residual blocks take two layers each")


# Multiples of the base width, from the seed outwards: G in block i has channels[i] -> channels[i + 1].
GENERATOR_CHANNELS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
}
# Multiples of the base width at the output of each block of F; the last block does not downsample at 64 and above.
DISCRIMINATOR_CHANNELS = {
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
}
Resolution = Literal[32, 64, 128, 256]


@dataclass(frozen=True)
class GeneratorConfig:
    """BigGAN generator without labels (paper, section 3; BigGAN's channel tables)."""

    resolution: Resolution = 128
    image_channels: int = 3
    base_channels: int = 96
    z_chunks: tuple[int, ...] = (20, 20, 20, 20, 20, 20)  # first to the seed, then one a block
    prior: Literal["normal", "uniform"] = "normal"  # N(0, 1), or U(-1, 1)
    shared_dim: int = 128  # training only: the learned vector in place of a class embedding; 0 trains plain biases
    attention_resolution: int = 64  # the side of the block it follows; 0, or a side that no block has: none
    bn_eps: float = 1e-4  # as in DeepMind's released BigGAN
    upsample_mode: Literal[
        "nearest", "bilinear", "bilinear-aligned", "bilinear-asymmetric",
        "bicubic", "bicubic-aligned", "bicubic-asymmetric",
    ] = "bilinear"  # fmt: skip
    upsample_size: int = 256  # side of `upsampled`

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 1, 4, "image_channels")
        check_range(self, 1, 1024, "base_channels")
        check_range(self, 0, 4096, "shared_dim")
        check_range(self, 0, 256, "attention_resolution")
        check_range(self, 1e-12, 0.1, "bn_eps")
        check_range(self, self.resolution, 4096, "upsample_size")
        expected = len(GENERATOR_CHANNELS[self.resolution])
        require(
            len(self.z_chunks) == expected and all(1 <= n <= 4096 for n in self.z_chunks),
            f"GeneratorConfig.z_chunks is {self.z_chunks}; {self.resolution} pixels take {expected}, of 1 to 4096",
        )

    @property
    def z_dim(self) -> int:
        return sum(self.z_chunks)


@dataclass(frozen=True)
class EncoderConfig:
    """ResNet-v2 or RevNet trunk, average pool, residual MLP head, latent (paper, section 3).

    Defaults are those of google/revisiting-self-supervised, which the paper's RevNets come from.
    """

    resolution: int = 256
    image_channels: int = 3
    architecture: Literal["resnet", "revnet"] = "resnet"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    base_channels: int = 64  # 64 times the paper's width factor
    block: Literal["bottleneck", "basic"] = "bottleneck"  # basic: two 3x3 convolutions, for small ResNets
    stem: Literal["imagenet", "small"] = "imagenet"  # 7x7 stride 2 and a max-pool, or 3x3 stride 1
    z_dim: int = 120
    output: Literal["stochastic", "deterministic", "tanh"] = "stochastic"  # softplus deviations; none; bounded
    head: MLPConfig = MLPConfig(width=4096, layers=4)
    # Not settled by any public source: a converter reads these from the module.
    stem_padding: Literal["explicit", "same"] = "explicit"  # symmetric zeros then VALID, or TensorFlow's SAME
    strided_padding: Literal["explicit", "same"] = "explicit"
    pool_padding: Literal["zero", "ignore", "same"] = "zero"  # stem max-pool sees zeros, ignores borders, or SAME
    shortcut: Literal["preactivated", "raw"] = "preactivated"  # what projection shortcuts take
    bn_eps: float = 1e-3
    bn_affine: bool = True
    last_relu: bool = True  # between the last batch norm and the average pool
    feature_norm_eps: float = 1e-3  # batch norm behind bn_crelu_feat
    feature_norm_affine: bool = False
    spectral_norm: bool = False  # in training; the paper has it in G and D only

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 16, 1024, "resolution")
        check_range(self, 1, 4, "image_channels")
        check_range(self, 1, 4096, "base_channels", "z_dim")
        check_range(self, 1e-12, 0.1, "bn_eps", "feature_norm_eps")
        require(
            1 <= len(self.depths) <= 6 and all(1 <= n <= 64 for n in self.depths),
            f"EncoderConfig.depths is {self.depths}; give 1 to 6 stages of 1 to 64 units",
        )
        if self.architecture == "revnet":
            require(self.block == "bottleneck", "EncoderConfig.block must be 'bottleneck' for a revnet")
            require(self.base_channels % 2 == 0, "EncoderConfig.base_channels must be even for a revnet")

    @property
    def num_features(self) -> int:
        """Channels of avepool_feat; bn_crelu_feat has twice as many."""
        return self.base_channels * (4 if self.block == "bottleneck" else 1) * 2 ** (len(self.depths) - 1)


@dataclass(frozen=True)
class DiscriminatorConfig:
    """F on images, H on latents, J on both (paper, section 2)."""

    resolution: Resolution = 128
    image_channels: int = 3
    base_channels: int = 96
    z_dim: int = 120
    attention_resolution: int = 64  # the side of the block it follows; 0, or a side that no block has: none
    z_mlp: MLPConfig = MLPConfig()
    joint_mlp: MLPConfig = MLPConfig()
    combine: Literal["concat", "sum", "product"] = "concat"  # how J joins F(x) and H(z)
    first_relu: bool = False  # a ReLU on the image itself would discard its negative half
    last_skip: bool = True  # identity skip around blocks that keep width and resolution (the last, from 64 pixels up)
    scores: tuple[Literal["x", "z", "xz"], ...] = ("x", "z", "xz")  # ("x",) is a plain GAN: F alone
    rotation_head: bool = False  # SS-GAN: a linear layer on F(x) tells by which of four right angles x is turned

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 1, 4, "image_channels")
        check_range(self, 1, 1024, "base_channels")
        check_range(self, 1, 4096, "z_dim")
        check_range(self, 0, 256, "attention_resolution")
        require(
            bool(self.scores) and len(set(self.scores)) == len(self.scores),
            f"DiscriminatorConfig.scores is {self.scores}; name one or more of x, z, xz, each once",
        )
        if self.combine != "concat":
            require(
                self.num_features == self.z_mlp.width,
                f"DiscriminatorConfig.combine {self.combine!r} needs F(x) and H(z) of one width; "
                f"they have {self.num_features} and {self.z_mlp.width}",
            )

    @property
    def num_features(self) -> int:
        """Channels of F(x)."""
        return self.base_channels * DISCRIMINATOR_CHANNELS[self.resolution][-1]


@dataclass(frozen=True)
class _MLPPart:
    """What BiGAN's fully connected networks share; defaults of its permutation-invariant MNIST."""

    resolution: int = 28
    image_channels: int = 1
    architecture: Literal["mlp"] = "mlp"
    width: int = 1024  # of both hidden layers
    z_dim: int = 50
    bn_eps: float = 1e-8
    negative_slope: float = 0.2  # of the leaky ReLUs

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 2, 256, "resolution")
        check_range(self, 1, 4, "image_channels")
        check_range(self, 1, 4096, "width", "z_dim")
        check_range(self, 1e-12, 0.1, "bn_eps")
        check_range(self, 0, 1, "negative_slope")

    @property
    def num_features(self) -> int:
        """Units of the last hidden layer."""
        return self.width


@dataclass(frozen=True)
class MLPGeneratorConfig(_MLPPart):
    """Fully connected generator of BiGAN."""

    negative_slope: float = 0.0  # plain ReLUs
    prior: Literal["normal", "uniform"] = "uniform"

    @property
    def upsample_size(self) -> int:
        """The resolution itself: BiGAN has no enlarged output."""
        return self.resolution


@dataclass(frozen=True)
class MLPEncoderConfig(_MLPPart):
    """Fully connected encoder of BiGAN; bounded and deterministic."""

    output: ClassVar[Literal["tanh"]] = "tanh"
    spectral_norm: ClassVar[bool] = False
    feature_norm_eps: float = 1e-3  # batch norm behind bn_crelu_feat, which BiGAN has not: as in `EncoderConfig`

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1e-12, 0.1, "feature_norm_eps")


@dataclass(frozen=True)
class MLPDiscriminatorConfig(_MLPPart):
    """Fully connected discriminator of BiGAN, on pairs alone."""

    scores: ClassVar[tuple[Literal["xz"]]] = ("xz",)
    rotation_head: ClassVar[bool] = False


@dataclass(frozen=True)
class GraphConfig:
    """What all networks in graph form share; the network itself is `<part>.graph.json` (see `bigbigan.graph`)."""

    resolution: int
    image_channels: int
    z_dim: int
    sha256: str  # of the graph's file
    architecture: Literal["graph"] = "graph"

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 2, 4096, "resolution")
        check_range(self, 1, 4, "image_channels")
        check_range(self, 1, 4096, "z_dim")
        fits = len(self.sha256) == 64 and set(self.sha256) <= set("0123456789abcdef")
        require(fits, f"{type(self).__name__}.sha256 is {self.sha256[:80]!r}; expected 64 hexadecimal digits")


@dataclass(frozen=True)
class GraphGeneratorConfig(GraphConfig):
    """Generator in graph form."""

    prior: ClassVar[Literal["normal"]] = "normal"
    upsample_size: int = 256  # side of `upsampled`; the resolution itself if the graph has no such output

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, self.resolution, 4096, "upsample_size")


@dataclass(frozen=True)
class GraphEncoderConfig(GraphConfig):
    """Encoder in graph form."""

    output: Literal["stochastic", "deterministic"] = "stochastic"  # whether z_sample takes noise
    num_features: int = 2048
    spectral_norm: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, 1, 1 << 20, "num_features")


@dataclass(frozen=True)
class GraphDiscriminatorConfig(GraphConfig):
    """Discriminator in graph form."""

    scores: tuple[Literal["x", "z", "xz"], ...] = ("x", "z", "xz")
    rotation_head: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            bool(self.scores) and len(set(self.scores)) == len(self.scores),
            f"GraphDiscriminatorConfig.scores is {self.scores}; name one or more of x, z, xz, each once",
        )


@dataclass(frozen=True)
class PreprocessConfig:
    """From a picture to the encoder's input: crop, scale to `size`, pad by `pad`, map uint8 to [-1, 1]."""

    size: int = 256
    pad: int = 0  # black border on each side after scaling; size + 2 * pad is the encoder's resolution
    crop: Literal["center", "resnet", "none"] = "center"  # largest centre square; TF's padded centre; squash
    filter: Literal["bicubic", "bilinear", "lanczos", "box", "nearest"] = "bicubic"
    polarity: Literal["natural", "light-on-dark"] = "natural"  # light-on-dark: trained on bright things on black

    def __post_init__(self) -> None:
        check_choices(self)
        check_range(self, 2, 4096, "size")
        check_range(self, 0, 256, "pad")

    @property
    def resolution(self) -> int:
        return self.size + 2 * self.pad


@dataclass(frozen=True)
class BigBiGANConfig:
    """A whole model; a part may be absent."""

    generator: GeneratorConfig | MLPGeneratorConfig | GraphGeneratorConfig | None = GeneratorConfig()
    encoder: EncoderConfig | MLPEncoderConfig | GraphEncoderConfig | None = EncoderConfig()
    discriminator: DiscriminatorConfig | MLPDiscriminatorConfig | GraphDiscriminatorConfig | None = (
        DiscriminatorConfig()
    )
    preprocess: PreprocessConfig = PreprocessConfig()

    def __post_init__(self) -> None:
        g, e, d = self.generator, self.encoder, self.discriminator
        present = [part for part in (g, e, d) if part is not None]
        require(bool(present), "a model needs at least one of generator, encoder and discriminator")
        for name in ("z_dim", "image_channels"):
            values = {type(part).__name__: getattr(part, name) for part in present}
            require(len(set(values.values())) == 1, f"{name} differs between parts: {values}")
        if g and d:
            require(
                g.resolution == d.resolution,
                f"the generator draws {g.resolution} pixels, the discriminator reads {d.resolution}",
            )
        if e:
            require(
                self.preprocess.resolution == e.resolution,
                f"preprocessing gives {self.preprocess.resolution} pixels, the encoder reads {e.resolution}",
            )
        if e and (g or d):
            small = (g or d).resolution  # type: ignore[union-attr]
            require(e.resolution % small == 0, f"encoder resolution {e.resolution} is no multiple of {small}")
        if d and not e:
            require(
                self.preprocess.resolution % d.resolution == 0,
                f"preprocessing gives {self.preprocess.resolution} pixels, no multiple of F's {d.resolution}",
            )
        if e and g:
            require(
                (g.prior == "uniform") <= (e.output != "stochastic"),
                "a uniform prior needs a deterministic or tanh encoder",
            )

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    @property
    def z_dim(self) -> int:
        return getattr(self, self.parts[0]).z_dim

    @property
    def image_channels(self) -> int:
        return getattr(self, self.parts[0]).image_channels


def select_parts(parts: Sequence[str] | None, available: Iterable[str], where: object) -> tuple[str, ...]:
    """`parts` in standard order; None means all that are available.

    Raises:
        ValueError: for a name that is no part's, or a part that is not available, or no part at all.
    """
    available = ordered_parts(available)
    wanted = available if parts is None else (parts,) if isinstance(parts, str) else tuple(parts)
    if unknown := [part for part in wanted if part not in PARTS]:
        raise ValueError(f"unknown part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    if lacking := [part for part in wanted if part not in available]:
        raise ValueError(f"{where} has no {lacking[0]}; it has {', '.join(available)}")
    if not wanted:
        raise ValueError(f"name at least one part; {where} has {', '.join(available)}")
    return ordered_parts(wanted)


def ordered_parts(parts: Iterable[str]) -> tuple[str, ...]:
    """In standard order, without repeats."""
    names = set(parts)
    return tuple(part for part in PARTS if part in names)


@dataclass(frozen=True)
class ModelInfo:
    """What a model says of itself; `provenance` holds JSON facts (metrics, commands, digests), never interpreted."""

    name: str = ""
    license: str = ""
    source: str = ""  # one line: where the weights come from
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
