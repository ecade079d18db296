"""One rank fails, is killed or interrupted: all end, one says why, no file is left half written, none hangs."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ended, fork, join
from safetensors.torch import load_file, save_file

import kvzip
from kvzip import scoring
from kvzip.cache import full_nbytes
from kvzip.cli import main
from kvzip.cli.output import size
from kvzip.files import shared, tensors
from kvzip.parallel import launch
from test_cli import write_model

loading = sys.modules["kvzip.models.load"]  # the package has a function of this name
TEXT = "The lighthouse at Cape Rouen was built in 1871. " * 8
LIMIT_S = 60  # for all to end; they take one or two


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


def command(change: Callable[[int], Any], *words: str) -> None:
    """A rank: the command, after what the test changes in it."""
    torch.cuda.is_available = lambda: False
    change(int(os.environ["RANK"]))
    main(list(words), prog_name="kvzip")


def left_alone(*words: str) -> bool:
    """A rank: whether the command leaves the signals of its process as they were."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit, match="0"):
        command(lambda rank: None, *words)
    return before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def run(
    model_dir: Path, directory: Path, change: Callable[[int], Any], *, started: Callable[[list[int]], Any] | None = None
) -> list[Ended]:
    """Compresses a document in two ranks, which `change(rank)` spoils; `started` is given their process ids."""
    (directory / "doc.txt").write_text(TEXT, encoding="utf-8")
    words = ["compress", str(directory / "doc.txt"), "-m", str(model_dir), "--device", "cpu"]
    words += ["-o", str(directory / "made.kvz")]
    begun = time.monotonic()
    ids = fork(2, command, change, *words, directory=directory)
    if started is not None:
        started(ids)
    ended = join(ids, directory, timeout_s=LIMIT_S)
    assert time.monotonic() - begun < LIMIT_S - 5
    return ended


def check_ended(ended: list[Ended], directory: Path, text: str) -> None:
    said = [line for one in ended for line in one.err.splitlines() if line.startswith("kvzip:")]
    assert len(said) == 1, [one.err for one in ended]
    assert text in said[0]
    assert all(one.code != 0 for one in ended)
    assert not any(one.out for one in ended)
    assert not list(directory.glob("*.kvz")) and not list(directory.glob(".*")), list(directory.iterdir())


def at(
    rank: int, module: Any, name: str, do: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], None]:
    """A change: when this rank calls a function of a module, it does something before."""
    real = getattr(module, name)

    def spoiled(*given: Any, **options: Any) -> Any:
        do()
        return real(*given, **options)

    def change(own: int) -> None:
        if own == rank:
            monkeypatch.setattr(module, name, spoiled)

    return change


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error: Exception) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


def test_without_failures_a_file_is_written_and_said_once(model_dir: Path, tmp_path: Path) -> None:
    ended = run(model_dir, tmp_path, lambda rank: None)
    assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
    assert ended[0].out.count("pairs kept") == 1 and not ended[1].out
    model = kvzip.load(model_dir, device="cpu")
    cache = kvzip.load_cache(tmp_path / "made.kvz", model=model)
    assert cache.kept == int(0.3 * cache.total)
    assert f"{size(full_nbytes(cache) or 0)} -> {size(kvzip.nbytes(cache))}" in ended[0].out
    words = ["ask", str(tmp_path / "made.kvz"), "How many?", "When?", "-n", "4", "--json", "--device", "cpu"]
    ended = join(fork(2, left_alone, *words, directory=tmp_path), tmp_path)
    assert [(one.code, one.value) for one in ended] == [(0, True)] * 2, [one.err for one in ended]
    said = [one["answer"] for one in json.loads(ended[0].out)["answers"]]
    assert said == [x.text for x in kvzip.generate(model, cache, ["How many?", "When?"], max_tokens=4)]
    assert not ended[1].out


