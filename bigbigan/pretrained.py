"""Networks that can be loaded on their own."""

from __future__ import annotations

import os
from typing import Any, ClassVar, TypeVar

Network = TypeVar("Network", bound="Pretrained")


class Pretrained:
    """Mixin of the networks that are the part `part` of a model."""

    part: ClassVar[str]

    @classmethod
    def from_pretrained(cls: type[Network], name: str | os.PathLike[str] | None = None, **options: Any) -> Network:
        """This part of a model alone; `name` and options as for `bigbigan.load`.

        Raises:
            ValueError: the model has a network of another kind there.
        """
        from bigbigan.hub import load

        network = load(name, parts=(cls.part,), **options).part(cls.part)
        if not isinstance(network, cls):
            kind = type(network).__name__
            raise ValueError(f"the {cls.part} of this model is no {cls.__name__}: call {kind}.from_pretrained, or load")
        return network
