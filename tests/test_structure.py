"""What holds of the source as a whole: directions of imports, sizes, and what it never does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigbigan

PACKAGE = Path(bigbigan.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {path: path.relative_to(PACKAGE).as_posix() for path in FILES}
CONVERSION = sorted((PACKAGE.parent / "weights_conversion").glob("*.py"))
ALL = {**NAMES, **{path: f"weights_conversion/{path.name}" for path in CONVERSION}}
OWN = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}  # modules and folders of the package

# A module of the core may import those on the lines above its own; a new one needs a place here.
CORE_LEVELS = [
    {"_version", "schema", "files", "arrays", "listing", "collectives", "markdown"},
    {"config", "outputs", "saving", "exchange"},
    # Storage knows configurations and state dicts, but no network.
    {"integrity", "modelcard", "presets"},
    {"modelfolder"},
    {"hub"},
    {"pretrained", "crossreplica", "onednn", "images"},
    {"layers", "grids"},
    {"resnet", "generator", "discriminator"},
    {"reversible"},
    {"revnet"},
    {"encoder"},
    {"graph_operations"},
    {"mlp", "graph"},
    {"fused"},
    {"model"},
    {"factory", "onnx"},
    {"commands"},
    {"cli"},
    {"__init__", "__main__"},
]
LEVEL = {name: level for level, names in enumerate(CORE_LEVELS) for name in names}
COMMAND_LINE = {"cli", "commands", "__main__"}
# What every command imports, before the module of the verb that it asks for.
LIGHT = {"__main__.py", "cli.py", *(f"commands/{name}.py" for name in ("__init__", "evaluation", "options", "verbs"))}
ROOMS = ["data", "evaluation", "training"]  # each may import those before it, and the core
UPPER = {*ROOMS, "weights_conversion"}


def imports(source: ast.AST, *, deep: bool) -> Iterator[str]:
    """Full names that are imported: by functions too if `deep`, else only as the module itself is."""
    for node in ast.iter_child_nodes(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, deep=deep)


def roots(path: Path, *, deep: bool) -> set[str]:
    """Packages that are imported; of our own, the module or folder in it (`bigbigan.config` gives "config")."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [name.split(".") for name in imports(tree, deep=deep)]
    return {parts[1] if parts[0] == "bigbigan" and parts[1:2] and parts[1] in OWN else parts[0] for parts in names}


def test_core_modules_import_downwards_only() -> None:
    for path in PACKAGE.glob("*.py"):
        assert path.stem in LEVEL, f"{path.name} is new: give it a place in CORE_LEVELS"
        if path.stem in COMMAND_LINE:
            continue
        found = roots(path, deep=True)  # deferred ones too: those are for optional or slow packages
        assert "bigbigan" not in found, f"{path.name} imports the package that imports it"
        for name in found & set(LEVEL) - {path.stem}:  # bigbigan.onnx imports onnx
            assert LEVEL[name] < LEVEL[path.stem], f"{path.name} imports {name}"


def test_rooms_import_downwards_only() -> None:
    for path, name in NAMES.items():
        folder = name.split("/")[0].removesuffix(".py")
        if name in LIGHT:
            assert not roots(path, deep=False) & UPPER, name
        if folder in COMMAND_LINE:
            continue
        elif folder in UPPER:
            above = {"weights_conversion", *ROOMS[ROOMS.index(folder) + 1 :]}
            assert not roots(path, deep=True) & (above | COMMAND_LINE), name
        else:
            assert not roots(path, deep=True) & (UPPER | COMMAND_LINE), name


def test_the_command_line_alone_knows_argparse() -> None:
    users = {name for path, name in NAMES.items() if "argparse" in path.read_text(encoding="utf-8")}
    assert users and all(name.split("/")[0] in {"commands", "cli.py"} for name in users), users


