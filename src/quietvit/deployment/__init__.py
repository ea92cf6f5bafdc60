"""From a simulated quantized model to a file computed in integers, and the proof of it."""

from quietvit.deployment.checking import Check, check
from quietvit.deployment.exporting import Artifact, export
from quietvit.deployment.predicting import Prediction, predict
from quietvit.deployment.proof import Proof
from quietvit.deployment.runtime import open_runtime
from quietvit.deployment.torchao_file import load_torchao
from quietvit.deployment.torchao_model import TorchAO, to_torchao

__all__ = [
    "Artifact",
    "Check",
    "Prediction",
    "Proof",
    "TorchAO",
    "check",
    "export",
    "load_torchao",
    "open_runtime",
    "predict",
    "to_torchao",
]
