"""Documents that are posted: compressed between answers, found again after any end of the server, never a path."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvzip
import random_model
from unchecked import unchecked

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx2 as httpx
import openai
from servers import TEXTS, serving

from kvzip.cache import read_header
from kvzip.server import library, work

PLAIN = {"messages": [{"role": "user", "content": "Of what?"}], "max_tokens": 8, "temperature": 0}


def browser(running):
    return httpx.Client(base_url=running.url, timeout=60)


def canary(name):
    return f"The word of {name} is {name * 3}. " * 12


@pytest.fixture(scope="module")
def model():
    return replace(random_model.make(random_model.config()), stop_ids=())


@pytest.fixture
def web(model, tmp_path):
    """A server of its own and a client."""
    with unchecked(), serving(model, tmp_path / "posted", [], largest=100_000) as running, browser(running) as client:
        yield running, client


def ready(client, name, seconds=60):
    until = time.monotonic() + seconds
    while (found := client.get(f"/v1/documents/{name}").json())["status"] not in ("ready", "failed"):
        assert time.monotonic() < until, found
        time.sleep(0.02)
    return found


def say(client, name, model="tiny"):
    answer = client.post("/v1/chat/completions", json={"model": model, "document": name, **PLAIN})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def directly(model, text, bits=None, ratio=0.3, refit=False):
    """The answer from a document compressed as the server does it."""
    part = work.SEGMENT[0]
    if bits is None:
        share = "segment" if refit else "running"
        cache = kvzip.prefill_compressed(model, text, ratio, segment=part, chunk=part // 2, share=share, refit=refit)
    else:
        dense = kvzip.score(model, kvzip.prefill(model, text, chunk=part), chunk=part // 2)
        cache = kvzip.compress(dense, ratio, bits=bits)
        cache = kvzip.refit(model, dense, cache, chunk=part // 2) if refit else cache
    return kvzip.generate(model, cache, "Of what?", max_tokens=8).text


def test_a_posted_document_is_compressed_and_asked(web, model):
    running, client = web
    posted = client.post("/v1/documents", json={"text": TEXTS["light"], "title": "Light", "ratio": 0.5})
    assert posted.status_code == 202 and posted.json()["status"] in ("queued", "compressing")
    name = posted.json()["id"]
    found = ready(client, name)
    assert found["status"] == "ready" and found["title"] == "Light" and found["progress"] == 1.0
    assert found["tokens"] > len(TEXTS["light"]) and found["bytes"] > 0
    assert say(client, name) == directly(model, TEXTS["light"], ratio=0.5)
    other = client.post(
        "/v1/documents?bits=8,4&ratio=0.4&title=Whale",
        content=TEXTS["whale"].encode(),
        headers={"content-type": "text/plain; charset=utf-8"},
    ).json()["id"]
    assert ready(client, other)["title"] == "Whale"
    assert say(client, other) == directly(model, TEXTS["whale"], bits=(8, 4), ratio=0.4)
    assert [x["id"] for x in client.get("/v1/documents").json()["data"]] == [name, other]
    assert {x["id"] for x in client.get("/v1/models").json()["data"]} == {"tiny", f"tiny:{name}", f"tiny:{other}"}
    assert read_header(running.service.library._directory / f"{name}.kvz")["note"]["title"] == "Light"
    assert client.delete(f"/v1/documents/{name}").json()["deleted"] is True
    assert client.get(f"/v1/documents/{name}").status_code == 404
    assert client.post("/v1/chat/completions", json={"model": f"tiny:{name}", **PLAIN}).status_code == 404
    assert {path.name for path in running.service.library._directory.iterdir()} == {".lock", f"{other}.kvz"}


@pytest.mark.parametrize("bits", [None, (4, 2)])
def test_a_document_is_fitted_if_that_is_asked(web, model, bits):
    running, client = web
    asked = {"text": TEXTS["light"], "ratio": 0.2, "bits": bits, "refit": True}
    name = client.post("/v1/documents", json=asked).json()["id"]
    assert ready(client, name)["status"] == "ready"
    assert kvzip.load_cache(running.service.library._directory / f"{name}.kvz").method.endswith("refit")
    assert say(client, name) == directly(model, TEXTS["light"], bits, 0.2, refit=True)


@pytest.mark.parametrize("title", ["../../etc/passwd", "/tmp/x", "a\0b", "..", "CON", "x" * 300, "\ud83c\udf09 é"])
def test_titles_never_touch_paths(web, title):
    running, client = web
    before = set(running.service.library._directory.parent.rglob("*"))
    posted = client.post("/v1/documents", json={"text": "word " * 30, "title": title.encode(errors="replace").decode()})
    assert posted.status_code == 202
    found = ready(client, posted.json()["id"])
    assert found["status"] == "ready"
    new = set(running.service.library._directory.parent.rglob("*")) - before
    assert {path.name for path in new} <= {f"{posted.json()['id']}.kvz"}


@pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "a%00b", "x" * 5000, "doc-.kvz"])
def test_ids_that_are_none_are_not_found(web, name):
    _, client = web
    for method in ("GET", "DELETE"):
        assert client.request(method, f"/v1/documents/{name}").status_code == 404


def test_bad_documents_are_refused_and_one_that_fails_says_why(web, model):
    _, client = web
    for body in (
        {},
        {"text": ""},
        {"text": "x", "ratio": 0},
        {"text": "x", "ratio": 2},
        {"text": "x", "bits": 3},
        {"text": "x", "bits": [4, 3]},
        {"text": " \n\t"},
        {"text": "a\0b"},
        {"text": "\n%PDF-1.4 junk"},
        [1],
    ):
        refused = client.post("/v1/documents", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/documents", content=b"\xff\xfe", headers={"content-type": "text/plain"}).status_code == 400
    assert client.post("/v1/documents", content=b"x", headers={"content-type": "image/png"}).status_code == 400
    for content, query, told in (
        (b"  \n", "", "got blanks alone"),
        (b"a\0b", "", "send the text of it"),
        (b"%PDF-1.4 junk", "", "send the text of it"),
        (b"one two", "?text=three", "the text in the body, got 'text'"),
        (b"one two", "?ratio=0.3&ratio=0.4", "each once"),
        (b"one two", "?ratoi=0.3", "ratoi"),
    ):
        refused = client.post(f"/v1/documents{query}", content=content, headers={"content-type": "text/plain"})
        assert refused.status_code == 400 and told in refused.json()["error"]["message"]
    for path in ("/v1/documents", "/v1/chat/completions"):
        for body in (b'{"text":' + b"[" * 5_000, b'{"text":' + b"9" * 5_000, b"{", b'{"a'):
            refused = client.post(path, content=body, headers={"content-type": "application/json"})
            assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"
    assert client.post("/v1/documents", json={"text": "x" * 100_000}).status_code == 413
    chunked = client.post("/v1/documents", content=iter([b"x" * 60_000] * 3), headers={"content-type": "text/plain"})
    assert chunked.status_code == 413
    long = client.post("/v1/documents", json={"text": "word " * 2_000}).json()["id"]
    found = ready(client, long)
    assert found["status"] == "failed" and "4096 positions" in found["error"]
    failed = client.post("/v1/chat/completions", json={"model": f"tiny:{long}", **PLAIN})
    assert failed.status_code == 409 and "4096 positions" in failed.json()["error"]["message"]
    fine = client.post("/v1/documents", json={"text": TEXTS["times"]}).json()["id"]
    assert ready(client, fine)["status"] == "ready"
    assert client.delete(f"/v1/documents/{long}").status_code == 200


def test_a_full_disk_fails_a_document_and_not_those_that_follow(web, monkeypatch):
    _, client = web

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(library, "save", full)
        name = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
        patch.setattr(library, "whole_file", full)
        assert "No space left" in ready(client, name)["error"]
        refused = client.post("/v1/documents", json={"text": TEXTS["light"]})
        assert refused.status_code == 507 and "No space left" in refused.json()["error"]["message"]
    other = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
    assert ready(client, other)["status"] == "ready"
    assert len(client.get("/v1/documents").json()["data"]) == 2


def test_a_document_that_is_deleted_as_it_fails_stays_gone(model, tmp_path, monkeypatch):
    real = library.whole_file
    with unchecked(), serving(model, tmp_path, []) as running, browser(running) as client:

        @contextmanager
        def then_deleted(path, **options):
            if running.service.library.delete(path.stem):  # not while it is posted
                gone.set()
            with real(path, **options) as written:
                yield written

        gone = threading.Event()
        monkeypatch.setattr(library, "whole_file", then_deleted)
        client.post("/v1/documents", json={"text": "word " * 2_000})
        assert gone.wait(20)
        other = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
        ready(client, other)  # the worker has done with the first
        assert {path.stem for path in tmp_path.glob("doc-*")} == {other}


def test_a_long_queue_takes_no_more(web, monkeypatch):
    running, client = web
    monkeypatch.setattr(library, "MOST_WAITING", 1)
    monkeypatch.setattr(running.service.library, "_next", lambda: None)  # nothing is compressed
    assert client.post("/v1/documents", json={"text": "one"}).status_code == 202
    refused = client.post("/v1/documents", json={"text": "two"})
    assert refused.status_code == 429 and "post it later" in refused.json()["error"]["message"]
    assert len(client.get("/v1/documents").json()["data"]) == 1


def test_answers_go_on_while_a_document_is_compressed(web, model, monkeypatch):
    """The document's parts wait until another answer came, so that neither is done without the other."""
    running, client = web
    monkeypatch.setattr(work, "SEGMENT", (10, 10))
    first = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
    ready(client, first)
    answers, turns = threading.Semaphore(0), running.service.engine._loop.turns
    take = turns._take_part
    monkeypatch.setattr(turns, "_take_part", lambda: (answers.acquire(timeout=20), take())[1])
    second = client.post("/v1/documents", json={"text": TEXTS["whale"]}).json()["id"]
    answered, seen = 0, set()
    while (found := client.get(f"/v1/documents/{second}").json())["status"] in ("queued", "compressing"):
        seen.add(found["progress"])
        say(client, first)
        answered += 1
        answers.release()
    assert found["status"] == "ready" and answered >= 3 and len(seen) >= 2
    assert running.service.engine.facts["running"] == 0


