"""What programs do around the operators: threads, autocast, checkpoints, copies, modes, leaks."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import run_python
from torch.utils.checkpoint import checkpoint

import anyflash
from anyflash import _loader

pytestmark = pytest.mark.providers


class Block(torch.nn.Module):
    """A transformer block as users write it."""

    def __init__(self, dim: int = 32, heads: int = 2):
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(dim, 3 * dim)
        self.up, self.down = torch.nn.Linear(dim, 2 * dim), torch.nn.Linear(2 * dim, dim)

    def forward(self, x):
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        x = x + anyflash.attention(q, k, v, causal=True).reshape(x.shape)
        return x + anyflash.fused_mlp(
            x, self.up.weight, self.up.bias, self.down.weight, self.down.bias
        )


@pytest.fixture
def block(device):
    torch.manual_seed(0)
    return Block().to(device)


@pytest.fixture
def x(device):
    return torch.randn(2, 11, 32, device=device)


def _qkv(device, seqlen=16, dtype=torch.float32, grad=False):
    torch.manual_seed(1)
    make = [torch.randn(2, seqlen, 2, 16, device=device).to(dtype) for _ in "qkv"]
    return [t.requires_grad_(grad) for t in make]


def test_threads(device):
    """Different threads, sizes and back ends at once; every result is that of a single thread."""
    jobs = [(n, route) for n in (5, 16, 33, 64) for route in (None, "math", "sdpa,math")] * 4

    def run(job):
        seqlen, route = job
        generator = torch.Generator().manual_seed(seqlen)
        leaves = [
            torch.randn(2, seqlen, 2, 16, generator=generator).to(device).requires_grad_()
            for _ in "qkv"
        ]
        out = anyflash.attention(*leaves, causal=True, backend=route)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(run, jobs))
    for a, b in zip(alone, together):
        torch.testing.assert_close(a, b)


def test_context_manager_belongs_to_a_thread(device):
    q, k, v = _qkv(device, dtype=torch.float64)  # which no kernel computes
    barrier, outcomes = threading.Barrier(2, timeout=20), {}

    def with_refusing_back_end():
        with anyflash.backend("kernel"):
            barrier.wait()
            try:
                anyflash.attention(q, k, v)
            except RuntimeError as error:
                outcomes["inside"] = str(error)
            barrier.wait()

    def without():
        barrier.wait()
        outcomes["outside"] = anyflash.attention(q, k, v).shape
        barrier.wait()

    threads = [threading.Thread(target=f) for f in (with_refusing_back_end, without)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert outcomes["inside"].startswith('anyflash: no back end of "kernel"')
    assert outcomes["outside"] == (2, 16, 2, 16)


def test_context_manager_nests_and_unwinds(device):
    q, k, v = _qkv(device, dtype=torch.float64)  # which no kernel computes
    softcap = {"softcap": 5.0}
    with anyflash.backend("math"):
        anyflash.attention(q, k, v, **softcap)
        refused = pytest.raises(RuntimeError, match="does not support softcap")
        with refused, anyflash.backend("sdpa"):
            anyflash.attention(q, k, v, **softcap)
        anyflash.attention(q, k, v, **softcap)
        refused = pytest.raises(RuntimeError, match="anyflash: no back end of")
        with refused, anyflash.backend("kernel,math", strict=True):
            anyflash.attention(q, k, v)
    anyflash.attention(q, k, v)


def test_context_manager_reaches_the_backward(device):
    """The backward runs on the chain of its forward, wherever backward() is called."""
    q, k, v = _qkv(device, grad=True)
    with anyflash.backend("sdpa"):
        out, lse = anyflash.attention(q, k, v, return_lse=True)
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="does not support a gradient of the log-sum-exp"):
        lse.sum().backward()


def test_strict_mode_is_an_error_without_a_kernel(device):
    q, k, v = _qkv(device, dtype=torch.float64)  # which no kernel computes
    refused = pytest.raises(RuntimeError, match='no back end of "kernel" can run this attention')
    with refused, anyflash.backend(strict=True):
        anyflash.attention(q, k, v)


def test_autocast(block, x, device):
    """Linear layers give half precision; what arrives in fp32 beside it must not be an error."""
    with torch.autocast(device, dtype=torch.bfloat16):
        out = block(x)
    out.float().sum().backward()
    torch.testing.assert_close(out.float(), block(x), atol=0.1, rtol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert all(p.grad.dtype == torch.float32 for p in block.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(block, x, use_reentrant):
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    block(inputs[0]).sum().backward()
    plain = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()
    checkpoint(block, inputs[1], use_reentrant=use_reentrant).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for p, grad in zip(block.parameters(), plain):
        torch.testing.assert_close(p.grad, grad)


def test_checkpointing_draws_dropout_again(device):
    """Recomputation restores torch's generator, so the mask must come from it."""
    q, k, v = _qkv(device, grad=True)
    grads = []
    for wrap in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(9)
        out = wrap(lambda *t: anyflash.attention(*t, dropout_p=0.4), q, k, v)
        grads.append((out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))))
    torch.testing.assert_close(grads[0], grads[1])


