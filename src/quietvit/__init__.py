"""Quantize vision transformers, train them for it, prove what the exported file computes.

The public names are those of ``__init__.pyi``. Each is imported on first use, so that
``import quietvit`` stays light.
"""

import pkgutil

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
# Packages such as quietvit.detection are attributes too, but `import *` does not import them.
__all__ = sorted(set(__all__).difference(module.name for module in pkgutil.iter_modules(__path__)))
