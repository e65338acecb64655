"""The whole model: preprocessing, the three networks, and what users call."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from bigbigan import hub, modelfolder
from bigbigan import images as image_io
from bigbigan.arrays import as_floats, as_seed, as_tensor, as_whole
from bigbigan.config import (
    PARTS,
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    GraphDiscriminatorConfig,
    GraphEncoderConfig,
    GraphGeneratorConfig,
    MLPDiscriminatorConfig,
    MLPEncoderConfig,
    MLPGeneratorConfig,
    ModelInfo,
    select_parts,
)
from bigbigan.discriminator import Discriminator, DiscriminatorOutput
from bigbigan.encoder import Encoder, EncoderOutput
from bigbigan.fused import FusedPart, check_fusible, fuse
from bigbigan.generator import Generator
from bigbigan.graph import Graph, GraphDiscriminator, GraphEncoder, GraphGenerator, GraphNetwork
from bigbigan.images import ImageLike
from bigbigan.integrity import WeightsError
from bigbigan.mlp import MLPDiscriminator, MLPEncoder, MLPGenerator

PART_CLASSES: dict[type, Callable[..., nn.Module]] = {  # by the class of a part's configuration
    GeneratorConfig: Generator,
    EncoderConfig: Encoder,
    DiscriminatorConfig: Discriminator,
    MLPGeneratorConfig: MLPGenerator,
    MLPEncoderConfig: MLPEncoder,
    MLPDiscriminatorConfig: MLPDiscriminator,
    GraphGeneratorConfig: GraphGenerator,
    GraphEncoderConfig: GraphEncoder,
    GraphDiscriminatorConfig: GraphDiscriminator,
}
TruncationMode = Literal["resample", "scale"]
_LATENT_STREAM, _NOISE_STREAM = 0, 1


class BigBiGAN(nn.Module):
    """Generator, encoder and discriminator of one model; a part that was not asked for is None.

    Made by `load` and `create_model`. Methods run without gradients, in batches of `batch_size` that do not change
    the result beyond rounding; for gradients call `model.generator`, `model.encoder` and `model.discriminator`.
    """

    generator: Generator | MLPGenerator | GraphGenerator | None
    encoder: Encoder | MLPEncoder | GraphEncoder | None
    discriminator: Discriminator | MLPDiscriminator | GraphDiscriminator | None

    def __init__(
        self,
        config: BigBiGANConfig,
        parts: Sequence[str] | None = None,
        info: ModelInfo | None = None,
        graphs: Mapping[str, Graph] | None = None,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.info = config, info or ModelInfo()
        wanted = select_parts(parts, config.parts, "this architecture")
        for name in PARTS:
            part, graph, network = getattr(config, name), (graphs or {}).get(name), (networks or {}).get(name)
            if name in wanted and network is None:
                network = PART_CLASSES[type(part)](part, *([] if graph is None else [graph]))
            self.add_module(name, network)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(name for name in PARTS if getattr(self, name) is not None)

    @property
    def device(self) -> torch.device:
        return self._place[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._place[1]

    @property
    def _place(self) -> tuple[torch.device, torch.dtype]:
        part = self.part(self.parts[0])
        if isinstance(part, FusedPart):  # whose weights may all be packed
            return part.fused_for
        weight = next(part.parameters())
        return weight.device, weight.dtype

    def fuse(self) -> BigBiGAN:
        """Puts every part into its fused form for inference, in place: equal up to rounding, and faster.

        A fused model saves its plain weights. It does not train, gives no gradients, stays on its device, and sees
        nothing of later changes to its parameters. On other devices than the CPU the model stays as it is. So does a
        part in graph form, whose layers are not known.

        Raises:
            RuntimeError: the model is in training mode, or compiled; no part was fused then.
        """
        for part in self.parts:
            check_fusible(self.part(part))
        for part in self.parts:
            fuse(self.part(part))
        return self

    def preprocess(self, images: ImageLike | Sequence[ImageLike], **options: Any) -> Tensor:
        """Paths, PIL images, uint8 arrays or a [-1, 1] tensor -> [N, C, S, S] in [-1, 1] at the encoder's resolution.

        Options are those of `bigbigan.images.preprocess`: crop, invert, background, max_pixels.

        Raises:
            BadImageError: a picture cannot be read; it names the path and the reason.
        """
        x = image_io.preprocess(images, self.config.preprocess, self.config.image_channels, **options)
        return x.to(self.device, self.dtype)

    @torch.no_grad()
    def generate(
        self,
        z: int | ArrayLike = 1,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        truncation: float | None = None,
        truncation_mode: TruncationMode = "resample",
        upsample: bool = False,
        batch_size: int = 32,
    ) -> Tensor:
        """Images [N, C, S, S] in [-1, 1] from latents z [N, z_dim], or from that many draws (`sample_latents`).

        Latents are a tensor, an array or lists of numbers.

        `upsample` gives [N, C, upsample_size, upsample_size], as the module's `upsampled` output.
        """
        network = self.part("generator")
        z = z if isinstance(z, int) else as_tensor(z, "latents")
        if isinstance(z, int) or z.ndim == 0:
            options: dict[str, Any] = {"seed": seed, "generator": generator, "truncation": truncation}
            z = self.sample_latents(z, truncation_mode=truncation_mode, **options)  # type: ignore[arg-type]
        elif seed is not None or generator is not None or truncation is not None:
            raise ValueError("seed, generator and truncation apply to drawn latents; z was given")
        _check_batch_size(batch_size)
        z = self._check_latents(z)
        out = [network(chunk) for chunk in z.split(batch_size)]
        if upsample:
            out = [network.upsample(chunk) for chunk in out]
        return torch.cat(out)

    def sample_latents(
        self,
        n: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        truncation: float | None = None,
        truncation_mode: TruncationMode = "resample",
        start: int = 0,
    ) -> Tensor:
        """Latents [n, z_dim] from the prior.

        With `seed`, row i depends on the seed and `start + i` alone, so that runs can be extended or split.

        Args:
            truncation: with "resample", values beyond it are drawn again (BigGAN, section 3.1); with "scale", all are
                multiplied by it. Normal priors only.
        """
        n, start = as_whole(n, "the number of latents"), as_seed(start, "start")
        if n < 1:
            raise ValueError(f"cannot draw {n} latents; ask for at least 1")
        prior = self.part("generator").config.prior
        shape = (n, self.config.z_dim)
        if seed is not None and generator is not None:
            raise ValueError("give a seed or a torch.Generator, not both")
        if seed is not None:
            u = indexed_uniform(seed, start, shape, _LATENT_STREAM)
        else:
            source = generator or fresh_generator()
            u = torch.rand(shape, generator=source, dtype=torch.float64, device=source.device).cpu()
        if prior == "uniform":
            if truncation is not None:
                raise ValueError("truncation is defined for normal latents; this model's are uniform")
            return (2 * u - 1).to(self.device, self.dtype)
        if truncation is not None and not 0 < truncation < math.inf:
            raise ValueError(f"truncation is {truncation}; it must be positive (1 or less is usual)")
        if truncation_mode not in ("resample", "scale"):
            raise ValueError(f"truncation_mode is {truncation_mode!r}; choose 'resample' or 'scale'")
        resample = truncation is not None and truncation_mode == "resample"
        z = uniform_to_normal(u, truncation if resample else None)
        if truncation is not None and not resample:
            z = z * truncation
        return z.to(self.device, self.dtype)

    @torch.no_grad()
    def encode(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        seed: int | None = None,
        noise: ArrayLike | None = None,
        start: int = 0,
        batch_size: int = 32,
        **options: Any,
    ) -> EncoderOutput:
        """Features and latents of images (anything that `preprocess` takes).

        The noise of z_sample is given as [N, z_dim], or drawn: with `seed`, by image index from `start` on, so that it
        does not depend on the batch; else afresh.
        """
        network = self.part("encoder")
        if seed is not None and noise is not None:
            raise ValueError("give a seed or the noise itself, not both")
        noise = None if noise is None else as_floats(noise, "noise", None, self.config.z_dim)
        outputs: list[EncoderOutput] = []
        for chunk in _chunks(images, batch_size):
            done = sum(len(out) for out in outputs)
            x = self.preprocess(chunk, first=done, **options)
            shape = (len(x), self.config.z_dim)
            if noise is not None:
                eps = noise[done : done + len(x)]
                if eps.shape != shape:
                    raise ValueError(f"noise has {len(noise)} rows; give one for each image")
            elif seed is not None:
                eps = indexed_noise(seed, start + done, shape)
            else:
                eps = torch.randn(shape, generator=fresh_generator())
            outputs.append(network(x, eps.to(x)))
        if noise is not None and len(noise) != (n := sum(map(len, outputs))):
            raise ValueError(f"noise has {len(noise)} rows for {n} images")
        return EncoderOutput(*(torch.cat([out[f.name] for out in outputs]) for f in fields(EncoderOutput)))

    def reconstruct(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        use_sample: bool = False,
        upsample: bool = False,
        seed: int | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> Tensor:
        """G(E(x)): images [N, C, S, S] in [-1, 1] from z_mean, or from z_sample with `use_sample`."""
        self.part("generator")
        out = self.encode(images, seed=seed, batch_size=batch_size, **options)
        return self.generate(out.z_sample if use_sample else out.z_mean, upsample=upsample, batch_size=batch_size)

    @torch.no_grad()
    def discriminate(
        self, x: ImageLike | Sequence[ImageLike], z: ArrayLike | None = None, *, batch_size: int = 32
    ) -> DiscriminatorOutput:
        """Scores score_x, score_z and score_xz, [N] each, of pairs of image and latent; of images if s_x is all.

        x is a tensor [N, C, S, S] in [-1, 1] at the discriminator's resolution, or anything that `preprocess` takes,
        which is then mean-pooled from the encoder's resolution.
        """
        network = self.part("discriminator")
        size = network.config.resolution
        _check_batch_size(batch_size)
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.shape[-1] == size):
            pooled: list[Tensor] = []
            for chunk in _chunks(x, batch_size):
                big = self.preprocess(chunk, first=sum(map(len, pooled)))  # [n, C, S, S] at E's resolution
                pooled.append(F.avg_pool2d(big, big.shape[-1] // size))
            x = torch.cat(pooled)
        elif x.numel():
            image_io.check_range(x)
        x = x.to(self.device, self.dtype)
        z = None if z is None else self._check_latents(z)
        n = len(x) if z is None else len(z)
        if x.ndim != 4 or len(x) != n or n == 0:
            latents = z if z is None else list(z.shape)
            raise ValueError(f"x is {list(x.shape)}, z {latents}; expected [N, C, {size}, {size}] and [N, z_dim]")
        starts = range(0, n, batch_size)
        out = [network(x[i : i + batch_size], None if z is None else z[i : i + batch_size]) for i in starts]
        scores = ([getattr(part, f.name) for part in out] for f in fields(DiscriminatorOutput))
        return DiscriminatorOutput(*(None if column[0] is None else torch.cat(column) for column in scores))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each network in place, as `torch.compile` with the same arguments; it needs a C++ compiler."""
        for name in self.parts:
            self.part(name).compile(*args, **kwargs)

    def to_pil(self, images: Tensor) -> list[Image.Image]:
        """[N, C, H, W] in [-1, 1] -> PIL images, RGB or L."""
        return image_io.to_pil(images)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a model folder that `load` reads; the same model gives the same bytes.

        Raises:
            WeightsError: weights are not finite, of mixed or unsupported dtype, or not in the plain inference form.
            ConfigError: the model's description does not fit into `config.json`.
            FileExistsError: the folder holds anything but a model folder; it stays as it was.
            OutputError: another process is writing it.
        """
        modelfolder.save_folder(folder, self.config, self.info, self.plain_states(), graphs=self._graph_files())

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the model folder with its card to the Hugging Face Hub; returns the repository's address.

        Options are those of `bigbigan.hub.push_to_hub`: token, private, commit_message, revision.
        """
        states, graphs = self.plain_states(), self._graph_files()
        return hub.push_to_hub(repo_id, self.config, self.info, states, graphs=graphs, **options)

    def plain_states(self) -> dict[str, dict[str, Tensor]]:
        """The state dict of each part in its plain inference form.

        Raises:
            WeightsError: a part has another form: that of training, or of a wrapper.
        """
        states = {part: self.part(part).state_dict() for part in self.parts}
        graphs = {part: network.graph for part, network in self._graph_networks().items()}
        with torch.device("meta"):
            plain = BigBiGAN(self.config, self.parts, graphs=graphs)
        for part, state in states.items():
            wanted = modelfolder.shapes_of(plain.part(part).state_dict())
            if difference := modelfolder.difference_of(modelfolder.shapes_of(state), wanted):
                raise WeightsError(f"the {part} is not in its plain inference form. {difference}")
        return states

    def _graph_networks(self) -> dict[str, GraphNetwork]:
        networks = {part: self.part(part) for part in self.parts}
        return {part: network for part, network in networks.items() if isinstance(network, GraphNetwork)}

    def _graph_files(self) -> dict[str, bytes]:
        """
        Raises:
            ConfigError: a graph could not be loaded again, or is not that of the configuration.
        """
        for part, network in self._graph_networks().items():
            network.check(getattr(self.config, part))
        return {part: network.graph.text() for part, network in self._graph_networks().items()}

    def part(self, part: str) -> Any:
        """The network of that name.

        Raises:
            ValueError: the model was loaded without it.
        """
        network = getattr(self, part)
        if network is None:
            raise ValueError(f"this model has no {part}; it has {', '.join(self.parts)}")
        return network

    def _check_latents(self, z: ArrayLike) -> Tensor:
        return as_floats(z, "latents", None, self.config.z_dim).to(self.device, self.dtype)


