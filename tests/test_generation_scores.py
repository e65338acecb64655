"""Scores of generated images: against closed forms, SciPy and NumPy; statistics in files; networks."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigbigan import create_model
from bigbigan.evaluation.feature_networks import INCEPTION, FeatureNetwork, encoder_network, inception_network
from bigbigan.evaluation.generation import (
    FeatureStatistics,
    check_libraries,
    classifier_score,
    collect_features,
    figure_names,
    frechet_distance,
    kernel_distance,
)
from bigbigan.evaluation.protocols.image_sets import given_images

pytest.importorskip("torchmetrics")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), count, "net", "0" * 64)


def first_pixels(number: int = 6, digest: str = "1" * 64) -> FeatureNetwork:
    """Features and logits that can be told from the images."""

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        rows = images.flatten(1)[:, :number].float() / 16
        return rows, rows[:, :3]

    return FeatureNetwork("first pixels", digest, "nothing", forward)


def pictures(number: int, seed: int = 0, shift: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shift, 200, (number, 1, 4, 4), generator=generator, dtype=torch.uint8)


def test_frechet_distance_of_gaussians_in_closed_form() -> None:
    """Diagonal covariances: |m - m'|^2 + sum (s - s')^2, with s the standard deviations."""
    one = statistics(torch.tensor([1.0, 2.0, 3.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    two = statistics(torch.tensor([1.0, 4.0, 0.0]), torch.diag(torch.tensor([4.0, 4.0, 1.0])), count=50)
    assert frechet_distance(one, two) == pytest.approx(4 + 9 + 1 + 0 + 4, abs=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_as_by_scipy() -> None:
    scipy = pytest.importorskip("scipy.linalg")
    x, y = draw(0, 500, 12) @ draw(1, 12, 12) + 3, draw(2, 700, 12) @ draw(3, 12, 12)
    c, d = (np.cov(rows.numpy(), rowvar=False) for rows in (x, y))
    gap = (x.mean(0) - y.mean(0)).numpy()
    wanted = gap @ gap + np.trace(c + d - 2 * np.real(scipy.sqrtm(c @ d)))
    sides = [statistics(rows.mean(0), torch.from_numpy(cov), len(rows)) for rows, cov in ((x, c), (y, d))]
    assert frechet_distance(*sides) == pytest.approx(wanted, rel=1e-9)


def test_collected_statistics_are_numpys_and_batches_do_not_matter() -> None:
    images = pictures(53)
    rows = images.flatten(1)[:, :6].double().numpy() / 16
    for size in (53, 7):
        found = collect_features(images.split(size), 53, first_pixels(), keep=20, logits=True, seed=3)
        np.testing.assert_allclose(found.statistics.mean, rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.statistics.covariance, np.cov(rows, rowvar=False), rtol=1e-9)
        assert found.statistics.count == 53
        chosen = torch.randperm(53, generator=torch.Generator().manual_seed(3))[:20].sort().values
        assert np.array_equal(found.rows, rows[chosen])
        assert np.array_equal(found.logits, rows[:, :3])
    assert len(collect_features(images.split(9), 53, first_pixels(), keep=999).rows) == 53


def test_a_singular_covariance_is_told(caplog: pytest.LogCaptureFixture) -> None:
    few, many = (collect_features([pictures(n)], n, first_pixels()).statistics for n in (6, 100))
    frechet_distance(many, many)
    assert not caplog.text
    frechet_distance(few, many)
    assert "6 samples have a singular covariance in 6 features" in caplog.text


@pytest.mark.parametrize(
    "batches, count, message", [([3], 4, "only 3 of 4"), ([3, 3], 4, "more than the 4"), ([1], 1, "at least 2")]
)
def test_a_wrong_number_of_images_is_refused(batches: list[int], count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collect_features(map(pictures, batches), count, first_pixels())


def unbiased_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Eq. 4 of Bińkowski et al. for the kernel (x.y / D + 1)^3, of m rows each."""
    m, d = x.shape
    kxx, kyy, kxy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (kxx.sum() - np.trace(kxx) + kyy.sum() - np.trace(kyy)) / (m * (m - 1))
    return within - 2 * kxy.mean()


