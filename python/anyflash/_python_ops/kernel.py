"""The route ``kernel`` (csrc/attention/kernel.cpp): results are allocated, what no kernel reads is
converted, the core launches."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _core, _records, _threads
from .arguments import AttentionArgs, BackwardArgs, Gradients
from .results import empty_results

_PACK = 8  # CUDA kernels move 16 bytes at a time


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _is_readable(x: Tensor) -> bool:
    """Whether a kernel on x's device takes its rows as they lie."""
    if not _on_gpu(x):
        return x.stride(-1) == 1 or x.shape[-1] <= 1
    whole = x.stride(-1) == 1 and x.shape[-1] % _PACK == 0 and x.data_ptr() % 16 == 0
    return whole and all(stride % _PACK == 0 for stride in x.stride()[:-1])


class _Converted:
    """Makes the views what a kernel reads; keeps the copies that it takes."""

    def __init__(self, args: AttentionArgs, call: _records.AttentionCall) -> None:
        self.call = call
        self._kept: list[Tensor] = []
        if _on_gpu(args.q):
            for name, x in (("q", args.q), ("k", args.k), ("v", args.v)):
                self.align(self.call, name, x)
        if args.bias is not None and args.bias.dtype == torch.float64:
            self.replace("bias", args.bias.float())
        if args.sinks is not None:
            self.replace("sinks", args.sinks.float().contiguous())

    def align(self, record: Any, name: str, x: Tensor) -> None:
        """On a GPU."""
        if not _is_readable(x):
            self.replace(name, F.pad(x, (0, -x.shape[-1] % _PACK)).contiguous(), record)

    def replace(self, name: str, x: Tensor, record: Any = None) -> None:
        self._kept.append(x)
        _records.put(self.call if record is None else record, name, x)


class _Output:
    """A result in the layout that the operators promise, and the tensor that the kernel writes:
    the same, or one with other strides and perhaps more columns."""

    def __init__(self, promised: Tensor) -> None:
        self.promised = self.written = promised
        if not _is_readable(promised):
            columns = promised.shape[-1] + (-promised.shape[-1] % _PACK if _on_gpu(promised) else 0)
            self.written = promised.new_empty((*promised.shape[:-1], columns))

    def finish(self) -> Tensor:
        if self.written is not self.promised:
            self.promised.copy_(self.written[..., : self.promised.shape[-1]])
        return self.promised


def forward(
    choice: _records.Choice, args: AttentionArgs, call: _records.AttentionCall
) -> tuple[Tensor, Tensor]:
    """out and lse of schemas.def."""
    promised, lse = empty_results(args)
    if lse.numel() == 0:
        return promised, lse
    out = _Output(promised)
    converted = _Converted(args, call)
    results = _records.new(_records.AttentionResults)
    _records.put(results, "out", out.written)
    _records.put(results, "lse", lse)
    library, records = _core.loaded(), (ctypes.byref(call), ctypes.byref(results))
    with _threads.launch_on(args.q) as where:
        room = library.anyflash_attention_forward_workspace(choice.instance, records[0])
        workspace = _workspace(room, args.q, results)
        _core.raise_for(library.anyflash_run_attention(choice.instance, *records, where))
    del converted, workspace
    return out.finish(), lse


def backward(
    choice: _records.Choice,
    args: AttentionArgs,
    grad: BackwardArgs,
    call: _records.AttentionCall,
    grad_call: _records.BackwardCall,
) -> Gradients:
    """dq, dk, dv of schemas.def, from the out and lse that are given."""
    converted = _Converted(args, call)
    lse = _core.contiguous_rows(grad.lse)
    _records.put(grad_call, "lse", lse)
    dlse = None if grad.dlse is None else _core.contiguous_rows(grad.dlse.float())
    _records.put(grad_call, "dlse", dlse)
    if _on_gpu(args.q):
        converted.align(grad_call, "dout", grad.dout)
        converted.align(grad_call, "out", grad.out)
    outputs = [_Output(torch.empty_like(x)) for x in (args.q, args.k, args.v)]
    if _on_gpu(args.q) and not (args.seqused_k is None and args.leftpad_k is None):
        for output in outputs[1:]:  # kernels write the keys that are used
            output.written.zero_()
    results = _records.new(_records.AttentionResults)
    for name, output in zip(("dq", "dk", "dv"), outputs):
        _records.put(results, name, output.written)
    dbias = _sums(args.bias, grad.bias_requires_grad)
    dsinks = _sums(args.sinks, grad.sinks_requires_grad)
    _records.put(results, "dbias", dbias)
    _records.put(results, "dsinks", dsinks)
    library = _core.loaded()
    records: tuple[Any, ...] = tuple(map(ctypes.byref, (call, grad_call, results)))
    with _threads.launch_on(args.q) as where:
        room = library.anyflash_attention_backward_workspace(choice.instance, *records)
        workspace = _workspace(room, args.q, results)
        _core.raise_for(library.anyflash_run_attention_backward(choice.instance, *records, where))
    del converted, workspace
    gradients = Gradients(*(output.finish() for output in outputs))
    if dbias is not None and args.bias is not None:
        gradients.dbias = dbias.to(args.bias.dtype)
    if dsinks is not None and args.sinks is not None:
        gradients.dsinks = dsinks.to(args.sinks.dtype)
    return gradients


def _workspace(room: int, q: Tensor, results: _records.AttentionResults) -> Tensor | None:
    """Memory for the time of the call."""
    if room == 0:
        return None
    workspace = q.new_empty(room, dtype=torch.uint8)
    results.workspace = workspace.data_ptr()
    return workspace


def _sums(x: Tensor | None, wanted: bool) -> Tensor | None:
    """fp32 zeros in x's shape, contiguous, to add a gradient up in."""
    if x is None or not wanted:
        return None
    return torch.zeros(x.shape, dtype=torch.float32, device=x.device)
