"""Third-party generator checkpoints: the layout computed again in plain torch, and files that must be refused."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bigbigan
from weights_conversion.biggan_pth import convert_checkpoint, read_checkpoint
from weights_conversion.errors import ConversionError

CHANNELS, CHUNK, SHARED, SIDES = (8, 8, 8, 8), 3, 5, (8, 16, 32)  # a 32-pixel generator of base width 2
ATTENDED = 1


def checkpoint(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in the layout of BigGANsAreWatching."""
    g = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(*shape, generator=g)
        state[f"{name}.u0"] = torch.randn(1, shape[0], generator=g)
        state[f"{name}.sv0"] = torch.ones(1)
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=g) * 0.3

    def statistics(name: str, size: int) -> None:
        state[f"{name}.stored_mean"] = torch.randn(size, generator=g) * 0.3
        state[f"{name}.stored_var"] = torch.rand(size, generator=g) + 0.05

    state["shared.weight"] = torch.randn(1, SHARED, generator=g).repeat(1000, 1)
    layer("linear", CHANNELS[0] * 16, CHUNK)
    for i, (a, b) in enumerate(itertools.pairwise(CHANNELS)):
        layer(f"blocks.{i}.0.conv1", b, a, 3, 3)
        layer(f"blocks.{i}.0.conv2", b, b, 3, 3)
        layer(f"blocks.{i}.0.conv_sc", b, a, 1, 1)
        for bn, size in (("bn1", a), ("bn2", b)):
            statistics(f"blocks.{i}.0.{bn}", size)
            for part in ("gain", "bias"):
                layer(f"blocks.{i}.0.{bn}.{part}", size, SHARED + CHUNK, bias=False)
    width = CHANNELS[ATTENDED + 1]
    for name, a, b in (("theta", width, width // 8), ("phi", width, width // 8), ("g", width, width // 2)):
        layer(f"blocks.{ATTENDED}.1.{name}", b, a, 1, 1, bias=False)
    layer(f"blocks.{ATTENDED}.1.o", width, width // 2, 1, 1, bias=False)
    state[f"blocks.{ATTENDED}.1.gamma"] = torch.tensor(0.7)
    statistics("output_layer.0", CHANNELS[-1])
    state["output_layer.0.gain"] = torch.rand(CHANNELS[-1], generator=g) + 0.5
    state["output_layer.0.bias"] = torch.randn(CHANNELS[-1], generator=g)
    layer("output_layer.2", 3, CHANNELS[-1], 3, 3)
    return state


def generate(state: dict[str, Tensor], z: Tensor) -> Tensor:
    """What that code computes at evaluation, operation by operation."""

    def weight(name: str) -> Tensor:
        w = state[f"{name}.weight"]
        matrix = w.reshape(len(w), -1)
        v = state[f"{name}.u0"] @ matrix
        v = v / v.norm().clamp(min=1e-4)
        u = v @ matrix.T
        u = u / u.norm().clamp(min=1e-4)
        return w / (v @ matrix.T @ u.T)

    def conv(name: str, x: Tensor) -> Tensor:
        w = weight(name)
        return F.conv2d(x, w, state.get(f"{name}.bias"), padding=w.shape[-1] // 2)

    def normalize(name: str, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        mean, var = (state[f"{name}.stored_{s}"][:, None, None] for s in ("mean", "var"))
        return torch.relu((x - mean) / (var + 1e-4).sqrt() * gain + bias)

    def double(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    chunks = z.split(CHUNK, dim=1)
    y = state["shared.weight"][torch.zeros(len(z), dtype=torch.long)]
    h = (chunks[0] @ weight("linear").T + state["linear.bias"]).view(len(z), -1, 4, 4)
    for i in range(len(CHANNELS) - 1):
        name, condition = f"blocks.{i}.0", torch.cat([y, chunks[i + 1]], 1)

        def conditional(bn: str, x: Tensor, condition: Tensor = condition) -> Tensor:
            gain, bias = ((condition @ weight(f"{bn}.{p}").T)[:, :, None, None] for p in ("gain", "bias"))
            return normalize(bn, x, 1 + gain, bias)

        inner = conv(f"{name}.conv1", double(conditional(f"{name}.bn1", h)))
        h = conv(f"{name}.conv2", conditional(f"{name}.bn2", inner)) + conv(f"{name}.conv_sc", double(h))
        if i == ATTENDED:
            base, (n, c, a, b) = f"blocks.{i}.1", h.shape
            theta = conv(f"{base}.theta", h).view(n, -1, a * b)
            phi, g = (F.max_pool2d(conv(f"{base}.{p}", h), 2).view(n, -1, a * b // 4) for p in ("phi", "g"))
            beta = torch.softmax(theta.transpose(1, 2) @ phi, -1)
            h = h + state[f"{base}.gamma"] * conv(f"{base}.o", (g @ beta.transpose(1, 2)).view(n, c // 2, a, b))
    gain, bias = (state[f"output_layer.0.{p}"][:, None, None] for p in ("gain", "bias"))
    return torch.tanh(conv("output_layer.2", normalize("output_layer.0", h, gain, bias)))


def write(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def test_generator_gives_the_checkpoints_images(tmp_path: Path) -> None:
    state = checkpoint()
    folder = convert_checkpoint(write(state, tmp_path / "G.pth"), tmp_path / "out")
    model = bigbigan.load(folder)
    z = torch.randn(4, 4 * CHUNK, generator=torch.Generator().manual_seed(1))
    wanted = generate({k: v.double() for k, v in state.items()}, z.double())
    difference = (model.generate(z) - wanted).abs().max()
    assert difference < 1e-4 and wanted.std() > 0.1
    assert model.parts == ("generator",) and model.config.generator.z_chunks == (CHUNK,) * 4
    assert "unknown" in model.info.license and "G.pth" in model.info.provenance["sha256"]


def broken(change: str) -> dict[str, Tensor]:
    state = checkpoint()
    if change == "rows":
        state["shared.weight"][17, 2] += 1e-3
    elif change == "missing":
        del state["blocks.1.0.conv1.u0"]
    elif change == "more":
        state["blocks.1.0.conv3.weight"] = torch.zeros(1)
    elif change == "nan":
        state["linear.bias"][3] = torch.nan
    else:
        state["blocks.2.0.conv2.weight"] = torch.randn(8, 6, 3, 3)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rows", "rows differ"),
        ("missing", "lacks blocks.1.0.conv1.u0"),
        ("more", "conv3"),
        ("nan", "linear.bias holds values that are not finite"),
        ("shape", "does not fill"),
    ],
)
def test_what_does_not_fit_is_refused(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(write(broken(change), tmp_path / "G.pth"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["code", "garbage", "list"])
def test_hostile_files_do_nothing(kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "G.pth", tmp_path / "marker"
    if kind == "garbage":
        path.write_bytes(b"\x80\x02not a checkpoint")
    else:
        write({"a": Touch(marker)} if kind == "code" else [torch.zeros(3)], path)
    with pytest.raises(ConversionError, match="cannot be read"):
        read_checkpoint(path)
    assert not marker.exists()
