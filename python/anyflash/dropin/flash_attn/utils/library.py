"""triton_op: an operator from a function that torch.compile may trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

import torch


def triton_op(
    name: str,
    fn: Optional[Callable[..., Any]] = None,
    *,
    mutates_args: Union[str, Iterable[str]],
    schema: Optional[str] = None,
    allow_decomposition: bool = True,
) -> Any:
    """Registers ``fn`` as the operator ``name``; without ``fn``, a decorator.

    An operator of ``torch.library.custom_op`` with ``fn`` as its fake too. Nothing of it needs
    Triton, and ``fn`` may call Triton kernels. Upstream lets torch.compile look inside unless
    ``allow_decomposition`` is false; this one stays closed, with the same results.

    Args:
        name: ``namespace::operator``.
        fn: the function; its operations must work on fake tensors.
        mutates_args: names of the arguments that it writes to, or "unknown".
        schema: the operator's schema, where it shall not follow from fn's annotations.
        allow_decomposition: no effect, see above.

    Raises:
        ImportError: torch is older than 2.4, which has no custom_op.
    """
    if fn is None:

        def decorator(function: Callable[..., Any]) -> Any:
            return triton_op(name, function, mutates_args=mutates_args, schema=schema)

        return decorator
    if not hasattr(torch.library, "custom_op"):
        raise ImportError(f"triton_op needs torch 2.4 or newer, this is {torch.__version__}")
    operator = torch.library.custom_op(name, fn, mutates_args=mutates_args, schema=schema)
    operator.register_fake(fn)
    return operator
