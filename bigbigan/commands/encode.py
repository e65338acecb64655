"""`encode`: features of many image files."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import timedelta

from bigbigan.commands.options import (
    Commands,
    add_command,
    add_fuse_option,
    add_image_options,
    add_model_options,
    image_options,
    names,
    open_model,
    positive,
)


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "encode",
        _encode,
        "write features of images to one file\n\n"
        "Formats, by the suffix of -o; rows are float32, in the order of the sorted names:\n"
        "  .npz          an array [N, D] an output, and `paths`\n"
        "  .safetensors  a tensor [N, D] an output, and a JSON list `paths` in the metadata\n"
        "  .parquet      a column `path`, and a list column an output (needs pyarrow)\n"
        "Names are relative to the folder, if one folder is given; bytes of them that are not UTF-8 become \\xNN.\n"
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
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
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
        "--workers", type=int, metavar="N", help="processes that read and scale images ahead (default: by cores)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of z_sample (default: %(default)s)")
    add_image_options(parser)
    add_model_options(parser)
    add_fuse_option(parser)


def _encode(arguments: argparse.Namespace) -> int:
    import torch

    from bigbigan.evaluation.encoding import encode_files, find_images

    files = find_images(arguments.images)
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
