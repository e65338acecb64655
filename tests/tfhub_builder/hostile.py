"""Wrong and malicious modules, made from a good one.

`HOSTILE[name](good)` writes beside the folder `good` (built from `variants.PLAIN`) and returns the hostile folder or
archive. `marker(path)` is the file that an executed payload would create, `secret(path)` one that it would read; `pack`
makes a good archive.

Not here: two variables of one shape swapped in the bundle. Nothing in the file tells it from another training run.
"""

from __future__ import annotations

from . import archives, damaged, operations
from .archives import pack
from .registry import HOSTILE, Hostile, marker, secret

__all__ = ["HOSTILE", "Hostile", "archives", "damaged", "marker", "operations", "pack", "secret"]
