"""Attention inside torch's context_parallel: two gloo processes, each with its shard of the
sequence, against one process with all of it."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any, Callable, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo import run_processes
from packaging.version import Version

import anyflash

if Version(torch.__version__) < Version("2.13"):
    pytest.skip("the tests know where torch 2.13 keeps its ring", allow_module_level=True)
cp = importlib.import_module("torch.distributed.tensor.experimental._context_parallel._attention")
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)
SIZE = 2
BATCH, ROWS, HEADS, HEAD_DIM = 2, 16, 4, 8


class Case(NamedTuple):
    call: Callable[..., torch.Tensor]
    balanced: bool = True
    heads_k: int = HEADS
    rows: int = ROWS
    rotation: str = "allgather"
    dtype: torch.dtype = torch.float32


def _upstream(q, k, v):
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True)


def _packed_form(q, k, v):
    from flash_attn import flash_attn_qkvpacked_func

    return flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True)


def _lse(q, k, v):
    out, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
    return out * lse.detach().transpose(1, 2).unsqueeze(-1)


def _checkpointed(q, k, v):
    from torch.utils.checkpoint import checkpoint

    return checkpoint(
        functools.partial(anyflash.attention, causal=True), q, k, v, use_reentrant=False
    )


def _compiled(q, k, v):
    return torch.compile(_causal, backend="aot_eager")(q, k, v)


def _sequence(q, k, v):
    """(total, heads, head_dim): a batch of one."""
    return torch.stack([anyflash.attention(*x, causal=True) for x in zip(q, k, v)])


def _sdpa(q, k, v, **options):
    """PyTorch's function, accelerated: while it is, CPU tensors have a ring."""
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    return out.transpose(1, 2)


def _attention(**options: Any) -> Callable[..., torch.Tensor]:
    return functools.partial(anyflash.attention, **options)


_causal = _attention(causal=True)
_sdpa_causal = functools.partial(_sdpa, is_causal=True)
CASES = {
    "causal": Case(_causal),
    "causal, not balanced": Case(_causal, balanced=False),
    "causal, too short to be balanced": Case(_causal, rows=6),
    "full, not balanced": Case(_attention(), balanced=False),
    "all to all": Case(_causal, rotation="alltoall"),
    "all to all, not balanced": Case(_causal, rotation="alltoall", balanced=False),
    "grouped heads": Case(_causal, heads_k=1),
    "softcap": Case(_attention(causal=True, softcap=2.0, softmax_scale=0.7)),
    "deterministic": Case(_attention(causal=True, deterministic=True)),
    "bf16": Case(_causal, dtype=torch.bfloat16),
    "fp64": Case(_causal, dtype=torch.float64),
    "upstream's function": Case(_upstream),
    "upstream's packed form": Case(_packed_form),
    "log-sum-exp": Case(_lse),
    "checkpointed": Case(_checkpointed),
    "sdpa": Case(_sdpa_causal),
    "sdpa, not balanced": Case(_sdpa_causal, balanced=False),
    "sdpa, full": Case(functools.partial(_sdpa, scale=0.5), balanced=False),
    "sdpa, fp64": Case(_sdpa_causal, dtype=torch.float64),
    "compiled": Case(_compiled),
    "one sequence": Case(_sequence),
}


def _tensors(case: Case) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = (HEADS, case.heads_k, case.heads_k, HEADS)
    return [torch.randn(BATCH, case.rows, h, HEAD_DIM, dtype=case.dtype) for h in heads]


