"""Whatever is wrong with a run folder, training says so: it refuses, or falls back loudly; it never goes on silently.

    python -m tests.attacks.silent_resume

Every file of the newest checkpoint is removed, has one bit flipped, is cut short, or is swapped with the same file of
an older checkpoint, of a run with another seed, or with the next file beside it. Then whole checkpoints are swapped
between the two runs and renamed; config.json, the settings and the data are changed. A fall-back has to name the
damaged checkpoint and to end where the undamaged run ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bigbigan.commands.training import apply_settings
from bigbigan.data.opening import open_dataset
from bigbigan.schema import ConfigError
from bigbigan.training.checkpoint import CheckpointError
from bigbigan.training.config import TrainConfig
from bigbigan.training.loop import train
from bigbigan.training.recipes import RECIPES
from tests.attacks.training_run import BATCH, SETTINGS, make_data, result

STEPS = 4


def configuration(**settings: object) -> TrainConfig:
    changes = {**SETTINGS, "total_images": STEPS * BATCH, "checkpoint_images": BATCH, **settings}
    recipe = RECIPES["bigbigan-fashion-mnist-32"]
    return apply_settings(recipe, [f"{key}={json.dumps(value)}" for key, value in changes.items()])


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextlib.contextmanager
def _warnings() -> Iterator[list[str]]:
    handler, logger = _Log(), logging.getLogger("bigbigan")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


class Attack:
    """Two runs, of which one is copied, damaged and told to go on."""

    def __init__(self, work: Path):
        self.work, self.number = work, 0
        self.counts = {"refused": 0, "fell_back": 0}
        self.data = make_data(work / "data")
        for name, seed in (("a", 0), ("b", 1)):
            config = configuration(seed=seed)
            for _ in range(STEPS - 1):
                train(config, open_dataset(self.data), work / name, max_minutes=1e-9)
        shutil.copytree(work / "a", work / "whole")
        train(configuration(), open_dataset(self.data), work / "whole")
        self.wanted = result(work / "whole")

    def __call__(
        self,
        what: str,
        damage: Callable[[Path], object],
        *,
        naming: str,
        fall_back: bool = True,
        data: Path | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        """Fails unless the damaged run is refused in words that have `naming`, or falls back in such, where it may."""
        self.number += 1
        run = self.work / f"run-{self.number}"
        shutil.copytree(self.work / "a", run)
        damage(run)
        with _warnings() as lines:
            try:
                train(config or configuration(), open_dataset(data or self.data), run)
            except (CheckpointError, ConfigError) as error:
                assert naming in str(error), f"{what}: {error}"
                self.counts["refused"] += 1
                return
        assert fall_back, f"{what}: not refused"
        assert any(naming in line for line in lines), f"{what}: silent; {lines}"
        assert result(run) == self.wanted, f"{what}: fell back to something else"
        self.counts["fell_back"] += 1


def newest(run: Path, back: int = 1) -> Path:
    return sorted((run / "checkpoints").iterdir())[-back]


def swap(a: Path, b: Path) -> None:
    aside = a.with_name("aside")
    a.rename(aside), b.rename(a), aside.rename(b)


def flip(file: Path, moments: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[moments.randrange(len(data))] ^= 1 << moments.randrange(8)
    file.write_bytes(data)


def damages(work: Path, name: str, beside: str, moments: random.Random) -> dict[str, Callable[[Path], object]]:
    def other(run: Path) -> None:
        shutil.copyfile(newest(work / "b") / name, newest(run) / name)

    return {
        "remove": lambda run: (newest(run) / name).unlink(),
        "flip": lambda run: flip(newest(run) / name, moments),
        "cut": lambda run: (newest(run) / name).write_bytes((newest(run) / name).read_bytes()[:-1]),
        "older": lambda run: shutil.copyfile(newest(run, 2) / name, newest(run) / name),
        "other run": other,
        "beside": lambda run: swap(newest(run) / name, newest(run) / beside),
    }


def attack_files(attack: Attack, moments: random.Random, every: int = 1) -> None:
    names = sorted(path.name for path in newest(attack.work / "a").iterdir())
    for number, name in enumerate(names):
        kinds = damages(attack.work, name, names[number - 1], moments)
        for place, (kind, damage) in enumerate(kinds.items()):
            if (number + place) % every == 0:
                attack(f"{kind} {name}", damage, naming=newest(attack.work / "a").name)


def attack_runs(attack: Attack) -> None:
    """Whole checkpoints, configurations and data."""

    def exchange(run: Path) -> None:
        shutil.rmtree(newest(run))
        shutil.copytree(newest(attack.work / "b"), newest(run, 1).with_name(newest(attack.work / "b").name))

    def forge(run: Path) -> None:  # a run that says it is the other one
        shutil.copyfile(attack.work / "b" / "config.json", run / "config.json")

    def edit(run: Path) -> None:
        file = run / "config.json"
        file.write_text(file.read_text().replace('"lr_g": ', '"lr_g": 1'))

    def both(run: Path) -> None:
        for back in (1, 2):
            (newest(run, back) / "manifest.json").unlink()

    def renamed(run: Path) -> None:
        newest(run).rename(newest(run).with_name("step-00000009"))

    last, other_data = newest(attack.work / "a").name, make_data(attack.work / "other", seed=1)
    attack("checkpoint of another seed", exchange, naming="train.seed was 1, now 0", fall_back=False)
    attack("config.json of another run", forge, naming="train.seed was 1, now 0", fall_back=False)
    attack("config.json edited", edit, naming="train.lr_g was 1", fall_back=False)
    attack("config.json gone", lambda run: (run / "config.json").unlink(), naming="train.lr_g was",
           config=configuration(lr_g=0.5), fall_back=False)  # fmt: skip
    attack("config.json cut", lambda run: (run / "config.json").write_text("{"), naming="is no JSON", fall_back=False)
    attack("other settings", lambda run: None, naming="train.lr_g was", config=configuration(lr_g=0.5), fall_back=False)
    attack("other data", lambda run: None, naming="data.digest was", data=other_data, fall_back=False)
    attack("every checkpoint damaged", both, naming="no checkpoint in", fall_back=False)
    attack("checkpoint renamed", renamed, naming="is of step")
    attack("checkpoints gone", lambda run: [shutil.rmtree(newest(run)) for _ in range(2)], naming="holds no checkpoint")
    attack("newest checkpoint emptied", lambda run: [file.unlink() for file in newest(run).iterdir()], naming=last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take each N-th damage of a file only")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        attack = Attack(Path(work))
        attack_files(attack, random.Random(0), options.every)
        attack_runs(attack)
        print(json.dumps({"attacks": attack.number, **attack.counts, "seconds": round(time.monotonic() - start)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
