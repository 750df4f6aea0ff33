"""accelerate_sdpa in the graphs of torch.compile and of AOTInductor."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from sdpa_support import (
    LAYOUTS,
    OURS,
    Problem,
    call,
    needs_kernels,
    operators_of,
    strides,
)
from support import run_python
from torch import nn

import anyflash

pytestmark = pytest.mark.providers


@needs_kernels
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("layout", ["heads", "rows"])
def test_compiled(backend, layout, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    problem = Problem(causal=True, layout=layout)
    tensors = problem.tensors()
    dout = torch.randn(tensors[0].shape)

    def function(*tensors):
        return call(problem, *tensors) * 2

    def both(function):
        out = function(*tensors)
        return out, *torch.autograd.grad(out, tensors[:3], dout)

    torch._dynamo.reset()
    wanted = both(function)
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    with anyflash.accelerate_sdpa():
        found, called = operators_of(lambda: both(compiled))
        with torch.no_grad():
            torch.testing.assert_close(compiled(*tensors), wanted[0])
    torch.testing.assert_close(found, wanted)
    assert called == OURS
    assert operators_of(lambda: both(compiled))[1] == []  # the same graph, after the undo
    torch._dynamo.reset()


# What Inductor writes in C++ calls PyTorch's kernels past the dispatcher; a pass over the graph
# puts ours there.


@dataclass(frozen=True)
class Written:
    """A function of several calls, with what they are called with."""

    layout: str

    def __call__(self, q, k, v, grouped, mask):
        return (
            F.scaled_dot_product_attention(q * 2, k, v, is_causal=True) + 1,
            F.scaled_dot_product_attention(q, grouped, grouped, mask, enable_gqa=True),
        )

    def arguments(self):
        q, k, v, mask = Problem(layout=self.layout, mask="bool", mask_shape=(2, 1, 1, 17)).tensors()
        grouped, *_ = Problem(heads=2, layout=self.layout).tensors()
        return q, k, v, grouped, mask


def results(function, arguments):
    """What the function returns, and a gradient of it for every argument that has one."""
    inputs = [x for x in arguments if x.requires_grad]
    outputs = function(*arguments)
    return *outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)


@pytest.fixture
def inductor(tmp_path, monkeypatch):
    """Its configuration, with caches of their own."""
    config = pytest.importorskip("torch._inductor.config")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    yield config
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpp_wrapper(inductor, layout):
    function = Written(layout)
    arguments = function.arguments()
    wanted = results(function, arguments)

    def compiled():
        torch._dynamo.reset()
        return torch.compile(function, fullgraph=True, options={"cpp_wrapper": True})

    before = operators_of(lambda: results(compiled(), arguments))
    with anyflash.accelerate_sdpa():
        found = operators_of(lambda: results(compiled(), arguments))
    after = operators_of(lambda: results(compiled(), arguments))  # from the same caches
    assert [set(called) for _, called in (before, found, after)] == [set(), set(OURS), set()]
    for values, _ in (before, found, after):
        torch.testing.assert_close(values, wanted, atol=2e-5, rtol=2e-5)


@needs_kernels
def test_cpp_wrapper_for_any_lengths(inductor):
    """Causal, of unequal lengths that differ from call to call: no kernel is sure to compute it."""
    with anyflash.accelerate_sdpa():
        for causal, expected in ((False, set(OURS[:1])), (True, set())):

            def function(q, k, causal=causal):
                return F.scaled_dot_product_attention(q, k, k, is_causal=causal)

            compiled = torch.compile(function, options={"cpp_wrapper": True})
            for lengths in ((18, 17), (40, 33)):
                q, k = (torch.randn(2, 4, n, 16) for n in lengths)
                for x in (q, k):
                    torch._dynamo.mark_dynamic(x, 2)
                found, called = operators_of(functools.partial(compiled, q, k))
                assert set(called) == expected
                torch.testing.assert_close(found, function(q, k))


@needs_kernels
def test_ahead_of_time(inductor, tmp_path):
    """A package keeps the operators it was compiled with."""

    class Model(nn.Module):
        def forward(self, q, k, v, grouped, mask):
            return Written("rows")(q, k, v, grouped, mask)

    arguments = [x.detach() for x in Written("rows").arguments()]
    wanted = Model()(*arguments)
    batch = torch.export.Dim("batch", min=2, max=100)
    dynamic = {name: {0: batch} for name in ("q", "k", "v", "grouped", "mask")}
    program = torch.export.export(Model(), tuple(arguments), dynamic_shapes=dynamic)

    def package(name):
        path = str(tmp_path / name)
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return torch._inductor.aoti_load_package(path)

    with anyflash.accelerate_sdpa():
        ours = package("ours.pt2")
    theirs = package("theirs.pt2")
    for model, expected in ((ours, set(OURS[:1])), (theirs, set())):
        found, called = operators_of(functools.partial(model, *arguments))
        assert set(called) == expected
        torch.testing.assert_close(tuple(found), wanted, atol=2e-5, rtol=2e-5)
        three = [x[[0, 1, 0]] for x in arguments]
        assert [strides(x) for x in three] == [strides(x) for x in arguments]  # it relies on them
        torch.testing.assert_close(model(*three)[0][2], wanted[0][0], atol=2e-5, rtol=2e-5)


@needs_kernels
def test_passes_of_others_stay(inductor):
    from torch._inductor import compile_fx  # noqa: F401 - the pass is there from now on
    from torch._inductor.codegen.common import custom_backend_passes
    from torch._inductor.custom_graph_pass import CustomGraphModulePass, CustomGraphPass

    seen = []

    class OfTheDevice(CustomGraphModulePass):
        def __call__(self, gm):
            seen.append("device")

        def uuid(self):
            return "device"

    class OfTheUser(CustomGraphPass):
        def __call__(self, graph):
            seen.append("user")

        def uuid(self):
            return "user"

    before = custom_backend_passes.get("cpu")
    custom_backend_passes["cpu"] = others = OfTheDevice()
    try:
        options = {"cpp_wrapper": True, "post_grad_custom_post_pass": OfTheUser()}
        compiled = torch.compile(Written("rows"), options=options)
        with anyflash.accelerate_sdpa():
            assert custom_backend_passes["cpu"].uuid()[0] == "device"
            with torch.no_grad():
                arguments = Written("rows").arguments()
                assert set(operators_of(lambda: compiled(*arguments))[1]) == set(OURS[:1])
        assert custom_backend_passes["cpu"] is others
        assert sorted(set(seen)) == ["device", "user"]
    finally:
        custom_backend_passes["cpu"] = before


def test_without_inductor_nothing_waits():
    code = """
import sys, anyflash
finders = len(sys.meta_path)
anyflash.accelerate_sdpa().close()
assert len(sys.meta_path) == finders, sys.meta_path
assert "torch._inductor.compile_fx" not in sys.modules
with anyflash.accelerate_sdpa():
    import torch._inductor.compile_fx
    from torch._inductor.codegen.common import custom_backend_passes
    print(type(custom_backend_passes["cpu"]).__name__)
print(custom_backend_passes["cpu"])
"""
    assert run_python(code) == "SdpaPass\nNone\n"
