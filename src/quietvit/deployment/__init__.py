"""Export a simulated quantized model to a file computed in integers, and prove that it is.

Code for all targets lives here. Each target has its own folder and does not know the others.
"""

from quietvit.deployment.artifact import Artifact
from quietvit.deployment.checked import Check
from quietvit.deployment.checking import check
from quietvit.deployment.embedding import Embedding
from quietvit.deployment.exporting import export
from quietvit.deployment.for_torchao.file import TorchAO, load_torchao
from quietvit.deployment.for_torchao.model import to_torchao
from quietvit.deployment.opening import open_runtime
from quietvit.deployment.predicting import Prediction, predict
from quietvit.deployment.proof import Proof
from quietvit.deployment.runtime import Kernel, Runtime
from quietvit.deployment.target import Export, Target
from quietvit.deployment.targets import register_target

__all__ = [
    "Artifact",
    "Check",
    "Embedding",
    "Export",
    "Kernel",
    "Prediction",
    "Proof",
    "Runtime",
    "Target",
    "TorchAO",
    "check",
    "export",
    "load_torchao",
    "open_runtime",
    "predict",
    "register_target",
    "to_torchao",
]
