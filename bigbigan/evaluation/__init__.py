"""Evaluation: linear probes on features, and what reconstructions keep. Functions take tensors and callables only."""

from bigbigan.evaluation.linear_probe import LinearProbeResult, linear_probe, logistic_path
from bigbigan.evaluation.reconstruction import (
    Classifier,
    ReconstructionResult,
    classifier_accuracy,
    reconstruction_report,
    train_classifier,
)

__all__ = [
    "Classifier",
    "LinearProbeResult",
    "ReconstructionResult",
    "classifier_accuracy",
    "linear_probe",
    "logistic_path",
    "reconstruction_report",
    "train_classifier",
]