def test_a_document_may_be_deleted_while_it_is_compressed(web, monkeypatch):
    running, client = web
    monkeypatch.setattr(work, "SEGMENT", (2, 2))
    name = client.post("/v1/documents", json={"text": TEXTS["whale"] * 4}).json()["id"]
    while client.get(f"/v1/documents/{name}").json()["progress"] == 0:
        time.sleep(0.005)
    assert client.delete(f"/v1/documents/{name}").status_code == 200
    monkeypatch.setattr(work, "SEGMENT", (1000, 1000))
    other = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
    assert ready(client, other)["status"] == "ready"
    assert {path.name for path in running.service.library._directory.iterdir()} == {".lock", f"{other}.kvz"}


def test_and_while_it_is_saved(web, monkeypatch):
    running, client = web
    save = library.save

    def saved_too_late(cache, path, **options):
        assert client.delete(f"/v1/documents/{path.stem}").status_code == 200
        save(cache, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(library, "save", saved_too_late)
        name = client.post("/v1/documents", json={"text": TEXTS["whale"]}).json()["id"]
        while client.get(f"/v1/documents/{name}").status_code != 404:
            time.sleep(0.005)
    other = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
    assert ready(client, other)["status"] == "ready"
    assert {path.name for path in running.service.library._directory.iterdir()} == {".lock", f"{other}.kvz"}
    assert len(running.service.engine.contexts) == 1


def test_a_key_is_asked_for_and_strange_pages_are_not_answered(model, tmp_path):
    with unchecked(), serving(model, tmp_path, [], key="secret", hosts=("127.0.0.1",)) as running:
        with browser(running) as client:
            assert client.get("/health").status_code == 200
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert client.get(path).status_code == 401
                assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
                assert client.get(path, headers={"authorization": "Bearer secret"}).status_code == 200
            own = {"authorization": "Bearer secret"}
            assert client.get("/v1/models", headers={**own, "host": "evil.example:80"}).status_code == 403
            assert client.get("/v1/models", headers={**own, "origin": "http://evil.example"}).status_code == 403
            assert client.get("/v1/models", headers={**own, "origin": running.url}).status_code == 200
        with (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_metrics_count_what_happened(web):
    _, client = web
    name = client.post("/v1/documents", json={"text": TEXTS["light"]}).json()["id"]
    ready(client, name)
    say(client, name)
    text = client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert lines['kvzip_requests_total{outcome="length"}'] == "1"
    assert lines["kvzip_answer_tokens_total"] == "8" and lines["kvzip_first_token_seconds_count"] == "1"
    assert lines["kvzip_token_seconds_count"] == "7" and float(lines["kvzip_token_seconds_sum"]) > 0
    assert lines['kvzip_documents{status="ready"}'] == "1"
    assert all(line.startswith(("# HELP kvzip_", "# TYPE kvzip_", "kvzip_")) for line in text.splitlines())


def test_a_server_finds_its_documents_and_what_it_had_not_done(model, tmp_path):
    with unchecked():
        with serving(model, tmp_path, []) as running, browser(running) as client:
            names = [client.post("/v1/documents", json={"text": canary(word)}).json()["id"] for word in ("oak", "elm")]
            ready(client, names[0])
            with pytest.raises(ValueError, match="which another server has"):
                library.Library(running.service.engine, tmp_path)
        (tmp_path / "strange.kvz").write_bytes(b"no file of ours")
        (tmp_path / "strange.json").write_text("{")
        with serving(model, tmp_path, []) as running, browser(running) as client:
            assert [ready(client, name)["status"] for name in names] == ["ready", "ready"]
            assert [say(client, name) for name in names] == [directly(model, canary(word)) for word in ("oak", "elm")]
            assert len(client.get("/v1/documents").json()["data"]) == 2
            assert library.WAITS not in {path.suffix for path in tmp_path.iterdir() if path.stem in names}


def test_files_that_nobody_posted_are_left_as_they_are(model, tmp_path):
    """Another program's answers and caches lie in the directory, and what looks like a document that waits."""
    cache = kvzip.compress(kvzip.score(model, kvzip.prefill(model, TEXTS["light"])), 0.5)
    kvzip.save(cache, tmp_path / "mine.kvz", model=model)
    (tmp_path / "log.json").write_text('{"id": "chatcmpl-1", "created": 1700000000, "choices": [{"data": "mine"}]}')
    (tmp_path / f"doc-{'0' * 16}.json").write_text('{"created": 1, "title": ["x"], "text": "hello"}')
    (tmp_path / f"doc-{'1' * 16}.json").write_text('{"created": 1, "text": 5}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with unchecked(), serving(model, tmp_path, []) as running, browser(running) as client:
        assert {x["id"] for x in client.get("/v1/documents").json()["data"]} == {"mine", f"doc-{'1' * 16}"}
        assert ready(client, f"doc-{'1' * 16}")["status"] == "failed"
        assert client.delete("/v1/documents/mine").status_code == 200
        assert client.get("/v1/documents/mine").status_code == 404
    del before[f"doc-{'1' * 16}.json"]
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def test_a_client_that_hangs_up_while_it_posts_is_no_error_of_the_server(model, tmp_path, caplog):
    with unchecked(), serving(model, tmp_path, []) as running, browser(running) as client:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as talk:
            head = "POST /v1/documents HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            talk.sendall(f"{head}Content-Length: 1000\r\n\r\n".encode() + b'{"a')
        assert client.get("/v1/documents").json()["data"] == []
    assert not [record for record in caplog.records if record.exc_info]


def started(directory, port_file):
    """`kvzip serve` as a process of its own, and its address."""
    command = [sys.executable, "-m", "kvzip", "serve", str(directory / "tiny"), "--port", "0", "--device", "cpu"]
    command += ["--dtype", "float32", "--documents", str(directory / "posted")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(kvzip.__file__).parents[1]), *sys.path])}
    with port_file.open("wb") as said:
        process = subprocess.Popen(command, stderr=said, stdout=subprocess.DEVNULL, env=environment)
    until = time.monotonic() + 60
    while "listening on" not in (told := port_file.read_text()):
        assert process.poll() is None and time.monotonic() < until, told
        time.sleep(0.05)
    return process, told.split("listening on ")[1].split("/v1")[0]


