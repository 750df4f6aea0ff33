"""accelerate_sdpa() in the C++ that Inductor writes (cpp_wrapper, AOTInductor).

That calls PyTorch's kernels past the dispatcher, where no other kernel can take their place. So a
pass over the graph puts anyflash's operators there, by tracing the functions that run them in eager
mode. Imports Inductor: for those who have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import SymInt, fx
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.codegen.common import custom_backend_passes, init_backend_registration
from torch._inductor.custom_graph_pass import CustomGraphModulePass
from torch._inductor.decomposition import select_decomp_table
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import _loader, backends
from ._guards import BelowAutograd
from ._version import __version__

_DEVICE = "cpu"


class SdpaPass(CustomGraphModulePass):
    """Of the passes that belong to a device, the CPU's; users' own have places of their own.

    Args:
        functions: For an operator of aten, what computes it: either a call of that operator again,
            or others.
    """

    def __init__(self, functions: Mapping[OpOverload, Callable[..., Any]]) -> None:
        init_backend_registration()  # it would take the place later
        self.functions = functions
        self.before = custom_backend_passes.get(_DEVICE)
        custom_backend_passes[_DEVICE] = self

    def remove(self) -> None:
        """Puts back the pass that was there before, unless another one has come since."""
        if custom_backend_passes.get(_DEVICE) is self:
            custom_backend_passes[_DEVICE] = self.before

    def uuid(self) -> Any:
        """What the pass depends on beside the graph: part of the key of Inductor's caches."""
        order = backends.current_code() or backends.environment_code()
        before = self.before and self.before.uuid()
        return before, "anyflash", __version__, _loader.cpu_isa(), order

    def __call__(self, gm: fx.GraphModule) -> None:
        if self.before is not None:
            self.before(gm)
        if not config.cpp_wrapper:  # what goes through the dispatcher is chosen in every call
            return
        for target, function in self.functions.items():
            for node in gm.graph.find_nodes(op="call_function", target=target):
                _replace(node, function)
        gm.recompile()


def _replace(node: fx.Node, function: Callable[..., Any]) -> None:
    """Puts what the function does into the graph, in the place of the node."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    arguments = dict(zip(names, node.args)) | node.kwargs
    inputs = {name: x for name, x in arguments.items() if isinstance(x, fx.Node)}
    fakes = {name: x.meta["val"] for name, x in inputs.items()}
    if not _decides(**(arguments | fakes)):
        return

    def call(*tensors: Any) -> Any:
        return function(**(arguments | dict(zip(inputs, tensors))))

    mode = detect_fake_mode(tuple(fakes.values()))
    assert mode is not None
    with mode, BelowAutograd():
        traced = make_fx(call, select_decomp_table())(*fakes.values()).graph
    if traced.find_nodes(op="call_function", target=node.target):
        return
    places = dict(zip(traced.find_nodes(op="placeholder"), inputs.values()))
    with node.graph.inserting_before(node):
        results: Any = node.graph.graph_copy(traced, places)
    for user in list(node.users):  # an element each
        user.replace_all_uses_with(results[user.args[1]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _decides(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool = False, **others: Any
) -> bool:
    """Whether what is known of the sizes says which kernel computes a call: nothing may be asked
    of a size that differs from call to call."""
    if any(isinstance(n, SymInt) for n in (query.size(1), key.size(1), query.size(3))):
        return False
    lengths = query.size(2), key.size(2)
    if not is_causal or statically_known_true(lengths[0] == lengths[1]):
        return True
    return not any(isinstance(n, SymInt) for n in lengths)
