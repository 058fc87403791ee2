"""Lets transformers load this checkpoint with trust_remote_code=True.

The attention of this checkpoint is in the package hf_asentmax (pip install hf_asentmax).
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import hf_asentmax  # noqa: F401  (registers the attention; transformers names the package if it is not installed)


class ASEntmaxAutoConfig(PreTrainedConfig):
    """Returns the checkpoint's own config class, for any model family."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Read the family's config, after hf_asentmax was imported."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "trust_remote_code": False})
