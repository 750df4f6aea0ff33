"""What clients take though it is private: raw functions, registered operators, autograd classes."""

from __future__ import annotations

import inspect

import flash_attn
import flash_attn_2_cuda as raw
import pytest
import torch
from flash_attn import flash_attn_interface as interface
from support import run_python, torch_version

from anyflash.testing import reference

SCALE = 0.25
registers_operators = pytest.mark.skipif(
    torch_version() < 204, reason="torch.library.custom_op came with torch 2.4"
)
# Upstream 2.8.3: parameters with a default, by operator; the others are required.
OPERATORS = {
    "_flash_attn_forward": (
        "q k v dropout_p softmax_scale causal window_size_left window_size_right softcap "
        "alibi_slopes return_softmax",
        {},
    ),
    "_flash_attn_varlen_forward": (
        "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
        "window_size_left window_size_right softcap alibi_slopes return_softmax block_table "
        "leftpad_k seqused_k zero_tensors",
        {
            "window_size_left": -1,
            "window_size_right": -1,
            "softcap": 0.0,
            "alibi_slopes": None,
            "return_softmax": False,
            "block_table": None,
            "leftpad_k": None,
            "seqused_k": None,
            "zero_tensors": False,
        },
    ),
    "_flash_attn_backward": (
        "dout q k v out softmax_lse dq dk dv dropout_p softmax_scale causal window_size_left "
        "window_size_right softcap alibi_slopes deterministic rng_state",
        {"rng_state": None},
    ),
    "_flash_attn_varlen_backward": (
        "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
        "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
        "deterministic rng_state zero_tensors",
        {"rng_state": None, "zero_tensors": False},
    ),
}


def _qkv(device, seqlen_q=6, seqlen_k=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, seqlen_q, 4, 16), (2, seqlen_k, 2, 16), (2, seqlen_k, 2, 16))
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def _cu(device, *lengths):
    return torch.tensor(
        [0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device
    )


def _fwd(q, k, v, p=0.0, causal=True, return_softmax=False, out=None, gen=None):
    return raw.fwd(q, k, v, out, None, p, SCALE, causal, -1, -1, 0.0, return_softmax, gen)


def _bwd(dout, q, k, v, out, lse, buffers=(None, None, None), p=0.0, causal=True, rng_state=None):
    options = (p, SCALE, causal, -1, -1, 0.0, False, None, rng_state)
    return raw.bwd(dout, q, k, v, out, lse, *buffers, None, *options)


def _expected_gradients(q, k, v, dout, **options):
    leaves = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    out, _ = reference(*leaves, softmax_scale=SCALE, **options)
    return torch.autograd.grad(out, leaves, dout.double().cpu())


def _close(actual, expected, tolerance=2e-5):
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance
    )


# ---- the compiled module


@pytest.mark.parametrize(
    "name, counts",
    [
        ("fwd", (13,)),
        ("varlen_fwd", (21, 22)),
        ("bwd", (19,)),
        ("varlen_bwd", (24,)),
        ("fwd_kvcache", (20,)),
    ],
)
def test_raw_functions_are_positional(name, counts):
    parameters = inspect.signature(getattr(raw, name)).parameters.values()
    assert all(p.kind is p.POSITIONAL_ONLY for p in parameters)
    required = sum(p.default is p.empty for p in parameters)
    assert (required, len(parameters)) == (counts[0], counts[-1])
    for count in (counts[0] - 1, counts[-1] + 1):
        with pytest.raises(TypeError):
            getattr(raw, name)(*[None] * count)
    assert interface.flash_attn_gpu is raw


def test_raw_forward(device):
    q, k, v = _qkv(device)
    out, lse, s_dmask, rng_state = _fwd(q, k, v)
    expected, expected_lse = reference(q.cpu(), k.cpu(), v.cpu(), softmax_scale=SCALE, causal=True)
    _close(out, expected)
    _close(lse, expected_lse)
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype
    assert (
        rng_state.shape == (2,) and rng_state.dtype == torch.int64 and rng_state.device == q.device
    )


def test_raw_forward_records_nothing(device):
    q, k, v = (x.requires_grad_() for x in _qkv(device))
    buffer = torch.empty_like(q)
    results = _fwd(q, k, v, out=buffer)
    assert not any(x.requires_grad for x in results)


