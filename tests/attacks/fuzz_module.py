"""Damaged TF-Hub modules: `python -m tests.attacks.fuzz_module --seed 1 --count 20000` (see README.md).

Kinds: `bundle` damages the variables, `graph` saved_model.pb and tfhub_module.pb, of a module of a few layers, which is
then read, and evaluated as the converter evaluates it; `flips` changes single bytes of the bundle, one after the other;
`small` mixes these three; `convert` damages a whole BigBiGAN module's graph and converts it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import run_children, run_here
from .mutations import flipped, mutated
from .table import entries, written

DATA, INDEX, GRAPH, MARKER = (
    "variables/variables.data-00000-of-00001", "variables/variables.index", "saved_model.pb", "tfhub_module.pb",
)  # fmt: skip
EVALUATION = 1 << 30  # bytes: what a graph computes may be larger than its file; the harness allows twice this
NUMBERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 7, 2**16, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1)


def build(folder: Path, kind: str) -> None:
    """A sound module: a whole one for `convert`, one of a few layers otherwise."""
    from tests.tfhub_builder import module, variants

    module.build_module(folder, variants.PLAIN) if kind == "convert" else build_small(folder)


def build_small(folder: Path) -> None:
    """Variables of several types, their saver, a function, a branch, noise, and the common layers."""
    import numpy as np
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    from tests.tfhub_builder.module import save_variables

    v1, rng = tf.compat.v1, np.random.default_rng(0)
    values = {"conv/w": rng.normal(size=(3, 3, 3, 4)), "conv/b": rng.normal(size=4), "dense/w": rng.normal(size=(4, 6))}
    values |= {f"norm/{name}": rng.uniform(0.5, 1, 4) for name in ("scale", "offset", "mean", "var")}
    arrays: dict[str, Any] = {name: value.astype(np.float32) for name, value in values.items()}
    arrays |= {"step": np.int64(7), "half": np.ones(3, np.float16)}
    with tf.Graph().as_default() as graph:
        read = {
            name: v1.get_variable(name, initializer=a, use_resource=True) for name, a in arrays.items() if a.ndim > 1
        }
        read |= {
            name: v1.get_variable(name, initializer=a, use_resource=False) for name, a in arrays.items() if a.ndim == 1
        }
        v1.train.Saver(list(read.values()))
        x, training = v1.placeholder(tf.float32, (None, 8, 8, 3), "x"), tf.constant(False)

        @tf.function
        def bias(value: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
            return tf.nn.bias_add(value, offset)

        h = bias(tf.nn.conv2d(tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]]), read["conv/w"], 1, "VALID"), read["conv/b"])
        scale = tf.cond(training, lambda: read["norm/scale"] * 2.0, lambda: tf.identity(read["norm/scale"]))
        statistics = [read[f"norm/{name}"] for name in ("offset", "mean", "var")]
        h = v1.nn.fused_batch_norm(h, scale, *statistics, epsilon=1e-4, is_training=False)[0]
        h = tf.reduce_mean(tf.nn.max_pool2d(tf.nn.relu(h), 2, 2, "SAME"), [1, 2])
        h = tf.matmul(h, read["dense/w"] / tf.norm(read["dense/w"]))
        mean, spread = tf.split(tf.reshape(h, [tf.shape(h)[0], 6]), 2, 1)
        y = mean + tf.nn.softplus(spread) * tf.random.normal(tf.shape(mean))
        meta = v1.train.export_meta_graph(graph=graph, clear_devices=True)
        info = [{name: v1.saved_model.build_tensor_info(value)} for name, value in (("x", x), ("default", y))]
        meta.signature_def["default"].CopyFrom(v1.saved_model.build_signature_def(*info))
    saved = saved_model_pb2.SavedModel(saved_model_schema_version=1, meta_graphs=[meta])
    (folder / "variables").mkdir(parents=True)
    (folder / GRAPH).write_bytes(saved.SerializeToString(deterministic=True))
    (folder / MARKER).write_bytes(b"\x08\x03")
    save_variables(folder, arrays)


# ---- damage


def damaged_index(data: bytes, rng: random.Random) -> bytes:
    """Its bytes, or its entries behind right checksums."""
    if rng.random() < 0.4:
        return mutated(data, rng)
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import tensor_bundle_pb2 as bundle

    pairs = entries(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        i = rng.randrange(len(pairs))
        key, value = pairs[i]
        kind = rng.choice(("field", "field", "field", "value", "key", "drop", "repeat", "exchange"))
        if kind == "field":
            message = bundle.BundleEntryProto() if key else bundle.BundleHeaderProto()
            try:
                message.ParseFromString(value)
            except DecodeError:
                continue  # damaged by the round before
            change_field(message, rng)
            pairs[i] = key, message.SerializeToString()
        elif kind == "value":
            pairs[i] = key, mutated(value, rng)
        elif kind == "key":
            pairs[i] = mutated(key, rng), value
        elif kind == "exchange":
            j = rng.randrange(len(pairs))
            pairs[i], pairs[j] = (key, pairs[j][1]), (pairs[j][0], value)
        else:
            pairs[i : i + 1] = [] if kind == "drop" and len(pairs) > 1 else [pairs[i], pairs[i]]
    return written(pairs if rng.random() < 0.2 else sorted(pairs))


def change_field(message: Any, rng: random.Random) -> None:
    """One field of a message, at any depth, to another or an extreme value."""
    if not message.DESCRIPTOR.fields:
        return
    field = rng.choice(message.DESCRIPTOR.fields)
    value = getattr(message, field.name)
    repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
    if field.message_type and field.message_type.GetOptions().map_entry:
        keys = sorted(value)
        if keys and rng.random() < 0.3:
            del value[rng.choice(keys)]
        elif keys and hasattr(value, "MergeFrom") and field.message_type.fields_by_name["value"].message_type:
            change_field(value[rng.choice(keys)], rng)
    elif repeated and len(value) and rng.random() < 0.3:
        del value[rng.randrange(len(value))]
    elif field.message_type:
        change_field(rng.choice(value) if repeated and len(value) else value.add() if repeated else value, rng)
    else:
        new = _scalar(field, rng)
        try:
            if not repeated:
                setattr(message, field.name, new)
            elif len(value):
                value[rng.randrange(len(value))] = new
            else:
                value.append(new)
        except (ValueError, TypeError, OverflowError):
            pass  # not a value of this field


def _scalar(field: Any, rng: random.Random) -> Any:
    if field.cpp_type == field.CPPTYPE_STRING:
        return (
            rng.randbytes(rng.randrange(9))
            if field.type == field.TYPE_BYTES
            else rng.choice(("", "x", "a:1", "^a", "/"))
        )
    if field.cpp_type == field.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e38, float("nan"), float("inf")))
    if field.cpp_type == field.CPPTYPE_ENUM:
        return rng.randrange(0, 130)
    return rng.choice(NUMBERS)


def damaged_graph(data: bytes, rng: random.Random) -> bytes:
    """Its bytes, or nodes, signatures and functions of a graph that still parses."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString(data)
    meta = saved.meta_graphs[0]
    nodes = [*meta.graph_def.node] + [n for f in meta.graph_def.library.function for n in f.node_def]
    for _ in range(rng.choice((1, 1, 2, 4))):
        node, other = rng.choice(nodes), rng.choice(nodes)
        kind = rng.choice(
            ("op", "input", "input", "inputs", "attribute", "attribute", "tensor", "name", "any", "signature")
        )
        if kind == "op":
            node.op = other.op
        elif kind == "input" and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                (other.name, f"{other.name}:{rng.choice((1, 9, -1, 'x'))}")
            )
        elif kind == "inputs":
            node.input[:] = rng.choice(([], list(node.input[:-1]), [*node.input, other.name], list(other.input)))
        elif kind == "attribute" and node.attr:
            key = rng.choice(sorted(node.attr))
            if rng.random() < 0.3:
                del node.attr[key]
            else:
                change_field(node.attr[key], rng)
        elif kind == "tensor":
            constants = [n for n in nodes if n.op == "Const" and n.attr["value"].HasField("tensor")]
            change_field(rng.choice(constants).attr["value"].tensor, rng) if constants else None
        elif kind == "name":
            node.name = rng.choice((other.name, "", "x:0"))
        elif kind == "signature" and meta.signature_def:
            change_field(meta.signature_def[rng.choice(sorted(meta.signature_def))], rng)
        elif kind == "any":
            change_field(saved, rng)
            if not saved.meta_graphs:
                break
    return saved.SerializeToString()


