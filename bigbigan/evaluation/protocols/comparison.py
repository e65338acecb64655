"""What the probes measure: labelled splits, and the features of every representation that is compared on them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigbigan import factory
from bigbigan.config import MLPEncoderConfig, PreprocessConfig
from bigbigan.data.batches import Images
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.opening import open_dataset
from bigbigan.data.workers import default_workers
from bigbigan.evaluation.adapters import huggingface_features, timm_features
from bigbigan.evaluation.cache import compute_features
from bigbigan.evaluation.feature_files import feature_names, file_digest, read_features
from bigbigan.evaluation.linear_probe import check_width
from bigbigan.evaluation.pairing import row_order
from bigbigan.evaluation.protocols.evaluation import Data, Evaluation, tabulated
from bigbigan.evaluation.reconstruction import classifier_accuracy, train_classifier
from bigbigan.evaluation.report import images_seen
from bigbigan.evaluation.representations import (
    Representation,
    check_components,
    model_features,
    module_features,
    pixels,
    principal_components,
)
from bigbigan.evaluation.rows import Rows, fit_bn_crelu, mapped, select
from bigbigan.evaluation.standing import standing_statistics
from bigbigan.layers import Initializer
from bigbigan.model import BigBiGAN
from bigbigan.schema import to_dict

STANDING_PASSES, STANDING_BATCH = 100, 64  # as in the training recipes
MAX_DECODED = 1 << 30  # bytes of a split's decoded images that are kept; larger ones are decoded again when asked for

LabelledData = str | Path | tuple[ImageDataset, ImageDataset]
Spec = tuple[str, str]


def parse_spec(text: str) -> Spec:
    """Kind and argument of a text of `compare`, such as "pca:64".

    Raises:
        ValueError: a malformed one.
    """
    kind, _, rest = text.partition(":")
    if text in ("pixels", "untrained", "supervised"):
        return text, ""
    if kind in ("pca", "supervised"):
        if not rest.isdecimal() or int(rest) < 1:
            raise ValueError(f"{text!r}: give a number, as {kind}:{8 if kind == 'supervised' else 64}")
        return kind, rest
    if kind in ("timm", "hf", "file"):
        if not rest or (kind == "file" and len(rest.split(",")) != 2):
            raise ValueError(f"{text!r}: give timm:NAME, hf:ORG/NAME or file:TRAIN,TEST")
        return kind, rest
    return "model", text


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
    """The labelled training and test split: of the data at a path, or a pair of opened data sets.

    Raises:
        ValueError: no such split, images without label, a single class, or test classes that training lacks.
    """

    def __init__(
        self, data: LabelledData, train_split: str, test_split: str, *, batch_size: int, workers: int | None
    ) -> None:
        where = "the data" if isinstance(data, tuple) else str(data)
        self.train = _labelled(data[0] if isinstance(data, tuple) else data, train_split)
        self.test = _labelled(data[1] if isinstance(data, tuple) else data, test_split)
        if len(self.train.labels.unique()) < 2:
            raise ValueError(
                f"{where}: all {len(self.train)} images of {train_split} have the one label "
                f"{int(self.train.labels[0])}; give images of two classes or more"
            )
        if self.train.digest == self.test.digest:
            raise ValueError(
                f"{where}: {train_split} and {test_split} are the same images; name two "
                "parts of them, as --train-split 'train[:50000]' --test-split 'train[50000:]'"
            )
        align_classes(self.test, self.train)
        known = set(self.train.labels.tolist())
        if unseen := sorted(set(self.test.labels.tolist()) - known):
            names = dict(enumerate(self.test.class_names))
            raise ValueError(
                f"{where}: {test_split} has labels that {train_split} lacks: "
                f"{[names.get(label, label) for label in unseen[:10]]}; choose other splits, or leave these images out"
            )
        self._size, self._workers = batch_size, workers or default_workers()
        # A few: baselines share the model's preprocessing, but no sum of all decoded images should fill the memory.
        self.images = functools.lru_cache(maxsize=4)(self._images)

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


def _labelled(data: Data, split: str) -> ImageDataset:
    """A data set by its path, or a copy of an opened one, whose labels may be numbered anew."""
    if isinstance(data, ImageDataset):
        dataset, where = copy.copy(data), "the data"
        dataset.labels = data.labels.clone()
    else:
        dataset, where = open_dataset(data, split=split), str(data)
    unlabelled = (dataset.labels < 0).nonzero().flatten().tolist()
    if unlabelled:
        raise ValueError(
            f"{where}: {len(unlabelled)} of {len(dataset)} images of {split} have no label, the first is "
            f"{dataset.name(unlabelled[0])}; give images in a folder a class, or rows with labels from 0"
        )
    return dataset


@dataclass(frozen=True)
class Settings:
    """How features are computed and what is compared; see `evaluate_linear`."""

    features: Sequence[str]
    compare: Sequence[str]
    crelu: bool
    cache: str | Path | None
    batch_size: int
    workers: int | None
    device: str | torch.device
    seed: int
    progress: bool
    augmented: bool = False  # the probe needs images, not features alone
    whole: bool = False  # the probe reads all features into memory


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


def measured(settings: Settings, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    """The model's features, then those of each comparison. All are opened before the first is computed."""
    specs = dict.fromkeys(map(parse_spec, settings.compare))
    own = model_features(model, settings.features, batch_size=settings.batch_size)
    opened = [_open(kind, rest, settings, model, splits) for kind, rest in specs]
    first = _computed(own, settings, splits)
    yield _with_crelu(first, "model") if settings.crelu else first
    for (kind, _), rows in zip(specs, opened, strict=True):
        for found in rows():
            yield _with_crelu(found, kind) if settings.crelu else found


