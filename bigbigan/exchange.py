"""A folder takes the place of another, so that a kill loses neither."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from bigbigan.files import sync

logger = logging.getLogger(__name__)


def previous_of(folder: Path) -> Path:
    """Where the folder that is replaced lies in the meantime."""
    return folder.with_name(f".{folder.name}.previous")


def put(staging: Path, folder: Path) -> None:
    """Renames `staging` to `folder`. What was there keeps the name `.NAME.previous` between the two renames."""
    if folder.exists():
        shutil.copymode(folder, staging)
    else:
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp makes 0700; a user expects the usual mode
    sync(staging)
    previous = previous_of(folder)
    replaced = folder.exists()
    if replaced:
        os.rename(folder, previous)
    try:
        os.rename(staging, folder)
        sync(folder.parent)
    except BaseException:  # an interrupt too must not leave the old model aside
        if folder.exists():
            os.rename(folder, staging)
        if replaced:
            os.rename(previous, folder)
        raise
    if replaced:
        try:
            shutil.rmtree(previous)
        except OSError as error:  # the save itself is done; the next one tries again
            logger.warning("%s could not be removed: %s", previous, error)
