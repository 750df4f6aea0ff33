"""The two providers on the same random calls: what one computes the other computes, what one
refuses the other refuses in the same words.

Run as a program, this file writes what calls come to: how the other provider is asked.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import pytest
import torch
from support import run_python

import anyflash

pytestmark = pytest.mark.providers

CALLS = 250  # of each kind
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.04, torch.float16: 0.01}


class Call:
    """Draws a call from its number: tensors whose values no provider's code has a part in."""

    def __init__(self, kind: str, number: int) -> None:
        self.random = random.Random(f"{kind} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(40))
        self.kind = kind
        self.dtype = self.random.choice(list(DTYPES))
        self.batch = self.random.choice([0, 1, 2, 3])
        self.heads_k = self.random.choice([1, 2])
        self.heads = self.heads_k * self.random.choice([1, 1, 3])
        self.head_dim = self.random.choice([1, 8, 16, 33])
        self.head_dim_v = self.head_dim if self.chance(0.8) else 8
        self.longest_q, self.longest_k = self.length(), self.length()
        self.options: dict[str, Any] = {}

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def length(self, most: int = 20) -> int:
        return 0 if self.chance(0.1) else self.random.randint(0, most)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def ints(self, most: int, least: int = 0) -> torch.Tensor:
        """One per sequence, now and then one that is not allowed."""
        values = [self.random.randint(least, max(most, least)) for _ in range(self.batch)]
        if values and self.chance(0.06):
            values[self.random.randrange(len(values))] = self.random.choice(
                [-1, most + 1, most + 9]
            )
        return torch.tensor(values, dtype=torch.int32 if self.chance(0.98) else torch.int64)

    def common(self) -> None:
        """What every kind of call takes."""
        o = self.options
        o["causal"] = self.chance(0.4)
        o["window_size"] = tuple(self.random.choice([-1, -1, 0, 3, 25]) for _ in range(2))
        if self.chance(0.2):
            o["softcap"] = self.random.choice([2.0, 30.0, -1.0])
        if self.chance(0.3):
            o["softmax_scale"] = self.random.choice([0.3, 0.0, -0.4, 1e-40, 9.0])
        if self.chance(0.2):
            rows = self.heads if self.chance(0.95) else self.heads + 1
            shape = (rows,) if self.chance(0.5) else (self.batch, rows)
            o["alibi_slopes"] = self.tensor(*shape, dtype=torch.float32)
        if self.chance(0.2):
            o["sinks"] = self.tensor(self.heads, dtype=torch.float32)
        if self.chance(0.3):
            o["backend"] = "math"

    def training(self) -> None:
        """What calls take that have a gradient."""
        o = self.options
        if self.chance(0.2):
            o["dropout_p"] = self.random.choice([0.3, 0.99, 1.0])
            o["rng_state"] = torch.tensor([self.random.getrandbits(50), 7])
        if self.chance(0.25):
            shape = [self.batch, self.heads, self.longest_q, self.longest_k]
            shape = [n if self.chance(0.6) else 1 for n in shape]
            if self.chance(0.05):
                shape[-1] += 1
            bias = self.tensor(*shape, dtype=self.random.choice([self.dtype, torch.float32]))
            if self.chance(0.3):
                bias[bias > 0.7] = self.random.choice([float("-inf"), -1e4])
            o["bias"] = bias if self.chance(0.7) else bias > -0.3

    def lengths(self, most: int) -> tuple[torch.Tensor, int]:
        """cu_seqlens, and the rows of storage."""
        starts = [0]
        for _ in range(self.batch):
            starts.append(starts[-1] + self.random.randint(0, most))
        if self.chance(0.03):
            starts[self.random.randrange(len(starts))] += self.random.choice([-3, 5])
        slack = self.random.randint(0, 3) if self.chance(0.3) else 0
        return torch.tensor(starts, dtype=torch.int32), max(starts[-1], 0) + slack

    def dense(self) -> list[torch.Tensor]:
        self.training()
        if self.chance(0.3):
            self.options["seqused_k"] = self.ints(self.longest_k)
        if self.chance(0.2):
            self.options["leftpad_k"] = self.ints(min(self.longest_k, 4))
        return self.qkv((self.batch, self.longest_q), (self.batch, self.longest_k))

    def packed(self) -> list[torch.Tensor]:
        self.training()
        o = self.options
        o["cu_seqlens_q"], rows = self.lengths(self.longest_q)
        o["cu_seqlens_k"], keys = self.lengths(self.longest_k)
        more = self.random.choice([0, 0, 1, 1 << 20]) if "bias" not in o else 0
        less = self.chance(0.05)
        o["max_seqlen_q"] = self.longest_q + more
        o["max_seqlen_k"] = max(self.longest_k + more - less, 0)
        if self.chance(0.3):
            o["seqused_k"] = self.ints(self.longest_k)
        if self.chance(0.2):
            o["leftpad_k"] = self.ints(min(self.longest_k, 4))
        return self.qkv((rows,), (keys,))

    def pages(self) -> tuple[tuple[int, int], torch.Tensor]:
        """(num_blocks, page_size), and a block_table for longest_k keys."""
        page = self.random.choice([1, 4, 16])
        per_sequence = -(-self.longest_k // page)
        blocks = self.batch * per_sequence + 1
        order = list(range(blocks))
        self.random.shuffle(order)
        table = torch.tensor(order[: blocks - 1], dtype=torch.int32)
        table = table.reshape(self.batch, per_sequence)
        if table.numel() and self.chance(0.05):
            table[0, 0] = self.random.choice([-1, blocks])
        return (blocks, page), table

    def paged(self) -> list[torch.Tensor]:
        o = self.options
        storage, o["block_table"] = self.pages()
        if self.chance(0.4):
            o["cu_seqlens_q"], rows = self.lengths(self.longest_q)
            o["max_seqlen_q"] = self.longest_q + self.random.choice([0, 0, 9])
            given = self.chance(0.5)
            if given:
                o["cu_seqlens_k"], _ = self.lengths(self.longest_k)
                o["max_seqlen_k"] = self.longest_k
            if not given or self.chance(0.3):
                o["seqused_k"] = self.ints(self.longest_k)
            return self.qkv((rows,), storage)
        if self.chance(0.9):
            o["seqused_k"] = self.ints(self.longest_k)
        if self.chance(0.2):
            o["leftpad_k"] = self.ints(min(self.longest_k, 4))
        return self.qkv((self.batch, self.longest_q), storage)

    def kvcache(self) -> list[torch.Tensor]:
        o = self.options
        storage = (self.batch, self.longest_k)
        if self.chance(0.4):
            storage, o["block_table"] = self.pages()
        elif self.chance(0.2):
            order = torch.randperm(self.batch + 2, generator=self.generator)[: self.batch]
            storage, o["cache_batch_idx"] = (self.batch + 2, self.longest_k), order.int()
        new = self.random.choice([0, 1, self.longest_q]) if self.chance(0.6) else None
        o["cache_seqlens"] = self.ints(max(self.longest_k - (new or 0), 0))
        if self.chance(0.2):
            o["cache_leftpad"] = self.ints(min(self.longest_k, 3))
        q, k_cache, v_cache = self.qkv((self.batch, self.longest_q), storage)
        if new is None:
            return [q, k_cache, v_cache]
        if self.chance(0.3) and self.head_dim >= 8:
            table = (self.longest_k + 25, self.head_dim // 4)
            o["rotary_cos"], o["rotary_sin"] = self.tensor(*table), self.tensor(*table)
            o["rotary_interleaved"] = self.chance(0.5)
        k = self.tensor(self.batch, new, self.heads_k, self.head_dim)
        v = self.tensor(self.batch, new, self.heads_k, self.head_dim_v)
        return [q, k_cache, v_cache, k, v]

    def qkv(self, rows: tuple[int, ...], keys: tuple[int, ...]) -> list[torch.Tensor]:
        heads_k = self.heads_k if self.chance(0.98) else self.heads + 1
        q = self.tensor(*rows, self.heads, self.head_dim)
        k = self.tensor(*keys, heads_k, self.head_dim)
        v = self.tensor(*keys, heads_k, self.head_dim_v)
        return [q, k, v if self.chance(0.98) else v.to(torch.float64)]

    def run(self) -> dict[str, torch.Tensor]:
        """Results by name; gradients, or the caches that the call wrote."""
        self.common()
        tensors = getattr(self, self.kind)()
        if self.kind == "kvcache":
            out, lse = anyflash.attention_kvcache(*tensors, **self.options, return_lse=True)
            return {"out": out, "lse": lse, "k_cache": tensors[1], "v_cache": tensors[2]}
        leaves = {} if self.kind == "paged" else dict(zip("qkv", tensors))
        for name in ("bias", "sinks"):
            tensor = self.options.get(name)
            if leaves and tensor is not None and tensor.is_floating_point() and self.chance(0.7):
                leaves[name] = tensor
        for leaf in leaves.values():
            leaf.requires_grad_()
        out, lse = anyflash.attention(*tensors, **self.options, return_lse=True)
        results = {"out": out.detach(), "lse": lse.detach()}
        if leaves:
            dout = torch.randn(out.shape, generator=self.generator).to(out.dtype)
            dlse = torch.randn(lse.shape, generator=self.generator).to(lse.dtype)
            outputs = [(out, dout), (lse, dlse)][: 1 + self.chance(0.3)]
            found = torch.autograd.grad(
                [x for x, _ in outputs], list(leaves.values()), [g for _, g in outputs]
            )
            results.update({f"d{name}": gradient for name, gradient in zip(leaves, found)})
        return results


def come_to(kind: str, number: int) -> dict[str, torch.Tensor] | str:
    """Results by name, or what was raised."""
    try:
        return Call(kind, number).run()
    except Exception as error:  # noqa: BLE001  (whatever it is, it is compared)
        return f"{type(error).__name__}: {error}"


def difference(one: dict[str, torch.Tensor] | str, other: dict[str, torch.Tensor] | str) -> str:
    """In words, or nothing."""
    if isinstance(one, str) or isinstance(other, str):
        told = [x if isinstance(x, str) else "computed it" for x in (one, other)]
        return "" if told[0] == told[1] else f"binary: {told[0]}\n  python: {told[1]}"
    if one.keys() != other.keys():
        return f"binary has {list(one)}, python {list(other)}"
    for name, x in one.items():
        y = other[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"{name}: binary {x.shape} {x.dtype}, python {y.shape} {y.dtype}"
        a, b = x.double(), y.double()
        largest = b[b.isfinite()].abs().max() if b.isfinite().any() else 0.0
        bound = DTYPES[one["out"].dtype] * (1 + largest)
        error = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        if not bool((error <= bound).all()):
            return f"{name}: binary and python are {error.max().item():.3g} apart"
    return ""


@pytest.mark.parametrize("kind", ["dense", "packed", "paged", "kvcache"])
def test_both_providers_come_to_the_same(kind, provider, tmp_path):
    if provider != "binary":
        pytest.skip("compared in the run of the binary")
    path = tmp_path / "results.pt"
    code = f"import runpy, sys; sys.argv[1:] = [{kind!r}, {str(path)!r}]; "
    code += f"runpy.run_path({__file__!r}, run_name='__main__')"
    run_python(code, ANYFLASH_PROVIDER="python")
    different, refused = [], 0
    for number, python in enumerate(torch.load(path)):
        binary = come_to(kind, number)
        refused += isinstance(binary, str)
        text = difference(binary, python)
        if text:
            different.append(f"{kind} {number}: {text}")
    assert not different, f"{len(different)} of {CALLS}\n" + "\n".join(different[:20])
    assert CALLS / 20 < refused < CALLS / 2, "both kinds of answers are to be compared"


if __name__ == "__main__":
    torch.save([come_to(sys.argv[1], number) for number in range(CALLS)], sys.argv[2])
