"""Tensor and sequence parallelism: two gloo processes against the whole computed in one."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from flash_attn.modules import mlp as mlps
from flash_attn.ops import fused_dense
from flash_attn.utils import distributed
from gloo import run_processes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

SIZE = 2
ROWS, IN, HIDDEN, OUT = 6, 8, 10, 4
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


class Case(NamedTuple):
    """A parallel module beside the whole one with the same parameters."""

    parallel: Any
    whole: Any
    sequence_parallel: bool
    gated: bool = False


def _fused(sequence_parallel, activation, level):
    options = {"activation": activation, "checkpoint_lvl": level}
    return Case(
        lambda group: mlps.ParallelFusedMLP(
            IN,
            HIDDEN,
            OUT,
            process_group=group,
            sequence_parallel=sequence_parallel,
            **options,
        ),
        lambda: mlps.FusedMLP(IN, HIDDEN, OUT, **options),
        sequence_parallel,
    )


def _gated(sequence_parallel, name):
    options = {"activation": getattr(F, name), "multiple_of": HIDDEN}
    return Case(
        lambda group: mlps.ParallelGatedMlp(
            IN, group, HIDDEN, OUT, sequence_parallel=sequence_parallel, **options
        ),
        lambda: mlps.GatedMlp(IN, HIDDEN, OUT, **options),
        sequence_parallel,
        gated=True,
    )


def _plain(sequence_parallel, hidden):
    return Case(
        lambda group: mlps.ParallelMLP(
            IN, hidden, OUT, process_group=group, sequence_parallel=sequence_parallel
        ),
        lambda: mlps.Mlp(IN, hidden, OUT),
        sequence_parallel,
    )


def _cases():
    for sp in (True, False):
        for activation, level in itertools.product(("gelu_approx", "relu", "sqrelu"), (0, 2)):
            yield f"fused {activation} {level} {sp}", _fused(sp, activation, level)
        for name in ("sigmoid", "silu", "gelu"):
            yield f"gated {name} {sp}", _gated(sp, name)
        yield f"plain {sp}", _plain(sp, HIDDEN)
        yield f"uneven {sp}", _plain(sp, 7)
        yield f"nothing for the second {sp}", _plain(sp, 1)


CASES = dict(_cases())


def _whole(case):
    torch.manual_seed(11)
    return case.whole()


def _share(name, parameter, rank, gated):
    """What a rank holds of the whole module's parameter."""
    if name == "fc2.bias":
        return parameter if rank == 0 else None
    if name == "fc2.weight":
        return parameter.tensor_split(SIZE, dim=1)[rank]
    if gated:
        halves = parameter.unflatten(0, (2, -1))
        return halves.tensor_split(SIZE, dim=1)[rank].flatten(0, 1)
    return parameter.tensor_split(SIZE)[rank]


def _inputs():
    torch.manual_seed(12)
    return torch.randn(ROWS, 3, IN), torch.randn(ROWS, 3, OUT)


def _rows(tensor, rank, sequence_parallel):
    return tensor.chunk(SIZE)[rank] if sequence_parallel else tensor


def _run_case(case, rank, group):
    whole, model = _whole(case), case.parallel(group)
    mine = {n: _share(n, p, rank, case.gated) for n, p in whole.state_dict().items()}
    model.load_state_dict({n: p for n, p in mine.items() if p is not None})
    x, gradient = (_rows(t, rank, case.sequence_parallel) for t in _inputs())
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(gradient)
    results = {"out": out.detach(), "x": x.grad}
    return {**results, **{n: p.grad for n, p in model.named_parameters()}}


def _grouped_calls(rank, group):
    """FusedMLP and FusedDense with the group as an argument of the call: shares of rows."""
    found = {}
    for name, model, width in (
        ("mlp", mlps.FusedMLP(IN, HIDDEN, OUT, return_residual=True), OUT),
        ("dense", fused_dense.FusedDense(IN, HIDDEN, return_residual=True), HIDDEN),
    ):
        for parameter in model.parameters():  # the same on both ranks, each takes it as its share
            nn.init.constant_(parameter, 0.1)
        x = _rows(_inputs()[0], rank, True).clone().requires_grad_()
        out, residual = model(x, process_group=group)
        assert residual is x and out.shape[-1] == width
        (out.sum() + 2 * residual.sum()).backward()
        found[name] = [out.detach(), x.grad, *(p.grad for p in model.parameters())]
    return found


