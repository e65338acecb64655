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
CORE = [path for path in FILES if path.parent == PACKAGE]
NAMES = {
    path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES
}

# Each module of the core may import those on lines above its own; a new one needs a place here.
CORE_LEVELS = [
    {"_version", "config", "files"},
    {"layers", "images", "presets", "integrity"},
    {"resnet", "generator", "discriminator"},
    {"revnet"},
    {"encoder"},
    {"model"},
    {"modelcard"},
    {"modelfolder"},
    {"hub"},
    {"factory"},
    {"cli"},
    {"__main__", "__init__"},
]
LEVEL = {name: i for i, names in enumerate(CORE_LEVELS) for name in names}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(nodes: list[ast.stmt] | ast.Module, *, deep: bool) -> Iterator[str]:
    """Full names that are imported; without `deep`, when the module itself is."""
    body = nodes.body if isinstance(nodes, ast.Module) else nodes
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(
                [child for child in ast.walk(node) if child is not node and isinstance(child, ast.stmt)]
                if deep
                else [c for c in ast.iter_child_nodes(node) if isinstance(c, ast.stmt)],
                deep=deep,
            )


def own_modules(path: Path, *, deep: bool) -> set[str]:
    """Modules of the package that `path` imports, without the leading `bigbigan.`."""
    known = {name.removeprefix("bigbigan.") for name in NAMES.values()}
    found = set()
    for name in imports(tree(path), deep=deep):
        if name.split(".")[0] == "bigbigan":
            name = name.removeprefix("bigbigan.")
            while name and name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def test_core_modules_import_downwards_only() -> None:
    for path in CORE:
        assert path.stem in LEVEL, f"{path.name} is new: give it a place in CORE_LEVELS"
        for name in own_modules(path, deep=False):
            if "." not in name and name not in ("training", "evaluation"):
                assert LEVEL[name] < LEVEL[path.stem], f"{path.name} imports {name}"


def test_core_imports_neither_training_nor_evaluation_nor_conversion() -> None:
    for path in CORE:
        deep = path.stem != "cli"  # the command line imports them when a command asks for them
        roots = {name.split(".")[0] for name in own_modules(path, deep=deep)}
        assert not roots & {"training", "evaluation"}, path.name
        assert "weights_conversion" not in {name.split(".")[0] for name in imports(tree(path), deep=deep)}, path.name


def test_evaluation_imports_the_core_and_training_both() -> None:
    for path in FILES:
        folder = path.relative_to(PACKAGE).parts[0]
        modules = own_modules(path, deep=True)
        if folder in ("training", "evaluation"):
            assert not modules & {"cli", "__main__"}, path
            assert "weights_conversion" not in {name.split(".")[0] for name in imports(tree(path), deep=True)}, path
        if folder == "evaluation":
            assert not {name for name in modules if name.split(".")[0] == "training"}, path


HEAVY = {"tensorflow", "jax", "torchvision", "timm", "matplotlib", "datasets", "torchmetrics"}
EXTRAS = {"pyarrow", "sklearn", "scipy", "huggingface_hub", "pandas"}


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_foreign_imports(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(tree(path), deep=True)} & HEAVY
    assert not {name.split(".")[0] for name in imports(tree(path), deep=False)} & EXTRAS


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_files_stay_small(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 440


def forbidden(path: Path) -> Iterator[str]:
    """What could run data as code, or load weights that do not fit."""
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
            for name in names & {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}:
                yield f"{where} imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("eval", "exec", "compile", "__import__", "os.system", "importlib.import_module"):
            yield f"{where} calls {called}"
        if (
            called.endswith(("torch.load", "torch.save", ".extractall", "manual_seed_all"))
            or called == "torch.manual_seed"
        ):
            yield f"{where} calls {called}"
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if called != "zip" and (keyword.arg, value) in [
                ("strict", "False"),
                ("allow_pickle", "True"),
                ("shell", "True"),
                ("weights_only", "False"),
                ("trust_remote_code", "True"),
            ]:
                yield f"{where} passes {keyword.arg}={value}"


@pytest.mark.parametrize("path", FILES, ids=NAMES.get)
def test_nothing_runs_data_as_code_or_loads_half_a_model(path: Path) -> None:
    assert not list(forbidden(path))
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path}:{node.lineno} catches all"


def test_the_gate_sees_what_it_forbids(tmp_path: Path) -> None:
    lines = ["import pickle", "from torch import nn", "x = torch.load(f)", "m.load_state_dict(s, strict=False)"]
    lines += [
        "eval(x)",
        "model.eval()",
        "zip(a, b, strict=False)",
        "np.load(f, allow_pickle=True)",
        "torch.manual_seed(0)",
    ]
    path = tmp_path / "bad.py"
    path.write_text("\n".join(lines))
    assert [int(line.split(":")[1].split()[0]) for line in forbidden(path)] == [1, 3, 4, 5, 8, 9]


CHILD = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append((event, args)) if event.startswith(("socket.", "subprocess.")) or (
    event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")) else None)
import torch
events.clear()
state = torch.random.get_rng_state()
threads = torch.get_num_threads()
import bigbigan
loaded = {name.split(".")[0] for name in sys.modules} & %r
assert not loaded, loaded
assert not [name for name in sys.modules if name.startswith(("bigbigan.training", "bigbigan.evaluation", "bigbigan.cli"))]
assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == threads
assert not [event for event in events if ".pyc" not in str(event)], events
assert all(hasattr(bigbigan, name) for name in bigbigan.__all__) and bigbigan.__version__
"""


def test_import_is_light_and_has_no_effects() -> None:
    code = CHILD % (HEAVY | EXTRAS | {"tqdm.auto", "weights_conversion"})
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert result.returncode == 0, result.stderr
