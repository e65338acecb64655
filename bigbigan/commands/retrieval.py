"""`evaluate retrieval`: the nearest neighbours of images, as a picture and as figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.commands.comparison import add_cache_option
from bigbigan.commands.image_sets import BATCH, picture_files
from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    add_output,
    check_picture,
    open_model,
    positive,
)
from bigbigan.commands.records import DATA, ENDING, add_record_option, add_workers_option, make_record, print_record
from bigbigan.files import path_named
from bigbigan.outputs import PICTURE

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from bigbigan.data.dataset import ImageDataset
    from bigbigan.evaluation.rows import Rows
    from bigbigan.model import BigBiGAN

LISTED = 100  # queries whose neighbours the record names


def add_retrieval(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "retrieval",
        _retrieval,
        "nearest images by features: a picture, and precision@k where there are labels\n\n"
        "Finds for each query the nearest images of a split, exactly. Queries are image files, another split\n"
        "(--query-split), or without either the images of the split themselves. A query that is in the split is left\n"
        "out of its own neighbours. The picture has a row a query: the query, then its neighbours, nearest first. The\n"
        f"record names the neighbours of the first {LISTED} queries.\n\n"
        "Features come from --model, or of the split from a file that `bigbigan encode` wrote (--features): then\n"
        "--data is the folder that was encoded, and the class of an image is its first folder; or it is the Parquet\n"
        "set that was encoded. They may be any encoder's, unless there are QUERY files, which --model encodes.\n"
        + DATA,
        "Example: bigbigan evaluate retrieval cat.jpg dog.jpg --data photos/ -o neighbours.png\n"
        "         bigbigan evaluate retrieval --data data/fashion_mnist --query-split test --k 1 10\n" + ENDING,
    )
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="image files, or folders of them")
    parser.add_argument("--data", required=True, metavar="PATH", help="the images to choose from")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--query-split", metavar="SPLIT", help="all images of another split of --data as queries")
    parser.add_argument("--features", metavar="FILE", help="those of --data: .npz, .safetensors or .parquet")
    parser.add_argument(
        "--feature", default="avepool_feat", metavar="NAME", help="encoder output (default: %(default)s)"
    )
    parser.add_argument("--metric", choices=("cosine", "l2"), default="cosine", help="(default: %(default)s)")
    parser.add_argument("--k", type=positive, nargs="+", default=[10], metavar="K", help="neighbours (default: 10)")
    parser.add_argument("--keep-query", action="store_true", help="leave a query among its neighbours")
    add_output(parser, "-o", "--output", kind=PICTURE, metavar="PICTURE", help=".png, .jpg or .webp")
    parser.add_argument(
        "--rows", type=positive, default=8, metavar="N", help="queries in the picture (default: %(default)s)"
    )
    add_cache_option(parser)
    add_workers_option(parser)
    add_record_option(parser)
    add_model_options(parser)


@dataclass(frozen=True)
class _Images:
    """Features of images and what is known of them; `draw` gives some of them [N, C, S, S] uint8."""

    rows: Rows
    labels: Tensor  # [N], -1 unknown
    name: Callable[[int], str]
    draw: Callable[[Sequence[int]], Tensor]
    facts: dict[str, Any]
    dataset: ImageDataset | None = None  # of a split


def _retrieval(arguments: argparse.Namespace) -> int:
    import torch

    from bigbigan.evaluation.retrieval import precision_at, retrieve

    if arguments.output:
        given = [*arguments.queries, arguments.data.partition("?")[0]]
        check_picture(arguments.output, (file for path in given for file in picture_files(path)))
    if arguments.queries and arguments.query_split:
        raise ValueError("give QUERY files or --query-split, not both")
    if arguments.features and arguments.query_split:
        raise ValueError("--features holds one set of images; give QUERY files, or none")
    model = open_model(arguments, ("encoder",))
    encoder = None if arguments.features and not arguments.queries else model  # of the features
    gallery = (
        _stored(arguments, model) if arguments.features else _split(arguments, model, arguments.split, max(arguments.k))
    )
    if arguments.queries:
        queries, own = _files(arguments, model, gallery)
    elif arguments.query_split:
        queries = _split(arguments, model, arguments.query_split, beside=gallery.dataset)
        known = {gallery.name(index): index for index in range(len(gallery.rows))}
        own = torch.tensor([known.get(queries.name(index), -1) for index in range(len(queries.rows))])
        if arguments.query_split != arguments.split and queries.facts["digest"] == gallery.facts["digest"]:
            raise ValueError(f"{arguments.data}: {arguments.query_split} and {arguments.split} are the same images")
    else:
        queries, own = gallery, torch.arange(len(gallery.rows))
    ks, progress = sorted(set(arguments.k)), not arguments.quiet
    left_out = None if arguments.keep_query else own
    distances, indices = retrieve(
        gallery.rows,
        queries.rows,
        max(ks),
        metric=arguments.metric,
        own=left_out,
        device=model.device,
        progress=progress,
    )
    name = Path(arguments.features).name if encoder is None else encoder.info.name or "model"
    row = {"representation": name, "feature": arguments.feature, "metric": arguments.metric}
    rows: list[dict[str, Any]] = [{**row, "num_queries": len(queries.rows)}]
    labelled = queries.labels >= 0
    if labelled.any() and len(gallery.labels.unique()) > 1 and (gallery.labels >= 0).all():
        found = precision_at(indices[labelled], gallery.labels, queries.labels[labelled], ks)
        rows = [{**row, "k": k, "precision": value, "num_queries": int(labelled.sum())} for k, value in found.items()]
    rows[0]["neighbours"] = [
        {
            "query": queries.name(i),
            "names": [gallery.name(j) for j in indices[i].tolist()],
            "distances": [round(d, 7) for d in distances[i].tolist()],
        }
        for i in range(min(LISTED, len(queries.rows)))
    ]
    header = ("Representation", "Feature", "Metric", "k", "Precision %")
    cells = [
        (*row.values(), str(r.get("k", "-")), f"{100 * r['precision']:.2f}" if "precision" in r else "-") for r in rows
    ]
    protocol = {
        "name": "retrieval",
        "search": "exact",
        "query": "among its neighbours" if arguments.keep_query else "left out of its neighbours",
    }
    record = make_record(encoder, protocol, gallery=gallery.facts, queries=queries.facts, results=rows)
    print_record(arguments, header, cells, record)
    if arguments.output:
        _save_picture(arguments, gallery, queries, indices)
    return 0


def _split(
    arguments: argparse.Namespace,
    model: BigBiGAN,
    split: str,
    neighbours: int = 0,
    beside: ImageDataset | None = None,
) -> _Images:
    from bigbigan.commands.comparison import SplitImages, align_classes
    from bigbigan.data.opening import open_dataset
    from bigbigan.data.workers import default_workers
    from bigbigan.evaluation.cache import compute_features
    from bigbigan.evaluation.representations import model_features

    dataset = open_dataset(arguments.data, split=split)
    if neighbours > len(dataset):
        raise ValueError(f"--k {neighbours}: there are {len(dataset)} images in {split}; give that many at most")
    if beside is not None:
        align_classes(dataset, beside)
    config, channels, name = model.config.preprocess, model.config.image_channels, arguments.feature
    rows = compute_features(
        model_features(model, [name]),
        SplitImages(dataset, config, channels, BATCH, arguments.workers or default_workers()),
        cache=arguments.feature_cache,
        progress=not arguments.quiet,
    )[name]
    facts = {"digest": dataset.digest, "images": len(dataset), "unreadable": len(dataset.bad), "split": split}
    return _Images(
        rows, dataset.labels, dataset.name, lambda indices: dataset.decode(indices, config, channels), facts, dataset
    )


def _stored(arguments: argparse.Namespace, model: BigBiGAN) -> _Images:
    """The rows of a feature file; the pictures lie in --data under their names, or are the rows of a Parquet set."""
    from bigbigan.commands.pairing import row_order
    from bigbigan.data.opening import open_dataset
    from bigbigan.data.paths import holds_rows
    from bigbigan.evaluation.feature_files import feature_names, file_digest, read_features
    from bigbigan.evaluation.retrieval import labels_of
    from bigbigan.evaluation.rows import select

    path, root = Path(arguments.features), Path(arguments.data)
    features = read_features(path, prefer=[arguments.feature])
    names = feature_names(path)
    if arguments.feature not in features:
        raise ValueError(f"{path} has no {arguments.feature}; it has {', '.join(features)}")
    rows = features[arguments.feature]
    if names is not None and len(rows) != len(names):
        raise ValueError(f"{path} has {len(rows)} rows of {arguments.feature} and {len(names)} names; write it again")
    if holds_rows(arguments.data):
        dataset = open_dataset(arguments.data, split=arguments.split)
        if len(rows) != len(dataset):
            raise ValueError(f"{path} has {len(rows)} rows for {len(dataset)} images of {arguments.split}; "
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


def _files(arguments: argparse.Namespace, model: BigBiGAN, gallery: _Images) -> tuple[_Images, Tensor]:
    """The query files, and which images of the gallery they are."""
    import hashlib

    import torch

    from bigbigan.images import list_images

    given = map(Path, arguments.queries)
    files = [file for path in given for file in (list_images(path) if path.is_dir() else [path])]
    images = _read(model, files)
    rows = _encode(arguments, model, images)
    if arguments.features:
        _check_encoder(arguments, model, gallery)
    known = {_where(arguments, gallery.name(index)): index for index in range(len(gallery.rows))}
    own = torch.tensor([known.get(file.resolve(), -1) for file in files])
    labels = torch.where(own >= 0, gallery.labels[own], -1)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    facts = {"digest": digest, "images": len(files)}
    return _Images(rows, labels, lambda index: str(files[index]), lambda indices: images[list(indices)], facts), own


def _encode(arguments: argparse.Namespace, model: BigBiGAN, images: Tensor) -> Tensor:
    from bigbigan.evaluation.representations import model_features

    return model_features(model, [arguments.feature]).features(images.float() / 127.5 - 1)[arguments.feature]


def _check_encoder(arguments: argparse.Namespace, model: BigBiGAN, gallery: _Images) -> None:
    """That --model wrote --features: it encodes the first image again (z_sample, whose noise may differ, by width)."""
    import torch

    first = _encode(arguments, model, gallery.draw([0]))
    same = first.shape[1] == gallery.rows.shape[1]
    if same and arguments.feature != "z_sample":
        same = torch.allclose(first, gallery.rows[:1], rtol=1e-2, atol=1e-2)
    if not same:
        name = model.info.name or "the model"
        raise ValueError(
            f"{arguments.features}: the {arguments.feature} of {gallery.name(0)} is not what {name} gives for that "
            "image; name the --model that wrote the file"
        )


def _where(arguments: argparse.Namespace, name: str) -> Path:
    return (Path(arguments.data) / path_named(name) if arguments.features else Path(name)).resolve()


def _read(model: BigBiGAN, files: list[Path]) -> Tensor:
    """uint8 [N, C, S, S] as the encoder sees them."""
    return (model.preprocess(files) + 1).mul(127.5).round().byte().cpu()


def _save_picture(arguments: argparse.Namespace, gallery: _Images, queries: _Images, indices: Tensor) -> None:
    from bigbigan.images import save_image

    shown = range(min(arguments.rows, len(queries.rows)))
    chosen = indices[: len(shown)].flatten().tolist()
    save_image(draw_neighbours(queries.draw(shown), gallery.draw(chosen)), arguments.output)


def draw_neighbours(queries: Tensor, neighbours: Tensor) -> Image.Image:
    """Queries [M, C, S, S] uint8, each left of its row of neighbours [M k, C, S, S], with space between."""
    from PIL import Image

    from bigbigan.grids import enlargement, make_grid

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
