"""`evaluate generation`: how near generated images are to real ones."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigbigan.commands.image_sets import BATCH, ImageSet, dataset_images, generated_images, given_images
from bigbigan.commands.options import (
    Commands,
    add_command,
    add_model_options,
    add_output,
    choose_device,
    open_model,
    positive,
    set_threads,
)
from bigbigan.commands.records import DATA, ENDING, add_record_option, add_workers_option, make_record, print_record
from bigbigan.commands.sample_record import preprocessing_of
from bigbigan.outputs import STATISTICS

if TYPE_CHECKING:
    from bigbigan.data.dataset import ImageDataset
    from bigbigan.evaluation.feature_networks import FeatureNetwork
    from bigbigan.evaluation.generation import Features, FeatureStatistics
    from bigbigan.model import BigBiGAN

logger = logging.getLogger(__name__)


def add_generation(protocols: Commands) -> None:
    parser = add_command(
        protocols,
        "generation",
        _generation,
        "FID, KID and Inception Score of samples, or the same in another network\n\n"
        "Samples are drawn by --model, or come from --samples: a folder, Parquet, or uint8 [N, S, S, C] in .npz or\n"
        ".npy, from any generator. Reference images are read as --model reads them, and pooled to its samples' size;\n"
        "beside --samples without --model, as the model of `bigbigan generate -o FOLDER/` reads them; of other\n"
        "samples their largest centre square is scaled to the size of the samples, which a warning says.\n\n"
        "Networks: inception   torch-fidelity's; only its figures are FID, KID and Inception Score\n"
        "          model:NAME  avepool_feat of a model's encoder; no classes, so no classifier score\n"
        "          FILE.py:F   the FeatureNetwork that F() returns; this runs FILE.py, as `python FILE.py` would\n"
        + DATA,
        "Example: bigbigan evaluate generation --data data/fashion_mnist --split train --json fid.json\n"
        "         bigbigan evaluate generation --samples vq/ --statistics train.npz --json vq.json\n" + ENDING,
    )
    source = parser.add_argument_group("samples")
    source.add_argument("--samples", metavar="PATH", help="images of another generator, in place of the model's")
    source.add_argument(
        "-n", "--number", type=positive, metavar="N", help="samples (default: 50000 of a model, all of --samples)"
    )
    source.add_argument("--seed", type=int, default=0, help="of latents, subsets and splits (default: %(default)s)")
    source.add_argument("--truncation", type=float, metavar="T", help="as in `bigbigan generate` (default: none)")
    source.add_argument(
        "--truncation-mode", choices=("resample", "scale"), default="resample", help="(default: %(default)s)"
    )
    reference = parser.add_argument_group("reference")
    reference.add_argument("--data", metavar="PATH", help="real images; needed unless --statistics has them")
    reference.add_argument("--split", default="train", help="(default: %(default)s); train[:10000] is a part of it")
    reference.add_argument("--statistics", metavar="FILE", help="mean and covariance from --save-statistics; no KID")
    add_output(
        reference,
        "--save-statistics",
        kind=STATISTICS,
        metavar="FILE",
        help="those of the reference: .npz or .safetensors",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument("--network", default="inception", metavar="NETWORK", help="(default: %(default)s)")
    scores.add_argument(
        "--kid-subsets", type=int, default=100, metavar="N", help="0 leaves the kernel distance out (default: 100)"
    )
    scores.add_argument("--kid-subset-size", type=positive, default=1000, metavar="N", help="(default: %(default)s)")
    scores.add_argument(
        "--splits", type=positive, default=10, metavar="N", help="of the classifier score (default: 10)"
    )
    parser.add_argument("--batch-size", type=positive, default=BATCH, metavar="N", help="(default: %(default)s)")
    add_workers_option(parser)
    add_record_option(parser)
    add_model_options(parser)


def _generation(arguments: argparse.Namespace) -> int:
    from bigbigan.evaluation.generation import (
        FeatureStatistics,
        check_libraries,
        check_statistics_path,
        collect_features,
    )

    check_libraries()
    if bool(arguments.data) == bool(arguments.statistics):
        raise ValueError("give the reference as --data or as --statistics, one of them")
    if arguments.statistics and arguments.save_statistics:
        raise ValueError("--save-statistics needs --data: those of --statistics are in a file already")
    if arguments.save_statistics:
        check_statistics_path(Path(arguments.save_statistics))
    samples, model = _samples(arguments)
    network = _network(arguments)
    _check_number("samples", samples.count, arguments)
    with_kernel = arguments.kid_subsets > 0 and not arguments.statistics
    keep = arguments.kid_subsets * arguments.kid_subset_size if with_kernel else 0
    options: dict[str, Any] = {"keep": keep, "seed": arguments.seed, "progress": not arguments.quiet}
    reference: Features | None = None
    dataset: ImageDataset | None = None
    prepared = "as the statistics say"
    if arguments.statistics:
        statistics = FeatureStatistics.load(Path(arguments.statistics), network)
        if samples.side != (side := statistics.images.get("resolution", samples.side)):
            logger.warning("samples have %d pixels, the images of %s %d", samples.side, arguments.statistics, side)
    else:
        dataset, images, prepared = _reference(arguments, samples, model)
        _check_number("reference images", images.count, arguments)
        reference = collect_features(images.batches(), images.count, network, images=images.facts, **options)
        statistics = reference.statistics
        if arguments.save_statistics:
            statistics.save(Path(arguments.save_statistics))
    features = collect_features(samples.batches(), samples.count, network, logits=True, **options)
    row = {
        **_origin(arguments, model, samples),
        **_figures(arguments, features, reference, statistics),
    }
    subsets = f"{arguments.kid_subsets} subsets of {arguments.kid_subset_size}"
    protocol = {
        "name": "generation",
        "resolution": samples.side,
        "channels": samples.channels,
        "num_samples": samples.count,  # few samples are far from any reference
        "network": network.name,
        "network_digest": network.digest,
        "input": f"uint8 images; {network.reads}",
        "reference": {**statistics.images, "images": statistics.count},
        "kernel": f"(x.y / D + 1)^3, {subsets}" if arguments.kid_subsets > 0 else None,
        "splits": arguments.splits,
        "seed": arguments.seed,
    }
    facts = {"digest": statistics.images.get("digest"), "images": statistics.count}
    record = make_record(None if arguments.samples else model, protocol, results=[row], reference=dataset or facts)
    record["data"]["reference"]["preprocessing"] = prepared  # not in the protocol: it tells which may be compared
    shown = [(key, value) for key, value in (row | protocol).items() if key != "name" and not key.endswith("_digest")]
    shown.append(("reference images", prepared))
    print_record(arguments, ("Measure", "Value"), [(key, _text(value)) for key, value in shown], record)
    return 0


def _origin(arguments: argparse.Namespace, model: BigBiGAN | None, samples: ImageSet) -> dict[str, str]:
    """Where the samples are from."""
    if arguments.samples:
        return {"samples": Path(arguments.samples).name, "samples_digest": samples.facts["digest"]}
    truncation, mode = arguments.truncation, arguments.truncation_mode
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


def _samples(arguments: argparse.Namespace) -> tuple[ImageSet, BigBiGAN | None]:
    """The samples, and the model that draws them or reads the reference."""
    set_threads(arguments)
    if arguments.samples:
        if arguments.truncation is not None:
            raise ValueError("--truncation is of the model's latents, and --samples are drawn already")
        model = open_model(arguments, ("generator",)) if arguments.model and arguments.data else None
        return given_images(arguments.samples, arguments.number, arguments.seed), model
    model = open_model(arguments, ("generator",))
    return generated_images(model, arguments, arguments.number or 50_000), model


def _network(arguments: argparse.Namespace) -> FeatureNetwork:
    from bigbigan.evaluation.feature_networks import FeatureNetwork, encoder_network, inception_network

    name: str = arguments.network
    if name == "inception":
        return inception_network(choose_device(arguments.device))
    if name.startswith("model:"):
        from bigbigan import factory

        device = choose_device(arguments.device)
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
    import runpy
    import sys

    before = list(sys.path)
    sys.path.insert(0, str(Path(script).absolute().parent))
    try:
        return runpy.run_path(script).get(function, lambda: None)()
    except (Exception, SystemExit) as error:  # a stranger's code
        raise ValueError(f"--network: {function}() of {script} failed: {type(error).__name__}: {error}") from error
    finally:
        sys.path[:] = before  # the script may have put folders of its own first


def _reference(
    arguments: argparse.Namespace, samples: ImageSet, model: BigBiGAN | None
) -> tuple[ImageDataset, ImageSet, str]:
    """The data set, its images as they are compared, and how they are prepared in words."""
    from dataclasses import replace

    from bigbigan.data.opening import open_dataset
    from bigbigan.data.workers import default_workers
    from bigbigan.schema import to_dict

    dataset = open_dataset(arguments.data, split=arguments.split)
    if model:
        preprocess, why = model.config.preprocess, f"as {model.info.name or 'the model'} reads them"
    else:
        preprocess, why = preprocessing_of(arguments.samples, samples.side)
    workers = arguments.workers or default_workers()
    images = dataset_images(dataset, preprocess, samples.channels, samples.side, workers=workers)
    facts = {"split": arguments.split, "digest": dataset.digest, **to_dict(preprocess), "resolution": samples.side}
    if (factor := preprocess.resolution // samples.side) > 1:
        facts["pooling"] = f"mean of {factor} x {factor} pixels"
    return dataset, replace(images, facts=facts), why


def _check_number(what: str, number: int, arguments: argparse.Namespace) -> None:
    """Before hours of work what would end in an error after them."""
    from bigbigan.evaluation.generation import check_splits

    if number < 2:
        raise ValueError(f"{number} of {what} has no covariance; give at least 2")
    if arguments.kid_subsets > 0 and not arguments.statistics and number < arguments.kid_subset_size:
        raise ValueError(
            f"the kernel distance takes subsets of {arguments.kid_subset_size}, and there are {number} {what}; "
            "lower --kid-subset-size, or leave it out with --kid-subsets 0"
        )
    if what == "samples" and not arguments.network.startswith("model:"):  # which has no classes
        check_splits(number, arguments.splits)


def _figures(
    arguments: argparse.Namespace, samples: Features, reference: Features | None, statistics: FeatureStatistics
) -> dict[str, float | None]:
    from bigbigan.evaluation.generation import classifier_score, figure_names, frechet_distance, kernel_distance

    names = figure_names(statistics.network)
    figures: dict[str, float | None] = {names["frechet"]: frechet_distance(samples.statistics, statistics)}

    def add(name: str, values: tuple[float, float | None]) -> None:
        figures[name], figures[f"{name}, std"] = values

    if reference is not None and arguments.kid_subsets > 0:
        options = {"subsets": arguments.kid_subsets, "subset_size": arguments.kid_subset_size, "seed": arguments.seed}
        add(names["kernel"], kernel_distance(samples.rows, reference.rows, **options))
    if samples.logits is not None:
        add(names["classifier"], classifier_score(samples.logits, splits=arguments.splits, seed=arguments.seed))
    return figures
