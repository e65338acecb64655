"""Writes TF-Hub modules with the tools of 2019, and what TensorFlow 1.15 computes with them.

Runs on Python 3.7 with tensorflow==1.15.0, tensorflow_hub==0.7.0, dm-sonnet==1.36 and tensorflow-probability==0.8.0
(README.md has the set-up): `python write_modules.py FOLDER SPELLING`. Nothing here comes from the package or from the
other builder: networks are written as a user of Sonnet would write them, and exported by `hub.create_module_spec` and
`Module.export` with the tags {} and {"train"}.
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import numpy as np
import sonnet as snt
import tensorflow as tf
import tensorflow_hub as hub
import tensorflow_probability as tfp

Z, SIZE, LARGE = 20, 32, 64
SPELLINGS = {  # what each has beside Sonnet's defaults
    "plain": (),
    "fused": ("fused",),
    "resource": ("resource", "fused"),
    "partitioned": ("partitioned",),
    "spectral": ("spectral",),
    "spectral_loop": ("spectral", "loop"),
    "layer_norm_elu": ("layer_norm", "elu"),
    "print_normalised": ("print", "normalised"),
    "gather_clipped": ("gather", "clipped"),
    "conditional": ("cond",),
    "deconvolution": ("deconvolution", "bicubic"),
    "dilated_leaky": ("dilated", "leaky"),
    "exp_deviation": ("exp", "extra_outputs"),
    "no_discriminator": ("no_discriminator", "foreign_signature"),
}
OPTIONS = set()


def has(name):
    return name in OPTIONS


def spectral(getter, name, *args, **kwargs):
    """A custom getter that divides weights by their largest singular value."""
    weight = getter(name, *args, **kwargs)
    if not name.endswith("/w"):
        return weight
    shape = weight.shape.as_list()
    own = dict(kwargs, shape=[1, shape[-1]], initializer=tf.random_normal_initializer(), trainable=False)
    u = getter(name + "_u0", **own)
    flat = tf.transpose(tf.reshape(weight, [-1, shape[-1]]))

    def step(i, u):
        v = tf.nn.l2_normalize(tf.matmul(u, flat), epsilon=1e-4)
        return i + 1, tf.nn.l2_normalize(tf.matmul(v, flat, transpose_b=True), epsilon=1e-4)

    if has("loop"):
        _, new = tf.while_loop(lambda i, _: i < 3, step, [tf.constant(0), u.read_value() if has("resource") else u])
    else:
        _, new = step(0, u)
    v = tf.nn.l2_normalize(tf.matmul(new, flat), epsilon=1e-4)
    sigma = tf.reduce_sum(tf.matmul(v, flat, transpose_b=True) * new)
    return weight / sigma


class Net(snt.AbstractModule):
    """What all networks share."""

    def norm(self, x, training, name):
        return snt.BatchNorm(scale=True, fused=has("fused") and len(x.shape) == 4, name=name)(
            x, is_training=training, test_local_stats=False
        )

    def conv(self, x, channels, kernel, name, stride=1, bias=True):
        rate = 2 if has("dilated") and kernel == 3 and stride == 1 and x.shape[1] >= 8 else 1
        y = snt.Conv2D(channels, kernel, stride, rate=rate, use_bias=bias, name=name)(x)
        return tf.Print(y, [tf.reduce_mean(y)], "mean") if has("print") else y

    def linear(self, x, size, name):
        partitioners = {"w": tf.fixed_size_partitioner(2, axis=0)} if has("partitioned") and size > 1 else None
        return snt.Linear(size, partitioners=partitioners, name=name)(x)

    def act(self, x):
        if has("elu"):
            return tf.nn.elu(x)
        return tf.nn.leaky_relu(x, 0.1) if has("leaky") else tf.nn.relu(x)

    def mlp(self, x, width, name):
        with tf.variable_scope(name):
            for i in range(2):
                h = self.linear(self.act(x) if i else x, width, "a%d" % i)
                if has("layer_norm"):
                    h = snt.LayerNorm(name="norm%d" % i)(h)
                h = self.linear(self.act(h), width, "b%d" % i)
                x = h + (x if x.shape[1] == width else self.linear(x, width, "skip%d" % i))
            return self.act(x)


class Generator(Net):
    def double(self, x, name):
        side, channels = int(x.shape[1]), int(x.shape[3])
        if has("gather"):
            index = [i // 2 for i in range(2 * side)]
            return tf.gather(tf.gather(x, index, axis=1), index, axis=2)
        if has("deconvolution"):
            return snt.Conv2DTranspose(channels, kernel_shape=4, stride=2, name=name)(x)
        return tf.image.resize_nearest_neighbor(x, [2 * side, 2 * side])

    def block(self, x, z, channels, training, name):
        with tf.variable_scope(name):

            def norm(x, name):
                h = snt.BatchNorm(offset=False, name=name)(x, is_training=training, test_local_stats=False)
                gain = self.linear(z, int(x.shape[3]), name + "_gain")
                offset = self.linear(z, int(x.shape[3]), name + "_offset")
                return h * (1.0 + gain[:, None, None, :]) + offset[:, None, None, :]

            h = self.double(tf.nn.relu(norm(x, "norm0")), "double")
            h = self.conv(h, channels, 3, "conv0")
            h = self.conv(tf.nn.relu(norm(h, "norm1")), channels, 3, "conv1")
            return h + self.conv(self.double(x, "double_skip"), channels, 1, "conv_sc")

    def _build(self, z, training):
        chunks = tf.split(z, 4, 1)
        shared = tf.get_variable("shared", [1, 6], initializer=tf.random_normal_initializer())
        x = snt.BatchReshape([4, 4, 16])(self.linear(chunks[0], 256, "seed"))
        for i, chunk in enumerate(chunks[1:]):
            condition = tf.concat([chunk, tf.tile(shared, [tf.shape(z)[0], 1])], 1)
            x = self.block(x, condition, 16, training, "block%d" % i)
        x = self.conv(tf.nn.relu(self.norm(x, training, "norm")), 3, 3, "image")
        return tf.clip_by_value(x, -1.0, 1.0) if has("clipped") else tf.tanh(x)


class Encoder(Net):
    def unit(self, x, channels, stride, training, name):
        with tf.variable_scope(name):
            h = tf.nn.relu(self.norm(x, training, "norm0"))
            skip = x if channels == x.shape[3] else self.conv(h, channels, 1, "skip", stride, bias=False)
            h = self.conv(h, channels // 4, 1, "conv0", bias=False)
            h = self.conv(tf.nn.relu(self.norm(h, training, "norm1")), channels // 4, 3, "conv1", stride, bias=False)
            return skip + self.conv(tf.nn.relu(self.norm(h, training, "norm2")), channels, 1, "conv2", bias=False)

    def _build(self, x, training):
        if has("normalised"):
            x = (x + 1.0) * 127.5
            x = (x - [123.68, 116.78, 103.94]) / 58.0
        x = tf.pad(x, [[0, 0], [3, 3], [3, 3], [0, 0]])
        x = snt.Conv2D(8, 7, 2, padding=snt.VALID, use_bias=False, name="stem")(x)
        x = tf.nn.max_pool(x, [1, 3, 3, 1], [1, 2, 2, 1], "SAME")
        for i, channels in enumerate((32, 64, 128)):
            x = self.unit(x, channels, 1 if i == 0 else 2, training, "unit%d" % i)
        features = tf.reduce_mean(tf.nn.relu(self.norm(x, training, "norm")), [1, 2])
        h = snt.BatchNorm(offset=False, name="features")(features, is_training=training, test_local_stats=False)
        latent = self.linear(self.mlp(features, 32, "head"), 2 * Z, "latent")
        mean, raw = tf.split(latent, 2, 1)
        stdev = tf.exp(raw) if has("exp") else tf.nn.softplus(raw)
        sample = tfp.distributions.MultivariateNormalDiag(mean, stdev).sample()
        outputs = dict(default=sample, z_sample=sample, z_mean=mean, z_stdev=stdev, avepool_feat=features)
        outputs["bn_crelu_feat"] = tf.nn.crelu(h)
        if has("extra_outputs"):
            outputs["labels"] = tf.argmax(features, 1)
            outputs["log_stdev"] = tf.cumsum(raw, 1)
        return outputs


class Discriminator(Net):
    def block(self, x, channels, down, first, name):
        with tf.variable_scope(name):
            h = self.conv(x if first else tf.nn.relu(x), channels, 3, "conv0")
            h = self.conv(tf.nn.relu(h), channels, 3, "conv1")
            if not down:
                return h + x
            x = self.conv(x, channels, 1, "conv_sc")
            return tf.nn.avg_pool(h + x, [1, 2, 2, 1], [1, 2, 2, 1], "VALID")

    def _build(self, x, z):
        for i in range(4):
            x = self.block(x, 16, i < 2, i == 0, "block%d" % i)
        f = tf.reduce_sum(tf.nn.relu(x), [1, 2])
        h = self.mlp(z, 16, "H")
        j = self.mlp(tf.concat([f, h], 1), 20, "J")
        weight = tf.get_variable("w_x", [16], initializer=tf.random_normal_initializer())
        return {
            "score_x": tf.reduce_sum(f * weight, 1),
            "score_z": tf.squeeze(self.linear(h, 1, "score_z"), 1),
            "score_xz": self.linear(j, 1, "score_xz")[:, 0],
        }


NETWORKS = ((Generator, "generator"), (Encoder, "encoder"), (Discriminator, "discriminator"))


def module_fn(is_training):
    use = has("resource")
    with tf.variable_scope("", use_resource=use, custom_getter=spectral if has("spectral") else None):
        training = tf.placeholder_with_default(is_training, [], "training") if has("cond") else is_training
        generator, encoder, discriminator = (n(name=s) for n, s in NETWORKS)
        z = tf.placeholder(tf.float32, [None, Z], "z")
        image = generator(z, training)
        large = (
            tf.image.resize_bicubic(image, [LARGE] * 2)
            if has("bicubic")
            else tf.image.resize_bilinear(image, [LARGE] * 2)
        )
        hub.add_signature("generate", {"z": z}, {"default": image, "upsampled": large})
        x = tf.placeholder(tf.float32, [None, LARGE, LARGE, 3], "x")
        outputs = encoder(x, training)
        hub.add_signature("encode", {"x": x}, outputs)
        hub.add_signature("default", {"x": x}, {"default": outputs["default"]})
        if has("foreign_signature"):
            text = tf.placeholder(tf.string, [None], "text")
            hub.add_signature("words", {"text": text}, {"default": tf.strings.length(text)})
        if not has("no_discriminator"):
            small = tf.placeholder(tf.float32, [None, SIZE, SIZE, 3], "small")
            z2 = tf.placeholder(tf.float32, [None, Z], "z2")
            hub.add_signature("discriminate", {"x": small, "z": z2}, discriminator(small, z2))


def randomize(session, variables, rng):
    """Values for all variables, as after training."""
    for variable in variables:
        shape, name = variable.shape.as_list(), variable.op.name
        if "variance" in name:
            value = rng.uniform(0.5, 2.0, shape)
        elif "gamma" in name:
            value = rng.uniform(0.7, 1.3, shape)
        elif len(shape) >= 2:
            value = rng.normal(0, 0.8 / np.sqrt(np.prod(shape[:-1])), shape)
        else:
            value = rng.normal(0, 0.2, shape)
        variable.load(value.astype(variable.dtype.base_dtype.as_numpy_dtype), session)


def main(folder, spelling):
    OPTIONS.update(SPELLINGS[spelling])
    rng = np.random.RandomState(0)
    spec = hub.create_module_spec(
        module_fn,
        tags_and_args=[(set(), {"is_training": False}), ({"train"}, {"is_training": True})],
        drop_collections=["sonnet", "moving_average_variables"],
    )
    arrays = {}
    with tf.Graph().as_default(), tf.Session() as session:
        module = hub.Module(spec, name="bigbigan")
        variables = []
        for value in module.variable_map.values():
            variables += value if isinstance(value, list) else [value]
        session.run(tf.global_variables_initializer())
        randomize(session, variables, rng)
        module.export(os.path.join(folder, "module"), session)
        for count in (1, 3, 5):
            given = {
                "generate": {"z": rng.normal(size=(count, Z))},
                "encode": {"x": rng.uniform(-1, 1, (count, LARGE, LARGE, 3))},
                "discriminate": {"x": rng.uniform(-1, 1, (count, SIZE, SIZE, 3)), "z": rng.normal(size=(count, Z))},
            }
            noise = rng.normal(size=(count, Z)).astype(np.float32)
            arrays["noise/%d" % count] = noise
            for signature, inputs in given.items():
                if signature not in spec.get_signature_names():
                    continue
                inputs = {key: value.astype(np.float32) for key, value in inputs.items()}
                before = set(session.graph.get_operations())
                tensors = {key: tf.constant(value) for key, value in inputs.items()}
                outputs = module(tensors, signature=signature, as_dict=True)
                new = [op for op in session.graph.get_operations() if op not in before]
                feeds = {}
                for op in new:
                    if op.type == "RandomStandardNormal" and "MultivariateNormal" in op.name:
                        feeds[op.outputs[0]] = noise.reshape(-1)  # as this release draws it
                values = session.run(outputs, feeds)
                for key, value in inputs.items():
                    arrays["%d/%s/in/%s" % (count, signature, key)] = value
                for key, value in values.items():
                    arrays["%d/%s/out/%s" % (count, signature, key)] = value
    np.savez(os.path.join(folder, "reference.npz"), **arrays)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] == "--list":
        print("\n".join(SPELLINGS))
    else:
        main(sys.argv[1], sys.argv[2])
