"""Every function and operator with a derivative, in every way that torch has to ask for one: the
gradient of eager mode, which is checked against numbers in float64, or a refusal. Never zeros."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flash_attn
import flash_attn.flash_attn_interface  # noqa: F401  (registers its operators)
import pytest
import torch
from flash_attn.bert_padding import index_first_axis, pad_input
from flash_attn.layers.rotary import apply_rotary_emb_kv_, apply_rotary_emb_qkv_
from flash_attn.ops.activations import swiglu
from support import torch_version
from torch.utils.checkpoint import checkpoint

import anyflash
from anyflash._operators.attention import AttentionCall

pytestmark = [
    pytest.mark.providers,
    pytest.mark.skipif(torch_version() < 207, reason="asks in ways that torch before 2.7 has not"),
    pytest.mark.filterwarnings("ignore"),
]

OPS = torch.ops.anyflash
NAMED = torch.ops.flash_attn
OPTIONS = (0.0, 0.3, True, -1, -1, 0.0)  # dropout_p, softmax_scale, causal, window, softcap


class Call(NamedTuple):
    """``function`` of differentiable tensors with ``shapes``; all other arguments are its own."""

    function: Callable[..., torch.Tensor]
    shapes: tuple[tuple[int, ...], ...]
    exact: Callable[..., torch.Tensor] | None = None  # the same where it does not take float64


def _cu(x):
    return torch.tensor([0, 2, 5], dtype=torch.int32, device=x.device)


def _everything(q, k, v, bias, sinks, scale):
    return anyflash.attention(q, k, v, bias=bias, sinks=sinks, softmax_scale=scale)


def _with_lse(q, k, v):
    out, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
    return torch.cat([out, lse.transpose(1, 2).unsqueeze(-1)], -1)


def _leaf(q, k, v, bias, sinks):
    call = dict.fromkeys(AttentionCall._fields)
    names = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right")
    call.update(zip((*names, "softcap"), OPTIONS), q=q, k=k, v=v, bias=bias, sinks=sinks)
    call.update(max_seqlen_q=0, max_seqlen_k=0, deterministic=False, return_lse=True, backend=0)
    return OPS._flash_attn_forward(*call.values())[0]


def _packed(function, *tensors, lengths=2):
    cu = _cu(tensors[0])
    return function(*tensors, *(cu,) * lengths, *(3,) * lengths, 0.0, None, True)


def _named_varlen(q, k, v):
    cu = _cu(q)
    return NAMED._flash_attn_varlen_forward(q, k, v, cu, cu, 3, 3, 0.0, 0.3, True)[0]


def _padded(x):
    indices = torch.tensor([0, 1, 3, 4, 5], device=x.device)
    packed = index_first_axis(x.flatten(0, 1), indices)
    return pad_input(packed * packed, indices, 2, 3)


def _tables(x):
    angles = torch.arange(18.0, device=x.device, dtype=x.dtype).view(6, 3)
    return angles.cos(), angles.sin()


def _labels(x):
    return torch.tensor([1, 0, 6], device=x.device)


def _rotary(x):
    return anyflash.rotary(x, *_tables(x))


def _rotary_operator(x):
    return OPS.rotary(x, *_tables(x), None, 0, None, 0, False, False)


def _norm_operator(x, weight, bias):
    return OPS.norm_forward(
        x, None, None, weight, bias, None, None, None, None, None, 0.0, 1e-5, False, False, 4, 0
    )[0]


def _cross_entropy(logits):
    return anyflash.cross_entropy(logits, _labels(logits), label_smoothing=0.1)[0]


def _cross_entropy_operator(logits):
    return OPS.cross_entropy_forward(logits, _labels(logits), None, 0.1, 1.0, 0.0, -100, 0, 7)[0]


QKV = ((2, 4, 2, 8),) * 3
PACKED = ((5, 2, 8),) * 3
MLP = ((3, 4), (6, 4), (6,), (5, 6), (5,))
CALLS = {
    "attention": Call(_everything, (*QKV, (1, 2, 4, 4), (2,), ())),
    "attention, lse": Call(_with_lse, QKV),
    "flash_attn_func": Call(functools.partial(flash_attn.flash_attn_func, causal=True), QKV),
    "flash_attn_kvpacked_func": Call(
        flash_attn.flash_attn_kvpacked_func, (QKV[0], (2, 4, 2, 2, 8))
    ),
    "flash_attn_varlen_func": Call(
        functools.partial(_packed, flash_attn.flash_attn_varlen_func), PACKED
    ),
    "flash_attn_varlen_qkvpacked_func": Call(
        functools.partial(_packed, flash_attn.flash_attn_varlen_qkvpacked_func, lengths=1),
        ((5, 3, 2, 8),),
    ),
    "bias_activation": Call(
        lambda x, b: anyflash.bias_activation(x, b, activation="silu_gate"), ((3, 6), (6,))
    ),
    "fused_mlp": Call(anyflash.fused_mlp, MLP),
    "rotary": Call(_rotary, ((2, 6, 2, 8),)),
    "apply_rotary_emb_qkv_": Call(
        lambda x: apply_rotary_emb_qkv_(x * 1, *_tables(x)), ((2, 6, 3, 2, 8),)
    ),
    "apply_rotary_emb_kv_": Call(
        lambda x: apply_rotary_emb_kv_(x * 1, *_tables(x)), ((2, 6, 2, 2, 8),)
    ),
    "swiglu": Call(swiglu, ((3, 6), (3, 6))),
    "layer_norm": Call(anyflash.layer_norm, ((3, 8), (8,), (8,))),
    "rms_norm": Call(anyflash.rms_norm, ((3, 8), (8,))),
    "cross_entropy": Call(_cross_entropy, ((3, 7),)),
    "index_first_axis, pad_input": Call(_padded, ((2, 3, 4),)),
    "anyflash::_flash_attn_forward": Call(_leaf, (*QKV, (1, 2, 4, 4), (2,))),
    "anyflash::flash_attn_func": Call(lambda q, k, v: OPS.flash_attn_func(q, k, v), QKV),
    "anyflash::flash_attn_varlen_func": Call(
        lambda *t: _packed(OPS.flash_attn_varlen_func, *t), PACKED
    ),
    "anyflash::_bias_activation_forward": Call(
        lambda x, b: OPS._bias_activation_forward(x, b, 1, 0), ((3, 6), (6,))
    ),
    "anyflash::_fused_mlp_forward": Call(lambda *t: OPS._fused_mlp_forward(*t, 0, True, 0)[0], MLP),
    "anyflash::fused_mlp": Call(lambda *t: OPS.fused_mlp(*t), MLP),
    "anyflash::rotary": Call(_rotary_operator, ((2, 6, 2, 8),), _rotary),
    "anyflash::norm_forward": Call(_norm_operator, ((3, 8), (8,), (8,)), anyflash.layer_norm),
    "anyflash::cross_entropy_forward": Call(_cross_entropy_operator, ((3, 7),), _cross_entropy),
    "flash_attn::_flash_attn_forward": Call(
        lambda q, k, v: NAMED._flash_attn_forward(q, k, v, *OPTIONS, None, False)[0], QKV
    ),
    "flash_attn::_flash_attn_varlen_forward": Call(_named_varlen, PACKED),
}


def _tensors(call, device, dtype=torch.float32):
    torch.manual_seed(0)
    drawn = [torch.rand(shape, dtype=torch.float64) + 0.1 for shape in call.shapes]
    return [x.to(device, dtype) for x in drawn]


def _leaves(call, device, dtype=torch.float32):
    return [x.requires_grad_() for x in _tensors(call, device, dtype)]


class Module(torch.nn.Module):
    """A residual around the call: without its derivative a part of the gradient is left."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors).sin() + sum(x.sum() for x in tensors)


