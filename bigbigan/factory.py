"""Models by name: loaded, with random weights, as a list, and the one-call reconstruction."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigbigan import hub, modelfolder
from bigbigan.arrays import as_dtype, seeded
from bigbigan.config import BigBiGANConfig, ModelInfo, select_parts
from bigbigan.fused import fuse as fuse_part
from bigbigan.graph import Graph, read_graph
from bigbigan.images import ImageLike
from bigbigan.layers import Initializer, initialize
from bigbigan.model import BigBiGAN
from bigbigan.presets import PRESETS, get_preset, normalize
from bigbigan.pretrained import fill


def create_model(
    name: str | BigBiGANConfig,
    *,
    parts: Sequence[str] | None = None,
    seed: int = 0,
    initializer: Initializer = "orthogonal",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> BigBiGAN:
    """A preset's architecture (or a configuration's) with random weights, in evaluation mode.

    Weights are BigGAN's initialisation (orthogonal), or with "normal" that of BiGAN's authors (N(0, 0.02), scores 0),
    drawn from `seed`; batch-norm statistics are mean 0, variance 1.

    Raises:
        ValueError: unknown name, initializer or dtype, or a part that the architecture lacks.
    """
    if isinstance(name, BigBiGANConfig):
        config, info = name, ModelInfo(source="random weights")
    else:
        config, info = get_preset(name).config, ModelInfo(normalize(name), source="random weights")
    with torch.device("meta"):
        model = BigBiGAN(config, parts, info)
    model.to_empty(device="cpu")
    for part in model.parts:  # each part from the seed alone, so that it does not depend on which others are made
        initialize(getattr(model, part), seeded(seed), initializer)
    return model.to(device, as_dtype(dtype)).eval()


def load(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    parts: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    fuse: bool = False,
    mmap: bool = True,
) -> BigBiGAN:
    """A model in eval mode; without a name the one inside the package.

    `name` is, in this order: a folder with a model, the embedded model's name, a preset's (a local conversion, else a
    repository), or "org/name" on the Hugging Face Hub, also "org/name@revision". `dtype` is torch's or a text such as
    "float16"; by default weights keep their files' dtype. `cache_dir`, `token` and `local_files_only` go to the Hub's
    client, which has settings of its own besides (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN). With `fuse` the
    model is in its fused form (`BigBiGAN.fuse`). Weights are memory-mapped unless `mmap` is false: do not change files
    in place while a model from them is in use.

    Raises:
        ValueError: for a name that means nothing, or a part that the model lacks.
        FileNotFoundError: for a folder that does not exist, or a preset that is nowhere to be had.
        DownloadError: if the Hub does not give a file.
        ConfigError, WeightsError: if what is there is damaged or not a model.
    """
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    place = hub.locate(name, local_files_only=local_files_only, parts=parts, **options)
    form: dict[str, Any] = {"device": device, "dtype": dtype, "fuse": fuse, "mmap": mmap}
    return load_folder(place.folder, parts=parts, verify=place.verify, remember=place.remember, **form)


def load_folder(
    folder: str | os.PathLike[str],
    *,
    parts: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    remember: bool = True,
    fuse: bool = False,
    mmap: bool = True,
) -> BigBiGAN:
    """The model in a folder, in eval mode; with `fuse`, in the form of `BigBiGAN.fuse`.

    Every load compares the files' headers with the architecture before it allocates anything; `verify` checks digests
    and finite values as well, once a file (`remember=False`: each time, without a record in `integrity.cache_dir()`).
    Weights keep the files' dtype unless `dtype` is given. They are memory-mapped: a file that is changed in place
    changes the model, and one that is cut ends the process; `mmap=False` copies them into memory instead.

    Raises:
        FileNotFoundError, ConfigError: as `modelfolder.read_config`.
        WeightsError: if a weight file is missing, damaged, or not one for this architecture.
        ValueError: for a part that the folder does not have, or a dtype that is not a floating one.
    """
    dtype, folder = as_dtype(dtype), Path(folder)
    described = modelfolder.read_config(folder)
    wanted = select_parts(parts, described.files, folder)
    graphs = read_graphs(folder, wanted, described.config)
    with torch.device("meta"):
        model = BigBiGAN(described.config, wanted, described.info, graphs)
    for part in wanted:
        modelfolder.check_part(folder, part, modelfolder.shapes_of(model.part(part).state_dict()), described.config)
    if verify:
        for part in wanted:
            modelfolder.verify_part(folder, part, described.files[part], remember=remember)
    for part in wanted:
        # Fusing replaces weights one by one: those of a mapped file would all stay in memory until the last.
        fill(model.part(part), folder, part, device=device, dtype=dtype, mmap=mmap and not fuse)
        if fuse:
            fuse_part(model.part(part).eval())
    return model.eval()


def read_graphs(folder: Path, parts: Iterable[str], config: BigBiGANConfig) -> dict[str, Graph]:
    """The graphs of those parts of a model folder that are in graph form.

    Raises:
        ConfigError: as `bigbigan.graph.read_graph`.
    """
    return {part: read_graph(folder, part, getattr(config, part)) for part in modelfolder.graph_parts(config, parts)}


def list_models(pattern: str = "*", *, pretrained: bool | None = None) -> list[str]:
    """Names of presets that match a shell pattern; with `pretrained`, those whose weights are (not) at hand here."""
    names = fnmatch.filter(PRESETS, normalize(pattern))
    return [name for name in names if pretrained is None or hub.has_weights(name) == pretrained]


def reconstruct(
    images: ImageLike | Sequence[ImageLike], *, model: str | BigBiGAN | None = None, **options: Any
) -> Tensor:
    """G(E(x)) of images, [N, C, S, S] in [-1, 1], by a model or one that `load` finds; see `BigBiGAN.reconstruct`."""
    loaded = model if isinstance(model, BigBiGAN) else load(model, parts=("generator", "encoder"))
    return loaded.reconstruct(images, **options)
