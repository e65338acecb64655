"""Writes genuine TF1-format hub module folders with TensorFlow: see README.md in this folder.

Importing the package needs no TensorFlow; `module` and `hostile` do.
"""

from __future__ import annotations

from .spec import (
    DiscriminatorSpec,
    EncoderSpec,
    GeneratorSpec,
    MLPSpec,
    ModuleSpec,
    Signature,
    Style,
    documented_signatures,
)

__all__ = [
    "DiscriminatorSpec",
    "EncoderSpec",
    "GeneratorSpec",
    "MLPSpec",
    "ModuleSpec",
    "Signature",
    "Style",
    "documented_signatures",
]
