"""The route through PyTorch's memory-efficient attention, as every torch since 2.0 declares it.

A stand-in takes the place of torch's operators: it takes a call as the schema of one torch does and
computes in float64 by the conventions of the CUDA kernels. What they leave unwritten it leaves NaN;
what they get wrong or cannot read it does not accept.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import expected_of, inputs_of, problem_of, torch_version
from torch import Tensor

import anyflash
from anyflash._python_ops import aten_efficient, math
from anyflash._python_ops.arguments import AttentionArgs, BackwardArgs
from anyflash.testing import CORNER, CORRECTNESS, Case, assert_close

_FORWARD = "aten::_efficient_attention_forward"
_BACKWARD = "aten::_efficient_attention_backward"
_QKV = "Tensor query, Tensor key, Tensor value"
_STARTS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_STATES = "Tensor philox_seed, Tensor philox_offset"
_LONGEST = "SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k"

# By torch version: the schemas of forward and backward, where they changed.
SCHEMAS = {
    200: (
        f"{_FORWARD}({_QKV}, {_STARTS}, int? max_seqlen_q, bool compute_log_sumexp=False, "
        "bool causal=False) -> (Tensor, Tensor)",
        f"{_BACKWARD}(Tensor grad_out_, {_QKV}, Tensor out, Tensor logsumexp, "
        "bool is_causal=False, bool chunk_grad_outputs=False) -> (Tensor, Tensor, Tensor)",
    ),
    201: (
        f"{_FORWARD}({_QKV}, Tensor? bias, {_STARTS}, int? max_seqlen_q, float dropout_p, "
        "int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, "
        "Tensor? causal_diagonal=None, Tensor? seqlen_k=None) "
        f"-> (Tensor output, Tensor logsumexp, {_STATES})",
        f"{_BACKWARD}(Tensor grad_out_, {_QKV}, Tensor? bias, Tensor out, {_STARTS}, "
        "int max_seqlen_k, int max_seqlen_q, Tensor logsumexp, float dropout_p, "
        f"{_STATES}, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, "
        "int? num_splits_key=None) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    202: (
        f"{_FORWARD}({_QKV}, Tensor? bias, {_STARTS}, int? max_seqlen_q, float dropout_p, "
        "int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, "
        "Tensor? causal_diagonal=None, Tensor? seqlen_k=None) "
        f"-> (Tensor output, Tensor logsumexp, {_STATES}, {_LONGEST})",
        f"{_BACKWARD}(Tensor grad_out_, {_QKV}, Tensor? bias, Tensor out, {_STARTS}, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, "
        f"{_STATES}, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, "
        "int? num_splits_key=None) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    203: (
        f"{_FORWARD}({_QKV}, Tensor? bias, {_STARTS}, int? max_seqlen_q, int? max_seqlen_k, "
        "float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, "
        "float? scale=None, Tensor? causal_diagonal=None, Tensor? seqlen_k=None) "
        f"-> (Tensor output, Tensor logsumexp, {_STATES}, {_LONGEST})",
        f"{_BACKWARD}(Tensor grad_out_, {_QKV}, Tensor? bias, Tensor out, {_STARTS}, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, "
        f"{_STATES}, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, "
        "int? num_splits_key=None) -> (Tensor, Tensor, Tensor, Tensor)",
    ),
    204: (
        f"{_FORWARD}({_QKV}, Tensor? bias, {_STARTS}, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
        "float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, "
        "float? scale=None, Tensor? seqlen_k=None, int? window_size=None) "
        f"-> (Tensor output, Tensor logsumexp, {_STATES}, {_LONGEST})",
        f"{_BACKWARD}(Tensor grad_out_, {_QKV}, Tensor? bias, Tensor out, {_STARTS}, "
        "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, "
        f"{_STATES}, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, "
        "int? num_splits_key=None, int? window_size=None, bool shared_storage_dqdkdv=False) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
    ),
}  # fmt: skip

_TYPES = {"Tensor": Tensor, "int": int, "SymInt": int, "float": float, "bool": bool}


class Operator:
    """An operator of some torch, as its schema declares it."""

    def __init__(self, schema: str, compute: Any) -> None:
        self._schema = torch._C.parse_schema(schema)
        self.default = self
        self.compute = compute
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *values: Any, **named: Any) -> Any:
        parameters = self._schema.arguments
        assert len(values) <= sum(not p.kwarg_only for p in parameters)
        bound = {p.name: value for p, value in zip(parameters, values)}
        assert not bound.keys() & named.keys()
        bound.update(named)
        for parameter in parameters:
            kind = str(parameter.type)
            if parameter.name not in bound:
                assert parameter.has_default_value(), f"missing: {parameter.name}"
                bound[parameter.name] = parameter.default_value
            if bound[parameter.name] is None:
                assert kind.startswith("Optional"), f"None for {parameter.name}"
            else:
                wanted = _TYPES[kind.replace("Optional[", "").rstrip("]")]
                assert type(bound[parameter.name]) is wanted, parameter.name
        assert bound.keys() == {p.name for p in parameters}, "unknown arguments"
        self.calls.append(bound)
        return self.compute(**bound)


class Sequence(NamedTuple):
    """Where one sequence lies in q and in k."""

    entry: int  # of the batch
    rows: slice
    keys: slice
    number: int  # of the log-sum-exp

    def scores(self, x: dict[str, Any]) -> Tensor:
        """(heads, rows, keys), masked keys -inf."""
        q, k = x["query"][self.entry, self.rows], x["key"][self.entry, self.keys]
        scale = x.get("scale", q.shape[-1] ** -0.5)
        s = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
        if x.get("bias") is not None:
            s += x["bias"][self.entry].double()
        kind = x.get("custom_mask_type", int(x.get("causal", x.get("is_causal", False))))
        nq, nk = s.shape[1:]
        assert kind in (0, 1) or nq <= nk, "more queries than keys are counted wrongly"
        shift = (nk, 0, nk - nq)[kind]  # no mask, from the top left, from the bottom right
        hidden = torch.arange(nk) > torch.arange(nq)[:, None] + shift
        return s.masked_fill(hidden, float("-inf"))


def _sequences(x: dict[str, Any]) -> list[Sequence]:
    """Of a call whose tensors the kernels can read."""
    q, k, v, bias = x["query"], x["key"], x["value"], x.get("bias")
    for tensor in (q, k, v):
        assert tensor.dim() == 4 and tensor.stride(3) == 1 and tensor.stride(2) != 0
        for step in (tensor.data_ptr(), *(n * tensor.element_size() for n in tensor.stride()[:3])):
            assert step % 16 == 0, "rows are not aligned"
        assert tensor.is_contiguous() or "scale" in x
    assert q.shape[2] == k.shape[2] == v.shape[2] and q.dtype == k.dtype == v.dtype
    assert x.get("dropout_p", 0.0) == 0.0
    if bias is not None:
        assert x["cu_seqlens_q"] is None, "not beside packed sequences"
        assert bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert bias.dtype == q.dtype and bias.stride(3) == 1
        assert bias.stride(2) * bias.element_size() % 16 == 0
    if x.get("cu_seqlens_q") is None:
        return [Sequence(b, slice(None), slice(None), b) for b in range(q.shape[0])]
    assert "scale" in x, "torch 2.0 writes the log-sum-exp of the second sequence out of bounds"
    assert q.shape[0] == 1 and x["cu_seqlens_q"].dtype == x["cu_seqlens_k"].dtype == torch.int32
    starts, key_starts = x["cu_seqlens_q"].tolist(), x["cu_seqlens_k"].tolist()
    return [
        Sequence(0, slice(*rows), slice(*keys), i)
        for i, (rows, keys) in enumerate(
            zip(zip(starts, starts[1:]), zip(key_starts, key_starts[1:]))
        )
    ]


def _padded(rows: int) -> int:
    return -(-rows // 32) * 32


def compute_forward(**x: Any) -> tuple[Tensor, ...]:
    q, v = x["query"], x["value"]
    sequences = _sequences(x)
    assert x["compute_log_sumexp"]
    longest = q.shape[1]
    if x["cu_seqlens_q"] is not None:
        longest = x["max_seqlen_q"]
        assert longest <= q.shape[1] and x.get("max_seqlen_k", 0) <= x["key"].shape[1]
    out = q.new_full((*q.shape[:3], v.shape[3]), float("nan"))
    lse = torch.full((len(sequences), q.shape[2], _padded(longest)), float("nan"))
    for sequence in sequences:
        s = sequence.scores(x)
        nq = s.shape[1]
        lse[sequence.number, :, nq : _padded(nq)] = float("inf")
        lse[sequence.number, :, :nq] = s.logsumexp(-1) if s.shape[2] else float("-inf")
        if s.shape[2]:
            values = v[sequence.entry, sequence.keys].double()
            rows = torch.einsum("hqk,khd->qhd", s.softmax(-1), values)
            out[sequence.entry, sequence.rows] = rows.to(out.dtype)
    return out, lse


def compute_backward(**x: Any) -> tuple[Tensor, ...]:
    q, k, v, dout, out, lse = (
        x[name] for name in ("query", "key", "value", "grad_out_", "out", "logsumexp")
    )
    assert out.is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    assert dout.shape == out.shape == (*q.shape[:3], v.shape[3])
    sequences = _sequences(x)
    longest = q.shape[1]
    if x.get("cu_seqlens_q") is not None:
        longest = x["max_seqlen_q"]
        assert 0 < x["max_seqlen_q"] <= q.shape[1] and 0 < x["max_seqlen_k"] <= k.shape[1]
        names = list(x)
        if names.index("max_seqlen_k") < names.index("max_seqlen_q"):
            assert x["max_seqlen_k"] == x["max_seqlen_q"], "which is which?"
    assert lse.shape == (len(sequences), q.shape[2], _padded(longest))
    dq, dk, dv = (torch.full_like(t, float("nan"), memory_format=torch.contiguous_format)
                  for t in (q, k, v))  # fmt: skip
    for sequence in sequences:
        entry, rows, keys, number = sequence
        s = sequence.scores(x)
        nq = s.shape[1]
        assert (lse[number, :, nq : _padded(nq)] == float("inf")).all(), "read as rows"
        if 0 in s.shape:
            continue
        q_, k_, v_ = q[entry, rows].double(), k[entry, keys].double(), v[entry, keys].double()
        dout_, out_ = dout[entry, rows].double(), out[entry, rows].double()
        p = (s - lse[number, :, :nq, None].double()).exp()
        dp = torch.einsum("qhd,khd->hqk", dout_, v_)
        delta = (dout_ * out_).sum(-1).transpose(0, 1)[..., None]
        ds = p * (dp - delta) * x.get("scale", q.shape[-1] ** -0.5)
        dq[entry, rows] = torch.einsum("hqk,khd->qhd", ds, k_).to(dq.dtype)
        dk[entry, keys] = torch.einsum("hqk,qhd->khd", ds, q_).to(dk.dtype)
        dv[entry, keys] = torch.einsum("hqk,qhd->khd", p, dout_).to(dv.dtype)
    return dq, dk, dv


class Operators(NamedTuple):
    forward: Operator
    backward: Operator


@pytest.fixture(params=SCHEMAS, ids=lambda version: f"torch{version}")
def version(request) -> int:
    return request.param


@pytest.fixture
def operators(version, monkeypatch) -> Operators:
    """Those of one torch, on a T4."""
    schemas = zip(SCHEMAS[version], (compute_forward, compute_backward))
    stand_ins = Operators(*(Operator(*both) for both in schemas))
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", stand_ins.forward)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_backward", stand_ins.backward)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    return stand_ins


def _arguments(case: Case, same_starts: bool = True) -> AttentionArgs:
    """The case as the route gets it; with ``same_starts`` one tensor says where q and k start."""
    inputs = inputs_of(case, "cpu")
    q, k, v = inputs.qkv
    o = inputs.options
    starts_q, starts_k = o.get("cu_seqlens_q"), o.get("cu_seqlens_k")
    if starts_q is not None and same_starts and torch.equal(starts_q, starts_k):
        starts_k = starts_q
    scale = q.shape[-1] ** -0.5 if case.softmax_scale is None else case.softmax_scale
    args = AttentionArgs(
        q, k, v, starts_q, starts_k, o.get("max_seqlen_q", 0), o.get("max_seqlen_k", 0),
        None, None, None, None, o.get("bias"), None, None, 0.0, scale, *case.window, 0.0,
        True,
    )  # fmt: skip
    args.normalise(case.causal)
    return args


def _gradients_in(case: Case, out: Tensor, lse: Tensor) -> BackwardArgs:
    return BackwardArgs(inputs_of(case, "cpu").dout, out, lse, None, False, False, False)


def _is_offered(case: Case, version: int) -> bool:
    """Whether the decision gives the case to the route, on a GPU that has its dtype."""
    problem = {**problem_of(case, "forward", "cpu", "aten_efficient"), "device": "cuda", "sm": 80}
    return anyflash.decide({**problem, "torch_version": version})["route"] == "aten_efficient"


# What the shared cases lack: fp16 with a scale or unequal head dims, one query of several heads,
# empty sequences without a causal mask or of equal lengths.
MORE = [
    Case("fp16_d128_causal", dtype="fp16", head_dim=128, heads=2, heads_k=2, causal=True),
    Case("fp16_scale", dtype="fp16", head_dim=64, softmax_scale=0.05),
    Case("fp16_scale_above", dtype="fp16", head_dim=64, softmax_scale=0.5),
    Case("head_dim_v_64_fp16", dtype="fp16", head_dim=64, head_dim_v=32, heads_k=2),
    Case("expanded_heads_one_query", seqlens_q=(1,), seqlens_k=(9,), dtype="fp16", head_dim=64),
    Case(
        "packed_keys_longer",
        layout="packed",
        seqlens_q=(7, 0, 20, 5),
        seqlens_k=(19, 8, 40, 0),
        slack=2,
        head_dim=64,
    ),
    Case(
        "packed_self_causal_empty",
        layout="packed",
        seqlens_q=(5, 0, 40),
        seqlens_k=(5, 0, 40),
        causal=True,
        head_dim=64,
    ),
]
CASES = [
    case
    for case in CORRECTNESS + CORNER + MORE
    if case.layout in ("dense", "packed") and case.differentiable
]

# Cases that the decision gives to the route, and the route to math: for every torch...
FOR_MATH = {
    "no_queries",
    "no_keys",
    "packed_all_empty",
    "packed_bias",
    "scale_zero",
    "scale_negative",
    "causal_longer_q",
    "transposed_bf16_longer_q",
    "one_key",
    "packed_causal",
    "packed_empty_sequences",
    "packed_many_short",
}
# ...and for torch 2.0, whose causal masks need equal lengths, and whose scale is fixed.
FOR_MATH_OF_200 = {
    "causal_longer_k",
    "causal_longer_k_bf16",
    "window_zero_right",
    "one_query",
    "fp16_scale_above",
    "large_scores_fp16",
}
# A log-sum-exp in fp32 at the end of the range has no digits left for the weights of such a row.
NO_GRADIENTS = {"bias_lowest", "bias_lowest_parts", "bias_lowest_bf16"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers(case, version, operators):
    if not _is_offered(case, version):
        return
    args = _arguments(case)
    out, lse = aten_efficient.forward(args)
    expected = expected_of(case, "cpu")
    assert_close(out, expected.exact["out"], expected.low["out"], f"{case.name} out")
    assert_close(lse, expected.exact["lse"], expected.low["lse"], f"{case.name} lse")
    for_math = FOR_MATH | (FOR_MATH_OF_200 if version == 200 else set())
    assert bool(operators.forward.calls) == (case.name not in for_math)

    if case.name in NO_GRADIENTS:
        return
    gradients = aten_efficient.backward(args, _gradients_in(case, out, lse))
    expected = expected_of(case, "cpu", gradients=True, dlse=False)
    for name in "qkv":
        found = getattr(gradients, f"d{name}")
        assert found.stride() == torch.empty_like(getattr(args, name)).stride()
        assert_close(found, expected.exact[name], expected.low[name], f"{case.name} d{name}")
    ambiguous = version == 201 and args.packed and args.longest_q != args.longest_k
    assert bool(operators.backward.calls) == (case.name not in for_math and not ambiguous)


@st.composite
def cases(draw) -> Case:
    """Any problem of the kinds that the route computes, small."""
    layout = draw(st.sampled_from(["dense", "packed"]))
    batch = draw(st.integers(1, 3))
    lengths = st.lists(st.integers(0, 70), min_size=batch, max_size=batch)
    seqlens_q, seqlens_k = draw(lengths), draw(lengths)
    if layout == "dense":
        seqlens_q, seqlens_k = seqlens_q[:1] * batch, seqlens_k[:1] * batch
    heads_k = draw(st.integers(1, 2))
    return Case(
        name=f"random_{draw(st.integers(0, 1 << 30))}",
        seqlens_q=tuple(seqlens_q),
        seqlens_k=tuple(seqlens_q if draw(st.booleans()) else seqlens_k),
        heads=heads_k * draw(st.integers(1, 3)),
        heads_k=heads_k,
        head_dim=8 * draw(st.integers(1, 4)),
        head_dim_v=8 * draw(st.integers(0, 4)),
        layout=layout,
        causal=draw(st.booleans()),
        bias=draw(st.sampled_from(["", "", "full", "head", "key", "plane"])),
        softmax_scale=draw(st.sampled_from([None, 0.05, 0.7])),
        strides=draw(st.sampled_from(["contiguous", "transposed", "sliced"])),
        slack=draw(st.integers(0, 3)) if layout == "packed" else 0,
    )


@given(case=cases())
@settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
)
def test_numbers_are_those_of_math(operators, version, case):
    if not _is_offered(case, version):
        return
    args = _arguments(case)
    results = aten_efficient.forward(args)
    expected = math.forward(args)
    for found, exact in zip(results, expected):
        torch.testing.assert_close(found, exact, atol=2e-5, rtol=2e-5)
    gradients = aten_efficient.backward(args, _gradients_in(case, *expected))
    exact_gradients = math.backward(args, _gradients_in(case, *expected))
    for name in ("dq", "dk", "dv"):
        found, exact = getattr(gradients, name), getattr(exact_gradients, name)
        torch.testing.assert_close(found, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("version", [201, 203, 204], indirect=True)
def test_longest_lengths_are_only_bounds(version, operators):
    case = next(case for case in CASES if case.name == "packed_keys_longer")
    args = _arguments(case)
    exact = aten_efficient.forward(args)
    args.max_seqlen_q = args.max_seqlen_k = 1 << 20
    for found, expected in zip(aten_efficient.forward(args), exact):
        assert torch.equal(found, expected)
    assert len(operators.forward.calls) == 2


@pytest.mark.parametrize("version", SCHEMAS)
def test_every_torch_is_given_some_of_the_cases(version):
    offered = {case.name for case in CASES if _is_offered(case, version)}
    assert {"causal", "gqa", "head_dim_v", "dense_scale", "mqa_fp16"} <= offered
    later = {"packed_self_causal", "packed_slack", "bias_full", "bias_minus_inf_causal_fp16"}
    assert later <= offered if version > 200 else not later & offered


@pytest.mark.parametrize("version", [201, 204], indirect=True)
def test_causal_masks_of_packed_sequences_need_one_tensor_of_starts(version, operators):
    """Lengths are on the device: only where both are the same tensor they are known to be equal."""
    case = next(case for case in CASES if case.name == "packed_self_causal")
    apart = aten_efficient.forward(_arguments(case, same_starts=False))
    assert not operators.forward.calls
    together = aten_efficient.forward(_arguments(case))
    assert operators.forward.calls
    for x, y in zip(apart, together):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("version", [200, 201], indirect=True)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
def test_wide_heads_of_torch_2_0(version, operators, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    case = next(case for case in CASES if case.name == "fp16_d128_causal")
    small = version == 200 and capability in ((8, 6), (8, 9))
    for dims in ({}, {"head_dim": 64, "head_dim_v": 128}):
        aten_efficient.forward(_arguments(dataclasses.replace(case, **dims)))
        assert bool(operators.forward.calls) != small
    aten_efficient.forward(_arguments(dataclasses.replace(case, head_dim=64)))
    assert operators.forward.calls


def test_heads_of_one_storage_are_copied(version, operators):
    """Keys expanded over the heads, with one query: the kernels take that for something else."""
    case = next(case for case in CASES if case.name == "expanded_heads_one_query")
    args = _arguments(case)
    args.k, args.v = (x[:, :, :1].expand_as(x) for x in (args.k, args.v))
    out, _ = aten_efficient.forward(args)
    assert operators.forward.calls
    q, k, v = (x.double().transpose(1, 2) for x in (args.q, args.k, args.v))
    exact = (q @ k.transpose(-1, -2) * args.softmax_scale).softmax(-1) @ v
    torch.testing.assert_close(out.double(), exact.transpose(1, 2), atol=2e-3, rtol=2e-3)


def test_schema_of_this_torch():
    version = max(known for known in SCHEMAS if known <= torch_version())
    for schema in map(torch._C.parse_schema, SCHEMAS[version]):
        assert schema in torch._C._jit_get_schemas_for_operator(schema.name)


@pytest.mark.parametrize("name", ["causal", "dense_scale", "packed_self_causal", "bias_full"])
def test_this_torch_takes_the_calls(name):
    """Its operators have no CPU kernels: a call that fits the schema gets as far as saying so."""
    case = next(case for case in CASES if case.name == name)
    if not _is_offered(case, torch_version()):
        return
    args = _arguments(case)
    with pytest.raises(NotImplementedError, match="_efficient_attention_forward.*CPU"):
        aten_efficient.forward(args)
    exact = expected_of(case, "cpu").exact
    grad = _gradients_in(case, exact["out"].to(args.q.dtype), exact["lse"].float())
    with pytest.raises(NotImplementedError, match="_efficient_attention_backward.*CPU"):
        aten_efficient.backward(args, grad)
