"""A file opened with the model that it names: from here only, in its dtype, what it says checked as a caller's is."""

import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import kvzip
from kvzip import opening
from kvzip.cli import main
from kvzip.hub import Loading
from rewritten import rewrite

TEXT = "Happy families are all alike."


@pytest.fixture
def path(model, tmp_path):
    cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXT)), 0.5)
    (tmp_path / "model").mkdir()
    kvzip.save(cache, tmp_path / "doc.kvz", model=replace(model, source=str(tmp_path / "model")))
    return tmp_path / "doc.kvz"


@pytest.fixture
def loads(model, monkeypatch):
    """What `load` was called with; it gives the model."""
    calls = []

    def load(source, **options):
        calls.append((source, options))
        return replace(model, source=str(source))

    monkeypatch.setattr(opening, "load", load)
    return calls


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose cache has one model, and which notes whether anyone would have asked its server."""
    asked = []

    def snapshot_download(name, *, allow_patterns, local_files_only=False):
        if not local_files_only:
            asked.append(name)
        if name not in ("org/here", "Qwen/Qwen3-0.6B"):
            raise FileNotFoundError(f"no snapshot of {name}")
        return str(tmp_path / "model")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_a_file_opens_with_its_model_in_its_dtype(model, path, loads):
    loaded, cache = kvzip.open(path)
    assert loaded.source == str(path.parent / "model") and cache.kept == kvzip.load_cache(path).kept
    assert loads == [
        (path.parent / "model", {"device": None, "rope": None, "max_length": None, "dtype": torch.float32}),
    ]
    assert kvzip.generate(loaded, cache, "Who?", max_tokens=4)
    given, again = kvzip.open(path, model=model)
    assert given is model and again.kept == cache.kept and len(loads) == 1


def test_what_the_caller_says_stands_in_place_of_what_the_file_says(path, loads):
    rope, other = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, {"rope_type": "default"}
    rewrite(path, lambda header: header["model"].update(max_length=999, rope=rope))
    kvzip.open(path)
    assert loads.pop()[1] == {"device": None, "rope": rope, "max_length": 999, "dtype": torch.float32}
    kvzip.open(path, model="org/new", rope=other, max_length=5, dtype=torch.float16, device="cpu")
    options = {"device": "cpu", "rope": other, "max_length": 5, "dtype": torch.float16}
    assert loads.pop() == ("org/new", options)  # which may be fetched: the caller named it


@pytest.mark.parametrize("source", ["org/here", "qwen3-0.6b"])
def test_the_hubs_cache_is_read_and_the_hub_not_asked(path, loads, hub, source):
    rewrite(path, lambda header: header["model"].update(source=source))
    loaded, _ = kvzip.open(path)
    assert loads[0][0] == path.parent / "model" and loaded.source == source and hub == []


@pytest.mark.parametrize(
    "source",
    ["org/elsewhere", "qwen2.5-7b", "/no/such/directory", "./model", "~", "~nobody/model", "a/b/c", "gpt", "x" * 999],
)
def test_a_file_does_not_choose_what_is_fetched(path, loads, hub, monkeypatch, source):
    monkeypatch.setenv("HOME", "/nonexistent")
    rewrite(path, lambda header: header["model"].update(source=source))
    with pytest.raises(
        FileNotFoundError, match=r"the hub's cache, got neither: .* fetched, pass --model .* \(in Python model=\)"
    ):
        kvzip.open(path)
    assert loads == [] and hub == []
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pass --model"):
        kvzip.open(path)


@pytest.mark.parametrize("source", ["", "x" * 5000, "//server/share", "\\\\server\\share"])
def test_a_source_that_is_no_name_is_refused(path, loads, hub, source):
    rewrite(path, lambda header: header["model"].update(source=source))
    with pytest.raises(ValueError, match=r"doc\.kvz that is truncated or tampered with \(a model from") as caught:
        kvzip.open(path)
    assert str(caught.value).isprintable() and loads == [] and hub == []


@pytest.mark.parametrize("source", ["a\nb", "\x1b[31mred", "a\0b", "\ud800", "a\x1b/b", "/\x1b[2J"])
def test_what_steers_a_terminal_is_a_name_that_is_not_here(path, loads, hub, source):
    rewrite(path, lambda header: header["model"].update(source=source))
    with pytest.raises(FileNotFoundError, match="in a directory here or in the hub's cache, got neither") as caught:
        kvzip.open(path)
    assert str(caught.value).isprintable() and loads == [] and hub == []


@pytest.mark.parametrize("name", ["mo\u3000del", "mo\xa0del", "mo\u202fdel", "mo\ndel", "mo\u202edel", "mo\x1bdel"])
def test_a_directory_may_have_any_name(model, path, loads, name):
    directory = path.parent / name
    directory.mkdir()
    kvzip.save(kvzip.load_cache(path), path, model=replace(model, source=str(directory)), overwrite=True)
    loaded, _ = kvzip.open(path)
    assert loaded.source == str(directory) and loads[0][0] == directory


def test_a_note_is_the_callers_and_says_nothing_of_loading(model, path, loads):
    how = {"max_length": 999, "rope": {"rope_type": "linear", "factor": 2.0}}
    for note in ({"load": "fast"}, {"load": {"max_length": "long"}}, {"load": {"rope": {"rope_type": "yarn"}}}):
        made = replace(model, source=str(path.parent / "model"), **how)
        kvzip.save(kvzip.load_cache(path), path, model=made, note=note, overwrite=True)
        kvzip.open(path)
        assert loads.pop()[1] == {"device": None, "dtype": torch.float32, **how}, note


@pytest.mark.parametrize(
    "noted",
    [
        {"max_length": -1},
        {"max_length": True},
        {"max_length": 2**40},
        {"max_length": "9"},
        {"rope": []},
        {"rope": "yarn"},
        {"dtype": 3},
        {"dtype": ["float32"]},
    ],
    ids=str,
)
def test_how_a_file_would_be_loaded_is_checked(path, loads, noted):
    rewrite(path, lambda header: header["model"].update(noted))
    with pytest.raises(ValueError, match="truncated or tampered with"):
        kvzip.open(path)
    assert loads == []


OTHER = "3f" * 16 + "-bfloat16"


def test_files_without_a_model_or_a_cache_are_refused_before_anything_is_loaded(path, loads, model):
    rewrite(path, lambda header: header.update(model=None, fingerprint=OTHER))
    with pytest.raises(ValueError, match=r"doc\.kvz to say which model made it, got none: pass --model"):
        kvzip.open(path)
    with pytest.raises(
        ValueError, match=r"that made doc\.kvz, another model in bfloat16, got org/new in float32: its fingerprint is"
    ):
        kvzip.open(path, model="org/new")
    assert loads.pop()[1]["dtype"] == torch.bfloat16 and not loads  # the fingerprint tells it
    kvzip.scores.save(kvzip.score(model, kvzip.prefill(model, TEXT)), path.parent / "doc.scores")
    with pytest.raises(ValueError, match=r"expected a cache, got 'Scores'.*kvzip\.scores\.load"):
        kvzip.open(path.parent / "doc.scores")


def test_a_dtype_that_is_not_the_files_is_refused_as_that(path, loads, model, monkeypatch):
    monkeypatch.setattr(opening, "load", lambda source, **_: replace(model, dtype=torch.float16))
    with pytest.raises(
        ValueError, match=r"doc\.kvz, model in float32, .*: its pairs are float32, the model is float16"
    ):
        kvzip.open(path, dtype=torch.float16)


def test_load_of_a_file_says_what_opens_it(path):
    with pytest.raises(ValueError, match=r"got the file .*doc\.kvz: pass its directory; kvzip\.open\(path\) opens"):
        kvzip.load(path)
    with pytest.raises(ValueError, match=r"kvzip\.open\(path\)"):
        kvzip.load(str(path))


def test_the_command_opens_files_by_the_same_rule(path, loads, hub, monkeypatch):
    from kvzip.cli.sources import open_cache

    options = {"model": None, "loading": Loading()}
    loaded, cache, header = open_cache(lambda _: lambda done, total: None, path, **options)
    assert (header["kept"], loaded.source) == (cache.kept, str(path.parent / "model"))
    rewrite(path, lambda header: header["model"].update(source="org/elsewhere"))
    with pytest.raises(FileNotFoundError, match="does not choose what is fetched"):
        open_cache(lambda _: lambda done, total: None, path, **options)
    assert hub == []


@pytest.mark.parametrize("command", [("ask", "Who?"), ("chat",)])
def test_the_command_warns_of_a_length_before_it_loads_and_asks_no_hub(path, hub, monkeypatch, command):
    def load(*_, **__):
        raise ValueError("expected the warning first")

    monkeypatch.setattr(opening, "load", load)
    (path.parent / "model" / "config.json").write_text('{"max_position_embeddings": 4096}')
    warning = "warning: 5,000 positions are asked for (--max-length), the model was made for 4,096"
    for source in ("org/here", str(path.parent / "model")):
        rewrite(path, lambda header, source=source: header["model"].update(source=source))
        result = CliRunner().invoke(main, [command[0], str(path), *command[1:], "--max-length", "5000"])
        told, failed = result.stderr.splitlines()
        assert told.startswith(warning) and failed == "kvzip: expected the warning first" and hub == []
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}
    rewrite(path, lambda header: header["model"].update(rope=scaled))
    result = CliRunner().invoke(main, [command[0], str(path), *command[1:], "--max-length", "5000"])
    assert result.stderr == "kvzip: expected the warning first\n"


def test_the_command_opens_a_file_once(path, loads, monkeypatch):
    from kvzip.cli import info, sources

    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda *arguments: opened.append(arguments[0]) or real(*arguments))
    assert info.file_facts(path)["kept"] and opened == [path]
    options = {"model": None, "loading": Loading(max_length=64)}
    sources.open_cache(lambda _: lambda done, total: None, path, **options)
    assert opened == [path, path]


def test_a_loaded_model_takes_no_options_and_a_path_is_no_hub_id(model, path, loads, hub):
    for options in ({"dtype": torch.float32}, {"rope": {"rope_type": "default"}, "max_length": 5}):
        with pytest.raises(ValueError, match=f"got a Model and {', '.join(options)}: pass"):
            kvzip.open(path, model=model, **options)
    kvzip.open(path, model=Path("org/name"))
    assert loads.pop()[0] == Path("org/name") and hub == []  # a Path, which `load` takes for a directory only