def test_kernel_distance_as_by_numpy() -> None:
    x, y = draw(0, 40, 5), draw(1, 40, 5) + 0.5
    mean, deviation = kernel_distance(x, y, subsets=3, subset_size=40)  # all rows in each subset
    assert mean == pytest.approx(unbiased_mmd(x.numpy(), y.numpy()), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-12)
    by_hand = kernel_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]]), subsets=1, subset_size=2)
    assert by_hand[0] == pytest.approx(1 + 1 - 2 * (1 + 1 + 1 + 27) / 4)  # k(0, .) = 1 and k(1, 2) = 27


def test_the_seed_decides_subsets_and_splits_and_global_state_stays() -> None:
    x, y = draw(0, 60, 5), draw(1, 80, 5)
    state = torch.get_rng_state()
    a, again, other = (kernel_distance(x, y, subsets=4, subset_size=20, seed=seed) for seed in (0, 0, 1))
    assert a == again != other and a[1] > 0
    b, again, other = (classifier_score(x, splits=3, seed=seed) for seed in (0, 0, 1))
    assert b == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_classifier_score_by_hand_and_as_by_numpy() -> None:
    certain = 200.0 * torch.eye(4)[torch.arange(400) % 4]
    assert classifier_score(certain, splits=1) == (pytest.approx(4), None)
    assert classifier_score(torch.zeros(20, 4), splits=2) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    logits = draw(5, 300, 7)
    p = logits.softmax(1).numpy()
    wanted = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert classifier_score(logits, splits=1)[0] == pytest.approx(wanted, rel=1e-9)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2)).numpy()
    parts = [p[rows] for rows in np.split(order, 3)]
    scores = [np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()) for part in parts]
    wanted = (pytest.approx(np.mean(scores), rel=1e-9), pytest.approx(np.std(scores), rel=1e-6))
    assert classifier_score(logits, splits=3, seed=2) == wanted


