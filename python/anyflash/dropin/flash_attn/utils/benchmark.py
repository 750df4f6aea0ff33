"""Timing, profiling and memory of a function that takes tensors, on any device."""

from __future__ import annotations

from typing import Any, Callable

import torch
import torch.profiler
import torch.utils.benchmark
from torch import Tensor

Timing = tuple[Any, Any]


def _device_of(inputs: tuple[Any, ...], kwinputs: dict[str, Any]) -> torch.device:
    """The first tensor's; without one the accelerator that upstream means, if it is there."""
    for value in (*inputs, *kwinputs.values()):
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Call:
    """One call of fn, under autocast on request, and its backward outside of it."""

    def __init__(
        self, fn: Callable[..., Any], inputs: Any, kwinputs: Any, amp: bool, amp_dtype: torch.dtype
    ) -> None:
        self.fn, self.inputs, self.kwinputs = fn, inputs, kwinputs
        self.amp: dict[str, Any] = {
            "device_type": _device_of(inputs, kwinputs).type,
            "enabled": amp,
        }
        if amp:
            self.amp["dtype"] = amp_dtype

    def forward(self) -> Any:
        """The result; of a tuple the first."""
        with torch.autocast(**self.amp):
            out = self.fn(*self.inputs, **self.kwinputs)
        return out[0] if type(out) is tuple else out

    def gradient_for(self, out: Tensor, given: Tensor | None) -> Tensor:
        """What the backward starts with."""
        if given is None:
            return torch.randn_like(out)
        if given.shape != out.shape:
            raise RuntimeError(
                f"Grad shape does not match output shape: expected {tuple(out.shape)}, "
                f"got {tuple(given.shape)}"
            )
        return given

    def backward(self, out: Tensor, grad: Tensor) -> None:
        """Into empty gradients, so that no addition is counted."""
        for value in self.inputs:
            if isinstance(value, Tensor):
                value.grad = None
        out.backward(grad, retain_graph=True)


def _measure(run: Callable[[], Any], what: str, desc: str, repeats: int, verbose: bool) -> Timing:
    """(torch.utils.benchmark.Timer, its Measurement)"""
    if verbose:
        print(desc, f"- {what} pass")
    timer = torch.utils.benchmark.Timer(
        stmt="run()", globals={"run": run}, num_threads=torch.get_num_threads()
    )
    measurement = timer.timeit(repeats)
    if verbose:
        print(measurement)
    return timer, measurement


def benchmark_forward(
    fn: Callable[..., Any],
    *inputs: Any,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timing:
    """Times ``fn(*inputs, **kwinputs)``.

    Args:
        fn: returns a tensor, or a tuple whose first is one.
        repeats: calls that are timed together.
        desc: printed with verbose.
        verbose: print the result.
        amp: under autocast of amp_dtype on the device of the first tensor.

    Returns:
        torch.utils.benchmark's Timer and Measurement.
    """
    call = _Call(fn, inputs, kwinputs, amp, amp_dtype)
    return _measure(call.forward, "Forward", desc, repeats, verbose)


def benchmark_backward(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timing:
    """Times the backward alone; grad: of the output, None: drawn. Others as benchmark_forward."""
    call = _Call(fn, inputs, kwinputs, amp, amp_dtype)
    out = call.forward()
    grad = call.gradient_for(out, grad)
    return _measure(lambda: call.backward(out, grad), "Backward", desc, repeats, verbose)


def benchmark_combined(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> Timing:
    """Times forward and backward together, as benchmark_backward."""
    call = _Call(fn, inputs, kwinputs, amp, amp_dtype)
    grad = call.gradient_for(call.forward(), grad)
    both = "Forward + Backward"
    return _measure(lambda: call.backward(call.forward(), grad), both, desc, repeats, verbose)


def benchmark_fwd_bwd(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Timing, Timing]:
    """(benchmark_forward, benchmark_backward)"""
    options = dict(
        repeats=repeats, desc=desc, verbose=verbose, amp=amp, amp_dtype=amp_dtype, **kwinputs
    )
    return (
        benchmark_forward(fn, *inputs, **options),
        benchmark_backward(fn, *inputs, grad=grad, **options),
    )


def benchmark_all(
    fn: Callable[..., Any],
    *inputs: Any,
    grad: Tensor | None = None,
    repeats: int = 10,
    desc: str = "",
    verbose: bool = True,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    **kwinputs: Any,
) -> tuple[Timing, Timing, Timing]:
    """(benchmark_forward, benchmark_backward, benchmark_combined)"""
    options = dict(
        repeats=repeats, desc=desc, verbose=verbose, amp=amp, amp_dtype=amp_dtype, **kwinputs
    )
    return (
        *benchmark_fwd_bwd(fn, *inputs, grad=grad, **options),
        benchmark_combined(fn, *inputs, grad=grad, **options),
    )


def pytorch_profiler(
    fn: Callable[..., Any],
    *inputs: Any,
    trace_filename: str | None = None,
    backward: bool = False,
    amp: bool = False,
    amp_dtype: torch.dtype = torch.float16,
    cpu: bool = False,
    verbose: bool = True,
    **kwinputs: Any,
) -> None:
    """Profiles one call after 30 that warm up.

    Args:
        trace_filename: where a Chrome trace goes, with the Python functions.
        backward: the backward too.
        cpu: what runs on the CPU too; always on machines without CUDA.
        verbose: print a table of operators.
        others: as benchmark_forward.
    """
    call = _Call(fn, inputs, kwinputs, amp, amp_dtype)
    grad = torch.randn_like(call.forward()) if backward else None

    def run() -> None:
        out = call.forward()
        if grad is not None:
            call.backward(out, grad)

    for _ in range(30):
        run()
    kinds = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    activities = [kinds.CPU] * (cpu or not cuda) + [kinds.CUDA] * cuda
    with torch.profiler.profile(
        activities=activities, record_shapes=True, with_stack=trace_filename is not None
    ) as profile:
        run()
    if verbose:
        print(profile.key_averages().table(row_limit=50))
    if trace_filename is not None:
        profile.export_chrome_trace(trace_filename)


def benchmark_memory(
    fn: Callable[..., Any],
    *inputs: Any,
    desc: str = "",
    verbose: bool = True,
    **kwinputs: Any,
) -> float:
    """The most memory that tensors take during ``fn(*inputs, **kwinputs)``, in units of 1000 MiB.

    Raises:
        RuntimeError: inputs on a device whose allocator PyTorch does not count: others than CUDA.
    """
    device = _device_of(inputs, kwinputs)
    if device.type != "cuda":
        raise RuntimeError(
            f"benchmark_memory: expected tensors on CUDA, whose allocator counts, got {device}. "
            "What works there: torch.profiler.profile(profile_memory=True)"
        )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    fn(*inputs, **kwinputs)
    torch.cuda.synchronize(device)
    memory = torch.cuda.max_memory_allocated(device) / (2**20 * 1000)
    if verbose:
        print(f"{desc} max memory: {memory}GB")
    torch.cuda.empty_cache()
    return memory
