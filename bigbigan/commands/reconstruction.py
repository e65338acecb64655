"""`evaluate reconstruction`: what reconstructions keep of their originals."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from bigbigan.commands.comparison import Splits
from bigbigan.commands.image_sets import ARRAYS, given_images, named_images, picture_files, pooled
from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    add_output,
    check_picture,
    choose_device,
    open_model,
    positive,
    set_threads,
)
from bigbigan.commands.records import DATA, ENDING, add_data_options, make_record, print_record
from bigbigan.outputs import PICTURE

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.config import PreprocessConfig
    from bigbigan.data.dataset import ImageDataset
    from bigbigan.model import BigBiGAN


def add_reconstruction(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "reconstruction",
        _reconstruction,
        "what reconstructions keep of their originals\n\n"
        "A small classifier, trained on real images of the training split alone, labels the reconstructions of the\n"
        "test split. Also pixel errors and distances of avepool_feat, over those of random pairs; where the encoder\n"
        "sees larger images than the reconstructions, both are enlarged for it.\n\n"
        "Reconstructions are the model's (from z_mean), or any other's: --reconstructions names a folder with a\n"
        "picture for each test image, at the same path apart from the suffix (000000.png, 000001.png, … where the\n"
        "test split is Parquet), or uint8 [N, S, S, C] in .npz or .npy, in the order of the test split (a .npz with\n"
        "`paths` is matched by these names). Test images are then read as --model reads them, or without it as the\n"
        "largest centre square, scaled to that size.\n" + DATA,
        "Example: bigbigan evaluate reconstruction --data data/fashion_mnist --grid pairs.png\n"
        "         bigbigan evaluate reconstruction --data data/photos --reconstructions vq/ --json vq.json\n" + ENDING,
    )
    add_data_options(parser)
    parser.add_argument("--reconstructions", metavar="PATH", help="those of another method, in place of the model's")
    add_output(
        parser, "--grid", kind=PICTURE, metavar="PICTURE", help="also draw test images above their reconstructions"
    )
    parser.add_argument(
        "--epochs", type=positive, default=6, metavar="N", help="of the classifier (default: %(default)s)"
    )
    parser.add_argument("--flip", action="store_true", help="mirror half of the classifier's training images")
    parser.add_argument("--batch-size", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of classifier and pairs (default: %(default)s)")
    add_model_options(parser)


@dataclass(frozen=True)
class _Reconstructor:
    """What makes the reconstructions, or has made them, and how originals are read for it."""

    labels: dict[str, str]
    model: BigBiGAN | None
    reconstruct: Callable[[Tensor], Tensor] | Tensor
    preprocess: PreprocessConfig
    channels: int
    side: int


def _reconstruction(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation import reconstruction_report, train_classifier
    from bigbigan.schema import to_dict

    set_threads(arguments)
    splits = Splits(arguments)
    train, test = splits.train, splits.test
    if arguments.grid:
        check_picture(arguments.grid, [*splits.files, *picture_files(arguments.reconstructions)])
    what = _given(arguments, test) if arguments.reconstructions else _modelled(arguments)
    train_x, test_x = (splits.images(part, what.preprocess, what.channels).decoded for part in ("train", "test"))
    classes = max(len(train.class_names), int(train.labels.max()) + 1)
    settings = {"epochs": arguments.epochs, "flip": arguments.flip}
    classifier = train_classifier(
        pooled(train_x, what.side).to(what.model.device if what.model else choose_device(arguments.device)),
        train.labels,
        num_classes=classes,
        progress=not arguments.quiet,
        seed=arguments.seed,
        **settings,
    )
    result = reconstruction_report(
        test_x,
        test.labels,
        what.reconstruct,
        _features(what.model) if what.model else None,
        classifier,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=not arguments.quiet,
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
        "seed": arguments.seed,
    }
    results = [{**what.labels, **figures}]
    record = make_record(what.model, protocol, train=train, test=test, results=results)
    print_record(arguments, ("Measure", "Value"), cells, record)
    if arguments.grid:
        _draw_pairs(what.reconstruct, test_x[:32], arguments.grid)
    return 0


def _modelled(arguments: argparse.Namespace) -> _Reconstructor:
    model = open_model(arguments, ("generator", "encoder"))
    name = model.info.name or "model"
    labels = {"reconstructor": name, "latent": "z_mean", "features": f"avepool_feat of {name}"}
    side = model.part("generator").config.resolution
    return _Reconstructor(labels, model, model.reconstruct, model.config.preprocess, model.config.image_channels, side)


def _given(arguments: argparse.Namespace, test: ImageDataset) -> _Reconstructor:
    import hashlib

    import torch

    from bigbigan.commands.pairing import row_names, row_order
    from bigbigan.commands.sample_record import preprocessing_of
    from bigbigan.evaluation.feature_files import feature_names

    path = Path(arguments.reconstructions)
    model = open_model(arguments, ("encoder",)) if arguments.model else None
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
    from torch.nn.functional import interpolate

    side = model.part("encoder").config.resolution

    def features(x: Tensor) -> Tensor:
        if x.shape[-1] != side:
            x = interpolate(x, size=side, mode="bilinear").clamp(-1, 1)
        return model.encode(x).avepool_feat

    return features


def _draw_pairs(reconstruct: Callable[[Tensor], Tensor] | Tensor, images: Tensor, path: str) -> None:
    from bigbigan.grids import make_pairs
    from bigbigan.images import save_image

    x = images.float() / 127.5 - 1  # as uint8 they would be preprocessed once more
    again = reconstruct(x) if callable(reconstruct) else reconstruct[: len(x)].float() / 127.5 - 1
    save_image(make_pairs(x, again), path)
