"""What is to be checked on the stand-in device alone: which path runs, and that neither memory of
the device is touched nor waited for. test_stand_in_device.py runs this, with ``--device standin``.
"""

from __future__ import annotations

import graph_cases
import pytest
import torch
from stand_in_device import NAME, host_reads, sdpa_calls
from support import expected_of, inputs_of, problem_of, run_python

import anyflash
from anyflash.testing import CORNER, CORRECTNESS, assert_close

CASES = [pytest.param(case, id=case.name) for case in CORRECTNESS + CORNER]
DIFFERENTIABLE = [case for case in CORRECTNESS + CORNER if case.differentiable]
OURS = "AttentionFunctionBackward"


@pytest.fixture(autouse=True)
def here(device):
    assert device == NAME


def _case(name):
    return next(case for case in CORRECTNESS + CORNER if case.name == name)


def _leaves(inputs):
    leaves = {n: x.detach().requires_grad_() for n, x in inputs.differentiable().items()}
    return leaves, {n: leaves.get(n, x) for n, x in inputs.options.items()}


def _is_by_pytorch(case):
    """Whether the call without a log-sum-exp is PyTorch's."""
    route = anyflash.decide(problem_of(case, "forward", NAME, None, return_lse=False))["route"]
    assert route in ("aten_sdpa", "math")
    return route == "aten_sdpa"


def _nodes(out):
    """The names of the graph's nodes."""
    found, waiting = set(), [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return {node.name() for node in found}


# ---- The device itself.


def test_views_are_of_one_memory():
    x = torch.zeros(4, 5, device=NAME)
    x.narrow(0, 1, 2).transpose(0, 1)[1:].copy_(torch.ones(4, 2))
    x.view(20)[19:].fill_(7)
    expected = torch.zeros(4, 5)
    expected[1:3, 1:] = 1
    expected[3, 4] = 7
    assert torch.equal(x.cpu(), expected)


def test_who_looks_at_the_memory_dies():
    code = (
        "import ctypes, stand_in_device, torch; stand_in_device.load()\n"
        "address = torch.ones(1, device='standin').data_ptr()\n"
        "print('alive', flush=True)\n"
        "ctypes.string_at(address, 1)"
    )
    with pytest.raises(AssertionError, match=r"exit status -11\nalive"):
        run_python(code)


def test_reads_are_counted():
    x = torch.ones(3, device=NAME)
    before = host_reads()
    x.add_(1).sum()
    assert host_reads() == before
    assert x[0].item() == 2
    assert x.cpu()[0] == 2
    assert host_reads() == before + 2


# ---- Attention without a log-sum-exp; test_forward.py and test_backward.py ask for one.


@pytest.mark.parametrize("case", CASES)
def test_forward_without_lse(case):
    inputs = inputs_of(case, NAME)
    before = sdpa_calls()
    out = anyflash.attention(*inputs.qkv, **inputs.options)
    if out.numel() > 0 and case.longest_k > 0:
        assert (sdpa_calls() > before) == _is_by_pytorch(case)
    expected = expected_of(case, NAME)
    assert out.dtype == inputs.qkv[0].dtype
    assert_close(out, expected.exact["out"], expected.low["out"], f"{case.name} out")


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=lambda case: case.name)
def test_backward_without_lse(case):
    inputs = inputs_of(case, NAME)
    leaves, options = _leaves(inputs)
    out = anyflash.attention(*(leaves[n] for n in "qkv"), **options)
    assert (OURS in _nodes(out)) != _is_by_pytorch(case)
    expected = expected_of(case, NAME, gradients=True, dlse=False)
    assert_close(out, expected.exact["out"], expected.low["out"], f"{case.name} out")
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    for name, gradient in zip(leaves, gradients):
        what = f"{case.name} gradient of {name}"
        assert_close(gradient, expected.exact[name], expected.low[name], what)