def test_raw_forward_writes_into_a_slice(device):
    q, k, v = _qkv(device)
    whole = torch.full((2, 6, 4, 3, 16), 7.0, device=device)
    slot = whole[:, :, :, 1]
    out = _fwd(q, k, v, out=slot)[0]
    assert out is slot
    _close(slot, _fwd(q, k, v)[0], 0)
    assert (whole[:, :, :, ::2] == 7).all()
    with pytest.raises(
        RuntimeError, match=r"out must have shape \(2, 6, 4, 16\).*got \(2, 6, 4, 8\)"
    ):
        _fwd(q, k, v, out=slot[..., :8])


def test_raw_dropout(device):
    q, k, v = _qkv(device)
    with pytest.raises(
        RuntimeError, match="^return_softmax is only supported when p_dropout > 0.0"
    ):
        _fwd(q, k, v, return_softmax=True)
    generator = torch.Generator(device)
    runs = []
    for seed in (1, 1, 2):
        generator.manual_seed(seed)
        runs.append(_fwd(q, k, v, p=0.4, return_softmax=True, gen=generator))
    assert torch.equal(runs[0][0], runs[1][0]) and not torch.equal(runs[0][0], runs[2][0])
    out, lse, s_dmask, rng_state = runs[0]
    assert s_dmask.shape == (2, 4, 128, 128)
    dout = torch.randn_like(q)
    dq, dk, dv, _ = _bwd(dout, q, k, v, out, lse, p=0.4, rng_state=rng_state)
    expected = _expected_gradients(
        q, k, v, dout, causal=True, dropout_p=0.4, rng_state=rng_state.cpu()
    )
    for mine, theirs in zip((dq, dk, dv), expected):
        _close(mine, theirs)
    with pytest.raises(RuntimeError, match="rng_state: missing"):
        _bwd(dout, q, k, v, out, lse, p=0.4)


def test_raw_backward_fills_slices_of_one_buffer(device):
    """xformers and MSLK hand over the three thirds of one gradient of qkv."""
    q, _, _ = _qkv(device)
    k, v = q.flip(1), q.flip(2)
    out, lse, _, _ = _fwd(q, k, v)
    dout = torch.randn_like(q)
    dqkv = torch.full((2, 6, 3, 4, 16), float("nan"), device=device)
    buffers = dqkv.unbind(2)
    dq, dk, dv, sums = _bwd(dout, q, k, v, out, lse, buffers)
    assert dq is buffers[0] and dk is buffers[1] and dv is buffers[2]
    for mine, theirs in zip(dqkv.unbind(2), _expected_gradients(q, k, v, dout, causal=True)):
        _close(mine, theirs)
    assert sums.shape == (2, 4, 128) and sums.dtype == torch.float32
    _close(sums[..., :6], (dout * out).sum(-1).transpose(1, 2))
    fresh = _bwd(dout, q, k, v, out, lse)
    for a, b in zip(fresh, (dq, dk, dv, sums)):
        _close(a, b, 0)


@pytest.mark.parametrize("count", [21, 22])
def test_raw_packed(device, count):
    q, k, v = (x.flatten(0, 1) for x in _qkv(device))
    cu_q, cu_k = _cu(device, 5, 7), _cu(device, 8, 10)
    used = torch.tensor([4, 10], dtype=torch.int32, device=device)
    out, lse, s_dmask, rng_state = raw.varlen_fwd(
        q, k, v, None, cu_q, cu_k, used, None, None, None, torch.tensor(7), 10, 0.0, SCALE, False,
        True, -1, -1, 0.0, False, None, *(0,) * (count - 21),
    )  # fmt: skip
    where = {"cu_seqlens_q": cu_q.cpu(), "cu_seqlens_k": cu_k.cpu(), "softmax_scale": SCALE}
    expected = reference(q.cpu(), k.cpu(), v.cpu(), causal=True, seqused_k=used.cpu(), **where)
    _close(out, expected[0])
    _close(lse, expected[1])
    assert lse.shape == (4, 12) and s_dmask.shape == (0,) and rng_state.shape == (2,)

    out, lse = (x.to(q) for x in reference(q.cpu(), k.cpu(), v.cpu(), causal=True, **where))
    dout = torch.randn_like(q)
    buffers = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    *gradients, sums = raw.varlen_bwd(
        dout, q, k, v, out, lse, *buffers, cu_q, cu_k, None, 7, 10, 0.0, SCALE, True, True, -1, -1,
        0.0, False, None, None,
    )  # fmt: skip
    leaves = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    exact, _ = reference(*leaves, causal=True, **where)
    wanted = torch.autograd.grad(exact, leaves, dout.double().cpu())
    for buffer, mine, theirs in zip(buffers, gradients, wanted):
        assert mine is buffer
        _close(mine, theirs)
    assert sums.shape == (4, 12 + 2 * 128)
    row_sums = (dout * out).sum(-1).t()
    _close(sums[:, :5], row_sums[:, :5])
    _close(sums[:, 5 + 128 : 12 + 128], row_sums[:, 5:])


