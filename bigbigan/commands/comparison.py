"""What `evaluate linear` and `knn` measure: labelled splits, and the features of every representation on them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.commands.options import choose_device, names, positive
from bigbigan.commands.records import check_classes

if TYPE_CHECKING:
    from torch import Tensor

    from bigbigan.config import PreprocessConfig
    from bigbigan.data.dataset import ImageDataset
    from bigbigan.evaluation.representations import Representation
    from bigbigan.evaluation.rows import Rows
    from bigbigan.model import BigBiGAN

STANDING_PASSES, STANDING_BATCH = 100, 64  # as in the training recipes
MAX_DECODED = 1 << 30  # bytes of a split's decoded images that are kept; larger ones are decoded again when asked for

COMPARE = """\
SPEC of --compare, each a row (or several) of the same table:
  pixels, pca:64       the model's input, and its 64 principal components over the training split
  untrained            the model's architecture before training, with initial and with estimated statistics
  supervised[:EPOCHS]  a small network trained on all training labels, whatever --labels says: its last hidden
                       layer, and its own accuracy
  timm:NAME            a pretrained encoder of timm
  hf:ORG/NAME[@REV]    one of transformers: pooled output; with :cls the first token, with :mean that of all
  file:TRAIN,TEST      features in .npz, .npy, .safetensors or .parquet, one row per image: matched by name
                       where the file names its rows, as `encode` does, else in the order of the images
  NAME                 another model of this package: a name, a model folder, or org/name[@REV]
Each encoder gets the images under its own preprocessing.
"""

Spec = tuple[str, str]


def spec(text: str) -> Spec:
    """Kind and argument of a SPEC."""
    kind, _, rest = text.partition(":")
    if text in ("pixels", "untrained", "supervised"):
        return text, ""
    if kind in ("pca", "supervised"):
        if not rest.isdecimal() or int(rest) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: give a number, as {kind}:{8 if kind == 'supervised' else 64}")
        return kind, rest
    if kind in ("timm", "hf", "file"):
        if not rest or (kind == "file" and len(rest.split(",")) != 2):
            raise argparse.ArgumentTypeError(f"{text!r}: give timm:NAME, hf:ORG/NAME or file:TRAIN,TEST")
        return kind, rest
    return "model", text


spec.__name__ = "SPEC"


def add_feature_options(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--features",
        type=names,
        default=default,
        metavar="LIST",
        help="encoder outputs, with commas between, or z_logit: z_mean before it was mapped into (-1, 1), where it is "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--compare", type=spec, action="append", default=[], metavar="SPEC", help="also measure this; repeatable"
    )
    parser.add_argument("--baselines", action="store_true", help="--compare untrained --compare pixels")
    parser.add_argument(
        "--crelu",
        action="store_true",
        help="features also as BN+CReLU, normalised over this training split; of models avepool_feat, whose own "
        "bn_crelu_feat is normalised over what they were trained on",
    )
    add_cache_option(parser)
    parser.add_argument(
        "--batch-size", type=positive, default=256, metavar="N", help="encoded at a time (default: 256)"
    )


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--feature-cache",
        metavar="FOLDER",
        help="keep features there, to compute them once, and read them piece by piece, for sets larger than the "
        "memory (but logistic regression, which reads them whole). Folders are known by names, sizes and times of "
        "their files (default: in memory, since features may be larger than a home folder should become)",
    )


class SplitImages:
    """A split under one preprocessing: an `ImageSource`."""

    def __init__(self, dataset: ImageDataset, config: PreprocessConfig, channels: int, size: int, workers: int) -> None:
        self.dataset, self.digest = dataset, dataset.digest
        self._config, self._channels, self._size, self._workers = config, channels, size, workers
        self.small = dataset.decoded_bytes(config, channels) <= MAX_DECODED

    @property
    def bad(self) -> Mapping[int, str]:
        return self.dataset.bad

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(self, start: int) -> Iterator[Tensor]:
        if self.small:
            return iter(self.decoded[start:].split(self._size))
        return self.dataset.batches(self._config, self._channels, size=self._size, start=start, workers=self._workers)

    def read_again(self, numbers: Iterable[int]) -> None:
        if numbers := sorted(numbers):
            self.dataset.decode(numbers, self._config, self._channels)

    @functools.cached_property
    def decoded(self) -> Tensor:
        """All of it, [N, C, S, S] uint8."""
        return self.dataset.decode_all(self._config, self._channels, workers=self._workers)


class Splits:
    """The labelled training and test split.

    Raises:
        ValueError: no such split, images without label, one class alone, or test classes that training lacks.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        from bigbigan.data.workers import default_workers

        self.train = _open_labelled(arguments.data, arguments.train_split)
        self.test = _open_labelled(arguments.data, arguments.test_split)
        check_classes(self.train.labels, arguments.data, arguments.train_split)
        if self.train.digest == self.test.digest:
            raise ValueError(
                f"{arguments.data}: {arguments.train_split} and {arguments.test_split} are the same images; name two "
                "parts of them, as --train-split 'train[:50000]' --test-split 'train[50000:]'"
            )
        align_classes(self.test, self.train)
        known = set(self.train.labels.tolist())
        if unseen := sorted(set(self.test.labels.tolist()) - known):
            names = dict(enumerate(self.test.class_names))
            raise ValueError(
                f"{arguments.data}: {arguments.test_split} has labels that {arguments.train_split} lacks: "
                f"{[names.get(label, label) for label in unseen[:10]]}; choose other splits, or leave these images out"
            )
        self._size, self._workers = arguments.batch_size, arguments.workers or default_workers()
        # A few: baselines share the model's preprocessing, but no sum of all decoded images should fill the memory.
        self.images = functools.lru_cache(maxsize=4)(self._images)

    @property
    def files(self) -> list[Path]:
        """Those that hold an image each."""
        return [source for part in (self.train, self.test) for source in part.sources if isinstance(source, Path)]

    def _images(self, part: str, config: PreprocessConfig, channels: int) -> SplitImages:
        return SplitImages(getattr(self, part), config, channels, self._size, self._workers)


