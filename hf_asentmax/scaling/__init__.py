"""Length scalings: the modules that compute a factor (`modules`) and its product with the query (`query`)."""

from .modules import AsentmaxScaling, LearnedScaling, LengthScaling, SSMaxScaling, build_scaling
from .query import scaled_query

__all__ = ["AsentmaxScaling", "LearnedScaling", "LengthScaling", "SSMaxScaling", "build_scaling", "scaled_query"]
