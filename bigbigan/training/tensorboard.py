"""A run's figures and pictures for TensorBoard, beside `metrics.jsonl`, which has them all."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image


def require_tensorboard() -> None:
    """
    Raises:
        ImportError: tensorboard is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError("--tensorboard needs TensorBoard; install it: pip install tensorboard")


class TensorBoard:
    """Writes `run/tensorboard`, counted in images seen; what lies behind `num_images` there is hidden when it goes on.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, run: Path, num_images: int):
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=num_images)

    def scalars(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "num_images":
                self.writer.add_scalar(name, value, record["num_images"])

    def pictures(self, folder: Path, num_images: int) -> None:
        """The grids of a snapshot, `{what}-{num_images}.png`."""
        for path in sorted(folder.glob(f"*-{num_images:010d}.png")):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            name = path.name.rpartition("-")[0]
            self.writer.add_image(name, pixels, num_images, dataformats="HWC")

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.close()
