"""Layers in TensorFlow's v1 graph mode, each written in the ways that `Style` names."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from .spec import ModuleSpec, Statistics
from .variables import Variables

v1, raw = tf.compat.v1, tf.raw_ops
Tensor = tf.Tensor


@dataclass(frozen=True)
class Part:
    """Settings of one network."""

    spectral_norm: bool
    ema: bool
    statistics: Statistics


class Writer:
    """Adds layers to the default graph; variable names follow the scope path."""

    def __init__(self, spec: ModuleSpec, variables: Variables, part: Part, training: bool = False):
        self.spec, self.style, self.variables, self.part, self.training = spec, spec.style, variables, part, training
        self.path: list[str] = []
        self._clutter = itertools.cycle(self.style.clutter) if self.style.clutter else None

    def departs(self, name: str) -> bool:
        """Whether the module is written in this way, which no known description has."""
        return name in self.spec.departures

    # ---- names, variables

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        shown = name if self.style.scopes == "deepmind" else "s"
        self.path.append(name)
        with v1.name_scope(shown):
            yield
        self.path.pop()

    def name(self, leaf: str) -> str:
        return "/".join([*self.path, leaf])

    def trained(self, leaf: str, value: np.ndarray) -> Tensor:
        """Read of a trained variable: of its moving average, where the part has them."""
        name = self.name(leaf)
        if not self.part.ema:
            return self.variables.read(self.variables.get(name, value))
        other = value if self.variables.shapes_only else value * np.float32(0.7) + np.float32(0.05)
        current = self.variables.get(name, other)
        average = self.variables.get(f"{name}/ema_0.9999", value, trainable=False)
        return self.variables.read(current if self.training else average)

    def weight(self, shape: tuple[int, ...], fan_in: int, gain: float, leaf: str = "w") -> Tensor:
        value = self.variables.weight(self.name(leaf), shape, fan_in, gain)
        return self._weight(leaf, value, transposed=False)

    def matrix(self, inputs: int, outputs: int, gain: float, leaf: str = "w") -> Tensor:
        """[inputs, outputs], or its transpose where the style says so."""
        value = self.variables.weight(self.name(leaf), (inputs, outputs), inputs, gain)
        transposed = self.style.linear == "transposed"
        return self._weight(leaf, value.T if transposed else value, transposed)

    def _weight(self, leaf: str, value: np.ndarray, transposed: bool) -> Tensor:
        weight = self.trained(leaf, value)
        if not self.part.spectral_norm:
            return weight
        outputs = value.shape[0] if transposed else value.shape[-1]
        name = self.name("u0" if leaf == "w" else f"{leaf}_u0")
        start = self.variables.weight(name, (1, outputs), 1, 1.0)
        return self._spectral_norm(weight, self.variables.get(name, start, trainable=False), transposed)

    def _spectral_norm(self, weight: Tensor, u0: tf.Variable, transposed: bool) -> Tensor:
        """weight / sigma: one power iteration from u0, the vector on the output side."""
        eps = self.spec.spectral_norm_eps
        with v1.name_scope("SpectralNorm"):
            outputs = weight.shape[0] if transposed else weight.shape[-1]
            flat = weight if transposed else tf.transpose(tf.reshape(weight, [-1, outputs]))  # [out, in * k * k]

            def normalize(v: Tensor) -> Tensor:
                if self.spec.spectral_norm_form == "rsqrt_maximum":
                    return v * tf.math.rsqrt(tf.maximum(tf.reduce_sum(tf.square(v)), eps))
                return v / (tf.sqrt(tf.reduce_sum(v**2)) + eps)

            v = normalize(tf.matmul(self.variables.read(u0), flat))
            u = normalize(tf.matmul(v, flat, transpose_b=True))
            if self.departs("power_loop"):
                u = self._power_loop(u, flat, normalize)
                v = normalize(tf.matmul(u, flat))
            if self.style.u0_read_back and not self.training:
                with tf.control_dependencies([tf.group(u0.assign(u))]):
                    u = u0.read_value()
            sigma = tf.matmul(tf.matmul(v, flat, transpose_b=True), u, transpose_b=True)
            if self.style.assignments or self.training:
                with tf.control_dependencies([u0.assign(u)]):
                    return tf.identity(weight / tf.reshape(sigma, []))
            return weight / tf.reshape(sigma, [])

    def _power_loop(self, u: Tensor, flat: Tensor, normalize: Callable[[Tensor], Tensor]) -> Tensor:
        """Two more iterations; the loop counts in a loop of its own."""

        def body(i: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            step = tf.while_loop(lambda k: k < 1, lambda k: k + 1, [tf.constant(0)])
            step = step[0] if isinstance(step, list | tuple) else step
            return i + step, normalize(tf.matmul(normalize(tf.matmul(u, flat)), flat, transpose_b=True))

        return tf.while_loop(lambda i, u: i < 2, body, [tf.constant(0), u])[1]

    # ---- plumbing

    def call(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """function(*tensors), as a function call in the graph where the style has them."""
        if self.style.functions == "none" or self.training:
            return function(*tensors)
        return tf.function(function, autograph=False)(*tensors)

    def clutter(self, x: Tensor) -> Tensor:
        """An operation that changes nothing, as the style lists them in turn."""
        kind = next(self._clutter) if self._clutter else None
        if kind == "identity":
            return tf.identity(tf.identity(x))
        if kind == "squeeze":
            return tf.squeeze(tf.expand_dims(x, 1), [1])
        if kind == "reshape":
            return tf.reshape(x, [-1, *x.shape[1:]])
        if kind == "stop_gradient":
            return tf.stop_gradient(x)
        if kind == "prevent_gradient":
            return raw.PreventGradient(input=x, message="not differentiable")
        if kind == "cast":
            return raw.Cast(x=x, DstT=tf.float32)
        return x

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        if self.style.add == "add_n":
            return tf.add_n([a, b])
        return raw.Add(x=a, y=b) if self.style.add == "add" else a + b

    def relu(self, x: Tensor) -> Tensor:
        return tf.nn.relu(x) if self.style.relu == "op" else tf.maximum(x, 0.0)

    def leaky_relu(self, x: Tensor, slope: float) -> Tensor:
        return tf.nn.leaky_relu(x, slope) if self.style.leaky_relu == "op" else tf.maximum(x, slope * x)

    def bias(self, x: Tensor, leaf: str = "b") -> Tensor:
        value = self.trained(leaf, self.variables.vector(self.name(leaf), x.shape[-1], -0.15, 0.15))
        if self.style.bias == "bias_add":
            return tf.nn.bias_add(x, value)
        return x + value if self.style.bias == "add_v2" else raw.Add(x=x, y=value)

    # ---- convolution, linear, norm

    def conv(
        self, name: str, x: Tensor, outputs: int, kernel: int, *,
        stride: int = 1, padding: str = "explicit", bias: bool = True, gain: float = 1.3,
    ) -> Tensor:  # fmt: skip
        """Convolution; `padding` (explicit zeros of half the kernel, or SAME) matters with strides only."""
        with self.scope(name):
            inputs, size = x.shape[-1], x.shape[1]
            weight = self.weight((kernel, kernel, inputs, outputs), kernel * kernel * inputs, gain)
            pads, same = pads_of(kernel, stride, padding, size), pads_of(kernel, stride, "same", size)
            half = self.departs("bfloat16") and self.path[1] in ("Generator", "F")
            if half:
                x, weight = tf.cast(x, tf.bfloat16), tf.cast(weight, tf.bfloat16)
            if self.departs("channels_first"):  # which TensorFlow itself does not run on CPUs
                y = tf.pad(tf.transpose(x, [0, 3, 1, 2]), [[0, 0], [0, 0], pads, pads])
                y = tf.transpose(tf.nn.conv2d(y, weight, stride, "VALID", data_format="NCHW"), [0, 2, 3, 1])
            elif self.departs("dilated") and kernel == 3 and stride == 1 and size >= 8:
                blocks = tf.space_to_batch(x, [2, 2], [[2, 2], [2, 2]])
                y = tf.batch_to_space(tf.nn.conv2d(blocks, weight, 1, "VALID"), [2, 2], [[0, 0], [0, 0]])
                y.set_shape([None, size, size, outputs])
            elif self.style.conv == "explicit":
                y = tf.nn.conv2d(x, weight, stride, [[0, 0], pads, pads, [0, 0]])
            elif self.style.conv == "same" and pads == same:
                y = tf.nn.conv2d(x, weight, stride, "SAME")
            else:
                x = tf.pad(x, [[0, 0], pads, pads, [0, 0]]) if any(pads) else x
                y = tf.nn.conv2d(x, weight, stride, "VALID")
            y = tf.cast(y, tf.float32) if half else y
            if self.departs("print") and name.startswith("conv"):
                y = v1.Print(y, [tf.shape(y), tf.strings.as_string(tf.reduce_sum(y))], "printed")
            return self.clutter(self.bias(y) if bias else y)

    def linear(self, name: str, x: Tensor, outputs: int, *, bias: bool = True, gain: float = 1.3) -> Tensor:
        with self.scope(name):
            y = tf.matmul(x, self.matrix(x.shape[-1], outputs, gain), transpose_b=self.style.linear == "transposed")
            return self.clutter(self.bias(y) if bias else y)

    def statistics(self, x: Tensor, kind: Statistics | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the batch norm whose scope is open, [C] each."""
        size, get, read = x.shape[-1], self.variables.get, self.variables.read
        mean = self.variables.vector(self.name("mean"), size, -0.4, 0.4)
        var = np.exp(self.variables.vector(self.name("var"), size, np.log(0.4), np.log(4.0)))
        shape = (1,) * (len(x.shape) - 1) + (size,) if self.style.statistics_shape == "nhwc" else (size,)
        if (kind or self.part.statistics) == "moving":
            stored = (
                read(get(self.name("moving_mean"), mean.reshape(shape), trainable=False)),
                read(get(self.name("moving_variance"), var.reshape(shape), trainable=False)),
            )
        else:
            stored = self._accumulated(mean.reshape(shape), var.reshape(shape))
        flat = tuple(tf.reshape(value, [size]) if len(shape) > 1 else value for value in stored)
        if self.departs("float64_statistics"):
            flat = tuple(tf.cast(tf.cast(value, tf.float64) * 2.0 / 2.0, tf.float32) for value in flat)

        def batch() -> tuple[Tensor, Tensor]:
            moments = tf.nn.moments(x, list(range(len(x.shape) - 1)))
            return tuple(tf.cumsum(value) if self.style.outside else value for value in moments)  # never evaluated

        if self.style.outside and not self.training:
            moments = batch()
            return self._branch(lambda: flat, lambda: moments)
        return self._branch(lambda: flat, batch)

    def _accumulated(self, mean: np.ndarray, var: np.ndarray) -> tuple[Tensor, Tensor]:
        get, read = self.variables.get, self.variables.read
        count = np.float32(self.variables.random(self.name("count")).integers(50, 400))
        if self.style.counter == "vector":
            count = np.array([count], np.float32)
        sums = get(self.name("accumulated_mean"), mean * count, trainable=False)
        squares = get(self.name("accumulated_var"), var * count, trainable=False)
        counter = get(self.name("accumulation_counter"), np.asarray(count), trainable=False)
        divisor, numerators = read(counter), (read(sums), read(squares))
        if self.style.counter == "guarded":
            divisor = tf.maximum(divisor, 1.0)
        result = tuple(value / divisor for value in numerators)
        if self.style.assignments or self.training:
            with tf.control_dependencies([*result]):
                updates = [counter.assign_add(tf.zeros_like(count)), sums.assign_add(tf.zeros_like(mean))]
            with tf.control_dependencies([tf.group(*updates)]):
                return tf.identity(result[0]), tf.identity(result[1])
        return result

    def _branch(self, stored: Callable[[], tuple], batch: Callable[[], tuple]) -> tuple[Tensor, Tensor]:
        """Stored statistics at inference; a training branch behind a constant condition where the style has it."""
        if self.training:
            return batch()
        if self.style.branch == "none":
            return stored()
        training = tf.constant(False)
        if self.style.condition == "select":
            pairs = zip(batch(), stored(), strict=True)
            return tuple(v1.where(tf.fill(tf.shape(b), False), a, b) for a, b in pairs)
        if self.style.condition == "constants":  # a branch of constants alone, which control edges tie to it
            training = v1.cond(training, lambda: tf.constant(1.0), lambda: tf.constant(0.0)) > 0.5
        if self.style.condition == "placeholder":
            training = v1.placeholder_with_default(False, [], "is_training")
        elif self.style.condition == "logical":
            training = tf.logical_and(tf.logical_not(tf.constant(False)), tf.greater(tf.constant(0), 3))
        return v1.cond(training, batch, lambda: tuple(tf.identity(value) for value in stored()))

    def batch_norm(
        self, name: str, x: Tensor, eps: float, *, affine: bool = True,
        condition: Tensor | None = None, statistics: Statistics | None = None,
    ) -> Tensor:  # fmt: skip
        """Normalises by stored statistics; gain and offset are variables, or linear in `condition` [N, D]."""
        with self.scope(name):
            size = x.shape[-1]
            mean, var = self.statistics(x, statistics)
            if condition is not None:
                bias = self.spec.generator.class_dim == 0
                gain, offset = (self.linear(leaf, condition, size, bias=bias, gain=0.4) for leaf in ("scale", "offset"))
                gain = 1.0 + gain if self.style.gain == "one_plus" else gain + 1.0
                gain, offset = (tf.reshape(value, [-1, 1, 1, size]) for value in (gain, offset))
            elif affine:
                gain = self.trained("scale", self.variables.vector(self.name("scale"), size, 0.6, 1.4))
                offset = self.trained("offset", self.variables.vector(self.name("offset"), size, -0.4, 0.4))
            else:
                gain = offset = None
            return self.clutter(self._normalize(x, mean, var, gain, offset, eps))

    def _normalize(
        self, x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float
    ) -> Tensor:
        form = self.style.batch_norm
        if form.startswith("fused"):
            return self._fused(x, mean, var, gain, offset, eps)
        added = v1.placeholder_with_default(np.float32(eps), [], "epsilon") if self.style.eps_placeholder else eps
        if form == "sub_div":
            y = (x - mean) / tf.sqrt(var + added)
            return y if gain is None else y * gain + offset
        scale = tf.math.rsqrt(var + added)
        scale = scale if gain is None else scale * gain
        if form == "biggan":
            return x * scale - (mean * scale if offset is None else mean * scale - offset)
        if form == "chain_add" and offset is not None:
            return x * scale + (-mean * scale + offset)
        return x * scale + (-mean * scale if offset is None else offset - mean * scale)

    def _fused(
        self, x: Tensor, mean: Tensor, var: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float
    ) -> Tensor:
        flat = len(x.shape) == 2
        y = x[:, None, None, :] if flat else x
        constant = gain is not None and len(gain.shape) == 1
        scale, shift = (gain, offset) if constant else (tf.ones_like(mean), tf.zeros_like(mean))
        op = raw.FusedBatchNorm if self.style.batch_norm == "fused_v1" else raw.FusedBatchNormV3
        y = op(x=y, scale=scale, offset=shift, mean=mean, variance=var, epsilon=eps, is_training=False)[0]
        y = tf.squeeze(y, [1, 2]) if flat else y
        return y if constant or gain is None else y * gain + offset

    # ---- shape-changing layers

    def spatial_mean(self, x: Tensor) -> Tensor:
        if self.style.pooling == "mean":
            return tf.reduce_mean(x, [1, 2])
        if self.style.pooling == "flat":
            return tf.reduce_mean(tf.reshape(x, [-1, x.shape[1] * x.shape[2], x.shape[3]]), 1)
        return tf.squeeze(tf.nn.avg_pool2d(x, x.shape[1], 1, "VALID"), [1, 2])

    def halve(self, x: Tensor) -> Tensor:
        _, height, width, channels = x.shape
        if self.style.halving == "slices":
            return tf.add_n([x[:, i::2, j::2, :] for i in (0, 1) for j in (0, 1)]) / 4.0
        if self.style.halving == "space_to_depth":
            y = raw.SpaceToDepth(input=x, block_size=2)
            return tf.reduce_mean(tf.reshape(y, [-1, height // 2, width // 2, 4, channels]), 3)
        if self.style.halving == "reshape":
            return tf.reduce_mean(tf.reshape(x, [-1, height // 2, 2, width // 2, 2, channels]), [2, 4])
        return tf.nn.avg_pool2d(x, 2, 2, "VALID")

    def double(self, x: Tensor) -> Tensor:
        """Nearest-neighbour upsampling."""
        _, height, width, channels = x.shape
        if self.style.upsample == "tile":
            y = tf.tile(tf.reshape(x, [-1, height, 1, width, 1, channels]), [1, 1, 2, 1, 2, 1])
            return tf.reshape(y, [-1, 2 * height, 2 * width, channels])
        if self.style.upsample == "broadcast":
            y = tf.reshape(x, [-1, height, 1, width, 1, channels]) * tf.ones([1, 1, 2, 1, 2, 1])
            return tf.reshape(y, [-1, 2 * height, 2 * width, channels])
        if self.departs("upsample_gather"):
            for axis, side in ((1, height), (2, width)):
                x = tf.gather(x, np.arange(2 * side) // 2, axis=axis)
            return x
        if self.departs("upsample_concat"):
            y = tf.reshape(tf.concat([x, x], -1), [-1, height, 2 * width, channels])
            return tf.reshape(tf.concat([y, y], 2), [-1, 2 * height, 2 * width, channels])
        if self.departs("upsample_transposed"):
            kernel = np.zeros((2, 2, channels, channels), np.float32)
            kernel[:, :] = np.eye(channels)
            shape = tf.stack([tf.shape(x)[0], 2 * height, 2 * width, channels])
            y = tf.nn.conv2d_transpose(x, kernel, shape, 2, "SAME")
            y.set_shape([None, 2 * height, 2 * width, channels])
            return y
        if self.departs("upsample_bilinear"):
            return tf.raw_ops.ResizeBilinear(images=x, size=[2 * height, 2 * width], half_pixel_centers=True)
        if self.style.upsample == "depth_to_space":
            return raw.DepthToSpace(input=tf.concat([x] * 4, -1), block_size=2)
        size = tf.constant([2 * height, 2 * width])
        if self.style.dynamic_shapes:
            size = tf.shape(x)[1:3] * 2
        y = raw.ResizeNearestNeighbor(images=x, size=size)
        y.set_shape([None, 2 * height, 2 * width, channels])
        return y

    def reshape(self, x: Tensor, shape: list[int]) -> Tensor:
        """[N, *shape]."""
        batch = tf.shape(x)[0] if self.style.dynamic_shapes else -1
        y = tf.reshape(x, [batch, *shape])
        y.set_shape([None, *shape])
        return y

    def split(self, x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
        """Along the last axis."""
        if self.style.split == "slice":
            ends = list(itertools.accumulate(sizes))
            return [x[..., end - size : end] for size, end in zip(sizes, ends, strict=True)]
        if self.style.split == "split" and len(set(sizes)) == 1:
            return tf.split(x, len(sizes), axis=-1)
        return tf.split(x, list(sizes), axis=-1)


def pads_of(kernel: int, stride: int, padding: str, size: int) -> list[int]:
    """Zeros before and after one spatial axis of `size`."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0) if padding == "same" else kernel - 1
    return [total // 2, total - total // 2]
