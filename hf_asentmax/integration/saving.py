"""Writes a checkpoint's config.json, and the small module that is saved beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config import ASEntmaxConfig
from .names import FILE_IMPLEMENTATION, PRESET_ENTRY, REMOTE_CLASS, REMOTE_MODULE, flags_of, preset_for_flags, preset_of

__all__ = ["drop_own_class", "is_ours", "write_config_file"]

_OWN_CLASS = f"{REMOTE_MODULE}.{REMOTE_CLASS}"


def _is_own_class(reference: Any) -> bool:
    """Whether an auto_map entry names the plugin's class. Some versions of transformers prefix it by "repository--"."""
    return isinstance(reference, str) and reference.endswith(_OWN_CLASS)


def drop_own_class(config: PreTrainedConfig) -> None:
    """Remove the plugin's entries from a softmax config that was loaded from a checkpoint of the plugin.

    Its auto_map would name a module that is not saved with it.
    """
    vars(config).pop(PRESET_ENTRY, None)
    auto_map = getattr(config, "auto_map", None)
    if isinstance(auto_map, dict) and _is_own_class(auto_map.get("AutoConfig")):
        config.auto_map = {name: reference for name, reference in auto_map.items() if name != "AutoConfig"}
        if not config.auto_map:
            del config.auto_map


def _own_flags(config: PreTrainedConfig) -> ASEntmaxConfig | None:
    """The flags to save for one config without its sub-configs, or None if its attention is not a preset."""
    if preset_of(config) is not None:
        return flags_of(config)
    flags = getattr(config, "asentmax", None)
    return None if flags is None else ASEntmaxConfig.from_preset("asentmax", flags)


def _parts(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The keys and sub-configs of a composite model's config."""
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if isinstance(part, PreTrainedConfig):
            yield key, part


def is_ours(config: PreTrainedConfig) -> bool:
    """Whether a config or one of its sub-configs has an attention of the plugin."""
    return _own_flags(config) is not None or any(is_ours(part) for _, part in _parts(config))


def _file_implementation(config: PreTrainedConfig) -> str | dict[str, Any] | None:
    """The ``attn_implementation`` entry of config.json.

    A composite model has one entry per part, because transformers applies a single name to every part.
    """
    own = FILE_IMPLEMENTATION if _own_flags(config) is not None else None
    of_parts = {key: _file_implementation(part) for key, part in _parts(config)}
    if not of_parts:
        return own
    return {key: name for key, name in {"": own, **of_parts}.items() if name is not None} or None


def _with_flags(config: PreTrainedConfig, entries: dict[str, Any]) -> dict[str, Any]:
    """The entries that transformers writes for `config`, with the flags added, also in sub-configs."""
    entries = dict(entries)
    flags = _own_flags(config)
    if flags is not None:
        entries["asentmax"] = flags.to_dict()
        entries[PRESET_ENTRY] = preset_of(config) or preset_for_flags(config, flags)
    implementation = _file_implementation(config)
    if implementation is not None:
        entries["attn_implementation"] = implementation
    for key, part in _parts(config):
        if isinstance(entries.get(key), dict):
            entries[key] = _with_flags(part, entries[key])
    return entries


def write_config_file(config: PreTrainedConfig, path: str | Path, use_diff: bool = True) -> None:
    """Write config.json with all flags, and beside it the module that ``trust_remote_code=True`` loads.

    The ``attn_implementation`` entry makes transformers without the plugin refuse the checkpoint, through the Auto
    classes and through any model class. An ``AutoConfig`` entry of a custom model is kept.

    Args:
        config: the config of a model with an attention of the plugin.
        path: the path of config.json.
        use_diff: as for ``PreTrainedConfig.to_json_file``.
    """
    path = Path(path)
    entries = _with_flags(config, json.loads(config.to_json_string(use_diff=use_diff)))
    auto_map = dict(entries.get("auto_map") or {})
    if _is_own_class(auto_map.get("AutoConfig", _OWN_CLASS)):
        auto_map["AutoConfig"] = _OWN_CLASS
        shutil.copyfile(Path(__file__).with_name("remote_config.py"), path.with_name(f"{REMOTE_MODULE}.py"))
    entries["auto_map"] = auto_map
    path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