def fresh_generator() -> torch.Generator:
    """Seeded from the system's entropy, so that torch's global generator is neither read nor moved."""
    generator = torch.Generator()
    generator.seed()
    return generator


def indexed_uniform(seed: int, start: int, shape: tuple[int, int], stream: int) -> Tensor:
    """[n, dim] float64 in (0, 1); row i depends on seed, stream and `start + i` alone (Philox, one counter a row)."""
    seed = as_seed(seed)
    rows, key = [], np.array([seed, stream], np.uint64)  # a list would pass through float64 from 2**63 on
    for index in range(start, start + shape[0]):
        bits = np.random.Philox(key=key, counter=np.array([0, 0, 0, index], np.uint64)).random_raw(shape[1])
        rows.append((bits >> np.uint64(11)).astype(np.float64))
    return (torch.from_numpy(np.stack(rows)) + 0.5) / 2**53


def indexed_noise(seed: int, start: int, shape: tuple[int, int]) -> Tensor:
    """[n, z_dim] from N(0, 1) for z_sample; row i depends on seed and `start + i` alone."""
    return uniform_to_normal(indexed_uniform(seed, start, shape, _NOISE_STREAM))


def uniform_to_normal(u: Tensor, bound: float | None = None) -> Tensor:
    """N(0, 1) from U(0, 1) by the inverse distribution function; with `bound`, given |z| <= bound.

    That is the distribution of drawing again whatever lies outside.
    """
    if bound is not None:
        low = torch.special.ndtr(torch.tensor(-bound, dtype=torch.float64))
        u = low + u * (1 - 2 * low)
    return torch.special.ndtri(u).float()


def _chunks(images: Any, size: int) -> Iterator[Any]:
    """Whatever `preprocess` takes, or any other iterable of pictures, in pieces of `size`."""
    _check_batch_size(size)
    array = isinstance(images, np.ndarray | Tensor)
    many = images.ndim == 4 if array else isinstance(images, Iterable)
    if not many or isinstance(images, str | os.PathLike | Image.Image):
        yield images  # one picture, or what `preprocess` refuses
        return
    if array or isinstance(images, Sequence):
        pieces: Iterator[Any] = (images[i : i + size] for i in range(0, len(images), size))
    else:
        iterator = iter(images)
        pieces = iter(lambda: list(itertools.islice(iterator, size)), [])
    empty = True
    for piece in pieces:
        empty = False
        yield piece
    if empty:
        raise ValueError("no images given")


def _check_batch_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"batch_size is {size}; it must be 1 or more")
