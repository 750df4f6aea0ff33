"""flash_attn.utils.generation: decoding against a model without a cache; the laws of sampling."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from flash_attn.modules.mha import MHA
from flash_attn.utils import _inference_cache, generation
from flash_attn.utils.generation import InferenceParams, decode, decode_speculative
from torch import nn

VOCABULARY, DIM = 30, 32


class Model(nn.Module, generation.GenerationMixin):
    """Two layers of attention over embeddings of tokens and positions."""

    def __init__(self, seed: int, own_cache: bool = True, **options) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(64, DIM)
        self.layers = nn.ModuleList(
            MHA(DIM, 2, causal=True, layer_idx=i, **options) for i in range(2)
        )
        self.head = nn.Linear(DIM, VOCABULARY)
        self.evaluated: list[int] = []
        self.eval()

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        caches = (x.allocate_inference_cache(batch_size, max_seqlen, dtype) for x in self.layers)
        return dict(enumerate(caches))

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        self.evaluated.append(input_ids.shape[1])
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = self.tokens(input_ids) + self.places(position_ids)
        for layer in self.layers:
            x = x + layer(x, inference_params=inference_params)
        return SimpleNamespace(logits=4 * self.head(x[:, -num_last_tokens:]))


MODELS = [{}, {"use_flash_attn": True, "rotary_emb_dim": 16}]
PROMPT = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def _greedy(model, ids, max_length):
    """Without a cache: (tokens, logits of each step)."""
    scores = []
    with torch.no_grad():
        while ids.shape[1] < max_length:
            scores.append(model(ids).logits[:, -1])
            ids = torch.cat([ids, scores[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, scores


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("options", MODELS, ids=str)
def test_greedy(options, cg):
    model = Model(0, **options)
    ids, scores = _greedy(model, PROMPT, 12)
    model.evaluated.clear()
    out = decode(PROMPT, model, 12, cg=cg)
    assert torch.equal(out.sequences, ids)
    torch.testing.assert_close(out.scores, tuple(scores), atol=1e-4, rtol=1e-4)
    assert model.evaluated == [4] + [1] * 7, "the cache is used"
    again = decode(PROMPT.flip(1), model, 10, cg=cg)
    assert torch.equal(again.sequences, _greedy(model, PROMPT.flip(1), 10)[0])


def test_graphs_on_a_cpu_are_said_once_to_be_none(caplog):
    _inference_cache._say_without_graphs.cache_clear()
    with caplog.at_level(logging.WARNING, logger="anyflash"):
        for seed in (0, 1):
            decode(PROMPT, Model(seed), 6, cg=True)
    messages = [r.getMessage() for r in caplog.records if "CUDA graphs" in r.getMessage()]
    assert len(messages) == 1 and "on cpu" in messages[0] and "cg=False" in messages[0]


def test_a_decoding_step_of_the_graph_cache():
    model = Model(0, use_flash_attn=True)
    cache = generation.update_graph_cache(model, None, 2, 4, 12, decoding_seqlens=(1, 2))
    assert sorted(cache.callables) == [(2, 1), (2, 2)]
    assert (cache.max_batch_size, cache.max_seqlen, cache.dtype) == (2, 12, torch.float32)
    assert generation.update_graph_cache(model, cache, 2, 4, 10) is cache
    params = cache.inference_params
    ids = torch.cat([PROMPT, PROMPT], dim=1)
    with torch.inference_mode():
        params.reset(12, 2)
        model(ids[:, :4], inference_params=params)
        got = cache.run(ids[:, 4:6], torch.tensor([[4, 5]] * 2), 4)
        torch.testing.assert_close(got, model(ids[:, :6]).logits[:, -2:], atol=1e-4, rtol=1e-4)
    caches = params.key_value_memory_dict
    generation.update_graph_cache(model, cache, 3, 4, 12)
    assert cache.inference_params.key_value_memory_dict[0].shape[0] == 3
    assert cache.inference_params.key_value_memory_dict is not caches


def test_a_cache_for_a_model_that_has_a_config_alone():
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(num_attention_heads=4, hidden_size=32, num_hidden_layers=3)
    cache = generation.update_graph_cache(
        model, None, 2, 1, 5, decoding_seqlens=(), tensor_parallel=2, dtype=torch.float16
    )
    caches = cache.inference_params.key_value_memory_dict
    assert [x.shape for x in caches.values()] == [(2, 5, 2, 2, 8)] * 3
    assert caches[0].dtype == torch.float16
    caches = generation.allocate_inference_cache(2, 5, 3, 8, [1, 4], "cpu", torch.float64)
    assert {i: x.shape for i, x in caches.items()} == dict.fromkeys((1, 4), (2, 5, 2, 3, 8))


def test_where_generation_ends():
    model = Model(0)
    ids, _ = _greedy(model, PROMPT[:1], 12)
    end = int(ids[0, 7])
    out = decode(PROMPT[:1], model, 12, eos_token_id=end)
    assert torch.equal(out.sequences, ids[:, : ids[0].tolist().index(end, 4) + 1])
    # Both have to draw it in one step.
    teacher = torch.full((2, 9), 7)
    teacher[0, 5] = teacher[1, 6] = teacher[0, 7] = teacher[1, 7] = 8
    out = decode(PROMPT, model, 12, eos_token_id=8, teacher_outputs=teacher)
    assert torch.equal(out.sequences, torch.cat([PROMPT, teacher[:, 4:8]], dim=1))
    assert len(out.scores) == 4
    with pytest.raises(ValueError, match="max_length: expected at least the 4 tokens"):
        decode(PROMPT, model, 3)


def test_tokens_behind_the_vocabulary_are_never_drawn():
    out = decode(PROMPT, Model(0), 30, top_k=0, temperature=50.0, vocab_size=5)
    assert int(out.sequences[:, 4:].max()) == 4 and out.scores[0].shape == (2, 5)


def test_generate():
    model = Model(0)
    ids, _ = _greedy(model, PROMPT, 9)
    assert torch.equal(model.generate(PROMPT, 9), ids)
    out = model.generate(PROMPT, 9, return_dict_in_generate=True)
    assert torch.equal(out.sequences, ids) and out.scores is None
    out = model.generate(PROMPT, 9, return_dict_in_generate=True, output_scores=True)
    assert len(out.scores) == 5
    with pytest.raises(NotImplementedError):
        generation.GenerationMixin().allocate_inference_cache(1, 1)


def test_the_time_is_printed(capsys):
    decode(PROMPT, Model(0), 6, enable_timing=True)
    assert capsys.readouterr().out.startswith("Generated in ")
    decode_speculative(PROMPT[:1], Model(0), Model(0), 10, enable_timing=True, debug=True)
    out = capsys.readouterr().out
    assert "called 2 times and kept 4 of 4 drafted tokens" in out
    differences = [float(x.split(": ")[1]) for x in out.splitlines() if x.startswith("Difference")]
    assert len(differences) == 2 and max(differences) < 1e-4


# ---- sampling ----


def test_top_k_and_top_p():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.05, 0.05, 0.7, 0.2]]).log()
    filtered = logits.clone()
    generation.modify_logits_for_top_k_filtering(filtered, 2)
    assert filtered.isfinite().tolist() == [[False, True, False, True], [False, False, True, True]]
    for top_p, expected in (
        (0.6, [[False, True, False, True], [False, False, True, False]]),
        (0.97, [[True, True, True, True], [True, True, True, True]]),
        (0.0, [[True] * 4] * 2),
        (1.0, [[True] * 4] * 2),
    ):
        filtered = logits.clone()
        generation.modify_logits_for_top_p_filtering(filtered, top_p)
        assert filtered.isfinite().tolist() == expected, top_p
        three = logits.expand(3, 2, 4).clone()
        generation.modify_logits_for_top_p_filtering(three, top_p)
        assert torch.equal(three, filtered.expand(3, 2, 4))


def _frequencies(tokens, size):
    return torch.bincount(tokens.flatten(), minlength=size) / tokens.numel()


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"top_k": 0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 0, "temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 0, "top_p": 0.85}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({}, [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_what_is_drawn(options, expected):
    torch.manual_seed(0)
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(20000, 4)
    tokens = generation.sample(logits, **options)
    torch.testing.assert_close(
        _frequencies(tokens, 4), torch.tensor(expected) * 1.0, atol=0.015, rtol=0
    )


def test_sampling_refuses():
    logits = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="top-p should be in .0, 1., .* got 1.5"):
        generation.sample(logits, top_k=2, top_p=1.5)
    with pytest.raises(ValueError, match="temperature: expected a positive number, got 0"):
        generation.sample(logits, top_k=2, temperature=0)
    with pytest.raises(ValueError, match=r"expected \(1, 3, 4\) and \(1, 2, 4\)"):
        generation.sample_speculative(
            torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
        )


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 2}, {"top_k": 0, "top_p": 0.85}], ids=str
)
def test_speculation_draws_what_the_model_would(options):
    """The first token is distributed as the model's own, whatever the draft."""
    torch.manual_seed(0)
    batch = 20000
    model = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    draft = torch.tensor([0.25, 0.35, 0.3, 0.1]).log()
    drafted = generation.sample(draft.expand(batch, 4), **options)[:, None].repeat(1, 2)
    tokens, count = generation.sample_speculative(
        model.expand(batch, 3, 4), draft.expand(batch, 2, 4), drafted, **options
    )
    assert tokens.shape == (batch, 3) and count.min() == 1 and count.max() == 3
    own = generation.sample(model.expand(batch, 4), **options)
    torch.testing.assert_close(
        _frequencies(tokens[:, 0], 4), _frequencies(own, 4), atol=0.02, rtol=0
    )
    # All but the last kept token are the draft's.
    place = torch.arange(2)
    assert torch.equal(torch.where(place < count[:, None] - 1, tokens[:, :2], drafted), drafted)


