"""The oracle is held to Transformers itself: what it computes where both can say the same thing.

Not by `assert_as_accurate`: Transformers rounds norms, rotations and softmax to float32, so gives no float64 truth.
"""

import pytest
import torch
from transformers import PreTrainedConfig

import plain_kvzip
import tiny_models

CONFIGS = {
    "llama": tiny_models.llama(),
    "qwen2": tiny_models.qwen2(),
    "qwen3": tiny_models.qwen3(),
    "gemma2": tiny_models.gemma2(),
    "gemma3": tiny_models.gemma3(),
}
PREFIX, POSTFIX = [5, 6, 7], [8, 9]


def encode(text: str) -> list[int]:
    return [3 + ord(letter) % 80 for letter in text[:11]]


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return request.param


def test_a_repeat_pass_equals_one_pass_over_prefix_context_and_repeat(config: PreTrainedConfig) -> None:
    model, context = tiny_models.build(config), tiny_models.token_ids(30).tolist()
    result = plain_kvzip.score(model, PREFIX, context, POSTFIX, encode, chunk=12)
    assert [len(r.token_ids) for r in result.repeats] == [11 + 2 + 12, 11 + 8 + 2 + 12, 11 + 8 + 2 + 6]
    for repeat, hidden in zip(result.repeats, result.hidden, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([PREFIX + context + repeat.token_ids]), use_cache=False).logits[0, 33:]
            cached = model.lm_head(hidden)
        softcap = getattr(config, "final_logit_softcapping", None)
        if softcap is not None:
            cached = softcap * torch.tanh(cached / softcap)
        assert (cached - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_scores_of_one_chunk_are_the_largest_of_the_attention_that_transformers_reports(
    config: PreTrainedConfig,
) -> None:
    model, context = tiny_models.build(config), tiny_models.token_ids(30).tolist()
    result = plain_kvzip.score(model, PREFIX, context, POSTFIX, encode, chunk=30)
    ids = torch.tensor([PREFIX + context + result.repeats[0].token_ids])
    with torch.no_grad():
        reported = model(ids, output_attentions=True, use_cache=False).attentions
    for values, layer in zip(result.values, result.layers, strict=True):
        from_repeat_to_context = reported[layer][0, :, 33:, 3:33].unflatten(0, (2, -1))  # [H, G, T, C]
        assert (values - from_repeat_to_context.amax(dim=(1, 2))).abs().max() <= 1e-5


def test_only_full_attention_layers_are_scored() -> None:
    model = tiny_models.build(tiny_models.gemma3())
    assert plain_kvzip.score(model, PREFIX, [10] * 9, POSTFIX, encode, chunk=4).layers == [2]


def test_keys_of_other_chunks_do_not_share_in_the_softmax() -> None:
    """In layer 0 keys depend on their own token only: there the first chunk's scores ignore a change in the second."""
    model = tiny_models.build(tiny_models.llama())
    context = tiny_models.token_ids(24).tolist()
    changed = context[:12] + tiny_models.token_ids(12, seed=5).tolist()
    before = plain_kvzip.score(model, PREFIX, context, POSTFIX, encode, chunk=12).values[0, :, :12]
    after = plain_kvzip.score(model, PREFIX, changed, POSTFIX, encode, chunk=12).values[0, :, :12]
    assert torch.equal(before, after)


def test_hint_is_the_end_of_the_previous_chunk_or_all_of_a_shorter_one() -> None:
    context = list(range(10, 20))
    first, second, *_ = plain_kvzip.repeats(context, POSTFIX, encode, chunk=4, hint=8)
    assert first.token_ids == encode(plain_kvzip.FIRST_PROMPT) + POSTFIX + [10, 11, 12, 13]
    assert second.token_ids == [*encode(plain_kvzip.LATER_PROMPT), 10, 11, 12, 13, *POSTFIX, 14, 15, 16, 17]


def test_select_keeps_the_first_of_equal_scores() -> None:
    scores = torch.tensor([0.5, 1.0, 0.5, 0.5, 0.0, 1.0]).view(1, 2, 3)
    assert plain_kvzip.select(scores, 0.5).flatten().tolist() == [True, True, False, False, False, True]
