"""`recipes`, `train`, `export`: from images to a model folder."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import zip_longest
from operator import getitem
from pathlib import Path
from textwrap import wrap
from typing import Any

from torch import OutOfMemoryError
from torch.distributed.elastic.multiprocessing.errors import record

from bigbigan import factory
from bigbigan.commands.options import (
    Commands,
    add_command,
    add_run_options,
    choose_device,
    columns_text,
    not_negative,
    set_threads,
)
from bigbigan.data.opening import open_training_data
from bigbigan.modelfolder import read_config
from bigbigan.presets import close_names, normalize
from bigbigan.schema import ConfigError, from_dict, to_dict
from bigbigan.training.config import TrainConfig
from bigbigan.training.cost import estimate
from bigbigan.training.distributed import PeerError
from bigbigan.training.loop import TrainingStopped, train
from bigbigan.training.recipes import RECIPES, sources
from bigbigan.training.runfolder import find_snapshots, has_checkpoint, read_run_config
from bigbigan.training.tensorboard import require_tensorboard

logger = logging.getLogger(__name__)


def add_parsers(commands: Commands) -> None:
    _add_recipes(commands)
    _add_train(commands)
    _add_export(commands)


def _add_recipes(commands: Commands) -> None:
    parser = add_command(
        commands,
        "recipes",
        _recipes,
        "With a name: that recipe as JSON, whose fields `train --set` takes.",
        "Example: bigbigan recipes bigbigan-resnet50 --sources\nExit codes: 0 done, 2 no such recipe.",
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="one of them")
    parser.add_argument(
        "--sources", action="store_true", help="where its values come from, and how certain that is, instead of JSON"
    )


def _add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        _train,
        "The run folder holds config.json (the whole configuration, as --dry-run prints it), metrics.jsonl,\n"
        "samples/ (pictures), snapshots/ (model folders) and checkpoints/. The same command resumes from the last\n"
        "checkpoint, bit for bit on a CPU; total_images, standing_passes, log_images, checkpoint_images,\n"
        "snapshot_images, probe_images and probe_l2 may change then. SIGTERM and ctrl-C finish the step and write a\n"
        "checkpoint first.\n\n"
        "Several processes: torchrun --nproc-per-node 8 -m bigbigan train … --run-folder FOLDER trains on all of them\n"
        "as one would with the same batch_size, which is that of all together; batch norm sees it whole. Where it\n"
        "does not fit, accumulate=K takes the mean gradient of K micro-batches. For networks without batch norm (D)\n"
        "that is the gradient of the batch; in G and E each micro-batch is normalised by itself, so it differs.",
        "Example: bigbigan train bigbigan-fashion-mnist-32 --data data/fashion_mnist --run runs/a --set lr_d=2e-4\n"
        "Exit codes: 0 done, 1 diverged, or the disk or another process failed, 2 wrong usage or data,\n"
        "130 interrupted, 143 terminated.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a name from `bigbigan recipes`")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="a folder of images (of folders, one a class), a .parquet file or a folder of train*.parquet (Hugging "
        "Face layout: image, label), or hf:NAME, a data set on the Hugging Face Hub. PATH?column=img&label=fine names "
        "other columns, label= leaves labels out, max_bad_fraction=0.01 lets more images be unreadable than 0.001",
    )
    parser.add_argument(
        "--split", default="train", metavar="SPLIT", help="of the data; train[:50000] is its first 50,000 images"
    )
    parser.add_argument(
        "--run", "--run-folder", metavar="FOLDER", dest="folder", help="where the run lives; torchrun knows a --run too"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="change a field; dots lead inside, values are JSON or else text: model.encoder.base_channels=48, "
        "augmentation.flip=true. May be repeated",
    )
    parser.add_argument(
        "--init",
        metavar="MODEL",
        help="start from this model (a folder, a name from `bigbigan list`, or org/name), whose networks replace the "
        "recipe's; the recipe gives everything else. Before the first step they compute exactly what the model does",
    )
    parser.add_argument(
        "--max-minutes", type=float, metavar="M", help="after M minutes write a checkpoint and a snapshot, and stop"
    )
    parser.add_argument(
        "--keep", type=int, default=2, metavar="N", help="newest checkpoints kept (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-snapshots", action="store_true", help="keep every snapshot, not the newest and the best alone"
    )
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="processes that decode images, for each training process (default: by cores)",
    )
    parser.add_argument(
        "--timeout-minutes",
        type=float,
        default=30.0,
        metavar="M",
        help="give up when another process has not answered for M minutes; snapshots may take longer (default: "
        "%(default)g)",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write FOLDER/tensorboard (pip install tensorboard)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration as JSON, and what a step takes in parameters, arithmetic and memory, and stop",
    )
    add_run_options(parser)


def _add_export(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export",
        _export,
        "Weights are the averaged ones, without spectral norm and with standing statistics, as `load` reads them.\n"
        "The folder says how they were trained, and is loaded and verified in the end.",
        "Example: bigbigan export runs/a -o my-model --license MIT --note data='Fashion-MNIST'\n"
        "Exit codes: 0 done, 2 wrong usage, or no such snapshot.",
    )
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the model folder to write")
    parser.add_argument(
        "--snapshot",
        default="best",
        metavar="best|last|IMAGES",
        help="by held-out linear accuracy, the newest, or by the number of images seen (default: %(default)s)",
    )
    parser.add_argument("--name", help="of the model (default: the recipe's)")
    parser.add_argument("--license", default="", help="of the weights, such as MIT (default: not stated)")
    parser.add_argument(
        "--note",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="notes",
        help="a fact for the model's provenance; the value is JSON or else text. May be repeated",
    )


def _recipe(name: str) -> TrainConfig:
    if normalize(name) in RECIPES:
        return RECIPES[normalize(name)]
    close = close_names(name, RECIPES)
    hint = f"did you mean {' or '.join(close)}?" if close else "`bigbigan recipes` lists them"
    raise ValueError(f"no recipe {name!r}; {hint}")


def _recipes(arguments: argparse.Namespace) -> int:
    if arguments.sources:
        if not arguments.recipe:
            raise ValueError("--sources needs the name of a recipe; `bigbigan recipes` lists them")
        recipe = _recipe(arguments.recipe)
        values = to_dict(recipe)
        order = _keys(values)
        rows: list[Sequence[str]] = []
        for s in sorted(sources(recipe.name), key=lambda s: order.index(s.fields[0])):
            shown = [_short(reduce(getitem, field.split("."), values)) for field in s.fields]
            lines = wrap(s.source, 40, break_on_hyphens=False)
            rows += zip_longest(s.fields, shown, [s.certainty], lines, fillvalue="")
        print(columns_text(("FIELD", "VALUE", "CERTAINTY", "SOURCE"), rows))
    elif arguments.recipe:
        print(json.dumps(to_dict(_recipe(arguments.recipe)), indent=2))
    else:
        rows = [[name, f"{r.total_images:,}", str(r.batch_size), r.precision] for name, r in RECIPES.items()]
        print(columns_text(("RECIPE", "IMAGES", "BATCH", "PRECISION"), rows))
    return 0


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else "…"


def apply_settings(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """`config` with each "dotted.key=value" set, checked by the same closed schema as a file.

    Raises:
        ConfigError: a malformed setting, an unknown key (close ones are named), or a value that does not fit.
    """
    data = to_dict(config)
    for setting in settings:
        key, value = _key_value(setting)
        *path, last = key.split(".")
        branch: Any = data
        for name in path:
            branch = branch.get(name) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or last not in branch:
            close = difflib.get_close_matches(key, _keys(data), n=3, cutoff=0.4)
            raise ConfigError(f"--set {setting}: no field {key!r}; {'close: ' + ', '.join(close) if close else ''}")
        branch[last] = value
    return from_dict(TrainConfig, data)


def _key_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def _keys(data: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in data.items():
        found += [prefix + name, *(_keys(value, f"{prefix}{name}.") if isinstance(value, dict) else ())]
    return found


def _train(arguments: argparse.Namespace) -> int:
    recipe, init = _recipe(arguments.recipe), None
    if arguments.init:
        init = factory.load(arguments.init, parts=None)
        networks = {part: getattr(init.config, part) for part in init.parts}
        recipe = replace(recipe, model=replace(recipe.model, preprocess=init.config.preprocess, **networks))
    config = apply_settings(recipe, arguments.settings)
    if not arguments.dry_run and not (arguments.data and arguments.folder):
        raise ValueError("training needs --data and --run (or --dry-run, to see the configuration alone)")
    is_main = os.environ.get("RANK", "0") == "0"
    set_threads(arguments)
    if arguments.dry_run and is_main:
        print(json.dumps(to_dict(config), indent=2), flush=True)
    if arguments.tensorboard:
        require_tensorboard()
    if not arguments.dry_run:  # what is wrong with these should not wait for the estimate
        device = choose_device(arguments.device)
        data = open_training_data(arguments.data, split=arguments.split)
    if is_main:
        logger.info("%s", "\n".join(_summary(config, recipe, arguments.folder) + estimate(config).lines(config)))
    if arguments.dry_run:
        try:
            choose_device(arguments.device)
        except ValueError as error:
            logger.warning("%s; there the run would not start", error)
        return 0
    # Under torchrun the error goes into its last message too.
    run = record(train) if "TORCHELASTIC_ERROR_FILE" in os.environ else train
    try:
        run(
            config,
            data,
            arguments.folder,
            device=device,
            max_minutes=arguments.max_minutes,
            keep=arguments.keep,
            keep_snapshots=arguments.keep_snapshots,
            workers=arguments.workers,
            timeout_minutes=arguments.timeout_minutes,
            init=init,
            tensorboard=arguments.tensorboard,
        )
    except TrainingStopped as stopped:
        print(f"bigbigan train: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except (FloatingPointError, OSError, PeerError, OutOfMemoryError) as error:
        if isinstance(error, OutOfMemoryError):
            logger.warning("the device's memory is full: --set accumulate=2 halves what a step takes")
        saved = has_checkpoint(Path(arguments.folder))
        stands = f"the last checkpoint in {arguments.folder} stands" if saved else "there is no checkpoint yet"
        print(f"bigbigan train: {error}; {stands}", file=sys.stderr)
        return 1
    return 0


def _summary(config: TrainConfig, recipe: TrainConfig, folder: str | None) -> list[str]:
    """What a person checks before hours of training; `config.json` has the rest."""
    networks = [config.model.generator, config.model.encoder]
    sides = ", ".join(f"{name} {part.resolution}" for name, part in zip("GE", networks, strict=True) if part)
    colour = {1: "grey", 3: "colour"}.get(config.model.image_channels, f"{config.model.image_channels} channels")
    before, now = (dict(_leaves(to_dict(of))) for of in (recipe, config))
    changes = ", ".join(f"{name}={json.dumps(value)}" for name, value in now.items() if before.get(name) != value)
    return [
        f"{config.name}: {sides} pixels, {colour}, {config.model.z_dim} latents, {config.precision}, "
        f"seed {config.seed}",
        f"changed from the recipe: {changes or 'nothing'}",
        f"training: {config.total_images:,} images in batches of {config.batch_size}; a log line every "
        f"{config.log_images:,}, a checkpoint every {config.checkpoint_images:,}, a snapshot every "
        f"{config.snapshot_images:,}",
        *([f"run folder: {folder}"] if folder else []),
    ]


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def find_snapshot(run: Path, which: str) -> Path:
    """The snapshot of a run folder that "best", "last" or a number of images means.

    Raises:
        ValueError: there is none.
    """
    found = find_snapshots(run)
    if not found:
        raise ValueError(f"{run} has no snapshots yet: resume it with --max-minutes 1, which ends with one")
    if which == "last":
        return found[-1]
    if which == "best":
        scores = {path: read_config(path).info.provenance["held_out"].get("linear_avepool_feat") for path in found}
        scored = [path for path in found if scores[path] is not None]
        if not scored:
            logger.warning("no snapshot has a held-out score, so the newest counts as the best")
            return found[-1]
        return max(scored, key=scores.__getitem__)  # the earliest of equals, as in training
    path = run / "snapshots" / f"images-{which:0>10}"
    if path not in found:
        there = ", ".join(path.name.removeprefix("images-").lstrip("0") for path in found)
        raise ValueError(f"{run} has no snapshot {which!r}; give best, last, or one of {there}")
    return path


def _export(arguments: argparse.Namespace) -> int:
    run, output = Path(arguments.folder), Path(arguments.output)
    training = to_dict(read_run_config(run))
    del training["model"]  # the folder has it as its architecture
    snapshot = find_snapshot(run, arguments.snapshot)
    own = [run.resolve() / name for name in ("checkpoints", "samples", "snapshots")]
    if any(output.resolve().is_relative_to(place) for place in own):
        raise ValueError(f"{output} is among the run's own files; name another folder")
    model = factory.load_folder(snapshot)
    data = json.loads((run / "config.json").read_text(encoding="utf-8"))["data"]
    notes = dict(_key_value(note) for note in arguments.notes)
    provenance = {**model.info.provenance, "training": training, "data": data, **notes}
    name = arguments.name or model.info.name
    model.info = replace(model.info, name=name, license=arguments.license, provenance=provenance)
    model.save(output)
    factory.load_folder(output)
    print(output)
    return 0
