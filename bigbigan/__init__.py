"""BigBiGAN in PyTorch: an image model that both draws and understands (arXiv 1907.02544)."""

from bigbigan._version import __version__
from bigbigan.config import (
    BigBiGANConfig,
    DiscriminatorConfig,
    EncoderConfig,
    GeneratorConfig,
    MLPConfig,
    ModelInfo,
    PreprocessConfig,
)
from bigbigan.discriminator import Discriminator, DiscriminatorOutput
from bigbigan.encoder import Encoder, EncoderOutput
from bigbigan.factory import create_model, list_models, load, reconstruct
from bigbigan.generator import Generator
from bigbigan.hub import DownloadError
from bigbigan.images import BadImageError
from bigbigan.integrity import WeightsError
from bigbigan.model import BigBiGAN
from bigbigan.schema import ConfigError

__all__ = [
    "BadImageError",
    "BigBiGAN",
    "BigBiGANConfig",
    "ConfigError",
    "Discriminator",
    "DiscriminatorConfig",
    "DiscriminatorOutput",
    "DownloadError",
    "Encoder",
    "EncoderConfig",
    "EncoderOutput",
    "Generator",
    "GeneratorConfig",
    "MLPConfig",
    "ModelInfo",
    "PreprocessConfig",
    "WeightsError",
    "__version__",
    "create_model",
    "list_models",
    "load",
    "reconstruct",
]
