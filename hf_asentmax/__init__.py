"""Sparse attention for Hugging Face Transformers: alpha-entmax, ASEntmax length scaling and NAPE positions.

Importing the package registers its presets with transformers. `ASEntmaxConfig` describes the flags.
"""

from .attention import entmax_attention
from .config import ASEntmaxConfig
from .integration import register
from .training import parameter_groups, set_alpha

__all__ = ["ASEntmaxConfig", "__version__", "entmax_attention", "parameter_groups", "set_alpha"]

__version__ = "0.1.0"

register()
