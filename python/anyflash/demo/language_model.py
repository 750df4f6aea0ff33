"""A small character language model, trained twice from the same weights on the same batches.

Once with flash_attn_varlen_qkvpacked_func on packed sequences and anyflash.fused_mlp, once with
PyTorch's scaled_dot_product_attention on padded ones and a plain MLP. The loss curves lie on each
other.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import cast

import torch
import torch.nn.functional as F
from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import anyflash

CONTEXT = 128  # characters
TOKENS_PER_BATCH = 1024
PROMPTS = ("The ", "An exception ", "If a class ")
SEED = 7


@dataclasses.dataclass
class Trained:
    """Losses per step of both runs, and their seconds."""

    losses_ours: list[float]
    losses_plain: list[float]
    seconds_ours: float
    seconds_plain: float

    def figures(self) -> dict[str, float]:
        differences = [abs(a - b) for a, b in zip(self.losses_ours, self.losses_plain)]
        return {
            "loss_start": self.losses_ours[0],
            "loss_end": self.losses_ours[-1],
            "max_loss_difference": max(differences),
        }


class Block(nn.Module):
    """Pre-norm attention and MLP on packed tokens (total, width)."""

    def __init__(self, width: int, heads: int, flash: bool) -> None:
        super().__init__()
        self.heads, self.flash = heads, flash
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, lengths: list[int], cu_seqlens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        if self.flash:
            context = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max(lengths), causal=True)
        else:
            context = _padded_attention(qkv, lengths)
        x = x + self.proj(context.flatten(1))
        return x + self._mlp(self.norm2(x))

    def decode(self, x: Tensor, cache: tuple[Tensor, Tensor], seen: int) -> Tensor:
        """One more character, (1, width); the cache holds keys and values of those before it."""
        q, k, v = self.qkv(self.norm1(x)).view(1, 1, 3, self.heads, -1).unbind(2)
        context = flash_attn_with_kvcache(q, *cache, k, v, cache_seqlens=seen, causal=True)
        x = x + self.proj(context.flatten(1))
        return x + self._mlp(self.norm2(x))

    def _mlp(self, x: Tensor) -> Tensor:
        if self.flash:
            return anyflash.fused_mlp(
                x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
            )
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _padded_attention(qkv: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention the usual way: pad (on the right, so no mask), attend, take it off."""
    padded = pad_sequence(list(qkv.split(lengths)), batch_first=True)
    q, k, v = (t.transpose(1, 2) for t in padded.unbind(2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    return torch.cat([rows[:n] for rows, n in zip(out, lengths)])


class LanguageModel(nn.Module):
    """Characters in, logits of the next character out."""

    def __init__(
        self, characters: int, flash: bool, width: int = 128, heads: int = 4, layers: int = 3
    ) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.heads = heads
        self.blocks = nn.ModuleList(Block(width, heads, flash) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for table in (self.characters, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(n) for n in lengths])
        x = self.characters(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x, lengths, cu_seqlens)
        return self.head(self.norm(x))

    @torch.inference_mode()
    def write(self, prompt: Tensor, count: int, temperature: float = 0.6) -> list[int]:
        """Continues prompt by count characters, one at a time, with a key/value cache."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (1, CONTEXT, self.heads, self.head.in_features // self.heads)
        caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]
        tokens = prompt.tolist()
        for seen in range(min(len(tokens) + count, CONTEXT) - 1):
            x = self.characters(torch.tensor([tokens[seen]])) + self.positions.weight[seen]
            for block, cache in zip(self.blocks, caches):
                x = cast(Block, block).decode(x, cache, seen)
            if seen + 1 == len(tokens):
                chances = (self.head(self.norm(x))[0] / temperature).softmax(0)
                tokens.append(int(torch.multinomial(chances, 1, generator=generator)))
        return tokens


def batches(text: Tensor, steps: int) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Per step (input, next character, lengths) of sequences cut at random places."""
    generator = torch.Generator().manual_seed(SEED)
    result = []
    for _ in range(steps):
        lengths: list[int] = []
        while sum(lengths) < TOKENS_PER_BATCH - CONTEXT:
            lengths.append(int(torch.randint(32, CONTEXT + 1, (), generator=generator)))
        starts = torch.randint(0, len(text) - CONTEXT - 1, (len(lengths),), generator=generator)
        rows = [torch.arange(n) + start for n, start in zip(lengths, starts)]
        places = torch.cat(rows)
        result.append((text[places], text[places + 1], lengths))
    return result


def train(
    model: LanguageModel, data: list[tuple[Tensor, Tensor, list[int]]], name: str
) -> tuple[list[float], float]:
    """Returns (loss per step, seconds)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=len(data), pct_start=0.15
    )
    losses = []
    began = time.perf_counter()
    for tokens, targets, lengths in (bar := tqdm(data, desc=name, unit="step", mininterval=0.5)):
        loss = F.cross_entropy(model(tokens, lengths), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses, time.perf_counter() - began


def run(texts: list[str], steps: int) -> Trained:
    """Trains the model both ways on texts and lets the first one write a few lines."""
    text = "\n\n".join(texts)
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    encoded = torch.tensor([number[character] for character in text])
    data = batches(encoded, steps)

    torch.manual_seed(SEED)
    ours = LanguageModel(len(alphabet), flash=True)
    plain = LanguageModel(len(alphabet), flash=False)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    parameters = sum(p.numel() for p in ours.parameters())
    print(f"{len(text)} characters of text, {parameters} parameters")

    losses_ours, seconds_ours = train(ours, data, "flash_attn, packed")
    losses_plain, seconds_plain = train(plain, data, "plain SDPA, padded")
    trained = Trained(losses_ours, losses_plain, seconds_ours, seconds_plain)
    figures = trained.figures()
    print(f"loss {figures['loss_start']:.3f} -> {figures['loss_end']:.3f}, ", end="")
    print(f"largest difference between the runs {figures['max_loss_difference']:.1e}")

    for prompt in PROMPTS:
        written = ours.write(torch.tensor([number[c] for c in prompt]), CONTEXT - len(prompt))
        print(f"\n  {' '.join(''.join(alphabet[i] for i in written).split())}")
    return trained
