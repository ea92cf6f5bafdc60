"""From a simulated quantized model to a file computed in integers, and the proof of it.

What serves every target lies here; each target has a room of its own and knows no other.
"""

from quietvit.deployment.checking import Check, check
from quietvit.deployment.embedding import Embedding
from quietvit.deployment.exporting import Artifact, export
from quietvit.deployment.for_torchao.file import load_torchao
from quietvit.deployment.for_torchao.model import TorchAO, to_torchao
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.predicting import Prediction, predict
from quietvit.deployment.proof import Proof

__all__ = [
    "Artifact",
    "Check",
    "Embedding",
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
