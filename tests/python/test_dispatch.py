"""The decision: the same from C++ and Python, right for every GPU, in words a user understands."""

# ruff: noqa: E501  (one entry of a table, one line)

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from support import REPOSITORY, run_python, torch_version

import anyflash
from anyflash import _core, _defs, backends
from anyflash.explain import BACKWARD_ONLY

pytestmark = pytest.mark.providers

FEATURES = [
    "packed",
    "paged",
    "seqused_k",
    "leftpad_k",
    "causal",
    "window",
    "softcap",
    "alibi",
    "bias",
    "bias_grad",
    "sinks",
    "dropout",
    "gqa",
    "unequal_head_dims",
    "lse_grad",
    "deterministic",
    "deterministic_bias_grad",
]
NAMES = ["kernel", "sdpa", "math", "aten_cudnn", "aten_flash", "aten_efficient", "aten_cpu"]
NAMES += ["aten_sdpa"]


def _random_problem(draw: random.Random) -> dict:
    device = draw.choice(["cpu", "cuda", "cuda"])
    head_dim = draw.choice([1, 8, 59, 60, 64, 80, 96, 128, 130, 192, 256, 264, 300, 512])
    order = draw.choice([["kernel", "sdpa", "math"], draw.sample(NAMES, draw.randint(1, 4))])
    return {
        "op": "attention" if device == "cuda" or draw.random() < 0.9 else "bias_activation",
        "device": device,
        "sm": draw.choice([50, 61, 70, 75, 80, 86, 89, 90, 100, 103, 120])
        if device == "cuda"
        else 0,
        "isa": draw.choice(backends.ISAS) if device == "cpu" else "none",
        "direction": draw.choice(["forward", "backward"]),
        "dtype": draw.choice(["fp16", "bf16", "fp32", "fp64"]),
        "head_dim": head_dim,
        "head_dim_v": head_dim if draw.random() < 0.7 else draw.choice([16, 60, 257, 512]),
        "features": draw.sample(FEATURES, draw.choice([0, 0, 1, 1, 2, 3, 5])),
        "torch_version": draw.choice([200, 203, 204, 205, 208, 209, 210, 213, 215]),
        "order": order,
        "explicit": draw.random() < 0.5,
    }


def test_a_kernel_is_chosen_as_its_line_says():
    """The choice in C++ against the columns of instances.def as Python reads them."""
    lines = {}
    for entry in _defs.entries("instances"):
        if entry.macro == "ATTENTION":
            arch, direction, dtype, top, multiple, names, _ = entry.fields
            name = f"attention_{direction}_{dtype}_d{top}_{arch}"
            lines[name] = dtype, direction, int(top), int(multiple), names
    assert {i["name"] for i in _core.instances() if i["family"] == "attention"} <= set(lines)
    draw = random.Random(3)
    chosen = set()
    for _ in range(4000):
        problem = {**_random_problem(draw), "order": ["kernel"], "explicit": True}
        decision = _core.decide(problem)
        if problem["op"] != "attention" or decision["route"] != "kernel":
            continue
        dtype, direction, top, multiple, names = lines[decision["instance"]]
        assert (problem["dtype"], problem["direction"]) == (dtype, direction)
        for head_dim in (problem["head_dim"], problem["head_dim_v"]):
            assert head_dim <= top and head_dim % multiple == 0
        assert set(problem["features"]) <= _defs.features(names)
        chosen.add(decision["instance"])
    assert chosen == {i["name"] for i in _core.instances() if i["family"] == "attention"}


def test_measured_table():
    """Every CPU kernel that has been checked is measured beside PyTorch's attention."""
    measured = {
        (arch, direction, dtype): (int(top), float(worst), float(median))
        for arch, direction, dtype, top, worst, median in (
            entry.fields for entry in _defs.entries("measured") if entry.macro == "MEASURED"
        )
    }
    for entry in _defs.entries("instances"):
        if entry.macro == "ATTENTION" and entry.fields[0] in backends.ISAS:
            assert entry.fields[-1] == "none" or entry.fields[:3] in measured
    for _, worst, median in measured.values():
        assert 0 < worst <= median