def _through(function, leaves):
    return torch.autograd.grad(function(*leaves).sum(), leaves)


def _loss(function, *tensors):
    return function(*tensors).sum()


# ---- The ways. Each gives the gradients of Module(...).sum().


def eager(module, call, device):
    return _through(module, _leaves(call, device))


def compiled(module, call, device, backend):
    torch._dynamo.reset()
    return _through(torch.compile(module, backend=backend, fullgraph=True), _leaves(call, device))


def func_grad(module, call, device):
    tensors = _tensors(call, device)
    every = tuple(range(len(tensors)))
    return torch.func.grad(functools.partial(_loss, module), every)(*tensors)


def vjp(module, call, device):
    out, pull = torch.func.vjp(module, *_tensors(call, device))
    return pull(torch.ones_like(out))


def compiled_func_grad(module, call, device, backend):
    torch._dynamo.reset()
    tensors = _tensors(call, device)
    every = tuple(range(len(tensors)))
    gradient = torch.func.grad(functools.partial(_loss, module), every)
    return torch.compile(lambda *t: gradient(*t), backend=backend)(*tensors)


def vmap_of_grad(module, call, device):
    tensors = _tensors(call, device)
    every = tuple(range(len(tensors)))
    gradient = torch.func.grad(functools.partial(_loss, module), every)
    batched = [torch.stack([torch.zeros_like(x), x]) for x in tensors]
    return [x[1] for x in torch.vmap(gradient)(*batched)]


