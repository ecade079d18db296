"""vLLM with documents: the same tokens as kvzip's own decoder, in one continuous batch."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvzip
from kvzip.inputs import query_ids
from kvzip.vllm.documents import salted
from vllm_engines import TOKENS, ask, block_size, call, expected, sampling, tokens

QUESTIONS = ("What is a7?", "And which numbers are squares?")


def test_two_documents_and_a_plain_request_in_one_batch(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    asked = [(n, ids) for n, cache in caches.items() for ids in query_ids(model, cache, list(QUESTIONS), template=True)]
    plain = model.tokenizer.text.encode("plain text").ids
    names: list[str | None] = [n for n, _ in asked]
    found = tokens(ask(engine, [*(ids for _, ids in asked), plain], [*names, None]))
    wanted = [expected(model, caches[n], ids) for n, ids in asked]
    assert found[:-1] == wanted
    assert len({tuple(x) for x in wanted}) == 4
    empty = kvzip.prefill(model, torch.tensor(plain[:1]), template=False)
    assert found[-1] == expected(model, empty, plain[1:])


def test_pages_are_shared_within_a_document_and_never_between_two(
    engine: Any, model: Any, caches: dict[str, Any]
) -> None:
    question = query_ids(
        model, caches["a"], ["Which of the numbers above is the largest one, and why?"], template=True
    )[0]
    wanted = {name: expected(model, cache, question) for name, cache in caches.items()}
    assert wanted["a"] != wanted["b"]
    first = ask(engine, [question], ["a"])
    other = ask(engine, [question], ["b"])
    again = ask(engine, [question] * 3, ["a", "b", None])
    assert tokens(first) == [wanted["a"]] and tokens(other) == [wanted["b"]]
    assert tokens(again)[:2] == [wanted["a"], wanted["b"]] and tokens(again)[2] not in wanted.values()
    assert [x.num_cached_tokens for x in (*first, *other)] == [0, 0]
    size = block_size(engine)
    assert len(question) > 2 * size
    assert [x.num_cached_tokens for x in again] == [len(question) // size * size] * 2 + [0]


def test_pages_hold_questions_and_answers_only(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    assert min(cache.context_length for cache in caches.values()) > engine.model_config.max_model_len
    question = query_ids(model, caches["b"], ["How long is it?"], template=True)[0]
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    free, used = pool.get_num_free_blocks(), []
    engine.llm_engine.add_request("r", {"prompt_token_ids": question}, sampling(3, "b"))
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
        used.append(free - pool.get_num_free_blocks())
    assert max(used) == -(-(len(question) + 2) // block_size(engine))
    assert pool.get_num_free_blocks() == free


def test_documents_come_and_go_while_requests_run(engine: Any, model: Any, caches: dict[str, Any], files: Any) -> None:
    (files / "c.kvz").write_bytes((files / "a.kvz").read_bytes())
    assert call(engine, "kvzip_load", "c", "c.kvz")["answer"]["kept"] == caches["a"].kept
    question = query_ids(model, caches["a"], ["Is it so?"], template=True)[0]
    engine.llm_engine.add_request("c", {"prompt_token_ids": question}, sampling(TOKENS, "c"))
    engine.llm_engine.step()
    assert call(engine, "kvzip_drop", "c")["answer"]["requests"] == 1
    assert [x["name"] for x in call(engine, "kvzip_list")["answer"]] == ["a", "b"]
    outputs = []
    while engine.llm_engine.has_unfinished_requests():
        outputs += engine.llm_engine.step()
    assert list(outputs[-1].outputs[0].token_ids) == expected(model, caches["a"], question)
    documents = engine.llm_engine.engine_core.engine_core.scheduler.documents
    assert sum(x is not None for x in documents.table.layers) == 2
    assert call(engine, "kvzip_drop", "c") == {"status": 404, "answer": "no document 'c'"}
    assert call(engine, "kvzip_load", "d", "../d.kvz")["status"] == 403
    assert call(engine, "kvzip_load", "d", "d.kvz")["status"] == 404
    assert "a name that is not in use" in call(engine, "kvzip_load", "a", "a.kvz")["answer"]


def test_an_unknown_document_ends_its_request_and_no_other(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    question = query_ids(model, caches["a"], ["Who?"], template=True)[0]
    outputs = ask(engine, [question, question], ["missing", "a"])
    assert outputs[0].outputs[0].finish_reason == "error" and not outputs[0].outputs[0].token_ids
    assert tokens(outputs)[1] == expected(model, caches["a"], question)


def test_an_unknown_document_alone_ends_too(engine: Any) -> None:
    (output,) = ask(engine, [[1, 2, 3]], ["missing"])
    assert output.outputs[0].finish_reason == "error" and not engine.llm_engine.has_unfinished_requests()


def test_no_salt_of_a_client_reaches_the_pages_of_a_document(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    question = query_ids(model, caches["a"], ["Which of the sums that you saw is odd, and is it?"], template=True)[0]
    documents = engine.llm_engine.engine_core.engine_core.scheduler.documents
    salt = salted(documents.hold("other", "a").key, None)
    documents.release("other")

    def cached(name: str | None, **given: str) -> int:
        prompt = {"prompt_token_ids": question, **given}
        return engine.generate([prompt], sampling(2, name), use_tqdm=False)[0].num_cached_tokens

    assert cached("a") == 0 and cached("a") > 0
    assert cached(None, cache_salt=salt) == 0 and cached(None, cache_salt=salt) > 0
    assert cached("a", cache_salt="mine") == 0 and cached("a", cache_salt="mine") > 0


def test_a_question_longer_than_a_step_is_read_in_parts(engine: Any, model: Any, caches: dict[str, Any]) -> None:
    asked = [(name, query_ids(model, caches[name], [f"{n} " + "why " * 15], template=True)[0])
             for n in range(5) for name in caches]  # fmt: skip
    assert sum(len(ids) for _, ids in asked) > 2 * 256
    found = tokens(ask(engine, [ids for _, ids in asked], [name for name, _ in asked]))
    assert found == [expected(model, caches[name], ids) for name, ids in asked]


def test_tokens_that_pad_a_graph_have_no_document() -> None:
    from kvzip.vllm.state import DocumentState

    state: Any = object.__new__(DocumentState)
    state._counts = torch.arange(8, dtype=torch.int32)
    state._of_request = torch.tensor([[-1, 3, 5], [0, 70, 90]], dtype=torch.int32)
    state._rows, state._positions = torch.zeros((3, 8), dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    batch = SimpleNamespace(
        num_tokens_after_padding=7, num_tokens=5, num_reqs=2, idx_mapping=torch.tensor([2, 1], dtype=torch.int32),
        query_start_loc=torch.tensor([0, 4, 5, 5, 5], dtype=torch.int32),
        positions=torch.tensor([6, 7, 8, 9, 2, 60, 61]),
    )  # fmt: skip
    state._fill(batch)
    assert state._rows[0, :7].tolist() == [5, 5, 5, 5, 3, -1, -1]
    assert state._rows[1, :5].tolist() == [0, 0, 0, 0, 1]
    assert state._rows[2, :5].tolist() == [7, 8, 9, 10, 3]
    assert state._positions[:7].tolist() == [96, 97, 98, 99, 72, 0, 0]  # what an earlier step left there is not read
    assert state._rows[2, 5:7].tolist() == [1, 1]


def test_graphs_of_whole_steps_are_captured_with_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the captured step reads one or not: later steps replay it. Other steps without documents are vLLM's."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    from kvzip.vllm.state import DocumentState

    told = {"layer": SimpleNamespace(num_actual_tokens=2)}
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda *args, **options: told)
    state: Any = object.__new__(DocumentState)
    state._fill, state.documents = lambda batch: None, SimpleNamespace(table="table")
    state._positions = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    state._rows = torch.zeros((3, 4), dtype=torch.int32)
    batch = SimpleNamespace(num_reqs=2, idx_mapping_np=torch.tensor([1, 0]).numpy())

    def documents(mode: Any, place: int, **options: Any) -> bool:
        state._host = torch.tensor([[-1, place], [0, 7]]).numpy()
        return state.prepare_attn(batch, mode, **options)["layer"].kvzip is not None

    assert documents(CUDAGraphMode.NONE, -1, for_capture=True)
    assert documents(CUDAGraphMode.FULL, -1)
    assert documents(CUDAGraphMode.PIECEWISE, 3) and documents(CUDAGraphMode.NONE, 3)
    assert not documents(CUDAGraphMode.PIECEWISE, -1) and not documents(CUDAGraphMode.NONE, -1)
