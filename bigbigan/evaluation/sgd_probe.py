"""Linear probe by the paper's protocol: Adam from zero weights, several learning rates, averaged weights.

The paper (Donahue & Simonyan, 2019, appendix) leaves some of it open, as the defaults below say.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bigbigan.arrays import as_tensor, seeded
from bigbigan.evaluation.linear_probe import check_holdout, class_indices
from bigbigan.evaluation.rows import Rows, as_rows, chunks, select

logger = logging.getLogger(__name__)

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # "several"; which ones is not settled
STEPS = 100_000  # not settled
BATCH_SIZE = 2048  # not settled: that of the model's training
EMA = 0.9999

Batch = tuple[Mapping[str, Tensor], Tensor]  # features [B, D] by name, labels [B]


@dataclass(frozen=True)
class PaperProbeResult:
    """What `paper_probe` measured of one kind of features; accuracies are fractions of 1."""

    accuracy: float
    top5: float | None  # None below six classes
    lr: float
    holdout_accuracy: dict[float, float]  # by learning rate
    n_train: int  # without the held-out rows
    n_test: int
    num_features: int


def paper_probe(
    train_x: Mapping[str, Rows],
    train_y: Tensor,
    test_x: Mapping[str, Rows],
    test_y: Tensor,
    *,
    lrs: Sequence[float] = LEARNING_RATES,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    ema: float = EMA,
    holdout: int = 10_000,
    augmented: Callable[[Tensor], Iterator[Batch]] | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> dict[str, PaperProbeResult]:
    """Accuracy on the test rows of linear classifiers on each kind of features, all trained in one pass.

    A classifier a learning rate starts from zero and is trained by Adam on features as they are, in batches of
    shuffled rows that are read when their turn comes. Its weights' moving average is judged: on the last `holdout`
    rows of a seeded permutation of the training set, which choose the rate (of equally good ones the first) and are
    not trained on, and then, of that rate alone, on the test rows.

    Args:
        train_x, test_x: features [N, D] and [M, D] by name; D may differ between names.
        train_y, test_y: integer labels [N] and [M] from 0; every test label must occur in training.
        batch_size: or the number of training rows, if that is less.
        augmented: given the numbers of the rows to train on, an endless iterator of batches that takes the place of
            rows of `train_x`: features of freshly augmented images, and labels as in `train_y`.

    Raises:
        ValueError: for shapes, labels, non-finite features or settings that do not fit.
    """
    if list(train_x) != list(test_x) or not train_x:
        raise ValueError(f"training has features {list(train_x)}, test {list(test_x)}; give the same, at least one")
    train_x, test_x = ({name: as_rows(x) for name, x in part.items()} for part in (train_x, test_x))
    train_y, test_y = as_tensor(train_y, "train_y"), as_tensor(test_y, "test_y")
    for name in train_x:
        if len(train_x[name].shape) != 2 or len(test_x[name].shape) != 2:
            shapes = f"{list(train_x[name].shape)} in training, {list(test_x[name].shape)} in test"
            raise ValueError(f"{name} is {shapes}; expected [N, D] and [M, D]")
        if train_x[name].shape[1] != test_x[name].shape[1]:
            raise ValueError(f"{name}: {train_x[name].shape[1]} features in training, {test_x[name].shape[1]} in test")
    if not lrs or min(lrs) <= 0 or min(steps, batch_size) < 1 or not 0 <= ema < 1:
        raise ValueError(f"lrs {list(lrs)}, steps {steps}, batch_size {batch_size}, ema {ema} do not fit: the first "
                         "three are positive, ema is from 0 to below 1")  # fmt: skip
    sizes = [len(rows) for rows in (*train_x.values(), *test_x.values())]
    if sizes != [len(train_y)] * len(train_x) + [len(test_y)] * len(test_x):
        raise ValueError(f"features have {sizes} rows, labels {len(train_y)} and {len(test_y)}; one label a row")
    classes, train_y, test_y = class_indices(train_y, test_y)
    check_holdout(holdout, len(train_y))
    order = torch.randperm(len(train_y), generator=seeded(seed))
    fit, held = order[:-holdout].sort().values, order[-holdout:].sort().values
    batches = augmented(fit) if augmented else _shuffled(train_x, train_y, fit, min(batch_size, len(fit)), seed)
    probes = {name: StackedClassifiers(rows.shape[1], len(classes), lrs, ema, device) for name, rows in train_x.items()}
    bar = tqdm(
        itertools.islice(batches, steps), "linear probes", steps, unit="step", disable=None if progress else True
    )
    for features, y in bar:
        target = torch.searchsorted(classes, y) if augmented else y
        for name, probe in probes.items():
            probe.step(features[name], target)
    return {
        name: _judge(probe, train_x[name], train_y, held, test_x[name], test_y, name) for name, probe in probes.items()
    }


class StackedClassifiers:
    """Linear classifiers, one a learning rate, trained together on the same batches; each as if it were alone.

    weight [L, D, K] and bias [L, K] start from zero, as do their moving averages: that scales logits of all classes
    alike, and so changes no decision.
    """

    def __init__(
        self, num_features: int, num_classes: int, lrs: Sequence[float], ema: float, device: str | torch.device = "cpu"
    ) -> None:
        self.lrs, self._ema = tuple(lrs), ema
        self.weight = torch.zeros(len(lrs), num_features, num_classes, device=device)
        self.bias = torch.zeros(len(lrs), num_classes, device=device)
        self.average = (self.weight.clone(), self.bias.clone())
        groups = [{"params": [self.weight[i], self.bias[i]], "lr": lr} for i, lr in enumerate(lrs)]
        self._optimizer = torch.optim.Adam(groups)

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step of each classifier on features [B, D] and labels [B]."""
        x, y = x.to(self.weight), y.to(self.weight.device)
        if not x.isfinite().all():
            raise ValueError("a batch of training features holds NaN or infinity")
        wide = x.expand(len(self.lrs), -1, -1)
        residual = torch.baddbmm(self.bias[:, None], wide, self.weight).softmax(2)  # [L, B, K]
        residual = (residual - F.one_hot(y, residual.shape[2])) / len(x)  # gradient of the mean cross-entropy
        weight_grad, bias_grad = torch.bmm(wide.transpose(1, 2), residual), residual.sum(1)
        for i, group in enumerate(self._optimizer.param_groups):
            weight, bias = group["params"]
            weight.grad, bias.grad = weight_grad[i], bias_grad[i]
        self._optimizer.step()
        for average, value in zip(self.average, (self.weight, self.bias), strict=True):
            average.lerp_(value, 1 - self._ema)

    def top_k(self, x: Rows, y: Tensor, k: int) -> list[float]:
        """Of each classifier's averaged weights, the share of rows whose label is among its k largest logits."""
        right = torch.zeros(len(self.lrs), dtype=torch.long)
        done = 0
        for rows in chunks(x):
            if not rows.isfinite().all():
                raise ValueError(f"features hold NaN or infinity between rows {done} and {done + len(rows)}")
            target, done = y[done : done + len(rows)].cpu(), done + len(rows)
            wide = rows.to(self.weight).expand(len(self.lrs), -1, -1)
            found = torch.baddbmm(self.average[1][:, None], wide, self.average[0]).topk(k, dim=2).indices.cpu()
            right += (found == target[None, :, None]).any(2).sum(1)
        return (right.double() / len(y)).tolist()