def test_nothing_is_lost_or_mixed_when_the_server_is_killed(tmp_path):
    from test_cli import write_model

    write_model(tmp_path / "tiny")
    words = ("oak", "elm", "ash")
    process, url = started(tmp_path, tmp_path / "first")
    with httpx.Client(base_url=url, timeout=60) as client:
        names = [client.post("/v1/documents", json={"text": canary(word)}).json()["id"] for word in words]
        process.send_signal(signal.SIGKILL)
        process.wait()
    process, url = started(tmp_path, tmp_path / "second")
    try:
        with unchecked(), httpx.Client(base_url=url, timeout=60) as client:
            assert [ready(client, name)["status"] for name in names] == ["ready"] * 3
            model = kvzip.load(tmp_path / "tiny", device="cpu", dtype=torch.float32)
            assert [say(client, name) for name in names] == [directly(model, canary(word)) for word in words]
        assert [
            path for path in (tmp_path / "posted").iterdir() if path.suffix != ".kvz" and path.name != ".lock"
        ] == []
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        (["--host", "0.0.0.0"], 2, "set KVZIP_API_KEY, or pass --no-key"),
        (["--host", "::"], 2, "set KVZIP_API_KEY, or pass --no-key"),
        (["--host", "example.org"], 2, "set KVZIP_API_KEY, or pass --no-key"),
        (["--name", "a:b"], 2, "without a colon"),
        (["--memory", "nan"], 2, "finite number"),
        (["none.kvz"], 1, "expected a cache file, got no file none.kvz"),
        (
            ["--host", "203.0.113.9", "--no-key"],
            1,
            "expected an address of this machine with a free port, got 203.0.113.9",
        ),
        (["--documents", "/dev/null"], 1, "expected a directory for documents, or a place for one, got /dev/null"),
    ],
)
def test_the_command_refuses_what_it_should_not_serve(tmp_path, given, status, told):
    from click.testing import CliRunner

    from kvzip.cli import main
    from test_cli import write_model

    model = str(write_model(tmp_path / "tiny"))
    run = ["serve", model, "--device", "cpu", "--port", "0", "--documents", str(tmp_path / "posted"), *given]
    refused = CliRunner(env={"KVZIP_API_KEY": ""}).invoke(main, run)
    assert refused.exit_code == status and told in " ".join(refused.stderr.split())


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(tmp_path):
    from click.testing import CliRunner

    from kvzip.cli import main
    from test_cli import write_model

    model = write_model(tmp_path / "tiny")
    (model / "model.safetensors").unlink()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        refused = CliRunner().invoke(main, ["serve", str(model), "--port", port])
    assert refused.exit_code == 1 and f"a free port, got 127.0.0.1 and {port} (Address already" in refused.stderr


def test_the_schema_is_kept_whatever_is_sent(model, tmp_path):
    """Random requests by the schema: nothing answers 500, and every answer is as described."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    checks = [schemathesis.checks.not_a_server_error, response_schema_conformance, status_code_conformance]
    quick = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    answered = Counter()
    with unchecked(), serving(model, tmp_path, []) as running:
        schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
        for operation in schema.get_all_operations():
            cases = operation.ok().as_strategy()

            @quick
            @given(case=cases)
            def send(case):
                if isinstance(case.body, dict) and "messages" in case.body:  # of the model that is there, and short
                    case.body |= {"model": "tiny", "max_tokens": 3}
                answered[case.call_and_validate(checks=checks).status_code] += 1

            send()
        assert json.loads(httpx.get(f"{running.url}/health").text) == {"status": "ok"}
    assert {200, 202, 400, 404} <= set(answered), answered
