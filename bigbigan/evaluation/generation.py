"""Scores of generated images against real ones: Fréchet distance, kernel distance, classifier score.

With Inception these are FID (Heusel et al. 2017), KID (Bińkowski et al. 2018) and Inception Score (Salimans et al.
2016); with another network they carry its name. torchmetrics computes them, here in float64.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from bigbigan.arrays import as_seed, as_tensor, seeded
from bigbigan.evaluation.feature_networks import INCEPTION, MISMATCH, FeatureNetwork
from bigbigan.files import atomic_write
from bigbigan.outputs import STATISTICS, claim

logger = logging.getLogger(__name__)

SCORES = ("frechet", "kernel", "classifier")
_TEXTS = ("network", "network_digest", "images")


@dataclass(frozen=True)
class FeatureStatistics:
    """Gaussian of the features of a set of images, in a file or in memory.

    Attributes:
        mean, covariance: [D] and [D, D] float64; the covariance is over count - 1.
        network, network_digest: of the `FeatureNetwork`.
        images: JSON-able facts of what was measured, such as digest, split and resolution.
    """

    mean: Tensor
    covariance: Tensor
    count: int
    network: str
    network_digest: str
    images: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes `.npz` or `.safetensors`.

        Raises:
            ValueError: another suffix, or what is there is something else.
        """
        check_statistics_path(path)
        texts = {"network": self.network, "network_digest": self.network_digest, "images": json.dumps(self.images)}
        arrays = {"mean": self.mean.numpy(), "covariance": self.covariance.numpy(), "count": np.array(self.count)}
        with claim(path, STATISTICS), atomic_write(path) as temporary, open(temporary, "wb") as file:
            if path.suffix == ".npz":
                np.savez(file, allow_pickle=False, **arrays, **{name: np.array(text) for name, text in texts.items()})
            else:
                from safetensors.numpy import save

                file.write(save(arrays, texts))

    @classmethod
    def load(cls, path: Path, network: FeatureNetwork) -> FeatureStatistics:
        """Reads what `save` wrote.

        Raises:
            ValueError: another file, or statistics of another network.
        """
        check_statistics_path(path)
        try:
            arrays, texts = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
            mean, covariance = (torch.from_numpy(arrays[name]) for name in ("mean", "covariance"))
            images = json.loads(texts["images"])
            result = cls(mean, covariance, int(arrays["count"]), texts["network"], texts["network_digest"], images)
        except OSError:
            raise
        except Exception as error:  # zip, header and JSON errors of damaged files are an open set
            raise ValueError(f"{path} holds no statistics written by --save-statistics ({error!r})") from error
        sound = mean.ndim == 1 and covariance.shape == mean.shape * 2 and result.count > 1
        sound = sound and {mean.dtype, covariance.dtype} == {torch.float64}
        if not sound or not (mean.isfinite().all() and covariance.isfinite().all()):
            raise ValueError(f"{path} holds {mean.dtype} {list(mean.shape)}, {list(covariance.shape)}: no statistics")
        if result.network_digest != network.digest:
            raise ValueError(
                f"{path} is of the network {result.network} ({result.network_digest[:12]}), "
                f"not of {network.name} ({network.digest[:12]}): measure with that network, or make new statistics"
            )
        return result


def check_statistics_path(path: Path) -> None:
    """
    Raises:
        ValueError: another suffix than .npz or .safetensors.
    """
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{path}: statistics are .npz or .safetensors, not {path.suffix or 'without a suffix'}")


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with np.load(path, allow_pickle=False) as file:
        content = {name: file[name] for name in file.files}
    return content, {name: str(content[name]) for name in _TEXTS}


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@dataclass(frozen=True)
class Features:
    """What one pass over a set of images leaves.

    Attributes:
        rows: [min(keep, count), D] float32, a random choice, in order.
        logits: [count, K] float32; None if not asked for, or if the network has none.
    """

    statistics: FeatureStatistics
    rows: Tensor
    logits: Tensor | None


def collect_features(
    batches: Iterable[Tensor],
    count: int,
    network: FeatureNetwork,
    *,
    keep: int = 0,
    logits: bool = False,
    seed: int = 0,
    images: dict[str, Any] | None = None,
    progress: bool = False,
) -> Features:
    """One pass over `count` uint8 images in batches [B, C, S, S].

    Memory holds a batch, a [D, D] sum, `keep` rows, and the logits if asked for.

    Raises:
        ValueError: fewer or more images than `count`, or fewer than 2.
    """
    if count < 2:
        raise ValueError(f"{count} image has no covariance; give at least 2")
    kept = torch.zeros(count, dtype=torch.bool)
    kept[torch.randperm(count, generator=seeded(seed))[:keep]] = True
    rows: list[Tensor] = []
    classes: list[Tensor] = []
    done, total, products = 0, torch.zeros(0), torch.zeros(0)
    with tqdm(total=count, desc="features", unit="img", disable=None if progress else True) as bar:
        for batch in batches:
            features, scores = network(batch)
            if done == 0:
                total = torch.zeros(features.shape[1], dtype=torch.float64)
                products = torch.zeros(2 * features.shape[1:], dtype=torch.float64)
            if done + len(batch) > count:
                raise ValueError(f"more than the {count} images that were announced")
            rows.append(features[kept[done : done + len(batch)]])
            if logits and scores is not None:
                classes.append(scores)
            exact = features.double()
            total += exact.sum(0)
            products.addmm_(exact.T, exact)
            done += len(batch)
            bar.update(len(batch))
    if done < count:
        raise ValueError(f"only {done} of {count} images came")
    mean = total / count
    covariance = (products - count * mean.outer(mean)) / (count - 1)
    statistics = FeatureStatistics(mean, covariance, count, network.name, network.digest, images or {})
    return Features(statistics, torch.cat(rows), torch.cat(classes) if classes else None)


