"""The registry of hostile modules and what their makers share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from .module import save_variables

Expect = Literal["refuse", "refuse_port", "not_run", "consistent"]
Maker = Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Hostile:
    """A maker of one hostile module.

    expect: "refuse": conversion must stop, or leave the network out. "refuse_port": a sound module that
    the match must give up in time; a graph network holds it. "not_run": the payload is off every data path; refusing
    and converting rightly are both sound, running it is not. "consistent": a sound module of unusual numbers.
    """

    name: str
    expect: Expect
    make: Maker

    def __call__(self, good: Path) -> Path:
        path = good.parent / f"hostile_{self.name}"
        secret(path).write_bytes(b"secret01")
        return self.make(good, path)


HOSTILE: dict[str, Hostile] = {}


def hostile(expect: Expect = "refuse") -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        HOSTILE[make.__name__] = Hostile(make.__name__, expect, make)
        return make

    return register


def marker(path: Path) -> Path:
    return path.parent / f"{path.name.split('.')[0]}_marker"


def secret(path: Path) -> Path:
    return path.parent / f"{path.name.split('.')[0]}_secret"


def copy(good: Path, path: Path) -> Path:
    return Path(shutil.copytree(good, path, symlinks=True))


def edit(good: Path, path: Path, change: Callable[[saved_model_pb2.SavedModel], None]) -> Path:
    copy(good, path)
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    change(saved)
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    return path


def edit_variables(good: Path, path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    copy(good, path)
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    values = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    change(values)
    shutil.rmtree(path / "variables")
    (path / "variables").mkdir()
    save_variables(path, values)
    return path


def edit_bytes(good: Path, path: Path, name: str, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    copy(good, path)
    (path / name).write_bytes(change(bytearray((path / name).read_bytes())))
    return path