def _kernel_reason(**problem):
    return [reason for reason in _decide(device="cpu", **problem)[1] if reason.startswith("kernel")]


def test_what_is_said_against_the_kernels_of_a_cpu():
    oldest = "neon" if "neon" in {i["arch"] for i in _core.instances()} else "avx2"
    assert _kernel_reason(isa="none") == [f"kernel: needs {oldest}, this CPU has none"]
    lowered = _kernel_reason(isa="none", isa_lowered=True)
    assert lowered == [f"kernel: needs {oldest}, ANYFLASH_CPU_ISA allows none"]
    fp64 = _kernel_reason(isa=oldest, dtype="fp64")
    assert fp64 == ["kernel: needs fp16, bf16 or fp32, got fp64"]
    wide = _kernel_reason(isa=oldest, head_dim_v=513)
    assert wide == ["kernel: head_dim_v 513 is above 512"]


# Problems that name `kernel`, on a GPU; and the kernel, or what is said where there is none.
NAMED_ON_A_GPU = [
    (dict(sm=80), "attention_forward_fp16_d64_sm80"),
    (dict(sm=86, dtype="bf16", head_dim=20, head_dim_v=20), "attention_forward_bf16_d64_sm80"),
    (dict(sm=89, head_dim=80, head_dim_v=80), "attention_forward_fp16_d96_sm80"),
    (dict(sm=90, head_dim=192, head_dim_v=128), "attention_forward_fp16_d192_sm80"),
    (dict(sm=120, head_dim=256, head_dim_v=256), "attention_forward_fp16_d256_sm80"),
    (dict(sm=100, features=["packed", "causal", "gqa"]), "attention_forward_fp16_d64_sm80"),
    (dict(sm=90, features=["paged", "seqused_k", "alibi"]), "attention_forward_fp16_d64_sm80"),
    (dict(sm=90, features=["softcap", "window", "sinks"]), "attention_forward_fp16_d64_sm80"),
    (dict(sm=90, features=["dropout", "leftpad_k"]), "attention_forward_fp16_d64_sm80"),
    (dict(sm=75), "attention_forward_fp16_d64_sm75"),
    (dict(sm=75, head_dim=80, head_dim_v=80), "attention_forward_fp16_d128_sm75"),
    (
        dict(sm=75, head_dim=192, head_dim_v=128, features=["paged", "softcap"]),
        "attention_forward_fp16_d256_sm75",
    ),
    (dict(sm=75, dtype="bf16"), "needs fp16, got bf16"),
    (dict(sm=70), "needs sm_75 or newer, this GPU is sm_70"),
    (dict(sm=90, dtype="fp32"), "needs fp16 or bf16, got fp32"),
    (dict(sm=90, head_dim=264, head_dim_v=64), "head_dim 264 is above 256"),
    (dict(sm=90, features=["bias"]), "attention_forward_fp16_d64_sm80"),
    (dict(sm=90, direction="backward"), "attention_backward_fp16_d64_sm80"),
    (
        dict(sm=100, direction="backward", features=["deterministic", "dropout", "lse_grad"]),
        "attention_backward_fp16_d64_sm80",
    ),
    (dict(sm=75, direction="backward"), "attention_backward_fp16_d64_sm75"),
    (dict(sm=75, direction="backward", head_dim=192), "head_dim 192 is above 128"),
    (
        dict(sm=90, direction="backward", features=["bias", "bias_grad"]),
        "attention_backward_fp16_d64_sm80",
    ),
    (
        dict(sm=90, direction="backward", features=["bias_grad", "deterministic_bias_grad"]),
        "does not support a deterministic gradient for a bias that broadcasts",
    ),
]


