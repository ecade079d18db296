"""Timing of servers: what readers in another process are given and see, and the scripts that write it down."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")

import random_model
from benchmarks import serving as benchmark
from kvzip.cli import main
from kvzip.server.load import pace_over_http
from unchecked import unchecked


def test_readers_in_another_process_get_whole_answers(server):
    found = pace_over_http(server.url, ["tiny:light", "tiny:whale", "tiny:light"], "Of what?", tokens=6)
    assert found.answers == 3 and 0 < found.first_s <= found.slowest_first_s and found.tokens_per_s > 0
    with pytest.raises(RuntimeError, match="404 Not Found"):
        pace_over_http(server.url, ["tiny:dark"], "Of what?", tokens=6)


@unchecked()
def test_bench_serve_times_each_load(tmp_path):
    from click.testing import CliRunner

    from test_cli import write_model

    model = str(write_model(tmp_path / "tiny"))
    how = ["bench", "serve", "-m", model, "--device", "cpu", "--tokens", "150", "-n", "5"]
    told = CliRunner().invoke(main, [*how, "--at", "1x1", "--at", "2x3", "--bits", "8,4", "--http", "--json"])
    assert told.exit_code == 0, told.output
    rows = json.loads(told.stdout)["rows"]
    assert [(row["documents"], row["readers"], row["answers"]) for row in rows] == [(1, 1, 1), (2, 3, 6)]
    assert all(row["tokens_per_s"] > 0 and row["http"]["answers"] == row["answers"] for row in rows)
    for wrong, named in (("0x1", "documents and readers of each"), ("4", "documents and readers of each")):
        refused = CliRunner().invoke(main, [*how, "--at", wrong])
        assert refused.exit_code == 2 and named in refused.stderr
    assert CliRunner().invoke(main, [*how[:3], str(tmp_path / "none")]).exit_code == 1


@unchecked()
def test_the_benchmark_of_serving_runs_at_sizes_of_a_toy():
    sizes = replace(benchmark.TINY, loads=((1, 1), (2, 2)), tail=12, lives=(10, 2), forms=((0.3, None), (1.0, None)))
    model = replace(random_model.make(random_model.config()), stop_ids=())
    lines: dict[str, list] = {part: [] for part in benchmark.PARTS}
    for name, case in benchmark.cases(sizes).items():
        lines[name.partition(" ")[0]] += case(model)
    assert lines["check"][0]["answers"] == 12
    assert [line["bits"] for line in lines["capacity"]] == [16, 8, 4]
    assert [(line["ratio"], line["documents"]) for line in lines["grid"]] == [(0.3, 1), (0.3, 2), (1.0, 1), (1.0, 2)]
    assert [line["from"] for line in lines["first"]] == ["device", "disk", "text"]
    assert [line.get("by", line.get("from")) for line in lines["long"]] == ["engine", "device", "disk", "text"]
    assert len(lines["http"]) == 2 and all(line["share"] > 0 for line in lines["http"])
    assert [line["tail_tokens"] for line in lines["life"]] == [0] * 10


def test_the_benchmark_goes_on_where_it_stopped(tmp_path, monkeypatch):
    results = tmp_path / "results.jsonl"
    monkeypatch.setattr(benchmark, "cases", lambda sizes: {n: lambda model, n=n: iter([{"n": n}]) for n in "ab"})
    monkeypatch.setattr(benchmark, "PARTS", ("a", "b"))

    def run(*options):
        monkeypatch.setattr("sys.argv", ["serving.py", "--tiny", "--commit", "c", "--results", str(results), *options])
        benchmark.main()

    with pytest.raises(SystemExit, match="75"):
        run("--only", "a", "b", "--limit", "-1")
    run("--only", "a")
    run("--only", "a", "b")
    assert [json.loads(line)["case"] for line in results.read_text().splitlines()] == ["a", "b"]
    run("--only", "a", "--commit", "d")
    assert len(results.read_text().splitlines()) == 3


def test_a_dead_address_is_said():
    with pytest.raises(RuntimeError, match=r"expected answers of http://127\.0\.0\.1:9, got none"):
        pace_over_http("http://127.0.0.1:9", ["tiny"], "Of what?", tokens=4)
