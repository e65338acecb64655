"""Latents, noise, features, data types and seeds as people have them; one kind of error for what does not fit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bigbigan import BigBiGAN, Encoder, create_model, load
from bigbigan.arrays import as_dtype, as_floats, as_seed, as_tensor
from bigbigan.data.batches import Batches
from bigbigan.evaluation import (
    TensorImages,
    classifier_score,
    kernel_distance,
    knn_accuracy,
    labelled_subset,
    linear_probe,
    nearest,
    paper_probe,
    precision_at,
    reconstruction_report,
    retrieve,
    train_classifier,
)
from bigbigan.evaluation.features import BatchEncoder
from bigbigan.training.recipes import RECIPES


@pytest.fixture(scope="module")
def model() -> BigBiGAN:
    return create_model("bigbigan-tiny", seed=3)


Z = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
ARRAY = Z.numpy()
FORMS: dict[str, Any] = {
    "array": ARRAY,
    "float64": ARRAY.astype(np.float64),
    "big-endian": ARRAY.astype(">f4"),
    "long double": ARRAY.astype(np.longdouble),
    "lists": ARRAY.tolist(),
    "tuples": tuple(map(tuple, ARRAY.tolist())),
    "arrays": list(ARRAY),
    "tensors": list(Z),
    "columns first": np.asfortranarray(ARRAY),
    "a view backwards": ARRAY[::-1].copy()[::-1],
    "read-only": np.frombuffer(ARRAY.tobytes(), np.float32).reshape(3, 8),
}


@pytest.mark.parametrize("form", FORMS)
def test_latents_and_noise_in_every_form(model: BigBiGAN, form: str) -> None:
    given, x = FORMS[form], torch.zeros(3, 3, 32, 32)
    torch.testing.assert_close(model.generate(given), model.generate(Z))
    wanted = model.encode(x, noise=Z)
    torch.testing.assert_close(model.encode(x, noise=given).z_sample, wanted.z_sample)
    torch.testing.assert_close(model.discriminate(x, given).score_xz, model.discriminate(x, Z).score_xz)


def test_whole_numbers_of_every_kind_are_counts(model: BigBiGAN) -> None:
    wanted = model.generate(2, seed=1)
    for count in (np.int64(2), np.uint8(2), torch.tensor(2), np.array(2)):
        assert torch.equal(model.generate(count, seed=np.int64(1)), wanted)
    integers = np.arange(24).reshape(3, 8) % 3
    assert torch.equal(model.generate(integers), model.generate(torch.from_numpy(integers)))


@pytest.mark.parametrize(
    "bad",
    [2.0, "2", True, None, [1.0] * 8, [[1.0] * 7], [[1.0] * 8, [1.0] * 7], [["a"] * 8], np.ones((1, 8), complex),
     np.ones((1, 8), bool), np.full((1, 8), np.nan), torch.full((1, 8), torch.inf), np.empty((0, 8)), [{}], object()],
    ids=lambda bad: type(bad).__name__,
)  # fmt: skip
def test_what_does_not_fit_is_a_value_error(model: BigBiGAN, bad: Any) -> None:
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"latents|images|the number"):
        model.generate(bad)
    if bad is not None:
        with pytest.raises(ValueError, match="noise"):
            model.encode(x, noise=bad)
        with pytest.raises(ValueError, match="latents"):
            model.discriminate(x, bad)


def test_networks_name_the_shape_that_they_take() -> None:
    for name in ("bigbigan-fashion-mnist-32", "bigan-mnist-mlp"):
        grey = create_model(name)
        side = grey.config.preprocess.resolution
        for call in (grey.encoder, lambda x, d=grey.discriminator, z=grey.config.z_dim: d(x, torch.zeros(1, z))):
            with pytest.raises(ValueError, match=r"images: the shape is \[1, 3, \d+, \d+\]; expected \[N, 1, "):
                call(torch.zeros(1, 3, side, side))
        with pytest.raises(ValueError, match=r"latents: the shape is \[1, 7\]; expected \[N, "):
            grey.generator(torch.zeros(1, 7))
        with pytest.raises(ValueError, match=r"latents: the shape is \[1, 7\]; expected \[N, "):
            grey.discriminator(torch.zeros(1, 1, side, side), torch.zeros(1, 7))
    upsampled = grey.generator.upsample(np.zeros((1, 1, 28, 28), np.float32))
    assert isinstance(upsampled, torch.Tensor)
    images = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    generator = create_model("bigbigan-tiny").generator
    assert torch.equal(generator.upsample(images), generator.upsample(torch.from_numpy(images)))


def test_dtypes_as_texts(tmp_path: Path) -> None:
    for given in ("float16", "torch.float16", "half", "FP16", np.float16, np.dtype("float16"), torch.float16):
        assert as_dtype(given) == torch.float16
    create_model("bigbigan-tiny", dtype="bfloat16").save(tmp_path / "tiny")
    assert load(tmp_path / "tiny").dtype == torch.bfloat16
    assert load(tmp_path / "tiny", dtype="float64").dtype == torch.float64
    assert next(Encoder.from_pretrained(tmp_path / "tiny", dtype="float32").parameters()).dtype == torch.float32
    for bad in ("int8", "float17", torch.int32, np.int64, 16):
        for make in (functools.partial(load, tmp_path / "tiny"), functools.partial(create_model, "bigbigan-tiny")):
            with pytest.raises(ValueError, match=r"dtype is .*models run in a floating dtype such as"):
                make(dtype=bad)


ROWS, LABELS = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 1, 16, 16), np.uint8)


@pytest.mark.parametrize(
    "form", [torch.from_numpy, lambda x: x, lambda x: x.tolist()], ids=["tensors", "arrays", "lists"]
)
def test_measures_take_arrays_and_lists(form: Callable[[np.ndarray], Any]) -> None:
    x, y = form(ROWS.astype(np.float32)), form(LABELS)
    assert nearest(x, x, 1)[1].flatten().tolist() == list(range(40))
    assert knn_accuracy(x, y, x, y, ks=[1])[0].accuracy == 1
    indices = retrieve(x, x, 1, own=form(np.arange(40)))[1]
    precision_at(indices.tolist() if isinstance(x, list) else indices, y, y, [1])
    assert linear_probe(x, y, x, y, l2_grid=[1e-3]).n_train == 40
    assert paper_probe({"f": x}, y, {"f": x}, y, steps=2, holdout=4)["f"].n_test == 40
    assert len(labelled_subset(y, 0.5)) == 20
    kernel_distance(x, x, subsets=2, subset_size=10)
    classifier_score(x, splits=2)
    images = form(IMAGES)
    if isinstance(images, list):
        return  # uint8 cannot be told in lists
    assert len(TensorImages(images)) == 40
    classifier = train_classifier(images, y, num_classes=2, epochs=1)
    assert reconstruction_report(images, y, images, None, classifier).pixel_l1 == 0


def test_only_whole_numbers_are_seeds(model: BigBiGAN) -> None:
    def probe(seed: Any) -> None:
        linear_probe(ROWS, LABELS, ROWS, LABELS, holdout=4, seed=seed)

    calls: list[Callable[[Any], Any]] = [
        lambda seed: model.generate(1, seed=seed),
        lambda seed: model.sample_latents(1, seed=seed),
        lambda seed: model.encode(torch.zeros(1, 3, 32, 32), seed=seed),
        lambda seed: model.reconstruct(torch.zeros(1, 3, 32, 32), seed=seed, use_sample=True),
        lambda seed: create_model("bigbigan-tiny", parts=("generator",), seed=seed),
        probe,
        lambda seed: paper_probe({"f": ROWS}, LABELS, {"f": ROWS}, LABELS, steps=1, holdout=4, seed=seed),
        lambda seed: labelled_subset(LABELS, 0.5, seed=seed),
        lambda seed: kernel_distance(ROWS, ROWS, subsets=2, subset_size=4, seed=seed),
        lambda seed: classifier_score(ROWS, splits=2, seed=seed),
        lambda seed: train_classifier(IMAGES, LABELS, num_classes=2, epochs=1, seed=seed),
        lambda seed: BatchEncoder(model, ["z_mean"], 1, seed),
        lambda seed: dataclasses.replace(RECIPES["bigbigan-mnist-32"], seed=seed),
    ]
    for call in calls:
        for bad in (1.5, 1.0, np.float64(2), "1", True, -1, 2**64):
            with pytest.raises(ValueError, match=r"seed is .*(whole number|must be in)"):
                call(bad)
            with pytest.raises(ValueError, match="seed is 1.5; give a whole number"):
                Batches(torch.from_numpy(IMAGES), 4, 1.5)
        call(np.int64(3))


def test_no_function_draws_by_an_unchecked_seed() -> None:
    """Every place that seeds a generator asks `as_seed`."""
    import bigbigan

    package = Path(inspect.getfile(bigbigan)).parent
    for path in package.rglob("*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if "manual_seed(" in line and path.name != "arrays.py":
                assert "as_seed(" in line or "manual_seed(int(words[0]))" in line or "manual_seed(0)" in line, line


def test_conversions_keep_what_is_a_tensor() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    assert as_tensor(leaf, "x") is leaf and as_floats(leaf, "x", None, 3) is leaf
    assert as_floats([[1, 2]], "x", None, 2).dtype == torch.float64
    assert as_seed(np.uint64(2**64 - 1)) == 2**64 - 1
