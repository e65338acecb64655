"""Linear probe and reconstruction report, against scikit-learn, hand-computed numbers and a real data set."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bigbigan.evaluation import (
    Classifier,
    classifier_accuracy,
    knn_accuracy,
    linear_probe,
    logistic_path,
    paper_probe,
    reconstruction_report,
    train_classifier,
)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, classes: int) -> tuple[Tensor, Tensor]:
    """Overlapping classes, on centred features with very unequal directions."""
    y = torch.arange(n) % classes
    x = draw(0, n, 12) + draw(1, classes, 12)[y]
    x = x @ draw(2, 12, 12) * torch.logspace(-1, 1, 12, dtype=torch.float64)
    return x - x.mean(0), y


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("l2", [1e-1, 1e-4])
def test_solver_finds_scikit_learns_minimum(classes: int, l2: float) -> None:
    """Its terms for the same objective: C = 1 / (N l2)."""
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = correlated(400, classes)
    *_, (_, weight, bias) = logistic_path(x, y, [1.0, l2], num_classes=classes, tolerance=2e-8)
    # Of two classes it fits the difference d only; our two outputs, -d/2 and d/2, have half of its penalty.
    strength = l2 / 2 if classes == 2 else l2
    reference = sklearn.LogisticRegression(C=1 / (len(x) * strength), tol=1e-12, max_iter=10_000, solver="newton-cg")
    reference.fit(x.numpy(), y.numpy())
    ours = weight[1:] - weight[:1] if classes == 2 else weight
    torch.testing.assert_close(ours, torch.from_numpy(reference.coef_), rtol=0, atol=5e-5)
    probabilities = F.softmax(x @ weight.T + bias, dim=1)
    torch.testing.assert_close(probabilities, torch.from_numpy(reference.predict_proba(x.numpy())), rtol=0, atol=5e-6)


def test_float32_features_give_the_float64_solution() -> None:
    x, y = correlated(3000, 4)  # three chunks
    wide, narrow = (
        next(logistic_path(rows, y, [1e-3], num_classes=4, tolerance=tolerance))[1:]
        for rows, tolerance in ((x, 1e-7), (x.float(), 1e-5))
    )
    expected, got = (F.softmax(x @ weight.T + bias, dim=1) for weight, bias in (wide, narrow))
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-3)


def test_solution_computed_by_hand() -> None:
    """x = -1 in class 0, +1 in class 1: log(1 + exp(-2w)) + l2 w^2 is least at w = 1/2 if l2 = 2 / (1 + e)."""
    x, y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(3, 1), torch.tensor([0, 1]).repeat(3)
    [(_, weight, bias)] = logistic_path(x, y, [2 / (1 + math.e)], num_classes=2, tolerance=1e-8)
    assert weight[:, 0].tolist() == pytest.approx([-0.5, 0.5], abs=1e-7)
    assert bias.tolist() == pytest.approx([0, 0], abs=1e-7)


def test_a_fit_that_stops_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    x, y = correlated(200, 3)
    list(logistic_path(x, y, [1e-3], num_classes=3, max_iterations=2))
    assert "stopped at gradient" in caplog.text


def test_probe_follows_its_protocol() -> None:
    """The whole of it again in scikit-learn: split, scale by the fitted rows, choose, fit again, test once."""
    linear_model, preprocessing = (pytest.importorskip(f"sklearn.{name}") for name in ("linear_model", "preprocessing"))
    x, y = correlated(900, 7)
    train, test = (x[:600], y[:600] * 3), (x[600:] + 1, y[600:] * 3)  # labels with gaps; shifted test rows
    grid = (1e-3, 1.0, 3e-2)
    result = linear_probe(*train, *test, l2_grid=grid, holdout=200, seed=5)

    def fit(rows: Tensor, l2: float) -> tuple[object, object]:
        scaler = preprocessing.StandardScaler().fit(train[0][rows].numpy())
        model = linear_model.LogisticRegression(C=1 / (len(rows) * l2), tol=1e-8, max_iter=10_000)
        return scaler, model.fit(scaler.transform(train[0][rows].numpy()), train[1][rows].numpy())

    order = torch.randperm(600, generator=torch.Generator().manual_seed(5))
    scores = {}
    for l2 in grid:
        scaler, model = fit(order[:400], l2)
        scores[l2] = model.score(scaler.transform(train[0][order[400:]].numpy()), train[1][order[400:]].numpy())
    assert result.holdout_accuracy == pytest.approx(scores, abs=1.01 / 200)  # one row on the line between two classes
    assert min(np.diff(sorted(scores.values()))) > 0.02  # so that the choice is no matter of rounding
    assert result.l2 == max(scores, key=scores.__getitem__)
    scaler, model = fit(torch.arange(600), result.l2)
    assert result.accuracy == pytest.approx(
        model.score(scaler.transform(test[0].numpy()), test[1].numpy()), abs=1.01 / 300
    )
    ranks = model.predict_proba(scaler.transform(test[0].numpy())).argsort(1)[:, -5:]
    assert result.top5 == pytest.approx(
        (model.classes_[ranks] == test[1].numpy()[:, None]).any(1).mean(), abs=1.01 / 300
    )
    assert (result.n_train, result.n_test, result.num_features) == (600, 300, 12)


def test_more_features_than_rows_give_scikit_learns_predictions() -> None:
    """Fitted in the span of the rows; and features too wide for either are refused."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = draw(0, 60, 300) + draw(1, 3, 300)[torch.arange(60) % 3] / 3, torch.arange(60) % 3
    result = linear_probe(x[:45], y[:45], x[45:], y[45:], l2_grid=[1e-1, 1e-2, 1e-3], holdout=15)
    scale = x[:45].std(0, correction=0)
    train, test = ((part - x[:45].mean(0)) / scale for part in (x[:45], x[45:]))
    model = linear_model.LogisticRegression(C=1 / (45 * result.l2), tol=1e-8, max_iter=10_000).fit(train, y[:45])
    assert result.accuracy == pytest.approx(model.score(test, y[45:]))
    assert result.num_features == 300
    wide = torch.zeros(1, 1).expand(40_000, 40_000)
    with pytest.raises(ValueError, match="40000 rows of 40000 features needs 32768 at most of either"):
        linear_probe(wide, y, x, y)


