"""Named architectures: the two that DeepMind released, every row of the paper's Table 1, small ones, and baselines."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from bigbigan.config import (
    GENERATOR_CHANNELS,
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
    MLPDiscriminatorConfig,
    MLPEncoderConfig,
    MLPGeneratorConfig,
    PreprocessConfig,
    Resolution,
)

EMBEDDED = "bigbigan-fashion-mnist-32"


@dataclass(frozen=True)
class HubEntry:
    """Where converted weights of a preset are published: repository, commit and digests together, or none at all."""

    repo_id: str
    revision: str  # 40 hexadecimal digits
    sha256: dict[str, str]  # by part


@dataclass(frozen=True)
class Preset:
    name: str
    config: BigBiGANConfig
    description: str
    origin: str
    hub: HubEntry | None = None


# 120 does not divide by the seven chunks of 256 pixels; no source says how they were cut, so the seed gets the rest.
Z_CHUNKS: dict[int, tuple[int, ...]] = {64: (24,) * 5, 128: (20,) * 6, 256: (18, *(17,) * 6)}


def imagenet(encoder: EncoderConfig | None, *, resolution: Resolution = 128, base_channels: int = 96) -> BigBiGANConfig:
    """The paper's model: G and F at `resolution`, E as given with its own input size."""
    side = encoder.resolution if encoder else resolution
    return BigBiGANConfig(
        generator=GeneratorConfig(
            resolution,
            base_channels=base_channels,
            z_chunks=Z_CHUNKS[resolution],
            prior="uniform" if encoder and encoder.output == "tanh" else "normal",
            upsample_size=side,
        ),
        encoder=encoder,
        discriminator=DiscriminatorConfig(resolution),
        preprocess=PreprocessConfig(side),
    )


def _scores(config: BigBiGANConfig, *scores: Literal["x", "z", "xz"], rotation_head: bool = False) -> BigBiGANConfig:
    assert isinstance(config.discriminator, DiscriminatorConfig)
    discriminator = replace(config.discriminator, scores=scores, rotation_head=rotation_head)
    return replace(config, discriminator=discriminator)


def _bigan(config: BigBiGANConfig) -> BigBiGANConfig:
    """Pairs alone are scored; latents are uniform, E is deterministic and bounded (BiGAN)."""
    assert isinstance(config.generator, GeneratorConfig) and isinstance(config.encoder, EncoderConfig)
    generator, encoder = replace(config.generator, prior="uniform"), replace(config.encoder, output="tanh")
    return _scores(replace(config, generator=generator, encoder=encoder), "xz")


def small(
    image_channels: int,
    preprocess: PreprocessConfig,
    *,
    base_channels: int = 16,
    encoder_channels: int = 32,
    depths: tuple[int, ...] = (1, 1, 1, 1),
    z_chunk: int = 4,
    mlp: int = 320,
    head: int = 256,
    resolution: Resolution = 32,
    discriminator_channels: int | None = None,
) -> BigBiGANConfig:
    """A model for one CPU: basic ResNet-v2 units, MLPs of four layers, no attention.

    E halves its input early from 64 pixels up; `discriminator_channels` are `base_channels` unless given.
    """
    chunks = (z_chunk,) * len(GENERATOR_CHANNELS[resolution])
    z_dim, joint = sum(chunks), MLPConfig(mlp, 4)
    stem: Literal["imagenet", "small"] = "small" if resolution == 32 else "imagenet"
    return BigBiGANConfig(
        generator=GeneratorConfig(
            resolution,
            image_channels,
            base_channels,
            chunks,
            shared_dim=0,
            attention_resolution=0,
            upsample_size=2 * resolution,
        ),
        encoder=EncoderConfig(
            resolution,
            image_channels,
            "resnet",
            depths,
            encoder_channels,
            "basic",
            stem,
            z_dim,
            head=MLPConfig(head, 4),
        ),
        discriminator=DiscriminatorConfig(
            resolution, image_channels, discriminator_channels or base_channels, z_dim, 0, joint, joint
        ),
        preprocess=preprocess,
    )


_R50_128, _R50 = EncoderConfig(128), EncoderConfig(256)
_REVNET = EncoderConfig(256, architecture="revnet")
_BASE = imagenet(_R50_128)
_GREY_SMALL = small(1, PreprocessConfig(28, pad=2, polarity="light-on-dark"))
_PHOTOS = {"base_channels": 12, "discriminator_channels": 16, "encoder_channels": 32, "z_chunk": 8}
_PHOTOS_64 = small(3, PreprocessConfig(64), resolution=64, depths=(2, 2, 2, 1), **_PHOTOS)
_PHOTOS_128 = small(3, PreprocessConfig(128), resolution=128, depths=(2, 2, 2, 1), **_PHOTOS)

