"""Hostile .pth files. `python -m tests.attacks.hostile_pth` imports each, in a child process as a user's import does.

Each payload would create `marker`. `--batch FOLDER` instead reads all of them in one process, where an audit hook
watches, and prints the answers as JSON.
"""

from __future__ import annotations

import argparse
import builtins
import collections
import functools
import importlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Maker = Callable[[Path, Path], None]
HOSTILE: dict[str, Maker] = {}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: object):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def hostile(make: Maker) -> Maker:
    HOSTILE[make.__name__] = make
    return make


def saved(name: str, value: Callable[[str], object], legacy: bool = False) -> None:
    """A case that is `{"w": value(marker)}`, saved by torch."""

    def make(path: Path, marker: Path) -> None:
        torch.save({"w": value(str(marker))}, path, _use_new_zipfile_serialization=not legacy)

    HOSTILE[name] = make


def zipped(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, *, compressed: bool = False) -> None:
    """The zip that torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """A dictionary of one tensor on the record data/0, as pickle."""

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"

    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + integers((numel,))[1:-1] + b"tQ"
    )
    arguments = b"(" + storage + b"K\0" + integers(size) + integers(stride) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"Rs."


CODE = "open({!r}, 'w').close()"
saved("os_system", lambda m: Call(os.system, f"touch {m}"))
saved("eval", lambda m: Call(builtins.eval, CODE.format(m)))
saved("exec", lambda m: Call(builtins.exec, CODE.format(m)))
saved("open_for_writing", lambda m: Call(open, m, "w"))
saved("popen", lambda m: Call(subprocess.Popen, ["touch", m]))
saved("getattr_chain", lambda m: Call(getattr, Call(importlib.import_module, "os"), "mkdir"))
saved("partial", lambda m: Call(functools.partial(os.mkdir, m)))
saved("numpy_objects", lambda m: np.array([Call(os.mkdir, m)], dtype=object))
saved("load_from_bytes", lambda m: Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, m))))
saved("nested_load", lambda m: Call(torch.load, m))
saved("mapped_file", lambda m: Call(torch.from_file, m, True, 16))
saved("hub", lambda m: Call(torch.hub.download_url_to_file, "http://127.0.0.1:9/", m))
saved("hooks_of_a_parameter", lambda m: Call(torch._utils._rebuild_parameter, torch.zeros(1), True, Call(os.mkdir, m)))
saved("key_of_a_dict", lambda m: collections.OrderedDict([(Call(os.mkdir, m), 1)]))
saved("legacy_code", lambda m: Call(os.mkdir, m), legacy=True)
saved("complex", lambda m: torch.zeros(3, dtype=torch.complex64))
saved("sparse", lambda m: torch.eye(3).to_sparse())
saved("stride_bomb", lambda m: torch.zeros(1).expand(10**6, 10**6))
saved("no_tensor", lambda m: {"w": torch.zeros(1)})


@hostile
def plain_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Call(os.mkdir, str(marker)), protocol=2))


@hostile
def dotted_global(path: Path, marker: Path) -> None:
    """An allowed module, then a path through it."""
    zipped(path, b"\x80\x02ctorch\nserialization.os.mkdir\n" + text(str(marker)) + b"\x85R.")


@hostile
def state_of_an_allowed_class(path: Path, marker: Path) -> None:
    call = b"cos\nmkdir\n" + text(str(marker)) + b"\x85R"
    zipped(path, b"\x80\x02ccollections\nOrderedDict\n)R}" + text("__setstate__") + call + b"sb.")


@hostile
def strange_storage(path: Path, marker: Path) -> None:
    call = b"cos\nmkdir\n" + text(str(marker)) + b"\x85R"
    zipped(path, b"\x80\x02(" + text("storage") + call + text("0") + text("cpu") + b"K\x01tQ.", {"data/0": bytes(4)})


@hostile
def storage_outside(path: Path, marker: Path) -> None:
    zipped(path, tensor(1, (1,), (1,), key=f"../../..{marker}"), {"data/0": bytes(4)})


@hostile
def huge_storage(path: Path, marker: Path) -> None:
    zipped(path, tensor(2**40, (2**40,), (1,)), {"data/0": bytes(64)})


@hostile
def view_beyond_storage(path: Path, marker: Path) -> None:
    zipped(path, tensor(4, (1000,), (1,)), {"data/0": bytes(16)})


@hostile
def deep_nesting(path: Path, marker: Path) -> None:
    zipped(path, b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".")


@hostile
def long_memo(path: Path, marker: Path) -> None:
    zipped(path, b"\x80\x02]r\xff\xff\xff\xff" + b"U\xff" * 1000 + b".")


@hostile
def zip_bomb(path: Path, marker: Path) -> None:
    zipped(path, tensor(2**26, (2**26,), (1,)), {"data/0": bytes(2**28)}, compressed=True)


@hostile
def zip_path_outside(path: Path, marker: Path) -> None:
    zipped(path, tensor(1, (1,), (1,)), {f"../../../../../../..{marker}": b"x"})


@hostile
def torchscript(path: Path, marker: Path) -> None:
    code = pickle.dumps(Call(os.mkdir, str(marker)), 2)
    zipped(path, pickle.dumps({}, 2), {"constants.pkl": code, "code/a.py": b"x"})


@hostile
def legacy_tar(path: Path, marker: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(Call(os.mkdir, str(marker)), 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@hostile
def truncated(path: Path, marker: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


@hostile
def flipped_number(path: Path, marker: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)["w"].any()


@hostile
def wrong_magic(path: Path, marker: Path) -> None:
    torch.save({"w": torch.zeros(8)}, path)
    path.write_bytes(b"PK\x03\x05" + path.read_bytes()[4:])


@hostile
def empty(path: Path, marker: Path) -> None:
    path.write_bytes(b"")


@hostile
def safetensors_inside(path: Path, marker: Path) -> None:
    save_file({"w": torch.zeros(8)}, path)


@hostile
def web_page(path: Path, marker: Path) -> None:
    path.write_bytes(b"\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


@hostile
def git_lfs_pointer(path: Path, marker: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214\nsize 12345\n")


def make(name: str, folder: Path) -> tuple[Path, Path]:
    """The file of a case, and the marker it would leave."""
    path, marker = folder / f"{name}.pth", folder / f"{name}_marker"
    HOSTILE[name](path, marker)
    return path, marker


def batch(folder: Path) -> dict[str, str]:
    """What the reading process answers to each, or what it did besides."""
    from weights_conversion.biggan_pth import _child

    from .watch import Watch

    answers, out, temporary = {}, folder / "out", folder / "temporary"
    out.mkdir()
    temporary.mkdir()
    tempfile.tempdir = str(temporary)  # torch unpacks one old format there before it refuses it
    for name in HOSTILE:
        path, marker = make(name, folder)
        target = out / f"{name}.safetensors"
        with Watch(reads=[path], writes=[out, temporary]) as seen:
            try:
                _child(str(path), str(target))
                answers[name] = "READ"
            except SystemExit as error:
                answers[name] = str(error)
            except BaseException as error:
                answers[name] = f"RAISED {type(error).__name__}: {error}"
        if seen.events or marker.exists() or target.exists():
            answers[name] = f"DID {seen.events} {marker.exists()} {target.exists()}"
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.hostile_pth", description=__doc__)
    parser.add_argument("--batch", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    if args.batch:
        print(json.dumps(batch(args.batch)))
        return 0
    from weights_conversion.biggan_pth import read_checkpoint
    from weights_conversion.errors import ConversionError

    bad = 0
    with tempfile.TemporaryDirectory() as temporary:
        for name in HOSTILE:
            path, marker = make(name, Path(temporary))
            try:
                read_checkpoint(path)
                answer, wrong = "READ", True
            except ConversionError as error:
                answer, wrong = str(error).replace(f"{path} ", ""), marker.exists()
            print(f"{'BAD ' * wrong}{name}: {answer}")
            bad += wrong
    print(f"{len(HOSTILE)} files, {bad} of them read or run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