def figure_names(network: str) -> dict[str, str]:
    """What the scores are called; FID, KID and Inception Score with Inception alone."""
    if network == INCEPTION:
        return dict(zip(SCORES, ("FID", "KID", "Inception Score"), strict=True))
    titles = ("Fréchet distance", "Kernel distance", "Classifier score")
    return {score: f"{title} ({network})" for score, title in zip(SCORES, titles, strict=True)}


def frechet_distance(samples: FeatureStatistics, reference: FeatureStatistics) -> float:
    """|mean - mean'|^2 + tr(C + C' - 2 (C C')^(1/2)), which is never negative: it is a squared distance of Gaussians.

    The root is computed from eigenvalues, whose rounding errors, about 1e-16 of the traces before the root is taken,
    can leave identical sets at -1e-6; such a value is given as 0.

    Raises:
        ValueError: statistics of two networks.
        ImportError: no torchmetrics.
    """
    if samples.network_digest != reference.network_digest:
        raise ValueError(f"statistics of {samples.network} and of {reference.network} cannot be compared")
    width = len(samples.mean)
    for name, side in (("samples", samples), ("reference images", reference)):
        if side.count <= width:
            logger.warning(
                "%d %s have a singular covariance in %d features: the Fréchet distance is biased upwards; "
                "compare it with figures of as many images alone",
                side.count,
                name,
                width,
            )
    metric = _metric("fid", "FrechetInceptionDistance", width)
    for prefix, side in (("fake", samples), ("real", reference)):
        states = {name: getattr(metric, f"{prefix}_features_{name}") for name in ("sum", "cov_sum", "num_samples")}
        states["sum"].copy_(side.count * side.mean)
        states["cov_sum"].copy_((side.count - 1) * side.covariance + side.count * side.mean.outer(side.mean))
        states["num_samples"].fill_(side.count)
    metric.orig_dtype = torch.float64  # otherwise set by `update`: the dtype of the result
    with _seeded(0):
        return _at_least(float(metric.compute()), 0.0)


def _at_least(value: float, bound: float) -> float:
    """What rounding took below a bound that holds for exact values; NaN stays."""
    return bound if value < bound else value


def kernel_distance(
    samples: Tensor, reference: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation, over random subsets, of the unbiased MMD^2 with the kernel (x.y / D + 1)^3.

    Args:
        samples, reference: features [N, D] and [M, D].

    Raises:
        ValueError: fewer rows than `subset_size`.
        ImportError: no torchmetrics.
    """
    samples, reference = as_tensor(samples, "samples"), as_tensor(reference, "reference")
    if not 2 <= subset_size <= min(len(samples), len(reference)) or subsets < 1:
        raise ValueError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {len(samples)} samples and "
            f"{len(reference)} reference images; choose a smaller subset size"
        )
    options = {"subsets": subsets, "subset_size": subset_size}
    metric = _metric("kid", "KernelInceptionDistance", samples.shape[1], **options)
    metric.update(samples.double(), real=False)
    metric.update(reference.double(), real=True)
    with _seeded(seed):
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def classifier_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float | None]:
    """Mean and standard deviation (None of one) over random splits of exp(E[KL(p(y|x) || p(y))]), from logits [N, K].

    Raises:
        ValueError: the logits do not split into so many parts of nearly one size.
        ImportError: no torchmetrics.
    """
    logits = as_tensor(logits, "logits")
    check_splits(len(logits), splits)
    metric = _metric("inception", "InceptionScore", logits.shape[1], splits=splits)
    metric.update(logits.double())
    with _seeded(seed):
        mean, deviation = metric.compute()
    # torchmetrics divides by splits - 1; Inception Scores have been quoted with NumPy's deviation.
    mean = _at_least(float(mean), 1.0)  # exp of a divergence, which is never negative
    return mean, None if splits == 1 else float(deviation) * ((splits - 1) / splits) ** 0.5


def check_splits(count: int, splits: int) -> None:
    """
    Raises:
        ValueError: `torch.chunk` would not make so many parts, or some of one sample.
    """
    if splits < 1 or count < 2 * splits or -(-count // -(-count // splits)) != splits:
        raise ValueError(f"{count} samples do not split into {splits} parts; choose fewer splits")


class _Given(nn.Identity):
    """For metrics that want a network: their "images" are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _metric(module: str, name: str, width: int, **options: Any) -> Any:
    check_libraries()
    from torchmetrics.image import fid, inception, kid

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps features, which is what it is given
        return getattr({"fid": fid, "kid": kid, "inception": inception}[module], name)(_Given(width), **options)


def check_libraries() -> None:
    """
    Raises:
        ImportError: what scores generated images is missing, or does not fit torch.
    """
    try:
        from torchmetrics.image import fid, inception, kid  # noqa: F401
    except ImportError as error:  # with torch-fidelity but without torchvision, too
        raise ImportError(f"generation scores need torchmetrics ({error}): pip install 'bigbigan[eval]'") from error
    except RuntimeError as error:
        raise ImportError(MISMATCH.format(error)) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws from torch's own generator, which stays as it was; it also warns of unusual calls."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.default_generator.manual_seed(as_seed(seed))
        yield