def test_both_paths_are_here():
    by_pytorch = [case for case in DIFFERENTIABLE if _is_by_pytorch(case)]
    assert 40 < len(by_pytorch) < len(DIFFERENTIABLE) - 10


@pytest.mark.parametrize("asked", ["return_lse", "deterministic"])
def test_what_pytorch_has_not_is_ours(asked):
    case = _case("causal")
    leaves, options = _leaves(inputs_of(case, NAME))
    found = anyflash.attention(*leaves.values(), **options, **{asked: True})
    out = found[0] if asked == "return_lse" else found
    assert OURS in _nodes(out)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs_of(case, NAME).dout)
    expected = expected_of(case, NAME, gradients=True, dlse=False)
    for name, gradient in zip(leaves, gradients):
        assert_close(gradient, expected.exact[name], expected.low[name], name)


@pytest.mark.parametrize("backend", [None, "aten_sdpa"])
def test_pages_have_no_backward_that_needs_a_log_sum_exp(backend):
    case = next(c for c in CORRECTNESS if c.layout == "paged" and _is_by_pytorch(c))
    inputs = inputs_of(case, NAME)
    before = sdpa_calls()
    q, k, v = (x.detach().requires_grad_() for x in inputs.qkv)
    out = anyflash.attention(q, k, v, **inputs.options, backend=backend)
    assert sdpa_calls() > before
    with pytest.raises(RuntimeError, match="block_table: paged attention has no gradient"):
        out.sum().backward()


# ---- The public functions.


def test_dropout_is_that_of_the_cpu():
    """The same generator state drops the same probabilities on every device."""
    from flash_attn import flash_attn_func

    case = _case("dropout_causal_bf16")
    results = []
    for device in ("cpu", NAME):
        leaves = [x.detach().float().requires_grad_() for x in inputs_of(case, device).qkv]
        torch.manual_seed(5)
        out = flash_attn_func(*leaves, dropout_p=0.3, causal=True)
        gradients = torch.autograd.grad(out, leaves, inputs_of(case, device).dout.float())
        results.append([x.detach().cpu() for x in (out, *gradients)])
    for of_cpu, of_device in zip(*results):
        torch.testing.assert_close(of_device, of_cpu)


@pytest.mark.parametrize("backend", ["kernel", "aten_cpu", "aten_flash"])
def test_what_does_not_run_here_is_refused(backend):
    qkv = inputs_of(_case("causal"), NAME).qkv
    what = rf'no back end of "{backend}" can run this attention: {backend}: '
    with pytest.raises(RuntimeError, match=what):
        anyflash.attention(*qkv, backend=backend)


def test_tensors_elsewhere_are_refused():
    inputs = inputs_of(_case("packed_causal"), NAME)
    lengths = {"cu_seqlens_q": inputs.options["cu_seqlens_q"].cpu()}
    with pytest.raises(RuntimeError, match="cu_seqlens_q: expected the device of q, got cpu"):
        anyflash.attention(*inputs.qkv, **{**inputs.options, **lengths})


@pytest.mark.parametrize("needs_grad", [False, True])
def test_strict(needs_grad):
    qkv = [x.detach().requires_grad_(needs_grad) for x in inputs_of(_case("causal"), NAME).qkv]
    refused = pytest.raises(RuntimeError, match='no back end of "kernel" can run this attention')
    with anyflash.backend("kernel,math", strict=True), refused:
        anyflash.attention(*qkv)


def test_strict_environment():
    code = (
        "import stand_in_device, torch; stand_in_device.load()\n"
        "import anyflash\n"
        "q = torch.ones(1, 2, 1, 8, device='standin', requires_grad=True)\n"
        "try:\n"
        "    anyflash.attention(q, q, q)\n"
        "except RuntimeError as error:\n"
        "    print(error)"
    )
    assert 'no back end of "kernel"' in run_python(code, ANYFLASH_STRICT="1")


