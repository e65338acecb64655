"""Nearest images by their features: `evaluate_retrieval`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from bigbigan.data.dataset import ImageDataset
from bigbigan.data.opening import open_dataset
from bigbigan.data.paths import holds_rows
from bigbigan.data.workers import default_workers
from bigbigan.evaluation.cache import compute_features
from bigbigan.evaluation.feature_files import feature_names, file_digest, read_features
from bigbigan.evaluation.pairing import row_order
from bigbigan.evaluation.protocols.comparison import SplitImages, align_classes
from bigbigan.evaluation.protocols.evaluation import Data, Evaluation, ModelLike, opened_data, opened_model, tabulated
from bigbigan.evaluation.protocols.image_sets import BATCH
from bigbigan.evaluation.representations import model_features
from bigbigan.evaluation.retrieval import labels_of, precision_at, retrieve
from bigbigan.evaluation.rows import Rows, select
from bigbigan.files import path_named
from bigbigan.grids import enlargement, make_grid
from bigbigan.images import list_images
from bigbigan.model import BigBiGAN

LISTED = 100  # queries whose neighbours the record names


@dataclass(frozen=True)
class _Settings:
    """See `evaluate_retrieval`."""

    queries: Sequence[str | Path]
    data: Data
    split: str
    feature_file: str | Path | None
    feature: str
    cache: str | Path | None
    workers: int | None
    progress: bool


@dataclass(frozen=True)
class _Images:
    """Features of images, and what is known about them; `draw` gives some of them [N, C, S, S] uint8."""

    rows: Rows
    labels: Tensor  # [N], -1 unknown
    name: Callable[[int], str]
    draw: Callable[[Sequence[int]], Tensor]
    facts: dict[str, Any]
    dataset: ImageDataset | None = None  # of a split


def evaluate_retrieval(
    data: Data,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    queries: Sequence[str | Path] = (),
    split: str = "train",
    query_split: str | None = None,
    feature_file: str | Path | None = None,
    feature: str = "avepool_feat",
    metric: Literal["cosine", "l2"] = "cosine",
    k: Sequence[int] = (10,),
    keep_query: bool = False,
    cache: str | Path | None = None,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Evaluation:
    """The nearest images of a split, and precision@k where there are labels, as `bigbigan evaluate retrieval` has it.

    `Evaluation.draw(n)` draws the first n queries, each beside its neighbours. The record names the neighbours of the
    first LISTED queries.

    Args:
        data: the images to choose from: a path, as `open_training_data` takes it, or an opened data set. With a
            `feature_file`, the path of the folder or Parquet set that was encoded.
        model: encodes images: a model, or what `load` takes; None is the model inside the package.
        revision: commit, tag or branch, of a model on the Hugging Face Hub.
        queries: image files and folders. Without them and `query_split`, each image of the split is a query.
        split, query_split: parts of the data at a path; all images of `query_split` are queries.
        feature_file: features of `data`, as `bigbigan encode` writes them: `.npz`, `.safetensors` or `.parquet`.
        feature: output of the encoder, or name of the features in the file.
        metric: "cosine" or "l2" distance.
        k: numbers of neighbours; the largest is searched for, and each gives a precision.
        keep_query: leave a query that is in the split among its own neighbours.
        cache: a folder to cache features in and stream them from; default in memory.
        workers: processes that decode images; default by the number of cores.
        device: for a model that is loaded here; a model object stays on its own.
        progress: show bars on a terminal's stderr.

    Raises:
        ValueError: queries, data, features or k that do not fit.
        BadImageError: a query that cannot be read.
        FileNotFoundError, DownloadError: no such model.
    """
    if queries and query_split:
        raise ValueError("give QUERY files or --query-split, not both")
    if feature_file is not None and query_split:
        raise ValueError("--feature-file holds one set of images; give QUERY files, or none")
    if isinstance(data, ImageDataset) and (query_split or feature_file is not None):
        raise ValueError("query_split and feature_file need the path of the data, not an opened data set")
    model = opened_model(model, ("encoder",), device=device, revision=revision)
    encoder = model if feature_file is None or queries else None  # of the features
    settings = _Settings(queries, data, split, feature_file, feature, cache, workers, progress)
    gallery = _stored(settings, model) if feature_file is not None else _split(settings, model, split, max(k))
    asked, own = _queries(settings, model, gallery, query_split)
    ks = sorted(set(k))
    distances, indices = retrieve(
        gallery.rows,
        asked.rows,
        max(ks),
        metric=metric,
        own=None if keep_query else own,
        device=model.device,
        progress=progress,
    )
    name = Path(str(feature_file)).name if encoder is None else encoder.info.name or "model"
    row = {"representation": name, "feature": feature, "metric": metric}
    rows: list[dict[str, Any]] = [{**row, "num_queries": len(asked.rows)}]
    labelled = asked.labels >= 0
    if labelled.any() and len(gallery.labels.unique()) > 1 and (gallery.labels >= 0).all():
        found = precision_at(indices[labelled], gallery.labels, asked.labels[labelled], ks)
        rows = [{**row, "k": n, "precision": value, "num_queries": int(labelled.sum())} for n, value in found.items()]
    rows[0]["neighbours"] = [
        {
            "query": asked.name(i),
            "names": [gallery.name(j) for j in indices[i].tolist()],
            "distances": [round(d, 7) for d in distances[i].tolist()],
        }
        for i in range(min(LISTED, len(asked.rows)))
    ]
    protocol = {
        "name": "retrieval",
        "search": "exact",
        "query": "among its neighbours" if keep_query else "left out of its neighbours",
    }

    def draw(number: int) -> Image.Image:
        shown = range(min(number, len(asked.rows)))
        return draw_neighbours(asked.draw(shown), gallery.draw(indices[: len(shown)].flatten().tolist()))

    return tabulated(encoder, protocol, rows, {"gallery": gallery.facts, "queries": asked.facts}, draw)


def _queries(settings: _Settings, model: BigBiGAN, gallery: _Images, query_split: str | None) -> tuple[_Images, Tensor]:
    """The queries, and which images of the gallery they are, -1 for none."""
    if settings.queries:
        return _files(settings, model, gallery)
    if query_split is None:
        return gallery, torch.arange(len(gallery.rows))
    queries = _split(settings, model, query_split, beside=gallery.dataset)
    if query_split != settings.split and queries.facts["digest"] == gallery.facts["digest"]:
        raise ValueError(f"{settings.data}: {query_split} and {settings.split} are the same images")
    known = {gallery.name(index): index for index in range(len(gallery.rows))}
    return queries, torch.tensor([known.get(queries.name(index), -1) for index in range(len(queries.rows))])


def _split(
    settings: _Settings,
    model: BigBiGAN,
    split: str,
    neighbours: int = 0,
    beside: ImageDataset | None = None,
) -> _Images:
    dataset = opened_data(settings.data, split)
    if neighbours > len(dataset):
        raise ValueError(f"--k {neighbours}: there are {len(dataset)} images in {split}; give that many at most")
    if beside is not None:
        align_classes(dataset, beside)
    config, channels, name = model.config.preprocess, model.config.image_channels, settings.feature
    rows = compute_features(
        model_features(model, [name]),
        SplitImages(dataset, config, channels, BATCH, settings.workers or default_workers()),
        cache=settings.cache,
        progress=settings.progress,
    )[name]
    facts = {"digest": dataset.digest, "images": len(dataset), "unreadable": len(dataset.bad), "split": split}
    return _Images(
        rows, dataset.labels, dataset.name, lambda indices: dataset.decode(indices, config, channels), facts, dataset
    )


def _stored(settings: _Settings, model: BigBiGAN) -> _Images:
    """The rows of a feature file; the pictures lie in --data under their names, or are the rows of a Parquet set."""
    assert settings.feature_file is not None and not isinstance(settings.data, ImageDataset)
    path, root = Path(settings.feature_file), Path(settings.data)
    features = read_features(path, prefer=[settings.feature])
    names = feature_names(path)
    if settings.feature not in features:
        raise ValueError(f"{path} has no {settings.feature}; it has {', '.join(features)}")
    rows = features[settings.feature]
    if names is not None and len(rows) != len(names):
        raise ValueError(f"{path} has {len(rows)} rows of {settings.feature} and {len(names)} names; write it again")
    if holds_rows(settings.data):
        dataset = open_dataset(settings.data, split=settings.split)
        if len(rows) != len(dataset):
            raise ValueError(f"{path} has {len(rows)} rows for {len(dataset)} images of {settings.split}; "
                             "encode that split")  # fmt: skip
        order = row_order(dataset, names, str(path))
        facts = {"digest": file_digest(path), "images": len(rows), "features": path.name}
        config, channels = model.config.preprocess, model.config.image_channels
        return _Images(
            rows if order is None else select(rows, order),
            dataset.labels,
            dataset.name,
            lambda indices: dataset.decode(indices, config, channels),
            facts,
            dataset,
        )
    if names is None:
        raise ValueError(f"{path} does not name its rows; `bigbigan encode` writes files that do")
    return _Images(
        rows,
        labels_of(names),
        names.__getitem__,
        lambda indices: _read(model, [root / path_named(names[index]) for index in indices]),
        {"digest": file_digest(path), "images": len(names), "features": path.name},
    )


def _files(settings: _Settings, model: BigBiGAN, gallery: _Images) -> tuple[_Images, Tensor]:
    """The query files, and which images of the gallery they are."""
    given = map(Path, settings.queries)
    files = [file for path in given for file in (list_images(path) if path.is_dir() else [path])]
    images = _read(model, files)
    rows = _encode(settings, model, images)
    if settings.feature_file is not None:
        _check_encoder(settings, model, gallery)
    known = {_where(settings, gallery.name(index)): index for index in range(len(gallery.rows))}
    own = torch.tensor([known.get(file.resolve(), -1) for file in files])
    labels = torch.where(own >= 0, gallery.labels[own], -1)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    facts = {"digest": digest, "images": len(files)}
    return _Images(rows, labels, lambda index: str(files[index]), lambda indices: images[list(indices)], facts), own


def _encode(settings: _Settings, model: BigBiGAN, images: Tensor) -> Tensor:
    return model_features(model, [settings.feature]).features(images.float() / 127.5 - 1)[settings.feature]


def _check_encoder(settings: _Settings, model: BigBiGAN, gallery: _Images) -> None:
    """That --model wrote --features: it encodes the first image again (z_sample, whose noise may differ, by width)."""
    first = _encode(settings, model, gallery.draw([0]))
    same = first.shape[1] == gallery.rows.shape[1]
    if same and settings.feature != "z_sample":
        same = torch.allclose(first, gallery.rows[:1], rtol=1e-2, atol=1e-2)
    if not same:
        name = model.info.name or "the model"
        raise ValueError(
            f"{settings.feature_file}: the {settings.feature} of {gallery.name(0)} is not what {name} gives for that "
            "image; name the --model that wrote the file"
        )


def _where(settings: _Settings, name: str) -> Path:
    if settings.feature_file is None or isinstance(settings.data, ImageDataset):
        return Path(name).resolve()
    return (Path(settings.data) / path_named(name)).resolve()


def _read(model: BigBiGAN, files: list[Path]) -> Tensor:
    """uint8 [N, C, S, S] as the encoder sees them."""
    return (model.preprocess(files) + 1).mul(127.5).round().byte().cpu()


def draw_neighbours(queries: Tensor, neighbours: Tensor) -> Image.Image:
    """Queries [M, C, S, S] uint8, each left of its row of neighbours [M k, C, S, S], with space between."""
    columns, scale = len(neighbours) // len(queries), enlargement(queries)
    left, right = (
        make_grid(images.float() / 127.5 - 1, number, scale=scale)
        for images, number in ((queries, 1), (neighbours, columns))
    )
    space = left.width // 4
    picture = Image.new(left.mode, (left.width + space + right.width, left.height), "white")
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width + space, 0))
    return picture
