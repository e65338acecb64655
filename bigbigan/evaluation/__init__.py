"""Evaluation: features and probes of any encoder, scores of any sampler, and what reconstructions keep."""

from bigbigan.evaluation.adapters import huggingface_features, timm_features
from bigbigan.evaluation.cache import ImageSource, TensorImages, compute_features
from bigbigan.evaluation.feature_files import read_features
from bigbigan.evaluation.feature_networks import FeatureNetwork, encoder_network, inception_network
from bigbigan.evaluation.generation import (
    FeatureStatistics,
    classifier_score,
    collect_features,
    frechet_distance,
    kernel_distance,
)
from bigbigan.evaluation.knn import KNNResult, knn_accuracy, nearest
from bigbigan.evaluation.linear_probe import LinearProbeResult, labelled_subset, linear_probe, logistic_path
from bigbigan.evaluation.protocols.evaluation import Evaluation
from bigbigan.evaluation.protocols.generation import evaluate_generation
from bigbigan.evaluation.protocols.knn import evaluate_knn
from bigbigan.evaluation.protocols.linear import evaluate_linear
from bigbigan.evaluation.protocols.reconstruction import evaluate_reconstruction
from bigbigan.evaluation.protocols.retrieval import evaluate_retrieval
from bigbigan.evaluation.protocols.rotation import evaluate_rotation
from bigbigan.evaluation.reconstruction import (
    Classifier,
    ReconstructionResult,
    classifier_accuracy,
    reconstruction_report,
    train_classifier,
)
from bigbigan.evaluation.report import make_record
from bigbigan.evaluation.representations import (
    Representation,
    function_features,
    model_features,
    module_features,
    pixels,
    principal_components,
)
from bigbigan.evaluation.retrieval import precision_at, retrieve
from bigbigan.evaluation.rows import StoredRows, bn_crelu
from bigbigan.evaluation.sgd_probe import PaperProbeResult, StackedClassifiers, paper_probe

__all__ = [
    "Classifier",
    "Evaluation",
    "FeatureNetwork",
    "FeatureStatistics",
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
    "classifier_score",
    "collect_features",
    "compute_features",
    "encoder_network",
    "evaluate_generation",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_reconstruction",
    "evaluate_retrieval",
    "evaluate_rotation",
    "frechet_distance",
    "function_features",
    "huggingface_features",
    "inception_network",
    "kernel_distance",
    "knn_accuracy",
    "labelled_subset",
    "linear_probe",
    "logistic_path",
    "make_record",
    "model_features",
    "module_features",
    "nearest",
    "paper_probe",
    "pixels",
    "precision_at",
    "principal_components",
    "read_features",
    "reconstruction_report",
    "retrieve",
    "timm_features",
    "train_classifier",
]
