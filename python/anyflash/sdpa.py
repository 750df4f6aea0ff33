"""accelerate_sdpa(): PyTorch's scaled_dot_product_attention of CPU tensors on anyflash's kernels.

On a CPU the public function ends in two operators of aten, one per direction, which torch.compile
calls too. Their CPU kernels are replaced here by functions that run anyflash's operators, or for
what those have no kernel PyTorch's own, which is kept.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, Callable, NamedTuple

import torch
from torch import Tensor

from . import backends
from ._after_import import AfterImport
from ._autograd import is_seen
from ._guards import isolated
from ._operators.attention import AttentionCall, BackwardCall
from ._sdpa_mask import key_ranges
from .explain import kernel_runs

if TYPE_CHECKING:
    from ._sdpa_jagged import JaggedOverride
    from ._sdpa_pass import SdpaPass
    from ._sdpa_ring import RingOverride

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"
_INDUCTOR = "torch._inductor.compile_fx"
_NESTED = "torch.nested._internal.ops"
_RING = "torch.distributed.tensor.experimental._context_parallel._attention"
_KERNEL_ALONE = backends.CODES["kernel"]  # as an order: what _runs_on_kernel answered for

#: What both directions of a dense call say alike.
_DENSE: dict[str, Any] = {
    **{"max_seqlen_q": 0, "max_seqlen_k": 0, "dropout_p": 0.0, "causal": False},
    **{"window_size_left": -1, "softcap": 0.0, "deterministic": False, "backend": _KERNEL_ALONE},
}


def _unfilled(kind: Any, **named: Any) -> Any:
    """A dense call without what differs from one to the next."""
    return kind(**{**dict.fromkeys(kind._fields), **_DENSE, **named})


# Made once: it costs microseconds. Whoever calls below autograd may differentiate by hand, so lse.
_FORWARD_CALL: AttentionCall = _unfilled(AttentionCall, return_lse=True)
_BACKWARD_CALL: BackwardCall = _unfilled(
    BackwardCall, bias_requires_grad=False, sinks_requires_grad=False
)

_lock = threading.Lock()
_holders = 0  # accelerations that are not closed
_overrides: _Overrides | None = None


def obstacle() -> str | None:
    """Why accelerate_sdpa() cannot work with this torch; None: nothing speaks against it."""
    if hasattr(torch.library, "get_kernel") and hasattr(torch.ops.aten, _BACKWARD):
        return None
    return (
        "accelerate_sdpa needs torch 2.9 or newer, where PyTorch's own kernel can be kept for what "
        f"anyflash does not run; this is {torch.__version__}"
    )


def is_accelerated() -> bool:
    """Whether scaled_dot_product_attention of CPU tensors runs on anyflash's kernels now."""
    return _overrides is not None


class SdpaAcceleration:
    """What accelerate_sdpa() returned; `close()`, or the end of its `with` block, undoes it."""

    def __init__(self) -> None:
        global _holders, _overrides
        if (reason := obstacle()) is not None:
            raise RuntimeError(reason)
        with _lock:
            if _overrides is None:
                _overrides = _Overrides()
            _holders += 1
        self.closed = False

    def close(self) -> None:
        """Undoes it, once; PyTorch's kernels are back when every acceleration is closed."""
        global _holders, _overrides
        with _lock:
            if self.closed:
                return
            self.closed = True
            _holders -= 1
            if _holders == 0 and _overrides is not None:
                _overrides.remove()
                _overrides = None

    def __enter__(self) -> SdpaAcceleration:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def accelerate_sdpa() -> SdpaAcceleration:
    """Runs torch.nn.functional.scaled_dot_product_attention of CPU tensors on anyflash's kernels.

    Forward and backward, eager and under torch.compile: (batch, heads, seqlen, head_dim) in fp16,
    bf16 and fp32, with is_causal, attn_mask, scale and enable_gqa. A mask that says where the keys
    of a sequence begin and end is taken for these numbers, and what it hides is not read. What
    PyTorch itself computes another way (dropout, a mask with a gradient) stays as it is, and so
    does what anyflash has no kernel for, or passes over for PyTorch's in the order of back ends at
    hand (fp64, `with anyflash.backend("sdpa")`, ...).

    Jagged nested tensors, (batch, heads, jagged seqlen, head_dim), run as one packed call, causal
    too, for which PyTorch has nothing on a CPU. For them there is nothing to register a kernel
    with, so a function of torch.nested's is replaced, and graphs of torch.compile keep what they
    were compiled with.

    Inside torch.distributed's context_parallel, which knows CUDA's routines alone, it runs in
    PyTorch's ring, forward and backward (torch 2.13).

    It counts from the call on, for all threads of the process, until the result is closed; several
    may be open. ANYFLASH_SDPA=1 does it at `import anyflash`. nn.MultiheadAttention and
    nn.TransformerEncoderLayer skip scaled_dot_product_attention in inference, so that fast path of
    theirs (`torch.backends.mha`) is off meanwhile; nn.MultiheadAttention with need_weights=True
    never calls it. What Inductor's cpp_wrapper and AOTInductor write keeps the kernels it was
    compiled with, now or later: it calls them past the dispatcher. A process that loads such a
    package needs the operators of anyflash first: `import anyflash`, in C++ libanyflash_ops.so.
    anyflash's own routes aten_cpu and aten_sdpa call the public operators, and
    `backend="aten_cpu"` of one call may then end in a kernel of anyflash; `with
    anyflash.backend("aten_cpu")` does not.

    Returns:
        An object with `close()`, and a context manager.

    Raises:
        RuntimeError: torch is older than 2.9 and cannot keep its own kernels.
    """
    return SdpaAcceleration()


