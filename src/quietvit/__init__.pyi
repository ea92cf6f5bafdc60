"""The public names of quietvit, for type checkers and for ``__init__.py``, which reads this file.

A name is added here and nowhere else.
"""

from . import advice as advice
from . import callbacks as callbacks
from . import compare as compare
from . import data as data
from . import decay as decay
from . import deployment as deployment
from . import detection as detection
from . import measure as measure
from . import pairs as pairs
from . import quantization as quantization
from . import report as report
from . import synthesis as synthesis
from . import tasks as tasks
from . import tracing as tracing
from . import train as train
from .advice import advise as advise
from .advice import choose_bits as choose_bits
from .advice import sensitivity as sensitivity
from .data import evaluate as evaluate
from .decay import TWEO as TWEO
from .decay import ColinearityDecay as ColinearityDecay
from .decay import KurtosisRegularization as KurtosisRegularization
from .decay import NormGainDecay as NormGainDecay
from .decay import PairWeightDecay as PairWeightDecay
from .decay import SpectralDecay as SpectralDecay
from .decay import StrengthSchedule as StrengthSchedule
from .decay import register_regularizer as register_regularizer
from .decay import strength_for_total as strength_for_total
from .deployment import check as check
from .deployment import export as export
from .deployment import predict as predict
from .deployment import register_target as register_target
from .errors import QuietvitError as QuietvitError
from .measure import diagnose as diagnose
from .measure import sqnr as sqnr
from .pairs import MatrixPair as MatrixPair
from .pairs import find_pairs as find_pairs
from .quantization import BRECQ as BRECQ
from .quantization import ERQ as ERQ
from .quantization import GPTQ as GPTQ
from .quantization import HPTQ as HPTQ
from .quantization import RTN as RTN
from .quantization import AdaLog as AdaLog
from .quantization import DopQViT as DopQViT
from .quantization import FQViT as FQViT
from .quantization import Method as Method
from .quantization import PTQ4ViT as PTQ4ViT
from .quantization import QDrop as QDrop
from .quantization import QwT as QwT
from .quantization import RepQViT as RepQViT
from .quantization import SmoothQuant as SmoothQuant
from .quantization import learn_steps as learn_steps
from .quantization import list_methods as list_methods
from .quantization import load as load
from .quantization import quantize as quantize
from .quantization import register_method as register_method
from .synthesis import synthesize as synthesize
from .tasks import Task as Task
from .tasks import register_task as register_task
from .tracing import WeightView as WeightView
from .tracing import trace as trace

__version__: str
