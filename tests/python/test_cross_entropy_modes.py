"""Cross entropy over a split vocabulary, raw, within its memory, compiled, under functorch."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from gloo import run_processes
from support import run_python
from test_cross_entropy import problem
from torch.fx.experimental.proxy_tensor import make_fx

import anyflash

pytestmark = pytest.mark.providers

# ---- A vocabulary that lies in parts.


def _parallel_worker(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _check_parallel(rank, torch.distributed.group.WORLD, dtype)
    _check_parallel_groups(rank)
    _check_unequal_parts(rank)


def _check_parallel(rank, group, dtype):
    """This process's half of the vocabulary against the loss over all of it."""
    logits, labels = problem("cpu", 9, 40, dtype)
    dlosses = torch.randn(9).to(torch.float64 if dtype == torch.float64 else torch.float32)
    for inplace in (False, True):
        for options in (
            {},
            {"label_smoothing": 0.2},
            {"logit_scale": 0.7, "lse_square_scale": 1e-2, "label_smoothing": 0.1},
            {"ignore_index": 30},
        ):
            if "ignore_index" in options:
                labels = labels.clamp(0)
                labels[:2] = 30
            whole = logits.clone().requires_grad_()
            expected = anyflash.cross_entropy(whole, labels, **options)
            (gradient,) = torch.autograd.grad(expected[0], whole, dlosses)
            part = logits[:, 20 * rank : 20 * rank + 20].clone().requires_grad_()
            found = anyflash.cross_entropy(
                part * 1, labels, process_group=group, inplace_backward=inplace, **options
            )
            (part_gradient,) = torch.autograd.grad(found[0], part, dlosses)
            close = {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(found, expected, **close)
            assert not found[1].requires_grad
            half = gradient[:, 20 * rank : 20 * rank + 20]
            if dtype == torch.bfloat16:
                close = {"atol": 1e-6, "rtol": 1e-2}
            torch.testing.assert_close(part_gradient, half, **close)


def _check_parallel_groups(rank):
    group = torch.distributed.group.WORLD
    logits, labels = problem("cpu", 9, 40)
    part = logits[:, 20 * rank : 20 * rank + 20].clone()
    expected = cross_entropy_loss(logits, labels)[0]
    given_lse = cross_entropy_loss(part, labels, part.logsumexp(1), process_group=group)[0]
    torch.testing.assert_close(given_lse, expected)
    module = CrossEntropyLoss(process_group=group)
    torch.testing.assert_close(module(part, labels), CrossEntropyLoss()(logits, labels))
    labels[3] = 40
    with pytest.raises(RuntimeError, match="labels: expected 0 <= label < 40 .* got 40 in row 3"):
        anyflash.cross_entropy(part, labels, process_group=group)
    labels[3] = 39
    alone = [torch.distributed.new_group([i]) for i in range(2)]
    one = cross_entropy_loss(logits, labels, process_group=alone[rank])[0]
    assert torch.equal(one, cross_entropy_loss(logits, labels)[0])
    with pytest.raises(ValueError, match="process_group: expected a group that this process"):
        anyflash.cross_entropy(logits, labels, process_group=alone[1 - rank])


def _check_unequal_parts(rank):
    """Both processes hear it, though one alone has a label beyond twice its own width."""
    logits, labels = torch.zeros(3, (20, 10)[rank]), torch.tensor([0, 25, 29])
    for leaf in (logits, logits.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match=r"logits: expected as many .* got \[20, 10\]"):
            anyflash.cross_entropy(leaf, labels, process_group=torch.distributed.group.WORLD)
    with pytest.raises(ValueError, match="process_group: expected a group .* got 'gloo'"):
        anyflash.cross_entropy(logits, labels, process_group="gloo")


def test_process_group(tmp_path):
    run_processes(_parallel_worker, tmp_path)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_raw_functions(device, smoothing):
    """As lit_gpt's loss calls them: forward, mask; mask, backward over the logits."""
    import xentropy_cuda_lib as raw

    logits, labels = problem(device)
    counts = labels >= 0
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    losses, lse = raw.forward(logits, labels, smoothing)
    assert losses.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(losses.masked_fill(~counts, 0), expected)
    torch.testing.assert_close(lse, logits.logsumexp(1))
    uniform = smoothing * (lse - logits.mean(1))
    torch.testing.assert_close(losses[~counts], uniform[~counts], atol=1e-6, rtol=1e-5)

    leaf = logits.clone().requires_grad_()
    dlosses = torch.randn(6, device=device).masked_fill(~counts, 0)
    smoothed = F.cross_entropy(leaf, labels, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(smoothed, leaf, dlosses)
    found = raw.backward(dlosses, logits, lse, labels, smoothing, False)
    torch.testing.assert_close(found, gradient, atol=1e-6, rtol=1e-5)
    version = logits._version
    assert raw.backward(dlosses, logits, lse, labels, smoothing, True) is logits
    assert torch.equal(logits, found) and logits._version > version


def test_raw_functions_of_a_part(device):
    """total_classes: smoothing over the classes of all parts, as lit_gpt combines them."""
    import xentropy_cuda_lib as raw

    logits, labels = problem(device, 7, 30)
    labels = labels.clamp(0)
    smoothing, lse = 0.1, logits.logsumexp(1)
    total = 0
    for begin in (0, 10, 20):
        part, local = logits[:, begin : begin + 10].contiguous(), labels - begin
        losses, lse_part = raw.forward(part, local, smoothing, 30)
        inside = (local >= 0) & (local < 10)
        # Takes out this part's lse, in which the raw loss is measured.
        total = total + losses - torch.where(inside, 1.0, smoothing) * lse_part
        gradient = raw.backward(torch.ones_like(lse), part, lse, local, smoothing, False, 30)
        leaf = logits.clone().requires_grad_()
        F.cross_entropy(leaf, labels, label_smoothing=smoothing, reduction="sum").backward()
        torch.testing.assert_close(gradient, leaf.grad[:, begin : begin + 10], atol=1e-6, rtol=1e-5)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(total + lse, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_raw_functions_of_no_rows(device, dtype):
    import xentropy_cuda_lib as raw

    logits = torch.empty(0, 30, dtype=dtype, device=device)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    for results in (raw.forward(logits, labels, 0.1), raw.forward(logits, labels, 0.0, 60)):
        assert [(x.shape, x.dtype) for x in results] == [((0,), dtype)] * 2
    assert raw.backward(results[0], logits, results[1], labels, 0.1, False).shape == (0, 30)
    with pytest.raises(RuntimeError, match=r"with at least one class, got \(3, 0\)"):
        raw.forward(torch.empty(3, 0, device=device), labels, 0.1)


MEMORY = """
import torch, anyflash
torch.set_num_threads(1)
def read(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))
def above(step, rows=1024):
    logits = torch.randn(rows, 32000, dtype=torch.float32).requires_grad_()
    labels = torch.randint(32000, (rows,))
    inner = logits.view_as(logits)
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = read("VmRSS")
    step(inner, labels)
    return read("VmHWM") - before
def loss(inplace):
    def step(x, y):
        losses = anyflash.cross_entropy(x, y, inplace_backward=inplace)[0]
        torch.autograd.grad(losses.sum(), x)
    return step
for step in (loss(True), loss(False)):
    above(step, 8)
    print(above(step))
"""


def test_memory(device):
    """125 MiB of logits: the backward in place needs next to nothing, the other its result."""
    if device != "cpu" or not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("reads the peak of Linux processes")
    inplace, new = map(
        float, run_python(MEMORY, ANYFLASH_PROVIDER=anyflash._loader.provider).split()
    )
    spare = 20 if anyflash._loader.has_kernels() else 250  # MATH widens a few rows at a time
    assert inplace < spare, f"{inplace:.0f} MiB"
    assert 100 < new < 125 + spare, f"{new:.0f} MiB"


# ---- Modes of torch.


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_module(device, dtype, inplace, fresh_compiler):
    """One full graph with kernel and without, for any number of rows; labels are still checked."""
    module = CrossEntropyLoss(label_smoothing=0.1, inplace_backward=inplace)

    def loss(x, weight, labels):
        return module(x @ weight, labels)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(4, 50, device=device, dtype=dtype, requires_grad=True)
    for rows in (6, 9):
        _, labels = problem(device, rows)
        x = torch.randn(rows, 4, device=device, dtype=dtype, requires_grad=True)
        expected = torch.autograd.grad(loss(x, weight, labels), (x, weight))
        found = torch.autograd.grad(compiled(x, weight, labels), (x, weight))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    labels[0] = 50
    if dtype == torch.float32 and device == "cpu" and anyflash._loader.has_kernels():
        with pytest.raises(RuntimeError, match="labels: expected 0 <= label < 50 .* in row 0"):
            compiled(x, weight, labels)
    else:
        assert compiled(x, weight, labels).isnan()


def test_inductor(device, fresh_compiler):
    def loss(x, labels):
        return CrossEntropyLoss(lse_square_scale=1e-2)(x * 1.5, labels)

    logits, labels = problem(device)
    logits.requires_grad_()
    expected = torch.autograd.grad(loss(logits, labels), logits)[0]
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits, labels), logits)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_checkpointing(device, inplace):
    logits, labels = problem(device)
    logits.requires_grad_()
    expected = torch.autograd.grad(anyflash.cross_entropy(logits, labels)[0].sum(), logits)[0]

    def head(x):
        return cross_entropy_loss(x * 1.0, labels, inplace_backward=inplace)[0].sum()

    for reentrant in (False, True):
        logits.grad = None
        torch.utils.checkpoint.checkpoint(head, logits, use_reentrant=reentrant).backward()
        torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_functorch(device, inplace):
    logits, labels = problem(device)

    def loss(x, y):
        return anyflash.cross_entropy(x, y, label_smoothing=0.1, inplace_backward=inplace)[0].sum()

    before = logits.clone()
    expected = torch.autograd.grad(loss(logits.requires_grad_() * 1, labels), logits)[0]
    torch.testing.assert_close(torch.func.grad(loss)(before, labels), expected)
    each = torch.func.vmap(torch.func.grad(lambda x, y: loss(x[None], y[None])))(before, labels)
    torch.testing.assert_close(each, expected)
    assert torch.equal(before, logits)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: loss(x, labels), (before,), (before,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(before, torch.ones_like(before))
        with pytest.raises(NotImplementedError, match="jvp"):
            loss(dual, labels)


@pytest.mark.parametrize("asks", ["nothing", "logits", "precomputed_lse"])
def test_math_under_every_transform(device, asks):
    """Without a kernel everything runs as PyTorch operations, also where gradients are enabled and
    none is asked for, in a traced graph, and for a batch of gradients."""
    logits, labels = problem(device, 4, 7, torch.float64)
    lse = logits.logsumexp(1).requires_grad_(asks == "precomputed_lse")
    logits.requires_grad_(asks == "logits")

    def losses(x):
        return anyflash.cross_entropy(x, labels, lse)[0]

    def of_rows(losses):
        if asks != "logits":
            return losses(logits)
        rows = torch.eye(4, device=device, dtype=torch.float64)
        return torch.autograd.grad(losses(logits), logits, rows, is_grads_batched=True)[0]

    plain = logits.detach()
    for run in (
        of_rows,
        lambda f: make_fx(f)(logits)(logits),
        lambda f: make_fx(torch.func.jacrev(f))(plain)(plain),
        lambda f: torch.func.jacrev(make_fx(f)(plain))(plain),
        lambda f: torch.func.jacrev(f)(plain),
        lambda f: torch.func.vmap(f)(torch.stack([plain, plain])),
        # A transform that the loss has no part in.
        lambda f: torch.func.grad(lambda x: (x.sum(1) * f(plain)).sum())(plain),
    ):
        expected = run(lambda x: F.cross_entropy(x, labels, reduction="none"))
        torch.testing.assert_close(run(losses), expected)


class _Loss(torch.nn.Module):
    def forward(self, logits, labels, lse):
        return anyflash.cross_entropy(logits, labels, lse)[0]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exported_loss_trains(device, dtype, strict):
    """Also with an lse from outside, whose part of the gradient the operations have to bring."""
    logits, labels = problem(device, 4, 7, dtype)
    arguments = (logits.requires_grad_(), labels, logits.detach().logsumexp(1))
    exported = torch.export.export(_Loss(), arguments, strict=strict).module()
    (found,) = torch.autograd.grad(exported(*arguments).sum(), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(found, expected)


def test_operator_has_the_derivative(device):
    logits, labels = problem(device)
    logits.requires_grad_()
    options = (0.1, 1.0, 1e-2, -100, 0, 50)
    losses, z_losses, lse = torch.ops.anyflash.cross_entropy_forward(logits, labels, None, *options)
    expected, _ = anyflash.cross_entropy(logits, labels, label_smoothing=0.1, lse_square_scale=1e-2)
    assert torch.equal(losses, expected) and not lse.requires_grad and not z_losses.requires_grad
    (found,) = torch.autograd.grad(losses.sum(), logits)
    assert torch.equal(found, torch.autograd.grad(expected.sum(), logits)[0])


def test_autocast_and_inference_mode(device):
    logits, labels = problem(device)
    expected = anyflash.cross_entropy(logits, labels)[0]
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(anyflash.cross_entropy(logits, labels)[0], expected)
    with torch.inference_mode():
        assert torch.equal(anyflash.cross_entropy(logits, labels)[0], expected)


def test_meta_tensors():
    logits = torch.empty(6, 50, device="meta", requires_grad=True)
    labels = torch.empty(6, dtype=torch.int64, device="meta")
    losses, _ = anyflash.cross_entropy(logits, labels)
    assert losses.shape == (6,) and losses.device.type == "meta"
    assert torch.autograd.grad(losses.sum(), logits)[0].shape == (6, 50)


def test_operator_on_parts_of_the_classes_has_no_derivative(device):
    logits = torch.randn(2, 10, device=device, requires_grad=True)
    arguments = (torch.tensor([3, 12], device=device), None, 0.0, 1.0, 0.0, -100, 0, 20)
    with pytest.raises(RuntimeError, match="total_classes: expected vocab 10 .* got 20"):
        torch.ops.anyflash.cross_entropy_forward(logits, *arguments)
    losses, *_ = torch.ops.anyflash.cross_entropy_forward(logits.detach(), *arguments)
    assert not losses.requires_grad


def test_numbers_beyond_what_a_kernel_holds(device):
    logits, labels = torch.randn(2, 7, device=device), torch.tensor([3, 4], device=device)
    options = (None, 0.0, 1.0, 0.0, -100, 2**63 - 1, 100)
    with pytest.raises(RuntimeError, match="total_classes"):
        torch.ops.anyflash.cross_entropy_forward(logits, labels, *options)
    for scale in (1e39, 1e-50):
        if anyflash._operators.runs_on_kernel("cross_entropy", logits):
            with pytest.raises(RuntimeError, match="logit_scale"):
                anyflash.cross_entropy(logits, labels, logit_scale=scale)
    with pytest.raises(RuntimeError, match="logits: expected"):
        anyflash.cross_entropy(logits[None].requires_grad_(), labels, inplace_backward=True)
