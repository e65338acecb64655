"""Features computed once: equal to those in memory, resumed after a kill, never larger in memory than a piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bigbigan import create_model
from bigbigan.config import PreprocessConfig
from bigbigan.evaluation import (
    Representation,
    StoredRows,
    TensorImages,
    cache,
    compute_features,
    function_features,
    model_features,
)

SMALL = PreprocessConfig(8)


def images(n: int = 50, side: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def counted(calls: list[int], *, stop_at: int = 10**9, digest: str = "a") -> Representation:
    """Means and maxima of channels, noting the images that come by, and failing at one of them."""

    def encode(x: Tensor, start: int) -> dict[str, Tensor]:
        if start >= stop_at:
            raise KeyboardInterrupt
        calls.append(len(x))
        return {"mean": x.mean((2, 3)), "max": x.amax((2, 3))}

    return Representation("counted", encode, ("mean", "max"), SMALL, 3, digest)


def test_what_is_cached_is_what_is_computed(tmp_path: Path) -> None:
    x, calls = images(), list[int]()
    source, found = TensorImages(x, batch_size=7), counted(calls)
    plain = compute_features(found, source)
    for expected_calls in (100, 100):  # the second time none are added
        stored = compute_features(found, source, cache=tmp_path)
        assert sum(calls) == expected_calls
        for output in ("mean", "max"):
            assert isinstance(stored[output], StoredRows)
            assert torch.equal(stored[output][:], plain[output])
            assert torch.equal(stored[output][torch.tensor([41, 3])], plain[output][torch.tensor([41, 3])])
    assert torch.equal(plain["mean"], means(x))
    (entry,) = tmp_path.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [
        "entry.json",
        "max.json",
        "max.npy",
        "mean.json",
        "mean.npy",
    ]


@pytest.mark.parametrize("cached", [False, True])
def test_a_source_that_ends_early_leaves_nothing_behind(tmp_path: Path, cached: bool) -> None:
    class Short(TensorImages):
        def batches(self, start: int) -> Iterator[Tensor]:
            return iter(self.images[start:30].split(7))

    folder, whole = tmp_path if cached else None, TensorImages(images())
    with pytest.raises(ValueError, match="30 of 50 images came"):
        compute_features(counted([]), Short(images()), cache=folder)
    assert torch.equal(compute_features(counted([]), whole, cache=folder)["mean"][:], means(images()))


def means(x: Tensor) -> Tensor:
    return (x.float() / 127.5 - 1).mean((2, 3))


def test_names_that_differ_in_signs_alone_are_kept_apart(tmp_path: Path) -> None:
    found = Representation("signs", lambda x, start: {"a b": x.mean((2, 3)), "a_b": x.amax((2, 3))}, ("a b", "a_b"),
                           SMALL, 3, "d" * 64)  # fmt: skip
    for _ in range(2):
        rows = compute_features(found, TensorImages(images()), cache=tmp_path)
        assert not torch.equal(rows["a b"][:], rows["a_b"][:])


def test_a_missing_output_is_added(tmp_path: Path) -> None:
    calls: list[int] = []
    source, found = TensorImages(images()), counted(calls)
    compute_features(replace(found, outputs=("mean",)), source, cache=tmp_path)
    rows = compute_features(found, source, cache=tmp_path)
    assert sum(calls) == 100 and len(list(tmp_path.iterdir())) == 1
    assert torch.equal(rows["max"][:], compute_features(found, source)["max"])


@pytest.mark.parametrize("change", ["weights", "images", "preprocessing", "channels", "number"])
def test_other_features_are_never_taken(tmp_path: Path, change: str) -> None:
    calls: list[int] = []
    found, x = counted(calls), images()
    compute_features(found, TensorImages(x), cache=tmp_path)
    if change == "weights":
        found = counted(calls, digest="b")
    if change == "images":
        x = x.clone()
        x[-1, -1, -1, -1] ^= 1
    if change == "preprocessing":
        found = replace(found, preprocess=PreprocessConfig(8, crop="none"))
    if change == "channels":
        found = replace(found, channels=1)
    if change == "number":
        x = x[:49]
    rows = compute_features(found, TensorImages(x), cache=tmp_path)
    assert sum(calls) == 50 + len(x)
    assert torch.equal(rows["mean"][:], compute_features(found, TensorImages(x))["mean"])


def test_model_digests_tell_weights_and_seeds_apart() -> None:
    model, other = (create_model("bigbigan-tiny", parts=("encoder",), seed=seed) for seed in (0, 1))
    one = model_features(model, ["avepool_feat"])
    assert one.digest == model_features(model, ["z_mean"], seed=3).digest != model_features(other, ["z_mean"]).digest
    assert model_features(model, ["z_sample"], seed=0).digest != model_features(model, ["z_sample"], seed=1).digest


@pytest.mark.parametrize("sizes", [(4, 4), (4, 7), (7, 3)])
def test_a_stopped_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int]) -> None:
    """Also with other batches, and with an output that is new."""
    monkeypatch.setattr(cache, "PIECE_ROWS", 8)
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        stopped = replace(counted(calls, stop_at=20), outputs=("mean",))
        compute_features(stopped, TensorImages(images(), batch_size=sizes[0]), cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    assert not (entry / "mean.npy").exists()
    done = json.loads((entry / "mean.json").read_text())["rows"]
    assert 8 <= done <= 20
    calls.clear()
    again = TensorImages(images(), batch_size=sizes[1])
    rows = compute_features(replace(counted(calls), outputs=("mean",)), again, cache=tmp_path)
    assert sum(calls) == 50 - done
    expected = compute_features(counted([]), again)
    assert torch.equal(rows["mean"][:], expected["mean"])
    rows = compute_features(counted(calls), again, cache=tmp_path)
    assert torch.equal(rows["max"][:], expected["max"]) and torch.equal(rows["mean"][:], expected["mean"])


def test_a_kill_between_the_last_row_and_the_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            cache._Store, "finish", lambda self, bad: (self._write(bad), (_ for _ in ()).throw(KeyboardInterrupt))
        )
        compute_features(counted([]), TensorImages(images()), cache=tmp_path)
    calls: list[int] = []
    rows = compute_features(replace(counted(calls), outputs=("mean",)), TensorImages(images()), cache=tmp_path)
    assert calls == [] and torch.equal(rows["mean"][:], compute_features(counted([]), TensorImages(images()))["mean"])


@pytest.mark.parametrize("size", [0, 60, 200])
def test_a_copy_of_a_folder_in_use_has_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """The file of rows was copied before the count of them was."""
    monkeypatch.setattr(cache, "PIECE_ROWS", 8)
    with pytest.raises(KeyboardInterrupt):
        compute_features(counted([], stop_at=30), TensorImages(images(), batch_size=4), cache=tmp_path)
    (partial,) = tmp_path.glob("*/mean.npy.partial")
    with open(partial, "r+b") as file:
        file.truncate(size)
    rows = compute_features(counted([]), TensorImages(images(), batch_size=4), cache=tmp_path)
    assert torch.equal(rows["mean"][:], means(images()))


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path) -> None:
    compute_features(counted([]), TensorImages(images()), cache=tmp_path)
    (facts,), (rows,) = tmp_path.glob("*/mean.json"), tmp_path.glob("*/max.npy")
    whole = rows.read_bytes()
    rows.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"max\.npy is damaged .*: delete it"):
        compute_features(counted([]), TensorImages(images()), cache=tmp_path)
    rows.write_bytes(whole)
    facts.write_text("")
    with pytest.raises(ValueError, match=r"mean\.json is damaged .*: delete the folder"):
        compute_features(counted([]), TensorImages(images()), cache=tmp_path)


def test_a_complete_cache_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_features(counted([]), TensorImages(images()), cache=tmp_path)
    monkeypatch.setattr(cache, "_locked", None)  # nor locked: its folder may be somebody else's
    assert torch.equal(
        compute_features(counted([]), TensorImages(images()), cache=tmp_path)["mean"][:], means(images())
    )


def test_what_another_process_finishes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this one waits for the lock: until then it looks into no file that is about to be renamed."""
    monkeypatch.setattr(cache, "PIECE_ROWS", 8)
    with pytest.raises(KeyboardInterrupt):
        compute_features(counted([], stop_at=20), TensorImages(images(), batch_size=4), cache=tmp_path)
    inner, calls = cache._locked, list[int]()

    def waits(folder: Path) -> object:
        monkeypatch.setattr(cache, "_locked", inner)
        monkeypatch.setattr(cache, "_rows_in", looks)
        compute_features(counted([]), TensorImages(images()), cache=tmp_path)
        return inner(folder)

    def too_early(path: Path) -> int:
        raise AssertionError(f"{path} is read without the lock")

    looks = cache._rows_in
    monkeypatch.setattr(cache, "_locked", waits)
    monkeypatch.setattr(cache, "_rows_in", too_early)
    rows = compute_features(counted(calls), TensorImages(images()), cache=tmp_path)
    assert calls == [] and torch.equal(rows["mean"][:], means(images()))


