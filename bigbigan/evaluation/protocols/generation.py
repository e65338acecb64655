"""Scores of generated images against real ones: `evaluate_generation`."""

from __future__ import annotations

import logging
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from bigbigan import factory
from bigbigan.data.dataset import ImageDataset
from bigbigan.data.workers import default_workers
from bigbigan.evaluation.feature_networks import FeatureNetwork, encoder_network, inception_network
from bigbigan.evaluation.generation import (
    Features,
    FeatureStatistics,
    check_libraries,
    check_splits,
    check_statistics_path,
    classifier_score,
    collect_features,
    figure_names,
    frechet_distance,
    kernel_distance,
)
from bigbigan.evaluation.protocols.evaluation import Data, Evaluation, ModelLike, opened_data, opened_model, tabulated
from bigbigan.evaluation.protocols.image_sets import BATCH, ImageSet, dataset_images, generated_images, given_images
from bigbigan.evaluation.sample_record import preprocessing_of
from bigbigan.model import BigBiGAN
from bigbigan.schema import to_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settings:
    """See `evaluate_generation`."""

    samples: str | None
    number: int | None
    truncation: float | None
    truncation_mode: str
    data: Data | None
    split: str
    statistics: str | Path | None
    network: str | FeatureNetwork
    kid_subsets: int
    kid_subset_size: int
    score_splits: int
    batch_size: int
    workers: int | None
    seed: int