def _with_crelu(found: Measured, kind: str) -> Measured:
    """Of a model only avepool_feat has it: bn_crelu_feat is that already, by statistics of what it was trained on."""
    model = kind in ("model", "untrained")
    for output in [name for name in found.train if not model or name == "avepool_feat"]:
        function, name = fit_bn_crelu(found.train[output]), f"{output}, BN+CReLU"
        found.derived[name] = output, function
        for rows in (found.train, found.test):
            rows[name] = mapped(rows[output], function)
    return found


def _computed(
    representation: Representation, settings: Settings, splits: Splits, own_accuracy: float | None = None
) -> Measured:
    train, test = (
        compute_features(
            representation,
            splits.images(part, representation.preprocess, representation.channels),
            cache=settings.cache,
            progress=settings.progress,
        )
        for part in ("train", "test")
    )
    return Measured(representation.name, representation.digest, train, test, representation, own_accuracy=own_accuracy)


def _open(
    kind: str, rest: str, settings: Settings, model: BigBiGAN, splits: Splits
) -> Callable[[], Iterator[Measured]]:
    """What computes the features of a comparison, once everything that it names is found."""
    config, channels = model.config.preprocess, model.config.image_channels
    if kind == "file":
        if settings.augmented:
            raise ValueError(f"file:{rest} has features only, and no images to augment; add --augment none")
        found = _files(rest, settings, splits)
        return lambda: iter([found])
    if kind == "pca":
        check_components(int(rest), len(splits.train), channels * config.resolution**2)
    if kind == "supervised":
        for dataset in (splits.train, splits.test):
            dataset.check_decoded_bytes(config, channels)
    if kind in ("untrained", "pca", "supervised"):
        make = {"untrained": _untrained, "pca": _pca, "supervised": _supervised}[kind]
        return lambda: make(rest, settings, model, splits)
    device, facts = settings.device, dict[str, Any]()
    if kind == "pixels":
        if settings.whole:  # before the features are computed, not hours later
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
        representation = model_features(other, settings.features, name=rest, batch_size=settings.batch_size)
        facts = {"images_seen": seen} if (seen := images_seen(other)) else {}
    return lambda: iter([replace(_computed(representation, settings, splits), facts=facts)])


