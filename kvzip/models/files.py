"""The files of an HF directory: JSON, checked when read, and which safetensors files hold the weights."""

import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict where there is no such file.

    Raises: ValueError that names the file, and the key where there is one, if it is no JSON object in UTF-8, or has a
        number that is not finite; OSError if it cannot be read.
    """
    if not path.exists():
        return {}
    if not path.is_file():
        raise ValueError(f"expected {path.name} to be a file, got something else: fetch it again")
    unfit = False

    def parsed(text: str) -> float:  # for non-integers; Python reads NaN and Infinity, JSON has neither
        nonlocal unfit
        value = float(text)
        unfit |= not math.isfinite(value)
        return value

    try:
        value = json.loads(path.read_bytes().decode("utf-8"), parse_float=parsed, parse_constant=parsed)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested thousands deep
        raise ValueError(
            f"expected {path.name} to hold JSON in UTF-8, got {path.stat().st_size} bytes that do not parse "
            f"({str(error)[:200]}): fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"expected {path.name} to hold a JSON object, got a {type(value).__name__}: fetch it again")
    if unfit:
        key, number = next(_unfit(value))
        raise ValueError(f"expected finite numbers in {path.name}, got {number} for {key!r}: correct the file")
    return value


def _unfit(value: Any) -> Iterator[tuple[str, float]]:
    """Yields the keys, joined by dots, of the numbers that are not finite."""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        key, value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            yield key.removeprefix("."), value
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        left += [(f"{key}.{name}", inner) for name, inner in items]


def weight_files(directory: Path, named: Any = None) -> list[Path]:
    """Returns the safetensors files that hold the weights, in order of their names, as Transformers chooses them.

    `model.safetensors` is preferred to what `model.safetensors.index.json` lists; other files (adapters, Mistral's
    consolidated weights) are not part of the checkpoint. Names are checked but not link targets, as the hub's cache
    consists of links.

    Args:
        named: `transformers_weights` of config.json: the weights or index file to read instead of those two.

    Raises: FileNotFoundError that names what is missing; ValueError that names file and key for an index that is not
        understood, or a name that leaves the directory.
    """
    if named is not None:
        _check_name(named, "config.json", "transformers_weights", (".safetensors", ".safetensors.index.json"))
    else:
        named = WEIGHTS if (directory / WEIGHTS).is_file() else INDEX
    if not named.endswith(".json"):
        return _present(directory, [named], "config.json")
    if not (directory / named).is_file():
        others = sorted(path.name for path in directory.glob("*.safetensors") if path.name.isprintable())
        if (directory / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"expected {WEIGHTS} or {named} in {directory}, got an adapter ({', '.join(others) or 'no weights'}): "
                "merge it into its base model first"
            )
        raise FileNotFoundError(
            f"expected {WEIGHTS}, or {named} and the *.safetensors that it lists, in {directory}, got "
            f"{', '.join(others[:5]) or 'none'}: fetch the checkpoint again, or convert it to safetensors"
        )
    entries = read_json(directory / named).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"expected weight_map in {named} to give the file of each tensor, got {str(entries)[:80]!r}: fetch it again"
        )
    for tensor, name in entries.items():
        _check_name(name, named, f"weight_map[{tensor!r}]", (".safetensors",))
    return _present(directory, sorted(set(entries.values())), named)


def _check_name(name: Any, file: str, key: str, endings: tuple[str, ...]) -> None:
    """Raises ValueError unless a name that a file gives stays in the file's directory, on any system."""
    inside = isinstance(name, str) and name.isprintable() and name.endswith(endings)
    if inside:
        ways = (PurePosixPath(name), PureWindowsPath(name))
        inside = not any(way.is_absolute() or way.drive or way.root or ".." in way.parts for way in ways)
    if not inside:
        raise ValueError(
            f"expected {key} in {file} to name a file in its own directory that ends in {' or '.join(endings)}, got "
            f"{str(name)[:200]!r}: kvzip reads nothing else, so do not trust this checkpoint"
        )


def _present(directory: Path, names: list[str], source: str) -> list[Path]:
    paths = [directory / name for name in names]
    absent = [name for name, path in zip(names, paths, strict=True) if not path.is_file()]
    if absent:
        raise FileNotFoundError(
            f"expected the {len(paths)} shards that {source} lists in {directory}, "
            f"got no {absent[0]}: the download is incomplete"
        )
    return paths
