"""Temporary: replaced at merge."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object of a JSON file, empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"expected JSON in {path}, got {error}: fetch it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected an object in {path}, got {type(value).__name__}: fetch it again")
    return value
