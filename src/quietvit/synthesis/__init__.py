"""Generate calibration images without data, from the model's own weights or from noise.

``quantization`` treats them like other images.
"""

from quietvit.synthesis.generate import synthesize
from quietvit.synthesis.pictures import save_images
from quietvit.synthesis.settings import DGH, PSAQ, Pink

__all__ = ["DGH", "PSAQ", "Pink", "save_images", "synthesize"]