def test_what_cannot_be_scored_is_refused() -> None:
    x = draw(0, 30, 4)
    with pytest.raises(ValueError, match="5 subsets of 31 cannot be drawn from 40 samples and 30 reference"):
        kernel_distance(draw(1, 40, 4), x, subsets=5, subset_size=31)
    for logits, splits in ((x, 16), (x[:12], 5), (x, 0)):
        with pytest.raises(ValueError, match=f"{len(logits)} samples do not split into {splits} parts"):
            classifier_score(logits, splits=splits)
    other = FeatureStatistics(torch.zeros(4), torch.eye(4), 9, "other", "2" * 64)
    with pytest.raises(ValueError, match="statistics of net and of other"):
        frechet_distance(statistics(torch.zeros(4), torch.eye(4)), other)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_statistics_survive_a_file_and_belong_to_a_network(tmp_path: Path, suffix: str) -> None:
    path, network = tmp_path / f"s{suffix}", first_pixels()
    facts = {"digest": "é" * 3, "split": "train[:9]", "resolution": 4}
    before = collect_features([pictures(30)], 30, network, images=facts).statistics
    before.save(path)
    after = FeatureStatistics.load(path, network)
    assert torch.equal(after.mean, before.mean) and torch.equal(after.covariance, before.covariance)
    assert (after.count, after.network, after.network_digest) == (30, "first pixels", network.digest)
    assert after.images == facts
    with pytest.raises(ValueError, match=r"is of the network first pixels \(111111111111\), not of first pixels"):
        FeatureStatistics.load(path, first_pixels(digest="2" * 64))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="holds no statistics written by --save-statistics"):
        FeatureStatistics.load(path, network)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "pytorch_fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(ValueError, match="pytorch_fid.npz holds no statistics"):
        FeatureStatistics.load(tmp_path / "pytorch_fid.npz", first_pixels())
    whole = FeatureStatistics(torch.zeros(4).double(), torch.eye(4).double(), 9, "pixels", first_pixels().digest, {})
    nan = torch.full((4,), torch.nan).double()
    for name, broken in (("nan.npz", replace(whole, mean=nan)), ("flat.npz", replace(whole, mean=nan[0]))):
        broken.save(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} holds torch.float64 \[.*: no statistics"):
            FeatureStatistics.load(tmp_path / name, first_pixels())
    with pytest.raises(FileNotFoundError):
        FeatureStatistics.load(tmp_path / "absent.npz", first_pixels())
    with pytest.raises(ValueError, match=r"statistics are .npz or .safetensors, not .pkl"):
        FeatureStatistics.load(tmp_path / "a.pkl", first_pixels())


def test_only_inception_gives_fid() -> None:
    assert figure_names(INCEPTION) == {"frechet": "FID", "kernel": "KID", "classifier": "Inception Score"}
    assert figure_names("efficientnet-lite0") == {
        "frechet": "Fréchet distance (efficientnet-lite0)",
        "kernel": "Kernel distance (efficientnet-lite0)",
        "classifier": "Classifier score (efficientnet-lite0)",
    }


def test_encoder_network_is_the_models_features() -> None:
    model = create_model("bigbigan-tiny", parts=("encoder",), seed=1)
    network = encoder_network(model)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features, logits = network(images)
    assert torch.equal(features, model.encode(images.float() / 127.5 - 1).avepool_feat) and logits is None
    grey = images[:, :1]
    assert torch.equal(network(grey)[0], network(grey.expand(-1, 3, -1, -1))[0])
    enlarged = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(network(enlarged)[0], features, rtol=0.1, atol=0.1)  # scaled back, but for its filter
    other = encoder_network(create_model("bigbigan-tiny", parts=("encoder",), seed=2))
    assert network.digest != other.digest
    with pytest.raises(ValueError, match="3 channels and the network takes 1"):
        encoder_network(create_model("bigan-mnist-mlp", parts=("encoder",)))(images)
    with pytest.raises(ValueError, match=r"torch.float32 \[3, 3, 32, 32\]; expected uint8"):
        network(images.float())


def test_features_that_are_none_are_refused() -> None:
    for made in (torch.full((3, 4), torch.nan), torch.zeros(2, 4), torch.zeros(3, 4, 1)):
        network = FeatureNetwork("bad", "", "", lambda _, made=made: (made, None))
        with pytest.raises(ValueError, match="bad gave features .* for 3 images; expected finite"):
            network(pictures(3))


class FakeInception(nn.Module):
    """The interface of torch-fidelity's, with the mean colours as features."""

    def __init__(self, name: str, features_list: list[str]) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048", "logits_unbiased"])
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3 and not self.training
        return x.float().mean((2, 3)) * self.weight, -x.float().mean((2, 3))


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module


def test_inception_gets_bytes_in_colour(torch_fidelity: types.ModuleType) -> None:
    network, images = inception_network(), pictures(5)
    features, logits = network(images)
    torch.testing.assert_close(features, images.float().mean((2, 3)).expand(-1, 3))
    assert torch.equal(logits, -features) and network.name == INCEPTION and len(network.digest) == 64


def test_what_inception_needs_is_named(torch_fidelity: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> nn.Module:
        raise OSError("<urlopen error Name or service not known>")

    torch_fidelity.FeatureExtractorInceptionV3 = offline
    with pytest.raises(OSError, match=r"cannot be fetched \(<urlopen error .*choose another network"):
        inception_network()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match="torch-fidelity and torchvision .*pip install torch-fidelity"):
        inception_network()


def test_a_torchvision_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unfit:
        def find_spec(self, name: str, *_: object) -> None:
            if name.startswith(("torchmetrics.image", "torch_fidelity")):
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.startswith(("torchmetrics.image", "torch_fidelity"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Unfit(), *sys.meta_path])
    for imports in (check_libraries, inception_network):
        with pytest.raises(ImportError, match="torchvision does not fit .*nms.*from the same index"):
            imports()


def test_arrays_are_known_by_their_suffix_in_any_case(tmp_path: Path) -> None:
    for name, save in (("A.NPY", np.save), ("A.NPZ", np.savez)):
        with open(tmp_path / name, "wb") as file:
            save(file, pictures(5).permute(0, 2, 3, 1).numpy())
        assert given_images(str(tmp_path / name)).count == 5


def test_no_set_is_nearer_to_itself_than_nothing() -> None:
    """Rounding used to leave identical sets at a negative distance."""
    found = []
    for seed in range(20):
        rows = torch.randn(30, 64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 5)
        network = FeatureNetwork("rows", "0" * 64, "nothing", lambda images, rows=rows: (rows, None))
        images = torch.zeros(30, 3, 2, 2, dtype=torch.uint8)
        statistics = collect_features([images], 30, network).statistics
        scale = statistics.covariance.trace().item()
        found.append(frechet_distance(statistics, statistics))
        assert 0 <= found[-1] < 1e-6 * scale
    assert 0.0 in found  # where rounding went below


def test_a_classifier_that_knows_nothing_scores_one() -> None:
    assert 1 <= classifier_score(torch.full((50, 7), 0.3), splits=5)[0] < 1 + 1e-12
    assert classifier_score(torch.randn(1, 9).expand(40, 9), splits=4)[0] >= 1.0
