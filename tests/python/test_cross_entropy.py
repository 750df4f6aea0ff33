"""Cross entropy: values and gradients against float64, and what a good guess gets wrong."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy as upstream_names
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from hypothesis import given, settings
from hypothesis import strategies as st

import anyflash

pytestmark = pytest.mark.providers

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-12}
DTYPES = list(TOLERANCE)


def _reference(logits, labels, smoothing=0.0, scale=1.0, z_scale=0.0, ignore=-100):
    """(losses, z_losses) in float64, written out."""
    x = logits.double() * scale
    lse = x.logsumexp(1)
    counts = labels != ignore
    at_label = x.gather(1, torch.where(counts, labels, 0)[:, None])[:, 0]
    z_losses = torch.where(counts, z_scale * lse.square(), 0.0)
    losses = (1 - smoothing) * (lse - at_label) + smoothing * (lse - x.mean(1))
    return torch.where(counts, losses, 0.0) + z_losses, z_losses


def problem(device, rows=6, vocab=50, dtype=torch.float32, padding=0):
    torch.manual_seed(rows * 1000 + vocab)
    storage = torch.full((rows, vocab + padding), math.nan, device=device, dtype=dtype)
    logits = storage[:, :vocab].copy_(2 * torch.randn(rows, vocab, device=device))
    labels = torch.randint(vocab, (rows,), device=device)
    labels[1::3] = -100
    return logits, labels


def _check(logits, labels, dlosses, inplace, **options):
    """Losses, z-losses and the gradient of one call against the reference."""
    names = {
        "smoothing": "label_smoothing",
        "scale": "logit_scale",
        "z_scale": "lse_square_scale",
        "ignore": "ignore_index",
    }
    exact = logits.detach().double().requires_grad_()
    expected, expected_z = _reference(exact, labels, **options)
    (expected_gradient,) = torch.autograd.grad(expected, exact, dlosses.double())
    leaf = logits.detach().requires_grad_()
    inner = leaf.view_as(leaf)
    losses, z_losses = anyflash.cross_entropy(
        inner,
        labels,
        inplace_backward=inplace,
        **{names[name]: value for name, value in options.items()},
    )
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert losses.dtype == z_losses.dtype == wide and losses.shape == labels.shape
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if wide == torch.float32 else {"atol": 0, "rtol": 1e-9}
    torch.testing.assert_close(losses.double(), expected.detach(), **tolerance)
    torch.testing.assert_close(z_losses.double(), expected_z.detach(), **tolerance)
    (gradient,) = torch.autograd.grad(losses, leaf, dlosses.to(wide))
    assert gradient.dtype == logits.dtype
    rtol = TOLERANCE[logits.dtype]
    atol = 1e-6 if wide == torch.float32 else 1e-12
    torch.testing.assert_close(gradient.double(), expected_gradient, atol=atol, rtol=4 * rtol)
    return gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"smoothing": 0.1},
        {"scale": 0.7},
        {"z_scale": 1e-2},
        {"smoothing": 0.3, "scale": 1.7, "z_scale": 1e-3, "ignore": 7},
    ],
    ids=str,
)
def test_values_and_gradients(device, dtype, inplace, options):
    logits, labels = problem(device, dtype=dtype, padding=3)
    if options.get("ignore", -100) != -100:
        labels = labels.clamp(0)
        labels[2] = options["ignore"]
    _check(logits, labels, torch.randn(6, device=device), inplace, **options)


@given(
    rows=st.integers(1, 5),
    vocab=st.one_of(st.integers(1, 70), st.sampled_from([1000, 16384, 16385, 33000])),
    padding=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.25]),
    scale=st.sampled_from([1.0, 0.5]),
    z_scale=st.sampled_from([0.0, 1e-2]),
)
@settings(max_examples=40, deadline=None)
def test_any_shape_and_option(rows, vocab, padding, dtype, inplace, smoothing, scale, z_scale):
    logits, labels = problem("cpu", rows, vocab, dtype, padding)
    options = {"smoothing": smoothing, "scale": scale, "z_scale": z_scale}
    _check(logits, labels, torch.randn(rows), inplace, **options)


def test_gradcheck(device):
    logits, labels = problem(device, 4, 7, torch.float64)
    logits.requires_grad_()

    def losses(x):
        return anyflash.cross_entropy(
            x, labels, label_smoothing=0.2, logit_scale=1.3, lse_square_scale=0.1
        )[0]

    assert torch.autograd.gradcheck(losses, logits)


def test_logits_with_neighbouring_rows_apart_and_other_layouts(device):
    """Columns first, rows that overlap, labels with a stride."""
    logits, labels = problem(device, 6, 9)
    twice = torch.stack([labels, labels], 1)[:, 0]
    dlosses = torch.randn(6, device=device)
    expected = _check(logits, labels, dlosses, False)
    columns = logits.T.contiguous().T
    for inplace in (False, True):
        before = columns.clone()
        torch.testing.assert_close(_check(columns, twice, dlosses, inplace), expected)
        assert torch.equal(columns, before)
        same = logits[:1].expand(6, 9)
        _check(same, labels, dlosses, inplace)
        assert torch.equal(same, logits[:1].expand(6, 9))


def test_labels_of_other_integers(device):
    logits, labels = problem(device)
    expected = anyflash.cross_entropy(logits, labels)[0]
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(anyflash.cross_entropy(logits, labels.to(dtype))[0], expected)


def test_bits_do_not_depend_on_threads():
    logits, labels = problem("cpu", 2, 50_000)
    logits.requires_grad_()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses, _ = anyflash.cross_entropy(logits, labels, label_smoothing=0.1)
            found.append((losses, torch.autograd.grad(losses.sum(), logits)[0]))
    finally:
        torch.set_num_threads(before)
    if anyflash._loader.has_kernels():
        for losses, gradient in found:
            assert torch.equal(losses, found[0][0]) and torch.equal(gradient, found[0][1])
    for losses, gradient in found:
        torch.testing.assert_close(losses, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


# ---- What a good guess gets wrong.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ignored_rows_are_zero_even_where_their_numbers_are_not(device, dtype):
    logits, labels = problem(device, dtype=dtype)
    logits[1] = math.nan
    logits[4] = math.inf
    logits.requires_grad_()
    losses, z_losses = anyflash.cross_entropy(
        logits, labels, label_smoothing=0.1, lse_square_scale=1.0
    )
    (gradient,) = torch.autograd.grad(losses, logits, torch.full_like(losses, math.inf))
    for row in (1, 4):
        assert losses[row] == 0 and z_losses[row] == 0 and (gradient[row] == 0).all()


def test_z_losses_have_no_gradient_and_are_part_of_losses(device):
    logits, labels = problem(device)
    logits.requires_grad_()
    losses, z_losses = anyflash.cross_entropy(logits, labels, lse_square_scale=0.5)
    plain, zeros = anyflash.cross_entropy(logits, labels)
    assert losses.requires_grad and not z_losses.requires_grad
    torch.testing.assert_close(losses - z_losses, plain)
    assert (zeros == 0).all()


def test_precomputed_lse(device):
    """Is taken as it is, and only where the loss is of the logits as they are."""
    logits, labels = problem(device)
    logits.requires_grad_()
    lse = logits.detach().logsumexp(1)
    expected = anyflash.cross_entropy(logits, labels, lse_square_scale=0.1)[0]
    given_lse = anyflash.cross_entropy(logits, labels, lse, lse_square_scale=0.1)[0]
    torch.testing.assert_close(given_lse, expected)
    (a,) = torch.autograd.grad(expected.sum(), logits)
    (b,) = torch.autograd.grad(given_lse.sum(), logits)
    torch.testing.assert_close(a, b)
    shifted = anyflash.cross_entropy(logits, labels, lse + 1)[0]
    plain = anyflash.cross_entropy(logits, labels)[0]
    torch.testing.assert_close(shifted, torch.where(labels >= 0, plain + 1, 0.0))
    for options in ({"label_smoothing": 0.1}, {"logit_scale": 2.0}):
        wrong = anyflash.cross_entropy(logits, labels, lse + 1, **options)[0]
        assert torch.equal(wrong, anyflash.cross_entropy(logits, labels, **options)[0])


def test_inplace_backward_overwrites_the_logits_and_nobody_is_fooled(device):
    logits, labels = problem(device)
    logits.requires_grad_()
    expected = torch.autograd.grad(anyflash.cross_entropy(logits, labels)[0].sum(), logits)[0]
    inner = (logits * 1.0).tanh().atanh()  # not a leaf
    address, version = inner.data_ptr(), inner._version
    later = inner.sigmoid().sum() * 0 + (inner * inner).sum()
    losses, _ = anyflash.cross_entropy(inner, labels, inplace_backward=True)
    gradient = torch.autograd.grad(losses.sum(), inner, retain_graph=True)[0]
    assert gradient.data_ptr() == address and inner._version > version
    torch.testing.assert_close(inner.detach(), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_no_second_derivative(device):
    logits, labels = problem(device, 4, 7, torch.float64)
    logits.requires_grad_()
    losses = anyflash.cross_entropy(logits, labels)[0]
    (gradient,) = torch.autograd.grad(losses.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_reductions(device, reduction):
    logits, labels = problem(device)
    logits.requires_grad_()
    module = CrossEntropyLoss(
        reduction=reduction, label_smoothing=0.1, lse_square_scale=1e-2, return_z_loss=True
    )
    loss, z_loss = module(logits, labels)
    expected = F.cross_entropy(
        logits, labels, label_smoothing=0.1, reduction="sum" if reduction == "mean" else reduction
    )
    z = torch.where(labels >= 0, 1e-2 * logits.detach().logsumexp(1).square(), 0.0)
    if reduction != "none":
        z = z.sum()
    if reduction == "mean":  # PyTorch's weighs by class; with equal weights it is this
        expected, z = expected / (labels >= 0).sum(), z / (labels >= 0).sum()
    torch.testing.assert_close(loss, expected + z)
    torch.testing.assert_close(z_loss, z)
    assert not z_loss.requires_grad
    assert loss.shape == (labels.shape if reduction == "none" else ())
    plain = CrossEntropyLoss(reduction=reduction, label_smoothing=0.1, lse_square_scale=1e-2)
    assert torch.equal(plain(logits, labels), loss)


def test_module_when_all_rows_are_ignored(device):
    """The mean is 0 / 0 as upstream and in PyTorch; the gradient stays 0."""
    logits, labels = problem(device)
    logits.requires_grad_()
    ignored = torch.full_like(labels, -100)
    loss = CrossEntropyLoss()(logits, ignored)
    assert loss.isnan() and CrossEntropyLoss(reduction="sum")(logits, ignored) == 0
    loss.backward()
    assert (logits.grad == 0).all()


def test_upstream_names(device):
    logits, labels = problem(device)
    expected = anyflash.cross_entropy(logits, labels, label_smoothing=0.2, lse_square_scale=0.1)
    options = (None, 0.2, 1.0, 0.1, -100, False, None)
    for function in (cross_entropy_loss, upstream_names.CrossEntropyLoss.apply):
        result = function(logits, labels, *options)
        assert type(result) is tuple and len(result) == 2
        assert all(torch.equal(a, b) for a, b in zip(result, expected))
        assert len(function(logits, labels)) == 2
    with pytest.raises(NotImplementedError, match="Only support reduction"):
        CrossEntropyLoss(reduction="batchmean")


# ---- Bad input.


@pytest.mark.parametrize("label", [50, -1, -101, 2**40, -(2**63)])
def test_label_out_of_range(device, label):
    logits, labels = problem(device)
    labels.clamp_(0)[3:] = label
    if device != "cpu":
        assert anyflash.cross_entropy(logits, labels)[0][3:].isnan().all()
        return
    text = rf"labels: expected 0 <= label < 50 or ignore_index -100, got {label} in row 3"
    with pytest.raises(RuntimeError, match=text):
        anyflash.cross_entropy(logits, labels)
    assert anyflash.cross_entropy(logits, labels, ignore_index=label)[0][3:].eq(0).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing: expected 0 <= it < 1, got 1"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected 0 <= it < 1, got -0.1"),
        ({"label_smoothing": math.nan}, "label_smoothing: expected 0 <= it < 1, got nan"),
        ({"logit_scale": 0.0}, "logit_scale: expected a positive number, got 0"),
        ({"logit_scale": math.inf}, "logit_scale: expected a positive number, got inf"),
        ({"lse_square_scale": math.nan}, "lse_square_scale: expected a finite number, got nan"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"labels: expected \(6,\), one per row"),
        ({"labels": torch.zeros(6, 1, dtype=torch.int64)}, r"labels: .* got \(6, 1\)"),
        ({"labels": torch.zeros(6)}, "labels: expected int64, got fp32"),
        ({"labels": torch.zeros(6, dtype=torch.bool)}, "labels: expected int64, got bool"),
        ({"logits": torch.zeros(6)}, r"logits: expected \(rows, vocab\) .* got \(6,\)"),
        ({"logits": torch.zeros(2, 3, 50)}, r"logits: expected \(rows, vocab\)"),
        ({"logits": torch.zeros(6, 0)}, r"logits: .* at least one class, got \(6, 0\)"),
        ({"logits": torch.zeros(6, 50).int()}, "logits: expected fp16, bf16, fp32 or fp64, got in"),
        ({"precomputed_lse": torch.zeros(5)}, r"precomputed_lse: expected \(6,\)"),
        ({"precomputed_lse": torch.zeros(6).half()}, "precomputed_lse: expected fp32, got fp16"),
        (
            {"labels": torch.zeros(6, dtype=torch.int64, device="meta")},
            "labels.* device|one device",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_refusals(change, text, requires_grad):
    logits, labels = problem("cpu")
    arguments = {"logits": logits, "labels": labels, **change}
    if requires_grad and arguments["logits"].is_floating_point():
        arguments["logits"].requires_grad_()
    with pytest.raises(RuntimeError, match=text):
        anyflash.cross_entropy(**arguments)


def test_refusals_of_types():
    logits, labels = problem("cpu")
    with pytest.raises(TypeError, match="labels: expected a torch.Tensor, got list"):
        anyflash.cross_entropy(logits, labels.tolist())


def test_no_rows(device):
    logits = torch.empty(0, 50, device=device, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    for inplace in (False, True):
        losses, z_losses = anyflash.cross_entropy(
            logits.view_as(logits), labels, inplace_backward=inplace
        )
        assert losses.shape == z_losses.shape == (0,)
        assert torch.autograd.grad(losses.sum(), logits)[0].shape == (0, 50)


def test_operator_in_place_refuses_rows_that_overlap(device):
    logits = torch.zeros(1, 5, device=device).expand(3, 5)
    labels, ones = torch.zeros(3, dtype=torch.int64, device=device), torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="do not overlap, got strides"):
        torch.ops.anyflash.cross_entropy_backward_(
            ones, logits, labels, ones, 0.0, 1.0, 0.0, -100, 0, 5
        )
    with pytest.raises(RuntimeError, match="total_classes: expected at least"):
        torch.ops.anyflash.cross_entropy_forward(logits, labels, None, 0.0, 1.0, 0.0, -100, 3, 7)
