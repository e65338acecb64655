"""Evaluation: features and probes of any model, and what reconstructions keep."""

from bigbigan.evaluation.adapters import huggingface_features, timm_features
from bigbigan.evaluation.cache import ImageSource, TensorImages, compute_features
from bigbigan.evaluation.feature_files import read_features
from bigbigan.evaluation.knn import KNNResult, knn_accuracy, nearest
from bigbigan.evaluation.linear_probe import LinearProbeResult, labelled_subset, linear_probe, logistic_path
from bigbigan.evaluation.reconstruction import (
    Classifier,
    ReconstructionResult,
    classifier_accuracy,
    reconstruction_report,
    train_classifier,
)
from bigbigan.evaluation.representations import (
    Representation,
    function_features,
    model_features,
    module_features,
    pixels,
    principal_components,
)
from bigbigan.evaluation.rows import StoredRows, bn_crelu
from bigbigan.evaluation.sgd_probe import PaperProbeResult, StackedClassifiers, paper_probe

__all__ = [
    "Classifier",
    "ImageSource",
    "KNNResult",
    "LinearProbeResult",
    "PaperProbeResult",
    "ReconstructionResult",
    "Representation",
    "StackedClassifiers",
    "StoredRows",
    "TensorImages",
    "bn_crelu",
    "classifier_accuracy",
    "compute_features",
    "function_features",
    "huggingface_features",
    "knn_accuracy",
    "labelled_subset",
    "linear_probe",
    "logistic_path",
    "model_features",
    "module_features",
    "nearest",
    "paper_probe",
    "pixels",
    "principal_components",
    "read_features",
    "reconstruction_report",
    "timm_features",
    "train_classifier",
]