def test_raw_kvcache(device):
    q, k_cache, v_cache = _qkv(device, 2, 12)
    k, v = (torch.randn(2, 2, 2, 16, device=device) for _ in range(2))
    lengths = torch.tensor([3, 7], dtype=torch.int32, device=device)
    before = k_cache.clone(), v_cache.clone()
    buffer = torch.empty_like(q)
    out, lse = raw.fwd_kvcache(
        q, k_cache, v_cache, k, v, lengths, *(None,) * 6, buffer, SCALE, True, -1, -1, 0.0, True, 0
    )
    assert out is buffer and lse.shape == (2, 4, 2)
    expected = flash_attn.flash_attn_with_kvcache(
        q, *before, k, v, cache_seqlens=lengths, softmax_scale=SCALE, causal=True
    )
    _close(out, expected, 0)
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache[1, 7:9], v[1])
    with pytest.raises(RuntimeError, match="num_splits > 128 not supported"):
        raw.fwd_kvcache(q, k_cache, v_cache, *(None,) * 10, SCALE, True, -1, -1, 0.0, True, 200)


def _bad_dtype(q, k, v):
    return _fwd(q.int(), k, v)


def _bad_mix(q, k, v):
    return _fwd(q, k.double(), v)


def _bad_heads(q, k, v):
    return _fwd(q[:, :, :3], k, v)


def _bad_stride(q, k, v):
    return _fwd(q.transpose(2, 3).contiguous().transpose(2, 3), k, v)


def _bad_shape(q, k, v):
    return _fwd(q, k[:1], v[:1])


def _bad_softcap(q, k, v):
    return raw.fwd(q, k, v, None, None, 0.3, SCALE, False, -1, -1, 5.0, False, None)


@pytest.mark.parametrize(
    "call, text",
    [
        (_bad_dtype, "FlashAttention only support fp16 and bf16 data type"),
        (_bad_mix, "query and key must have the same dtype"),
        (_bad_heads, "Number of heads in key/value must divide number of heads in query"),
        (_bad_stride, "Input tensor must have contiguous last dimension"),
        (_bad_shape, "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)"),
        (_bad_softcap, "Softcapping does not support dropout for now"),
    ],
)
def test_raw_errors_begin_with_upstreams_text(device, call, text):
    with pytest.raises(RuntimeError) as caught:
        call(*_qkv(device))
    assert str(caught.value).startswith(text)


# ---- the registered operators


@pytest.mark.parametrize("name", OPERATORS)
def test_private_functions_can_be_introspected(name):
    """ring-flash-attention and Megatron read the parameters like this."""
    names, defaults = OPERATORS[name]
    function = getattr(interface, name)
    if not inspect.isfunction(function):
        function = function._init_fn
    spec = inspect.getfullargspec(function)
    assert spec.args == names.split()
    assert (
        dict(zip(spec.args[-len(spec.defaults) :], spec.defaults) if spec.defaults else {})
        == defaults
    )


@registers_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_private_operators_have_upstreams_schema(name):
    names, defaults = OPERATORS[name]
    assert not inspect.isfunction(getattr(interface, name))  # as upstream's CustomOpDef
    packet = getattr(torch.ops.flash_attn, name)
    assert getattr(interface, f"_wrapped{name}") is packet
    schema = packet.default._schema
    assert [a.name for a in schema.arguments] == names.split()
    assert {a.name: a.default_value for a in schema.arguments if a.has_default_value()} == defaults
    mutated = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
    assert mutated == ({"dq", "dk", "dv"} if "backward" in name else set())
    assert len(schema.returns) == (1 if "backward" in name else 4)