def evaluate_generation(
    data: Data | None = None,
    model: ModelLike = None,
    *,
    revision: str | None = None,
    samples: str | Path | None = None,
    number: int | None = None,
    truncation: float | None = None,
    truncation_mode: Literal["resample", "scale"] = "resample",
    split: str = "train",
    statistics: str | Path | None = None,
    save_statistics: str | Path | None = None,
    network: str | FeatureNetwork = "inception",
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    score_splits: int = 10,
    seed: int = 0,
    batch_size: int = BATCH,
    workers: int | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> Evaluation:
    """Fréchet distance, kernel distance and classifier score, as `bigbigan evaluate generation` measures them.

    Args:
        data: real images: a path, as `open_training_data` takes it, or an opened data set. Give this or `statistics`.
        model: draws the samples: a model, or what `load` takes; None is the model inside the package. With `samples`
            it only says how real images are preprocessed, and None is no model.
        revision: commit, tag or branch, of a model on the Hugging Face Hub.
        samples: images of any generator: a folder, Parquet, or uint8 [N, S, S, C] in `.npz` or `.npy`.
        number: samples; default 50,000 of a model, all of `samples`.
        truncation, truncation_mode: as in `BigBiGAN.sample_latents`.
        split: of `data`, read from a path only; "train[:10000]" is a part.
        statistics: a file that `save_statistics` wrote, in place of `data`; without the kernel distance.
        save_statistics: `.npz` or `.safetensors`, written with mean and covariance of the real images.
        network: "inception", "model:NAME", "FILE.py:FUNCTION" (which runs that file) or a `FeatureNetwork`.
        kid_subsets, kid_subset_size: of the kernel distance; 0 subsets leave it out.
        score_splits: parts of the samples that the classifier score is averaged over.
        seed: decides latents, subsets and splits.
        batch_size: images drawn at a time.
        workers: processes that decode images; default by the number of cores.
        device: for models and networks that are loaded here.
        progress: show bars on a terminal's stderr.

    Raises:
        ValueError: settings, images or statistics that do not fit; checked before anything is drawn, as far as they
            can be.
        FileNotFoundError, DownloadError: no such model.
        ImportError: a package for the scores or the network is missing.
    """
    check_libraries()
    if (data is None) == (statistics is None):
        raise ValueError("give the reference as --data or as --statistics, one of them")
    if statistics is not None and save_statistics is not None:
        raise ValueError("--save-statistics needs --data: those of --statistics are in a file already")
    if save_statistics is not None:
        check_statistics_path(Path(save_statistics))
    settings = _Settings(
        samples=None if samples is None else str(samples),
        number=number,
        truncation=truncation,
        truncation_mode=truncation_mode,
        data=data,
        split=split,
        statistics=statistics,
        network=network,
        kid_subsets=kid_subsets,
        kid_subset_size=kid_subset_size,
        score_splits=score_splits,
        batch_size=batch_size,
        workers=workers,
        seed=seed,
    )
    drawn, drawer = _samples(settings, model, revision, device)
    judge = _network(network, device)
    _check_number("samples", drawn.count, settings)
    keep = kid_subsets * kid_subset_size if kid_subsets > 0 and statistics is None else 0
    options: dict[str, Any] = {"keep": keep, "seed": seed, "progress": progress}
    real: Features | None = None
    dataset: ImageDataset | None = None
    prepared = "as the statistics say"
    if statistics is not None:
        reference = FeatureStatistics.load(Path(statistics), judge)
        if drawn.side != (side := reference.images.get("resolution", drawn.side)):
            logger.warning("samples have %d pixels, the images of %s %d", drawn.side, statistics, side)
    else:
        dataset, images, prepared = _reference(settings, drawn, drawer)
        _check_number("reference images", images.count, settings)
        real = collect_features(images.batches(), images.count, judge, images=images.facts, **options)
        reference = real.statistics
        if save_statistics is not None:
            reference.save(Path(save_statistics))
    features = collect_features(drawn.batches(), drawn.count, judge, logits=True, **options)
    row = {**_origin(settings, drawer, drawn), **_figures(settings, features, real, reference)}
    protocol = _protocol(settings, drawn, judge, reference)
    facts = {"digest": reference.images.get("digest"), "images": reference.count}
    record = tabulated(None if samples else drawer, protocol, [row], {"reference": dataset or facts}).record
    record["data"]["reference"]["preprocessing"] = prepared  # not in the protocol, which decides what may be compared
    shown = [(key, value) for key, value in (row | protocol).items() if key != "name" and not key.endswith("_digest")]
    shown.append(("reference images", prepared))
    return Evaluation(record, ("Measure", "Value"), [(key, _text(value)) for key, value in shown])


def _protocol(
    settings: _Settings, samples: ImageSet, network: FeatureNetwork, reference: FeatureStatistics
) -> dict[str, Any]:
    subsets = f"{settings.kid_subsets} subsets of {settings.kid_subset_size}"
    return {
        "name": "generation",
        "resolution": samples.side,
        "channels": samples.channels,
        "num_samples": samples.count,  # few samples are far from any reference
        "network": network.name,
        "network_digest": network.digest,
        "input": f"uint8 images; {network.reads}",
        "reference": {**reference.images, "images": reference.count},
        "kernel": f"(x.y / D + 1)^3, {subsets}" if settings.kid_subsets > 0 else None,
        "splits": settings.score_splits,
        "seed": settings.seed,
    }


def _origin(settings: _Settings, model: BigBiGAN | None, samples: ImageSet) -> dict[str, str]:
    """Where the samples are from."""
    if settings.samples:
        return {"samples": Path(settings.samples).name, "samples_digest": samples.facts["digest"]}
    truncation, mode = settings.truncation, settings.truncation_mode
    return {
        "samples": (model and model.info.name) or "model",
        "truncation": "none" if truncation is None else f"{truncation:g}, {mode}",
        "weights": _weights(model),
    }


def _weights(model: BigBiGAN | None) -> str:
    """What the model folder says of its weights; those of others, and of untrained models, it does not know."""
    training = model.info.provenance.get("training") if model else None
    halflife = training.get("ema_halflife_images") if isinstance(training, dict) else None
    if halflife is None:
        return "as in the model folder"
    return ("EMA" if halflife else "of the last step, no EMA") + ", standing statistics"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items() if key != "digest")
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _samples(
    settings: _Settings, model: ModelLike, revision: str | None, device: str | torch.device
) -> tuple[ImageSet, BigBiGAN | None]:
    """The samples, and the model that draws them or reads the reference."""
    if settings.samples:
        if settings.truncation is not None:
            raise ValueError("--truncation is of the model's latents, and --samples are drawn already")
        reads = model is not None and settings.data is not None
        reader = opened_model(model, ("generator",), device=device, revision=revision) if reads else None
        return given_images(settings.samples, settings.number, settings.seed), reader
    drawer = opened_model(model, ("generator",), device=device, revision=revision)
    images = generated_images(
        drawer,
        settings.number or 50_000,
        seed=settings.seed,
        truncation=settings.truncation,
        truncation_mode=settings.truncation_mode,
        batch_size=settings.batch_size,
    )
    return images, drawer