@pytest.mark.parametrize("cg", [False, True])
@pytest.mark.parametrize("options", MODELS, ids=str)
@pytest.mark.parametrize("draft_seed", [0, 5])
@pytest.mark.parametrize("max_length", [4, 5, 6, 7, 18])
def test_greedy_speculation_is_greedy(options, draft_seed, cg, max_length):
    model, draft = Model(0, **options), Model(draft_seed, **options)
    ids, scores = _greedy(model, PROMPT[:1], max(5, max_length))
    model.evaluated.clear()
    out = decode_speculative(PROMPT[:1], model, draft, max_length, cg=cg)
    assert torch.equal(out.sequences, ids)
    torch.testing.assert_close(out.scores, torch.stack(scores, dim=1), atol=1e-4, rtol=1e-4)
    if draft_seed == 0 and max_length == 18:
        assert len(model.evaluated) == 4, "a draft by the model itself is kept whole"


def test_speculation_refuses():
    model = Model(0)
    with pytest.raises(ValueError, match="only supports batch_size=1, got 2"):
        decode_speculative(PROMPT, model, Model(1), 8)
    with pytest.raises(ValueError, match="doesn't support eos_token_id, got 3"):
        decode_speculative(PROMPT[:1], model, Model(1), 8, eos_token_id=3)
    with pytest.raises(ValueError, match="model_draft: expected another object"):
        decode_speculative(PROMPT[:1], model, model, 8, cg=True)


