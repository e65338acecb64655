"""Third-party generator checkpoints (`BigBiGAN_x1.pth` of BigGANsAreWatching and pytorch-pretrained-gans).

Layout: the state dict of a 1000-class BigGAN whose rows of `shared.weight` are all the one class vector.
`blocks.{i}.0.{conv1,conv2,conv_sc}`, `blocks.{i}.0.{bn1,bn2}.{gain,bias}.weight` on [class vector, z chunk],
`blocks.{i}.1.{theta,phi,g,o}` and `gamma`, `linear` (to C x 4 x 4, in this order), `output_layer.0` (batch norm) and
`output_layer.2`. Weights are divided by sigma = v W u of one power iteration from `u0`, both vectors normalised with
eps 1e-4, as that code does at every evaluation; batch norms have eps 1e-4 and statistics `stored_mean`, `stored_var`.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bigbigan import __version__
from bigbigan.config import GENERATOR_CHANNELS, BigBiGANConfig, GeneratorConfig, ModelInfo, PreprocessConfig
from bigbigan.model import BigBiGAN
from bigbigan.modelfolder import claim_folder
from weights_conversion.errors import ConversionError

EPS = 1e-4  # of spectral norm and batch norm alike
MIN_TORCH = (2, 10)  # earlier versions can be made to run code by a file even with weights_only
MAX_BYTES = 4 << 30
TIMEOUT = 600
MEMORY = 2 << 30  # of the reading process, beyond four times the file
CLASSES = 1000
OTHER_FILES = {
    rb"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    rb"\s*<": "a web page; download the file itself",
    rb".{5}\0\0\0\{": "a safetensors file under another name",
}


def convert_checkpoint(path: Path, output: Path, *, name: str | None = None) -> Path:
    """Writes a model folder with the generator alone, and returns it; `name` is by default the file's.

    Raises:
        ConversionError: the file is no such checkpoint; nothing is written then.
        FileNotFoundError: there is no such file.
        FileExistsError, OutputError: `output` holds anything but a model folder, or another process is writing it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with claim_folder(output):
        return _convert(path, output, name)


def _convert(path: Path, output: Path, name: str | None) -> Path:
    config, state = match_checkpoint(read_checkpoint(path))
    info = ModelInfo(
        name or path.stem,
        "unknown: see where the checkpoint comes from",
        f"converted from the third-party generator checkpoint {path.name}",
        {
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
            "versions": {"bigbigan": __version__, "torch": torch.__version__},
        },
    )
    whole = BigBiGANConfig(config, None, None, PreprocessConfig(config.resolution))
    with torch.device("meta"):
        model = BigBiGAN(whole, info=info)
    model.part("generator").load_state_dict(state, strict=True, assign=True)
    model.eval().save(output)
    return output


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file, as float32; unpickled in a child process that passes them on as safetensors.

    Raises:
        ConversionError: it is none, or holds anything but tensors, or torch is older than 2.10.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ConversionError(f"{path} has more than {MAX_BYTES} bytes; the generator has about 300 million")
    with path.open("rb") as file:
        head = file.read(32)
    for start, what in OTHER_FILES.items():
        if re.match(start, head, re.DOTALL):
            raise ConversionError(f"{path} cannot be read: it is {what}")
    with tempfile.TemporaryDirectory(prefix="bigbigan-") as folder:
        target = Path(folder) / "tensors.safetensors"
        command = [sys.executable, "-m", "weights_conversion.biggan_pth", str(path.resolve()), str(target)]
        try:
            child = subprocess.run(
                command, cwd=Path(__file__).parents[1], capture_output=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"{path} took more than {TIMEOUT} seconds to read") from error
        if child.returncode:
            last = child.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
            reason = last if child.returncode > 0 else f"the process that read it died of signal {-child.returncode}"
            raise ConversionError(f"{path} cannot be read: {reason}")
        try:
            return load_file(target)
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{path} cannot be read: {error}") from error


