"""torch.vmap: what a loop over the samples gives, derivatives included, by one call of each
operator."""

from __future__ import annotations

import warnings

import pytest
import torch
from graph_cases import CASES, make
from support import torch_version
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import anyflash

pytestmark = [
    pytest.mark.providers,
    pytest.mark.skipif(torch_version() < 205, reason="torch.library.register_vmap"),
]

SAMPLES = 3
NAMES = [n for n, case in CASES.items() if case.module is None and case.why_not is None]
# Sample by sample: with dropout, and with norms of their own.
ONE_BY_ONE = {
    True: ("attention, dropout",),
    False: (
        "attention, dropout",
        "layer_norm",
        "rms_norm",
        "dropout_add_layer_norm",
        "rms_norm_fn",
    ),
}


class Calls(TorchDispatchMode):
    """The operators of this library that were called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "anyflash":
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def _samples(name, device):
    """Leaves with a dimension of samples in front, and what the samples share."""
    drawn = [make(name, 2, 7, device, seed) for seed in range(SAMPLES)]
    leaves = [torch.stack(x).detach() for x in zip(*(inputs.leaves for inputs in drawn))]
    others = drawn[0].others
    if name == "cross_entropy":  # one label for each of its rows
        others = tuple(x.clamp(min=0) for x in others)
    return leaves, others


def _first(out):
    """A tensor of what a function returned, with all of it in it."""
    if isinstance(out, torch.Tensor):
        return out
    return sum((x.sin() for x in out[1:]), out[0])


def _one_call(function, one_by_one=False):
    """The result of a function that does not go through the samples one by one."""
    with warnings.catch_warnings(), Calls() as calls:
        warnings.filterwarnings("error", message="There is a performance drop")
        found = function()
    if not one_by_one:
        most = max(map(calls.names.count, calls.names), default=0)
        assert most < SAMPLES, calls.names  # rotary is its own derivative
    return found


def _close(found, expected, what=""):
    for i, (a, b) in enumerate(zip(found, expected)):
        torch.testing.assert_close(
            a, b, atol=1e-4, rtol=1e-4, msg=lambda m, i=i: f"{what} {i}: {m}"
        )


@pytest.mark.parametrize("shared", [False, True], ids=["own", "some shared"])
@pytest.mark.parametrize("name", NAMES)
def test_a_loop_over_the_samples(device, name, shared):
    """Forward, and the gradients of every sample, with all arguments its own or the first alone."""
    leaves, others = _samples(name, device)
    count = 1 if shared else len(leaves)
    if shared:
        leaves = [leaves[0], *(x[0] for x in leaves[1:])]
    dims = (*(0 if i < count else None for i in range(len(leaves))), *(None for _ in others))

    def function(*args):
        return _first(CASES[name].function(*args))

    every = tuple(range(len(leaves)))
    gradient = grad(lambda *args: function(*args).sin().sum(), every)
    for f in (function, gradient):
        samples = ([x[i] if j < count else x for j, x in enumerate(leaves)] for i in range(SAMPLES))
        expected = [f(*sample, *others) for sample in samples]
        one_by_one = name in ONE_BY_ONE[shared]
        found = _one_call(lambda f=f: vmap(f, dims)(*leaves, *others), one_by_one)
        if f is function:
            found, expected = [found], [[x] for x in expected]
        _close(found, [torch.stack(x) for x in zip(*expected)], name)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_outside(device, name):
    """Of a vmap, by autograd and by func.grad: seen to be zero where the operators were called past
    autograd."""
    leaves, others = _samples(name, device)
    dims = (*(0 for _ in leaves), *(None for _ in others))

    def loss(*tensors):
        def one(*args):
            return _first(CASES[name].function(*args)).sin() + sum(x.sum() for x in args[:1])

        return vmap(one, dims)(*tensors, *others).sum()

    def loop(*tensors):
        total = 0
        for i in range(SAMPLES):
            args = [x[i] for x in tensors]
            total = (
                total + (_first(CASES[name].function(*args, *others)).sin() + args[0].sum()).sum()
            )
        return total

    asked = [x.clone().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(loop(*asked), asked)
    _close(torch.autograd.grad(loss(*asked), asked), expected, name)
    _close(grad(loss, tuple(range(len(leaves))))(*leaves), expected, name)


@pytest.mark.parametrize("where", [0, 1, 2, 3, 4])
def test_samples_at_any_dimension(device, where):
    q, k, v = (torch.randn(SAMPLES, 2, 7, 2, 8, device=device) for _ in "qkv")
    expected = torch.stack([anyflash.attention(*x, causal=True) for x in zip(q, k, v)])
    found = _one_call(
        lambda: vmap(lambda *t: anyflash.attention(*t, causal=True), (where, 0, 0), where)(
            q.movedim(0, where), k, v
        ),
    )
    torch.testing.assert_close(found.movedim(where, 0), expected)


BIASES = [(5, 6), (2, 5, 6), (1, 5, 6), (1, 2, 5, 6), (3, 1, 5, 6), (3, 2, 1, 6)]


@pytest.mark.parametrize("own", [True, False], ids=["own", "shared"])
@pytest.mark.parametrize("shape", BIASES, ids=str)
def test_bias_sinks_and_slopes(device, shape, own):
    q, k, v = (torch.randn(SAMPLES, 3, n, 2, 8, device=device) for n in (5, 6, 6))
    count = (SAMPLES,) if own else ()
    more = [torch.randn(*count, *shape, device=device) for shape in (shape, (2,))]
    slopes = torch.rand(*count, 2, device=device)

    def loss(q, k, v, bias, sinks, slopes):
        out = anyflash.attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes)
        return out.sin().sum()

    gradient = grad(loss, (0, 1, 2, 3, 4))
    given = (q, k, v, *more, slopes)
    dims = (0, 0, 0, *((0 if own else None,) * 3))
    samples = [[x[i] if d == 0 else x for x, d in zip(given, dims)] for i in range(SAMPLES)]
    expected = [torch.stack(x) for x in zip(*(gradient(*sample) for sample in samples))]
    _close(vmap(gradient, dims)(*given), expected)


def test_lengths_of_samples(device):
    q, k = (torch.randn(SAMPLES, 2, n, 2, 8, device=device) for n in (5, 9))
    lengths = torch.tensor([[3, 9], [1, 4], [0, 5]], dtype=torch.int32, device=device)

    def one(q, k, lengths):
        return anyflash.attention(q, k, k, seqused_k=lengths)

    expected = torch.stack([one(*x) for x in zip(q, k, lengths)])
    torch.testing.assert_close(vmap(one)(q, k, lengths), expected)


def test_two_dimensions_of_samples(device):
    q = torch.randn(2, SAMPLES, 1, 7, 2, 8, device=device)
    one = grad(lambda q: anyflash.attention(q, q, q, causal=True).sin().sum())
    expected = torch.stack([torch.stack([one(x) for x in row]) for row in q])
    torch.testing.assert_close(vmap(vmap(one))(q), expected)


def test_dropout_is_drawn_as_vmap_is_told(device):
    q = torch.randn(1, 1, 9, 2, 8, device=device).expand(SAMPLES, -1, -1, -1, -1)

    def one(q):
        return anyflash.attention(q, q, q, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="random"):
        vmap(one)(q)
    same, different = (vmap(one, randomness=how)(q) for how in ("same", "different"))
    assert torch.equal(same[0], same[1])
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: anyflash.attention(x, x, x),
        lambda x: anyflash.layer_norm(x, x[0, 0, 0]),
        lambda x: anyflash.rotary(x, x[0, :, 0, :4], x[0, :, 0, 4:]),
    ],
    ids=["attention", "norm", "rotary"],
)
def test_no_samples(device, function):
    x = torch.randn(0, 2, 5, 4, 8, device=device)
    assert vmap(function)(x).shape == x.shape
    assert vmap(grad(lambda x: function(x).sum()))(x).shape == x.shape


def test_a_cache_is_refused(device):
    cache = torch.zeros(SAMPLES, 2, 9, 2, 8, device=device)
    q = torch.randn(SAMPLES, 2, 1, 2, 8, device=device)
    with pytest.raises(RuntimeError, match="expected the samples as a larger batch"):
        vmap(lambda q, k, v: anyflash.attention_kvcache(q, k, v, q, q, cache_seqlens=2))(
            q, cache, cache
        )
