"""What the derivatives of the operators have in common: short cuts into autograd.Functions, and
refusals."""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from ._guards import BelowAutograd

_ops = torch.ops.anyflash
NO_SECOND_DERIVATIVE = "anyflash has no second derivative, but a gradient was differentiated"


def _of_compiler(name: str) -> Callable[[], bool]:
    compiler = getattr(torch, "compiler", None)  # torch 2.1
    return getattr(compiler, name, None) or (lambda: False)


#: True while torch.compile or torch.export traces.
is_compiling = _of_compiler("is_compiling")
#: True while torch.export traces, as far as torch tells (2.7).
is_exporting = _of_compiler("is_exporting")


#: True inside a transform of torch.func.
in_functorch: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
)


def in_plain_eager() -> bool:
    """Neither compiling nor inside a functorch transform: a tensor is what it says, its values can
    be read and overwritten."""
    return not is_compiling() and not in_functorch()


def is_traced() -> bool:
    """Whether make_fx or torch.jit.trace records operators, and no compiler does."""
    if is_compiling():
        return False
    return torch._C._get_tracing_state() is not None or _mode("PROXY") is not None


def wants_operations() -> bool:
    """Whether operations that PyTorch differentiates itself have to stand in the place of an
    autograd.Function: under torch.func, which asks more of one, and in what torch.export, make_fx
    and torch.jit.trace write, from where its derivative is lost, or itself."""
    return in_functorch() or is_exporting() or is_traced()


def _mode(kind: str) -> Any:
    """The TorchDispatchMode of torch's own of a kind, if it is active."""
    if torch._C._len_torch_dispatch_stack() == 0 or not hasattr(torch._C, "_get_dispatch_mode"):
        return None
    return torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, kind))


def has_readable_values(tensor: Tensor) -> bool:
    """Whether a check may read the tensor's values: it waits for no device and guards no graph."""
    is_plain = type(tensor) is Tensor and tensor.device.type == "cpu" and in_plain_eager()
    return is_plain and not is_traced()


def _distinct(args: tuple[Any, ...]) -> list[Any]:
    """Repeated tensors as views of themselves: torch.compile refuses the same tensor twice."""
    result: list[Any] = []
    for arg in args:
        repeated = False
        if isinstance(arg, Tensor):
            for other in result:
                repeated = repeated or other is arg
        result.append(arg.view_as(arg) if repeated else arg)
    return result


_kernel = threading.local()


def _is_inside_kernel() -> bool:
    return getattr(_kernel, "active", False)


@contextlib.contextmanager
def inside_kernel() -> Iterator[None]:
    """Says that an autograd kernel is at work: functorch has prepared the call already."""
    before = _is_inside_kernel()
    _kernel.active = True
    try:
        yield
    finally:
        _kernel.active = before


def _single_level(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` for inside an autograd kernel that a functorch transform called."""
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction

    def forward(ctx: Any, *args: Any) -> Any:
        # A Function's forward is not recorded; but by the transforms around this one.
        with BelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    single: Any = type(function.__name__, (_SingleLevelFunction,), members)

    def apply(*args: Any) -> Any:
        with enable_single_level_autograd_function():
            return single.apply(*args)

    return apply


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` where neither a transform of torch.func nor a compiler is at work, without
    what it does for them (30 of 40 us). It is private to torch: taken only where torch has it."""
    apply = torch._C._FunctionBase.__dict__.get("apply")
    has_transforms = hasattr(torch._C, "_are_functorch_transforms_active")
    return function.apply if apply is None or not has_transforms else apply.__get__(None, function)


def applier(function: type[Function]) -> Callable[..., Any]:
    """``function.apply``, by the short cut in eager mode."""
    direct, transforms_active = direct_apply(function), in_functorch

    def apply(*args: Any) -> Any:
        inside = _is_inside_kernel()
        if is_compiling() and not inside:
            return function.apply(*_distinct(args))
        if not transforms_active():
            return direct(*args)
        if not inside:
            return function.apply(*args)
        return _single_level(function)(*args)

    return apply


def _is_batched(x: Tensor | None) -> bool:
    """Whether autograd.grad(is_grads_batched=True) made x, of which an autograd.Function's results
    forget what was recorded. Its key, another one than torch.func's, has no name in Python."""
    return x is not None and "Batched" in re.findall(r"\w+", str(torch._C._dispatch_keys(x)))


class _RefuseFunction(Function):
    """Gradients unchanged, bound to what they were computed from, and an error for whoever
    differentiates them: (number of gradients, *gradients, *inputs)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def first_derivative_only(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """torch's once_differentiable, which also refuses where the incoming gradient is a constant.

    A gradient penalty on a plain sum would otherwise silently do nothing.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # The operators of a graph refuse themselves.
        if not torch.is_grad_enabled() or is_compiling():
            return backward(ctx, *gradients)
        if any(map(_is_batched, gradients)):
            raise RuntimeError(
                "anyflash has no second derivative, but batched gradients (is_grads_batched, "
                "vectorize) were asked for with create_graph=True"
            )
        with torch.no_grad():
            results = backward(ctx, *gradients)
        tensors = [gradient for gradient in results if gradient is not None]
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None]
        bound = iter(_RefuseFunction.apply(len(tensors), *tensors, *causes))
        return tuple(None if gradient is None else next(bound) for gradient in results)

    return checked


