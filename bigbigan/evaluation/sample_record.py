"""What `generate` notes beside the pictures of a folder: how their model reads images, for `evaluate`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from bigbigan.config import PreprocessConfig
from bigbigan.files import atomic_write
from bigbigan.model import BigBiGAN
from bigbigan.outputs import SAMPLES, check_output
from bigbigan.schema import from_dict, to_dict

NAME = ".bigbigan-samples.json"  # hidden: it is no picture
FORMAT = "bigbigan-samples/1"

logger = logging.getLogger(__name__)


def write_record(folder: Path, model: BigBiGAN) -> None:
    """
    Raises:
        OutputError: another file has that name.
    """
    check_output(folder / NAME, SAMPLES)
    document = {"format": FORMAT, "model": model.info.name, "preprocess": to_dict(model.config.preprocess)}
    with atomic_write(folder / NAME) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def preprocessing_of(samples: str, side: int) -> tuple[PreprocessConfig, str]:
    """How real images are prepared beside pictures of this side, and why so, in words.

    Without a record in their folder, the largest centre square is scaled to their size, and a warning says so.

    Raises:
        ValueError: a record that is damaged.
    """
    path = Path(samples) / NAME
    if path.is_file():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"its format is {str(document['format'])[:80]!r}, not {FORMAT!r}")
            preprocess = from_dict(PreprocessConfig, document["preprocess"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no record of `bigbigan generate` ({error}): delete it, or name --model"
            ) from error
        if preprocess.resolution == side:
            return preprocess, f"as {document.get('model') or 'the model'} reads them, noted beside the pictures"
    logger.warning(
        "without --model, real images are their largest centre square, scaled to %d pixels: where the model behind %s "
        "pads or crops otherwise, distances are too large. Name it with --model",
        *(side, samples),
    )
    return PreprocessConfig(side), f"assumed: the largest centre square, scaled to {side} pixels"
