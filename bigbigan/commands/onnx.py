"""`export-onnx`: parts of a model for other runtimes."""

from __future__ import annotations

import argparse

from bigbigan.commands.options import Commands, add_command, add_model_options, columns_text, names, open_model
from bigbigan.onnx import export_onnx


def add_parsers(commands: Commands) -> None:
    parser = add_command(
        commands,
        "export-onnx",
        _export_onnx,
        "generator.onnx: z -> images. encoder.onnx: x, noise -> z_sample, z_mean, z_stdev, avepool_feat,\n"
        "bn_crelu_feat. discriminator.onnx: x, z -> scores. Any batch size. Images are [N, C, S, S] in [-1, 1], noise\n"
        "is [N, z_dim] from N(0, 1), and no input of a deterministic encoder. Each file is compared with the model in\n"
        "ONNX Runtime at batches of 1, 2 and 3; above 1e-4 of an output's largest value it is not written.\n"
        "Needs the extra: pip install 'bigbigan[onnx]'.",
        "Example: bigbigan export-onnx -o onnx/ --parts encoder\n"
        "Exit codes: 0 done, 2 wrong usage, no such model, or refused.",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--parts", type=names, metavar="LIST", help="with commas between (default: all of the model)")
    add_model_options(parser)


def _export_onnx(arguments: argparse.Namespace) -> int:
    model = open_model(arguments, arguments.parts)
    reports = export_onnx(model, arguments.output)
    rows = [(str(r.path), _text(r.inputs), _text(r.outputs), f"{r.difference:.1e}") for r in reports]
    print(columns_text(("FILE", "INPUTS", "OUTPUTS", "DIFFERENCE"), rows))
    return 0


def _text(shapes: dict[str, list[int | str]]) -> str:
    return " ".join(f"{name}[{','.join(map(str, shape))}]" for name, shape in shapes.items())