def accelerate_from_environment() -> None:
    """ANYFLASH_SDPA=1; where it cannot be done, the import goes on and the logger says why."""
    if backends.is_set("ANYFLASH_SDPA"):
        try:
            accelerate_sdpa()
        except RuntimeError as error:
            logging.getLogger("anyflash").warning("anyflash: ANYFLASH_SDPA: %s", error)


class _Overrides:
    """The kernels registered with PyTorch, the pass of Inductor's, and the fast path switched off,
    until remove()."""

    def __init__(self) -> None:
        kept = {name: builtin_kernel(name, "CPU") for name in _KERNELS}
        self._library = torch.library.Library("aten", "IMPL")
        for name, kernel in _KERNELS.items():
            function = isolated(functools.partial(kernel, kept[name]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch 2.9 tells what allow_override asks for
                self._library.impl(name, function, "CPU", allow_override=True)
        self._added: list[SdpaPass | JaggedOverride | RingOverride] = []
        self._waiting = [
            AfterImport(_INDUCTOR, self._add_pass),
            AfterImport(_NESTED, self._add_jagged),
            AfterImport(_RING, self._add_ring),
        ]
        self._fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)

    def _add_pass(self, _: ModuleType) -> None:
        from ._sdpa_pass import SdpaPass

        operators = {getattr(torch.ops.aten, name).default: f for name, f in _KERNELS.items()}
        added = SdpaPass({op: functools.partial(f, op) for op, f in operators.items()})
        self._added.append(added)

    def _add_jagged(self, nested: ModuleType) -> None:
        from ._sdpa_jagged import JaggedOverride

        self._added.append(JaggedOverride(nested, _runs_packed))

    def _add_ring(self, context_parallel: ModuleType) -> None:
        from ._sdpa_ring import RingOverride

        forward, backward = (getattr(torch.ops.aten, name).default for name in _KERNELS)
        call = _FORWARD_CALL._replace(backend=0, window_size_right=-1)
        self._added.append(RingOverride(context_parallel, (forward, backward), call))

    def remove(self) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fast_path)
        for waiting in self._waiting:
            waiting.cancel()
        for added in self._added:
            added.remove()
        self._library._destroy()


def builtin_kernel(name: str, key: str) -> Callable[..., Any]:
    """PyTorch's own kernel of an operator of aten.

    Args:
        name: of the operator.
        key: the dispatch key, "CPU" or "CUDA".

    Raises:
        RuntimeError: it has none.
    """
    kernel = torch.library.get_kernel(f"aten::{name}", key)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return functools.partial(kernel.call_boxed, keys)


#: What a call may ask for beside head_dim and dtype: (causal, window, bias, gqa, key lengths,
#: packed).
_FEATURES = (("causal",), ("window",), ("bias",), ("gqa",), ("seqused_k", "leftpad_k"), ("packed",))


@functools.cache
def _runs_on_kernel(
    direction: int, dtype: torch.dtype, head_dim: int, asked: tuple[bool, ...], order: int
) -> bool:
    """Whether an order of back ends gives a problem to a kernel; direction 0 is the forward, asked
    in the order of _FEATURES."""
    features = tuple(itertools.chain.from_iterable(itertools.compress(_FEATURES, asked)))
    return kernel_runs(direction, torch.device("cpu"), dtype, head_dim, features, order)


