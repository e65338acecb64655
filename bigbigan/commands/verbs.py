"""What each verb and protocol does, in a line; the module that defines it is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

GROUPS = {  # verbs by the module that defines them
    "pictures": {
        "generate": "draw images from random latents",
        "reconstruct": "encode images and draw them again",
        "interpolate": "draw the way between two images through latent space",
    },
    "encode": {"encode": "write features of images to one file"},
    "models": {"list": "list named models", "info": "show what a model is"},
    "conversion": {
        "convert": "turn a TF-Hub module, or a .pth of others, into a model folder",
        "push": "put a model folder into a repository on the Hugging Face Hub",
    },
    "onnx": {"export-onnx": "write the parts of a model as ONNX files"},
    "training": {
        "recipes": "list training recipes",
        "train": "train a model, or resume a run",
        "export": "turn a snapshot of a run into a model folder",
    },
    "evaluation": {"evaluate": "measure a model on labelled images"},
    "report": {"report": "put records of `evaluate` and training runs together in a Markdown document"},
}
PROTOCOLS = {  # of `evaluate`
    "probes": {
        "linear": "accuracy of a linear classifier on frozen features",
        "knn": "accuracy of the majority among the nearest training images",
    },
    "reconstruction": {"reconstruction": "how well reconstructions keep labels, pixels and features"},
    "generation": {"generation": "FID, KID and Inception Score of samples, or the same in another network"},
    "retrieval": {"retrieval": "nearest images by features: a picture, and precision@k where there are labels"},
    "rotation": {"rotation": "how well a discriminator recognises the rotation of test images"},
}
ABOUT = {name: about for group in (*GROUPS.values(), *PROTOCOLS.values()) for name, about in group.items()}


def add_verbs(commands: Any, argv: Sequence[str] | None) -> None:
    """Adds all verbs to a parser; those that `argv` does not ask for only by name. None adds all of them in full."""
    _add(GROUPS, commands, argv, 0)


def add_protocols(protocols: Any, argv: Sequence[str] | None) -> None:
    """The protocols of `evaluate`, as `add_verbs`."""
    _add(PROTOCOLS, protocols, argv, 1)


def _add(groups: dict[str, dict[str, str]], commands: Any, argv: Sequence[str] | None, place: int) -> None:
    words = [word for word in argv or () if not word.startswith("-")]  # no option before a verb takes a value
    asked = words[place : place + 1]
    for module, verbs in groups.items():
        if argv is None or set(asked) & set(verbs):
            _define(module, commands, argv)
        else:
            for name, about in verbs.items():
                commands.add_parser(name, help=about)


def _define(module: str, commands: Any, argv: Sequence[str] | None) -> None:
    if module == "evaluation":
        from bigbigan.commands.evaluation import add_evaluate

        add_evaluate(commands, argv)
        return
    if module == "pictures":
        from bigbigan.commands.pictures import add_parsers
    elif module == "encode":
        from bigbigan.commands.encode import add_parsers
    elif module == "models":
        from bigbigan.commands.models import add_parsers
    elif module == "conversion":
        from bigbigan.commands.conversion import add_parsers
    elif module == "onnx":
        from bigbigan.commands.onnx import add_parsers
    elif module == "training":
        from bigbigan.commands.training import add_parsers
    elif module == "report":
        from bigbigan.commands.report import add_parsers
    elif module == "probes":
        from bigbigan.commands.probes import add_parsers
    elif module == "reconstruction":
        from bigbigan.commands.reconstruction import add_parsers
    elif module == "generation":
        from bigbigan.commands.generation import add_parsers
    elif module == "retrieval":
        from bigbigan.commands.retrieval import add_parsers
    else:
        from bigbigan.commands.rotation import add_parsers
    add_parsers(commands)
