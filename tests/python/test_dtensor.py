"""DTensor arguments: two gloo processes against the whole computed in one."""

from __future__ import annotations

import functools
from typing import Any, Callable, NamedTuple

import pytest
import torch
import torch.distributed as dist
from gloo import run_processes
from support import run_python

import anyflash

dtensor = pytest.importorskip("torch.distributed.tensor", reason="torch.distributed.tensor: 2.5")
pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
    ),
    pytest.mark.providers,
]
SIZE = 2
WHOLE = None  # as the place of a tensor: every process has all of it
SUM = "sum"  # of a result: every process has a summand
BATCH, ROWS, HEADS, HEAD_DIM = 2, 6, 4, 8
_tensor = torch.randn


class Case(NamedTuple):
    """A call with DTensors: each tensor with the dimension along which it is sharded."""

    call: Callable[..., torch.Tensor]
    tensors: dict[str, torch.Tensor]
    shards: dict[str, Any]  # of those not named: WHOLE
    out: Any  # how the result is sharded
    gradients: dict[str, Any] = {}  # how they are sharded, where not as the tensor


def _qkv(heads_k: int = 2, head_dim_v: int = HEAD_DIM) -> dict[str, torch.Tensor]:
    shapes = {"q": (HEADS, HEAD_DIM), "k": (heads_k, HEAD_DIM), "v": (heads_k, head_dim_v)}
    return {name: _tensor(BATCH, ROWS, *shape) for name, shape in shapes.items()}


def _packed() -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, 4, BATCH * ROWS], dtype=torch.int32)
    return {
        **{name: x.flatten(0, 1) for name, x in _qkv().items()},
        "cu_seqlens_q": lengths,
        "cu_seqlens_k": lengths,
    }


def _all(dim: int | None) -> dict[str, int | None]:
    return dict.fromkeys("qkv", dim)


def _attention(**options: Any) -> Callable[..., torch.Tensor]:
    return functools.partial(anyflash.attention, **options)


def _upstream(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, causal=True, window_size=(3, 0))


def _with_lse(**tensors: torch.Tensor) -> torch.Tensor:
    out, lse = anyflash.attention(**tensors, return_lse=True)
    return out.sum(-1) + lse.transpose(1, 2)


def _with_dropout(**tensors: torch.Tensor) -> torch.Tensor:
    state = torch.tensor([3, 0])
    if isinstance(tensors["q"], dtensor.DTensor):
        state = dtensor.distribute_tensor(state, tensors["q"].device_mesh)
    return anyflash.attention(**tensors, dropout_p=0.5, rng_state=state)


def _bias(*shape: int) -> dict[str, torch.Tensor]:
    return {**_qkv(), "bias": _tensor(*shape)}


def _lengths() -> dict[str, torch.Tensor]:
    return {**_qkv(), "seqused_k": torch.tensor([3, 6], dtype=torch.int32)}


def _slopes(*shape: int) -> dict[str, torch.Tensor]:
    return {**_qkv(), "alibi_slopes": torch.rand(*shape)}