def _step(case: Case, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, weight = (x.clone() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    out = case.call(*leaves)
    (out * weight).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


@contextlib.contextmanager
def _region(mesh: Any, tensors: list[torch.Tensor], balanced: bool = True, rotation="allgather"):
    before = cp._cp_options.enable_load_balance
    cp._cp_options.enable_load_balance = balanced
    cp.set_rotate_method(rotation)
    try:
        with cp.context_parallel(mesh, buffers=tensors, buffer_seq_dims=[1] * len(tensors)):
            yield
    finally:
        cp._cp_options.enable_load_balance = before


def _run(case: Case, mesh: Any) -> None:
    tensors = _tensors(case)
    expected = _step(case, tensors)
    is_sdpa = getattr(case.call, "func", None) is _sdpa
    held = anyflash.accelerate_sdpa() if is_sdpa else contextlib.nullcontext()
    with held, _region(mesh, [*tensors, *expected], case.balanced, case.rotation):
        found = _step(case, tensors)
        assert found[0].shape[1] * SIZE == case.rows
        tolerance = 0.02 if case.dtype == torch.bfloat16 else 1e-5  # blocks are merged in fp32
        for name, x, y in zip(("out", "q", "k", "v"), found, expected):
            message = f"{name}: {{}}".format
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=message)


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def _refused(mesh: Any) -> dict[str, str]:
    """What each refusal says, by what it has to say."""
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

    *qkv, _ = tensors = _tensors(Case(_causal))
    lengths = torch.tensor([0, 8], dtype=torch.int32)
    asked = {
        "alibi_slopes": {"alibi_slopes": torch.ones(HEADS)},
        "bias": {"bias": torch.zeros(8, 8)},
        "sinks": {"sinks": torch.zeros(HEADS)},
        "seqused_k": {"seqused_k": lengths},
        "dropout_p": {"dropout_p": 0.5},
        "window_size": {"window_size": (2, 0)},
    }
    found = {}
    with _region(mesh, tensors):
        for name, option in asked.items():
            expected = f"{name}: expected none inside context_parallel"
            found[expected] = _message(lambda: anyflash.attention(*qkv, **option))  # noqa: B023
        packed = [x[0] for x in qkv]
        found["cu_seqlens_q, cu_seqlens_k: expected none inside"] = _message(
            lambda: flash_attn_varlen_func(*packed, lengths, lengths, 8, 8, causal=True)
        )
        found["attention_kvcache: not inside context_parallel"] = _message(
            lambda: flash_attn_with_kvcache(*qkv)
        )
        found["Load balancing requires"] = _message(lambda: anyflash.attention(*qkv))
        distributed = [dist.tensor.DTensor.from_local(x, mesh) for x in qkv]
        found["q, k, v: expected tensors inside context_parallel"] = _message(
            lambda: anyflash.attention(*distributed, causal=True)
        )
        found["does not have a sharding strategy"] = _message(lambda: _sdpa(*qkv, is_causal=True))
        leaves = [x.clone().requires_grad_() for x in qkv]
        out, lse = anyflash.attention(*leaves, causal=True, return_lse=True)
        found["log-sum-exp of attention inside context_parallel"] = _message(
            lambda: lse.sum().backward()
        )
    found["ran outside of it"] = _message(lambda: out.sum().backward())
    cp._enable_context_parallel_dispatcher()
    distributed = [dist.tensor.DTensor.from_local(x, mesh, [dist.tensor.Shard(1)]) for x in qkv]
    found["q: expected no shards of the sequence"] = _message(
        lambda: anyflash.attention(*distributed, causal=True)
    )
    cp._disable_context_parallel_dispatcher()
    assert anyflash.attention(*distributed, causal=True).placements[0].is_replicate()
    with anyflash.accelerate_sdpa(), _region(mesh, tensors):
        found["expected attn_mask=None"] = _message(
            lambda: _sdpa(*qkv, attn_mask=torch.zeros(1, 1, 8, 16))
        )
    return found


def _worker(rank: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    for name, case in CASES.items():
        try:
            _run(case, mesh)
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
    for expected, message in _refused(mesh).items():
        assert expected in message, f"expected {expected}, got {message}"


def test_a_region_is_one_process_with_the_whole(tmp_path):
    run_processes(_worker, tmp_path, count=SIZE)


def test_a_replaced_function_alone_is_no_region(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_: None)
    q = torch.randn(1, 4, 2, 8)
    assert anyflash.attention(q, q, q).shape == q.shape