class Unreadable(TensorImages):
    """Image 3 cannot be read: the next one stands for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.met: dict[int, str] = {}

    @property
    def bad(self) -> Mapping[int, str]:
        return self.met

    def batches(self, start: int) -> Iterator[Tensor]:
        for batch in super().batches(start):
            self.read_again([3] if start <= 3 < start + len(batch) else [])
            yield batch
            start += len(batch)

    def read_again(self, numbers: Iterable[int]) -> None:
        self.met |= dict.fromkeys(numbers, "no picture")


def test_unreadable_images_are_met_again_where_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their labels and their number would depend on the cache, and on where a pass was stopped."""
    monkeypatch.setattr(cache, "PIECE_ROWS", 8)
    with pytest.raises(KeyboardInterrupt):
        compute_features(counted([], stop_at=20), Unreadable(images(), batch_size=4), cache=tmp_path)
    for _ in range(2):
        source = Unreadable(images(), batch_size=4)
        compute_features(counted([]), source, cache=tmp_path)
        assert source.met == {3: "no picture"}


def test_features_too_large_for_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"counted: features of 50 images take .* \(--feature-cache\)"):
        compute_features(counted([]), TensorImages(images()))
    assert len(compute_features(counted([]), TensorImages(images()), cache=tmp_path)["mean"]) == 50


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x, r"mine: features is \[50, 3, 8, 8\] for 50 images; expected \[50, D\]: pool or flatten"),
        (lambda x: x[:9].flatten(1), r"\[9, 192\] for 50 images"),
        (lambda x: x.flatten(1).log(), "mine: features of image 0 .* holds NaN or infinity; check the weights"),
    ],
)
def test_functions_that_give_no_features(function: object, message: str) -> None:
    representation = function_features(function, SMALL, 3, name="mine", digest="")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        compute_features(representation, TensorImages(images()))