def _collectives(rank, group):
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = (torch.arange(8.0).reshape(4, 2) + 10 * rank).to(dtype)
        for name in ("all_gather", "reduce_scatter", "all_reduce"):
            leaf = x.clone().requires_grad_()
            out = getattr(distributed, name)(leaf, group)
            (out * (torch.arange(float(out.numel())).view_as(out) + rank)).sum().backward()
            raw, handle = getattr(distributed, f"{name}_raw")(x.clone(), group, async_op=True)
            handle.wait()
            torch.testing.assert_close(raw, out.detach())
            torch.testing.assert_close(leaf.detach(), x)  # no collective writes to its input ...
            found[name, dtype] = [out.detach(), leaf.grad]
    whole = torch.ones(3) * (rank + 1)
    summed, _ = distributed.all_reduce_raw(whole, group)
    found["in place"] = summed is whole and whole.tolist() == [
        3,
        3,
        3,
    ]  # ... but upstream's raw one
    strided = torch.ones(4, 2)[:, 0]
    found["of a copy"] = distributed.all_reduce_raw(strided, group)[0] is not strided
    empty = (
        distributed.all_gather(torch.ones(0, 3), group),
        distributed.reduce_scatter(torch.ones(0, 3), group),
    )
    found["empty"] = [tuple(t.shape) for t in empty]
    return found


def _second_derivatives(rank, group):
    """d/dx of |d/dx sum(collective(x)^3)|^2."""
    found = {}
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        x = (torch.arange(4.0) + rank + 1).requires_grad_()
        out = getattr(distributed, name)(x, group)
        (dx,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)
        (found[name],) = torch.autograd.grad(dx.square().sum(), x)
    return found