def exported(module, call, device, strict):
    torch._dynamo.reset()
    program = torch.export.export(module, tuple(_tensors(call, device)), strict=strict)
    return _through(program.module(), _leaves(call, device))


def made_fx(module, call, device):
    from torch.fx.experimental.proxy_tensor import make_fx

    return _through(make_fx(module)(*_tensors(call, device)), _leaves(call, device))


def traced(module, call, device):
    return _through(torch.jit.trace(module, tuple(_leaves(call, device))), _leaves(call, device))


def checkpointed(module, call, device, reentrant):
    leaves = _leaves(call, device)
    checkpoint(module, *leaves, use_reentrant=reentrant).sum().backward()
    return [x.grad for x in leaves]


WAYS = {
    "compile, eager": functools.partial(compiled, backend="eager"),
    "compile, aot_eager": functools.partial(compiled, backend="aot_eager"),
    "func.grad": func_grad,
    "func.vjp": vjp,
    "compile of func.grad, eager": functools.partial(compiled_func_grad, backend="eager"),
    "compile of func.grad, aot_eager": functools.partial(compiled_func_grad, backend="aot_eager"),
    "vmap of func.grad": vmap_of_grad,
    "export": functools.partial(exported, strict=False),
    "export, strict": functools.partial(exported, strict=True),
    "make_fx": made_fx,
    "jit.trace": traced,
    "checkpoint": functools.partial(checkpointed, reentrant=False),
    "checkpoint, reentrant": functools.partial(checkpointed, reentrant=True),
}


def _assert_same(found, expected, what):
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a is not None, f"{what}: no gradient of tensor {i}"
        torch.testing.assert_close(
            a, b, atol=1e-4, rtol=1e-4, msg=lambda m, i=i: f"{what} {i}: {m}"
        )


@functools.cache
def _expected(name, device):
    call = CALLS[name]
    return eager(Module(call.function), call, device)


@pytest.mark.parametrize("name", CALLS)
def test_eager_is_right(device, name):
    call = CALLS[name]
    module = Module(call.exact or call.function)
    exact = _leaves(call, device, torch.float64)
    assert torch.autograd.gradcheck(module, exact, fast_mode=True)
    _assert_same(_expected(name, device), [x.float() for x in _through(module, exact)], name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CALLS)
def test_every_way_gives_the_gradient_of_eager_mode(device, name, way):
    call = CALLS[name]
    found = WAYS[way](Module(call.function), call, device)
    _assert_same(found, _expected(name, device), f"{name}, {way}")


