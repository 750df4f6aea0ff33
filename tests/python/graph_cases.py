"""What is to be one graph: every public function, and the layers and models of the drop-in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flash_attn
import torch
from flash_attn.bert_padding import index_first_axis, pad_input
from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_qkv_
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.models.gpt import GPTLMHeadModel
from flash_attn.modules.block import Block
from flash_attn.modules.mha import MHA
from flash_attn.modules.mlp import GatedMlp
from flash_attn.ops.activations import swiglu
from flash_attn.ops.fused_dense import FusedMLP
from flash_attn.ops.layer_norm import dropout_add_layer_norm
from flash_attn.ops.triton.layer_norm import rms_norm_fn
from torch import Tensor

import anyflash

HEADS, DIM, PAGE = 2, 16, 4
WIDTH = HEADS * DIM


class Inputs(NamedTuple):
    """Of one call: tensors that ask for a gradient, and all others."""

    leaves: tuple[Tensor, ...]
    others: tuple[Any, ...] = ()


class GraphCase(NamedTuple):
    """``function(*leaves, *others)`` of what ``inputs`` makes for a batch, a length and a seed.

    ``module`` makes what has parameters; it is then the first argument. ``why_not``: where a
    gradient is asked for there is none.
    """

    function: Callable[..., Any]
    inputs: Callable[[int, int], Inputs]
    module: Callable[[], torch.nn.Module] | None = None
    why_not: str | None = None


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape)


def starts(batch: int, total: int) -> Tensor:
    """(batch + 1,) int32: ``total`` rows in sequences of random lengths."""
    inner = torch.randint(0, total + 1, (batch - 1,)).sort().values
    return torch.cat([torch.zeros(1), inner, torch.full((1,), total)]).to(torch.int32)


def _qkv(batch: int, seqlen: int) -> Inputs:
    return Inputs(tuple(draw(batch, seqlen, HEADS, DIM) for _ in "qkv"))


def _grouped(batch: int, seqlen: int) -> Inputs:
    return Inputs((draw(batch, seqlen, 4, DIM), *(draw(batch, seqlen, 2, DIM) for _ in "kv")))


def _single(batch: int, seqlen: int) -> Inputs:
    return Inputs(tuple(draw(seqlen, HEADS, DIM) for _ in "qkv"))


def _stacked(count: int, batch: int, seqlen: int) -> Inputs:
    first = () if count == 3 else (draw(batch, seqlen, HEADS, DIM),)
    return Inputs((*first, draw(batch, seqlen, count, HEADS, DIM)))


def _packed(longest: Callable[[Tensor], Any], batch: int, seqlen: int, count: int = 1) -> Inputs:
    total = batch * seqlen
    cu = starts(batch, total)
    more = longest(cu)
    shapes = {1: [(HEADS,)] * 3, 2: [(HEADS,), (2, HEADS)], 3: [(3, HEADS)]}[count]
    leaves = tuple(draw(total, *shape, DIM) for shape in shapes)
    return Inputs(leaves, (cu, *(() if more is None else (more,))))


def longest_number(cu: Tensor) -> int:
    return int(cu.diff().max())


def longest_tensor(cu: Tensor) -> Tensor:
    return cu.diff().max()


def longest_shape(cu: Tensor) -> Tensor:
    """A tensor whose length is the number: in a graph its size, a symbol."""
    return torch.empty(longest_number(cu))


def _attend_everything(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, scale: Tensor, slopes: Tensor
) -> Tensor:
    return anyflash.attention(
        *(q, k, v), bias=bias, sinks=sinks, softmax_scale=scale, alibi_slopes=slopes,
        window_size=(9, 3), softcap=4.0,
    )  # fmt: skip


def _everything(batch: int, seqlen: int) -> Inputs:
    leaves = (draw(1, HEADS, seqlen, seqlen), draw(HEADS), torch.tensor(0.3))
    return Inputs((*_qkv(batch, seqlen).leaves, *leaves), (torch.rand(HEADS),))


def _attend_dropped(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> Tensor:
    return anyflash.attention(q, k, v, dropout_p=0.3, rng_state=state)


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Any = None) -> Tensor:
    if isinstance(longest, Tensor) and longest.dim() == 1:
        longest = longest.shape[0]
    lengths = dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)
    return anyflash.attention(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, window_size=(8, 0), **lengths
    )


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: Any) -> Tensor:
    return flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)


def _varlen_kv(q: Tensor, kv: Tensor, cu: Tensor, longest: int) -> Tensor:
    return flash_attn.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, longest, longest)


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = anyflash.attention(q * 1.5, k, v, causal=True, return_lse=True)
    return out.sin() + lse.transpose(1, 2)[..., None]


def _page_table(batch: int, seqlen: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values in pages, whose they are, and how many of them count."""
    pages = -(-(seqlen + 1) // PAGE)
    table = torch.randperm(batch * pages).view(batch, pages).to(torch.int32)
    lengths = torch.randint(1, seqlen + 1, (batch,), dtype=torch.int32)
    return (
        draw(batch * pages, PAGE, HEADS, DIM),
        draw(batch * pages, PAGE, HEADS, DIM),
        table,
        lengths,
    )


def _attend_pages(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    return anyflash.attention(q, k, v, block_table=table, seqused_k=lengths)


def _paged(batch: int, seqlen: int) -> Inputs:
    return Inputs((), (draw(batch, 1, HEADS, DIM), *_page_table(batch, seqlen)))


def _step(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lengths: Tensor
) -> tuple[Tensor, ...]:
    out = anyflash.attention_kvcache(q * 2, keys, values, k, v, cache_seqlens=lengths, causal=True)
    assert isinstance(out, Tensor)
    return out + 1, lengths + 1, keys, values


def _cache(batch: int, seqlen: int) -> Inputs:
    caches = (draw(batch, seqlen + 3, HEADS, DIM) for _ in "kv")
    lengths = torch.randint(1, seqlen + 1, (batch,), dtype=torch.int32)
    return Inputs((), (*(draw(batch, 1, HEADS, DIM) for _ in "qkv"), *caches, lengths))


def _step_over_pages(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, keys: Tensor, values: Tensor, table: Tensor,
    lengths: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    out = flash_attn.flash_attn_with_kvcache(
        q, keys, values, k, v, rotary_cos=cos, rotary_sin=cos, cache_seqlens=lengths,
        block_table=table, causal=True,
    )  # fmt: skip
    return out, keys, values


def _paged_cache(batch: int, seqlen: int) -> Inputs:
    new = (draw(batch, 1, HEADS, DIM) for _ in "qkv")
    return Inputs((), (*new, draw(2 * seqlen + 2, DIM // 2), *_page_table(batch, seqlen)))


def _mlp(batch: int, seqlen: int) -> Inputs:
    shapes = ((batch, seqlen, 8), (32, 8), (32,), (8, 16), (8,))
    return Inputs(tuple(draw(*shape) for shape in shapes))


def _rotary(batch: int, seqlen: int) -> Inputs:
    tables = (draw(seqlen + 7, DIM // 2) for _ in range(2))
    return Inputs((draw(batch, seqlen, HEADS, DIM),), tuple(tables))


def _rotary_offsets(batch: int, seqlen: int) -> Inputs:
    leaves, tables = _rotary(batch, seqlen)
    return Inputs(leaves, (*tables, torch.randint(0, 7, (batch,), dtype=torch.int32)))


def _turn_packed(x: Tensor, cos: Tensor, sin: Tensor, cu: Tensor, longest: Any) -> Tensor:
    return apply_rotary_emb(x, cos, sin, True, cu_seqlens=cu, max_seqlen=longest)


def _rotary_packed(longest: Callable[[Tensor], Any], batch: int, seqlen: int) -> Inputs:
    total = batch * seqlen
    cu = starts(batch, total)
    tables = (draw(total, DIM // 2) for _ in range(2))
    return Inputs((draw(total, HEADS, DIM),), (*tables, cu, longest(cu)))


def _turn_qkv(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary_emb_qkv_(qkv * 1, cos, sin)


def _rows(batch: int, seqlen: int) -> Inputs:
    return Inputs((*(draw(batch, seqlen, 24) for _ in range(2)), draw(24), draw(24)))


def _normed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return anyflash.layer_norm(x, weight, bias, residual=residual, prenorm=True)  # type: ignore[return-value]


def _rms_normed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return anyflash.rms_norm(x * residual, weight) * bias


def _fused_normed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return dropout_add_layer_norm(x, residual, weight, bias, 0.0, 1e-5, prenorm=True)


def _triton_normed(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return rms_norm_fn(x, weight, bias, residual, prenorm=True)


def _labelled(batch: int, seqlen: int) -> Inputs:
    labels = torch.randint(50, (batch * seqlen,))
    labels[0] = -100
    return Inputs((draw(batch * seqlen, 50),), (labels,))


def _entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return anyflash.cross_entropy(logits, labels, label_smoothing=0.1, lse_square_scale=1e-2)[0]


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return CrossEntropyLoss(inplace_backward=True)(logits * 1, labels)


def _hidden(batch: int, seqlen: int) -> Inputs:
    return Inputs((draw(batch, seqlen, WIDTH),))


def _packed_hidden(batch: int, seqlen: int) -> Inputs:
    cu = starts(batch, batch * seqlen)
    return Inputs((draw(batch * seqlen, WIDTH),), (cu, longest_number(cu)))


def _call(module: torch.nn.Module, *tensors: Tensor) -> Any:
    return module(*tensors)


def _call_packed(module: torch.nn.Module, x: Tensor, cu: Tensor, longest: int) -> Any:
    return module(x, cu_seqlens=cu, max_seqlen=longest)


def _heads(**options: Any) -> Callable[[], torch.nn.Module]:
    return functools.partial(
        MHA, WIDTH, num_heads=HEADS, causal=True, use_flash_attn=True, **options
    )


def _block() -> torch.nn.Module:
    def mixer(width: int) -> torch.nn.Module:
        return _heads(rotary_emb_dim=DIM)()

    return Block(
        WIDTH, mixer, lambda width: GatedMlp(width, WIDTH), fused_dropout_add_ln=True,
    )  # fmt: skip


def _model() -> torch.nn.Module:
    from transformers import GPT2Config

    config = GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_layer=2, vocab_size=61, n_positions=0,
        activation_function="swiglu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config.use_flash_attn = config.fused_dropout_add_ln = config.rms_norm = True
    config.rotary_emb_fraction = 1.0
    return GPTLMHeadModel(config)


def _call_model(model: torch.nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits


def _ids(batch: int, seqlen: int) -> Inputs:
    return Inputs((), (torch.randint(61, (batch, seqlen)),))


def _take_and_pad(x: Tensor, indices: Tensor, mask: Tensor) -> Tensor:
    return pad_input(index_first_axis(x.flatten(0, 1), indices).sin(), indices, *mask.shape)


def _indices(batch: int, seqlen: int) -> Inputs:
    mask = torch.ones(batch, seqlen)
    indices = torch.randperm(batch * seqlen)[: batch * seqlen - 3].sort().values
    return Inputs((draw(batch, seqlen, 6),), (indices, mask))


def _packed_by(longest: Callable[[Tensor], Any], count: int = 1) -> Callable[[int, int], Inputs]:
    return functools.partial(_packed, longest, count=count)


NO_GRADIENT = "attention over a cache or over pages has no gradient"
CASES: dict[str, GraphCase] = {
    "attention": GraphCase(_with_lse, _qkv),
    "attention, every option": GraphCase(_attend_everything, _everything),
    "attention, dropout": GraphCase(
        _attend_dropped, lambda *size: Inputs(_qkv(*size).leaves, (torch.tensor([4, 2]),))
    ),
    "attention, one sequence": GraphCase(anyflash.attention, _single),
    "attention, packed, max_seqlen int": GraphCase(_attend_packed, _packed_by(longest_number)),
    "attention, packed, max_seqlen tensor": GraphCase(_attend_packed, _packed_by(longest_tensor)),
    "attention, packed, max_seqlen symbol": GraphCase(_attend_packed, _packed_by(longest_shape)),
    "attention, packed, no max_seqlen": GraphCase(_attend_packed, _packed_by(lambda cu: None)),
    "attention, pages": GraphCase(_attend_pages, _paged, why_not=NO_GRADIENT),
    "attention_kvcache": GraphCase(_step, _cache, why_not=NO_GRADIENT),
    "flash_attn_func, grouped heads": GraphCase(flash_attn.flash_attn_func, _grouped),
    "flash_attn_kvpacked_func": GraphCase(
        flash_attn.flash_attn_kvpacked_func, functools.partial(_stacked, 2)
    ),
    "flash_attn_qkvpacked_func": GraphCase(
        flash_attn.flash_attn_qkvpacked_func, functools.partial(_stacked, 3)
    ),
    "flash_attn_varlen_func": GraphCase(_varlen, _packed_by(longest_number)),
    "flash_attn_varlen_func, max_seqlen tensor": GraphCase(_varlen, _packed_by(longest_tensor)),
    "flash_attn_varlen_kvpacked_func": GraphCase(_varlen_kv, _packed_by(longest_number, 2)),
    "flash_attn_varlen_qkvpacked_func": GraphCase(
        flash_attn.flash_attn_varlen_qkvpacked_func, _packed_by(longest_number, 3)
    ),
    "flash_attn_with_kvcache, pages": GraphCase(
        _step_over_pages, _paged_cache, why_not=NO_GRADIENT
    ),
    "fused_mlp": GraphCase(functools.partial(anyflash.fused_mlp, activation="silu_gate"), _mlp),
    "bias_activation": GraphCase(
        functools.partial(anyflash.bias_activation, activation="squared_relu"),
        lambda batch, seqlen: Inputs((draw(batch, seqlen, 24), draw(24))),
    ),
    "rotary": GraphCase(anyflash.rotary, _rotary),
    "rotary, offsets": GraphCase(
        lambda x, cos, sin, offsets: anyflash.rotary(x, cos, sin, seqlen_offsets=offsets),
        _rotary_offsets,
    ),
    "apply_rotary_emb, packed": GraphCase(
        _turn_packed, functools.partial(_rotary_packed, longest_number)
    ),
    "apply_rotary_emb, packed, max_seqlen tensor": GraphCase(
        _turn_packed, functools.partial(_rotary_packed, longest_tensor)
    ),
    "apply_rotary_emb_qkv_": GraphCase(
        _turn_qkv,
        lambda batch, seqlen: Inputs(
            (draw(batch, seqlen, 3, HEADS, DIM),), _rotary(batch, seqlen).others
        ),
    ),
    "layer_norm": GraphCase(_normed, _rows),
    "rms_norm": GraphCase(_rms_normed, _rows),
    "dropout_add_layer_norm": GraphCase(_fused_normed, _rows),
    "rms_norm_fn": GraphCase(_triton_normed, _rows),
    "cross_entropy": GraphCase(_entropy, _labelled),
    "CrossEntropyLoss": GraphCase(_loss, _labelled),
    "swiglu": GraphCase(swiglu, lambda *size: Inputs(_rows(*size).leaves[:2])),
    "index_first_axis, pad_input": GraphCase(_take_and_pad, _indices),
    "MHA": GraphCase(_call, _hidden, _heads(rotary_emb_dim=DIM)),
    "MHA, packed": GraphCase(_call_packed, _packed_hidden, _heads()),
    "FusedMLP": GraphCase(_call, _hidden, lambda: FusedMLP(WIDTH, 2 * WIDTH, WIDTH)),
    "Block": GraphCase(
        _call, lambda *size: Inputs((*_hidden(*size).leaves, *_hidden(*size).leaves)), _block
    ),
    "GPTLMHeadModel": GraphCase(_call_model, _ids, _model),
}


def make(name: str, batch: int, seqlen: int, device: str = "cpu", seed: int = 0) -> Inputs:
    """Inputs of a case, drawn from the seed, whose leaves ask for a gradient."""
    torch.manual_seed(seed)
    leaves, others = CASES[name].inputs(batch, seqlen)
    return Inputs(
        tuple(x.to(device).requires_grad_() for x in leaves),
        tuple(x.to(device) if isinstance(x, Tensor) else x for x in others),
    )


def function_of(name: str, device: str = "cpu") -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The function of (*leaves, *others), and the parameters it has beside them."""
    case = CASES[name]
    if case.module is None:
        return case.function, ()
    torch.manual_seed(0)
    module = case.module().to(device)
    return functools.partial(case.function, module), tuple(module.parameters())


def results(out: Any) -> list[Tensor]:
    """The tensors of what a function returned."""
    return [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]


def gradients(found: list[Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of a loss of the results by the tensors."""
    torch.manual_seed(1)
    loss = sum((x * torch.randn_like(x)).sum() for x in found if x.requires_grad)
    return torch.autograd.grad(loss, tensors)  # type: ignore[arg-type]
