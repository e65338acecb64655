"""Networks whose features generated images are compared in: Inception for FID, or any other under its own name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bigbigan.evaluation.features import digest, weights_digest
from bigbigan.model import BigBiGAN

# What torchvision raises when it is imported beside a torch of another build or release.
MISMATCH = "torchvision does not fit the installed torch ({}): install both in one step, from the same index"
INCEPTION = "inception-v3-compat"  # torch-fidelity's name for the network that FID, KID and IS are defined by


@dataclass(frozen=True)
class FeatureNetwork:
    """A network, and what it makes of images before it sees them.

    Attributes:
        name: part of the name of every figure measured with it.
        digest: sha256 of its weights and of `reads`; statistics of one network are refused by another.
        reads: how images of any size become its input, for the record.
        forward: uint8 images [N, C, S, S], C of 1 or 3, to features [N, D] and logits [N, K], or None without.
    """

    name: str
    digest: str
    reads: str
    forward: Callable[[Tensor], tuple[Tensor, Tensor | None]]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `forward`, float32 on the CPU.

        Raises:
            ValueError: images are not uint8 [N, C, S, S], or features not finite [N, D].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images are {images.dtype} {list(images.shape)}; expected uint8 [N, 1 or 3, S, S]")
        features, logits = self.forward(images)
        if features.ndim != 2 or len(features) != len(images) or not features.isfinite().all():
            shape = list(features.shape)
            raise ValueError(f"{self.name} gave features {shape} for {len(images)} images; expected finite [N, D]")
        return features.float().cpu(), None if logits is None else logits.float().cpu()


def inception_network(device: str = "cpu") -> FeatureNetwork:
    """torch-fidelity's port of the 2015 Inception, weights and resizing included; it fetches them by itself.

    Raises:
        ImportError: no torch-fidelity, or no torchvision, which it needs.
        OSError: the weights cannot be fetched.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ImportError(
            f"FID's Inception network comes with torch-fidelity and torchvision ({error}): "
            "pip install torch-fidelity, or choose another network with --network"
        ) from error
    except RuntimeError as error:
        raise ImportError(MISMATCH.format(error)) from error
    try:
        network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"]).to(device).eval()
    except OSError as error:
        raise OSError(
            f"the weights of FID's Inception network cannot be fetched ({error}): "
            "try again with a connection, or choose another network with --network"
        ) from error

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(to_channels(images, 3).to(device))
        return features, logits

    reads = "grey repeated to RGB, TensorFlow's bilinear resize to 299 pixels"
    return FeatureNetwork(INCEPTION, weights_digest(network, reads), reads, forward)


def encoder_network(model: BigBiGAN) -> FeatureNetwork:
    """`avepool_feat` of a model's encoder."""
    config = model.part("encoder").config
    channels, side = model.config.image_channels, config.resolution

    def forward(images: Tensor) -> tuple[Tensor, None]:
        x = resize(to_channels(images, channels).float() / 127.5 - 1, side).clamp(-1, 1)
        return model.encode(x.to(model.device, model.dtype), seed=0, batch_size=len(x)).avepool_feat, None

    reads = f"bilinear resize with antialiasing to {side} pixels, none if of that size"
    return FeatureNetwork(f"{model.info.name or 'model'} avepool_feat", digest(model.part("encoder")), reads, forward)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Grey images repeated for a network of colour.

    Raises:
        ValueError: colour images for a network of grey.
    """
    if images.shape[1] > channels:
        raise ValueError(f"images have {images.shape[1]} channels and the network takes {channels}; choose another")
    return images.expand(-1, channels, -1, -1)


def resize(images: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Float images [N, C, S, S] scaled to `side` with antialiasing; they may leave their range if bicubic."""
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode=mode, align_corners=False, antialias=True)
