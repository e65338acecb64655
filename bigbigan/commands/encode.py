"""`encode`: features of many image files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_fuse_option,
    add_image_options,
    add_model_options,
    image_options,
    names,
    not_negative,
    open_model,
    positive,
)
from bigbigan.data.opening import open_dataset
from bigbigan.data.paths import holds_rows
from bigbigan.evaluation.encoding import StoredImage, encode_files, find_images
from bigbigan.evaluation.pairing import row_names
from bigbigan.files import file_name
from bigbigan.listing import has_images


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "encode",
        _encode,
        "Formats, by the suffix of -o; rows are float32, in the order of the sorted names:\n"
        "  .npz          an array [N, D] an output, and `paths`\n"
        "  .safetensors  a tensor [N, D] an output, and a JSON list `paths` in the metadata\n"
        "  .parquet      a column `path`, and a list column an output (needs pyarrow)\n"
        "Names are relative to the folder, if one folder is given; bytes of them that are not UTF-8 become \\xNN.\n"
        "Rows of data sets are called 000000, 000001, … in the order of their split.\n"
        "Outputs of an encoder:\n"
        "  avepool_feat   average pool of the last layer, the features to start from\n"
        "  bn_crelu_feat  [ReLU(h), ReLU(-h)] of the batch-normalised average pool h, twice as wide\n"
        "  z_mean, z_stdev, z_sample   the latent's distribution, and a sample of it\n\n"
        "Unreadable files are reported on stderr and in OUTPUT.failures.jsonl (path and reason a line); the other\n"
        "rows are bit for bit what they would be without them. --batch-size changes rows by rounding alone, on a\n"
        "CPU by less than 1e-6 of an output's largest value.\n"
        "Finished work is kept in OUTPUT.partial/: after a crash, the same command does only the rest.\n"
        "Several processes share the work under torchrun --nproc-per-node 2 -m bigbigan encode …; their rows differ\n"
        "from those of one by rounding alone.",
        "Example: bigbigan encode photos/ -o features.npz --outputs avepool_feat\n"
        "Exit codes: 0 all done, 1 some files failed, 2 wrong usage, no such model, or the output cannot be written,\n"
        "3 no file worked.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders of them, or data sets as `evaluate --data` takes them (.parquet, folders of it, "
        "hf:NAME); @FILE is a list of these, one a line or with NUL between, and - such a list on standard input",
    )
    parser.add_argument(
        "--split", default="train", metavar="SPLIT", help="of data sets; train[:100] is a part (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=".npz, .safetensors or .parquet")
    parser.add_argument(
        "--outputs",
        type=names,
        default="avepool_feat,bn_crelu_feat,z_mean,z_stdev,z_sample",
        metavar="LIST",
        help="with commas between (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=not_negative,
        metavar="N",
        help="processes that read and scale images ahead (default: by cores)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of z_sample (default: %(default)s)")
    add_image_options(parser)
    add_model_options(parser)
    add_fuse_option(parser)


def _encode(arguments: argparse.Namespace) -> int:
    files = _find(arguments)
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if world_size > 1:
        if arguments.device in ("auto", "cuda") and torch.cuda.is_available():
            arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        # The first to finish waits for the last, however long that takes; a process that died ends the others anyway.
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
    report = encode_files(
        open_model(arguments, ("encoder",)),
        files,
        arguments.output,
        outputs=arguments.outputs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        workers=arguments.workers,
        rank=rank,
        world_size=world_size,
        progress=not arguments.quiet,
        **image_options(arguments),
    )
    code = 3 if not report.done else 1 if report.failed else 0
    if world_size > 1:
        torch.distributed.destroy_process_group()
        if rank:  # one of them speaks for all
            return code
    for name, reason in report.failed:
        print("bigbigan encode: skipped", f"{name}: {reason}".replace("\n", "\\n"), file=sys.stderr)
    if not arguments.quiet:
        where = f"in {arguments.output}" if report.done else f"so there is no {arguments.output}"
        print(f"bigbigan encode: {report.done} of {len(files)} images {where}", file=sys.stderr)
    return code


def _find(arguments: argparse.Namespace) -> dict[str, Path | StoredImage]:
    """Pictures by the names of their rows: those of files first, then those of each data set."""
    given = _listed(arguments.images)
    sets = [name for name in given if _is_data_set(name)]
    files: dict[str, Path | StoredImage] = {}
    if others := [name for name in given if name not in sets]:
        files |= find_images(others)
    for name in sets:
        rows = _rows(name, arguments.split)
        files |= rows if len(given) == 1 else {f"{file_name(name)}/{row}": image for row, image in rows.items()}
    return files


def _rows(name: str, split: str) -> dict[str, Path | StoredImage]:
    dataset = open_dataset(name, split=split, label_column=None)
    return {
        row: StoredImage(partial(dataset.sources.__getitem__, index), f"{dataset.digest} {index}")
        for index, row in enumerate(row_names(dataset))
    }


def _listed(inputs: Sequence[str]) -> list[str]:
    """The inputs, with each list in place of its name; a file of that very name is that file.

    Raises:
        ValueError: a list that cannot be read, or names nothing.
    """
    given: list[str] = []
    for name in inputs:
        if os.path.exists(name) or (name != "-" and not name.startswith("@")):
            given.append(name)
            continue
        if name == "-":
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("several processes cannot share standard input; name a list as @FILE")
            data = sys.stdin.buffer.read()
        else:
            try:
                data = Path(name[1:]).read_bytes()
            except OSError as error:
                raise ValueError(f"{name}: the list {name[1:]} cannot be read ({error.strerror})") from error
        data = data.removeprefix(b"\xef\xbb\xbf")
        lines = data.split(b"\0") if b"\0" in data else data.splitlines()
        if not (found := [os.fsdecode(line) for line in lines if line.strip()]):
            raise ValueError(f"{name}: the list names no images")
        given += found
    return given


def _is_data_set(name: str) -> bool:
    """Whether this leads to rows; a folder with pictures in it is a folder of pictures, whatever else it holds."""
    path = Path(name)
    if path.is_dir():
        return holds_rows(name) and not has_images(path)
    return (
        name.startswith("hf:")
        or (path.suffix == ".parquet" and path.is_file())
        or (not path.exists() and "?" in name and holds_rows(name))
    )
