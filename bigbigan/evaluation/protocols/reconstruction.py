"""How well reconstructions keep their originals: `evaluate_reconstruction`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from bigbigan.config import PreprocessConfig
from bigbigan.data.dataset import ImageDataset
from bigbigan.evaluation.feature_files import feature_names
from bigbigan.evaluation.pairing import row_names, row_order
from bigbigan.evaluation.protocols.comparison import LabelledData, Splits
from bigbigan.evaluation.protocols.evaluation import Evaluation, ModelLike, opened_model, tabulated
from bigbigan.evaluation.protocols.image_sets import ARRAYS, given_images, named_images, pooled
from bigbigan.evaluation.reconstruction import reconstruction_report, train_classifier
from bigbigan.evaluation.sample_record import preprocessing_of
from bigbigan.grids import make_pairs
from bigbigan.model import BigBiGAN
from bigbigan.schema import to_dict

PAIRS = 32  # that can be drawn


def evaluate_reconstruction(
    data: LabelledData,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    reconstructions: str | Path | None = None,
    epochs: int = 6,
    flip: bool = False,
    seed: int = 0,
    batch_size: int = 100,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Labels, pixels and features that reconstructions keep, as `bigbigan evaluate reconstruction` measures them.

    A small classifier, trained on real images of the training split, labels originals and reconstructions of the test
    split. `Evaluation.draw(n)` draws the first n of up to 32 test images above their reconstructions.

    Args:
        data: a path, as `open_training_data` takes it, or the opened (training, test) data sets.
        model: reconstructs from z_mean: a model, or what `load` takes; None is the model inside the package. With
            `reconstructions` it preprocesses the originals and measures feature distances, and None is no model.
        revision: commit, tag or branch, of a model on the Hugging Face Hub.
        train_split, test_split: read from a path only; "train[:50000]" is a part.
        reconstructions: those of another method: a folder with one picture per test image under the same name, or
            uint8 [N, S, S, C] in `.npz` or `.npy`, in the order of the test split.
        epochs, flip: of the classifier; `flip` mirrors half of its training images.
        seed: decides the classifier and the random pairs.
        batch_size: images reconstructed at a time.
        workers: processes that decode images; default by the number of cores.
        device: for models that are loaded here and for the classifier; a model object stays on its own.
        progress: show bars on a terminal's stderr.

    Raises:
        ValueError: data, splits, labels or reconstructions that do not fit.
        FileNotFoundError, DownloadError: no such model.
    """
    splits = Splits(data, train_split, test_split, batch_size=batch_size, workers=workers)
    train, test = splits.train, splits.test
    if reconstructions is None:
        what = _modelled(opened_model(model, ("generator", "encoder"), device=device, revision=revision))
    else:
        judge = None if model is None else opened_model(model, ("encoder",), device=device, revision=revision)
        what = _given(Path(reconstructions), test, judge)
    train_x, test_x = (splits.images(part, what.preprocess, what.channels).decoded for part in ("train", "test"))
    classes = max(len(train.class_names), int(train.labels.max()) + 1)
    settings: dict[str, Any] = {"epochs": epochs, "flip": flip}
    classifier = train_classifier(
        pooled(train_x, what.side).to(what.model.device if what.model else device),
        train.labels,
        num_classes=classes,
        progress=progress,
        seed=seed,
        **settings,
    )
    result = reconstruction_report(
        test_x,
        test.labels,
        what.reconstruct,
        _features(what.model) if what.model else None,
        classifier,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    figures = asdict(result)
    class_names = [*train.class_names, *map(str, range(len(train.class_names), classes))]
    figures["per_class"] = dict(zip(class_names, result.per_class, strict=True))
    rows = [(name, value) for name, value in figures.items() if name != "per_class"]
    rows += [(f"label_agreement, {name}", value) for name, value in figures["per_class"].items()]
    cells = [(name, "-" if value is None else f"{value:.4g}") for name, value in rows]
    protocol = {
        "name": "reconstruction",
        "classifier": settings,
        "resolution": what.side,
        "preprocessing": to_dict(what.preprocess),
        "seed": seed,
    }
    sets = {"train": train, "test": test}
    record = tabulated(what.model, protocol, [{**what.labels, **figures}], sets).record
    shown = test_x[:PAIRS].clone()

    def draw(number: int) -> Image.Image:
        return _draw_pairs(what.reconstruct, shown[:number])

    return Evaluation(record, ("Measure", "Value"), cells, draw)


@dataclass(frozen=True)
class _Reconstructor:
    """What makes the reconstructions, or has made them, and how originals are read for it."""

    labels: dict[str, str]
    model: BigBiGAN | None
    reconstruct: Callable[[Tensor], Tensor] | Tensor
    preprocess: PreprocessConfig
    channels: int
    side: int


def _modelled(model: BigBiGAN) -> _Reconstructor:
    name = model.info.name or "model"
    labels = {"reconstructor": name, "latent": "z_mean", "features": f"avepool_feat of {name}"}
    side = model.part("generator").config.resolution
    return _Reconstructor(labels, model, model.reconstruct, model.config.preprocess, model.config.image_channels, side)


def _given(path: Path, test: ImageDataset, model: BigBiGAN | None) -> _Reconstructor:
    if path.suffix.lower() in ARRAYS:
        again = torch.cat(list(given_images(str(path)).batches()))
    else:
        again = named_images(path, [PurePosixPath(name).with_suffix("").as_posix() for name in row_names(test)])
    if len(again) != len(test):
        raise ValueError(f"{path} holds {len(again)} reconstructions of {len(test)} images; give one of each, in order")
    if path.suffix.lower() == ".npz" and (order := row_order(test, feature_names(path), str(path))) is not None:
        again = again[order]
    channels, side = again.shape[1], again.shape[2]
    digest = hashlib.sha256(repr(again.shape).encode() + again.contiguous().numpy().data).hexdigest()
    labels = {"reconstructor": path.name, "reconstructions_digest": digest}
    if model is None:
        preprocess, _ = preprocessing_of(str(path), side)
        return _Reconstructor(labels, None, again, preprocess, channels, side)
    if model.config.image_channels != channels:
        wanted = model.config.image_channels
        raise ValueError(f"{path} holds images of {channels} channels and --model takes {wanted}; leave --model out")
    labels["features"] = f"avepool_feat of {model.info.name or 'model'}"
    return _Reconstructor(labels, model, again, model.config.preprocess, channels, side)


def _features(model: BigBiGAN) -> Callable[[Tensor], Tensor]:
    side = model.part("encoder").config.resolution

    def features(x: Tensor) -> Tensor:
        if x.shape[-1] != side:
            x = interpolate(x, size=side, mode="bilinear").clamp(-1, 1)
        return model.encode(x).avepool_feat

    return features


def _draw_pairs(reconstruct: Callable[[Tensor], Tensor] | Tensor, images: Tensor) -> Image.Image:
    x = images.float() / 127.5 - 1  # as uint8 they would be preprocessed once more
    again = reconstruct(x) if callable(reconstruct) else reconstruct[: len(x)].float() / 127.5 - 1
    return make_pairs(x, again)