def align_classes(dataset: ImageDataset, other: ImageDataset) -> None:
    """Numbers the classes as `other` does, by their names, and others behind; numbers without names stay.

    Raises:
        ValueError: one split has names of its own and the other numbers, and no name is a number.
    """
    kinds = {dataset.naming, other.naming}
    if dataset.class_names == other.class_names or ("numbers" in kinds and "own" not in kinds):
        return
    import torch

    if "numbers" in kinds and not set(dataset.class_names) & set(other.class_names):
        raise ValueError(
            f"classes are {', '.join(other.class_names[:3])} in one split and {', '.join(dataset.class_names[:3])} in "
            "the other: give both splits the same kind of labels"
        )
    known = set(other.class_names)
    names = (*other.class_names, *(name for name in dataset.class_names if name not in known))
    place = {name: number for number, name in enumerate(names)}
    labelled = dataset.labels >= 0
    numbers = torch.tensor([place[name] for name in dataset.class_names], dtype=torch.int64)
    dataset.labels[labelled] = numbers[dataset.labels[labelled]]
    dataset.class_names = names


def _open_labelled(path: str, split: str) -> ImageDataset:
    from bigbigan.data.opening import open_dataset

    dataset = open_dataset(path, split=split)
    unlabelled = (dataset.labels < 0).nonzero().flatten().tolist()
    if unlabelled:
        raise ValueError(
            f"{path}: {len(unlabelled)} of {len(dataset)} images of {split} have no label, the first is "
            f"{dataset.name(unlabelled[0])}; give images in a folder a class, or rows with labels from 0"
        )
    return dataset


@dataclass
class Measured:
    """One representation, and its features on both splits, by output."""

    name: str
    digest: str
    train: dict[str, Rows]
    test: dict[str, Rows]
    representation: Representation | None = None  # of images; None for files
    derived: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=dict)  # BN+CReLU: of what, how
    own_accuracy: float | None = None  # of a network with a classifier of its own
    facts: dict[str, Any] = field(default_factory=dict)  # for each of its rows

    def features(self, images: Tensor, start: int) -> dict[str, Tensor]:
        """Of a batch in [-1, 1], whose first image has the number `start`, by the outputs of `train`."""
        assert self.representation is not None
        found = self.representation.features(images, start)
        return found | {name: function(found[output]) for name, (output, function) in self.derived.items()}


