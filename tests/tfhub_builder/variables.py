"""Variables of a module: made once, read by every signature, with values that depend on their name alone."""

from __future__ import annotations

import hashlib
import zlib

import numpy as np
import tensorflow as tf

from .spec import Style

v1 = tf.compat.v1


class Variables:
    """Variables by canonical (DeepMind-like) name.

    A value depends on the seed and on the name of what it means ("…/conv0/w", "…/BatchNorm/mean"), never on the style,
    so that two styles of one architecture hold the same function. `shapes_only` makes zeros that take no memory.
    """

    def __init__(self, style: Style, seed: int, shapes_only: bool = False):
        self.style, self.seed, self.shapes_only = style, seed, shapes_only
        self.values: dict[str, np.ndarray] = {}  # by stored name
        self.slices: dict[str, list[str]] = {}  # of partitioned variables, by stored name
        self.partitioned = False
        self._variables: dict[str, tf.Variable] = {}  # by canonical name

    def random(self, meaning: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(meaning.encode())])

    def weight(self, meaning: str, shape: tuple[int, ...], fan_in: int, gain: float) -> np.ndarray:
        if self.shapes_only:
            return np.broadcast_to(np.float32(0), shape)
        return self.random(meaning).standard_normal(shape, np.float32) * np.float32(gain / np.sqrt(fan_in))

    def vector(self, meaning: str, size: int, low: float, high: float) -> np.ndarray:
        return self.random(meaning).uniform(low, high, size).astype(np.float32)

    def stored_name(self, canonical: str) -> str:
        if self.style.scopes == "deepmind":
            return canonical
        part, digest = canonical.split("/")[0], hashlib.sha1(canonical.encode()).hexdigest()[:8]
        return f"model/{part[:1].lower()}_{digest}/var"

    def get(self, canonical: str, value: np.ndarray, trainable: bool = True) -> tf.Variable:
        """The variable of this name; made with `value` at its first use."""
        if canonical not in self._variables:
            name = self.stored_name(canonical)
            shape = list(value.shape)
            with tf.init_scope(), v1.name_scope(None):  # outside any function or branch being written
                if self.partitioned and trainable and min(shape, default=0) > 1:
                    parted = v1.get_variable(
                        name,
                        shape,
                        initializer=v1.zeros_initializer(),
                        partitioner=v1.fixed_size_partitioner(2, len(shape) - 1),
                        use_resource=self.style.variables == "resource",
                    )
                    self._variables[canonical] = parted
                    self.values[name] = np.asarray(value, np.float32, order="C")
                    self.slices[name] = [part._save_slice_info.spec for part in parted]
                    return parted
                initial = (lambda: v1.truncated_normal(shape)) if trainable else (lambda: tf.ones(shape))
                variable = v1.Variable(
                    initial, name=name, trainable=trainable, dtype=tf.float32,
                    use_resource=self.style.variables == "resource",
                )  # fmt: skip
            assert variable.op.name == name, (variable.op.name, name)
            self._variables[canonical] = variable
            zeros = np.broadcast_to(np.float32(0), value.shape)
            self.values[name] = zeros if self.shapes_only else np.asarray(value, np.float32, order="C")
            assert variable.shape == self.values[name].shape, name
        return self._variables[canonical]

    def read(self, variable: tf.Variable) -> tf.Tensor:
        if not hasattr(variable, "op"):  # partitioned
            return variable.as_tensor()
        if self.style.functions == "by_value":  # the function gets the value as an argument
            with tf.init_scope(), v1.name_scope(None):
                return tf.identity(variable)
        return tf.identity(variable) if self.style.variables == "resource" else tf.convert_to_tensor(variable)
