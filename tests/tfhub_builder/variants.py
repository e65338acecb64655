"""Named specs: each value of each detail, each way of writing, pairs, and the two full-size modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .spec import DiscriminatorSpec, EncoderSpec, GeneratorSpec, MLPSpec, ModuleSpec, Style

PLAIN = ModuleSpec()


def _generator(spec: ModuleSpec = PLAIN, **changes: Any) -> ModuleSpec:
    return replace(spec, generator=replace(spec.generator, **changes))


def _encoder(spec: ModuleSpec = PLAIN, **changes: Any) -> ModuleSpec:
    return replace(spec, encoder=replace(spec.encoder, **changes))


def _discriminator(spec: ModuleSpec = PLAIN, **changes: Any) -> ModuleSpec:
    return replace(spec, discriminator=replace(spec.discriminator, **changes))


def _mlps(spec: ModuleSpec = PLAIN, **changes: Any) -> ModuleSpec:
    """The same change in the encoder's head, H and J."""
    d = spec.discriminator
    spec = _encoder(spec, head=replace(spec.encoder.head, **changes))
    return _discriminator(spec, z_mlp=replace(d.z_mlp, **changes), joint_mlp=replace(d.joint_mlp, **changes))


def _style(spec: ModuleSpec = PLAIN, **changes: Any) -> ModuleSpec:
    return replace(spec, style=replace(spec.style, **changes))


REVNET = _encoder(architecture="revnet", depths=(2, 1, 2))
LEAKY = _mlps(activation="leaky_relu")

ARCHITECTURES: dict[str, ModuleSpec] = {
    "plain": PLAIN,
    "stem_same": _encoder(stem_padding="same"),
    "strided_same": _encoder(strided_padding="same"),
    "pool_ignore": _encoder(pool_padding="ignore"),
    "pool_same": _encoder(pool_padding="same"),
    "shortcut_raw": _encoder(shortcut="raw"),
    "encoder_eps_1e-5": _encoder(bn_eps=1e-5),
    "encoder_not_affine": _encoder(bn_affine=False),
    "encoder_moving_averages": _encoder(statistics="moving"),
    "no_last_relu": _encoder(last_relu=False),
    "basic_block": _encoder(block="basic", base_channels=16),
    "revnet": REVNET,
    "revnet_no_last_relu": _encoder(REVNET, last_relu=False),
    "revnet_same_ignore": _encoder(REVNET, stem_padding="same", pool_padding="ignore"),
    "crelu_affine": _encoder(feature_norm_affine=True),
    "crelu_eps_1e-5": _encoder(feature_norm_eps=1e-5),
    "crelu_moving_averages": _encoder(feature_norm_statistics="moving"),
    "encoder_spectral_norm": _encoder(spectral_norm=True),
    "encoder_no_ema": _encoder(ema=False),
    "deterministic": _encoder(output="deterministic"),
    "tanh_latents": _encoder(output="tanh"),
    "default_z_mean": _encoder(default_output="z_mean"),
    "latent_two": _encoder(latent="two"),
    "leaky_relu": LEAKY,
    "mlp_post": _mlps(order="post"),
    "mlp_norm": _mlps(norm="batch"),
    "mlp_first_activation": _mlps(first_activation=True),
    "mlp_no_last_activation": _mlps(last_activation=False),
    "mlp_projection_always": _mlps(projection="always"),
    "mlp_projection_never": _mlps(projection="never"),
    "mlp_no_bias": _mlps(bias=False),
    "mlps_differ": replace(
        PLAIN,
        encoder=EncoderSpec(head=MLPSpec(width=128, layers=2, order="post", norm="batch")),  # as wide as its input
        discriminator=DiscriminatorSpec(
            z_mlp=MLPSpec(width=20, layers=6, activation="leaky_relu"), joint_mlp=MLPSpec(width=12, projection="always")
        ),
    ),
    "generator_eps_1e-5": _generator(bn_eps=1e-5),
    "generator_moving_averages": _generator(statistics="moving"),
    "generator_no_ema": _generator(ema=False),
    "upsampled_nearest": _generator(upsampled="nearest"),
    "upsampled_aligned": _generator(upsampled="bilinear-aligned"),
    "upsampled_asymmetric": _generator(upsampled="bilinear-asymmetric"),
    "class_first": _generator(class_first=True),
    "no_class_vector": _generator(class_dim=0),
    "uneven_chunks": _generator(z_chunks=(7, 3, 4, 6)),
    "no_attention": _discriminator(_generator(attention_resolution=0), attention_resolution=0),
    "first_relu": _discriminator(first_relu=True),
    "no_last_skip": _discriminator(last_skip=False),
    "combine_hf": _discriminator(combine="concat_hf"),
    "combine_sum": _discriminator(combine="sum"),
    "combine_product": _discriminator(combine="product"),
    "discriminator_ema": _discriminator(ema=True),
    "no_spectral_norm": _discriminator(_generator(spectral_norm=False), spectral_norm=False),
    "spectral_norm_eps_1e-12": replace(PLAIN, spectral_norm_eps=1e-12),
    "spectral_norm_rsqrt": replace(PLAIN, spectral_norm_form="rsqrt_maximum"),
    "tagged": replace(PLAIN, tags=("serve",)),
    "64_pixels": _discriminator(
        _generator(resolution=64, z_chunks=(4,) * 5, attention_resolution=64, upsampled_size=128),
        attention_resolution=32, base_channels=8,
    ),
    "128_pixels": _encoder(
        _discriminator(
            _generator(resolution=128, z_chunks=(4,) * 6, attention_resolution=64, upsampled_size=256),
            attention_resolution=64, base_channels=8,
        ),
        resolution=256,
    ),
}  # fmt: skip