def separable(n: int = 60) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 2
    return draw(3, n, 4).float() + 8 * y[:, None], y


def test_probe_ignores_columns_that_are_constant_in_training() -> None:
    x, y = separable()
    x[:, 1] = 0.1  # its float32 mean is not exactly 0.1
    other = x.clone()
    other[:, 1] = torch.tensor([1e6, -1e6]).repeat(30)
    assert linear_probe(x, y, other, y, holdout=20).accuracy == 1.0
    x[:, 1] = 1e-40 * draw(5, 60).float()  # too little for float32 to scale up
    assert linear_probe(x, y, other, y, holdout=20).accuracy == 1.0


def test_numpy_arrays_are_features_too() -> None:
    x, y = separable()
    arrays = x.numpy(), y.numpy(), x.numpy(), y.numpy()
    assert linear_probe(*arrays, holdout=20).accuracy == 1.0
    assert knn_accuracy(*arrays, ks=(1,))[0].accuracy == 1.0
    found = paper_probe({"a": arrays[0]}, arrays[1], {"a": arrays[2]}, arrays[3], holdout=20, steps=50, lrs=[0.1, 1.0])
    assert found["a"].accuracy == 1.0


def test_equal_scores_take_the_strongest_l2_and_the_edge_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    x, y = separable()
    result = linear_probe(x, y, x[:7], y[:7], l2_grid=(1e-3, 1e-1, 1e-2), holdout=20)
    assert set(result.holdout_accuracy.values()) == {1.0}
    assert (result.l2, result.top5) == (1e-1, None)
    assert "edge of the grid" in caplog.text


