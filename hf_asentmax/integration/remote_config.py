"""Lets transformers load this checkpoint with trust_remote_code=True: the attention is in the package hf_asentmax.

The weights need that package (pip install hf_asentmax); without it transformers would not know their attention.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

import hf_asentmax  # noqa: F401  (registers the attention; transformers names the package if it is not installed)


class ASEntmaxAutoConfig(PreTrainedConfig):
    """Stands for the checkpoint's own config class, whichever family it is of."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """The family's config, read after hf_asentmax was imported."""
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, **{**kwargs, "trust_remote_code": False})
