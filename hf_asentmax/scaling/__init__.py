"""Length scalings: what they compute (`modules`), and how a query takes its factor (`query`)."""

from .modules import AsentmaxScaling, LearnedScaling, LengthScaling, SSMaxScaling, build_scaling
from .query import scaled_query

__all__ = ["AsentmaxScaling", "LearnedScaling", "LengthScaling", "SSMaxScaling", "build_scaling", "scaled_query"]
