"""The one error of this package, and the one place where TensorFlow is imported."""

from __future__ import annotations

import os
from types import ModuleType


class ConversionError(ValueError):
    """A source that cannot be converted; nothing was written."""


class DamagedModule(ConversionError):
    """A module whose files are damaged or do not belong together: none of its networks can be trusted."""


def tensorflow() -> ModuleType:
    """The TensorFlow module.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("reading a module needs TensorFlow: pip install 'bigbigan[convert]'") from error
    return tf