class _Masking(NamedTuple):
    """How anyflash's operators say what is visible in a call, by their names."""

    seqused_k: Tensor | None
    leftpad_k: Tensor | None
    bias: Tensor | None
    window_size_right: int


def _masking(
    direction: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    is_causal: bool,
    mask: Tensor | None,
) -> _Masking | None:
    """With what anyflash's kernel computes a call; None: it does not.

    PyTorch's causal mask begins at the first key: row i sees the keys up to i. Ours ends at the
    last one, so its distance from there is a window, which must end before the last key, because
    one that reaches it is none.
    """
    seqlen_q, seqlen_k = q.size(2), k.size(2)
    right = seqlen_q - seqlen_k if is_causal else -1
    if is_causal and not 0 <= right < seqlen_k:
        return None
    if dropout_p != 0.0 or not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        return None
    masking = _Masking(None, None, mask, right)
    if mask is not None:
        if mask.dtype not in (q.dtype, torch.float32):
            return None
        if not (is_causal or is_seen()) and (ranges := key_ranges(mask, q, k)) is not None:
            window = 0 if ranges.is_causal else -1
            masking = _Masking(ranges.seqused_k, ranges.leftpad_k, None, window)
    asked = (
        masking.window_size_right == 0,
        masking.window_size_right > 0,
        masking.bias is not None,
        q.size(1) != k.size(1),
        masking.seqused_k is not None,
        False,
    )
    return masking if _runs_on_kernel(direction, q.dtype, q.size(3), asked, _order()) else None


def _order() -> int:
    return backends.current_code() or backends.environment_code()


def _runs_packed(q: Tensor, k: Tensor, is_causal: bool) -> bool:
    """Whether both directions of a packed call, (batch, heads, jagged seqlen, head_dim), are for a
    kernel."""
    asked = (is_causal, False, False, q.size(1) != k.size(1), False, True)
    return all(_runs_on_kernel(d, q.dtype, q.size(3), asked, _order()) for d in (0, 1))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.size(3) ** -0.5 if scale is None else scale


def _forward(
    builtin: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    masking = _masking(0, query, key, value, dropout_p, is_causal, attn_mask)
    if masking is None:
        return builtin(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    call = _FORWARD_CALL._replace(
        **masking._asdict(),
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        v=value.transpose(1, 2),
        softmax_scale=_scale(query, scale),
    )
    out, lse, _ = torch.ops.anyflash._flash_attn_forward.default(*call)
    return in_layout_of(query, out.transpose(1, 2)), _as_aten_lse(lse, attn_mask is not None)


def _backward(
    builtin: Callable[..., Any],
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    masking = _masking(1, query, key, value, dropout_p, is_causal, attn_mask)
    if masking is None:
        tensors = (grad_out, query, key, value, out, logsumexp)
        return builtin(*tensors, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
    call = _BACKWARD_CALL._replace(
        **masking._asdict(),
        dout=grad_out.transpose(1, 2),
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        v=value.transpose(1, 2),
        out=out.transpose(1, 2),
        softmax_lse=logsumexp,
        softmax_scale=_scale(query, scale),
    )
    gradients = torch.ops.anyflash._flash_attn_backward.default(*call)[:3]
    # PyTorch's are rows of all heads whatever the layout of q, and torch.compile relies on it.
    return tuple(gradient.contiguous().transpose(1, 2) for gradient in gradients)


def in_layout_of(q: Tensor, out: Tensor) -> Tensor:
    """out with the strides that PyTorch's would have: those of empty_like(q)."""
    if out.stride() == q.stride():
        return out
    like = torch.empty_like(q)
    return out if out.stride() == like.stride() else like.copy_(out)


def _as_aten_lse(lse: Tensor, may_hide_rows: bool) -> Tensor:
    """The log-sum-exp as PyTorch has it: a row's heads side by side, 0 where a row sees no key."""
    if may_hide_rows:
        lse = lse.masked_fill(lse.isposinf(), 0.0)
    batch, heads, seqlen = lse.shape
    if heads == 1 or seqlen == 1:
        return lse
    strides = (seqlen * heads, 1, heads)
    return lse.new_empty_strided((batch, heads, seqlen), strides).copy_(lse)


_KERNELS: dict[str, Callable[..., Any]] = {_FORWARD: _forward, _BACKWARD: _backward}
