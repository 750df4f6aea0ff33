"""PyTorch's flash attention by anyflash. Without a GPU what is for the dispatch key of CUDA runs on
that of CPUs, where aten's operators are otherwise empty."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import pytest
import torch
from support import run_python

import anyflash
from anyflash.integrations import torch_flash

attention = pytest.importorskip("torch.nn.attention", reason="torch.nn.attention is of torch 2.2")
pytestmark = pytest.mark.skipif(
    not hasattr(attention, "activate_flash_attention_impl"), reason="the hook is of torch 2.10"
)
aten = torch.ops.aten
HEADS, HEAD_DIM = 4, 16


class _Builtin:
    """In the place of PyTorch's kernel."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        raise RuntimeError(f"PyTorch's {self.name}")


@pytest.fixture
def here(monkeypatch):
    """The hook for CPU tensors, active."""
    monkeypatch.setattr(torch_flash, "_KEY", "CPU")
    monkeypatch.setattr(torch_flash, "builtin_kernel", lambda name, key: _Builtin(name))
    with torch_flash.enable() as activation:
        yield activation


def _varlen(q, k, v, lengths, **options):
    from torch.nn.attention.varlen import varlen_attn

    longest = int(lengths.diff().max())
    return varlen_attn(q, k, v, lengths, lengths, longest, longest, **options)


def _varlen_out(q, k, v, lengths, **options):
    from torch.nn.attention.varlen import varlen_attn_out

    longest = int(lengths.diff().max())
    out = torch.full_like(q, torch.nan)
    varlen_attn_out(out, q, k, v, lengths, lengths, longest, longest, **options)
    return out


def _sdpa(q, k, v, **options):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = aten._scaled_dot_product_flash_attention.default(*heads_first, **options)[0]
    return out.transpose(1, 2)


def _dense(q, k, v, is_causal, **options):
    lengths = (None, None, q.size(1), k.size(1))
    return aten._flash_attention_forward.default(
        q, k, v, *lengths, 0.0, is_causal, False, **options
    )[0]


class Case(NamedTuple):
    """A call of PyTorch's beside one of anyflash's."""

    call: Callable[..., torch.Tensor]
    expected: dict[str, Any]  # options of anyflash.attention
    packed: bool = False
    heads_k: int = HEADS
    differentiable: bool = True


def _named(function: Callable[..., torch.Tensor], **options: Any) -> Callable[..., torch.Tensor]:
    return functools.partial(function, **options)


CASES = {
    "sdpa": Case(_sdpa, {}),
    "sdpa, causal": Case(_named(_sdpa, is_causal=True), {"causal": True}),
    "sdpa, scale": Case(_named(_sdpa, scale=0.3), {"softmax_scale": 0.3}),
    "dense": Case(_named(_dense, is_causal=True), {"causal": True}, differentiable=False),
    "dense, window": Case(
        _named(_dense, is_causal=False, window_size_left=3, window_size_right=1),
        {"window_size": (3, 1)},
        differentiable=False,
    ),
    "dense, slopes": Case(
        _named(_dense, is_causal=True, alibi_slopes=torch.linspace(0.1, 0.5, HEADS)),
        {"causal": True, "alibi_slopes": torch.linspace(0.1, 0.5, HEADS)},
        differentiable=False,
    ),
    "packed": Case(_varlen, {}, packed=True),
    "packed, causal": Case(_named(_varlen, window_size=(-1, 0)), {"causal": True}, packed=True),
    "packed, window": Case(
        _named(_varlen, window_size=(4, 0), scale=0.5),
        {"window_size": (4, 0), "softmax_scale": 0.5},
        packed=True,
    ),
    "packed, grouped heads": Case(_named(_varlen, enable_gqa=True), {}, packed=True, heads_k=2),
    "packed, into given memory": Case(_varlen_out, {}, packed=True, differentiable=False),
}


def _inputs(case: Case, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    rows = (30,) if case.packed else (2, 15)
    heads = (HEADS, case.heads_k, case.heads_k)
    qkv = [torch.randn(*rows, h, HEAD_DIM).to(dtype) for h in heads]
    return qkv, [torch.tensor([0, 11, 11, 30], dtype=torch.int32)] if case.packed else []


def _step(call, qkv, lengths, differentiable):
    leaves = [x.clone().requires_grad_(differentiable) for x in qkv]
    out = call(*leaves, *lengths)
    if not differentiable:
        return [out]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_what_pytorch_calls_is_ours(here, name, dtype):
    case = CASES[name]
    qkv, lengths = _inputs(case, dtype)

    def ours(q, k, v, *lengths):
        packed = {n: lengths[0] for n in ("cu_seqlens_q", "cu_seqlens_k") if lengths}
        packed.update({n: 19 for n in ("max_seqlen_q", "max_seqlen_k") if lengths})
        return anyflash.attention(q, k, v, **packed, **case.expected)

    found = _step(case.call, qkv, lengths, case.differentiable)
    expected = _step(ours, qkv, lengths, case.differentiable)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y)


