"""Values as TOML writes them; Python reads TOML and has nothing that writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["as_toml"]


def as_toml(values: Mapping[str, Any]) -> str:
    """A TOML text of named values, a line each, which `tomllib.loads` reads back; a value that is None is left out.

    Args:
        values: numbers, truth values, texts, and lists and tables of these; the names are of letters, digits, - and _.
    """
    return "".join(f"{name} = {_written(value)}\n" for name, value in values.items() if value is not None)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)  # both are TOML
