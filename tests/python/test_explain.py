"""explain: words and keywords become the same problem, and every reason is one that decide gave."""

from __future__ import annotations

import json

import pytest
import torch

import anyflash
from anyflash import _core, _defs, _machine
from anyflash.__main__ import main
from anyflash._explain_words import FEATURE_WORDS, parse_words
from anyflash.explain import ROUTE_TITLES

ROUTES = [entry.fields[0] for entry in _defs.entries("routes") if entry.macro == "ROUTE"]
FEATURES = list(_defs.feature_phrases())


@pytest.mark.parametrize(
    "words, facts",
    (
        (
            "bf16 causal head_dim 128 on sm_90 training",
            dict(dtype="bf16", features=["causal"], head_dim=128, device="cuda", sm=90)
            | dict(training=True),
        ),
        ("fp16, T4, inference", dict(dtype="fp16", device="cuda", sm=75, training=False)),
        ("fp16 T4 driver 550.54.14", dict(dtype="fp16", device="cuda", sm=75, driver=12040)),
        ("A100 with driver R470", dict(device="cuda", sm=80, driver=11040)),
        ("driver 12080 sm_100", dict(device="cuda", sm=100, driver=12080)),
        ("float32 on the CPU", dict(dtype="fp32", device="cpu")),
        ("head dim 192/128 half", dict(head_dim=192, head_dim_v=128, dtype="fp16")),
        ("d=64 varlen sliding window", dict(head_dim=64, features=["packed", "window", "window"])),
        ("hd96 sm_90a torch 2.11", dict(head_dim=96, device="cuda", sm=90, torch_version=211)),
        ("compute capability 8.6 gqa", dict(device="cuda", sm=86, features=["gqa"])),
        ("non-causal bf16", dict(dtype="bf16")),
        ("backend sdpa math causal", dict(backend="sdpa,math", features=["causal"])),
        ("fp32 on avx512", dict(dtype="fp32", device="cpu", isa="avx512")),
        ("mlp bf16 A100", dict(op="bias_activation", dtype="bf16", device="cuda", sm=80)),
    ),
)
def test_words(words, facts):
    assert parse_words(words) == facts


def test_words_and_keywords_say_the_same():
    words = anyflash.explain("bf16 causal head_dim 128 on sm_90 training")
    keywords = anyflash.explain(
        dtype=torch.bfloat16, features=["causal"], head_dim=128, sm=90, training=True
    )
    assert words.problems == keywords.problems
    assert words.decisions == keywords.decisions


@pytest.mark.parametrize(
    "words", ("fp32 softcap T4 training", "bf16 packed cpu", "bf16 d 264 H100")
)
def test_reasons_are_those_of_decide(words):
    answer = anyflash.explain(words)
    text = str(answer)
    for problem, decision in zip(answer.problems, answer.decisions):
        assert anyflash.decide(problem) == decision
        for route, reason in decision["reasons"]:
            assert route in text
            assert reason in text


def test_forward_is_not_asked_about_the_backward():
    answer = anyflash.explain("bf16 A100 deterministic training", backend="sdpa,math")
    forward, backward = answer.problems
    assert "deterministic" not in forward["features"]
    assert "deterministic" in backward["features"]
    assert [d["route"] for d in answer.decisions] == ["aten_flash", "math"]


def test_a_kernel_is_named_with_its_measured_speed():
    answer = anyflash.explain("bf16 causal d 64 avx512bf16 training")
    for decision in answer.decisions:
        if decision["instance"] is None:  # passed over: then it says why
            assert "kernel" in dict(decision["reasons"])
            continue
        speed = decision["measured"]
        assert (
            f"{decision['instance']}, measured {speed['median']:.2f}x PyTorch's attention "
            f"(median), at worst {speed['worst']:.2f}x"
        ) in str(answer)


def test_a_kernel_for_gpus_runs_where_it_is_named():
    named = anyflash.explain("bf16 causal d 20 A100", backend="kernel,math")
    by_itself = anyflash.explain("bf16 causal d 20 A100")
    if "sm80" not in {i["arch"] for i in _core.instances()}:
        for answer in (named, by_itself):
            assert "this build has no attention kernel for sm_80" in str(answer)
        return
    assert "attention_forward_bf16_d64_sm80" in str(named)
    assert "has not been checked on a GPU of its architecture yet; naming `kernel`" in str(
        by_itself
    )


def test_a_kernel_for_a_t4_runs_where_it_is_named():
    if "sm75" not in {i["arch"] for i in _core.instances() if i["family"] == "attention"}:
        pytest.skip("no kernels for sm_75")
    assert "attention_forward_fp16_d128_sm75" in str(
        anyflash.explain("fp16 causal d 96 T4", backend="kernel,math")
    )
    assert "needs fp16, got bf16" in str(anyflash.explain("bf16 d 96 T4", backend="kernel,math"))


def test_nothing_runs():
    answer = anyflash.explain("fp64 softcap H100", backend="sdpa")
    assert not answer.runs
    assert answer.route == "none"
    assert "nothing in this order" in str(answer)


def test_the_context_manager_counts():
    with anyflash.backend("math"):
        assert anyflash.explain("fp32 cpu").route == "math"
    assert anyflash.explain("fp32 cpu", backend="sdpa").route == "aten_cpu"