CHILD = """
import resource, sys
import numpy as np, torch
from bigbigan.config import PreprocessConfig
from bigbigan.evaluation import Representation, compute_features, knn_accuracy, bn_crelu, paper_probe
from bigbigan.evaluation import cache, knn, rows
torch.set_num_threads(1)
knn.CHUNK = rows.CHUNK = cache.PIECE_ROWS = 512
number, width, folder = 25_000, 1536, sys.argv[1]  # 146 MiB of features, 293 MiB of images

class Drawn:
    digest, bad = "drawn", {}
    def __len__(self):
        return number
    def batches(self, start):
        for first in range(start, number, 250):
            labels = np.arange(first, first + 250) % 5
            draws = np.random.default_rng(first).integers(0, 200, (250, 3, 64, 64), np.uint8)
            yield torch.from_numpy(draws + (8 * labels).astype(np.uint8)[:, None, None, None])
    def read_again(self, numbers):
        assert not numbers

def encode(x, start):
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, 16).flatten(1)  # 768
    return {"features": torch.cat([pooled, pooled], 1)}

torch.zeros(256, 1024) @ torch.zeros(1024, 8)
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
limit = used + (int(sys.argv[2]) << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # private memory; what is mapped from files does not count
drawn = Representation("drawn", encode, ("features",), PreprocessConfig(64), 3, "d")
found = compute_features(drawn, Drawn(), cache=folder)
x, y = found["features"], torch.arange(number) % 5
if sys.argv[3] == "all":
    x[:].clone()
train, test = bn_crelu(x, x)
options = dict(steps=30, batch_size=256, lrs=[1e-3], holdout=500, ema=0.5)
print(paper_probe({"a": x, "b": train}, y, {"a": x, "b": test}, y, **options)["b"].accuracy)
class Few:
    shape = torch.Size((300, width))
    def __len__(self): return 300
    def __getitem__(self, index): return x[:300][index]
print(knn_accuracy(x, y, Few(), y[:300], ks=(1,))[0].accuracy)
"""


def run_child(folder: Path, megabytes: int, what: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(folder), str(megabytes), what]
    # What is freed goes back at once: the limit is for what is in use, not for the holes between.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    root = Path(__file__).parents[1]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits private memory as Linux does")
def test_sets_larger_than_the_memory(tmp_path: Path) -> None:
    """Under a limit that holds neither images nor features: one that reads them all dies of it."""
    done = run_child(tmp_path, 120, "pieces")
    assert done.returncode == 0, done.stderr
    accuracy, neighbour = map(float, done.stdout.split())
    assert accuracy > 0.9 and neighbour == 1.0  # each of the queries is among the rows
    assert "Unable to allocate" in run_child(tmp_path, 120, "all").stderr