@registers_operators
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_private_operators_pass_opcheck(device, p):
    q, k, v = _qkv(device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    options = (p, SCALE, True, -1, -1, 0.0, None)
    out, lse, _, rng_state = interface._flash_attn_forward(q, k, v, *options, False)
    ops = torch.ops.flash_attn
    if p == 0.0:  # else each run draws another dropout
        torch.library.opcheck(
            ops._flash_attn_forward.default, (q, k, v, *options, False), test_utils=tests
        )
    buffers = (torch.empty_like(q), torch.empty_like(k), None)
    arguments = (torch.randn_like(q), q, k, v, out, lse, *buffers, *options, False, rng_state)
    torch.library.opcheck(ops._flash_attn_backward.default, arguments, test_utils=tests)
    if p == 0.0:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        lengths = (_cu(device, 5, 7), _cu(device, 8, 10), 7, 10)
        arguments = (*flat, *lengths, *options[:3])
        torch.library.opcheck(ops._flash_attn_varlen_forward.default, arguments, test_utils=tests)


@registers_operators
def test_fakes_tell_the_shape_of_s_dmask(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, v = _qkv(device, 6, 130)
    options = (0.3, SCALE, False, -1, -1, 0.0, None, True)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    lengths = (_cu(device, 6, 6), _cu(device, 130, 130), 6, 130)
    for function, arguments in (
        (interface._flash_attn_forward, (q, k, v, *options)),
        (interface._flash_attn_varlen_forward, (*flat, *lengths, *options)),
    ):
        real = function(*arguments)
        with FakeTensorMode() as mode:
            fake_arguments = [mode.from_tensor(x) if torch.is_tensor(x) else x for x in arguments]
            fake = function(*fake_arguments)
        for a, b in zip(real, fake):
            assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def test_private_forward_copies_rows_that_do_not_lie_side_by_side(device):
    q, k, v = _qkv(device)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    options = (0.0, SCALE, True, -1, -1, 0.0, None, False)
    out = interface._flash_attn_forward(turned, k, v, *options)[0]
    _close(out, _fwd(q, k, v)[0], 0)


def _backward(dout, q, k, v, out, lse, causal):
    buffers = [torch.empty_like(x) for x in (q, k, v)]
    interface._flash_attn_backward(
        dout, q, k, v, out, lse, *buffers, dropout_p=0, softmax_scale=SCALE, causal=causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=False, rng_state=None,
    )  # fmt: skip
    return buffers


def test_backward_uses_the_given_out_and_lse(device):
    """Ring attention merges out and lse of blocks of keys; each backward gets the merged ones."""
    q, k, v = _qkv(device, 6, 12)
    dout = torch.randn_like(q)
    halves = [(k[:, :6], v[:, :6]), (k[:, 6:], v[:, 6:])]
    outs, lses = [], []
    for key, value in halves:
        out, lse, *_ = interface._flash_attn_forward(
            q, key, value, dropout_p=0, softmax_scale=SCALE, causal=False, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    lse = torch.logaddexp(*lses)
    weights = [(x - lse).exp().transpose(1, 2).unsqueeze(-1) for x in lses]
    out = sum(o * w for o, w in zip(outs, weights))
    _close(out, reference(q.cpu(), k.cpu(), v.cpu(), softmax_scale=SCALE)[0])
    parts = [_backward(dout, q, key, value, out, lse, False) for key, value in halves]
    dq, dk, dv = _expected_gradients(q, k, v, dout)
    _close(parts[0][0] + parts[1][0], dq)
    _close(torch.cat([parts[0][1], parts[1][1]], 1), dk)
    _close(torch.cat([parts[0][2], parts[1][2]], 1), dv)


VORTEX = """
import torch
{first}
@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cuda")
def theirs(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q + k
{second}
from flash_attn import flash_attn_func, flash_attn_interface
from torch.utils._python_dispatch import TorchDispatchMode
q = torch.randn(1, 5, 2, 16, requires_grad=True)
out, lse, _ = flash_attn_func(q, q, q, causal=True, return_attn_probs=True)
out.sum().backward()
assert q.grad is not None
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.namespace != "flash_attn"
        return function(*args, **(kwargs or {{}}))
with Watch():
    assert torch.equal(flash_attn_func(q, q, q, causal=True), out)
forward = flash_attn_interface._flash_attn_forward
assert forward(q, q, q, 0.0, 0.25, True, -1, -1, 0.0, None, False)[0].shape == q.shape
assert forward._init_fn
assert len(torch.ops.flash_attn._flash_attn_forward.default._schema.arguments) == 2
print("fine")
"""


@registers_operators
@pytest.mark.parametrize("order", ["before", "after"])
def test_another_package_registers_the_names(order):
    """vortex (Evo 2) defines the same operators for CUDA; the public functions must not notice."""
    first, second = ("import flash_attn", "") if order == "after" else ("", "import flash_attn")
    code = VORTEX.format(first=first, second=second)
    assert "fine" in run_python(code)


def test_plain_functions_where_torch_has_no_custom_op():
    """torch before 2.4."""
    code = """
import inspect, torch
if hasattr(torch, "_library") and hasattr(torch._library, "custom_ops"):
    del torch._library.custom_ops.OPDEF_TO_LIB
from flash_attn import flash_attn_interface as interface
for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
    function = getattr(interface, "_flash_attn_" + name)
    assert inspect.isfunction(function) and function._init_fn is function
    assert getattr(interface, "_wrapped_flash_attn_" + name) is function
q = torch.randn(1, 5, 2, 16)
options = (1e-30, 0.25, True, -1, -1, 0.0, None, True)
out, lse, s_dmask, rng_state = interface._wrapped_flash_attn_forward(q, q, q, *options)
assert s_dmask.shape == (1, 2, 128, 128)
print("fine")
"""
    assert "fine" in run_python(code)


# ---- the autograd classes


@pytest.mark.parametrize("return_softmax", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["qkv", "q_kv", "q_k_v"])
def test_autograd_classes(device, layout, packed, return_softmax):
    q, k, v = (torch.randn(2, 6, 4, 16, device=device) for _ in range(3))
    parts = {
        "qkv": [torch.stack([q, k, v], 2)],
        "q_kv": [q, torch.stack([k, v], 2)],
        "q_k_v": [q, k, v],
    }
    inputs, lengths = parts[layout], ()
    prefix = "FlashAttnVarlen" if packed else "FlashAttn"
    if packed:
        inputs = [x.flatten(0, 1) for x in inputs]
        cu = _cu(device, 6, 6)
        lengths = (cu, 6) if layout == "qkv" else (cu, cu, 6, 6)
    inputs = [x.clone().requires_grad_() for x in inputs]
    name = {"qkv": "QKVPackedFunc", "q_kv": "KVPackedFunc", "q_k_v": "Func"}[layout]
    function = getattr(interface, prefix + name)
    assert issubclass(function, torch.autograd.Function)
    tail = (None, True) if (packed and layout == "q_k_v") else (True,)
    options = (0.0, None, True, (-1, -1), 0.0, None, False, return_softmax, *tail)
    out = function.apply(*inputs, *lengths, *options)
    if return_softmax:
        out, lse, s_dmask = out
        assert lse.shape == ((4, 12) if packed else (2, 4, 6)) and s_dmask.shape == (0,)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = _expected_gradients(q, k, v, dout.view_as(q), causal=True)
    flat = [p for g in gradients for p in (g.unbind(-3) if g.dim() > out.dim() else [g])]
    for mine, theirs in zip(flat, expected):
        _close(mine.reshape(theirs.shape), theirs)


def test_autograd_class_repeats_its_dropout(device):
    q, k, v = (x.requires_grad_() for x in _qkv(device))
    out, lse, s_dmask = interface.FlashAttnFunc.apply(
        q, k, v, 0.5, SCALE, False, (-1, -1), 0.0, None, False, True, True
    )
    kept = (s_dmask[..., :6, :9] >= 0).double().cpu()
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * SCALE
    probabilities = scores.double().cpu().softmax(-1) * kept / 0.5
    values = v.double().cpu().repeat_interleave(2, 2)
    _close(out.detach(), torch.einsum("bhij,bjhd->bihd", probabilities, values).detach())
    dv = torch.autograd.grad(out.sum(), v)[0]
    expected = probabilities.sum(2).view(2, 2, 2, 9).sum(2).transpose(1, 2)
    _close(dv, expected.detach().unsqueeze(-1).expand_as(dv))