def test_says_what_it_assumed():
    assert "inference" in str(anyflash.explain("bf16 d 64 cpu"))
    assert anyflash.explain("bf16 d 64 cpu inference").assumed == []


def test_a_driver_is_said_or_assumed(monkeypatch):
    monkeypatch.setattr(_machine, "driver", lambda: None)
    answer = anyflash.explain("fp16 T4 inference", driver=552)
    assert answer.problems[0]["driver"] == 12040
    assert "NVIDIA driver R550 (CUDA 12.4)" in str(answer)
    assert "a driver that is new enough" in anyflash.explain("fp16 T4").assumed
    monkeypatch.setattr(_machine, "driver", lambda: {"version": 13000})
    assert anyflash.explain("fp16 T4").problems[0]["driver"] == 13000
    assert anyflash.explain("fp16 cpu").problems[0]["driver"] == 0


def test_a_call_given_with_its_tensors():
    q, k = torch.randn(2, 8, 4, 32), torch.randn(2, 16, 2, 32, requires_grad=True)
    call = dict(causal=True, window_size=(4, 0), softcap=3.0)
    answer = anyflash.explain(q, k, k, **call)
    forward, backward = answer.problems
    assert forward["features"] == ["causal", "window", "softcap", "gqa", "lse"]
    assert (forward["dtype"], forward["head_dim"], forward["device"]) == ("fp32", 32, "cpu")
    assert answer.assumed == []
    assert answer.decisions == [anyflash.decide(problem) for problem in answer.problems]
    wide = anyflash.explain(q, k.detach(), k.detach(), window_size=(16, 99))
    assert len(wide.problems) == 1
    assert wide.problems[0]["features"] == ["gqa"]


@pytest.mark.parametrize("layout", ("dense", "packed"))
@pytest.mark.parametrize(
    "heads, shape, broadcasts",
    (
        (4, (2, 4, 8, 16), False),
        (4, (2, 1, 8, 16), True),
        (1, (2, 1, 8, 16), False),
        (4, (4, 8, 16), True),
        (4, (2, 4, 8, 1), True),
        (4, (2, 4, 1, 16), True),
    ),
    ids=str,
)
def test_a_bias_whose_numbers_belong_to_many_scores(heads, shape, broadcasts, layout):
    q, k = torch.randn(2, 8, heads, 32), torch.randn(2, 16, heads, 32)
    options = {}
    if layout == "packed":
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        options = {"cu_seqlens_q": torch.tensor([0, 8, 16]), "max_seqlen_q": 8}
        options |= {"cu_seqlens_k": torch.tensor([0, 16, 32]), "max_seqlen_k": 16}
    bias = torch.randn(shape, requires_grad=True)
    answer = anyflash.explain(q, k, k, bias=bias, deterministic=True, **options)
    assert ("deterministic_bias_grad" in answer.problems[1]["features"]) == broadcasts


@pytest.mark.parametrize(
    "arguments, facts, message",
    (
        ("bf16 casual", {}, "Did you mean 'causal'"),
        ("", {"dtype": "int8"}, "dtype must be one of"),
        ("", {"features": ["rotary"]}, "unknown feature rotary"),
        ("", {"device": "tpu"}, "device must be one of cpu, cuda, hip"),
        ("T4 driver 390", {}, "driver: expected a version such as 550 or 550.54 .418 or newer."),
        ("", {"sm": 75, "driver": "new"}, "driver: expected a version"),
        ("", {"headdim": 64}, "unknown keyword headdim"),
        ("", {"backend": "fast"}, "unknown back end 'fast'"),
    ),
)
def test_questions_not_understood(arguments, facts, message):
    with pytest.raises(ValueError, match=message):
        anyflash.explain(arguments, **facts)


def test_every_route_has_a_title_and_every_feature_a_name():
    assert set(ROUTE_TITLES) == {"kernel", *ROUTES}
    assert list(FEATURE_WORDS) == FEATURES


def test_command_line(capsys):
    assert main(["explain", "bf16", "causal", "head_dim", "128", "on", "sm_90", "training"]) == 0
    out = capsys.readouterr().out
    assert "forward" in out and "backward" in out and "aten_flash" in out

    flags = ["--device", "cuda", "--sm", "75", "--dtype", "fp16", "--head-dim", "64", "--json"]
    assert main(["explain", *flags, "--feature", "causal", "--training"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [d["route"] for d in report["decisions"]] == ["aten_efficient"] * 2

    assert main(["explain", "fp64", "softcap", "H100", "--backend", "sdpa"]) == 1
    assert main(["explain", "nonsense"]) == 2


@pytest.mark.parametrize(
    "words",
    ["seqlen 2048", "batch 2", "8 heads", "seqlen_q 1 seqlen_k 4096", "max_seqlen_k=77", "len 2k"],
)
def test_sizes_are_read_and_change_nothing(words):
    assert parse_words(f"bf16 causal {words}") == parse_words("bf16 causal")


def test_numbers_of_features_and_activations():
    assert parse_words("dropout 0.1 fp16") == {"features": ["dropout"], "dtype": "fp16"}
    assert parse_words("gelu_tanh mlp bf16")["op"] == "bias_activation"


def test_an_explanation_shows_its_text():
    answer = anyflash.explain("bf16 head_dim 64")
    assert repr(answer) == str(answer) and "forward" in repr(answer)
