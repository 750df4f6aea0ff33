"""What every test and benchmark of the library shares: cases, inputs, reference, error rule.

Nothing here calls an operator of the library, so that a mistake there cannot hide here.

Typical use::

    for case in CORRECTNESS:
        inputs = make_inputs(case, "cpu")
        expected = expect(inputs)
        out, lse = anyflash.attention(*inputs.qkv, **inputs.options, return_lse=True)
        assert_close(out, expected.exact["out"], expected.low["out"], f"{case.name} out")
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .testing_cases import CORNER, CORRECTNESS, PERFORMANCE, Case
from .testing_reference import dropout_half, keep_mask, philox, reference, reference_kvcache

__all__ = [
    "Case",
    "CORRECTNESS",
    "CORNER",
    "PERFORMANCE",
    "DTYPES",
    "Inputs",
    "Expected",
    "make_inputs",
    "reference",
    "reference_kvcache",
    "expect",
    "error_bound",
    "assert_close",
    "philox",
    "dropout_half",
    "keep_mask",
]

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


class Inputs(NamedTuple):
    """q, k, v, the keyword arguments of `anyflash.attention` and the gradients that come in."""

    case: Case
    qkv: tuple[Tensor, Tensor, Tensor]
    options: dict[str, Any]
    dout: Tensor
    dlse: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that have a gradient, by name."""
        named = dict(zip("qkv", self.qkv))
        for name in ("bias", "sinks"):
            tensor = self.options.get(name)
            if tensor is not None and tensor.is_floating_point():
                named[name] = tensor
        return named


_BIAS_SHAPES = {
    "full": lambda b, h, sq, sk: (b, h, sq, sk),
    "head": lambda b, h, sq, sk: (1, h, sq, sk),
    "key": lambda b, h, sq, sk: (b, 1, 1, sk),
    "plane": lambda b, h, sq, sk: (sq, sk),
    "bool": lambda b, h, sq, sk: (b, 1, sq, sk),
    "inf": lambda b, h, sq, sk: (1, 1, sq, sk),
    "lowest": lambda b, h, sq, sk: (1, 1, sq, sk),
}


def _poisoned(shape: tuple[int, ...], strides: str, dtype: torch.dtype) -> Tensor:
    """A tensor (..., heads, head_dim) of NaN in a storage of NaN, laid out as `strides` says."""
    nan = float("nan")
    if strides == "transposed":
        rows = len(shape) - 3
        swapped = (*shape[:rows], shape[-2], shape[-3], shape[-1])
        return torch.full(swapped, nan, dtype=dtype).transpose(-3, -2)
    if strides == "sliced":
        wide = (*shape[:-2], shape[-2] + 1, shape[-1] + 8)
        return torch.full(wide, nan, dtype=dtype)[..., 1:, 3 : 3 + shape[-1]]
    return torch.full(shape, nan, dtype=dtype)