def _files(rest: str, settings: Settings, splits: Splits) -> Measured:
    paths = rest.split(",")

    def read(path: str, part: ImageDataset) -> dict[str, Rows]:
        features = read_features(path, rows=len(part), prefer=settings.features)
        order = row_order(part, feature_names(path), path)
        return features if order is None else {name: select(rows, order) for name, rows in features.items()}

    train, test = (read(path, part) for path, part in zip(paths, (splits.train, splits.test), strict=True))
    wanted = [name for name in settings.features if name in train] or list(train)
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


def _untrained(_: str, settings: Settings, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    mlp = isinstance(model.config.encoder, MLPEncoderConfig)  # BiGAN on MNIST begins as its authors' does
    initializer: Initializer = "normal" if mlp else "orthogonal"
    untrained = factory.create_model(model.config, parts=("encoder",), seed=settings.seed, initializer=initializer)
    for statistics in ("initial", "estimated"):
        if statistics == "estimated":
            config, channels = model.config.preprocess, model.config.image_channels
            images = splits.images("train", config, channels)
            standing_statistics(  # as export does, on the CPU
                untrained.cpu(),
                images.decoded
                if images.small
                else Images(splits.train, config, channels, in_memory=False, workers=settings.workers),
                STANDING_PASSES,
                STANDING_BATCH,
            )
        name = f"untrained encoder, {statistics} statistics"
        options: dict[str, Any] = {"name": name, "batch_size": settings.batch_size}
        yield _computed(model_features(untrained.to(model.device), settings.features, **options), settings, splits)


def _pca(components: str, settings: Settings, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    config, channels = model.config.preprocess, model.config.image_channels
    images = splits.images("train", config, channels)
    yield _computed(
        principal_components(images.batches(0), int(components), config, channels, data_digest=images.digest),
        settings,
        splits,
    )


def _supervised(epochs: str, settings: Settings, model: BigBiGAN, splits: Splits) -> Iterator[Measured]:
    config, channels = model.config.preprocess, model.config.image_channels
    train, test = (splits.images(part, config, channels).decoded for part in ("train", "test"))
    number = int(epochs or 8)
    classifier = train_classifier(
        train.to(model.device),
        splits.train.labels,
        num_classes=int(splits.train.labels.max()) + 1,
        epochs=number,
        seed=settings.seed,
        progress=settings.progress,
    )
    trunk = nn.Sequential(*list(classifier)[:-1])
    half = (0.5,) * channels
    features = module_features(
        trunk, config, mean=half, std=half, name=f"supervised network, {number} epochs", output="last hidden layer"
    )
    yield _computed(features, settings, splits, classifier_accuracy(classifier, test, splits.test.labels))


def own_accuracy(one: Measured, **more: Any) -> list[dict[str, Any]]:
    """The row of a network that has a classifier of its own."""
    if one.own_accuracy is None:
        return []
    width = next(iter(one.train.values())).shape[1]
    what = {"representation": one.name, "feature": "its own classifier", "num_features": width}
    return [{**what, **more, "accuracy": one.own_accuracy}]


def summary(
    model: BigBiGAN,
    protocol: Mapping[str, Any],
    splits: Splits,
    results: Sequence[Mapping[str, Any]],
    found: Sequence[Measured],
) -> Evaluation:
    """The `Evaluation` of a probe, whose record also has digest and preprocessing of each representation."""
    evaluation = tabulated(model, protocol, results, {"train": splits.train, "test": splits.test})
    evaluation.record["representations"] = {  # not in the protocol, which decides what records may be compared
        one.name: {
            "digest": one.digest,
            "preprocess": None if one.representation is None else to_dict(one.representation.preprocess),
        }
        for one in found
    }
    return evaluation