def test_the_results_are_as_pytorch_describes_them(here):
    """Strides too: torch.compile relies on what the meta kernel says."""
    for q in (torch.randn(2, 4, 6, 16), torch.randn(2, 6, 4, 16).transpose(1, 2)):
        call = aten._scaled_dot_product_flash_attention.default
        found, expected = call(q, q, q), call(*[q.to("meta")] * 3)
        for x, y in zip(found, expected):
            if not isinstance(y, torch.Tensor):
                assert x == y
            else:
                assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize(
    "call",
    [
        lambda q: _sdpa(q, q, q, dropout_p=0.5),
        lambda q: _sdpa(q.double(), q.double(), q.double()),
        lambda q: aten._flash_attention_forward(
            q, q, q, None, None, 4, 4, 0.0, False, False, num_splits=1
        ),
    ],
    ids=["dropout", "fp64", "num_splits"],
)
def test_the_rest_stays_pytorchs(here, call):
    with pytest.raises(RuntimeError, match="PyTorch's _"):
        call(torch.randn(1, 4, 2, 16))


def test_the_order_of_back_ends_counts(here):
    q = torch.randn(1, 4, 2, 16)
    with anyflash.backend("math"), pytest.raises(RuntimeError, match="PyTorch's _"):
        _sdpa(q, q, q)


def test_pages(here):
    keys = torch.randn(5, 4, 2, HEAD_DIM)
    q, lengths = torch.randn(2, 2, HEAD_DIM), torch.tensor([0, 1, 2], dtype=torch.int32)
    pages = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    used = torch.tensor([5, 8], dtype=torch.int32)
    options = {"seqused_k": used, "block_table": pages}
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, keys, keys, lengths, None, 1, 8, **options)
    expected = anyflash.attention(
        q, keys, keys, cu_seqlens_q=lengths, max_seqlen_q=1, max_seqlen_k=8, **options
    )
    torch.testing.assert_close(out, expected)


# ---- Coming and going.


def _is_ours() -> bool:
    registered = torch._C._dispatch_dump("aten::_scaled_dot_product_flash_attention").splitlines()
    return any(line.startswith("CUDA:") and "torch_flash.py" in line for line in registered)


def test_undo():
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch has no CUDA")
    assert attention.current_flash_attention_impl() is None and not _is_ours()
    with torch_flash.enable():
        assert attention.current_flash_attention_impl() == torch_flash.NAME
        assert _is_ours()
    assert attention.current_flash_attention_impl() is None and not _is_ours()
    activation = torch_flash.enable()
    assert _is_ours()
    attention.restore_flash_attention_impl()
    assert not _is_ours()
    activation.close()
    assert torch_flash.NAME in attention.list_flash_attention_impls()


def test_a_later_activation_takes_the_place(here):
    second = torch_flash.enable()
    here.close()
    assert attention.current_flash_attention_impl() == torch_flash.NAME
    second.close()
    second.close()
    assert attention.current_flash_attention_impl() is None


def test_others_are_left_alone(here):
    attention.register_flash_attention_impl("other", register_fn=lambda: _Other())
    attention.activate_flash_attention_impl("other")
    here.close()
    assert attention.current_flash_attention_impl() == "other"
    attention.restore_flash_attention_impl()


class _Other:
    def remove(self) -> None:
        pass


def test_without_cuda(monkeypatch):
    monkeypatch.setattr(torch_flash, "_KEY", "XPU")
    with pytest.raises(RuntimeError, match="this torch has no flash attention for CUDA"):
        torch_flash.enable()


def test_older_torch():
    code = """
import torch.nn.attention
if hasattr(torch.nn.attention, "activate_flash_attention_impl"):
    del torch.nn.attention.activate_flash_attention_impl
from anyflash.integrations import torch_flash
try:
    torch_flash.enable()
except RuntimeError as error:
    print(error)
"""
    assert "torch 2.10 and newer have" in run_python(code)