# ---- what reads it


def read(folder: Path) -> str:
    """Reads the module and all its variables; a digest of them."""
    from weights_conversion.module import Module

    module = Module(folder)
    digest = hashlib.sha256()
    for node in module.nodes.values():
        if node.op in ("VarHandleOp", "VariableV2"):
            value = module.variables.read(node)
            digest.update(f"{node.name} {value.dtype} {value.shape} {value.tolist()}".encode())
    module.variables.check_unused()
    return digest.hexdigest()


def evaluate(folder: Path) -> str:
    """What the converter does with every signature before it matches layers."""
    from weights_conversion.match import trace
    from weights_conversion.module import Module

    module = Module(folder)
    for name in module.signatures:
        trace(module, name)
    module.variables.check_unused()
    return "evaluated"


def convert(folder: Path) -> str:
    from weights_conversion.convert import convert
    from weights_conversion.errors import ConversionError

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "out")
        try:
            convert(folder, output, report=lambda text: None)
        except ConversionError:
            assert not output.exists(), "refused, and yet there is output"
            raise
    return "converted"


READERS: dict[str, Callable[[Path], str]] = {"bundle": read, "flips": read, "graph": evaluate, "convert": convert}


class Attack:
    """One case by its number: the same for the same seed, in any process."""

    def __init__(self, kind: str, seed: int, good: Path, work: Path):
        self.kinds = ["bundle", "graph", "flips"] if kind == "small" else [kind]
        self.kind, self.seed, self.folder = kind, seed, work / "module"
        shutil.copytree(good, self.folder)
        self.good = {name: (good / name).read_bytes() for name in (DATA, INDEX, GRAPH, MARKER)}
        self.size = sum(len(data) for data in self.good.values())
        self.wanted = {kind: READERS[kind](self.folder) for kind in self.kinds}  # and what is loaded on the first use

    def __call__(self, case: int) -> tuple[str, int]:
        from weights_conversion.errors import ConversionError

        rng = random.Random(f"{self.seed} {self.kind} {case}")
        kind = rng.choice(self.kinds)
        name, data = self.flip(case) if kind == "flips" else self.damage(kind, rng)
        (self.folder / name).write_bytes(data)
        try:
            result = READERS[kind](self.folder)
            outcome = "read alike" if result == self.wanted[kind] else "read otherwise"
            if kind == "flips":
                assert name == INDEX and outcome == "read alike", f"a flipped byte in {name} is not detected"
        except ConversionError:
            outcome = "refused"
        finally:
            (self.folder / name).write_bytes(self.good[name])
        size = self.size + len(data) + (0 if READERS[kind] is read else EVALUATION)
        return f"{kind} {name.rpartition('/')[2]} {outcome}", size

    def flip(self, case: int) -> tuple[str, bytes]:
        """All bytes of the data and the index in turn, and with the next round the next bit."""
        data, index = self.good[DATA], self.good[INDEX]
        at, bit = case % (len(data) + len(index)), (case // (len(data) + len(index)) + self.seed) % 8
        return (DATA, flipped(data, at, bit)) if at < len(data) else (INDEX, flipped(index, at - len(data), bit))

    def damage(self, kind: str, rng: random.Random) -> tuple[str, bytes]:
        if kind == "bundle":
            name = rng.choice((INDEX, INDEX, INDEX, DATA))
            return name, (damaged_index if name == INDEX else mutated)(self.good[name], rng)
        name = MARKER if rng.random() < 0.01 else GRAPH
        return name, (damaged_graph if name == GRAPH else mutated)(self.good[name], rng)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.fuzz_module", description=__doc__)
    parser.add_argument("--kind", choices=("small", *READERS), default="bundle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to see one again")
    parser.add_argument("--good", type=Path, help="a sound module to damage (default: one is built)")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
            good = args.good or Path(work, "good")
            if not good.exists():
                build(good, args.kind)
            run_here(Attack(args.kind, args.seed, good, Path(work)), *args.child)
        return 0
    start = time.monotonic()
    options = ["--kind", args.kind, "--seed", str(args.seed), *(["--good", str(args.good)] if args.good else [])]
    result = run_children("tests.attacks.fuzz_module", options, args.count, args.first)
    print(f"{args.kind}, seed {args.seed}: {args.count} cases, {len(result.findings)} findings")
    print(result, f"\n{time.monotonic() - start:.0f} s", sep="")
    return 1 if result.findings else 0


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