@pytest.mark.parametrize(("problem", "expected"), NAMED_ON_A_GPU, ids=lambda x: str(x))
def test_attention_kernels_named_on_a_gpu(problem, expected):
    fields = dict(
        op="attention", device="cuda", direction="forward", dtype="fp16", torch_version=211
    )
    fields |= dict(head_dim=64, head_dim_v=64, features=[], order=["kernel"], explicit=True)
    decision = anyflash.decide({**fields, **problem})
    if not _has_gpu_kernels():
        missing = f"this build has no attention kernel for sm_{problem['sm']}"
        assert decision["reasons"] == [("kernel", missing)]
    elif expected.startswith("attention_"):
        assert (decision["route"], decision["instance"]) == ("kernel", expected)
    else:
        assert decision["reasons"] == [("kernel", expected)]


def _has_gpu_kernels() -> bool:
    return any(instance["device"] == "cuda" for instance in _core.instances())


def test_cpus_with_amx():
    if not _has_x86_kernels():
        pytest.skip("no kernels for x86")
    for dtype, arch in (("bf16", "amx"), ("fp16", "avx512"), ("fp32", "avx512")):
        for direction in ("forward", "backward"):
            problem = dict(device="cpu", isa="amx", dtype=dtype, direction=direction)
            found = _decision(**problem, order="kernel")["instance"]
            assert found == f"attention_{direction}_{dtype}_d512_{arch}"


def _has_x86_kernels() -> bool:
    return "avx2" in {instance["arch"] for instance in _core.instances()}


@pytest.mark.parametrize("key", ["op", "device", "isa", "direction", "dtype"])
def test_unknown_values_in_a_problem(key):
    problem = _random_problem(random.Random(1))
    with pytest.raises(ValueError, match="banana"):
        anyflash.decide({**problem, key: "banana"})


def _decision(device="cuda", sm=80, features=(), order=None, **changes):
    problem = {
        "op": "attention",
        "device": device,
        "sm": sm if device == "cuda" else 0,
        "direction": "forward",
        "dtype": "fp16",
        "head_dim": 64,
        "head_dim_v": 64,
        "features": list(features),
        "torch_version": 211,
        "order": order.split(",") if order else ["kernel", "sdpa", "math"],
        "explicit": order is not None,
        **changes,
    }
    return anyflash.decide(problem)


def _decide(**changes):
    decision = _decision(**changes)
    return decision["route"], [f"{route}: {text}" for route, text in decision["reasons"]]


OTHER_DEVICES = ("hip", "mps", "xpu", "other")

