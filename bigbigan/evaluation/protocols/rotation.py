"""Rotations that a discriminator recognises: `evaluate_rotation`."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from bigbigan.data.workers import default_workers
from bigbigan.evaluation.protocols.evaluation import Data, Evaluation, ModelLike, opened_data, opened_model, tabulated
from bigbigan.evaluation.rotation import rotation_accuracy


def evaluate_rotation(
    data: Data,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    test_split: str = "test",
    batch_size: int = 256,
    workers: int | None = None,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Accuracy of a discriminator's rotation head (SS-GAN), as `bigbigan evaluate rotation` measures it.

    Each test image is seen in four orientations; chance is 25 %. Nothing is fitted.

    Args:
        data: a path, as `open_training_data` takes it, or an opened data set; labels are not used.
        model: a model, or what `load` takes; None is the model inside the package.
        revision: commit, tag or branch, of a model on the Hugging Face Hub.
        test_split: read from a path only; "test[:1000]" is a part.
        batch_size: images at a time.
        workers: processes that decode images; default by the number of cores.
        device: for a model that is loaded here; a model object stays on its own.

    Raises:
        ValueError: the discriminator has no rotation head, or images that do not fit.
        FileNotFoundError, DownloadError: no such model.
    """
    model = opened_model(model, ("discriminator",), device=device, revision=revision)
    discriminator = model.part("discriminator")
    if not getattr(discriminator.config, "rotation_head", False):
        raise ValueError(f"the discriminator of {model.info.name!r} has no rotation head; SS-GAN recipes train one")
    test = opened_data(data, test_split)
    images = test.decode_all(model.config.preprocess, model.config.image_channels, workers=workers or default_workers())

    def classify(x: Tensor) -> Tensor:
        x = adaptive_avg_pool2d(x.to(model.device, model.dtype), discriminator.config.resolution)
        logits = discriminator(x).rotation
        assert logits is not None
        return logits

    result = rotation_accuracy(classify, images, batch_size=batch_size)
    rows = [("all", f"{100 * result.accuracy:.2f}")]
    rows += [(f"{90 * k} degrees", f"{100 * share:.2f}") for k, share in enumerate(result.per_turn)]
    protocol = {"name": "rotation", "turns": [0, 90, 180, 270]}
    record = tabulated(model, protocol, [asdict(result)], {"test": test}).record
    return Evaluation(record, ("Rotation", "Accuracy %"), rows)