def test_modules_and_functions_copy_and_pickle(block, x):
    expected = block(x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), expected)
    for function in (anyflash.attention, anyflash.attention_kvcache, anyflash.fused_mlp):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function


def test_modes_without_gradients(block, x, device):
    expected = block(x).detach()
    with torch.no_grad():
        assert torch.equal(block(x), expected) and not block(x).requires_grad
    with torch.inference_mode():
        out = block(x.clone())
        assert torch.equal(out, expected) and out.is_inference()
        caches = [torch.zeros(2, 8, 2, 16, device=device) for _ in "kv"]
        q, k, v = _qkv(device, seqlen=3)
        anyflash.attention_kvcache(q, *caches, k, v, cache_seqlens=0, causal=True)
        assert torch.equal(caches[0][:, :3], k)


def test_nothing_is_saved_when_no_gradient_is_needed(device):
    q, k, v = _qkv(device)
    assert anyflash.attention(q, k, v).grad_fn is None
    assert anyflash.attention(q, k, v, return_lse=True)[1].grad_fn is None


@pytest.mark.parametrize("loss", [torch.sum, torch.linalg.vector_norm])
def test_gradient_penalty_is_refused(loss, device):
    """There is no second derivative: an error, never a penalty that silently does nothing."""
    leaves = _qkv(device, grad=True)
    out = anyflash.attention(*leaves)
    grads = torch.autograd.grad(loss(out), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|second derivative"):
        (loss(out) + sum(g.square().sum() for g in grads)).backward()


def test_create_graph_alone_is_no_error(device):
    leaves = _qkv(device, grad=True)
    out = anyflash.attention(*leaves)
    plain = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves, create_graph=True), plain)


def test_functional_gradients(device):
    q, k, v = _qkv(device)

    def loss(q, k, v):
        return anyflash.attention(q, k, v, causal=True).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(q, k, v)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    torch.testing.assert_close(found, torch.autograd.grad(loss(*leaves), leaves))


def test_hooks_on_saved_tensors(device):
    """Offloading hooks replace saved tensors by copies: the backward takes them."""
    leaves = _qkv(device, grad=True)
    with torch.autograd.graph.save_on_cpu():
        out = anyflash.attention(*leaves, causal=True)
    found = torch.autograd.grad(out.sum(), leaves)
    expected = torch.autograd.grad(anyflash.attention(*leaves, causal=True).sum(), leaves)
    torch.testing.assert_close(found, expected)


def test_inputs_changed_between_forward_and_backward_are_noticed(device):
    leaves = _qkv(device, grad=True)
    q = leaves[0] * 1
    out = anyflash.attention(q, *leaves[1:])
    q.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_are_not_changed(device):
    for options in ({}, {"backend": "math"}, {"softcap": 3.0}, {"causal": True}):
        leaves = _qkv(device, grad=True)
        before = [t.detach().clone() for t in leaves]
        anyflash.attention(*leaves, **options).sum().backward()
        assert all(torch.equal(a, b) for a, b in zip(leaves, before))


LEAKS = """
import gc, resource, torch, anyflash
q, k, v = (torch.randn(2, 40, 2, 16, requires_grad=True) for _ in range(3))
w = [torch.randn(*s) for s in ((32, 16), (32,), (16, 32), (16,))]
cu = torch.tensor([0, 30, 80], dtype=torch.int32)
flat = [t.detach().reshape(80, 2, 16) for t in (q, k, v)]
options = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=50, max_seqlen_k=50)

def work():
    anyflash.attention(q, k, v, causal=True).sum().backward()
    anyflash.attention(q, k, v, softcap=3.0).sum().backward()
    anyflash.attention(*flat, **options)
    anyflash.attention_kvcache(q[:, :1].detach(), k.detach(), v.detach(), cache_seqlens=7)
    anyflash.fused_mlp(q, *w).sum().backward()
    for bad in (dict(dropout_p=2.0), dict(softmax_scale=float("nan")), dict(backend="aten_cudnn")):
        try:
            anyflash.attention(q, k, v, **bad)
        except RuntimeError:
            continue
        raise SystemExit("accepted")

def repeat(n):
    for _ in range(n):
        work()
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
repeat(150)
before = repeat(50)
print(repeat(400) - before)
"""


def test_no_memory_is_lost(provider):
    """Four hundred rounds, errors among them. A tensor lost per call would be 10 MB or more."""
    assert int(run_python(LEAKS, ANYFLASH_PROVIDER=provider)) < 3 * 1024


def test_no_tensor_is_kept_alive(device):
    def live():
        gc.collect()
        return sum(1 for o in gc.get_objects() if type(o) is torch.Tensor)

    def once():
        leaves = _qkv(device, grad=True)
        anyflash.attention(*leaves, return_lse=True)[0].sum().backward()

    once()
    before = live()
    for _ in range(5):
        once()
    assert live() <= before