def test_an_evaluation_is_written_once_and_goes_on(model_dir: Path, tmp_path: Path) -> None:
    words = ["eval", "-m", str(model_dir), "--task", "kv@600", "--count", "1", "--questions", "2", "--max-tokens", "3"]
    words += ["--ratio", "0.5", "--method", "full", "kvzip-chunk", "--device", "cpu", "-o", str(tmp_path / "out.jsonl")]
    lines = []
    for _ in range(2):
        ended = join(fork(2, command, lambda rank: None, *words, directory=tmp_path), tmp_path)
        assert [one.code for one in ended] == [0, 0], [one.err for one in ended]
        lines.append((tmp_path / "out.jsonl").read_text().splitlines())
    kinds = [json.loads(line)["kind"] for line in lines[0]]
    assert sorted(kinds) == ["answer"] * 4 + ["question"] * 2 + ["run"]
    assert lines[1] == lines[0]
    snap = join(fork(2, command, lambda rank: None, *words, "--method", "snapkv", directory=tmp_path), tmp_path)
    assert "expected a model in one process for the baselines of evals" in snap[0].err + snap[1].err


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all(
    rank: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = at(rank, scoring, "run_repeats", kill, monkeypatch)

    def end_the_other(ids: list[int]) -> None:
        """As torchrun does when it sees that a rank is gone."""
        said, until = tmp_path / f"err-{1 - rank}", time.monotonic() + LIMIT_S
        while not said.exists() or "kvzip:" not in said.read_text(errors="replace"):
            if time.monotonic() > until:
                break  # `join` ends it, and the test fails
            time.sleep(0.02)
        os.kill(ids[1 - rank], signal.SIGTERM)

    ended = run(model_dir, tmp_path, change, started=end_the_other)
    assert ended[rank].code == -signal.SIGKILL
    check_ended(ended, tmp_path, launch.GONE)


def other_model(directory: Path, what: str) -> Path:
    """The model of `directory`, other in one thing, as an old copy on a second machine may be."""
    other = directory.parent / f"other {what}"
    shutil.copytree(directory, other, dirs_exist_ok=True)
    if what == "weights":
        stored = load_file(other / "model.safetensors")
        stored["model.layers.1.mlp.down_proj.weight"] *= 1.5
        save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
        return other
    file = other / ("tokenizer.json" if what == "tokenizer" else "config.json")
    told = json.loads(file.read_text())
    if what == "tokenizer":
        ids = told["model"]["vocab"]
        ids |= {"a": ids["b"], "b": ids["a"]}
    else:
        told["rope_theta"] = 20_000.0
    file.write_text(json.dumps(told))
    return other


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer"])
def test_ranks_with_different_models_are_refused(
    what: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = other_model(model_dir, what)

    def change(rank: int) -> None:
        if rank == 1:
            monkeypatch.setattr(loading, "resolve", lambda source: other)

    ended = run(model_dir, tmp_path, change)
    check_ended(ended, tmp_path, f"expected the same {what}")
    assert "on all ranks, got others on rank 1" in ended[0].err + ended[1].err


def test_a_rank_without_memory_says_so(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    ended = run(model_dir, tmp_path, at(1, scoring, "run_attention", fail(error), monkeypatch))
    check_ended(ended, tmp_path, "out of memory")


def test_a_full_disk_leaves_no_file(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    calls: list[int] = []

    def third() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise error

    ended = run(model_dir, tmp_path, at(0, tensors, "_sums", third, monkeypatch))
    check_ended(ended, tmp_path, "No space left on device")


def test_a_rank_that_is_killed_while_a_file_is_written_leaves_none(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = run(model_dir, tmp_path, at(1, shared, "_sent", kill, monkeypatch))
    check_ended(ended, tmp_path, launch.GONE)


def test_ctrl_c_ends_all_with_one_message(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(rank: int) -> None:
        def slow(*given: Any, **options: Any) -> None:
            (tmp_path / f"at-{rank}").touch()
            time.sleep(30)

        monkeypatch.setattr(scoring, "run_repeats", slow)

    def interrupt(ids: list[int]) -> None:
        while len(list(tmp_path.glob("at-*"))) < 2:
            time.sleep(0.05)
        for child in ids:
            os.kill(child, signal.SIGINT)

    ended = run(model_dir, tmp_path, change, started=interrupt)
    assert {one.code for one in ended} == {130}
    check_ended(ended, tmp_path, "was not written: run it again")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_ranks_have_joined_ends_all_with_one_message(
    number: signal.Signals, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As while torch is imported, or one rank waits for another that was killed."""

    def change(rank: int) -> None:
        def slow(*given: Any) -> None:
            (tmp_path / f"at-{rank}").touch()
            if rank == 1 and number == signal.SIGTERM:
                kill()
            time.sleep(30)

        monkeypatch.setattr(launch, "local_device", slow)

    def tell(ids: list[int]) -> None:
        until = time.monotonic() + LIMIT_S
        while len(list(tmp_path.glob("at-*"))) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        for child in ids if number == signal.SIGINT else ids[:1]:
            os.kill(child, number)

    ended = run(model_dir, tmp_path, change, started=tell)
    assert ended[0].code == 128 + number
    check_ended(
        ended, tmp_path, "interrupted" if number == signal.SIGINT else "another rank ended, or torchrun was told"
    )


def test_more_ranks_than_gpus_are_refused_by_the_first(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though only the second has no GPU: what it says is not seen."""

    def change(rank: int) -> None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    (tmp_path / "doc.txt").write_text(TEXT, encoding="utf-8")
    words = ["compress", str(tmp_path / "doc.txt"), "-m", str(model_dir), "-o", str(tmp_path / "made.kvz")]
    ended = join(fork(2, command, change, *words, directory=tmp_path), tmp_path, timeout_s=LIMIT_S)
    check_ended(ended, tmp_path, "got cuda and 1 GPUs for 2 ranks on this machine")


def test_a_rank_that_does_not_listen_is_ended_too(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a GPU whose peer is gone: no signal reaches its main thread."""

    def change(rank: int) -> None:
        launch.GRACE_S = 0.5

        def deaf(*given: Any, **options: Any) -> None:
            while True:
                try:
                    time.sleep(60)
                except KeyboardInterrupt:
                    continue

        own = at(0, scoring, "run_repeats", fail(ValueError("expected more")), monkeypatch)
        own(rank)
        if rank:
            monkeypatch.setattr(scoring, "run_repeats", deaf)

    ended = run(model_dir, tmp_path, lambda rank: change(rank))
    check_ended(ended, tmp_path, "expected more")


def test_commands_of_one_process_are_refused_by_name(tmp_path: Path) -> None:
    ended = join(fork(2, command, lambda rank: None, "info", "x.kvz", directory=tmp_path), tmp_path)
    assert [one.code for one in ended] == [2, 2]
    assert "expected one process for `kvzip info`, got 2" in ended[0].err and not ended[1].err
