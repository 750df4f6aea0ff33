"""Exports to ONNX compute in onnxruntime what they compute here; what ONNX cannot say is
refused."""

from __future__ import annotations

import pytest
import torch
from graph_cases import CASES, function_of, make
from graph_cases import results as tensors_of
from support import torch_version
from torch.export import Dim

import anyflash
from anyflash.integrations import onnx as integration

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(torch_version() < 208, reason="torch.onnx.ops"),
]


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.module = next(iter(getattr(function, "args", ())), None)  # has the parameters
        self.function = function

    def forward(self, *args):
        return tuple(tensors_of(self.function(*args)))


def _nodes(program):
    return [node.op_type for node in program.model.graph]


def _run(program, args):
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [i.name for i in session.get_inputs()]
    given = [x.detach().numpy() for x in args if isinstance(x, torch.Tensor)]
    return [torch.from_numpy(x) for x in session.run(None, dict(zip(names, given)))]


def _check(function, args, **options):
    program = integration.export(Module(function), args, verbose=False, **options)
    _compare(program, function, args)
    return program


def _compare(program, function, args):
    with torch.no_grad():
        expected = tensors_of(function(*args))
    for a, b in zip(_run(program, args), expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


INF = float("inf")
BOOL = torch.ones(2, 1, 6, 9, dtype=torch.bool).tril(2)
BOOL[1, 0, 3] = False  # a row that sees nothing
HIDING = torch.zeros(1, 1, 6, 9).masked_fill(BOOL[:1].logical_not(), -INF)
SHORT = torch.tensor([9, 2], dtype=torch.int32)
OPTIONS = {
    "plain": {},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "window to the left": {"window_size": (3, -1)},
    "causal window": {"causal": True, "window_size": (1, 5)},
    "softcap": {"softcap": 1.5},
    "softcap, causal": {"softcap": 1.5, "causal": True},
    "softcap, ALiBi": {"softcap": 1.5, "alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.9])},
    "ALiBi, causal": {"causal": True, "alibi_slopes": torch.rand(2, 4)},
    "bias": {"bias": torch.randn(2, 4, 6, 9)},
    "bias of a plane, causal": {"bias": torch.randn(6, 9), "causal": True},
    "softcap, bias": {"softcap": 1.5, "bias": torch.randn(1, 4, 6, 9)},
    "bias of infinities": {"bias": HIDING},
    "boolean mask": {"bias": BOOL},
    "key lengths": {"seqused_k": SHORT},
    "key lengths, causal": {"seqused_k": SHORT, "causal": True},
    "key lengths, window": {"seqused_k": SHORT, "window_size": (2, 0)},
    "left padding": {"leftpad_k": torch.tensor([0, 4], dtype=torch.int32), "causal": True},
}


def _qkv(rows=6, keys=9, heads_k=2, dim_v=16):
    torch.manual_seed(0)
    shapes = ((2, rows, 4, 16), (2, keys, heads_k, 16), (2, keys, heads_k, dim_v))
    return tuple(2 * torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention(options):
    """Grouped heads, fewer rows than keys."""
    program = _check(lambda q, k, v: anyflash.attention(q, k, v, **options), _qkv())
    assert _nodes(program).count("Attention") == 1


@pytest.mark.parametrize("options", [{"causal": True}, {"window_size": (2, 1)}], ids=str)
def test_rows_that_see_no_key(options):
    """More rows than keys: the first see none. Ours are 0 there, runtimes differ."""
    args = _qkv(rows=9, keys=4)

    def attend(q, k, v):
        return anyflash.attention(q, k, v, **options)

    _check(attend, args)
    assert (attend(*args)[:, 0] == 0).all()


def test_a_window_that_no_sequence_reaches():
    """It bounds nothing, not even where rows are more than keys; whatever the length."""
    keys = Dim("keys", min=2)

    def attend(q, k, v):
        return anyflash.attention(q, k, v, window_size=(1, 4))

    _check(attend, _qkv(rows=9, keys=4))
    shapes = ((None, {1: keys}, {1: keys}),)
    program = _check(attend, _qkv(rows=9, keys=7), dynamic_shapes=shapes)
    for length in (3, 4, 5, 6):
        _compare(program, attend, _qkv(9, length))


def test_value_heads_of_another_width():
    _check(lambda q, k, v: anyflash.attention(q, k, v, causal=True), _qkv(dim_v=24))


def test_any_length():
    """One file for all lengths; where rows and keys are one length, the mask is the operator's."""
    batch, rows, keys = Dim("batch"), Dim("rows"), Dim("keys")

    def attend(q, k, v):
        return anyflash.attention(q, k, v, causal=True)

    shapes = (({0: batch, 1: rows}, {0: batch, 1: keys}, {0: batch, 1: keys}),)
    program = _check(attend, _qkv(), dynamic_shapes=shapes)
    for rows_, keys_ in ((3, 11), (12, 5), (7, 7)):
        _compare(program, attend, _qkv(rows_, keys_))
    square = ({0: batch, 1: rows},)
    program = _check(lambda x: attend(x, x, x), _qkv()[:1], dynamic_shapes=(square,))
    assert _nodes(program).count("Where") == 0
    _compare(program, lambda x: attend(x, x, x), _qkv(11)[:1])


OTHERS = (
    "flash_attn_qkvpacked_func", "fused_mlp", "bias_activation", "rotary", "rotary, offsets",
    "layer_norm", "rms_norm", "dropout_add_layer_norm", "cross_entropy", "MHA", "FusedMLP", "Block",
    "GPTLMHeadModel",
)  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_functions_and_models(name):
    function, _ = function_of(name)
    leaves, others = make(name, 5, 22)
    program = _check(function, (*(x.detach() for x in leaves), *others))
    assert not any(op.startswith(("_", "anyflash")) for op in _nodes(program))


CU = torch.tensor([0, 4, 6], dtype=torch.int32)
REFUSED = {
    "cu_seqlens_q": lambda q, k, v: anyflash.attention(
        q[0], q[0], q[0], cu_seqlens_q=CU, cu_seqlens_k=CU, max_seqlen_q=4, max_seqlen_k=4
    ),
    "block_table": lambda q, k, v: anyflash.attention(
        q, k, v, block_table=torch.tensor([[0], [1]], dtype=torch.int32)
    ),
    "dropout_p": lambda q, k, v: anyflash.attention(q, k, v, dropout_p=0.1),
    "sinks": lambda q, k, v: anyflash.attention(q, k, v, sinks=torch.zeros(4)),
    "return_lse": lambda q, k, v: anyflash.attention(q, k, v, return_lse=True),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    with pytest.raises(RuntimeError, match=f"{what}: ONNX's Attention cannot say it, expected"):
        integration.export(Module(REFUSED[what]), _qkv(), verbose=False)


def test_a_cache_is_refused():
    inputs = make("attention_kvcache", 5, 22)
    with pytest.raises(RuntimeError, match="writes into the cache"):
        integration.export(
            Module(CASES["attention_kvcache"].function), inputs.others, verbose=False
        )