NOTICE = """
import logging, torch, anyflash
logging.basicConfig(format="%(name)s|%(levelname)s|%(message)s", force=True)
q = torch.zeros(1, 4, 1, 8)
for _ in range(3):
    anyflash.attention(q, q, q)
for _ in range(3):
    anyflash.attention(q, q, q, softcap=2.0)
anyflash.attention(q.bfloat16(), q.bfloat16(), q.bfloat16(), softcap=2.0)
"""


def _notices(provider: str, code: str = NOTICE, **environment: str) -> list[str]:
    merged = f"import sys; sys.stderr = sys.stdout\n{code}"
    environment = {"ANYFLASH_PROVIDER": provider, "ANYFLASH_CPU_ISA": "none", **environment}
    return [line for line in run_python(merged, **environment).splitlines() if line]


def test_each_fallback_is_noticed_once(provider):
    lines = _notices(provider)
    assert 2 <= len(lines) <= 3, lines
    assert all(line.startswith("anyflash|WARNING|") for line in lines)
    said = "this CPU has none" if _loader.cpu_isa() == "none" else "ANYFLASH_CPU_ISA allows none"
    assert "aten_cpu" in lines[0] and "kernel: needs" in lines[0] and said in lines[0]
    assert "math" in lines[1] and "softcap" in lines[1]
    assert len(set(lines)) == len(lines)


def test_both_providers_notice_in_the_same_words(provider):
    if provider != "binary":
        pytest.skip("compared in the run of the binary")
    assert _notices("binary") == _notices("python") != []


def test_no_notice_for_the_first_choice(provider):
    code = NOTICE.replace("softcap=2.0", 'softcap=2.0, backend="math"').replace(
        "(q, q, q)", '(q, q, q, backend="aten_cpu")'
    )
    assert _notices(provider, code) == []


def test_what_runs_where_all_is_well_is_said_to_who_asks(provider):
    code = """
import torch, anyflash
q = torch.zeros(1, 4, 2, 8)
for _ in range(2):
    anyflash.attention(q, q, q, causal=True, backend="aten_cpu")
with torch.no_grad():
    anyflash.attention_kvcache(q, q, q, backend="math", cache_seqlens=2)
"""
    assert _notices(provider, code) == []
    assert _notices(provider, code, ANYFLASH_VERBOSE="1") == [
        "anyflash: attention forward, fp32, head_dim 8, causal: runs on PyTorch's CPU attention "
        "(aten_cpu)",
        "anyflash: attention forward, fp32, head_dim 8, seqused_k: runs on plain PyTorch operators "
        "(math)",
    ]
    log = "import logging\nlogging.basicConfig(level=logging.INFO, format='%(levelname)s')"
    assert _notices(provider, log + code, ANYFLASH_VERBOSE="1") == ["INFO", "INFO"]


def test_the_kernel_that_runs_is_named(provider):
    if _loader.cpu_isa() == "none":
        pytest.skip("no kernels here")
    code = "import torch, anyflash\nq = torch.zeros(1, 4, 2, 8)\nanyflash.attention(q, q, q)"
    (line,) = _notices(provider, code, ANYFLASH_VERBOSE="1", ANYFLASH_CPU_ISA=_loader.cpu_isa())
    name = anyflash.explain("fp32 head_dim 8", device="cpu").decisions[0]["instance"]
    assert line.endswith(f"runs on anyflash's kernel ({name})")


def test_notices_can_be_silenced(device, caplog):
    logger = logging.getLogger("anyflash")
    assert logger.level in (logging.NOTSET, logging.WARNING)
    assert logger.propagate


def test_deterministic_algorithms_mode(device):
    leaves = _qkv(device, grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        for options in ({}, {"softcap": 3.0}, {"causal": True, "window_size": (4, 0)}):
            anyflash.attention(*leaves, **options).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_anomaly_mode_finds_nothing(device):
    """Rows without keys must not make NaN on the way."""
    q, k, v = (
        t.requires_grad_() for t in (torch.randn(1, n, 2, 8, device=device) for n in (9, 4, 4))
    )
    with torch.autograd.detect_anomaly(check_nan=True):
        anyflash.attention(q, k, v, causal=True).sum().backward()
        anyflash.attention(q, k, v, causal=True, softcap=2.0).sum().backward()
    assert torch.equal(q.grad[:, :5], torch.zeros_like(q.grad[:, :5]))


def test_default_dtype_does_not_matter(device):
    q, k, v = _qkv(device)
    expected = anyflash.attention(q, k, v, softcap=2.0, return_lse=True)
    torch.set_default_dtype(torch.float64)
    try:
        found = anyflash.attention(q, k, v, softcap=2.0, return_lse=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_after_fork(provider):
    """Data loaders fork after the library ran."""
    code = """
import os, torch, anyflash
torch.set_num_threads(1)
q = torch.randn(1, 16, 1, 8)
expected = anyflash.attention(q, q, q, softcap=2.0)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(anyflash.attention(q, q, q, softcap=2.0), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run_python(code, ANYFLASH_PROVIDER=provider).strip().endswith("0")