def _child(source: str, target: str) -> None:
    """Runs in the child process; SystemExit carries one line for the parent."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        raise SystemExit(f"reading .pth files needs torch {'.'.join(map(str, MIN_TORCH))} or newer, not {version}")
    try:
        tensors = _unpickled(source)
        save_file({key: value.detach().float().contiguous().clone() for key, value in tensors.items()}, target)
    except ConversionError as error:
        raise SystemExit(str(error)) from error
    except Exception as error:  # a damaged file makes torch raise any of more than ten classes
        raise SystemExit(_reason(error)) from error


def _reason(error: Exception) -> str:
    """One line, without torch's advice to switch its protection off."""
    text = str(error)
    if named := re.search(r"(?i)unsupported global:? (?:GLOBAL )?([\w.]+)", text):
        return f"it calls for {named[1]}, which is code and no tensor"
    told = re.search(
        r"(?:WeightsUnpickler error:\s*)?(.*?)(?:\. |\.?\n|$)", text[max(text.find("WeightsUnpickler"), 0) :]
    )
    return f"it is damaged or no checkpoint ({type(error).__name__}: {told[1] if told else ''})"[:300]


def _unpickled(source: str) -> dict[str, Tensor]:
    size = Path(source).stat().st_size
    if sys.platform == "linux":
        import resource

        limit = 4 * size + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with open(source, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        with zipfile.ZipFile(source) as archive:
            parts = archive.infolist()
            if any(p.compress_type != zipfile.ZIP_STORED for p in parts) or sum(p.file_size for p in parts) > size:
                raise ConversionError("its parts are compressed or overlap, which torch.save never does")
            if damaged := archive.testzip():  # torch does not look
                raise ConversionError(f"the checksum of its part {damaged!r} is wrong; download it anew")
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConversionError("it holds no plain state dict: a dictionary of tensors")
    if not all(isinstance(key, str) and not value.is_complex() for key, value in loaded.items()):
        raise ConversionError("it holds complex numbers, or tensors without a name")
    if 4 * sum(value.numel() for value in loaded.values()) > 2 * size + (64 << 20):
        raise ConversionError("it describes more numbers than it holds")
    return loaded


def match_checkpoint(tensors: dict[str, Tensor]) -> tuple[GeneratorConfig, dict[str, Tensor]]:
    """Configuration and state dict of `bigbigan.generator.Generator`, any width.

    Raises:
        ConversionError: a tensor is missing, left over, or of an unexpected shape.
    """
    checkpoint = _Checkpoint(tensors)
    try:
        return checkpoint.match()
    except ConversionError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:  # of torch, on shapes that do not go together
        key = checkpoint.last
        raise ConversionError(f"{key} is {list(tensors[key].shape)}, which does not fit: {error}"[:300]) from error


@dataclass
class _Checkpoint:
    tensors: dict[str, Tensor]
    state: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    last: str = "shared.weight"

    def match(self) -> tuple[GeneratorConfig, dict[str, Tensor]]:
        shared = self._class_vector()
        count = len({m[1] for key in self.tensors if (m := re.match(r"blocks\.(\d+)\.0\.", key))})
        sides = {len(table) - 1: side for side, table in GENERATOR_CHANNELS.items()}
        if count not in sides:
            raise ConversionError(f"the checkpoint has {count} generator blocks; known are {sorted(sides)}")
        self._seed()
        chunks = [self.state["seed.weight"].shape[1]]
        attended = [i for i in range(count) if f"blocks.{i}.1.gamma" in self.tensors]
        if len(attended) > 1:
            raise ConversionError(f"the checkpoint has attention in blocks {attended}; one at most is known")
        for i in range(count):
            chunks.append(self._block(i, shared))
        for i in attended:
            for name in ("theta", "phi", "g", "o"):
                self._put(f"attention.{name}.weight", self._normalized(f"blocks.{i}.1.{name}"))
            self._put("attention.gamma", self._take(f"blocks.{i}.1.gamma").reshape(()))
        self._norm("norm", "output_layer.0")
        self._put("norm.weight", self._take("output_layer.0.gain"))
        self._put("norm.bias", self._take("output_layer.0.bias"))
        self._layer("conv", "output_layer.2")
        ignored = {key for key in self.tensors if key.endswith(".sv0")}  # a log of sigma, never read
        if left := sorted(set(self.tensors) - self.used - ignored):
            raise ConversionError(f"the checkpoint holds {len(left)} more tensors, such as {', '.join(left[:5])}")
        return self._config(sides[count], chunks, attended, len(shared)), self.state

    def _config(self, side: int, chunks: list[int], attended: list[int], shared: int) -> GeneratorConfig:
        table = GENERATOR_CHANNELS[side]
        conv = self.state["conv.weight"]
        config = GeneratorConfig(
            resolution=side,  # type: ignore[arg-type]
            image_channels=conv.shape[0],
            base_channels=conv.shape[1] // table[-1],
            z_chunks=tuple(chunks),
            shared_dim=shared,
            attention_resolution=8 << attended[0] if attended else 0,
            bn_eps=EPS,
            upsample_size=2 * side,
        )
        from bigbigan.generator import Generator

        with torch.device("meta"):
            wanted = {key: tuple(t.shape) for key, t in Generator(config).state_dict().items()}
        found = {key: tuple(t.shape) for key, t in self.state.items()}
        if differing := sorted(set(wanted.items()) ^ set(found.items())):
            raise ConversionError(f"the checkpoint does not fill a generator of its widths: {differing[:6]}")
        return config

    def _take(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise ConversionError(f"the checkpoint lacks {key}; it has {', '.join(sorted(self.tensors)[:5])}, …")
        self.used.add(key)
        self.last, value = key, self.tensors[key]
        if not torch.isfinite(value).all():
            raise ConversionError(f"{key} holds values that are not finite")
        return value.double()

    def _put(self, key: str, value: Tensor) -> None:
        self.state[key] = value.float().contiguous()

    def _normalized(self, name: str) -> Tensor:
        """The weight over sigma."""
        weight, u = self._take(f"{name}.weight"), self._take(f"{name}.u0")
        matrix = weight.flatten(1)
        if u.shape != (1, len(matrix)):
            raise ConversionError(f"{name}.u0 is {list(u.shape)}; expected [1, {len(matrix)}]")
        v = F.normalize(u @ matrix, eps=EPS)
        u = F.normalize(v @ matrix.t(), eps=EPS)
        sigma = (v @ matrix.t() @ u.t()).squeeze()
        if not sigma > 0:
            raise ConversionError(f"{name} has a largest singular value of {float(sigma):g}")
        return weight / sigma

    def _layer(self, name: str, key: str) -> None:
        self._put(f"{name}.weight", self._normalized(key))
        self._put(f"{name}.bias", self._take(f"{key}.bias"))

    def _norm(self, name: str, key: str) -> None:
        self._put(f"{name}.running_mean", self._take(f"{key}.stored_mean"))
        self._put(f"{name}.running_var", self._take(f"{key}.stored_var"))

    def _class_vector(self) -> Tensor:
        rows = self._take("shared.weight")
        if rows.ndim != 2 or len(rows) != CLASSES or not torch.equal(rows, rows[:1].expand_as(rows)):
            raise ConversionError(
                f"shared.weight is {list(rows.shape)} and its rows differ: this is a class-conditional BigGAN's "
                f"checkpoint; BigBiGAN's has {CLASSES} equal rows"
            )
        return rows[0]

    def _seed(self) -> None:
        weight, bias = self._normalized("linear"), self._take("linear.bias")
        self._put("seed.weight", weight.unflatten(0, (-1, 4, 4)).permute(1, 2, 0, 3).flatten(0, 2))
        self._put("seed.bias", bias.unflatten(0, (-1, 4, 4)).permute(1, 2, 0).flatten())

    def _block(self, i: int, shared: Tensor) -> int:
        """Writes a block; the size of its chunk of z."""
        key, name = f"blocks.{i}.0", f"blocks.{i}"
        self._layer(f"{name}.conv1.conv", f"{key}.conv1")
        self._layer(f"{name}.conv2", f"{key}.conv2")
        self._layer(f"{name}.shortcut", f"{key}.conv_sc")
        chunk = 0
        for norm, bn in (("norm1", "bn1"), ("norm2", "bn2")):
            self._norm(f"{name}.{norm}.norm", f"{key}.{bn}")
            for ours, theirs in (("gain", "gain"), ("offset", "bias")):
                weight = self._normalized(f"{key}.{bn}.{theirs}")  # on [class vector, z chunk]
                chunk = weight.shape[1] - len(shared)
                self._put(f"{name}.{norm}.{ours}.linear.weight", weight[:, len(shared) :])
                self._put(f"{name}.{norm}.{ours}.linear.bias", weight[:, : len(shared)] @ shared)
        return chunk


if __name__ == "__main__":
    _child(*sys.argv[1:])