# Ways of writing: field of Style -> values beside the default, and the spec that shows it.
_WRITINGS: dict[str, tuple[Any, ...]] = {
    "batch_norm": ("chain", "chain_add", "sub_div", "fused", "fused_v1"),
    "statistics_shape": ("nhwc",),
    "counter": ("vector", "guarded"),
    "conv": ("pad_valid", "explicit"),
    "linear": ("transposed",),
    "bias": ("add_v2", "add"),
    "add": ("add", "add_n"),
    "relu": ("maximum",),
    "leaky_relu": ("maximum",),
    "pooling": ("avgpool", "flat"),
    "halving": ("slices", "space_to_depth", "reshape"),
    "upsample": ("tile", "depth_to_space", "broadcast"),
    "padded_image": (True,),
    "generator_skip": ("conv_upsample",),
    "first_skip": ("conv_pool",),
    "attention": ("einsum",),
    "split": ("split_v", "slice"),
    "class_broadcast": ("tile", "gather", "constant_row"),
    "gain": ("plus_one",),
    "softplus": ("log1p_exp", "log_one_plus_exp"),
    "noise": ("raw", "tfp", "sample_axis", "broadcast"),
    "crelu": ("concat_first",),
    "score": ("reshape", "slice", "sum"),
    "variables": ("reference",),
    "scopes": ("other",),
    "branch": ("switch", "if"),
    "condition": ("logical", "placeholder", "constants", "select"),
    "outside": (True,),
    "eps_placeholder": (True,),
    "assignments": (True,),
    "u0_read_back": (True,),
    "stripped": (True,),
    "functions": ("by_value", "captured"),
    "dynamic_shapes": (False,),
    "train_graph": (True,),
    "shared_encode": (False,),
    "assets": (True,),
    "dead_code": (True,),
}
_BASES = {"leaky_relu": LEAKY, "condition": _style(branch="switch"), "outside": _style(branch="switch")}
CLUTTER = ("identity", "squeeze", "reshape", "stop_gradient", "prevent_gradient", "cast")

WRITINGS: dict[str, ModuleSpec] = {
    "_".join(["writing", name] + [value] * isinstance(value, str)): _style(_BASES.get(name, PLAIN), **{name: value})
    for name, values in _WRITINGS.items()
    for value in values
} | {f"writing_clutter_{kind}": _style(clutter=(kind,)) for kind in CLUTTER}

TF1 = dict(
    variables="reference", branch="switch", condition="logical", add="add", bias="add", assignments=True,
    train_graph=True, dead_code=True, clutter=("identity", "stop_gradient", "prevent_gradient"), counter="vector",
    stripped=True, outside=True, pooling="flat",
)  # fmt: skip
TF2 = dict(functions="captured", branch="if", batch_norm="fused", bias="bias_add", noise="tfp", clutter=("identity",))