# What users of each machine get, written down by hand.
EXPECTED_ROUTES = [
    (dict(device="cpu"), "aten_cpu"),
    (dict(device="cpu", dtype="fp64"), "aten_cpu"),
    (dict(device="cpu", features=["softcap"]), "math"),
    (dict(device="cpu", features=["alibi", "causal"]), "math"),
    (dict(device="cpu", features=["dropout"]), "math"),
    (dict(device="cpu", features=["packed", "causal", "gqa", "window"]), "aten_cpu"),
    (dict(device="cpu", features=["paged", "seqused_k"]), "aten_cpu"),
    (dict(device="cpu", torch_version=200), "aten_sdpa"),
    (dict(device="cpu", torch_version=200, features=["lse"]), "math"),
    (dict(device="cpu", features=["unequal_head_dims"]), "aten_sdpa"),
    (dict(sm=70), "aten_efficient"),
    (dict(sm=75), "aten_efficient"),
    (dict(sm=75, dtype="bf16"), "aten_sdpa"),
    (dict(sm=75, dtype="bf16", features=["lse"]), "math"),
    (dict(sm=75, features=["packed", "causal"]), "aten_efficient"),
    (dict(sm=75, features=["window"]), "aten_sdpa"),
    (dict(sm=75, features=["window", "lse"]), "math"),
    (dict(sm=75, torch_version=203, features=["packed", "causal"]), "aten_efficient"),
    (dict(sm=75, torch_version=200, features=["causal"]), "aten_efficient"),
    (dict(sm=75, torch_version=200, features=["packed", "causal"]), "aten_sdpa"),
    (dict(sm=75, torch_version=200, features=["packed", "causal", "lse"]), "math"),
    (dict(sm=80), "aten_flash"),
    (dict(sm=90, dtype="bf16", features=["packed", "causal", "gqa"]), "aten_flash"),
    (dict(sm=90, dtype="fp32"), "aten_efficient"),
    (dict(sm=90, dtype="fp64"), "aten_sdpa"),
    (dict(sm=90, head_dim=60, head_dim_v=60), "aten_sdpa"),
    (dict(sm=90, head_dim=264, head_dim_v=264), "aten_efficient"),
    (dict(sm=90, features=["alibi"]), "aten_flash"),
    (dict(sm=90, features=["alibi", "lse"], direction="backward"), "math"),
    (dict(sm=90, features=["bias"]), "aten_efficient"),
    (dict(sm=90, features=["bias", "bias_grad", "lse"], direction="backward"), "math"),
    (dict(sm=80, features=["deterministic", "lse"], direction="backward"), "math"),
    *(
        (dict(device=device, features=features), "aten_sdpa")
        for device in OTHER_DEVICES
        for features in (
            (),
            ("packed", "causal", "gqa", "window"),
            ("paged", "seqused_k"),
            ("bias",),
        )
    ),
    *(
        (dict(device=device, features=features), "math")
        for device in OTHER_DEVICES
        for features in (("lse",), ("alibi",), ("dropout",), ("sinks",), ("softcap",))
    ),
    *(
        (dict(device=device, direction="backward", features=["bias", "bias_grad"]), "aten_sdpa")
        for device in OTHER_DEVICES
    ),
    *(
        (dict(device=device, direction="backward", features=["lse"]), "math")
        for device in OTHER_DEVICES
    ),
    (dict(device="hip", order="aten_flash"), "none"),
    (dict(device="xpu", order="aten_cpu"), "none"),
    (dict(sm=90, order="aten_cudnn"), "aten_cudnn"),
    (dict(sm=80, order="aten_cudnn"), "none"),
    (dict(sm=70, order="kernel"), "none"),
    (
        dict(sm=90, features=["deterministic_bias_grad"], direction="backward", order="kernel"),
        "none",
    ),
    (dict(sm=90, order="math"), "math"),
    (dict(sm=90, order="math,sdpa"), "math"),
]


@pytest.mark.parametrize(("problem", "route"), EXPECTED_ROUTES, ids=lambda x: str(x))
def test_expected_routes(problem, route):
    assert _decide(**problem)[0] == route


# What is said against each choice, word for word.
EXPECTED_REASONS = [
    (dict(sm=75), "aten_flash: needs sm_80 or newer, this GPU is sm_75"),
    (dict(sm=90, dtype="fp32"), "aten_flash: needs fp16 or bf16, got fp32"),
    (dict(sm=90, dtype="fp64"), "aten_efficient: needs fp16, bf16 or fp32, got fp64"),
    (dict(sm=90, head_dim=264), "aten_flash: head_dim 264 is above 256"),
    (dict(sm=90, head_dim=60), "aten_flash: head_dim 60 is not a multiple of 8"),
    (dict(sm=90, head_dim_v=60), "aten_flash: head_dim_v 60 is not a multiple of 8"),
    (dict(device="cpu", features=["softcap"]), "aten_cpu: does not support softcap"),
    (dict(sm=75, dtype="bf16"), "aten_efficient: bf16 needs sm_80"),
    (dict(sm=90, torch_version=204), "aten_flash: needs torch 2.5, this is 2.4"),
    (dict(device="cpu", order="aten_flash"), "aten_flash: runs on cuda only"),
    (dict(sm=90, order="aten_cpu"), "aten_cpu: runs on cpu only"),
    (dict(device="hip"), "aten_flash: runs on cuda only"),
    (dict(device="mps"), "kernel: this build has no attention kernel for mps"),
    (
        dict(device="mps", features=["lse"]),
        "aten_sdpa: does not support the log-sum-exp beside the output",
    ),
]


