"""Where features come from: a model's encoder, any module or function, pixels, principal components."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigbigan.config import PreprocessConfig
from bigbigan.evaluation.features import BatchEncoder, digest, weights_digest
from bigbigan.model import BigBiGAN
from bigbigan.schema import to_dict

MAX_PCA_PIXELS = 12_288  # their covariance takes 1.1 GiB

_MAPPED = {"z_logit": "z_mean"}

FeatureFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Representation:
    """Named features of images, and how these images are prepared.

    Attributes:
        encode: images [B, channels, S, S] in [-1, 1], S the resolution of `preprocess`, and the number of the first
            one, to features [B, D] by output. (The number decides what is drawn at random, as for z_sample.)
        digest: of all that shapes the features but images and preprocessing: weights, settings.
    """

    name: str
    encode: Callable[[Tensor, int], Mapping[str, Tensor]]
    outputs: tuple[str, ...]
    preprocess: PreprocessConfig
    channels: int
    digest: str

    @torch.no_grad()
    def features(self, images: Tensor, start: int = 0) -> dict[str, Tensor]:
        """Float32 features [B, D] on the CPU, by output.

        Raises:
            ValueError: not a finite row an image.
        """
        found = self.encode(images, start)
        rows = {output: torch.as_tensor(found[output]).detach().float().cpu() for output in self.outputs}
        for output, x in rows.items():
            if x.ndim != 2 or len(x) != len(images) or not x.shape[1]:
                raise ValueError(
                    f"{self.name}: {output} is {list(x.shape)} for {len(images)} images; "
                    f"expected [{len(images)}, D]: pool or flatten it"
                )
            bad = ~x.isfinite().all(1)
            if bad.any():
                first = start + int(bad.nonzero()[0])
                raise ValueError(
                    f"{self.name}: {output} of image {first} (from 0) holds NaN or infinity; "
                    "check the weights, and the range of values that they were trained for"
                )
        return rows


def model_features(
    model: BigBiGAN, outputs: Sequence[str], *, name: str | None = None, batch_size: int = 256, seed: int = 0
) -> Representation:
    """Encoder outputs of one of this package's models, under its own preprocessing.

    `z_logit`, of models whose latents lie in (-1, 1), is what the encoder maps to z_mean = 2 sigmoid(z_logit) - 1:
    BiGAN's authors score E(x) as a feature before that map.

    Raises:
        ValueError: the model has no encoder, or encoders have no such output.
    """
    config = model.config.generator
    if "z_logit" in outputs and (config is None or config.prior != "uniform"):
        raise ValueError("z_logit is of models with a uniform prior; take z_mean")
    encoder = BatchEncoder(model, [*dict.fromkeys(_MAPPED.get(output, output) for output in outputs)], batch_size, seed)

    def encode(images: Tensor, start: int) -> dict[str, Tensor]:
        rows = encoder(images, start)
        return rows | {output: logit(rows[z]) for output, z in _MAPPED.items() if output in outputs}

    what = [digest(encoder.network), seed if "z_sample" in outputs else 0, model.device.type]
    return Representation(
        name or model.info.name or "model",
        encode,
        tuple(dict.fromkeys(outputs)),
        model.config.preprocess,
        model.config.image_channels,
        _sha256(what),
    )


def logit(z: Tensor) -> Tensor:
    """l of z = 2 sigmoid(l) - 1, at most 18: where z was rounded to 1, of the middle of what is rounded to that."""
    limit = 1 - 2**-25
    return (2 * torch.atanh(z.double().clamp(-limit, limit))).float()


def function_features(
    function: FeatureFunction,
    preprocess: PreprocessConfig,
    channels: int,
    *,
    name: str,
    digest: str,
    output: str = "features",
) -> Representation:
    """Any function of images [B, channels, S, S] in [-1, 1] to features [B, D].

    Args:
        digest: names what the function computes, for a cache of features: equal digests, equal features.
    """
    return Representation(name, lambda x, start: {output: function(x)}, (output,), preprocess, channels, digest)


def module_features(
    module: nn.Module,
    preprocess: PreprocessConfig,
    *,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    crop: tuple[int, int] | None = None,
    name: str,
    output: str = "features",
    read: Callable[[Any], Tensor] = lambda out: out,
    settings: Any = None,
) -> Representation:
    """Any module that takes images [B, C, S, S]; it is put into eval mode, and runs where its parameters are.

    Args:
        preprocess: gives images in [-1, 1]; the module gets them as (v - mean) / std with v in [0, 1]. By default
            that is [-1, 1] again. C is the length of `mean`.
        crop: first row (and column) of the centre square that is cut from them, and the first beyond it, where a model
            scales to more than it looks at.
        read: features [B, D] from what the module returns.
        settings: JSON that tells apart modules of equal weights, for a cache of features.
    """
    module.eval()
    place = next(module.parameters(), torch.empty(0))
    scale, shift = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (std, mean))

    def run(x: Tensor) -> Tensor:
        if crop is not None:
            x = x[..., slice(*crop), slice(*crop)]
        return read(module(((x.cpu() / 2 + 0.5 - shift) / scale).to(place.device, place.dtype)))

    what = [weights_digest(module, repr(module)), list(mean), list(std), crop, output, settings, place.device.type]
    return function_features(run, preprocess, len(mean), name=name, digest=_sha256(what), output=output)


def pixels(preprocess: PreprocessConfig, channels: int) -> Representation:
    """The images themselves, [B, channels * S * S] in [-1, 1]."""
    return function_features(
        lambda x: x.flatten(1), preprocess, channels, name="raw pixels", digest="pixels", output="pixels"
    )


def principal_components(
    batches: Iterable[Tensor], components: int, preprocess: PreprocessConfig, channels: int, *, data_digest: str
) -> Representation:
    """Projections of pixels onto the directions of their largest variance, exact, in one pass over training images.

    Args:
        batches: training images [B, channels, S, S] uint8.

    Raises:
        ValueError: more components than pixels or images, or too many pixels for their covariance.
    """
    width = channels * preprocess.resolution**2
    check_components(1, 1, width)
    count, total = 0, torch.zeros(width, dtype=torch.float64)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for batch in batches:
        x = batch.flatten(1).double() - 127.5  # exact in float64 however many are added
        count, total = count + len(x), total + x.sum(0)
        gram.addmm_(x.T, x)
    check_components(components, count, width)
    mean = total / count
    _, vectors = torch.linalg.eigh(gram / count - mean.outer(mean))
    basis, center = vectors[:, -components:].flip(1), mean / 127.5
    return function_features(
        lambda x: ((x.flatten(1).double() - center) @ basis).float(),
        preprocess,
        channels,
        name=f"pca:{components}",
        digest=_sha256(["pca", components, data_digest, to_dict(preprocess), channels]),
        output=f"{components} principal components",
    )


def check_components(components: int, count: int, width: int) -> None:
    """
    Raises:
        ValueError: `count` images of `width` pixels have no such number of principal components, or too many pixels.
    """
    if width > MAX_PCA_PIXELS:
        raise ValueError(f"pca of {width} pixels needs a {width} x {width} matrix; {MAX_PCA_PIXELS} pixels at most")
    if not 1 <= components <= min(width, count):
        raise ValueError(f"pca:{components} of {count} images of {width} pixels; give 1 to {min(width, count)}")


def _sha256(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