def measured(arguments: argparse.Namespace, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    """The model's features, then those of each --compare. All are opened before the first is computed."""
    from bigbigan.evaluation.representations import model_features

    specs: list[Spec] = [*arguments.compare, *([("untrained", ""), ("pixels", "")] if arguments.baselines else [])]
    own = model_features(model, arguments.features, batch_size=arguments.batch_size)
    opened = [_open(kind, rest, arguments, model, splits) for kind, rest in dict.fromkeys(specs)]
    first = _computed(own, arguments, splits)
    yield _with_crelu(first, "model") if arguments.crelu else first
    for (kind, _), rows in zip(dict.fromkeys(specs), opened, strict=True):
        for found in rows():
            yield _with_crelu(found, kind) if arguments.crelu else found


def _with_crelu(found: Measured, kind: str) -> Measured:
    """Of a model only avepool_feat has it: bn_crelu_feat is that already, by statistics of what it was trained on."""
    from bigbigan.evaluation.rows import fit_bn_crelu, mapped

    model = kind in ("model", "untrained")
    for output in [name for name in found.train if not model or name == "avepool_feat"]:
        function, name = fit_bn_crelu(found.train[output]), f"{output}, BN+CReLU"
        found.derived[name] = output, function
        for rows in (found.train, found.test):
            rows[name] = mapped(rows[output], function)
    return found


def _computed(
    representation: Representation, arguments: argparse.Namespace, splits: Splits, own_accuracy: float | None = None
) -> Measured:
    from bigbigan.evaluation.cache import compute_features

    train, test = (
        compute_features(
            representation,
            splits.images(part, representation.preprocess, representation.channels),
            cache=arguments.feature_cache,
            progress=not arguments.quiet,
        )
        for part in ("train", "test")
    )
    return Measured(representation.name, representation.digest, train, test, representation, own_accuracy=own_accuracy)


def _open(
    kind: str, rest: str, arguments: argparse.Namespace, model: BigBiGAN, splits: Splits
) -> Callable[[], Iterator[Measured]]:
    """What computes the rows of a SPEC, once everything that it names is found."""
    from bigbigan import factory
    from bigbigan.evaluation.adapters import huggingface_features, timm_features
    from bigbigan.evaluation.linear_probe import check_width
    from bigbigan.evaluation.report import images_seen
    from bigbigan.evaluation.representations import check_components, model_features, pixels

    config, channels = model.config.preprocess, model.config.image_channels
    if kind == "file":
        if getattr(arguments, "probe", None) == "paper" and arguments.augment != "none":
            raise ValueError(f"file:{rest} has features only, and no images to augment; add --augment none")
        found = _files(rest, arguments, splits)
        return lambda: iter([found])
    if kind == "pca":
        check_components(int(rest), len(splits.train), channels * config.resolution**2)
    if kind == "supervised":
        for dataset in (splits.train, splits.test):
            dataset.check_decoded_bytes(config, channels)
    if kind in ("untrained", "pca", "supervised"):
        make = {"untrained": _untrained, "pca": _pca, "supervised": _supervised}[kind]
        return lambda: make(rest, arguments, model, splits)
    device, facts = choose_device(arguments.device), dict[str, Any]()
    if kind == "pixels":
        if getattr(arguments, "probe", None) == "logistic":  # else hours might be lost before it is noticed
            check_width(len(splits.train), channels * config.resolution**2)
        representation = pixels(config, channels)
    elif kind == "timm":
        representation = timm_features(rest, device=device)
    elif kind == "hf":
        name, _, pooling = rest.partition(":")
        name, _, revision = name.partition("@")
        representation = huggingface_features(
            name, pooling=pooling or "pooled", revision=revision or None, device=device
        )
    else:
        other = factory.load(rest, parts=("encoder",), device=device)
        representation = model_features(other, arguments.features, name=rest, batch_size=arguments.batch_size)
        facts = {"images_seen": seen} if (seen := images_seen(other)) else {}
    return lambda: iter([replace(_computed(representation, arguments, splits), facts=facts)])


def _files(rest: str, arguments: argparse.Namespace, splits: Splits) -> Measured:
    from bigbigan.commands.pairing import row_order
    from bigbigan.evaluation.feature_files import feature_names, file_digest, read_features
    from bigbigan.evaluation.rows import select

    paths = rest.split(",")

    def read(path: str, part: ImageDataset) -> dict[str, Rows]:
        features = read_features(path, rows=len(part), prefer=arguments.features)
        order = row_order(part, feature_names(path), path)
        return features if order is None else {name: select(rows, order) for name, rows in features.items()}

    train, test = (read(path, part) for path, part in zip(paths, (splits.train, splits.test), strict=True))
    wanted = [name for name in arguments.features if name in train] or list(train)
    for name in wanted:
        if name not in test or test[name].shape[1] != train[name].shape[1]:
            there = f"{test[name].shape[1]} wide" if name in test else "absent"
            raise ValueError(f"{name} is {train[name].shape[1]} wide in {paths[0]} and {there} in {paths[1]}; "
                             "give files of the same features")  # fmt: skip
    return Measured(
        f"file:{paths[0]}",
        file_digest(*paths),
        {name: train[name] for name in wanted},
        {name: test[name] for name in wanted},
    )


def _untrained(_: str, arguments: argparse.Namespace, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    from bigbigan import create_model
    from bigbigan.config import MLPEncoderConfig
    from bigbigan.data.batches import Images
    from bigbigan.evaluation.representations import model_features
    from bigbigan.layers import Initializer
    from bigbigan.training.export import standing_statistics

    mlp = isinstance(model.config.encoder, MLPEncoderConfig)  # BiGAN on MNIST begins as its authors' does
    initializer: Initializer = "normal" if mlp else "orthogonal"
    untrained = create_model(model.config, parts=("encoder",), seed=arguments.seed, initializer=initializer)
    for statistics in ("initial", "estimated"):
        if statistics == "estimated":
            config, channels = model.config.preprocess, model.config.image_channels
            images = splits.images("train", config, channels)
            standing_statistics(  # as export does, on the CPU
                untrained.cpu(),
                images.decoded
                if images.small
                else Images(splits.train, config, channels, in_memory=False, workers=arguments.workers),
                STANDING_PASSES,
                STANDING_BATCH,
            )
        name = f"untrained encoder, {statistics} statistics"
        options = {"name": name, "batch_size": arguments.batch_size}
        yield _computed(model_features(untrained.to(model.device), arguments.features, **options), arguments, splits)


def _pca(components: str, arguments: argparse.Namespace, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    from bigbigan.evaluation.representations import principal_components

    config, channels = model.config.preprocess, model.config.image_channels
    images = splits.images("train", config, channels)
    yield _computed(
        principal_components(images.batches(0), int(components), config, channels, data_digest=images.digest),
        arguments,
        splits,
    )


def _supervised(epochs: str, arguments: argparse.Namespace, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    from torch import nn

    from bigbigan.evaluation.reconstruction import classifier_accuracy, train_classifier
    from bigbigan.evaluation.representations import module_features

    config, channels = model.config.preprocess, model.config.image_channels
    train, test = (splits.images(part, config, channels).decoded for part in ("train", "test"))
    number = int(epochs or 8)
    classifier = train_classifier(
        train.to(model.device),
        splits.train.labels,
        num_classes=int(splits.train.labels.max()) + 1,
        epochs=number,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    trunk = nn.Sequential(*list(classifier)[:-1])
    half = (0.5,) * channels
    features = module_features(
        trunk, config, mean=half, std=half, name=f"supervised network, {number} epochs", output="last hidden layer"
    )
    yield _computed(features, arguments, splits, classifier_accuracy(classifier, test, splits.test.labels))