class _Marked(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.shared = nn.Parameter(torch.full((3,), float(rank + 5)))
        self.shared._shared_params = True
        self.own = nn.Parameter(torch.full((3,), float(rank)))
        if rank == 0:  # ranks need not have the same parameters
            self.a_bias = nn.Parameter(torch.zeros(2))
        self.norm = nn.Parameter(torch.ones(2, 2))
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        for parameter in (self.norm, self.low, self.frozen):
            parameter._sequence_parallel = True


def _parameters(rank, group):
    model = _Marked(rank)
    distributed.sync_shared_params(model, group)
    model.norm.grad = torch.full((2, 2), rank + 1.0)
    model.low.grad = torch.full((3,), rank + 2.0, dtype=torch.bfloat16)
    distributed.allreduce_sequence_parallel_grad(model, group)
    return [t.detach() for t in (model.shared, model.own, model.norm.grad, model.low.grad)]


def _message(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def _refusals(rank, group):
    alone = dist.new_group([0])
    model = _Marked(rank)
    return {
        "rows": _message(lambda: distributed.reduce_scatter(torch.ones(3, 2), group)),
        "scalar": _message(lambda: distributed.all_gather(torch.tensor(1.0), group)),
        "member": _message(lambda: fused_dense.ColumnParallelLinear(4, 4, alone)),
        "uneven": _message(lambda: mlps.ParallelGatedMlp(4, group, 3, multiple_of=1)),
        "multiple": _message(lambda: fused_dense.RowParallelLinear(9, 4, group, multiple_of=2)),
        "column": _message(lambda: fused_dense.ColumnParallelLinear(4, 9, group, multiple_of=2)),
        "gradient": _message(lambda: distributed.allreduce_sequence_parallel_grad(model, group)),
        "size": _message(lambda: mlps.ParallelMLP(IN, process_group=group)(torch.ones(2, IN + 1))),
    }


def _default_group(rank, group):
    """None stands for the default group, as everywhere in torch.distributed."""
    torch.manual_seed(1)
    column = fused_dense.ColumnParallelLinear(IN, HIDDEN, None)
    row = fused_dense.RowParallelLinear(HIDDEN, OUT, None, sequence_parallel=False)
    parts = [tuple(column.weight.shape), tuple(row.weight.shape), row.bias is not None]
    gathered = column(torch.ones(2, IN))
    distributed.sync_shared_params(_Marked(rank), None)
    return [*parts, tuple(gathered.shape), tuple(row(gathered).shape)]


def _autocast(rank, group):
    model = mlps.ParallelFusedMLP(IN, HIDDEN, OUT, process_group=group)
    x = _rows(_inputs()[0], rank, True).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    out.float().sum().backward()
    return [out.dtype, x.grad.dtype, model.fc1.weight.grad.dtype]


def _saved_rows(rank, group):
    """The backward gathers the rows again: a rank keeps its own alone."""
    model = mlps.ParallelFusedMLP(IN, HIDDEN, OUT, process_group=group, checkpoint_lvl=2)
    saved: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        model(_rows(_inputs()[0], rank, True))
    return [shape for shape in saved if len(shape) > 2]


OTHERS = {
    f.__name__: f
    for f in (
        _grouped_calls,
        _collectives,
        _second_derivatives,
        _parameters,
        _refusals,
        _default_group,
        _autocast,
        _saved_rows,
    )
}


def _worker(rank):
    group = dist.group.WORLD
    results = {name: _run_case(case, rank, group) for name, case in CASES.items()}
    results.update({name: function(rank, group) for name, function in OTHERS.items()})
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two processes found."""
    return run_processes(_worker, tmp_path_factory.mktemp("ranks"), count=SIZE)


@pytest.mark.parametrize("name", CASES)
def test_parallel_mlps(ranks, name):
    case = CASES[name]
    whole = _whole(case)
    x, gradient = _inputs()
    x.requires_grad_()
    out = whole(x)
    out.backward(gradient)
    for rank, results in enumerate(ranks):
        found = results[name]
        expected = {n: _share(n, p.grad, rank, case.gated) for n, p in whole.named_parameters()}
        expected = {n: p for n, p in expected.items() if p is not None}
        for key, tensor in (("out", out.detach()), ("x", x.grad)):
            expected[key] = _rows(tensor, rank, case.sequence_parallel)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, msg=lambda m, k=key: f"{k}: {m}")


def test_group_as_an_argument_of_the_call(ranks):
    x = _inputs()[0].requires_grad_()
    model = mlps.FusedMLP(IN, HIDDEN, OUT)
    dense = fused_dense.FusedDense(IN, HIDDEN)
    for parameter in (*model.parameters(), *dense.parameters()):
        nn.init.constant_(parameter, 0.1)
    for name, layer, factor in (("mlp", model, SIZE), ("dense", dense, 1)):
        x.grad = None
        for parameter in layer.parameters():
            parameter.grad = None
        out = layer(x) * factor  # the MLP sums over the ranks; a dense layer's outputs lie apart
        ((out if name == "mlp" else out * SIZE).sum() + 2 * x.sum()).backward()
        for rank, results in enumerate(ranks):
            found_out, found_dx, *found = results["_grouped_calls"][name]
            rows = _rows(out.detach(), rank, True) if name == "mlp" else out.detach()
            torch.testing.assert_close(found_out, rows)
            torch.testing.assert_close(found_dx, _rows(x.grad, rank, True))
            for gradient, parameter in zip(found, layer.parameters()):
                torch.testing.assert_close(gradient, parameter.grad / SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["all_gather", "reduce_scatter", "all_reduce"])
def test_collectives(ranks, name, dtype):
    inputs = [(torch.arange(8.0).reshape(4, 2) + 10 * rank).to(dtype) for rank in range(SIZE)]
    total = sum(inputs)
    outs = {"all_gather": [torch.cat(inputs)] * SIZE, "all_reduce": [total] * SIZE}
    outs["reduce_scatter"] = total.chunk(SIZE)
    counts = [torch.arange(float(out.numel())).view_as(out) for out in outs[name]]
    weights = [(count + rank).to(dtype) for rank, count in enumerate(counts)]
    gradients = {"all_gather": sum(weights).chunk(SIZE), "all_reduce": weights}
    gradients["reduce_scatter"] = [torch.cat(weights)] * SIZE
    for rank, results in enumerate(ranks):
        out, gradient = results["_collectives"][name, dtype]
        assert torch.equal(out, outs[name][rank])
        assert torch.equal(gradient, gradients[name][rank])


def test_where_the_sums_are(ranks):
    for results in ranks:
        found = results["_collectives"]
        assert found["in place"] and found["of a copy"]
        assert found["empty"] == [(0, 3), (0, 3)]


def test_second_derivatives_of_collectives(ranks):
    """The function of both ranks' inputs, differentiated in one process."""
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        inputs = [(torch.arange(4.0) + rank + 1).requires_grad_() for rank in range(SIZE)]
        gathered = torch.cat(inputs) if name == "all_gather" else sum(inputs)
        # Every rank differentiates its own loss; the ranks' gradients meet in the backward.
        times = SIZE if name == "all_gather" else 1
        losses = times * (gathered**3).sum()
        gradients = torch.autograd.grad(losses, inputs, create_graph=True)
        for rank, results in enumerate(ranks):
            if name == "all_reduce":  # each rank's gradient is its own loss's
                (expected,) = torch.autograd.grad(
                    gradients[rank].square().sum(), inputs[rank], retain_graph=True
                )
            else:
                both = sum(g.square().sum() for g in gradients)
                (expected,) = torch.autograd.grad(both, inputs[rank], retain_graph=True)
            torch.testing.assert_close(results["_second_derivatives"][name], expected)


def test_shared_parameters_and_their_gradients(ranks):
    for rank, results in enumerate(ranks):
        shared, own, norm, half = results["_parameters"]
        assert shared.tolist() == [5, 5, 5] and own.tolist() == [rank] * 3
        assert norm.tolist() == [[3, 3], [3, 3]] and half.tolist() == [5, 5, 5]
        assert half.dtype == torch.bfloat16


def test_refusals(ranks):
    first, second = (results["_refusals"] for results in ranks)
    member = "process_group: expected a group that this process belongs to"
    assert first.pop("member") == "nothing was raised" and second.pop("member").startswith(member)
    assert first == second
    starts = {
        "rows": "input_: expected a first dimension that is a multiple of the 2 processes",
        "scalar": "input_: expected at least one dimension",
        "uneven": "process_group: expected a size that divides the 3 hidden features, got 2",
        "multiple": "in_features (9) must be a multiple of 2",
        "column": "out_features (9) must be a multiple of 2",
        "gradient": "model: expected a gradient in low, got None",
        "size": f"x: expected (..., {IN}) for weight",
    }
    for key, text in first.items():
        assert text.startswith(starts[key]), (key, text)
    assert first["rows"].endswith("got (3, 2)")


def test_no_group_is_the_default_one(ranks):
    for rank, results in enumerate(ranks):
        half = HIDDEN // SIZE
        assert results["_default_group"] == [
            (half, IN),
            (OUT, half),
            rank == 0,
            (2 * SIZE, half),
            (2 * SIZE, OUT),
        ]


def test_dtypes_under_autocast(ranks):
    for results in ranks:
        assert results["_autocast"] == [torch.bfloat16, torch.float32, torch.float32]


def test_rows_are_gathered_again_for_the_backward(ranks):
    for results in ranks:
        assert results["_saved_rows"] == [(ROWS // SIZE, 3, IN)]


def test_shares():
    share = functools.partial(distributed.get_dim_for_local_rank, 10, 3)
    assert [share(rank) for rank in range(3)] == [4, 3, 3]
    assert [share(rank, multiple_of=5) for rank in range(3)] == [5, 5, 0]
    with pytest.raises(ValueError, match="dim: expected a multiple of 4, got 10"):
        share(0, multiple_of=4)


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 16))
def test_shares_make_the_whole(units, size, multiple_of):
    share = functools.partial(distributed.get_dim_for_local_rank, units * multiple_of, size)
    shares = [share(rank, multiple_of) for rank in range(size)]
    assert sum(shares) == units * multiple_of
    assert all(part % multiple_of == 0 for part in shares)
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[-1] <= multiple_of


def test_without_torch_distributed_set_up():
    with pytest.raises(ValueError, match="process_group: expected a group .* got None"):
        mlps.ParallelFusedMLP(8)
    for layer in (fused_dense.ColumnParallelLinear, fused_dense.RowParallelLinear):
        for group in (None, "gloo"):
            with pytest.raises(ValueError, match=f"process_group: .* initialized .* got .?{group}"):
                layer(8, 8, group)
