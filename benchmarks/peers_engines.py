"""The engines beside which benchmarks.peers measures, each in the form that its users would write.

An engine takes q, k, v as (batch, seqlen, heads, head_dim), prepares whatever it wants outside the
measured time (its own layout, a compiled model, bound buffers), and returns the call to measure.
"""

from __future__ import annotations

import abc
import importlib.metadata
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Tensor]  # returns (batch, seqlen, heads, head_dim)


class Refused(Exception):
    """The engine does not compute what was asked for; the text says what it does instead."""


class Engine(abc.ABC):
    """One engine, for the threads of one process.

    Attributes:
        packages: What is installed for it, pinned in peers.txt; the first is the engine itself.
    """

    packages: tuple[str, ...]

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def version(cls) -> str:
        return f"{cls.packages[0]} {importlib.metadata.version(cls.packages[0])}"

    @abc.abstractmethod
    def prefill(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        """Attention of equally many queries and keys."""

    @abc.abstractmethod
    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """Attention of the newest token, whose key and value are the last rows of k and v."""


def heads_first(*tensors: Tensor) -> list[Tensor]:
    """(batch, heads, seqlen, head_dim) in memory, as all engines but onnxruntime keep them."""
    return [t.transpose(1, 2).contiguous() for t in tensors]


class Sdpa(Engine):
    """torch.nn.functional.scaled_dot_product_attention."""

    packages = ("torch",)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        q, k, v = heads_first(q, k, v)
        grouped = q.size(1) != k.size(1)
        return lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=grouped
        ).transpose(1, 2)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        return self.prefill(q, k, v, causal=False)