def _make_qkv(case: Case, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    dtype = DTYPES[case.dtype]
    if case.strides == "fused":
        heads = [shape[-2] for shape in shapes]
        whole = _poisoned((*shapes[0][:-2], sum(heads), shapes[0][-1]), "contiguous", dtype)
        return list(whole.split(heads, dim=-2))
    tensors = [_poisoned(shape, case.strides, dtype) for shape in shapes]
    if case.strides == "expanded":
        tensors[1:] = [tensor[:1].expand_as(tensor) for tensor in tensors[1:]]
    return tensors


def _cumulative(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _make_bias(case: Case, generator: torch.Generator) -> Tensor:
    shape = _BIAS_SHAPES[case.bias](
        len(case.seqlens_q), case.heads, max(case.seqlens_q), case.longest_k
    )
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.bias in ("bool", "inf"):
        visible = bias > -0.5
        visible[..., 1, :] = False
        if case.bias == "bool":
            return visible
        bias = bias.masked_fill(~visible, float("-inf"))
    bias = bias.to(DTYPES[case.dtype])
    if case.bias == "lowest":
        bias[..., 1, :] = torch.finfo(bias.dtype).min
    return bias


def _make_options(case: Case, generator: torch.Generator) -> dict[str, Any]:
    """The keyword arguments of a case, but for the block table."""
    batch = len(case.seqlens_q)
    options: dict[str, Any] = {"causal": case.causal, "window_size": case.window}
    if case.packed:
        options.update(cu_seqlens_q=_cumulative(case.seqlens_q), max_seqlen_q=max(case.seqlens_q))
        options.update(cu_seqlens_k=_cumulative(case.seqlens_k), max_seqlen_k=case.longest_k)
    used = case.seqlens_k if case.layout == "paged" else case.seqused_k
    for name, lengths in (("seqused_k", used), ("leftpad_k", case.leftpad_k)):
        if lengths is not None:
            options[name] = torch.tensor(lengths, dtype=torch.int32)
    if case.alibi:
        shape = (case.heads,) if case.alibi == "heads" else (batch, case.heads)
        options["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.3
    if case.bias:
        options["bias"] = _make_bias(case, generator)
    if case.sinks:
        options["sinks"] = torch.randn(case.heads, generator=generator)
    if case.dropout:
        seed, offset = zlib.crc32(case.name.encode()) << 13, (1 << 33) + 5
        options.update(dropout_p=case.dropout, rng_state=torch.tensor([seed, offset]))
    if case.softcap:
        options["softcap"] = case.softcap
    if case.softmax_scale is not None:
        options["softmax_scale"] = case.softmax_scale
    return options


def _make_block_table(case: Case, pages: int, generator: torch.Generator) -> Tensor:
    """Pages in random order; -1 where no key is."""
    order = torch.randperm(pages - 1, generator=generator).to(torch.int32)
    table = order.reshape(len(case.seqlens_k), -1).clone()
    for b, length in enumerate(case.seqlens_k):
        table[b, -(-length // case.page_size) :] = -1
    return table


def _key_rows(case: Case, tensor: Tensor, table: Tensor | None, sequence: int) -> list[Tensor]:
    """Views of the rows of a sequence that hold keys or values."""
    begin = case.leftpad_k[sequence] if case.leftpad_k else 0
    end = (case.seqused_k or case.seqlens_k)[sequence]
    if table is not None:
        size = case.page_size
        return [tensor[table[sequence, row // size], row % size] for row in range(begin, end)]
    if case.packed:
        start = sum(case.seqlens_k[:sequence])
        return [tensor[start + begin : start + end]]
    return [tensor[sequence, begin:end]]


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """The tensors of a case: the same for every call, NaN where the operators must not look.

    Args:
        case: the problem.
        device: "cpu" or "cuda".

    Returns:
        Inputs whose q, k, v are leaves without requires_grad.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    batch, head_dim_v = len(case.seqlens_q), case.head_dim_v or case.head_dim
    total_q, total_k = sum(case.seqlens_q) + case.slack, sum(case.seqlens_k) + case.slack
    rows_q = (total_q,) if case.packed else (batch, case.seqlens_q[0])
    rows_k: tuple[int, ...] = (total_k,) if case.packed else (batch, case.seqlens_k[0])
    options, table = _make_options(case, generator), None
    if case.paged:
        pages = batch * (-(-max(case.seqlens_k) // case.page_size) + 1) + 1
        rows_k = (pages, case.page_size)
        options["block_table"] = table = _make_block_table(case, pages, generator)
    q, k, v = _make_qkv(
        case,
        [
            (*rows_q, case.heads, case.head_dim),
            (*rows_k, case.heads_k, case.head_dim),
            (*rows_k, case.heads_k, head_dim_v),
        ],
    )

    def fill(rows: Tensor) -> None:
        rows.copy_(torch.randn(rows.shape, generator=generator, dtype=torch.float64))

    fill(q[: sum(case.seqlens_q)] if case.packed else q)
    for b in range(1 if case.strides == "expanded" else batch):
        for tensor in (k, v):
            for rows in _key_rows(case, tensor, table, b):
                fill(rows)

    lse_dtype = torch.float64 if case.dtype == "fp64" else torch.float32
    dout = torch.randn(*q.shape[:-1], head_dim_v, generator=generator, dtype=torch.float64)
    lse_shape = (case.heads, total_q) if case.packed else (batch, case.heads, case.seqlens_q[0])
    dlse = torch.randn(lse_shape, generator=generator, dtype=torch.float64)
    moved = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}
    return Inputs(
        case,
        (_to_device(q, device), _to_device(k, device), _to_device(v, device)),
        moved,
        dout.to(device, q.dtype),
        dlse.to(device, lse_dtype),
    )


def _to_device(tensor: Tensor, device: str) -> Tensor:
    """Moves the whole storage, so that strides and the NaN around the view survive."""
    if device == "cpu":
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class Expected(NamedTuple):
    """Results by name (out, lse, q, k, v, bias, sinks; the last five are gradients)."""

    exact: dict[str, Tensor]  # float64
    low: dict[str, Tensor]  # the same maths as low precision computes it


def _results(inputs: Inputs, compute: torch.dtype, gradients: bool) -> dict[str, Tensor]:
    leaves = {n: x.detach().to(compute) for n, x in inputs.differentiable().items()}
    options = {n: leaves.get(n, x) for n, x in inputs.options.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(gradients)
    out, lse = reference(*(leaves[n] for n in "qkv"), compute=compute, **options)
    results = {"out": out.detach(), "lse": lse.detach()}
    if gradients:
        incoming = [(out, inputs.dout.to(compute)), (lse, inputs.dlse.to(compute))]
        outputs, arriving = zip(*[pair for pair in incoming if pair[0].requires_grad])
        found = torch.autograd.grad(outputs, list(leaves.values()), arriving, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), found):
            results[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def expect(inputs: Inputs, gradients: bool = False, dlse: bool = True) -> Expected:
    """What a right implementation returns, and how far the same maths in low precision is off."""
    if not dlse:
        inputs = inputs._replace(dlse=torch.zeros_like(inputs.dlse))
    dtype = DTYPES[inputs.case.dtype]
    exact, low = (_results(inputs, t, gradients) for t in (torch.float64, dtype))
    if torch.finfo(dtype).bits < 32:
        # Scores are fp32 here too, but their exp has 20 bits in PyTorch's CPU attention.
        low["lse"] = _results(inputs, torch.float32, False)["lse"] + 2.0**-14
    return Expected(exact, low)


_FLOOR = {torch.float16: 2e-5, torch.bfloat16: 2e-5, torch.float32: 5e-6, torch.float64: 1e-12}


def error_bound(exact: Tensor, low: Tensor, dtype: torch.dtype) -> float:
    """Twice the error of low precision, one rounding of the largest value and a tiny floor."""
    finite = exact.isfinite()
    largest = exact[finite].abs().max().item() if finite.any() else 0.0
    error = (low.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    eps = max(torch.finfo(t).eps for t in (dtype, low.dtype))
    return 2 * error + eps * largest + max(_FLOOR[dtype], _FLOOR[low.dtype])


def assert_close(actual: Tensor, exact: Tensor, low: Tensor, what: str) -> None:
    """Holds `actual` to the error rule.

    Raises:
        AssertionError: another shape, an infinity, a NaN or an error above the bound; the message
            names the worst element.
    """
    __tracebackhide__ = True
    assert actual.shape == exact.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    if exact.numel() == 0:
        return
    bound = error_bound(exact, low, actual.dtype)
    got = actual.detach().double()
    error = torch.where(exact.isinf() & (got == exact), torch.zeros_like(got), (got - exact).abs())
    worst = torch.where(error.isnan(), torch.full_like(error, float("inf")), error)
    at = int(worst.argmax())
    if worst.flatten()[at] <= bound:
        return
    index: list[int] = []
    for size in reversed(exact.shape):
        index.insert(0, at % size)
        at //= size
    place = tuple(index)
    raise AssertionError(
        f"{what}[{', '.join(map(str, place))}] = {got[place].item():.6g}, expected "
        f"{exact[place].item():.6g}: error {error[place].item():.3g} is above {bound:.3g} "
        f"({int((~(worst <= bound)).sum())} of {exact.numel()} elements are)"
    )