FOREIGN = {"tensorflow", "jax", "torchvision"}
ON_DEMAND = {"datasets", "fsspec", "huggingface_hub", "pyarrow", "sklearn", "scipy", "pandas", "timm", "transformers"}
ON_DEMAND |= {"matplotlib", "torchmetrics", "torch_fidelity"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    assert not roots(path, deep=True) & FOREIGN
    assert not roots(path, deep=False) & ON_DEMAND


def test_conversion_needs_the_core_alone() -> None:
    for path in CONVERSION:
        assert not roots(path, deep=True) & ((UPPER - {"weights_conversion"}) | COMMAND_LINE), path.name
        assert not roots(path, deep=False) & (FOREIGN | {"google", "kagglehub"}), path.name


@pytest.mark.parametrize("path", ALL, ids=ALL.get)
def test_files_stay_small_and_have_a_name(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 440


UNSAFE_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "importlib.import_module"}
TORCH_CALLS = {"torch.load", "torch.save", "torch.manual_seed", "torch.seed", "torch.set_default_dtype"}
UNSAFE_OPTIONS = {
    ("strict", "False"),
    ("allow_pickle", "True"),
    ("shell", "True"),
    ("weights_only", "False"),
    ("trust_remote_code", "True"),
}


def forbidden(source: str) -> Iterator[tuple[int, str]]:
    """What could run data as code, load half a model, move global state or hide an error: (line, what)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            yield from ((node.lineno, str(name)) for name in names & UNSAFE_MODULES)
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "except:"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in UNSAFE_CALLS | TORCH_CALLS or called.endswith(".extractall"):
                yield node.lineno, called
            for keyword in node.keywords:
                if called != "zip" and (keyword.arg, ast.unparse(keyword.value)) in UNSAFE_OPTIONS:
                    yield node.lineno, f"{called}({keyword.arg}=…)"


@pytest.mark.parametrize("path", ALL, ids=ALL.get)
def test_nothing_runs_data_as_code_or_loads_half_a_model(path: Path) -> None:
    found = [what for _, what in forbidden(path.read_text(encoding="utf-8"))]
    # The one place that reads a pickle: in a child process, and `torch.load` is told to build tensors alone.
    assert found == (["torch.load"] if ALL[path] == "weights_conversion/biggan_pth.py" else [])


def test_the_one_pickle_is_read_with_weights_only() -> None:
    source = (PACKAGE.parent / "weights_conversion" / "biggan_pth.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    options = {keyword.arg: ast.unparse(keyword.value) for call in calls for keyword in call.keywords}
    assert len(calls) == 1 and options["weights_only"] == "True"


def test_the_gate_sees_what_it_forbids() -> None:
    bad = [
        "import pickle",
        "from marshal import loads",
        "torch.load(f)",
        "m.load_state_dict(s, strict=False)",
        "exec(s)",
    ]
    bad += ["np.load(f, allow_pickle=True)", "torch.manual_seed(0)", "archive.extractall()"]
    good = ["model.eval()", "zip(a, b, strict=False)", "safetensors.torch.load(b)", "re.compile(p)", "import json"]
    assert sorted(line for line, _ in forbidden("\n".join(bad + good))) == list(range(1, len(bad) + 1))


CHILD = """
import sys
events = []

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and ".pyc" not in str(args[0])
    if writes or event.startswith(("socket.", "subprocess.")):
        events.append((event, args))

sys.addaudithook(watch)
import torch
events.clear()
before = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
import bigbigan
after = torch.random.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
assert not events, events
names = {name.removeprefix("bigbigan.").split(".")[0] for name in sys.modules}
assert not names & %r, names & %r
assert all(hasattr(bigbigan, name) for name in bigbigan.__all__) and bigbigan.__version__
"""


def test_import_is_light_and_has_no_effects() -> None:
    absent = FOREIGN | ON_DEMAND | UPPER | COMMAND_LINE
    code = CHILD % (absent - {"__main__"}, absent - {"__main__"})
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