@pytest.mark.parametrize(("problem", "reason"), EXPECTED_REASONS, ids=lambda x: str(x))
def test_expected_reasons(problem, reason):
    assert reason in _decide(**problem)[1]


def test_default_order_never_ends_without_a_route():
    """math supports everything up to head_dim 512, for every GPU and every torch."""
    draw = random.Random(2)
    for _ in range(1000):
        problem = {**_random_problem(draw), "order": ["kernel", "sdpa", "math"], "explicit": False}
        backward = problem["direction"] == "backward"
        forward_only, backward_only = {"paged"}, set(BACKWARD_ONLY)
        impossible = forward_only if backward else backward_only
        problem["features"] = [f for f in problem["features"] if f not in impossible]
        assert anyflash.decide(problem)["route"] != "none", problem


def test_lengths_are_no_part_of_a_decision():
    """Dynamic shapes never change it, so a compiled graph holds for all lengths."""
    text = (REPOSITORY / "core" / "problem.h").read_text()
    body = re.search(r"struct Problem \{(.*?)\n\};", text, re.DOTALL).group(1)
    code = re.sub(r"//.*", "", body)
    assert not re.search(r"seqlen|batch|total", code)


def test_refusal_names_every_choice_and_reason(device):
    q = torch.zeros(1, 4, 1, 8, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError) as refused:
        anyflash.attention(q, q, q, softcap=1.0, backend="kernel,aten_cpu,aten_cudnn")
    message = str(refused.value)
    assert message.startswith(
        'anyflash: no back end of "kernel,aten_cpu,aten_cudnn" can run this attention: kernel: '
    )
    assert "; aten_cpu: " in message and "; aten_cudnn: " in message


def test_order_codes():
    code = backends.order_code
    assert code("kernel,sdpa,math") == code("auto") == 0x321
    assert code("math") == 3
    assert code(" aten_cpu , math ") == 0x37
    assert code("sdpa,math", True) == 2
    assert code(None) == 0
    with pytest.raises(ValueError, match="unknown back end 'cutlass'; known: auto, kernel, sdpa"):
        code("sdpa,cutlass")


# Environment, keyword arguments, how the outcome begins.
ENVIRONMENTS = [
    ({"ANYFLASH_BACKEND": "aten_flash"}, {}, 'RuntimeError anyflash: no back end of "aten_flash"'),
    ({"ANYFLASH_BACKEND": "aten_flash,math"}, {}, "torch.Size"),
    ({"ANYFLASH_BACKEND": "aten_flash,math", "ANYFLASH_STRICT": "1"}, {}, "RuntimeError"),
    (
        {"ANYFLASH_STRICT": "1", "ANYFLASH_CPU_ISA": "none"},
        {},
        'RuntimeError anyflash: no back end of "kernel"',
    ),
    ({"ANYFLASH_STRICT": "0"}, {}, "torch.Size"),
    ({"ANYFLASH_STRICT": "1"}, {"backend": "math"}, "torch.Size"),
    (
        {"ANYFLASH_STRICT": "1", "ANYFLASH_CPU_ISA": "none"},
        {"backend": "kernel,math"},
        "RuntimeError",
    ),
    ({"ANYFLASH_BACKEND": "aten_flash"}, {"backend": "sdpa"}, "torch.Size"),
    (
        {"ANYFLASH_BACKEND": "nonsense"},
        {},
        "ValueError ANYFLASH_BACKEND: unknown back end 'nonsense'",
    ),
    ({"ANYFLASH_BACKEND": "auto"}, {}, "torch.Size"),
    ({"ANYFLASH_BACKEND": ""}, {}, "torch.Size"),
]

