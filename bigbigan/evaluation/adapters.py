"""Encoders of other libraries, timm and transformers, each with the preprocessing that it was published with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bigbigan.config import PreprocessConfig
from bigbigan.evaluation.representations import Representation, module_features

POOLINGS = ("pooled", "cls", "mean")
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}  # Pillow's numbers


def timm_features(name: str, *, device: str | torch.device = "cpu") -> Representation:
    """The pooled features [B, D] of a pretrained timm model, as `features`, under its own data configuration.

    Raises:
        ValueError: no such model, or preprocessing that is not a centre crop or a squash of square images.
        ImportError: no timm.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm:{name} needs timm: pip install timm") from error
    try:
        module = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"timm:{name} cannot be loaded: {error}") from error
    data = timm.data.resolve_model_data_config(module)
    channels, height, width = data["input_size"]
    mode = data.get("crop_mode", "center")
    if height != width or mode not in ("center", "squash") or len(data["mean"]) != channels:
        raise ValueError(f"timm:{name} takes {data['input_size']} images with crop_mode {mode!r}; only squares, "
                         "centre-cropped or squashed, can be given")  # fmt: skip
    edge = math.floor(height / data["crop_pct"])
    top = round((edge - height) / 2)  # as torchvision's CenterCrop, which timm uses
    return module_features(
        module.to(device),
        _prepared(edge, data["interpolation"], squash=mode == "squash"),
        mean=data["mean"],
        std=data["std"],
        crop=(top, top + height),
        name=f"timm:{name}",
        settings=[name, timm.__version__],
    )


def huggingface_features(
    name: str, *, pooling: str = "pooled", revision: str | None = None, device: str | torch.device = "cpu"
) -> Representation:
    """Features [B, D] of a vision model on the Hugging Face Hub, under its own image processor's settings.

    Of models of text and images, the part for images. Where the processor keeps whole pictures, the centre square.

    Args:
        pooling: "pooled", the model's `pooler_output`; "cls", its "first token"; "mean", that of all tokens or places,
            "mean of the last layer". These are the names of the output.

    Raises:
        ValueError: no such model or output, or preprocessing that cannot be followed.
        ImportError: no transformers.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"hf:{name}: pooling is {pooling!r}; choose {', '.join(POOLINGS)}")
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"hf:{name} needs transformers: pip install transformers") from error
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(name, revision=revision)
        module = transformers.AutoModel.from_pretrained(name, revision=revision, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"hf:{name} cannot be loaded: {error}") from error
    module = getattr(module, "vision_model", module)
    config: Any = getattr(module, "config", None)
    if getattr(config, "mask_ratio", 0):  # masked autoencoders leave places out at random, also in eval mode
        config.mask_ratio = 0.0
    preprocess, crop, mean, std = _processing(processor.to_dict(), f"hf:{name}")
    top = (preprocess.size - (crop or 0)) // 2  # as transformers' center_crop

    def read(out: Any) -> Tensor:
        if pooling == "pooled":
            pooled = getattr(out, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"hf:{name} has no pooler_output; use hf:{name}:cls or hf:{name}:mean")
            return pooled.flatten(1)  # convolutional ones give [N, D, 1, 1]
        last = out.last_hidden_state  # [N, tokens, D], or [N, D, H, W]
        if last.ndim == 4:
            if pooling == "cls":
                raise ValueError(f"hf:{name} has no tokens; use hf:{name} or hf:{name}:mean")
            return last.mean((2, 3))
        return last[:, 0] if pooling == "cls" else last.mean(1)

    return module_features(
        module.to(device),
        preprocess,
        mean=mean,
        std=std,
        crop=None if crop is None else (top, top + crop),
        name=f"hf:{name}",
        output={"pooled": "pooler_output", "cls": "first token", "mean": "mean of the last layer"}[pooling],
        read=read,
        settings=[name, revision, pooling, transformers.__version__],
    )


def _processing(
    settings: Mapping[str, Any], name: str
) -> tuple[PreprocessConfig, int | None, list[float], list[float]]:
    """Preprocessing, centre crop behind it, mean and deviation, from an image processor's settings."""
    size, crop = _sides(settings.get("size")), None
    squash = "shortest_edge" not in size
    edge = size.get("shortest_edge", size.get("height"))
    if not settings.get("do_resize", True) or edge is None or (squash and size.get("width") != edge):
        raise ValueError(f"{name}: its image processor resizes to {settings.get('size')}; only squares can be given")
    scale = settings.get("crop_pct")
    if scale and not (squash or edge >= 384):  # ConvNeXT's rule: the edge is what is left of the crop
        edge, crop = int(edge / scale), edge
    elif scale:
        squash = True
    if settings.get("do_center_crop"):
        cut = _sides(settings.get("crop_size"))
        crop = cut.get("height", cut.get("shortest_edge"))
        if crop is None or cut.get("width", crop) != crop or crop > edge:
            raise ValueError(f"{name}: its image processor crops {settings.get('crop_size')} from {edge} pixels; "
                             "only a smaller square can be cut")  # fmt: skip
    if not math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"{name}: its image processor scales values by {settings['rescale_factor']}, not by 1 / 255")
    mean, std = [0.0] * 3, [1.0] * 3
    for key, wanted in (("do_rescale", True), ("do_color_quantize", False)):
        if settings.get(key, wanted) is not wanted:
            raise ValueError(
                f"{name}: its image processor has {key} {settings[key]}; only colours in [0, 1] can be given"
            )
    if settings.get("do_normalize", True):
        if None in (settings.get("image_mean"), settings.get("image_std")):
            raise ValueError(f"{name}: its image processor normalises, but names no image_mean or no image_std")
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    resample = int(settings.get("resample", 2))
    if resample not in _FILTERS:
        raise ValueError(f"{name}: its image processor resizes with filter {resample}; known are {_FILTERS}")
    return _prepared(edge, _FILTERS[resample], squash=squash), crop, mean, std


def _sides(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"shortest_edge": size}
    return {key: value for key, value in dict(size or {}).items() if value is not None}


def _prepared(edge: int, interpolation: str, *, squash: bool) -> PreprocessConfig:
    # Cropping the largest square and then scaling it to the edge is scaling the shorter side and then cropping.
    return PreprocessConfig(size=edge, crop="none" if squash else "center", filter=interpolation)  # type: ignore[arg-type]