def _shuffled(
    x: Mapping[str, Rows], y: Tensor, fit: Tensor, batch_size: int, seed: int
) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
    """Endless batches of the rows `fit`, each epoch in another order; its last rows that fill no batch are left out."""
    generator = seeded(seed)
    while True:
        order = fit[torch.randperm(len(fit), generator=generator)]
        for batch in order[: len(fit) // batch_size * batch_size].split(batch_size):
            index = batch.sort().values  # a disk likes that better, and the mean does not mind
            yield {name: rows[index] for name, rows in x.items()}, y[index]


def _judge(
    probe: StackedClassifiers, train_x: Rows, train_y: Tensor, held: Tensor, test_x: Rows, test_y: Tensor, name: str
) -> PaperProbeResult:
    scores = probe.top_k(select(train_x, held), train_y[held], 1)
    best = max(range(len(scores)), key=scores.__getitem__)
    if len(scores) > 1 and probe.lrs[best] in (min(probe.lrs), max(probe.lrs)):
        logger.warning(
            "%s: the best learning rate, %g, is at the edge of %s: widen it", name, probe.lrs[best], probe.lrs
        )
    return PaperProbeResult(
        accuracy=probe.top_k(test_x, test_y, 1)[best],
        top5=probe.top_k(test_x, test_y, 5)[best] if probe.bias.shape[1] > 5 else None,
        lr=probe.lrs[best],
        holdout_accuracy=dict(zip(probe.lrs, scores, strict=True)),
        n_train=len(train_y) - len(held),
        n_test=len(test_y),
        num_features=train_x.shape[1],
    )
