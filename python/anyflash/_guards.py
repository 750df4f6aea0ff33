"""Guards of torch's dispatcher as context managers; in torch 2.0 they are objects that guard while
they live."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


def _as_context_manager(guard: Any) -> Any:
    if hasattr(guard, "__enter__"):
        return guard

    # Its torch.compile would compile what follows on a break inside, and asserts that no key is
    # excluded then.
    set_eval_frame = torch._C._dynamo.eval_frame.set_eval_frame

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        before = set_eval_frame(None)
        alive = guard()
        try:
            yield
        finally:
            del alive
            set_eval_frame(before)

    return hold


#: What runs inside keeps its dtypes under autocast.
WithoutAutocast = _as_context_manager(torch._C._DisableAutocast)
_below_autograd = _as_context_manager(torch._C._AutoDispatchBelowAutograd)
is_any_autocast_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)  # torch 2.1


@contextlib.contextmanager
def _below_autograd_and_autocast() -> Iterator[None]:
    with _below_autograd(), WithoutAutocast():
        yield


def BelowAutograd() -> Any:  # noqa: N802  (a guard like the others)
    """What runs inside is neither recorded by autograd nor touched by autocast: operators call
    products of which they know the dtype."""
    return _below_autograd_and_autocast() if is_any_autocast_enabled() else _below_autograd()


def _below_write_counts() -> Any:
    """Torch 2.0 has no such guard, but lets the key be excluded."""
    if hasattr(torch._C, "_AutoDispatchBelowADInplaceOrView"):
        return torch._C._AutoDispatchBelowADInplaceOrView
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    guard = torch._C.ExcludeDispatchKeyGuard  # type: ignore[attr-defined]  # its name there
    return functools.partial(guard, keys)


#: What runs inside neither is recorded by autograd nor counts as a write for it. For kernels that
#: autograd's own have called.
BelowWriteCounts = _as_context_manager(_below_write_counts())


def isolated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as a kernel: what it calls is neither recorded by autograd nor touched by
    autocast."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with BelowAutograd():
            return function(*args)

    return kernel


def count_write(x: torch.Tensor) -> None:
    """Tells autograd that x was written: who saved it before must not use it any more. Tensors made
    in inference mode have no counter."""
    if x.is_inference():
        return
    if hasattr(torch.autograd.graph, "increment_version"):  # torch 2.1
        torch.autograd.graph.increment_version(x)
    else:
        with torch.no_grad():
            x.narrow(0, 0, 0).zero_()