_TABLE_1: dict[str, tuple[BigBiGANConfig, str]] = {
    "base": (_BASE, "Base: ResNet-50 encoder, everything at 128 pixels"),
    "deterministic-e": (imagenet(replace(_R50_128, output="deterministic")), "Deterministic E"),
    "uniform-pz": (imagenet(replace(_R50_128, output="tanh")), "Uniform P_z: U(-1, 1), tanh encoder"),
    "x-unary-only": (_scores(_BASE, "x", "xz"), "x Unary Only: no s_z"),
    "z-unary-only": (_scores(_BASE, "z", "xz"), "z Unary Only: no s_x"),
    "no-unaries": (_scores(_BASE, "xz"), "No Unaries (BiGAN): s_xz alone"),
    "small-g-32": (imagenet(_R50_128, base_channels=32), "Small G (32): 32 base channels in G"),
    "small-g-64": (imagenet(_R50_128, base_channels=64), "Small G (64): 64 base channels in G"),
    "no-e": (_scores(imagenet(None), "x"), "No E (GAN): F and s_x alone"),
    "high-res-e-256": (imagenet(_R50), "High Res E (256)"),
    "low-res-g-64": (imagenet(_R50, resolution=64), "Low Res G (64)"),
    "high-res-g-256": (imagenet(_R50, resolution=256), "High Res G (256)"),
    "resnet101": (imagenet(replace(_R50, depths=(3, 4, 23, 3))), "ResNet-101"),
    "resnet50x2": (imagenet(replace(_R50, base_channels=128)), "ResNet x2"),
    "revnet50": (imagenet(_REVNET), "RevNet"),
    "revnet50x2": (imagenet(replace(_REVNET, base_channels=128)), "RevNet x2"),
    "revnet50x4-base-lr": (imagenet(replace(_REVNET, base_channels=256)), "RevNet x4"),
    "resnet50": (imagenet(_R50), "ResNet (up E LR): released by DeepMind"),
    "revnet50x4": (imagenet(replace(_REVNET, base_channels=256)), "RevNet x4 (up E LR): released by DeepMind"),
}
_SMALL: dict[str, tuple[BigBiGANConfig, str, str]] = {
    "fashion-mnist-32": (_GREY_SMALL, "Fashion-MNIST, grey", "trained by this project"),
    "mnist-32": (_GREY_SMALL, "MNIST, grey", "this project"),
    "cifar10-32": (small(3, PreprocessConfig(32), z_chunk=8), "CIFAR-10", "this project"),
    "photos-64": (_PHOTOS_64, "own photos, colour", "this project"),
    "photos-128": (_PHOTOS_128, "own photos, colour", "this project"),
    "fruits-64": (_PHOTOS_64, "apples, cherries and tomatoes (Fruits-360), colour", "this project"),
    "tiny": (
        small(3, PreprocessConfig(32), base_channels=2, encoder_channels=4, z_chunk=2, mlp=16, head=16),
        "for trying things out in seconds",
        "this project",
    ),
}
_GREY_GAN = replace(_GREY_SMALL, encoder=None)
_NO_E = _TABLE_1["no-e"][0]
_OTHER_METHODS: dict[str, tuple[BigBiGANConfig, str, str]] = {
    "bigan-mnist-mlp": (
        BigBiGANConfig(
            MLPGeneratorConfig(),
            MLPEncoderConfig(),
            MLPDiscriminatorConfig(),
            PreprocessConfig(28, polarity="light-on-dark"),
        ),
        "BiGAN, permutation-invariant MNIST: fully connected, 28 pixels",
        "BiGAN paper, jeffdonahue/bigan",
    ),
    "bigan-mnist-32": (_bigan(_GREY_SMALL), "BiGAN with convolutions, MNIST, grey", "this project"),
    "bigan-fashion-mnist-32": (_bigan(_GREY_SMALL), "BiGAN with convolutions, Fashion-MNIST, grey", "this project"),
    "biggan-imagenet-128": (_NO_E, "BigGAN without labels: F and s_x alone", "BigGAN paper, google/compare_gan"),
    "biggan-fashion-mnist-32": (
        _scores(_GREY_GAN, "x"),
        "BigGAN without labels, Fashion-MNIST, grey: F and s_x alone",
        "this project",
    ),
    "ssgan-imagenet-128": (
        _scores(_NO_E, "x", rotation_head=True),
        "SS-GAN: BigGAN without labels and a rotation head",
        "SS-GAN paper, google/compare_gan",
    ),
    "ssgan-fashion-mnist-32": (
        _scores(_GREY_GAN, "x", rotation_head=True),
        "SS-GAN, Fashion-MNIST, grey: F, s_x and a rotation head",
        "this project",
    ),
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        *(Preset(f"bigbigan-{k}", c, f"Table 1, {d}", "BigBiGAN paper") for k, (c, d) in _TABLE_1.items()),
        *(Preset(f"bigbigan-{k}", c, d, origin) for k, (c, d, origin) in _SMALL.items()),
        *(Preset(k, c, d, origin) for k, (c, d, origin) in _OTHER_METHODS.items()),
    )
}


def normalize(name: str) -> str:
    """`_` counts as `-`, and case is ignored."""
    return name.lower().replace("_", "-")


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: unknown name; the message lists close ones.
    """
    if (preset := PRESETS.get(normalize(name))) is not None:
        return preset
    close = close_names(name, PRESETS)
    hint = f"did you mean {' or '.join(close)}?" if close else "`bigbigan list` shows all"
    raise ValueError(f"no preset {name!r}; {hint}")


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """At most three known names that may be meant, the closest first.

    The part that many share, such as "bigbigan-", tells nothing: with it, any two of these names look alike.
    """
    name = normalize(name)
    wanted = _own_part(name)
    family = name.removesuffix(wanted) or "bigbigan-"

    def alike(other: str) -> float:
        own = _own_part(other)
        shared = any(len(word) > 2 and word in own.split("-") for word in wanted.split("-"))
        swapped = 0.8 * (sorted(own) == sorted(wanted))  # letters in another order, as in "tyni"
        return max(difflib.SequenceMatcher(None, own, wanted).ratio(), swapped) + 0.5 * shared

    close = [other for other in known if alike(other) >= 0.7]
    return sorted(close, key=lambda other: -alike(other) - 0.3 * other.startswith(family))[:3]


def _own_part(name: str) -> str:
    return re.sub(r"^(bigbigan|bigan|biggan|ssgan)-", "", name)