def test_one_l2_needs_no_holdout_and_leaves_inputs_and_global_random_state_alone() -> None:
    x, y = separable()
    before, state = x.clone(), torch.get_rng_state()
    for standardize in (True, False):
        result = linear_probe(x, y, x, torch.ones_like(y), l2_grid=[1e-2], standardize=standardize)  # no test row of 0
        assert (result.accuracy, result.holdout_accuracy) == (0.5, {})
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_x": torch.zeros(60)}, r"train_x has shape \(60,\); expected \[N, D\]"),
        ({"test_x": torch.zeros(60, 3)}, "train_x has 4 features a row, test_x has 3"),
        ({"train_x": separable()[0].index_fill(0, torch.tensor([7, 9]), math.nan)}, "2 rows with NaN.*first is row 7"),
        ({"train_y": torch.zeros(60)}, r"train_y is torch.float32 of shape \(60,\); expected integers \[60\]"),
        ({"test_y": torch.zeros(59, dtype=torch.long)}, r"test_y is torch.int64 of shape \(59,\)"),
        ({"train_y": torch.full((60,), 4)}, "the one label 4"),
        ({"train_y": torch.arange(60) % 3 - 1}, "train_y has 20 negative labels"),
        ({"test_y": torch.arange(60) % 4}, r"labels that train_y lacks: \[2, 3\]"),
        ({"holdout": 60}, "holdout is 60; of 60 training rows, hold out 1 to 59"),
        ({"l2_grid": (1.0, 0.0)}, r"l2_grid is \(1.0, 0.0\)"),
    ],
)
def test_probe_names_what_does_not_fit(change: dict[str, object], message: str) -> None:
    x, y = separable()
    arguments = {"train_x": x, "train_y": y, "test_x": x, "test_y": y, "holdout": 20} | change
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)