def test_the_notice_names_what_runs():
    code = (
        "import stand_in_device, torch; stand_in_device.load()\n"
        "import sys; sys.stderr = sys.stdout\n"
        "import anyflash\n"
        "q = torch.ones(1, 2, 1, 8, device='standin')\n"
        "anyflash.attention(q, q, q)"
    )
    notice = "attention runs on PyTorch's public attention (aten_sdpa), because "
    assert notice + "kernel: this build has no attention kernel for this device" in run_python(code)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, needs_grad):
    qkv = [x.detach().requires_grad_(needs_grad) for x in inputs_of(_case("causal"), NAME).qkv]
    expected = anyflash.attention(*(x.to(dtype) for x in qkv), causal=True)
    with torch.autocast(NAME, dtype=dtype):
        out = anyflash.attention(*qkv, causal=True)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
    if needs_grad:
        out.sum().backward()
        assert all(x.grad.dtype == torch.float32 for x in qkv)


@pytest.mark.parametrize("needs_grad", [False, True])
@pytest.mark.parametrize("name", ["packed_causal", "packed_softcap_sinks"])
def test_aot_eager(name, needs_grad):
    torch._dynamo.reset()
    inputs = inputs_of(_case(name), NAME)
    leaves, options = _leaves(inputs)

    def run(q, k, v):
        return anyflash.attention(q, k, v, **options)

    qkv = [leaves[n].detach().requires_grad_(needs_grad) for n in "qkv"]
    expected, out = run(*qkv), torch.compile(run, backend="aot_eager", fullgraph=True)(*qkv)
    torch.testing.assert_close(out, expected)
    if needs_grad:
        found, wanted = (torch.autograd.grad(x, qkv, inputs.dout) for x in (out, expected))
        torch.testing.assert_close(found, wanted)


def test_compiled_inference_needs_no_log_sum_exp():
    """Also where the names are known that trainers look for; their operators return one."""
    import flash_attn  # noqa: F401

    torch._dynamo.reset()
    q = torch.randn(1, 5, 2, 8, device=NAME)
    before = sdpa_calls()
    out = torch.compile(lambda x: anyflash.attention(x, x, x), backend="aot_eager")(q)
    assert sdpa_calls() > before
    torch.testing.assert_close(out, anyflash.attention(q, q, q))


# ---- Nobody waits for the device.


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("needs_grad", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize(
    "name", ["causal", "bias_full", "packed_causal", "packed_seqused", "packed_dropout", "leftpad"]
)
def test_nobody_waits_for_the_device(name, needs_grad, return_lse):
    inputs = inputs_of(_case(name), NAME)
    leaves, options = _leaves(inputs)
    before = host_reads()
    with torch.set_grad_enabled(needs_grad):
        found = anyflash.attention(*(leaves[n] for n in "qkv"), **options, return_lse=return_lse)
        out = found[0] if return_lse else found
        if needs_grad:
            torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    assert host_reads() == before


def test_decoding_does_not_wait_for_the_device():
    cache = [torch.randn(3, 20, 2, 16, device=NAME) for _ in "kv"]
    q, k, v = (torch.randn(3, 1, 2, 16, device=NAME) for _ in "qkv")
    lengths = torch.tensor([4, 19, 0], dtype=torch.int32).to(NAME)
    before = host_reads()
    anyflash.attention_kvcache(q, *cache, k, v, cache_seqlens=lengths, causal=True)
    assert host_reads() == before
    assert torch.equal(cache[0][1, 19], k[1, 0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", graph_cases.CASES)
def test_public_functions_do_not_wait_for_the_device(name, compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    function, parameters = graph_cases.function_of(name, NAME)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves, others = graph_cases.make(name, 5, 22, NAME)
    before = host_reads()
    found = graph_cases.results(function(*leaves, *others))
    if graph_cases.CASES[name].why_not is None:
        graph_cases.gradients(found, (*leaves, *parameters))
    reads_a_length = "max_seqlen tensor" in name
    assert (host_reads() > before) == reads_a_length
