"""What a server was told about documents: `--additional-config '{"kvzip": {...}}'`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

KEY = "kvzip"
"""Of the settings in `additional_config`, and of a document's name in a request's `vllm_xargs`."""


@dataclass(frozen=True)
class Settings:
    """documents: files to load at start, by name. directory: where routes may load files from; None: nowhere.

    capacity: documents at most. bits: of the rows of all documents if they are quantized, [keys, values] if those
    differ. bias: whether documents may have biases.

    Raises: ValueError for a value of another kind.
    """

    documents: Mapping[str, str] | Any = field(default_factory=dict)  # Any: JSON, checked here with our message
    directory: str | Any = None
    capacity: int | Any = 64
    bits: int | list[int] | Any = None
    bias: bool | Any = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, list) and len(self.bits) == 2 and self.bits[0] == self.bits[1]:
            object.__setattr__(self, "bits", self.bits[0])  # as files have it
        named = isinstance(self.documents, Mapping) and all(isinstance(x, str) for x in self.documents.values())
        wrong = {
            "documents": not named,
            "directory": not (self.directory is None or isinstance(self.directory, str)),
            "capacity": type(self.capacity) is not int or not 1 <= self.capacity <= 4096,
            "bits": not _are_bits(self.bits),
            "bias": type(self.bias) is not bool,
        }
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(
                    f"expected {name} of {KEY} in --additional-config to be {_KINDS[name]}, got "
                    f"{str(getattr(self, name))[:80]!r}: correct it"
                )
        for name in self.documents:
            check_name(name)


def _are_bits(value: Any) -> bool:
    pair = value if isinstance(value, list) else [value, value]
    return value is None or (len(pair) == 2 and all(type(x) is int and x in (8, 4, 2) for x in pair))


_KINDS = {
    "documents": "an object of names and files",
    "directory": "a directory or null",
    "capacity": "a whole number from 1 to 4096",
    "bits": "null, 8, 4 or 2, or a list of two of these",
    "bias": "true or false",
}


def settings_of(additional_config: Any) -> Settings:
    """Returns the settings in a server's `additional_config`. Raises ValueError for unknown or unfit ones."""
    given = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
    known = {x.name for x in fields(Settings)}
    if not isinstance(given, Mapping) or given.keys() - known:
        raise ValueError(
            f"expected {KEY} in --additional-config to be an object with {sorted(known)}, got {str(given)[:200]}: "
            "correct it"
        )
    return Settings(**given)


def check_name(name: Any) -> None:
    """Raises ValueError unless a document's name can stand in a URL and a log."""
    if not isinstance(name, str) or not 0 < len(name) <= 200 or not all(c.isalnum() or c in "-_.:" for c in name):
        raise ValueError(
            f"expected a document's name of up to 200 letters, digits, '-', '_', '.' and ':', got {str(name)[:80]!r}: "
            "choose another"
        )


def name_in(extra_args: Any) -> str | None:
    """Returns the name of the document in a request's extra arguments, None without one."""
    name = extra_args.get(KEY) if isinstance(extra_args, Mapping) else None
    return None if name is None else str(name)


def path_within(directory: str | None, file: str) -> Path:
    """Returns the path of a file that a route was asked to load.

    Raises: PermissionError if there is no directory for such files, or the file is not within it.
    """
    if directory is None:
        raise PermissionError(
            f'expected a directory to load documents from, got none: serve with --additional-config \'{{"{KEY}": '
            '{"directory": "/where/the/files/are"}}\''
        )
    root = Path(directory).expanduser().resolve()
    path = (root / file).resolve()
    if not path.is_relative_to(root):
        raise PermissionError(f"expected a file within the server's directory, got {file[:200]!r}: name one in it")
    return path
