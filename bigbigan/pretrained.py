"""Networks that can be loaded on their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from bigbigan import hub, modelfolder
from bigbigan.arrays import as_dtype
from bigbigan.config import select_parts
from bigbigan.integrity import check_finite

Network = TypeVar("Network", bound="Pretrained")


class Pretrained:
    """Mixin of the networks that are the part `part` of a model and are built from a `config_class`."""

    part: ClassVar[str]
    config_class: ClassVar[type]
    fuse_network: ClassVar[Callable[[Any], Any]]  # set by `bigbigan.fused`, which knows the networks

    @classmethod
    def from_pretrained(
        cls: type[Network],
        name: str | os.PathLike[str] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        fuse: bool = False,
        mmap: bool = True,
        **options: Any,
    ) -> Network:
        """This part of a model alone, in eval mode; `name` and all options as for `bigbigan.load`.

        Raises:
            ValueError: the model has a network of another kind there, or none.
            FileNotFoundError, DownloadError, ConfigError, WeightsError: as `bigbigan.load`.
        """
        place = hub.locate(name, parts=(cls.part,), **options)
        described = modelfolder.read_config(place.folder)
        select_parts((cls.part,), described.files, place.folder)
        config = getattr(described.config, cls.part)
        if not isinstance(config, cls.config_class):
            kind = type(config).__name__.removesuffix("Config")
            raise ValueError(f"the {cls.part} of this model is of class {kind}: call {kind}.from_pretrained, or load")
        with torch.device("meta"):
            network = cls.build(config, place.folder)
        assert isinstance(network, nn.Module)
        modelfolder.check_part(place.folder, cls.part, modelfolder.shapes_of(network.state_dict()), described.config)
        if place.verify:
            modelfolder.verify_part(place.folder, cls.part, described.files[cls.part], remember=place.remember)
        # Fusing replaces weights one by one: those of a mapped file would all stay in memory until the last.
        fill(network, place.folder, cls.part, device=device, dtype=dtype, mmap=mmap and not fuse)
        network.eval()
        return cls.fuse_network(network) if fuse else network

    @classmethod
    def build(cls: type[Network], config: Any, folder: Path) -> Network:
        """The network of a model folder, without its weights."""
        return cls(config)  # type: ignore[call-arg]


def fill(
    network: nn.Module,
    folder: Path,
    part: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype | str | None,
    mmap: bool,
) -> None:
    """Gives a network that was built on the meta device the weights of a part in a model folder, which fit it.

    Raises:
        WeightsError: a weight is beyond the range of float16, if `dtype` is that.
        ValueError: `dtype` is not a floating one.
    """
    dtype = as_dtype(dtype)
    network.load_state_dict(modelfolder.read_state(folder, part, mmap=mmap), strict=True, assign=True)
    network.to(device=device, dtype=dtype)
    if dtype == torch.float16:  # its range ends at 65504
        for name, tensor in network.state_dict().items():
            check_finite(tensor, f"{name} as float16 (use torch.bfloat16)", folder / modelfolder.weight_file(part))