def may_record() -> bool:
    """Whether a call on some tensors would be recorded, or refused."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def needs_autograd(*tensors: Tensor | None) -> bool:
    """True where a call is to be recorded, or, under forward-mode differentiation, refused by the
    Function."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return forward_ad._current_level >= 0


def below_autograd(operator: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator whose call nobody records past its autograd kernel, which costs
    microseconds; as it is in a graph, and under torch.func, where somebody outside may record, but
    for that kernel itself."""
    if is_compiling() or (in_functorch() and not _is_inside_kernel()):
        return operator(*args)
    with BelowAutograd():
        return operator(*args)


def is_seen() -> bool:
    """Whether more than autograd looks at the operators of a call: a compiler, a tracer, or a
    TorchDispatchMode. Then the call is one operator, which brings its derivative itself."""
    return (
        is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def is_distributed(x: Tensor | None) -> bool:
    """Whether x is a DTensor, without the import of its module."""
    return hasattr(x, "device_mesh")


def is_watched() -> bool:
    """Whether a TorchDispatchMode looks at operators that compute something, now."""
    if is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return False
    return _mode("PROXY") is None and _mode("FUNCTIONAL") is None


def call_operator(
    operator: Callable[..., Any],
    recorded: Callable[..., Any],
    arguments: Sequence[Any],
    *asking: Tensor | None,
) -> Any:
    """A public function's call of an operator: as it is where it is seen, and otherwise the short
    way to what its autograd kernel would do.

    Args:
        operator: the operator.
        recorded: the same as autograd records it.
        arguments: of both.
        asking: those among them that may ask for a gradient.
    """
    if is_seen():
        return operator(*arguments)
    if needs_autograd(*asking):
        return recorded(*arguments)
    return below_autograd(operator, *arguments)


class ForwardOnlyFunction(Function):
    """An operator that has no derivative: (it, what to tell who asks for one, *arguments).

    The results are bound to the arguments, so that a backward raises instead of leaving gradients
    out.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(operator: Callable[..., Any], why: str, *arguments: Any) -> Any:
        return below_autograd(operator, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.why = inputs[1]
        ctx.sizes = tuple(x.shape if isinstance(x, Tensor) else None for x in inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        gradient = next((x for x in gradients if x is not None), None)
        if gradient is None:  # nothing went through the results
            return (None,) * len(ctx.sizes)
        return tuple(
            _ops.refuse_gradient.default(gradient, size, ctx.why) if needed else None
            for size, needed in zip(ctx.sizes, ctx.needs_input_grad)
        )


_apply_forward_only = applier(ForwardOnlyFunction)


def forward_only(operator: Callable[..., Any], why: str) -> Callable[..., Any]:
    """The operator as autograd records it where it has no derivative: a backward raises ``why``."""
    return functools.partial(_apply_forward_only, operator, why)


def refuse_gradient(gradient: Tensor, like: Tensor, why: str) -> Tensor:
    """In the place of ``like``'s gradient: RuntimeError(why), in a compiled graph when it runs."""
    return _ops.refuse_gradient.default(gradient, like.shape, why)