def _network(name: str | FeatureNetwork, device: str | torch.device) -> FeatureNetwork:
    if isinstance(name, FeatureNetwork):
        return name
    if name == "inception":
        return inception_network(str(device))
    if name.startswith("model:"):
        return encoder_network(factory.load(name.removeprefix("model:"), parts=("encoder",), device=device))
    script, _, function = name.partition(".py:")
    if not function:
        raise ValueError(f"--network is {name!r}; give inception, model:NAME or FILE.py:FUNCTION")
    if not Path(script + ".py").is_file():
        raise ValueError(f"--network: there is no file {script}.py")
    made = _call(script + ".py", function)
    if not isinstance(made, FeatureNetwork):
        raise ValueError(f"--network: {function}() of {script}.py gives {type(made).__name__}, not a FeatureNetwork")
    return made


def _call(script: str, function: str) -> Any:
    """What a function of a script gives, with its folder first where modules are looked for, as `python` has it."""
    before = list(sys.path)
    sys.path.insert(0, str(Path(script).absolute().parent))
    try:
        return runpy.run_path(script).get(function, lambda: None)()
    except (Exception, SystemExit) as error:  # a stranger's code
        raise ValueError(f"--network: {function}() of {script} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before  # the script may have put folders of its own first


def _reference(settings: _Settings, samples: ImageSet, model: BigBiGAN | None) -> tuple[ImageDataset, ImageSet, str]:
    """The data set, its images as they are compared, and how they are prepared in words."""
    assert settings.data is not None
    dataset = opened_data(settings.data, settings.split)
    if model:
        preprocess, why = model.config.preprocess, f"as {model.info.name or 'the model'} reads them"
    else:
        assert settings.samples is not None  # else a model draws them
        preprocess, why = preprocessing_of(settings.samples, samples.side)
    workers = settings.workers or default_workers()
    images = dataset_images(dataset, preprocess, samples.channels, samples.side, workers=workers)
    facts = {"split": settings.split, "digest": dataset.digest, **to_dict(preprocess), "resolution": samples.side}
    if (factor := preprocess.resolution // samples.side) > 1:
        facts["pooling"] = f"mean of {factor} x {factor} pixels"
    return dataset, replace(images, facts=facts), why


def _check_number(what: str, number: int, settings: _Settings) -> None:
    """Refuses too few images before the work, not after it."""
    if number < 2:
        raise ValueError(f"{number} of {what} has no covariance; give at least 2")
    if settings.kid_subsets > 0 and settings.statistics is None and number < settings.kid_subset_size:
        raise ValueError(
            f"the kernel distance takes subsets of {settings.kid_subset_size}, and there are {number} {what}; "
            "lower --kid-subset-size, or leave it out with --kid-subsets 0"
        )
    network = settings.network
    if what == "samples" and isinstance(network, str) and not network.startswith("model:"):  # which has no classes
        check_splits(number, settings.score_splits)


def _figures(
    settings: _Settings, samples: Features, reference: Features | None, statistics: FeatureStatistics
) -> dict[str, float | None]:
    names = figure_names(statistics.network)
    figures: dict[str, float | None] = {names["frechet"]: frechet_distance(samples.statistics, statistics)}

    def add(name: str, values: tuple[float, float | None]) -> None:
        figures[name], figures[f"{name}, std"] = values

    if reference is not None and settings.kid_subsets > 0:
        options = {"subsets": settings.kid_subsets, "subset_size": settings.kid_subset_size, "seed": settings.seed}
        add(names["kernel"], kernel_distance(samples.rows, reference.rows, **options))
    if samples.logits is not None:
        add(names["classifier"], classifier_score(samples.logits, splits=settings.score_splits, seed=settings.seed))
    return figures