def toy(n: int, side: int = 16) -> tuple[Tensor, Tensor]:
    """Dark pictures with noise, bright on the left (class 0) or on the right (class 1)."""
    y = torch.arange(n) % 2
    images = torch.randint(0, 60, (n, 1, side, side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    images[y == 0, :, :, : side // 2] += 150
    images[y == 1, :, :, side // 2 :] += 150
    return images, y


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(*toy(160), num_classes=2, epochs=3, batch_size=16)


def test_classifier_learns_and_its_seed_decides(classifier: Classifier) -> None:
    assert classifier_accuracy(classifier, *toy(100)) == 1.0
    assert classifier_accuracy(classifier, *toy(100, side=24)) == 1.0
    torch.rand(1)  # another global state than the first training met
    state = torch.get_rng_state()
    same, other = (train_classifier(*toy(160), num_classes=2, epochs=3, batch_size=16, seed=s) for s in (0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(classifier.parameters(), same.parameters(), strict=True))
    assert not torch.equal(classifier[0].weight, other[0].weight)
    assert not same.training


def test_judging_uses_the_classifiers_running_statistics(classifier: Classifier) -> None:
    images, y = toy(40)
    reconstruction_report(images, y, lambda x: x, None, classifier.train())
    assert not classifier.training
    classifier_accuracy(classifier.train(), images, y)
    assert not classifier.training


def test_flip_shows_the_classifier_mirrored_pictures() -> None:
    """Class 0 is bright on the left half, class 1 on the right quarter: what is bright on the right half?"""
    images, y = toy(160)
    images[y == 1, :, :, 8:12] -= 150
    plain, flipped = (
        train_classifier(images, y, num_classes=2, epochs=3, batch_size=16, flip=flip) for flip in (False, True)
    )
    mirrored = images[y == 0].flip(3)
    assert classifier_accuracy(flipped, mirrored, torch.zeros(80, dtype=torch.long)) == 1.0
    assert classifier_accuracy(plain, mirrored, torch.zeros(80, dtype=torch.long)) < 0.5


def test_agreement_tells_kept_from_lost_labels(classifier: Classifier) -> None:
    images, y = toy(100)
    labels = torch.where(torch.arange(100) < 10, 1 - y, y)  # ten wrong labels, five a class
    kept = reconstruction_report(images, labels, lambda x: x, None, classifier)
    assert (kept.label_agreement, kept.classifier_agreement, kept.classifier_accuracy) == (0.9, 1.0, 0.9)
    assert kept.per_class == (0.9, 0.9)
    assert (kept.pixel_l1, kept.pixel_error_ratio, kept.feature_distance_ratio, kept.num_images) == (0, 0, None, 100)
    lost = reconstruction_report(images, labels, lambda x: x.flip(3), None, classifier)
    assert (lost.label_agreement, lost.classifier_agreement, lost.classifier_accuracy) == (0.1, 0.0, 0.9)
    collapsed = reconstruction_report(images, y, lambda x: x[:1].expand_as(x), None, classifier, batch_size=100)
    assert sorted(collapsed.per_class) == [0.0, 1.0]


def test_classes_without_images_have_no_agreement() -> None:
    images, y = toy(8)
    result = reconstruction_report(images, y, lambda x: x, None, Classifier(1, 4))
    assert result.per_class[2:] == (None, None)


def test_errors_and_ratios_computed_by_hand(classifier: Classifier) -> None:
    """Two plain pictures, -1 and 1, that come back as -1/2 and 1/2; features of a picture of m are (m, m^2)."""
    images = torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1).expand(2, 1, 16, 16)

    def features(x: Tensor) -> Tensor:
        return torch.stack([x.mean((1, 2, 3)), x.square().mean((1, 2, 3))], dim=1)

    result = reconstruction_report(images, torch.tensor([0, 1]), lambda x: x / 2, features, classifier)
    assert (result.pixel_l1, result.pixel_mse, result.pixel_error_ratio) == (0.5, 0.25, 0.25)
    assert result.pixel_l2_ratio == pytest.approx(0.5 / 1.5)
    assert result.feature_distance_ratio == pytest.approx(math.hypot(0.5, 0.75) / 2, rel=1e-6)


def test_trivial_answers_are_measured_beside_the_reconstructions(classifier: Classifier) -> None:
    """Halves of 1 and -1; the reverse; all 0.5: their mean is 1/6 everywhere, their mean colours are 0, 0, 0.5."""
    half = torch.cat([torch.ones(1, 32, 16), -torch.ones(1, 32, 16)], dim=2)
    images = torch.stack([half, -half, torch.full((1, 32, 32), 0.5)])
    labels = torch.zeros(3, dtype=torch.long)
    for reconstruct in (lambda x: x, lambda x: F.avg_pool2d(x, 2)):  # pooling changes nothing
        result = reconstruction_report(images, labels, reconstruct, None, classifier)
        assert result.mean_image_l1 == pytest.approx((1 + 1 + 1 / 3) / 3)
        assert result.mean_color_l1 == pytest.approx((1 + 1 + 0) / 3)
        assert result.random_pair_l1 == pytest.approx((2 + 1 + 1) / 3)  # the three in a ring


@pytest.mark.parametrize("batch_size", [2, 3, 4, 5])
def test_random_pairs_are_distinct(classifier: Classifier, batch_size: int) -> None:
    """Five pictures with one bright row each: any two differ by 2 in two rows of 16, also where a batch is left one."""
    images = -torch.ones(5, 1, 16, 16)
    images[range(5), :, range(5)] = 1
    labels = torch.zeros(5, dtype=torch.long)
    result = reconstruction_report(images, labels, torch.zeros_like, lambda x: x, classifier, batch_size=batch_size)
    assert result.pixel_error_ratio == pytest.approx(1 / 0.25)
    assert result.pixel_l2_ratio == pytest.approx(1)  # black is as far from each
    assert result.feature_distance_ratio == pytest.approx(16 / math.sqrt(2 * 16 * 4))


def test_random_pairs_of_sorted_images_cross_classes(classifier: Classifier) -> None:
    images = torch.cat([-torch.ones(200, 1, 16, 16), torch.ones(200, 1, 16, 16)])
    result = reconstruction_report(images, torch.arange(400) // 200, torch.neg, None, classifier, batch_size=10)
    assert result.pixel_error_ratio == pytest.approx(2, rel=0.15)  # off by 2; random pairs by 1 on average


def test_alike_images_have_no_ratio(classifier: Classifier) -> None:
    images = torch.zeros(4, 1, 16, 16)
    result = reconstruction_report(images, torch.zeros(4, dtype=torch.long), torch.ones_like, lambda x: x, classifier)
    assert math.isnan(result.pixel_error_ratio)
    assert result.feature_distance_ratio is not None
    assert math.isnan(result.feature_distance_ratio)


def test_originals_are_pooled_to_their_reconstructions(classifier: Classifier) -> None:
    seen = []

    def features(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x

    images, y = toy(20, side=48)
    result = reconstruction_report(images, y, lambda x: F.avg_pool2d(x, 3), features, classifier)
    assert (result.pixel_l1, result.feature_distance_ratio, result.label_agreement) == (0, 0, 1)
    assert seen == [(20, 1, 16, 16)] * 2


def test_batches_change_nothing_but_rounding(classifier: Classifier) -> None:
    one, many = (
        reconstruction_report(*toy(90), lambda x: x.roll(5, 3), None, classifier, batch_size=size) for size in (90, 7)
    )
    assert (one.label_agreement, one.per_class) == (many.label_agreement, many.per_class)
    assert one.pixel_l1 == pytest.approx(many.pixel_l1, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(8, 16, 16)}, r"images have shape \(8, 16, 16\)"),
        ({"images": torch.zeros(8, 1, 8, 8)}, "S at least 16"),
        ({"images": torch.full((8, 1, 16, 16), 255.0)}, r"images span values from 255 to 255; \[-1, 1\] is needed"),
        ({"images": torch.full((8, 1, 16, 16), math.nan)}, "images span values from nan"),
        ({"labels": torch.zeros(8)}, "labels are torch.float32"),
        ({"labels": torch.arange(8) - 1}, "labels span -1 to 6; expected 0 to 1"),
        ({"batch_size": 1}, "8 images in batches of 1"),
        ({"reconstruct": lambda x: x[:, :, :10, :10]}, r"gave \(8, 1, 10, 10\) for \(8, 1, 16, 16\)"),
        ({"reconstruct": lambda x: F.interpolate(x, 32)}, r"gave \(8, 1, 32, 32\)"),
        ({"reconstruct": lambda x: x.expand(8, 3, 16, 16)}, r"gave \(8, 3, 16, 16\)"),
        ({"reconstruct": lambda x: x / 0}, "8 of 8 reconstructions in a batch hold NaN"),
        ({"reconstruct": lambda x: 127.5 * (x + 1)}, r"reconstructions span values from .*; \[-1, 1\] is needed"),
    ],
)
def test_report_names_what_does_not_fit(classifier: Classifier, change: dict[str, object], message: str) -> None:
    images, y = toy(8)
    arguments = {"images": images, "labels": y, "reconstruct": lambda x: x, "features": None} | change
    with pytest.raises(ValueError, match=message):
        reconstruction_report(**arguments, classifier=classifier)


def test_training_names_what_does_not_fit() -> None:
    images, y = toy(8)
    with pytest.raises(ValueError, match="train on uint8"):
        train_classifier(images.float() / 255, y, num_classes=2)
    with pytest.raises(ValueError, match="labels span 0 to 1; expected 0 to 0"):
        train_classifier(images, y, num_classes=1)
    with pytest.raises(ValueError, match="epochs is 0"):
        train_classifier(images, y, num_classes=2, epochs=0)


def fashion_mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images padded to 32x32, and labels."""
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(folder / "fashion_mnist" / f"{split}.parquet")
    files = table["image"].combine_chunks().field("bytes").to_pylist()
    images = torch.from_numpy(np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files]))
    return F.pad(images[:, None], (2, 2, 2, 2)), torch.tensor(table["label"].to_numpy())


@pytest.mark.slow
def test_classifier_reads_fashion_mnist(shared_data: Path) -> None:
    model = train_classifier(*fashion_mnist(shared_data, "train"), num_classes=10)
    assert classifier_accuracy(model, *fashion_mnist(shared_data, "test")) >= 0.91
