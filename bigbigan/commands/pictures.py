"""`generate`, `reconstruct`, `interpolate`: verbs that write pictures."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_fuse_option,
    add_image_options,
    add_model_options,
    add_output,
    check_picture,
    image_options,
    open_model,
    positive,
)
from bigbigan.evaluation.sample_record import NAME, write_record
from bigbigan.grids import CELL, enlargement, grid_layout, make_grid, make_pairs, match_size
from bigbigan.images import asset_images, list_images, save_image
from bigbigan.model import BigBiGAN
from bigbigan.outputs import PICTURE, SAMPLES, check_output, claim, claim_pictures

BATCH = 32


def add_parsers(commands: Commands) -> None:
    _add_generate(commands)
    _add_reconstruct(commands)
    _add_interpolate(commands)


def _add_generate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "generate",
        _generate,
        "Writes one picture with all of them in a grid, or a folder of files 000000.png, 000001.png, …\n"
        "A folder that holds such files already is refused, unless --overwrite replaces all of them.\n"
        "Image i depends on the seed and i alone: a larger -n adds to the same images.",
        "Example: bigbigan generate -n 64 -o samples.png --seed 1\nExit codes: 0 done, 2 wrong usage or no such model.",
    )
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    parser.add_argument("-n", "--number", type=positive, default=16, metavar="N", help="images (default: %(default)s)")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help=".png, .jpg or .webp for a grid; a folder (existing, or ending in /) for single files",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the pictures 000000.png, … of an earlier call in the folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="bound on the latents, 0.5 for instance: less variety, fewer failures (default: none)",
    )
    parser.add_argument(
        "--truncation-mode",
        choices=("resample", "scale"),
        default="resample",
        help="draw values beyond T again, or multiply all by T (default: %(default)s)",
    )
    parser.add_argument("--upsample", action="store_true", help="enlarge to the size of the `upsampled` output")
    _add_layout_options(parser, "the square root of N")
    add_model_options(parser)
    add_fuse_option(parser)


def _add_reconstruct(commands: Commands) -> None:
    parser = add_command(
        commands,
        "reconstruct",
        _reconstruct,
        "Writes one picture: rows of originals, as the encoder sees them, each above the row of their\n"
        "reconstructions. Without IMAGE, the package's own model reconstructs test images that it has never seen.",
        "Example: bigbigan reconstruct -o demo.png\n"
        "Exit codes: 0 done, 2 wrong usage, no such model or an unreadable image.",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files, or folders of them")
    add_output(parser, "-o", "--output", kind=PICTURE, required=True, metavar="PICTURE", help=".png, .jpg or .webp")
    parser.add_argument("--use-sample", action="store_true", help="from a sample of the latent, not from its mean")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--upsample", action="store_true", help="enlarge to the size of the `upsampled` output")
    _add_layout_options(parser, "8")
    add_image_options(parser)
    add_model_options(parser)
    add_fuse_option(parser)


def _add_interpolate(commands: Commands) -> None:
    parser = add_command(
        commands,
        "interpolate",
        _interpolate,
        "Writes one row: image A, drawings of the latents from A's to B's, image B.",
        "Example: bigbigan interpolate a.png b.png -o strip.png --steps 10\n"
        "Exit codes: 0 done, 2 wrong usage, no such model or an unreadable image.",
    )
    parser.add_argument("a", metavar="A", help="an image file")
    parser.add_argument("b", metavar="B", help="another one")
    add_output(parser, "-o", "--output", kind=PICTURE, required=True, metavar="PICTURE", help=".png, .jpg or .webp")
    parser.add_argument("--steps", type=positive, default=8, metavar="N", help="drawings (default: %(default)s)")
    parser.add_argument("--spherical", action="store_true", help="along the arc, not the straight line")
    parser.add_argument("--upsample", action="store_true", help="enlarge to the size of the `upsampled` output")
    _add_layout_options(parser)
    add_image_options(parser)
    add_model_options(parser)
    add_fuse_option(parser)


def _add_layout_options(parser: argparse.ArgumentParser, columns: str | None = None) -> None:
    if columns:
        parser.add_argument("--columns", type=positive, metavar="N", help=f"of the grid (default: {columns})")
    parser.add_argument(
        "--scale",
        type=positive,
        metavar="N",
        help="each pixel as a square of N (default: up to 64 pixels an image)",
    )


def _generate(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    single = arguments.output.endswith("/") or output.is_dir()
    if arguments.name and arguments.model:
        raise ValueError(f"MODEL is {arguments.name} and --model is {arguments.model}; give one of them")
    if single:
        check_output(output / NAME, SAMPLES)
        with claim_pictures(output, overwrite=arguments.overwrite) as earlier:
            return _draw(arguments, output, earlier)
    with claim(output, PICTURE):
        return _draw(arguments, output, None)


def _draw(arguments: argparse.Namespace, output: Path, earlier: list[Path] | None) -> int:
    """Into a folder, in place of `earlier` pictures there; None: into one picture."""
    model = open_model(arguments, ("generator",), arguments.name)
    _check_layout(arguments, model, arguments.number if earlier is None else 1, arguments.columns)
    drawn = []
    for start in range(0, arguments.number, BATCH):
        z = model.sample_latents(
            min(BATCH, arguments.number - start),
            seed=arguments.seed,
            start=start,
            truncation=arguments.truncation,
            truncation_mode=arguments.truncation_mode,
        )
        images = model.generate(z, upsample=arguments.upsample)  # [n, C, S, S]
        if earlier is None:
            drawn.append(images)
            continue
        while earlier:  # the first new images are there: the old ones go before the two can mix
            earlier.pop().unlink()
        if start == 0:
            write_record(output, model)
        for index, image in enumerate(images, start):
            save_image(make_grid(image[None], scale=arguments.scale or 1), output / f"{index:06d}.png")
    if drawn:
        grid = make_grid(torch.cat(drawn), arguments.columns, scale=arguments.scale or enlargement(images))
        save_image(grid, output)
    return 0


def _reconstruct(arguments: argparse.Namespace) -> int:
    if arguments.images:
        given = [Path(image) for image in arguments.images]
        files = [file for path in given for file in (list_images(path) if path.is_dir() else [path])]
    elif arguments.model is None:
        files = asset_images()
    else:
        raise ValueError("name the images to reconstruct; only the package's own model brings some along")
    check_picture(arguments.output, files)
    model = open_model(arguments, ("generator", "encoder"))
    columns = min(arguments.columns or 8, len(files))
    _check_layout(arguments, model, 2 * columns * math.ceil(len(files) / columns), columns)
    x = model.preprocess(files, **image_options(arguments))
    options = {"use_sample": arguments.use_sample, "upsample": arguments.upsample, "seed": arguments.seed}
    again = model.reconstruct(x, **options)
    save_image(make_pairs(x, again, columns, scale=arguments.scale), arguments.output)
    return 0


def _interpolate(arguments: argparse.Namespace) -> int:
    images = [arguments.a, arguments.b]
    check_picture(arguments.output, images)
    model = open_model(arguments, ("generator", "encoder"))
    _check_layout(arguments, model, arguments.steps + 2, arguments.steps + 2)
    x = model.preprocess(images, **image_options(arguments))
    z = model.encode(x).z_mean
    way = slerp if arguments.spherical else torch.lerp
    t = torch.linspace(0, 1, arguments.steps)[:, None].to(z)
    drawn = model.generate(way(z[:1], z[1:], t), upsample=arguments.upsample)
    ends = match_size(x, drawn)
    strip = torch.cat([ends[:1], drawn, ends[1:]])
    save_image(make_grid(strip, len(strip), scale=arguments.scale or enlargement(drawn)), arguments.output)
    return 0


def _check_layout(arguments: argparse.Namespace, model: BigBiGAN, number: int, columns: int | None) -> None:
    """Refuses a picture that would be too large before anything is drawn."""
    config = model.part("generator").config
    side = config.upsample_size if arguments.upsample else config.resolution
    grid_layout(number, (side, side), columns, scale=arguments.scale or max(1, CELL // side))


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """[T, D] on the arc from a to b [1, D] at t [T, 1]; on the straight line where they (nearly) line up.

    Shoemake 1985, "Animating rotation with quaternion curves", without normalising a and b.
    """
    angle = torch.cosine_similarity(a, b).clamp(-1, 1).acos()
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, t)
    return (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