# The environment is read once per process, at the first call: a fork for each.
IN_CHILDREN = """
import json, os, torch, anyflash
torch.set_num_threads(1)
q = torch.zeros(1, 4, 1, 8)
outcomes = []
for environment, options, _ in {environments!r}:
    read, write = os.pipe()
    if os.fork() == 0:
        os.environ.update(environment)
        try:
            outcome = str(anyflash.attention(q, q, q, **options).shape)
        except Exception as error:
            outcome = type(error).__name__ + " " + str(error)
        os.write(write, outcome.encode())
        os._exit(0)
    os.wait()
    os.close(write)
    outcomes.append(os.fdopen(read).read())
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(provider):
    code = IN_CHILDREN.format(environments=ENVIRONMENTS)
    return json.loads(run_python(code, ANYFLASH_PROVIDER=provider).splitlines()[-1])


@pytest.mark.parametrize("index", range(len(ENVIRONMENTS)), ids=lambda i: str(ENVIRONMENTS[i][:2]))
def test_environment(index, outcomes):
    assert outcomes[index].startswith(ENVIRONMENTS[index][2]), outcomes[index]


ISAS = """
import torch, anyflash
q = torch.randn(1, 40, 2, 32)
try:
    decision = anyflash.explain(q, q, q).decisions[0]
    anyflash.attention(q, q, q)
    print(decision["instance"] or decision["route"])
except ValueError as error:
    print(error)
"""


def test_forcing_an_instruction_set():
    """A lower one than the machine's is used; others are an error that names what there is."""
    from anyflash import _loader

    here = backends.ISAS.index(_loader.cpu_isa())
    known = "none, avx2, avx512, avx512bf16, amx, neon"
    for isa in backends.ISAS:
        printed = run_python(ISAS, ANYFLASH_CPU_ISA=isa).strip()
        same_family = isa == "none" or (isa == "neon") == (backends.ISAS[here] == "neon")
        if not same_family or backends.ISAS.index(isa) > here:
            missing = f"this CPU does not have '{isa}'; it has {backends.ISAS[here]}"
            assert printed == f"ANYFLASH_CPU_ISA: {missing}"
        elif isa == "none":
            assert printed == "aten_cpu"
            # Who has lowered it is told so, and who asks about another CPU is not.
            told = "this CPU has" if backends.ISAS[here] == "none" else "ANYFLASH_CPU_ISA allows"
            for question, expected in (("", told), (', isa="none"', "this CPU has")):
                code = f"import anyflash\nprint(anyflash.explain('fp32', device='cpu'{question}))"
                assert f"{expected} none" in run_python(code, ANYFLASH_CPU_ISA="none")
        elif isa in ("avx2", "avx512"):
            assert printed in (f"attention_forward_fp32_d512_{isa}", "aten_cpu")
    printed = run_python(ISAS, ANYFLASH_CPU_ISA="sse").strip()
    assert printed == f"ANYFLASH_CPU_ISA: unknown instruction set 'sse'; known: {known}"


def test_context_manager_wins_over_environment_and_argument_over_it(provider):
    code = """
import torch, anyflash
q = torch.zeros(1, 4, 1, 8)
with anyflash.backend("math"):
    anyflash.attention(q, q, q)
    try:
        anyflash.attention(q, q, q, backend="aten_cudnn")
    except RuntimeError as error:
        print(error)
"""
    printed = run_python(code, ANYFLASH_PROVIDER=provider, ANYFLASH_BACKEND="aten_flash")
    assert printed.startswith('anyflash: no back end of "aten_cudnn"')


def test_running_torch_is_what_the_decision_sees():
    assert torch_version() >= 200
    assert _decide(device="cpu", torch_version=torch_version())[0] in ("aten_cpu", "math")