# ---- what comes back ----


def test_inference_params():
    params = InferenceParams(8, 2, seqlen_offset=3, lengths_per_sample=torch.ones(2))
    params.reset(9, 4)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (9, 4, 0)
    assert params.lengths_per_sample.tolist() == [0.0, 0.0]
    assert (
        InferenceParams(8, 2).key_value_memory_dict
        is not InferenceParams(8, 2).key_value_memory_dict
    )


def _transformers(monkeypatch, **classes):
    """A program that has imported transformers."""
    theirs, part = ModuleType("transformers"), ModuleType("transformers.generation")
    theirs.generation = part
    vars(part).update(classes)
    monkeypatch.setitem(sys.modules, "transformers", theirs)
    monkeypatch.setitem(sys.modules, "transformers.generation", part)


def test_the_class_is_that_of_transformers_where_it_is_used(monkeypatch):
    class Theirs(SimpleNamespace):
        pass

    monkeypatch.setitem(sys.modules, "transformers", None)
    out = decode(PROMPT, Model(0), 6)
    sequences, scores = out
    assert sequences is out.sequences and scores is out.scores
    assert type(out) is generation.GreedySearchDecoderOnlyOutput
    _transformers(monkeypatch, GreedySearchDecoderOnlyOutput=Theirs)
    assert type(decode(PROMPT, Model(0), 6)) is Theirs
    assert type(decode(PROMPT, Model(0), 6, top_k=3)) is type(out)
    _transformers(monkeypatch, GenerateDecoderOnlyOutput=Theirs)  # since version 5
    assert generation.SampleDecoderOnlyOutput is Theirs
    assert type(decode_speculative(PROMPT[:1], Model(0), Model(1), 6)) is Theirs
    with pytest.raises(AttributeError, match="NoSuchName"):
        generation.NoSuchName  # noqa: B018
