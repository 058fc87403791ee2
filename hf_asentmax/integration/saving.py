"""What goes into a checkpoint's config.json, and the small module that is saved beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config import ASEntmaxConfig
from .names import FILE_IMPLEMENTATION, REMOTE_CLASS, REMOTE_MODULE, flags_of, preset_of

__all__ = ["is_ours", "write_config_file"]


def _own_flags(config: PreTrainedConfig) -> ASEntmaxConfig | None:
    """The flags to save for one config (not its sub-configs), or None if its attention is not ours."""
    if preset_of(config) is not None:
        return flags_of(config)
    flags = getattr(config, "asentmax", None)
    return None if flags is None else ASEntmaxConfig.from_preset("asentmax", flags)


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a config, or one of its sub-configs, has an attention of ours."""
    if _own_flags(config) is not None:
        return True
    parts = (getattr(config, key, None) for key in getattr(config, "sub_configs", {}))
    return any(is_ours(part) for part in parts if isinstance(part, PreTrainedConfig))


def _with_flags(config: PreTrainedConfig, entries: dict[str, Any]) -> dict[str, Any]:
    """`entries`, what transformers writes for `config`, with the flags added, in sub-configs too."""
    entries = dict(entries)
    flags = _own_flags(config)
    if flags is not None:
        entries["asentmax"] = flags.to_dict()
        entries["attn_implementation"] = FILE_IMPLEMENTATION
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig) and isinstance(entries.get(key), dict):
            entries[key] = _with_flags(part, entries[key])
    return entries


def write_config_file(config: PreTrainedConfig, path: str | Path, use_diff: bool = True) -> None:
    """Write config.json with all flags, and beside it the module that ``trust_remote_code=True`` loads.

    The ``attn_implementation`` entry makes transformers without the plugin refuse the checkpoint, by any class and
    not only through the Auto classes. An ``AutoConfig`` entry that a custom model already has stays.
    """
    path = Path(path)
    entries = _with_flags(config, json.loads(config.to_json_string(use_diff=use_diff)))
    auto_map = dict(entries.get("auto_map") or {})
    auto_map.setdefault("AutoConfig", f"{REMOTE_MODULE}.{REMOTE_CLASS}")
    entries["auto_map"] = auto_map
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if auto_map["AutoConfig"] == f"{REMOTE_MODULE}.{REMOTE_CLASS}":
        shutil.copyfile(Path(__file__).with_name("remote_config.py"), path.with_name(f"{REMOTE_MODULE}.py"))