class Zentorch(Engine):
    """AMD's plugin: the operator that its torch.compile back end puts in place of SDPA."""

    packages = ("zentorch",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        import zentorch  # noqa: F401 - registers the operators

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        ops = torch.ops.zentorch
        if q.dtype == torch.float16 and not ops.zentorch_is_fp16_supported():
            raise Refused("calls PyTorch's own attention on a CPU without AVX-512 FP16")
        q, k, v = heads_first(q, k, v)
        return lambda: ops.zentorch_sdpa(q, k, v, 0.0, causal)[0].transpose(1, 2)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        return self.prefill(q, k, v, causal=False)


class OnnxRuntime(Engine):
    """com.microsoft's MultiHeadAttention; for decoding GroupQueryAttention over a shared cache.

    Inputs and outputs are bound to memory once. Its layout is ours.
    """

    packages = ("onnxruntime", "onnx")

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        attributes = {"num_heads": q.size(2), "unidirectional": int(causal)}
        inputs = {name: t.flatten(2) for name, t in (("q", q), ("k", k), ("v", v))}
        return self._call("MultiHeadAttention", attributes, inputs, {}, q)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """The operator writes the newest key and value into the cache, in front of reading it."""
        batch, keys = k.shape[:2]
        attributes = {"num_heads": q.size(2), "kv_num_heads": k.size(2)}
        past_k, past_v = heads_first(k, v)
        inputs = {
            "q": q.flatten(2),
            "k": k[:, -1:].flatten(2).contiguous(),
            "v": v[:, -1:].flatten(2).contiguous(),
            "past_k": past_k,
            "past_v": past_v,
            "last": torch.full((batch,), keys - 1, dtype=torch.int32),
            "keys": torch.tensor([keys], dtype=torch.int32),
        }
        caches = {"present_k": past_k, "present_v": past_v}
        return self._call("GroupQueryAttention", attributes, inputs, caches, q)

    def _call(
        self,
        operator: str,
        attributes: dict[str, int],
        inputs: dict[str, Tensor],
        caches: dict[str, Tensor],
        q: Tensor,
    ) -> Call:
        import onnxruntime
        from onnx import TensorProto, helper

        out = torch.empty_like(q)
        outputs = {"out": out.flatten(2), **caches}
        types = {
            torch.float32: TensorProto.FLOAT,
            torch.float16: TensorProto.FLOAT16,
            torch.bfloat16: TensorProto.BFLOAT16,
            torch.int32: TensorProto.INT32,
        }

        def infos(tensors: dict[str, Tensor]) -> list[Any]:
            return [
                helper.make_tensor_value_info(name, types[t.dtype], list(t.shape))
                for name, t in tensors.items()
            ]

        node = helper.make_node(
            operator, list(inputs), list(outputs), domain="com.microsoft", **attributes
        )
        model = helper.make_model(
            helper.make_graph([node], "attention", infos(inputs), infos(outputs)),
            opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
            ir_version=10,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        bound = session.io_binding()
        for bind, tensors in ((bound.bind_input, inputs), (bound.bind_output, outputs)):
            for name, t in tensors.items():
                bind(name, "cpu", 0, types[t.dtype], list(t.shape), t.data_ptr())

        def call(_alive: object = (inputs, outputs)) -> Tensor:
            session.run_with_iobinding(bound)
            return out

        return call


class OpenVino(Engine):
    """ScaledDotProductAttention; for decoding with the keys and values in the model's state.

    Between two decoding calls the state grows by the token of the first.
    """

    packages = ("openvino",)

    def prefill(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
        import openvino
        from openvino import opset13 as ops

        inputs = heads_first(q, k, v)
        parameters = [ops.parameter(list(t.shape), self._type(t)) for t in inputs]
        attention = ops.scaled_dot_product_attention(*parameters, causal=causal)
        model = openvino.Model([ops.result(attention)], parameters, "prefill")
        return self._call(self._compile(model, q.dtype), inputs)

    def decode(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """The graph that the CPU plugin knows as decoding: caches as variables, their rows chosen
        by an index of beams, the newest token appended."""
        import openvino
        from openvino import opset13 as ops

        q, k, v = heads_first(q, k, v)
        batch, heads_k, _, head_dim = k.shape
        group = q.size(1) // heads_k
        past, inputs = {"k": k[:, :, :-1], "v": v[:, :, :-1]}, [q, k[:, :, -1:], v[:, :, -1:]]
        dtype = self._type(q)
        shapes = ([batch, t.size(1), -1, head_dim] for t in inputs)
        parameters = [ops.parameter(openvino.PartialShape(shape), dtype) for shape in shapes]
        beams = ops.parameter([batch], openvino.Type.i32)
        attended, assigned = [], []
        for name, new in zip(past, parameters[1:]):
            info = openvino.op.util.VariableInfo()
            info.variable_id, info.data_type = name, dtype
            info.data_shape = openvino.PartialShape([batch, heads_k, -1, head_dim])
            variable = openvino.op.util.Variable(info)
            empty = ops.constant(torch.empty(batch, heads_k, 0, head_dim).numpy(), dtype=dtype)
            chosen = ops.gather(ops.read_value(empty, variable), beams, ops.constant(0))
            cache = ops.concat([chosen, new], 2)
            assigned.append(ops.assign(cache, variable))
            if group > 1:
                ones = ops.constant(torch.ones(1, 1, group, 1, 1).numpy(), dtype=dtype)
                repeated = ops.multiply(ops.unsqueeze(cache, ops.constant(2)), ones)
                shape = ops.constant([0, q.size(1), -1, head_dim])
                cache = ops.reshape(repeated, shape, special_zero=True)
            attended.append(cache)
        attention = ops.scaled_dot_product_attention(parameters[0], *attended, causal=False)
        model = openvino.Model([ops.result(attention)], assigned, [*parameters, beams], "decode")
        compiled = self._compile(model, q.dtype)
        return self._call(compiled, [*inputs, torch.arange(batch, dtype=torch.int32)], past)

    def _type(self, t: Tensor) -> Any:
        import openvino

        return {
            torch.float32: openvino.Type.f32,
            torch.float16: openvino.Type.f16,
            torch.bfloat16: openvino.Type.bf16,
            torch.int32: openvino.Type.i32,
        }[t.dtype]

    def _compile(self, model: Any, dtype: torch.dtype) -> Any:
        """The model in the precision of dtype, proved by what the plugin says it executes."""
        import openvino

        name = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
        compiled = openvino.Core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": name,
                "KV_CACHE_PRECISION": name,  # or 8 bits
                "INFERENCE_NUM_THREADS": self.threads,
                "NUM_STREAMS": 1,
                "ENABLE_CPU_PINNING": False,
            },
        )
        used = set()
        for node in compiled.get_runtime_model().get_ops():
            facts = {
                key: node.rt_info[key].astype(str) for key in ("layerType", "runtimePrecision")
            }
            if facts["layerType"] in ("Subgraph", "ScaledDotProductAttention", "MatMul", "Softmax"):
                used.add(facts["runtimePrecision"])
        if used != {name}:
            raise Refused(f"computes in {', '.join(sorted(used))}")
        return compiled

    def _call(
        self, compiled: Any, inputs: list[Tensor], past: dict[str, Tensor] | None = None
    ) -> Call:
        import openvino

        def shared(t: Tensor) -> Any:
            t = t.contiguous()
            alive.append(t)
            raw = t.view(torch.int16) if t.element_size() == 2 else t
            return openvino.Tensor(raw.numpy(), openvino.Shape(list(t.shape)), self._type(t))

        alive: list[Tensor] = []
        request = compiled.create_infer_request()
        out = torch.empty_like(inputs[0])
        for index, t in enumerate(inputs):
            request.set_input_tensor(index, shared(t))
        request.set_output_tensor(0, shared(out))
        for state in request.query_state():
            state.state = shared(past[state.name])
        turned = out.transpose(1, 2)

        def call(_alive: object = alive) -> Tensor:
            request.infer()
            return turned

        return call


#: By the name that commands and results use.
ENGINES: dict[str, type[Engine]] = {
    "sdpa": Sdpa,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "zentorch": Zentorch,
}
