"""Training images: where they come from (`sources`), and which of them make up a batch (`batches`)."""

from bigbigan.training.augment import NUM_DRAWS, AugmentationConfig, augment, uniform
from bigbigan.training.batches import Batches, Images
from bigbigan.training.sources import MAX_BYTES, ImageDataset, open_dataset, open_training_data
from bigbigan.training.streaming import ImageStream

__all__ = [
    "MAX_BYTES",
    "NUM_DRAWS",
    "AugmentationConfig",
    "Batches",
    "ImageDataset",
    "ImageStream",
    "Images",
    "augment",
    "open_dataset",
    "open_training_data",
    "uniform",
]
