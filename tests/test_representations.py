"""Features of other encoders, pixels and files, against what their own libraries would compute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from safetensors.numpy import save_file
from torch import Tensor, nn

from bigbigan import create_model
from bigbigan.config import PreprocessConfig
from bigbigan.encoder import crelu
from bigbigan.evaluation import (
    StoredRows,
    TensorImages,
    bn_crelu,
    compute_features,
    huggingface_features,
    model_features,
    module_features,
    pixels,
    principal_components,
    read_features,
    timm_features,
)
from bigbigan.evaluation import rows as evaluation_rows
from bigbigan.evaluation.encoding import encode_files, find_images
from bigbigan.evaluation.representations import logit
from bigbigan.images import preprocess
from bigbigan.layers import BatchNorm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def images(n: int = 30, side: int = 8, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator, dtype=torch.uint8)


def photo(width: int = 90, height: int = 61) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)).resize((90, 61))


class Net(nn.Module):
    """As timm's: pooled features of a normalised batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((2, 3))


def normalized(picture: Image.Image, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> Tensor:
    """torchvision's ToTensor and Normalize."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    return ((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]


def seen(representation: Any, picture: Image.Image) -> Tensor:
    x = preprocess(picture, representation.preprocess, representation.channels)
    (features,) = representation.features(x).values()
    return features


def test_any_module_with_its_normalisation() -> None:
    module = Net().train()
    found = module_features(module, PreprocessConfig(16), mean=MEAN, std=STD, name="mine")
    assert not module.training
    x = images(6, 16)
    expected = module((x.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None])
    torch.testing.assert_close(found.features(x.float() / 127.5 - 1)["features"], expected.detach())
    plain = module_features(module, PreprocessConfig(16), name="mine").features(x.float() / 127.5 - 1)["features"]
    torch.testing.assert_close(plain, module(x.float() / 127.5 - 1).detach(), rtol=1e-5, atol=1e-6)
    other = module_features(module, PreprocessConfig(16), mean=STD, std=STD, name="mine")
    assert found.digest != other.digest
    with torch.no_grad():
        module.norm.running_mean[0] += 1
    assert module_features(module, PreprocessConfig(16), mean=MEAN, std=STD, name="mine").digest != found.digest


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The part of timm that is used, with a network of its interface."""
    data = {
        "input_size": (3, 28, 28),
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    library = SimpleNamespace(net=Net().eval(), config=data, asked=[], __version__="1.0")

    def create_model(name: str, **options: Any) -> nn.Module:
        if name != "net":
            raise RuntimeError(f"Unknown model ({name})")
        library.asked.append(options)
        return library.net

    library.create_model = create_model
    library.data = SimpleNamespace(resolve_model_data_config=lambda model: library.config)
    monkeypatch.setitem(sys.modules, "timm", library)
    return library


def test_timm_gets_its_own_preprocessing(timm: SimpleNamespace) -> None:
    """The shorter side to 28 / 0.875 = 32, then the centre 28: as its own transform."""
    found = timm_features("net")
    assert timm.asked == [{"pretrained": True, "num_classes": 0}]
    square = photo().crop((15, 0, 76, 61)).resize((32, 32), Image.Resampling.BILINEAR).crop((2, 2, 30, 30))
    torch.testing.assert_close(seen(found, photo()), timm.net(normalized(square)).detach(), rtol=1e-4, atol=1e-5)
    timm.config |= {"crop_pct": 0.8}  # of 35 pixels: 3.5 on each side, where torchvision rounds to even
    square = photo().crop((15, 0, 76, 61)).resize((35, 35), Image.Resampling.BILINEAR).crop((4, 4, 32, 32))
    expected = timm.net(normalized(square)).detach()
    torch.testing.assert_close(seen(timm_features("net"), photo()), expected, rtol=1e-4, atol=1e-5)
    timm.config |= {"crop_mode": "squash", "crop_pct": 1.0, "interpolation": "bicubic"}
    squashed = photo().resize((28, 28), Image.Resampling.BICUBIC)
    expected = timm.net(normalized(squashed)).detach()
    torch.testing.assert_close(seen(timm_features("net"), photo()), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="timm:nat cannot be loaded: Unknown model"):
        timm_features("nat")
    timm.config["input_size"] = (3, 28, 32)
    with pytest.raises(ValueError, match=r"timm:net takes \(3, 28, 32\) images"):
        timm_features("net")


class Transformer(nn.Module):
    """As transformers' ViT: patches of 7, a first token, and a pooled output of it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.pooler = nn.Conv2d(3, 6, 7, 7), nn.Linear(6, 4)
        self.with_pooler = True

    def forward(self, pixel_values: Tensor) -> Any:
        tokens = self.patch(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.sum(1, keepdim=True), tokens], 1)
        return SimpleNamespace(
            last_hidden_state=tokens, pooler_output=self.pooler(tokens[:, 0]) if self.with_pooler else None
        )


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    settings = {
        "do_resize": True,
        "size": {"height": 28, "width": 28},
        "resample": 2,
        "do_normalize": True,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.3, 0.4],
        "rescale_factor": 1 / 255,
    }
    library = SimpleNamespace(model=Transformer().eval(), settings=settings, asked=[], __version__="5.0")

    def from_pretrained(name: str, **options: Any) -> Any:
        if name != "org/vit":
            raise OSError(f"{name} is not a local folder and is not a valid model identifier")
        library.asked.append(options)
        return library.model

    def processor(name: str, revision: str | None) -> Any:
        return SimpleNamespace(to_dict=lambda: library.settings)

    library.AutoModel = SimpleNamespace(from_pretrained=from_pretrained)
    library.AutoImageProcessor = SimpleNamespace(from_pretrained=processor)
    monkeypatch.setitem(sys.modules, "transformers", library)
    return library


def test_hugging_face_models_get_their_processors_settings(transformers: SimpleNamespace) -> None:
    model, mean, std = transformers.model, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    squashed = normalized(photo().resize((28, 28), Image.Resampling.BILINEAR), mean, std)
    out = model(squashed)
    digests = set()
    for pooling, expected in (
        ("pooled", out.pooler_output),
        ("cls", out.last_hidden_state[:, 0]),
        ("mean", out.last_hidden_state.mean(1)),
    ):
        found = huggingface_features("org/vit", pooling=pooling, revision="abc")
        digests.add(found.digest)
        torch.testing.assert_close(seen(found, photo()), expected.detach(), rtol=1e-4, atol=1e-5)
    assert len(digests) == 3
    assert transformers.asked[0] == {"revision": "abc", "use_safetensors": True}
    transformers.settings |= {
        "size": {"shortest_edge": 32},
        "do_center_crop": True,
        "crop_size": {"height": 28, "width": 28},
        "resample": 3,
    }
    square = photo().crop((15, 0, 76, 61)).resize((32, 32), Image.Resampling.BICUBIC).crop((2, 2, 30, 30))
    expected = model(normalized(square, mean, std)).pooler_output.detach()
    torch.testing.assert_close(seen(huggingface_features("org/vit"), photo()), expected, rtol=1e-4, atol=1e-5)
    model.config = SimpleNamespace(mask_ratio=0.75)  # as of masked autoencoders, random in eval mode too
    huggingface_features("org/vit")
    assert model.config.mask_ratio == 0
    del transformers.settings["crop_size"], transformers.settings["do_center_crop"]
    transformers.settings |= {"size": {"shortest_edge": 28}, "crop_pct": 0.875}  # ConvNeXT's way to say the same
    torch.testing.assert_close(seen(huggingface_features("org/vit"), photo()), expected, rtol=1e-4, atol=1e-5)


def test_hugging_face_models_that_cannot_be_used(transformers: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="hf:org/vat cannot be loaded: .* not a valid model identifier"):
        huggingface_features("org/vat")
    with pytest.raises(ValueError, match="pooling is 'max'; choose pooled, cls, mean"):
        huggingface_features("org/vit", pooling="max")
    transformers.model.with_pooler = False
    with pytest.raises(ValueError, match="has no pooler_output; use hf:org/vit:cls"):
        seen(huggingface_features("org/vit"), photo())
    transformers.settings["size"] = {"height": 28, "width": 32}
    with pytest.raises(ValueError, match="only squares"):
        huggingface_features("org/vit")
    transformers.settings["size"] = 28
    for key, value, message in (
        ("do_rescale", False, "has do_rescale False; only colours in"),
        ("do_color_quantize", True, "has do_color_quantize True"),
        ("image_mean", None, "names no image_mean"),
    ):
        before = dict(transformers.settings)
        transformers.settings[key] = value
        with pytest.raises(ValueError, match=message):
            huggingface_features("org/vit")
        transformers.settings.clear()
        transformers.settings |= before


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_absent_libraries_are_named(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"pip install {library}"):
        timm_features("net") if library == "timm" else huggingface_features("org/vit")


def test_principal_components_as_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    x = images(200, 4)
    config = PreprocessConfig(4)
    found = principal_components(x.split(33), 7, config, 3, data_digest="a")
    rows = compute_features(found, TensorImages(x))["7 principal components"]
    plain = (x.flatten(1).double() / 127.5 - 1).numpy()
    reference = decomposition.PCA(7, svd_solver="full").fit(plain).transform(plain)
    signs = np.sign((rows.double().numpy() * reference).sum(0))
    np.testing.assert_allclose(rows.numpy(), reference * signs, atol=1e-5)
    assert found.digest != principal_components(x.split(33), 7, config, 3, data_digest="b").digest
    for number in (0, 49):
        with pytest.raises(ValueError, match=f"pca:{number} of 200 images of 48 pixels; give 1 to 48"):
            principal_components([x], number, config, 3, data_digest="")
    with pytest.raises(ValueError, match="pca of 49152 pixels needs .*; 12288 pixels at most"):
        principal_components([x], 2, PreprocessConfig(128), 3, data_digest="")


def test_pixels_are_the_models_input() -> None:
    x = images(5)
    rows = compute_features(pixels(PreprocessConfig(8), 3), TensorImages(x))["pixels"]
    assert torch.equal(rows, x.flatten(1).float() / 127.5 - 1)


@pytest.mark.parametrize("stored", [False, True])
def test_bn_crelu_is_batch_norm_of_the_training_features(tmp_path: Path, stored: bool) -> None:
    """And what an encoder does with its own: one batch through its norm in training mode."""
    train, test = (5 + 3 * torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in (400, 30))
    norm = nn.BatchNorm1d(6, momentum=1.0, affine=False).double()
    expected = crelu(norm(train.double()))
    norm.eval().running_var *= 399 / 400  # torch keeps the unbiased estimate
    rows = [train, test]
    if stored:
        for i, x in enumerate(rows):
            np.save(tmp_path / f"{i}.npy", x.numpy())
        rows = [StoredRows.open(tmp_path / f"{i}.npy") for i in range(2)]  # type: ignore[misc]
    found = bn_crelu(*rows)
    assert all(isinstance(x, StoredRows) == stored for x in found) and found[0].shape == (400, 12)
    torch.testing.assert_close(found[0][:].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1][:].double(), crelu(norm(test.double())), rtol=1e-5, atol=1e-6)
    ours = crelu(BatchNorm(6, 1e-5, affine=False).train()(train))
    torch.testing.assert_close(found[0][:], ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_files_that_encode_writes_are_read(tmp_path: Path, suffix: str) -> None:
    model = create_model("bigbigan-tiny", parts=("encoder",), seed=3)
    (tmp_path / "in").mkdir()
    for i in range(9):
        Image.fromarray(images(9, 32)[i].permute(1, 2, 0).numpy()).save(tmp_path / f"in/{i}.png")
    encode_files(model, find_images([tmp_path / "in"]), tmp_path / f"out{suffix}")
    found = read_features(tmp_path / f"out{suffix}", rows=9)
    source = TensorImages(images(9, 32))
    expected = compute_features(model_features(model, list(found)), source)
    assert set(found) == {"avepool_feat", "bn_crelu_feat", "z_mean", "z_stdev", "z_sample"}
    for name, rows in found.items():
        torch.testing.assert_close(rows[:], expected[name][:], rtol=1e-5, atol=1e-6)
    assert isinstance(found["z_mean"], StoredRows) == (suffix == ".safetensors")
    alone = read_features(tmp_path / f"out{suffix}", prefer=["z_mean", "absent"])
    assert list(alone) == ["z_mean"] and torch.equal(alone["z_mean"][:], found["z_mean"][:])
    assert read_features(tmp_path / f"out{suffix}", prefer=["absent"]).keys() == found.keys()


def test_chunks_of_wide_rows_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_rows, "CHUNK_VALUES", 20)
    for width, lengths in ((1, [7]), (8, [2, 2, 2, 1]), (50, [1] * 7)):
        assert [len(chunk) for chunk in evaluation_rows.chunks(torch.zeros(7, width))] == lengths


def test_plain_arrays_are_read(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3))
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "a.npz", clip=x)
    save_file({"clip": x.astype(np.float16)}, tmp_path / "a.safetensors")
    assert np.array_equal(read_features(tmp_path / "a.npy")["features"][:], x.astype(np.float32))
    assert np.array_equal(read_features(tmp_path / "a.npz")["clip"][:], x.astype(np.float32))
    np.savez(tmp_path / "labelled.npz", clip=x, labels=np.arange(4))
    assert list(read_features(tmp_path / "labelled.npz")) == ["clip"]
    wide = pyarrow.array(list(x.astype(np.float32)), pyarrow.large_list(pyarrow.float32()))  # as polars writes them
    parquet.write_table(pyarrow.table({"clip": wide, "label": [0, 1, 0, 1]}), tmp_path / "polars.parquet")
    assert np.array_equal(read_features(tmp_path / "polars.parquet")["clip"][:], x.astype(np.float32))
    half = read_features(tmp_path / "a.safetensors")["clip"]
    assert np.array_equal(half[torch.tensor([2])], x.astype(np.float16)[[2]].astype(np.float32))


def test_labels_beside_features_are_left_out(tmp_path: Path) -> None:
    x, labels = np.ones((4, 3), np.float32), np.arange(4)
    np.savez(tmp_path / "a.npz", clip=x, label=labels)
    save_file({"clip": x, "label": labels}, tmp_path / "a.safetensors")
    parquet.write_table(pyarrow.table({"clip": x.tolist(), "label": labels}), tmp_path / "a.parquet")
    for suffix in (".npz", ".safetensors", ".parquet"):
        assert list(read_features(tmp_path / f"a{suffix}", rows=4)) == ["clip"]


def bad_files(folder: Path) -> Iterator[tuple[Path, str]]:
    x = np.ones((5, 2), np.float32)
    np.save(folder / "short.npy", x[:4])
    yield folder / "short.npy", "short.npy: features has 4 rows for 5 images; give one row an image"
    x[3, 1] = np.nan
    for suffix, save in ((".npz", np.savez), (".safetensors", lambda path, clip: save_file({"clip": clip}, path))):
        save(folder / f"nan{suffix}", clip=x)  # type: ignore[operator]
        yield folder / f"nan{suffix}", rf"nan{suffix}: clip: row 3 \(from 0\) holds NaN"
    np.save(folder / "flat.npy", np.ones(5))
    yield folder / "flat.npy", r"features is float64 \[5\]; expected numbers \[N, D\]"
    for name, rows in (("ragged", [[1.0, 2.0]] * 4 + [[1.0, 2.0, 3.0, 4.0]]), ("absent", [[1.0, 2.0]] * 4 + [None])):
        parquet.write_table(pyarrow.table({"clip": rows}), folder / f"{name}.parquet")
        yield folder / f"{name}.parquet", r"lists of column clip have \[2, .*\] values; give each row as many"
    np.savez(folder / "empty.npz", paths=np.array(["a"]))
    yield folder / "empty.npz", "empty.npz holds no features"
    (folder / "nothing.npz").write_bytes(b"")
    yield folder / "nothing.npz", "nothing.npz is no readable feature file"
    for name in ("torn.npz", "torn.npy", "torn.safetensors", "torn.parquet"):
        (folder / name).write_bytes(b"PK\x03\x04 no such thing")
        yield folder / name, f"{name} is no readable feature file"
    yield folder / "absent.npz", "absent.npz: no such file; `bigbigan encode` writes one"
    yield folder / "a.csv", "cannot read features from '.csv'; use .npz"


def test_files_without_features_are_named(tmp_path: Path) -> None:
    for path, message in bad_files(tmp_path):
        with pytest.raises(ValueError, match=message):
            read_features(path, rows=5)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="no readable feature file"):
        read_features(objects)


def test_logits_are_what_the_encoder_maps_to_latents() -> None:
    model = create_model("bigan-mnist-mlp").eval()
    x = images(5, 28, 1).float() / 127.5 - 1
    found: list[Tensor] = []
    encoder = model.part("encoder")
    encoder.latent.register_forward_hook(lambda module, given, out: found.append(out))
    with torch.no_grad():
        encoder.latent.weight.mul_(10)
    rows = model_features(model, ["z_logit", "z_mean"]).features(x)
    assert 2 < found[0].abs().max() < 9  # where float32 still tells z from 1
    torch.testing.assert_close(rows["z_logit"], found[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(rows["z_mean"], torch.tanh(found[0] / 2))
    assert logit(torch.tensor([1.0, -1.0])).abs().max() < 19
    with pytest.raises(ValueError, match="z_logit is of models with a uniform prior"):
        model_features(create_model("bigbigan-tiny"), ["z_logit"])