def test_inductor(device, tmp_path, monkeypatch):
    """In one graph, with a cache of its own: compiling them one by one would take minutes."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()

    def everything(tensors):
        return sum(Module(CALLS[name].function)(*tensors[name]).sum() for name in CALLS)

    tensors = {name: _leaves(call, device) for name, call in CALLS.items()}
    torch.compile(everything, fullgraph=True)(tensors).backward()
    for name in CALLS:
        _assert_same([x.grad for x in tensors[name]], _expected(name, device), name)


def _penalty(function, leaves):
    """Of the gradient, whose gradient is a second derivative, and one more of ones."""
    first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
    return _squares(first, leaves)


def _squares(gradients, leaves):
    return sum(x.square().sum() + leaf.sum() for x, leaf in zip(gradients, leaves))


def _second_of_func(function, leaves):
    numbers = tuple(range(len(leaves)))

    def penalty(*tensors):
        first = torch.func.grad(lambda *t: function(*t).sin().sum(), numbers)(*tensors)
        return _squares(first, tensors)

    return torch.func.grad(penalty, numbers)


def _second_compiled(function, leaves):
    second = torch.compile(_second_of_func(function, leaves), backend="aot_eager", fullgraph=True)
    return second(*(x.detach() for x in leaves))


def _second_in_a_graph(function, leaves):
    """With autograd.grad inside the graph."""
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        penalty = torch.compile(_penalty, backend="aot_eager", fullgraph=True)
        return torch.autograd.grad(penalty(function, leaves), leaves)


def _second_of_compiled_autograd(function, leaves):
    total = function(*leaves).sin().sum()
    with torch._dynamo.compiled_autograd._enable(
        lambda graph: torch.compile(graph, backend="aot_eager")
    ):
        first = torch.autograd.grad(total, leaves, create_graph=True)
    return torch.autograd.grad(_squares(first, leaves), leaves)


def _second_batched(function, leaves):
    total = function(*leaves).sin().sum()
    one = torch.ones(1, dtype=total.dtype, device=total.device)
    first = torch.autograd.grad(total, leaves, one, is_grads_batched=True, create_graph=True)
    return torch.autograd.grad(_squares(first, leaves), leaves)


SECOND = {
    "eager": lambda function, leaves: torch.autograd.grad(_penalty(function, leaves), leaves),
    "func": lambda function, leaves: _second_of_func(function, leaves)(
        *(x.detach() for x in leaves)
    ),
    "func, compiled": _second_compiled,
    "compiled autograd": _second_of_compiled_autograd,
    "batched": _second_batched,
}
if hasattr(torch._dynamo.config, "trace_autograd_ops"):
    SECOND["in a graph"] = _second_in_a_graph
#: Of an autograd.Function that Dynamo traces, whosever it is, torch 2.13 drops that derivative
#: there (findings/).
DROPPED_BY_DYNAMO = {
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_kv_",
    "swiglu",
    "index_first_axis, pad_input",
}


def _assert_second_is_right_or_refused(call, device, dtype, second):
    function = (dtype == torch.float64 and call.exact) or call.function
    try:
        found = second(function, _leaves(call, device, dtype))
    except RuntimeError as refusal:
        words = ("second derivative", "Batching rule not implemented")  # in place, in a batch
        assert any(word in str(refusal) for word in words)  # noqa: PT017
        return
    exact = _leaves(call, device, torch.float64)
    expected = torch.autograd.grad(_penalty(call.exact or call.function, exact), exact)
    _assert_same([x.double() for x in found], expected, "second derivative")


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_is_right_or_refused(device, name, way):
    if way == "in a graph" and name in DROPPED_BY_DYNAMO:
        pytest.skip("torch drops it")
    torch._dynamo.reset()
    _assert_second_is_right_or_refused(CALLS[name], device, torch.float32, SECOND[way])


@pytest.mark.parametrize("name", CALLS)
def test_a_second_derivative_in_float64(device, name):
    call = CALLS[name]
    _assert_second_is_right_or_refused(call, device, torch.float64, SECOND["eager"])
    exact = _leaves(call, device, torch.float64)
    function = call.exact or call.function
    try:
        torch.autograd.grad(_penalty(function, exact), exact)
    except RuntimeError:
        return  # refused
    assert torch.autograd.gradgradcheck(lambda *t: function(*t).sin(), exact, fast_mode=True)


@pytest.mark.parametrize("how", ["func.jvp", "dual_level"])
@pytest.mark.parametrize("name", CALLS)
def test_forward_mode_is_right_or_refused(device, name, how):
    call = CALLS[name]
    tensors = tuple(_tensors(call, device))
    ones = tuple(torch.ones_like(x) for x in tensors)
    forward_ad = torch.autograd.forward_ad
    try:
        if how == "func.jvp":
            tangent = torch.func.jvp(call.function, tensors, ones)[1]
        else:
            with forward_ad.dual_level():
                out = call.function(*map(forward_ad.make_dual, tensors, ones))
                tangent = forward_ad.unpack_dual(out).tangent
    except (RuntimeError, NotImplementedError) as refusal:
        assert any(word in str(refusal) for word in ("jvp", "forward"))  # noqa: PT017
        return
    step = 1e-6
    exact = [x.double() for x in tensors]
    function = call.exact or call.function
    after, before = (function(*(x + s for x in exact)) for s in (step, -step))
    torch.testing.assert_close(
        tangent.double(), (after - before) / (2 * step), atol=1e-4, rtol=1e-4
    )


def _wrapped(function, way, tensors):
    """The function as each way turns it into another function."""
    if way.startswith("compile"):
        torch._dynamo.reset()
        return torch.compile(function, backend=way.split()[1], fullgraph=True)
    if way.startswith("checkpoint"):
        return functools.partial(checkpoint, function, use_reentrant=way.endswith("reentrant"))
    if way.startswith("export"):
        torch._dynamo.reset()
        module = torch.nn.Module()
        module.forward = function
        return torch.export.export(module, tensors, strict=False).module()
    return function


@pytest.mark.parametrize(
    "way",
    ["eager", "compile eager", "compile aot_eager", "checkpoint", "checkpoint reentrant", "export"],
)
@pytest.mark.parametrize("name", ["attention", "flash_attn_func", "varlen", "operator", "public"])
def test_dropout_of_forward_and_backward_is_one(device, name, way):
    """Attention is linear in v: with one mask sum(dv * v) is sum(out * dout). Two calls draw
    twice, and a seed repeats them."""
    functions = {
        "attention": lambda q, k, v: anyflash.attention(q, k, v, dropout_p=0.4),
        "flash_attn_func": lambda q, k, v: flash_attn.flash_attn_func(q, k, v, dropout_p=0.4),
        "varlen": lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q, k, v, _cu(q), _cu(q), 3, 3, 0.4
        ),
        "operator": lambda q, k, v: NAMED._flash_attn_forward(
            q, k, v, 0.4, 0.3, True, -1, -1, 0.0, None, False
        )[0],
        "public": lambda q, k, v: OPS.flash_attn_func(q, k, v, 0.4),
    }
    call = Call(functions[name], PACKED if name == "varlen" else ((2, 9, 2, 16),) * 3)
    q, k, v = _leaves(call, device)
    function = _wrapped(call.function, way, (q, k, v))
    torch.manual_seed(7)
    out = function(q, k, v)
    dout = torch.randn_like(out)
    torch.manual_seed(8)  # the backward must not depend on it
    (out * dout).sum().backward()
    torch.testing.assert_close((v.grad * v).sum(), (out * dout).sum(), atol=1e-3, rtol=1e-3)
    torch.manual_seed(7)
    again, other = function(q, k, v), function(q, k, v)
    assert torch.equal(again, out) and not torch.equal(other, out)
