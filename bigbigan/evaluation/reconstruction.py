"""Whether reconstructions keep what a picture shows, judged by a classifier of real images, pixels and features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bigbigan.arrays import as_seed, as_tensor, seeded
from bigbigan.images import check_range

TOTALS = ("accuracy", "agreement", "l1", "mean_image", "mean_color", "mse", "pair_l1", "l2", "pair_l2", "distance",
          "pair_distance")  # fmt: skip


class Classifier(nn.Sequential):
    """Small convolutional network, [N, C, S, S] in [-1, 1] (S at least 16) to logits [N, num_classes].

    114,000 parameters for grey images and ten classes. It shares nothing with the model it judges. The 4x4 grid
    before the last layer keeps where things are, which a global average would lose.
    """

    def __init__(self, image_channels: int, num_classes: int) -> None:
        widths = (32, 64, 128)
        stages: list[nn.Module] = []
        for before, after, kernel in zip((image_channels, *widths[:-1]), widths, (5, 3, 3), strict=True):
            stages += [
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * widths[-1], num_classes))
        self.image_channels, self.num_classes = image_channels, num_classes


@dataclass(frozen=True)
class ReconstructionResult:
    """What `reconstruction_report` measured. Agreements are fractions of 1; pixels are in [-1, 1] units.

    Random pairs are distinct originals; a ratio near 1 says that a reconstruction is as far from its original as
    any other picture. A ratio is NaN if all originals are alike.
    """

    label_agreement: float  # the classifier gives the reconstruction the true label
    classifier_agreement: float  # ... the label it gives the original
    classifier_accuracy: float  # on the originals: what label_agreement of perfect reconstructions would be
    per_class: tuple[float | None, ...]  # label_agreement by true label; None where no image has it
    pixel_l1: float
    mean_image_l1: float  # pixel_l1 of trivial answers: the mean of all originals for each of them, ...
    mean_color_l1: float  # ... each original's own mean colour, ...
    random_pair_l1: float  # ... another original
    pixel_mse: float
    pixel_error_ratio: float  # pixel_l1 over that of random pairs
    pixel_l2_ratio: float  # mean Euclidean distance to the reconstruction, over that to another image's (BiGAN's EGr)
    feature_distance_ratio: float | None  # mean Euclidean distance over that of random pairs; None without features
    num_images: int


def train_classifier(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    epochs: int = 8,
    batch_size: int = 128,
    lr: float = 5e-3,
    flip: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Classifier:
    """A `Classifier` trained on real images, in eval mode; on one CPU, the same seed gives the same weights.

    Adam under a linear warm-up that meets a cosine decay to 0.

    Args:
        images: uint8 [N, C, S, S], at the resolution of the reconstructions to judge. Training runs on their device.
        labels: integers [N] in 0 to num_classes - 1.
        flip: mirror half of the images, at random. For pictures whose class does not depend on it.
        progress: show a bar on a terminal's stderr.

    Raises:
        ValueError: for shapes, dtypes or labels that do not fit.
    """
    images, labels = as_tensor(images, "images"), as_tensor(labels, "labels")
    _check(images, labels, num_classes)
    if images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}; train on uint8")
    if min(epochs, batch_size) < 1:
        raise ValueError(f"epochs is {epochs} and batch_size {batch_size}; give at least 1 of each")
    generator = seeded(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw their first weights from torch's own generator
        torch.default_generator.manual_seed(as_seed(seed))
        model = Classifier(images.shape[1], num_classes)
    model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.25 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    with tqdm(total=steps, desc="classifier", unit="step", disable=None if progress else True) as bar:
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=generator).split(batch_size):
                x = _to_float(images[index])
                if flip:
                    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
                    x = torch.where(mirrored.to(x.device), x.flip(3), x)
                logits = model(x.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits, labels[index].long().to(x.device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return model.eval()


@torch.no_grad()
def classifier_accuracy(model: Classifier, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> float:
    """Fraction of images [N, C, S, S], uint8 or float in [-1, 1], that `model`, put into eval mode, labels rightly.

    Raises:
        ValueError: for shapes, values or labels that do not fit.
    """
    images, labels = as_tensor(images, "images"), as_tensor(labels, "labels")
    _check(images, labels, model.num_classes)
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        correct += int((model(_to_float(x.to(device))).argmax(1) == y.to(device)).sum())
    return correct / len(images)


@torch.no_grad()
def reconstruction_report(
    images: Tensor,
    labels: Tensor,
    reconstruct: Callable[[Tensor], Tensor] | Tensor,
    features: Callable[[Tensor], Tensor] | None,
    classifier: Classifier,
    *,
    batch_size: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> ReconstructionResult:
    """Compares images with their reconstructions, in batches on the classifier's device.

    Originals larger than their reconstructions are average-pooled by the integer ratio before anything is compared.
    Batches come in a random order of `seed`, so that neighbours in a batch serve as the random pairs.

    Args:
        images: [N, C, S, S], uint8 or float in [-1, 1]; N at least 2.
        labels: integers [N], true labels.
        reconstruct: any function of [B, C, S, S] in [-1, 1] to [B, C, R, R] in [-1, 1], R a divisor of S; or finished
            reconstructions [N, C, R, R], uint8 or float in [-1, 1], in the order of the images.
        features: [B, C, R, R] in [-1, 1] to [B, ...], or None to leave them out.
        classifier: put into eval mode; best trained on real images of side R.
        progress: show a bar on a terminal's stderr.

    Raises:
        ValueError: for shapes, values or labels that do not fit, and for reconstructions that are not finite.
    """
    images, labels = as_tensor(images, "images"), as_tensor(labels, "labels")
    if not callable(reconstruct):
        reconstruct = as_tensor(reconstruct, "reconstructions")
    _check(images, labels, classifier.num_classes)
    if min(len(images), batch_size) < 2:
        raise ValueError(f"{len(images)} images in batches of {batch_size}: random pairs need at least 2 of each")
    if isinstance(reconstruct, Tensor) and len(reconstruct) != len(images):
        raise ValueError(f"{len(reconstruct)} reconstructions of {len(images)} images; give one of each, in order")
    classifier.eval()
    device = next(classifier.parameters()).device
    totals = dict.fromkeys(TOTALS, 0.0)
    kept = torch.zeros(classifier.num_classes, dtype=torch.long)
    order = torch.randperm(len(images), generator=seeded(seed))
    mean = mean_image(images).to(device)[None]  # [1, C, S, S]
    for index in tqdm(order.split(batch_size), desc="reconstruction", disable=None if progress else True):
        x, y = _to_float(images[index].to(device)), labels[index].to(device)
        again = _to_float(reconstruct[index].to(device)) if isinstance(reconstruct, Tensor) else reconstruct(x).float()
        x = _pool_like(again, x)
        label, new_label = classifier(x).argmax(1), classifier(again).argmax(1)
        kept += torch.bincount(y[new_label == y], minlength=len(kept)).cpu()
        totals["accuracy"] += int((label == y).sum())
        totals["agreement"] += int((new_label == label).sum())
        totals["l1"] += _sum_of_means((again - x).abs())
        totals["mean_image"] += _sum_of_means((F.adaptive_avg_pool2d(mean, x.shape[-1]) - x).abs())
        totals["mean_color"] += _sum_of_means((x.mean((2, 3), keepdim=True) - x).abs())
        totals["mse"] += _sum_of_means((again - x).square())
        totals["pair_l1"] += _sum_of_means((x.roll(1, 0) - x).abs())
        totals["l2"] += _sum_of_norms(again - x)
        totals["pair_l2"] += _sum_of_norms(again - x.roll(1, 0)) if len(x) > 1 else 0.0
        if features is not None:
            before, after = (features(batch) for batch in (x, again))
            totals["distance"] += _sum_of_norms(after - before)
            totals["pair_distance"] += _sum_of_norms(before.roll(1, 0) - before)
    n = len(images)
    pairs = n - (n % batch_size == 1)  # alone in the last batch, an image meets only itself
    counts = torch.bincount(labels.long().cpu(), minlength=len(kept))
    return ReconstructionResult(
        label_agreement=int(kept.sum()) / n,
        classifier_agreement=totals["agreement"] / n,
        classifier_accuracy=totals["accuracy"] / n,
        per_class=tuple(k / c if c else None for k, c in zip(kept.tolist(), counts.tolist(), strict=True)),
        pixel_l1=totals["l1"] / n,
        mean_image_l1=totals["mean_image"] / n,
        mean_color_l1=totals["mean_color"] / n,
        random_pair_l1=totals["pair_l1"] / pairs,
        pixel_mse=totals["mse"] / n,
        pixel_error_ratio=_ratio(totals["l1"] / n, totals["pair_l1"] / pairs),
        pixel_l2_ratio=_ratio(totals["l2"] / n, totals["pair_l2"] / pairs),
        feature_distance_ratio=(
            None if features is None else _ratio(totals["distance"] / n, totals["pair_distance"] / pairs)
        ),
        num_images=n,
    )


def mean_image(images: Tensor, batch_size: int = 500) -> Tensor:
    """[C, S, S] float32, the mean of images [N, C, S, S], uint8 or float in [-1, 1]."""
    total = sum(_to_float(batch).double().sum(0) for batch in images.split(batch_size))
    assert isinstance(total, Tensor)
    return (total / len(images)).float()


def _pool_like(again: Tensor, x: Tensor) -> Tensor:
    """The originals at the resolution of their reconstructions, once these are found sound."""
    side = x.shape[-1] // max(again.shape[-1], 1)
    if again.ndim != 4 or side < 1 or x.shape != (*again.shape[:2], side * again.shape[2], side * again.shape[3]):
        raise ValueError(
            f"reconstruct gave {tuple(again.shape)} for {tuple(x.shape)}; expected as many images and channels, "
            "and a side that divides the originals'"
        )
    bad = int((~again.isfinite().flatten(1).all(1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(again)} reconstructions in a batch hold NaN or infinity")
    _check_range(again, "reconstructions")
    return F.avg_pool2d(x, side) if side > 1 else x


def _to_float(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    _check_range(images, "images")
    return images.float()


def _check_range(images: Tensor, name: str) -> None:
    check_range(images, f"{name} span values")


def _check(images: Tensor, labels: Tensor, num_classes: int) -> None:
    if images.ndim != 4 or images.shape[2] != images.shape[3] or images.shape[3] < 16 or 0 in images.shape:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected [N, C, S, S] with S at least 16")
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}; expected integers [{len(images)}]")
    low, high = (int(value) for value in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels span {low} to {high}; expected 0 to {num_classes - 1}")


def _sum_of_means(per_pixel: Tensor) -> float:
    return per_pixel.flatten(1).cpu().mean(1, dtype=torch.float64).sum().item()


def _sum_of_norms(rows: Tensor) -> float:
    return rows.flatten(1).cpu().double().norm(dim=1).sum().item()


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan
