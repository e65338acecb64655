"""Modules in forms that no known description has, and pairs of them: what each network should become."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .spec import ModuleSpec
from .variants import LEAKY, PLAIN, _encoder, _generator, _mlps, _style


@dataclass(frozen=True)
class Form:
    """A module, which of its networks become graphs, and how far their outputs may be from the module's."""

    spec: ModuleSpec
    graphs: str = ""  # of "ged"
    tolerance: float = 1e-4


def _departing(*names: str, spec: ModuleSpec = PLAIN) -> ModuleSpec:
    return replace(spec, departures=names)


SWITCH = _style(branch="switch")
FORMS: dict[str, Form] = {
    # E: the latent
    "noise_broadcast": Form(_style(noise="broadcast")),
    "truncated_normal": Form(_departing("truncated_normal"), "e"),
    "stdev_offset": Form(replace(PLAIN, stdev_offset=1e-2), "e"),
    "stdev_exp": Form(_departing("stdev_exp"), "e"),
    "stdev_sqrt": Form(_departing("stdev_sqrt"), "e"),
    "stdev_clipped": Form(_departing("stdev_clipped"), "e"),
    "sample_tanh": Form(replace(PLAIN, sample_activation=True), "e"),
    # E: the image and the trunk
    "image_normalised": Form(_departing("image_normalised"), "e"),
    "image_resized": Form(_departing("image_resized")),
    "stem_norm": Form(_departing("stem_norm"), "e"),
    "late_strides": Form(_departing("late_strides"), "e"),
    # E, D: the MLPs
    "post_inner": Form(_departing("post_inner"), "ed"),
    "outer_linears": Form(_departing("outer_linears"), "ed"),
    "slope_0.1": Form(_mlps(LEAKY, slope=0.1), "ed"),
    "elu": Form(_departing("elu"), "ed"),
    "relu6": Form(_departing("relu6"), "ed"),
    "gelu": Form(_departing("gelu"), "ed"),
    "swish": Form(_departing("swish"), "ed"),
    "layer_norm": Form(_departing("layer_norm"), "ed"),
    "projection_activated": Form(_departing("projection_activated"), "ed"),
    "mlp_norm_eps": Form(_mlps(norm="batch", norm_eps=0.05)),
    "score_product": Form(_departing("score_product")),
    # G
    "upsample_gather": Form(_departing("upsample_gather")),
    "upsample_concat": Form(_departing("upsample_concat")),
    "upsample_transposed": Form(_departing("upsample_transposed"), "g"),
    "upsample_bilinear": Form(_departing("upsample_bilinear"), "g"),
    "clipped": Form(_departing("clipped"), "g"),
    "sigmoid": Form(_departing("sigmoid"), "g"),
    "normalised_z": Form(_departing("normalised_z"), "g"),
    "bicubic": Form(_departing("bicubic")),
    "bicubic_half_pixel": Form(_departing("bicubic_half_pixel")),
    "area": Form(_departing("area")),
    # any
    "attention_scaled": Form(replace(PLAIN, attention_scale=0.5)),
    "power_loop": Form(_departing("power_loop")),
    "power_loop_v1": Form(_departing("power_loop", spec=SWITCH)),
    "float64_statistics": Form(_departing("float64_statistics")),
    "print": Form(_departing("print")),
    "partitioned": Form(_departing("partitioned")),
    "partitioned_reference": Form(_departing("partitioned", spec=_style(variables="reference"))),
    "bfloat16": Form(_departing("bfloat16"), "gd", 1e-2),
    "dilated": Form(_departing("dilated"), "ged"),
    # two at once
    "bfloat16_and_clipped": Form(_departing("bfloat16", "clipped"), "gd", 1e-2),
    "gather_and_sigmoid": Form(_departing("upsample_gather", "sigmoid"), "g"),
    "loop_and_layer_norm": Form(_departing("power_loop", "layer_norm", spec=SWITCH), "ed"),
    "partitioned_and_print": Form(_departing("partitioned", "print")),
    "product_and_post_inner": Form(_departing("score_product", "post_inner"), "ed"),
    "stem_and_exp": Form(
        _departing("stem_norm", "stdev_exp", spec=_encoder(architecture="revnet", depths=(2, 1, 2))), "e"
    ),
    "strides_and_truncated": Form(_departing("late_strides", "truncated_normal"), "e"),
    "bicubic_and_normalised": Form(_departing("bicubic", "normalised_z", spec=_generator(class_first=True)), "g"),
    "elu_and_functions": Form(_departing("elu", spec=_style(functions="captured", branch="if")), "ed"),
}
