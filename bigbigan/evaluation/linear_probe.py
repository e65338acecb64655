"""Linear probe: multinomial logistic regression on frozen features, with its L2 strength chosen on held-out rows."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bigbigan.arrays import as_tensor, seeded
from bigbigan.evaluation.rows import Rows, as_rows, column_mean

logger = logging.getLogger(__name__)

# Rows a step of the objective: a chunk is still in cache when its gradient reads it again.
CHUNK = 1024
MAX_WIDTH = 32_768  # a matrix of that side takes 8 GiB


@dataclass(frozen=True)
class LinearProbeResult:
    """What `linear_probe` measured; accuracies are fractions of 1."""

    accuracy: float
    top5: float | None  # None below six classes
    l2: float
    holdout_accuracy: dict[float, float]  # by L2 strength; empty if there was one only
    n_train: int
    n_test: int
    num_features: int


def linear_probe(
    train_x: Rows,
    train_y: Tensor,
    test_x: Rows,
    test_y: Tensor,
    *,
    l2_grid: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5),
    holdout: int = 10_000,
    standardize: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> LinearProbeResult:
    """Accuracy on the test rows of a linear classifier trained on the training rows.

    The last `holdout` rows of a seeded permutation of the training set choose the L2 strength (of equally good ones
    the strongest); the classifier is then fitted again on all training rows and tested once. Features are centred,
    and scaled to unit deviation if `standardize`, by the statistics of the rows fitted on; constant columns become 0.

    Args:
        train_x: features [N, D]; fitted in float32, or in float64 if they come so.
        train_y: integer labels [N] from 0, which need not be consecutive.
        test_x, test_y: the same, [M, D] and [M]; every test label must occur in training.
        progress: show a bar on a terminal's stderr.

    Raises:
        ValueError: for shapes, dtypes, labels, non-finite features, L2 strengths or a `holdout` that do not fit.
    """
    train_x, test_x = as_rows(train_x), as_rows(test_x)
    train_y, test_y = as_tensor(train_y, "train_y"), as_tensor(test_y, "test_y")
    if len(train_x.shape) == 2:
        check_width(*train_x.shape)
    train_x, test_x = _features(train_x, "train_x"), _features(test_x, "test_x")
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"train_x has {train_x.shape[1]} features a row, test_x has {test_x.shape[1]}")
    for name, y, x in (("train", train_y, train_x), ("test", test_y, test_x)):
        if y.is_floating_point() or y.shape != x.shape[:1]:
            raise ValueError(
                f"{name}_y is {y.dtype} of shape {tuple(y.shape)}; expected integers [{len(x)}], one a row of {name}_x"
            )
    classes, train_y, test_y = class_indices(train_y.to(train_x.device), test_y.to(test_x.device))

    grid = sorted({float(l2) for l2 in l2_grid}, reverse=True)
    if not grid or not all(0 < l2 < float("inf") for l2 in grid):
        raise ValueError(f"l2_grid is {tuple(l2_grid)}; give one or more positive numbers")
    if len(grid) > 1:
        check_holdout(holdout, len(train_x))

    best, start, scores = grid[0], None, {}
    with tqdm(total=len(grid) + 1, desc="linear probe", unit="fit", disable=None if progress else True) as bar:
        if len(grid) > 1:
            order = torch.randperm(len(train_x), generator=seeded(seed)).to(train_x.device)
            fit, held = order[:-holdout], order[-holdout:]
            x, held_x = _reduced(*_standardize(train_x[fit], train_x[held], scale=standardize))
            solutions = {}
            # Ten times the final tolerance: raw Fashion-MNIST pixels tell the two apart by less than 0.001.
            for l2, weight, bias in logistic_path(x, train_y[fit], grid, num_classes=len(classes), tolerance=1e-4):
                solutions[l2], scores[l2] = (weight, bias), _top_k_accuracy(held_x, train_y[held], weight, bias, 1)
                bar.update()
            best = max(grid, key=scores.__getitem__)  # the first of equals
            start = None if x.shape[1] < train_x.shape[1] else solutions[best]  # of other coordinates
            del x, held_x  # before the copy for the last fit
            if best in (grid[0], grid[-1]):
                logger.warning("the best L2 strength, %g, is at the edge of the grid %s: widen it", best, grid)
        x, test_x = _reduced(*_standardize(train_x, test_x, scale=standardize))
        _, weight, bias = next(logistic_path(x, train_y, [best], num_classes=len(classes), start=start))
        bar.update()
    return LinearProbeResult(
        accuracy=_top_k_accuracy(test_x, test_y, weight, bias, 1),
        top5=_top_k_accuracy(test_x, test_y, weight, bias, 5) if len(classes) > 5 else None,
        l2=best,
        holdout_accuracy=scores,
        n_train=len(train_x),
        n_test=len(test_x),
        num_features=train_x.shape[1],
    )


def logistic_path(
    x: Tensor,
    y: Tensor,
    l2_grid: Sequence[float],
    *,
    num_classes: int,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yields (l2, weight [K, D], bias [K]) in the order of `l2_grid`, each fit started from the one before.

    Each minimises mean cross-entropy + l2 / 2 * |weight|^2, the bias free, by full-batch L-BFGS until no component of
    the preconditioned gradient exceeds `tolerance`; a fit that stops before says so in the log. Memory bandwidth sets
    the pace, so x [N, D] is read in its own dtype; parameters, loss and sums over chunks are float64. Centre x: an
    offset changes the bias only, but slows the fit.

    The Hessian is at most B = X'X / 2N + l2 on each class's weights (Böhning 1992, "Multinomial logistic regression
    algorithm"). With B = LL', L-BFGS runs on weight @ L, whose Hessian is at most the identity: on correlated
    features several times fewer passes over the data than on the weights themselves.
    """
    weight, bias = start if start is not None else (x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    weight, bias = weight.double(), bias.double()
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for chunk in x.split(CHUNK):
        gram.addmm_(chunk.double().T, chunk.double())
    for l2 in l2_grid:
        bound = gram / (2 * len(x))
        bound.diagonal().add_(l2)
        objective = _Objective(x, y, l2, torch.linalg.cholesky(bound))
        weight, bias = objective.minimize(weight, bias, tolerance, max_iterations)
        yield l2, weight, bias


@dataclass(frozen=True)
class _Objective:
    x: Tensor
    y: Tensor
    l2: float
    root: Tensor  # L

    def minimize(self, weight: Tensor, bias: Tensor, tolerance: float, max_iterations: int) -> tuple[Tensor, Tensor]:
        scaled, bias = (weight @ self.root).contiguous(), bias.clone()
        optimizer = torch.optim.LBFGS(
            [scaled, bias],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=1e-14,  # ends a line search that rounding has stalled
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self.evaluate(scaled, bias))
        self.evaluate(scaled, bias)  # the last point tried need not be the one kept
        slope = max(p.grad.abs().max().item() for p in (scaled, bias) if p.grad is not None)
        if slope > tolerance:
            logger.warning("L2 %g: L-BFGS stopped at gradient %.1e, short of %.1e", self.l2, slope, tolerance)
        return self.unscale(scaled), bias

    def unscale(self, scaled: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.root, scaled, upper=False, left=False)

    def evaluate(self, scaled: Tensor, bias: Tensor) -> Tensor:
        """The objective; its gradients go to `.grad`. By hand, so that no chunk outlives its turn."""
        weight = self.unscale(scaled)
        loss, weight_grad, bias.grad = _cross_entropy(self.x, self.y, weight, bias)
        weight_grad += self.l2 * weight
        scaled.grad = torch.linalg.solve_triangular(self.root.T, weight_grad, upper=True, left=False).contiguous()
        return loss + self.l2 / 2 * weight.square().sum()


def _cross_entropy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean cross-entropy and its gradients by weight and bias, in float64."""
    loss, weight_grad, bias_grad = bias.new_zeros(()), torch.zeros_like(weight), torch.zeros_like(bias)
    narrow = weight.to(x.dtype)
    for chunk, target in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        log_probs = F.log_softmax(F.linear(chunk, narrow).double() + bias, dim=1)  # [chunk, K]
        loss += F.nll_loss(log_probs, target, reduction="sum")
        residual = log_probs.exp_() - F.one_hot(target, len(bias))
        bias_grad += residual.sum(0)
        weight_grad += residual.to(x.dtype).T @ chunk
    return loss / len(x), weight_grad / len(x), bias_grad / len(x)


def _top_k_accuracy(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, k: int) -> float:
    logits = F.linear(x, weight.to(x.dtype)) + bias
    return (logits.topk(k, dim=1).indices == y[:, None]).any(1).double().mean().item()


def _standardize(fit: Tensor, other: Tensor, *, scale: bool) -> tuple[Tensor, Tensor]:
    """Both by the mean and deviation of `fit`. As the bias is free, centring changes the pace but no solution."""
    mean = column_mean(fit).to(fit)
    centred, other = fit - mean, other - mean
    # Compared exactly: rounding leaves the deviation of a constant column small but not zero.
    factor = (fit.amax(0) > fit.amin(0)).to(fit.dtype)
    if scale:
        inverse = (1 / column_mean(centred, torch.square).sqrt()).to(fit)  # infinite where it is too small for float32
        factor = torch.where((factor > 0) & inverse.isfinite(), inverse, 0)
    return centred.mul_(factor), other.mul_(factor)


def _reduced(fit: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the span of the rows of `fit`, if these are fewer than their columns: no penalised solution leaves it."""
    if fit.shape[1] <= len(fit):
        return fit, other
    basis = torch.linalg.qr(fit.T)[0]
    return fit @ basis, other @ basis


def _features(x: Rows, name: str) -> Tensor:
    x = x[:]  # stored rows are read once: every step of the fit needs them all
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected [N, D], neither of them 0")
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    bad = ~x.isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(f"{name} has {int(bad.sum())} rows with NaN or infinity, the first is row {first}")
    return x


def class_indices(train_y: Tensor, test_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The labels that occur in training, ascending, and training and test labels as indices into them.

    Raises:
        ValueError: negative labels, one class alone, or test labels that training lacks.
    """
    for name, y in (("train", train_y), ("test", test_y)):
        if negative := int((y < 0).sum()):
            raise ValueError(f"{name}_y has {negative} negative labels (unlabelled rows?): leave those rows out")
    classes, indices = train_y.long().unique(return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"train_y holds the one label {classes.item()}; a probe needs two classes or more")
    unseen = test_y[~torch.isin(test_y, classes.to(test_y.device))].unique().tolist()
    if unseen:
        raise ValueError(f"test_y has labels that train_y lacks: {unseen[:10]}")
    return classes, indices, torch.searchsorted(classes.to(test_y.device), test_y.long())


def check_holdout(holdout: int, number: int) -> None:
    """
    Raises:
        ValueError: of `number` training rows, so many cannot be held out.
    """
    if not 0 < holdout < number:
        raise ValueError(f"holdout is {holdout}; of {number} training rows, hold out 1 to {number - 1}")


def check_width(number: int, width: int) -> None:
    """
    Raises:
        ValueError: logistic regression on [number, width] features would not fit into the memory.
    """
    if min(number, width) > MAX_WIDTH:
        raise ValueError(
            f"logistic regression on {number} rows of {width} features needs {MAX_WIDTH} at most of either: take "
            "fewer features, as their principal components, or the paper's protocol"
        )
    needed, memory = 12 * number * width, memory_bytes()  # float32: the rows, the part fitted on, and it standardised
    if memory and needed > memory:
        raise ValueError(
            f"logistic regression on {number} rows of {width} features takes {needed / 2**30:.1f} GiB of this "
            f"machine's {memory / 2**30:.1f}: take fewer of them, or the paper's protocol on features that are not "
            "augmented (--protocol paper --augment none)"
        )


def memory_bytes() -> int:
    """Of the machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):  # Windows
        return 0


def labelled_subset(labels: Tensor, fraction: float, *, seed: int = 0) -> Tensor:
    """Numbers, ascending, of a share of the rows drawn at random from each class: rounded, and at least one a class.

    A smaller share of the same seed is part of a larger one.

    Args:
        labels: integers [N], not negative.

    Raises:
        ValueError: `fraction` is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a share of labels is {fraction}; give numbers above 0, at most 1 (0.01 for one percent)")
    labels = as_tensor(labels, "labels")
    order = torch.randperm(len(labels), generator=seeded(seed))
    shuffled = labels.cpu()[order]
    chosen = []
    for label in labels.unique().tolist():
        rows = order[shuffled == label]
        chosen.append(rows[: max(1, round(fraction * len(rows)))])
    return torch.cat(chosen).sort().values
