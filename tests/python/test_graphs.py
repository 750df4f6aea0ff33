"""One graph for every public function, forward and backward: for all lengths, batches and contents
of cu_seqlens."""

from __future__ import annotations

import pytest
import torch
from flash_attn.utils.generation import InferenceParams
from graph_cases import CASES, function_of, gradients, make, results
from support import torch_version
from torch._dynamo.utils import counters

import anyflash

pytestmark = [
    pytest.mark.providers,
    pytest.mark.skipif(torch_version() < 210, reason="older compilers break graphs elsewhere"),
]

NO_MORE_GRAPHS = torch._dynamo.config.patch(error_on_recompile=True)
# (batch, length): none of them another dimension of a case, which a graph would take for the same.
SIZES = ((5, 22), (7, 31), (6, 12), (6, 12))


@pytest.fixture(autouse=True)
def fresh_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _results_and_gradients(name, function, parameters, device, seed):
    leaves, others = make(name, *SIZES[seed], device, seed)
    found = results(function(*leaves, *others))
    if CASES[name].why_not is not None:
        return found
    return [*found, *gradients(found, (*leaves, *parameters))]


def _compare(name, function, compiled, parameters, device, seed):
    """By new tensors of the same numbers: some are written into."""
    expected, found = (
        _results_and_gradients(name, f, parameters, device, seed) for f in (function, compiled)
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_one_graph(device, name):
    function, parameters = function_of(name, device)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    _compare(name, function, compiled, parameters, device, 0)
    with NO_MORE_GRAPHS:
        for seed in range(1, len(SIZES)):
            _compare(name, function, compiled, parameters, device, seed)
    assert counters["stats"]["unique_graphs"] == 1


WITHOUT_KERNELS = (
    *("cross_entropy", "dropout_add_layer_norm", "layer_norm", "rms_norm", "rotary"),
    *("rotary, offsets", "apply_rotary_emb, packed", "bias_activation", "fused_mlp"),
)


@pytest.mark.parametrize("name", WITHOUT_KERNELS)
def test_one_graph_of_operations(device, name):
    with anyflash.backend("math"):
        test_one_graph(device, name)


AS_IT_COMES = ("attention", "attention, packed, no max_seqlen", "attention_kvcache", "MHA")


@pytest.mark.parametrize("name", AS_IT_COMES)
def test_sizes_become_symbols_by_themselves(device, name):
    function, parameters = function_of(name, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for seed in range(len(SIZES)):
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            _compare(name, function, compiled, parameters, device, seed)
    assert counters["stats"]["unique_graphs"] == 2


def test_tables_of_angles_are_no_reason_for_another_graph(device):
    """Fresh, or with a cache from eager mode, shorter and longer."""
    module, _ = function_of("MHA", device)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with NO_MORE_GRAPHS:
        for length, eager_length in ((22, 9), (31, 40), (12, 50)):
            compiled(torch.randn(5, length, 32, device=device))
            module(torch.randn(5, eager_length, 32, device=device))


@pytest.mark.parametrize("per_sample", [False, True], ids=["one length", "lengths"])
def test_generation_is_one_graph_for_all_steps(device, per_sample):
    """The cache grows inside the graph, at a place that changes with every step."""
    function, _ = function_of("GPTLMHeadModel", device)
    model = function.args[0].eval()
    ids = torch.randint(61, (3, 12), device=device)
    states = []
    for step in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        params = InferenceParams(max_seqlen=20, max_batch_size=3)
        with torch.inference_mode():
            logits = [model(ids[:, :7], inference_params=params).logits]
            params.seqlen_offset = 7
            if per_sample:
                params.lengths_per_sample = torch.full((3,), 7, dtype=torch.int32, device=device)
            for i in range(7, 12):
                positions = torch.full((3, 1), i, device=device)
                out = step(ids[:, i : i + 1], position_ids=positions, inference_params=params)
                logits.append(out.logits)
                params.seqlen_offset += 1
                if per_sample:
                    params.lengths_per_sample += 1
        caches = (cache[:, :12] for cache in params.key_value_memory_dict.values())
        states.append([*logits, *caches])
    for a, b in zip(*states):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2  # a constant first, then a symbol