def _rotary_in_place(x: torch.Tensor, **tables: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    assert anyflash.rotary(y, **tables, inplace=True) is y
    return y


def _angles() -> dict[str, torch.Tensor]:
    angles = _tensor(ROWS, HEAD_DIM // 2)
    return {"x": _qkv()["q"], "cos": angles.cos(), "sin": angles.sin()}


def _norm(has_bias: bool) -> dict[str, torch.Tensor]:
    names = ("weight", "bias") if has_bias else ("weight",)
    parameters = {name: _tensor(HEAD_DIM) for name in names}
    return {
        "x": _tensor(BATCH, ROWS, HEAD_DIM),
        "residual": _tensor(BATCH, ROWS, HEAD_DIM),
        **parameters,
    }


def _mlp(has_bias2: bool, gates: int = 1) -> dict[str, torch.Tensor]:
    biases = {"bias2": _tensor(HEAD_DIM)} if has_bias2 else {}
    return {
        "x": _tensor(BATCH, ROWS, HEAD_DIM),
        "weight1": _tensor(gates * 10, HEAD_DIM),
        "bias1": _tensor(gates * 10),
        "weight2": _tensor(HEAD_DIM, 10),
        **biases,
    }


def _fused_mlp(**tensors: torch.Tensor) -> torch.Tensor:
    tensors.setdefault("bias2", None)
    return anyflash.fused_mlp(**tensors, activation="gelu_tanh")


def _gated_mlp(**tensors: torch.Tensor) -> torch.Tensor:
    return anyflash.fused_mlp(**tensors, activation="silu_gate")


def _cases() -> dict[str, Case]:
    torch.manual_seed(0)
    causal = _attention(causal=True)
    tables = {"weight": SUM, "bias": SUM}
    by_row = {"weight1": SUM, "bias1": SUM, "weight2": SUM, "bias2": SUM}
    return {
        "batch": Case(causal, _qkv(), _all(0), 0),
        "heads": Case(causal, _qkv(), _all(2), 2),
        "whole": Case(causal, _qkv(), {}, WHOLE),
        "rows are gathered": Case(causal, _qkv(), _all(1), WHOLE, _all(WHOLE)),
        "columns are gathered": Case(causal, _qkv(), _all(3), WHOLE, _all(WHOLE)),
        "one head of keys": Case(causal, _qkv(1), {"q": 2}, WHOLE, {"q": WHOLE}),
        "three heads of keys": Case(
            causal,
            {"q": _tensor(1, 4, 6, 8), "k": _tensor(1, 4, 3, 8), "v": _tensor(1, 4, 3, 8)},
            _all(2),
            WHOLE,
            _all(WHOLE),
        ),
        "uneven heads": Case(causal, {n: _tensor(1, 4, 3, 8) for n in "qkv"}, _all(2), 2),
        "head_dim_v": Case(causal, _qkv(head_dim_v=4), _all(2), 2),
        "upstream's function": Case(_upstream, _qkv(), _all(2), 2),
        "log-sum-exp of the batch": Case(_with_lse, _qkv(), _all(0), 0),
        "log-sum-exp of heads": Case(_with_lse, _qkv(), _all(2), 2),
        "dropout": Case(_with_dropout, _qkv(), _all(2), WHOLE, _all(WHOLE)),
        "packed heads": Case(causal, _packed(), _all(1), 1),
        "packed rows are gathered": Case(causal, _packed(), _all(0), WHOLE, _all(WHOLE)),
        "lengths": Case(_attention(), _lengths(), {**_all(0), "seqused_k": 0}, 0),
        "lengths of heads": Case(_attention(), _lengths(), _all(2), 2),
        "slopes": Case(causal, _slopes(HEADS), {**_all(2), "alibi_slopes": 0}, 2),
        "slopes of the batch": Case(causal, _slopes(BATCH, HEADS), _all(0), 0),
        "sinks of heads": Case(
            causal, {**_qkv(), "sinks": _tensor(HEADS)}, {**_all(2), "sinks": 0}, 2
        ),
        "sinks of the batch": Case(
            causal, {**_qkv(), "sinks": _tensor(HEADS)}, _all(0), 0, {"sinks": SUM}
        ),
        "bias of heads": Case(causal, _bias(HEADS, ROWS, ROWS), {**_all(2), "bias": 0}, 2),
        "bias of all heads": Case(causal, _bias(BATCH, 1, 1, ROWS), _all(2), 2, {"bias": SUM}),
        "bias of the batch": Case(causal, _bias(BATCH, 1, ROWS, ROWS), {**_all(0), "bias": 0}, 0),
        "bias of all sequences": Case(causal, _bias(ROWS, ROWS), _all(0), 0, {"bias": SUM}),
        "rotary of heads": Case(anyflash.rotary, _angles(), {"x": 2}, 2),
        "rotary of the batch": Case(anyflash.rotary, _angles(), {"x": 0}, 0),
        "rotary in place": Case(_rotary_in_place, _angles(), {"x": 2}, 2),
        "layer norm": Case(anyflash.layer_norm, _norm(True), {"x": 1, "residual": 1}, 1, tables),
        "rms norm": Case(anyflash.rms_norm, _norm(False), {"x": 0, "residual": 0}, 0, tables),
        "mlp of rows": Case(_fused_mlp, _mlp(True), {"x": 1}, 1, by_row),
        "gated mlp of rows": Case(_gated_mlp, _mlp(True, gates=2), {"x": 0}, 0, by_row),
        "mlp of columns": Case(
            _fused_mlp, _mlp(False), {"weight1": 0, "bias1": 0, "weight2": 1}, SUM, {"x": SUM}
        ),
        "loss": Case(
            anyflash.cross_entropy,
            {"logits": _tensor(ROWS, 7), "labels": torch.arange(ROWS)},
            {"logits": 0, "labels": 0},
            0,
        ),
    }


CASES = _cases()


def _place(placement: Any) -> Any:
    (only,) = placement
    return only.dim if only.is_shard() else WHOLE if only.is_replicate() else SUM


def _asks(name: str, x: torch.Tensor) -> bool:
    return x.is_floating_point() and name not in ("alibi_slopes", "cos", "sin")


def _run(case: Case, mesh: Any) -> dict[str, Any]:
    """Where the result and the gradients are, and how far they are from one process's."""

    def differentiated(tensors):
        for name, x in tensors.items():
            x.requires_grad_(_asks(name, x))
        out = case.call(**tensors)
        out = out[0] if isinstance(out, tuple) else out
        out.square().sum().backward()
        return {"out": out, **{n: x.grad for n, x in tensors.items() if x.requires_grad}}

    def distributed(name, x):
        dim = case.shards.get(name)
        to = dtensor.Replicate() if dim is WHOLE else dtensor.Shard(dim)
        return dtensor.distribute_tensor(x, mesh, [to])

    whole = differentiated({n: x.clone() for n, x in case.tensors.items()})
    parts = differentiated({n: distributed(n, x) for n, x in case.tensors.items()})
    for name, part in parts.items():
        message = f"{name}: {{}}".format
        torch.testing.assert_close(
            part.full_tensor(), whole[name], rtol=2e-5, atol=2e-5, msg=message
        )
    return {name: _place(part.placements) for name, part in parts.items()}


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # what DTensor makes of NotImplementedError depends on torch
        return str(error)
    return "nothing was raised"


def _refusals(mesh: Any) -> dict[str, str]:
    q, k, v = (dtensor.distribute_tensor(x, mesh, [dtensor.Shard(2)]) for x in _qkv().values())
    slopes = dtensor.distribute_tensor(torch.rand(HEADS), mesh, [dtensor.Replicate()])
    return {
        "alibi_slopes: attention has no gradient": _message(
            lambda: (
                anyflash.attention(q, k, v, alibi_slopes=slopes.requires_grad_()).sum().backward()
            )
        ),
        "dropout_p: expected 0 for DTensor arguments, or an rng_state": _message(
            lambda: anyflash.attention(q, k, v, dropout_p=0.5)
        ),
        "attention_kvcache writes into its arguments": _message(
            lambda: anyflash.attention_kvcache(q, k, v)
        ),
    }


def _two_dimensions(rank: int) -> list[Any]:
    """Batch and heads over a mesh of both."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, SIZE))
    to = [dtensor.Shard(0), dtensor.Shard(2)]
    qkv = [dtensor.distribute_tensor(x, mesh, to) for x in _qkv().values()]
    return [p.dim for p in anyflash.attention(*qkv).placements]


def _compiled(mesh: Any) -> int:
    """Where the result of a graph is, which calls the operator that trainers know."""
    from flash_attn import flash_attn_func

    def run(leaves, function):
        out = function(*leaves)
        return out, *torch.autograd.grad(out.to_local().square().sum(), leaves)

    shards = [dtensor.distribute_tensor(x, mesh, [dtensor.Shard(2)]) for x in _qkv().values()]
    leaves = [x.requires_grad_() for x in shards]
    compiled = torch.compile(flash_attn_func, backend="aot_eager", fullgraph=True)
    found, expected = run(leaves, compiled), run(leaves, flash_attn_func)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x.to_local(), y.to_local())
    return _place(found[0].placements)


def _flags(mesh: Any) -> None:
    """Calls of the same shapes that differ by flags, of which DTensor would remember the first."""

    def gradients(place):
        torch.manual_seed(1)
        x, w, b = torch.randn(4, 6, 8), torch.randn(8), torch.randn(8)
        weights = torch.randn(16, 8), torch.randn(16), torch.randn(8, 16)
        norms = [n(place(x, 0), place(w)) for n in (anyflash.rms_norm, anyflash.layer_norm)]
        found = []
        for bias in (None, place(b)):
            rows = place(x, 0).requires_grad_()
            leaves = [rows] if bias is None else [rows, bias.requires_grad_()]
            out = anyflash.fused_mlp(rows, *map(place, weights), bias)
            found += torch.autograd.grad(out.square().sum(), leaves)
        for norm in (anyflash.rms_norm, anyflash.layer_norm):
            leaves = [place(x, 0).requires_grad_(), place(w).requires_grad_()]
            found += torch.autograd.grad(norm(*leaves).square().sum(), leaves)
        return norms + found

    def distributed(x, dim=None):
        to = dtensor.Replicate() if dim is None else dtensor.Shard(dim)
        return dtensor.distribute_tensor(x, mesh, [to])

    for part, whole in zip(gradients(distributed), gradients(lambda x, dim=None: x.clone())):
        torch.testing.assert_close(part.full_tensor(), whole, rtol=2e-5, atol=2e-5)


def _worker(rank: int) -> dict[str, Any]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (SIZE,))
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        try:
            found[name] = _run(case, mesh)
        except Exception as error:
            raise RuntimeError(f"{name}: {error}") from error
    _flags(mesh)
    found["refusals"] = _refusals(mesh)
    found["compiled"] = _compiled(mesh)
    found["two dimensions"] = _two_dimensions(rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_processes(_worker, tmp_path_factory.mktemp("ranks"), count=SIZE)


@pytest.mark.parametrize("name", CASES)
def test_shards_stay_where_they_are(ranks, name):
    case = CASES[name]
    asked = [n for n, x in case.tensors.items() if _asks(n, x)]
    expected = {n: case.gradients.get(n, case.shards.get(n)) for n in asked}
    for results in ranks:
        assert results[name] == {"out": case.out, **expected}


def test_what_is_refused(ranks):
    for results in ranks:
        for expected, message in results["refusals"].items():
            assert expected in message


def test_a_mesh_of_two_dimensions(ranks):
    assert all(results["two dimensions"] == [0, 2] for results in ranks)


def test_in_one_graph(ranks):
    assert all(results["compiled"] == 2 for results in ranks)


@pytest.mark.parametrize(
    "first", ["anyflash", "torch.distributed.tensor", "torch.distributed.fsdp"]
)
def test_dtensor_is_told_when_it_is_imported(first):
    second = "torch.distributed.tensor" if first == "anyflash" else "anyflash"
    code = f"""
import sys
import {first}
if {first == "anyflash"}:
    assert "torch.distributed.tensor" not in sys.modules
import {second}, torch
propagator = torch.distributed.tensor.DTensor._op_dispatcher.sharding_propagator
print(torch.ops.anyflash.rotary.default in propagator.op_strategy_funcs)
"""
    assert run_python(code).strip() == "True"
