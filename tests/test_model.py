"""The methods that users call: seeds, batches, noise, truncation, pictures in every form, and errors that help."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import close, random_images, random_normal, randomize

import bigbigan
from bigbigan import BadImageError, BigBiGAN, EncoderOutput, create_model
from bigbigan.config import (
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
    PreprocessConfig,
)

MLP = MLPConfig(8, 2)
Z_DIM = 10
TINY = BigBiGANConfig(
    GeneratorConfig(32, 3, 4, (4, 3, 2, 1), shared_dim=0, attention_resolution=16, upsample_size=64),
    EncoderConfig(64, depths=(1, 1), base_channels=4, block="basic", z_dim=Z_DIM, head=MLP),
    DiscriminatorConfig(32, 3, 4, Z_DIM, 0, z_mlp=MLP, joint_mlp=MLP),
    PreprocessConfig(64),
)
UNIFORM = dataclasses.replace(
    TINY,
    generator=dataclasses.replace(TINY.generator, prior="uniform"),
    encoder=dataclasses.replace(TINY.encoder, output="tanh"),
)


@pytest.fixture(scope="module")
def model() -> BigBiGAN:
    """Float64, so that "the same beyond rounding" can be asked at 1e-12."""
    return randomize(BigBiGAN(TINY)).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """[5, 64, 64, 3], of the size that is neither cropped nor scaled."""
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def global_randomness_stays_where_it_was() -> Iterator[None]:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    yield
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1]) and random.getstate() == before[2]


def only(*parts: str, config: BigBiGANConfig = TINY) -> BigBiGAN:
    return create_model(config, parts=parts)


# ---- latents ----


def test_a_seed_gives_the_same_latents_for_ever(model: BigBiGAN) -> None:
    # Philox4x64-10 in plain integers, key (7, 0), counter (1, 0, 0, row), top 53 bits, then SciPy's norm.ppf.
    expected = [0.96423302, -0.37544192, -1.36774516, -0.01495630]
    close(model.sample_latents(2, seed=7)[1, :4], torch.tensor(expected).double(), 1e-6)


def test_latents_depend_on_seed_and_index_alone(model: BigBiGAN) -> None:
    z = model.sample_latents(9, seed=3)
    assert z.shape == (9, Z_DIM) and z.dtype == torch.float64
    assert torch.equal(model.sample_latents(4, seed=3), z[:4])
    assert torch.equal(model.sample_latents(4, seed=3, start=5), z[5:])
    assert torch.equal(model.sample_latents(2, seed=3, start=2**40), model.sample_latents(2, seed=3, start=2**40))
    seeds = (0, 2, 3, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
    assert len(torch.cat([model.sample_latents(1, seed=seed) for seed in seeds]).unique()) == len(seeds) * Z_DIM
    assert len(z.unique()) == z.numel()
    fresh = [model.sample_latents(4) for _ in range(2)]
    assert not torch.isin(fresh[0], fresh[1]).any()


def test_a_torch_generator_is_used_and_moved(model: BigBiGAN) -> None:
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    z = model.sample_latents(4, generator=first)
    assert torch.equal(z, model.sample_latents(4, generator=second))
    assert not torch.equal(z, model.sample_latents(4, generator=second))
    images = model.generate(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(images, model.generate(z))


@pytest.mark.parametrize("truncation", [None, 0.04, 0.5, 2.0])
@pytest.mark.parametrize("seeded", [True, False])
def test_latents_follow_the_truncated_normal_law(model: BigBiGAN, truncation: float | None, seeded: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    source = {"seed": 11} if seeded else {"generator": torch.Generator().manual_seed(11)}
    z = model.sample_latents(3000, truncation=truncation, **source).flatten().numpy()
    bound = np.inf if truncation is None else truncation
    assert np.abs(z).max() <= np.float32(bound)
    assert stats.kstest(z, stats.truncnorm(-bound, bound).cdf).pvalue > 0.01
    rows = z.reshape(3000, Z_DIM)
    correlation = np.corrcoef(np.concatenate([rows[1:], rows[:-1]], axis=1).T) - np.eye(2 * Z_DIM)
    assert np.abs(correlation).max() < 0.1  # five deviations of chance


def test_scaled_truncation_multiplies(model: BigBiGAN) -> None:
    z = model.sample_latents(5, seed=1)
    close(model.sample_latents(5, seed=1, truncation=0.3, truncation_mode="scale"), 0.3 * z, 1e-6)
    assert torch.equal(model.sample_latents(5, seed=1, truncation_mode="scale"), z)


def test_uniform_latents_fill_the_cube_and_refuse_truncation() -> None:
    stats = pytest.importorskip("scipy.stats")
    uniform = create_model(UNIFORM)
    z = uniform.sample_latents(2000, seed=4)
    assert z.abs().max() <= 1 and stats.kstest(z.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 0.01
    with pytest.raises(ValueError, match="truncation is defined for normal latents"):
        uniform.generate(2, truncation=0.5)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "0 latents"),
        ({"n": -2}, "-2 latents"),
        ({"truncation": 0.0}, "truncation is 0.0"),
        ({"truncation": -1.0}, "truncation is -1.0"),
        ({"truncation": float("nan")}, "truncation is nan"),
        ({"truncation": float("inf")}, "truncation is inf"),
        ({"truncation_mode": "clip"}, "'clip'.*'resample' or 'scale'"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, f"seed is {2**64}"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
    ],
)
def test_impossible_draws_are_refused(model: BigBiGAN, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model.sample_latents(**{"n": 2, **options})


# ---- generate ----


def test_generate_is_the_generator_on_sampled_latents(model: BigBiGAN) -> None:
    images = model.generate(5, seed=3)
    assert images.shape == (5, 3, 32, 32) and not images.requires_grad
    with torch.no_grad():
        close(images, model.generator(model.sample_latents(5, seed=3)), 1e-12)
    close(model.generate(3, seed=3), images[:3], 1e-12)
    close(model.generate(5, seed=3, batch_size=2), images, 1e-12)
    close(model.generate(model.sample_latents(3, seed=3, start=2)), images[2:], 1e-12)
    assert (model.generate(5, seed=4) - images).abs().max() > 0.1
    assert torch.equal(
        model.generate(model.sample_latents(2, seed=3, truncation=0.5)), model.generate(2, seed=3, truncation=0.5)
    )
    assert model.generate().shape == (1, 3, 32, 32)


def test_generate_upsamples_as_the_generator_does(model: BigBiGAN) -> None:
    images, large = model.generate(3, seed=3), model.generate(3, seed=3, upsample=True, batch_size=2)
    close(large, F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False))


def test_batches_agree_in_single_precision_too() -> None:
    single = create_model(TINY, seed=1)
    torch.testing.assert_close(
        single.generate(7, seed=0)[:4], single.generate(4, seed=0, batch_size=3), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(Z_DIM,), (2, Z_DIM - 1), (0, Z_DIM), (1, 1, Z_DIM)])
def test_latents_of_another_shape_are_refused(model: BigBiGAN, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"expected \[N, {Z_DIM}\]"):
        model.generate(torch.zeros(shape))


@pytest.mark.parametrize("option", [{"seed": 1}, {"truncation": 0.5}, {"generator": torch.Generator()}])
def test_given_latents_take_no_options_of_drawn_ones(model: BigBiGAN, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="z was given"):
        model.generate(torch.zeros(2, Z_DIM), **option)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_has_at_least_one_image(model: BigBiGAN, pixels: np.ndarray, batch_size: int) -> None:
    z, x = torch.zeros(2, Z_DIM), random_images(2, 3, 32, 32)
    for call in (
        model.generate,
        lambda z, **o: model.encode(pixels, **o),
        lambda z, **o: model.discriminate(x, z, **o),
    ):
        with pytest.raises(ValueError, match="batch_size"):
            call(z, batch_size=batch_size)


# ---- encode ----


def finished(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1


def test_encode_takes_pictures_in_every_form(model: BigBiGAN, pixels: np.ndarray, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = model.encoder(finished(pixels)).z_mean
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for path, array in zip(paths, pixels, strict=True):
        Image.fromarray(array).save(path)
    pictures = [Image.fromarray(array) for array in pixels]
    mixed = [str(paths[0]), paths[1], pictures[2], pixels[3], finished(pixels)[4]]
    many: dict[str, Any] = {
        "paths": paths,
        "tuple of str": tuple(map(str, paths)),
        "pictures": pictures,
        "arrays": list(pixels),
        "batch array": pixels,
        "uint8 tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "finished tensor": finished(pixels),
        "finished tensors": list(finished(pixels)),
        "mixed": mixed,
        "generator": (path for path in paths),
        "iterator": iter(pictures),
        "map": map(str, paths),
    }
    for name, images in many.items():
        out = model.encode(images, batch_size=2)
        assert len(out) == 5, name
        # uint8 pictures pass through float32 on their way to this float64 model.
        torch.testing.assert_close(out.z_mean, expected, rtol=0, atol=1e-5, msg=name)
    one: list[Any] = [paths[0], str(paths[0]), pictures[0], pixels[0], finished(pixels)[0], finished(pixels)[:1]]
    for image in (*one, torch.from_numpy(pixels[0]).permute(2, 0, 1)):
        torch.testing.assert_close(model.encode(image).z_mean, expected[:1], rtol=0, atol=1e-5)


def test_no_batch_is_larger_than_asked_whatever_holds_the_pictures(model: BigBiGAN, pixels: np.ndarray) -> None:
    sizes: list[int] = []
    handle = model.encoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    try:
        for images in (pixels, list(pixels), finished(pixels), iter(pixels), (array for array in pixels)):
            sizes.clear()
            model.encode(images, batch_size=2)
            assert sizes == [2, 2, 1], type(images)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "images", [[], (), iter([]), np.zeros((0, 64, 64, 3), np.uint8), torch.zeros(0, 3, 64, 64)], ids=type
)
def test_no_pictures_are_an_error(model: BigBiGAN, images: Any) -> None:
    for call in (model.encode, model.reconstruct):
        with pytest.raises(ValueError, match="no images given"):
            call(images)


def test_a_bad_picture_is_named_by_its_place_among_all(model: BigBiGAN, pixels: np.ndarray, tmp_path: Path) -> None:
    for batch_size in (32, 2, 1):
        with pytest.raises(BadImageError, match="image 3 of the batch"):
            model.encode([*pixels[:3], np.zeros((64, 64, 7), np.uint8)], batch_size=batch_size)
    with pytest.raises(BadImageError, match="missing.png: no such file"):
        model.encode([*pixels, tmp_path / "missing.png"], batch_size=2)


def test_noise_is_drawn_by_image_index(model: BigBiGAN, pixels: np.ndarray) -> None:
    out = model.encode(pixels, seed=3)
    close(model.encode(pixels, seed=3, batch_size=2).z_sample, out.z_sample, 1e-12)
    close(model.encode(pixels[2:], seed=3, start=2, batch_size=2).z_sample, out.z_sample[2:], 1e-12)
    noise = (out.z_sample - out.z_mean) / out.z_stdev
    assert not torch.equal(model.encode(pixels, seed=4).z_sample, out.z_sample)
    assert (noise - model.sample_latents(5, seed=3)).abs().min() > 1e-6  # not the latents that this seed draws
    fresh = [model.encode(pixels) for _ in range(2)]
    assert torch.equal(fresh[0].z_mean, out.z_mean) and not torch.equal(fresh[0].z_sample, fresh[1].z_sample)


def test_noise_of_a_seed_is_standard_normal() -> None:
    stats = pytest.importorskip("scipy.stats")
    encoder = only("encoder")
    images = torch.zeros(1000, 3, 64, 64)
    out = encoder.encode(images, seed=5, batch_size=500)
    noise = ((out.z_sample - out.z_mean) / out.z_stdev).flatten()
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01


def test_noise_can_be_given(model: BigBiGAN, pixels: np.ndarray) -> None:
    noise = random_normal(5, Z_DIM)
    out = model.encode(pixels, noise=noise, batch_size=2)
    close(out.z_sample, out.z_mean + noise * out.z_stdev, 1e-12)
    close(model.encode(pixels, noise=noise, start=7).z_sample, out.z_sample, 1e-12)
    close(model.encode(pixels, noise=torch.zeros(5, Z_DIM)).z_sample, out.z_mean, 1e-12)
    for shape in ((4, Z_DIM), (6, Z_DIM), (5, Z_DIM + 1), (Z_DIM,)):
        with pytest.raises(ValueError, match="noise"):
            model.encode(pixels, noise=torch.zeros(shape), batch_size=2)
    with pytest.raises(ValueError, match="not both"):
        model.encode(pixels, noise=noise, seed=1)


def test_encode_passes_options_to_preprocessing(model: BigBiGAN) -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 64:] = 255
    plain, squashed = model.preprocess(wide), model.preprocess(wide, crop="none")
    assert plain.shape == squashed.shape == (1, 3, 64, 64) and plain.dtype == torch.float64
    assert not torch.equal(plain, squashed)
    torch.testing.assert_close(model.preprocess(wide, invert=True), -plain)
    for options in ({"crop": "none"}, {"invert": True}):
        expected = model.encoder(model.preprocess(wide, **options)).z_mean
        close(model.encode(wide, **options).z_mean, expected, 1e-12)
    with pytest.raises(TypeError, match="surprise"):
        model.encode(wide, surprise=1)


def test_encode_gives_one_output_with_every_feature(model: BigBiGAN, pixels: np.ndarray) -> None:
    out = model.encode(pixels, batch_size=2)
    assert isinstance(out, EncoderOutput) and len(out) == 5
    shapes = {"z_sample": Z_DIM, "z_mean": Z_DIM, "z_stdev": Z_DIM, "avepool_feat": 8, "bn_crelu_feat": 16}
    assert {name: tuple(out[name].shape) for name in shapes} == {k: (5, n) for k, n in shapes.items()}
    assert not any(out[name].requires_grad for name in shapes)
    crelu = out.bn_crelu_feat
    norm = model.encoder.feature_norm
    h = (out.avepool_feat - norm.running_mean) / torch.sqrt(norm.running_var + norm.eps)
    close(crelu, torch.cat([h.clamp(min=0), (-h).clamp(min=0)], dim=1))


# ---- reconstruct, discriminate ----


def test_reconstruct_is_generate_of_encode(model: BigBiGAN, pixels: np.ndarray, tmp_path: Path) -> None:
    out = model.encode(pixels, seed=2)
    expected = model.generate(out.z_mean)
    close(model.reconstruct(pixels, batch_size=2), expected, 1e-12)
    close(model.reconstruct(pixels, use_sample=True, seed=2, batch_size=3), model.generate(out.z_sample), 1e-12)
    assert model.reconstruct(pixels, upsample=True).shape == (5, 3, 64, 64)
    path = tmp_path / "a.png"
    Image.fromarray(pixels[1]).save(path)
    for images in (path, iter([path]), [path], pixels[1]):
        close(model.reconstruct(images), expected[1:2], 1e-6)
    close(bigbigan.reconstruct(path, model=model), expected[1:2], 1e-6)


def test_discriminate_pools_from_the_encoders_resolution(model: BigBiGAN, pixels: np.ndarray, tmp_path: Path) -> None:
    z = random_normal(5, Z_DIM)
    x = finished(pixels)
    small = x.reshape(5, 3, 32, 2, 32, 2).mean(dim=(3, 5))
    with torch.no_grad():
        expected = model.discriminator(small, z)
    for images in (small, x, pixels, list(pixels), small.float()):
        out = model.discriminate(images, z, batch_size=2)
        for name in ("score_x", "score_z", "score_xz"):
            assert getattr(out, name).shape == (5,)
            torch.testing.assert_close(getattr(out, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    path = tmp_path / "a.png"
    Image.fromarray(pixels[0]).save(path)
    close(model.discriminate(path, z[:1]).score_xz, expected.score_xz[:1], 1e-5)


def test_absent_scores_stay_absent() -> None:
    config = dataclasses.replace(TINY, discriminator=dataclasses.replace(TINY.discriminator, scores=("x",)))
    out = only("discriminator", config=config).discriminate(
        random_images(3, 3, 32, 32), random_normal(3, Z_DIM), batch_size=2
    )
    assert out.score_x.shape == (3,) and out.score_z is None and out.score_xz is None and len(out.present()) == 1


def test_images_alone_are_scored_and_their_rotation_told() -> None:
    config = dataclasses.replace(TINY.discriminator, scores=("x",), rotation_head=True)
    model = only("discriminator", config=dataclasses.replace(TINY, discriminator=config))
    x = random_images(3, 3, 32, 32).float()
    out = model.discriminate(x, batch_size=2)
    close(out.score_x, model.discriminator(x).score_x, 1e-5)
    close(out.rotation, model.discriminator(x).rotation, 1e-5)
    assert out.rotation.shape == (3, 4)
    with pytest.raises(ValueError, match="expected"):
        model.discriminate(x[:0])
    with pytest.raises(ValueError, match="scores x, z, xz need latents"):
        only("discriminator").discriminate(x)


def test_pairs_that_do_not_match_are_refused(model: BigBiGAN) -> None:
    x = random_images(3, 3, 32, 32)
    for images, z in ((x, torch.zeros(2, Z_DIM)), (x, torch.zeros(3, Z_DIM + 1)), (x[0], torch.zeros(1, Z_DIM))):
        with pytest.raises(ValueError, match="expected"):
            model.discriminate(images, z)
    with pytest.raises(ValueError, match="48, 48"):
        model.discriminate(random_images(3, 3, 48, 48), torch.zeros(3, Z_DIM))


# ---- parts ----


CALLS: dict[str, Any] = {
    "generator": [
        lambda m: m.generate(1),
        lambda m: m.sample_latents(1),
        lambda m: m.reconstruct(torch.zeros(1, 3, 64, 64)),
    ],
    "encoder": [lambda m: m.encode(torch.zeros(1, 3, 64, 64)), lambda m: m.reconstruct(torch.zeros(1, 3, 64, 64))],
    "discriminator": [lambda m: m.discriminate(torch.zeros(1, 3, 32, 32), torch.zeros(1, Z_DIM))],
}


@pytest.mark.parametrize("missing", CALLS)
def test_a_missing_part_is_named(missing: str) -> None:
    partial = only(*(part for part in CALLS if part != missing))
    assert getattr(partial, missing) is None and missing not in partial.parts
    for call in CALLS[missing]:
        with pytest.raises(ValueError, match=missing) as caught:
            call(partial)
        assert all(part in str(caught.value) for part in partial.parts)


def test_parts_are_chosen_by_name_in_any_order() -> None:
    assert only("discriminator", "generator").parts == ("generator", "discriminator")
    assert create_model(TINY, parts="encoder").parts == ("encoder",)
    assert create_model(TINY).parts == TINY.parts == ("generator", "encoder", "discriminator")
    for parts, match in ((("decoder",), "decoder"), ((), "part")):
        with pytest.raises(ValueError, match=match):
            create_model(TINY, parts=parts)
    with pytest.raises(ValueError, match="encoder"):
        create_model(dataclasses.replace(TINY, encoder=None), parts=("encoder",))


def test_generator_and_encoder_load_alone(tmp_path: Path) -> None:
    full = create_model(TINY, seed=3)
    full.save(tmp_path / "model")
    for make, name in ((bigbigan.Generator, "generator"), (bigbigan.Encoder, "encoder")):
        network = make.from_pretrained(tmp_path / "model", dtype=torch.float64)
        assert type(network) is make and not network.training
        for key, tensor in full.part(name).state_dict().items():
            assert torch.equal(network.state_dict()[key], tensor.double())


def test_create_model_draws_each_part_from_its_seed_alone() -> None:
    full, again, other = create_model(TINY, seed=1), create_model(TINY, seed=1), create_model(TINY, seed=2)
    assert not any(m.training for m in full.modules())
    assert full.dtype == torch.float32 and full.device.type == "cpu"
    for name, tensor in full.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for part in full.parts:
        alone = create_model(TINY, seed=1, parts=(part,)).state_dict()
        assert alone and all(torch.equal(full.state_dict()[name], tensor) for name, tensor in alone.items())
        weights = [name for name in alone if name.endswith("weight") and alone[name].ndim > 1]
        assert all(not torch.equal(other.state_dict()[name], alone[name]) for name in weights)
    assert create_model(TINY, dtype=torch.float64).generate(1, seed=0).dtype == torch.float64


def test_create_model_by_name() -> None:
    tiny = create_model("BigBiGAN_Tiny")
    assert tiny.info.name == "bigbigan-tiny" and "random" in tiny.info.source
    image = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    out = tiny.encode(image)
    assert tiny.reconstruct(image).shape == (1, 3, 32, 32) and len(tiny.discriminate(image, out.z_mean).present()) == 3
    assert [p.size for p in tiny.to_pil(tiny.generate(2))] == [(32, 32)] * 2
    with pytest.raises(ValueError, match="bigbigan-tiny"):
        create_model("bigbigan-tyni")
    assert "bigbigan-tiny" in bigbigan.list_models() and bigbigan.list_models("*tin*") == ["bigbigan-tiny"]
    assert bigbigan.list_models("BigBiGAN_RevNet*") == [f"bigbigan-revnet50{s}" for s in ("", "x2", "x4-base-lr", "x4")]


def test_parts_are_modules_with_gradients(model: BigBiGAN, pixels: np.ndarray) -> None:
    z = model.sample_latents(2, seed=0).requires_grad_()
    model.discriminator(model.generator(z), z).score_xz.sum().backward()
    assert z.grad.abs().min() > 0
    assert not model.generate(z).requires_grad and not model.encode(pixels).z_mean.requires_grad
    model.zero_grad()


def test_methods_leave_weights_and_modes_alone(model: BigBiGAN, pixels: np.ndarray) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = finished(pixels)
    copy, z = given.clone(), model.sample_latents(5, seed=0)
    latents = z.clone()
    model.encode(given)
    model.discriminate(given, z)
    model.generate(z)
    model.reconstruct(given)
    assert torch.equal(given, copy) and torch.equal(z, latents)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