PAIRS: dict[str, ModuleSpec] = {
    "stripped_defaults": _style(  # eps and slope at the defaults of their operations
        _encoder(LEAKY, bn_eps=1e-4),
        stripped=True,
        batch_norm="fused",
        padded_image=True,
        upsample="broadcast",
        halving="slices",
        branch="switch",
        condition="constants",
        u0_read_back=True,
    ),
    "tf1_resnet": _style(_encoder(shortcut="raw", last_relu=False), **TF1),
    "tf1_revnet": _style(_mlps(REVNET, activation="leaky_relu", norm="batch"), **TF1),
    "tf2_resnet": _style(_mlps(order="post"), **TF2),
    "tf2_revnet": _style(REVNET, **TF2, scopes="other"),
    "fused_not_affine": _style(_encoder(bn_affine=False), batch_norm="fused"),
    "fused_crelu_affine_nhwc": _style(_encoder(feature_norm_affine=True), batch_norm="fused", statistics_shape="nhwc"),
    "chain_moving_nhwc": _style(_encoder(statistics="moving"), batch_norm="chain", statistics_shape="nhwc"),
    "same_as_pad_valid": _style(_encoder(stem_padding="same", strided_padding="same"), conv="pad_valid"),
    "same_as_explicit": _style(_encoder(stem_padding="same", strided_padding="same"), conv="explicit"),
    "encoder_spectral_norm_transposed": _style(_encoder(spectral_norm=True), linear="transposed", assignments=True),
    "mlp_norm_post_sub_div": _style(_mlps(order="post", norm="batch"), batch_norm="sub_div"),
    "mlp_norm_fused_functions": _style(_mlps(norm="batch"), batch_norm="fused", functions="by_value"),
    "leaky_first_activation_maximum": _style(_mlps(LEAKY, first_activation=True), leaky_relu="maximum"),
    "projection_never_no_last_activation": _mlps(projection="never", last_activation=False),
    "projection_always_no_bias": _mlps(projection="always", bias=False),
    "post_leaky": _mlps(LEAKY, order="post", projection="never"),
    "avgpool_no_last_relu": _style(_encoder(last_relu=False), pooling="avgpool"),
    "class_first_gather_slice": _style(_generator(class_first=True), class_broadcast="gather", split="slice"),
    "uneven_chunks_slice": _style(_generator(z_chunks=(7, 3, 4, 6)), split="slice"),
    "no_class_vector_fused": _style(_generator(class_dim=0), batch_norm="fused"),
    "nearest_static_tile": _style(_generator(upsampled="nearest"), upsample="tile", dynamic_shapes=False),
    "no_attention_conv_upsample": _style(_generator(attention_resolution=0), generator_skip="conv_upsample"),
    "product_first_relu_no_skip": _discriminator(combine="product", first_relu=True, last_skip=False),
    "hf_sum_pool_maximum": _style(_discriminator(combine="concat_hf"), pooling="avgpool", relu="maximum"),
    "no_spectral_norm_no_ema": _encoder(
        _discriminator(_generator(spectral_norm=False, ema=False), spectral_norm=False), ema=False
    ),
    "deterministic_two_graphs": _style(_encoder(output="deterministic"), shared_encode=False, train_graph=True),
    "cluttered_other_names": _style(clutter=CLUTTER, scopes="other", split="split_v", score="slice"),
}

VARIANTS: dict[str, ModuleSpec] = ARCHITECTURES | WRITINGS | PAIRS

# Between them: both trunks, every unknown of the encoder at two values, both generations of TensorFlow's graphs.
REPRESENTATIVE = (
    "plain",
    "tf1_resnet",
    "tf1_revnet",
    "tf2_resnet",
    "tf2_revnet",
    "stripped_defaults",
    "fused_crelu_affine_nhwc",
    "same_as_pad_valid",
    "product_first_relu_no_skip",
)

# Sound modules that no known description covers: a converter may refuse them, never be silently wrong.
OUTSIDE: dict[str, ModuleSpec] = {
    "slope_0.1": _mlps(LEAKY, slope=0.1),
    "stdev_offset": replace(PLAIN, stdev_offset=1e-2),
    "sample_tanh": replace(PLAIN, sample_activation=True),
    "attention_scaled": replace(PLAIN, attention_scale=0.5),
    "mlp_norm_eps": _mlps(norm="batch", norm_eps=0.05),
}

_FULL = ModuleSpec(
    generator=GeneratorSpec(
        resolution=128, base_channels=96, z_chunks=(20,) * 6, class_dim=128, attention_resolution=64, upsampled_size=256
    ),
    encoder=EncoderSpec(resolution=256, depths=(3, 4, 6, 3), base_channels=64, head=MLPSpec(width=4096, layers=4)),
    discriminator=DiscriminatorSpec(
        base_channels=96, attention_resolution=64,
        z_mlp=MLPSpec(width=2048, layers=8), joint_mlp=MLPSpec(width=2048, layers=8),
    ),
    style=Style(),
)  # fmt: skip
FULL_SIZE: dict[str, ModuleSpec] = {
    "resnet50": _FULL,
    "revnet50x4": _encoder(_FULL, architecture="revnet", base_channels=256),
}
