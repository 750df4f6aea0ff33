"""Why a shape runs where it runs: `anyflash.explain(...)` and `python -m anyflash explain ...`.

A shape is given in words ("bf16 causal head_dim 128 on sm_90 training") or as keywords; both become
the `Problem` that the operators themselves hand to `decide`. The answer and every reason in it are
`decide`'s own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from . import _core, _drivers, _loader, _machine, backends
from ._core import torch_version
from ._explain_words import DTYPES, FEATURE_WORDS, parse_words
from ._records import DEVICES, device_numbers

if TYPE_CHECKING:
    import argparse

ROUTE_TITLES = {
    "kernel": "anyflash's own kernel",
    "aten_cudnn": "cuDNN's attention, called through PyTorch",
    "aten_flash": "PyTorch's flash attention (CUDA)",
    "aten_efficient": "PyTorch's memory-efficient attention (CUDA)",
    "aten_cpu": "PyTorch's flash attention (CPU)",
    "aten_sdpa": "PyTorch's public scaled_dot_product_attention",
    "math": "plain PyTorch operations, a block of rows at a time",
}

BACKWARD_ONLY = ("bias_grad", "lse_grad", "deterministic", "deterministic_bias_grad")

_KEYWORDS = frozenset(
    ("op", "device", "sm", "driver", "isa", "dtype", "head_dim", "head_dim_v", "features")
    + ("training", "torch_version", "backend")
)


@dataclasses.dataclass(repr=False)
class Explanation:
    """What runs for one shape; its ``repr`` is the text for people.

    Attributes:
        problems: One `Problem` dict per direction, as handed to `decide`.
        decisions: One dict per direction, as `decide` returned it.
        assumed: What the question left open and how it was filled in.
    """

    problems: list[dict[str, Any]]
    decisions: list[dict[str, Any]]
    assumed: list[str] = dataclasses.field(default_factory=list)

    @property
    def route(self) -> str:
        """The route of the forward pass; "none" when nothing can run it."""
        return self.decisions[0]["route"]

    @property
    def runs(self) -> bool:
        """Whether every direction asked for has a route."""
        return all(decision["route"] != "none" for decision in self.decisions)

    def as_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "runs": self.runs}

    def __repr__(self) -> str:
        lines = [describe_problem(self.problems[-1])]
        if self.assumed:
            lines.append(f"(not said, so assumed: {', '.join(self.assumed)})")
        for problem, decision in zip(self.problems, self.decisions):
            route = decision["route"]
            title = "nothing in this order can run it"
            if route != "none":
                title = f"{route}: {ROUTE_TITLES[route]}{_kernel_text(decision)}"
            lines += ["", f"{problem['direction']:9s} {title}"]
            obstacles: dict[str, list[str]] = {}
            for name, reason in decision["reasons"]:
                obstacles.setdefault(name, []).append(reason)
            lines += [f"{'':9s} not {name}: {'; '.join(why)}" for name, why in obstacles.items()]
        return "\n".join(lines)


def _kernel_text(decision: dict[str, Any]) -> str:
    """Which kernel, and its speed beside PyTorch's attention; empty for other routes."""
    if decision["instance"] is None:
        return ""
    text, speed = f", {decision['instance']}", decision["measured"]
    if speed is not None:
        text += f", measured {speed['median']:.2f}x PyTorch's attention (median), "
        text += f"at worst {speed['worst']:.2f}x"
    return text


def describe_problem(problem: dict[str, Any]) -> str:
    """One line for a `Problem`: what is asked, where, and the back ends in order."""
    if problem["device"] == "cuda":
        where = f"on a GPU of compute capability sm_{problem['sm']}"
        if problem["driver"]:
            where += f", NVIDIA driver {_drivers.text_of(problem['driver'])}"
    elif problem["device"] != "cpu":
        where = f"on a device of the kind {problem['device']}"
    else:
        where = "on a CPU" if problem["isa"] == "none" else f"on a CPU with {problem['isa']}"
    if problem["op"] == "bias_activation":
        what = f"bias + activation, {problem['dtype']}"
    else:
        dims = str(problem["head_dim"])
        if problem["head_dim_v"] != problem["head_dim"]:
            dims += f"/{problem['head_dim_v']}"
        what = ", ".join([f"attention, {problem['dtype']}, head_dim {dims}", *problem["features"]])
    major, minor = divmod(problem["torch_version"], 100)
    return (
        f"{what}, {where}, torch {major}.{minor}; back ends in order: {', '.join(problem['order'])}"
    )


def explain(words: str | torch.Tensor = "", *tensors: torch.Tensor, **facts: Any) -> Explanation:
    """Tells which back end runs a shape, and why no other does.

    Args:
        words: The shape in words; may be empty. Keywords win over words. Or q, followed by k and v:
            then the keywords are those of `anyflash.attention`, and the call is explained.
        *tensors: k and v, where q was given.
        **facts: op ("attention", "bias_activation"), device ("cpu", "cuda", "hip", "mps", "xpu",
            "other"), sm (90), driver (NVIDIA's: 550, or the CUDA it knows, 12040), isa ("avx2", of
            a CPU), dtype ("bf16" or torch.bfloat16), head_dim, head_dim_v, features (names of
            `features.def`), training (bool: also the backward), torch_version (213 means 2.13),
            backend ("kernel,sdpa").

    Returns:
        An `Explanation`; print it, or read `.route`, `.decisions`. Sizes that the choice does not
        depend on (seqlen 2048, batch 2, heads 8) may be said, and change nothing.

    Raises:
        ValueError: Words, keywords, features or back ends that do not exist.
    """
    from . import decide  # the package imports this module

    if isinstance(words, torch.Tensor):
        said = _facts_of_call(words, *tensors, **facts)
    else:
        said = {**(parse_words(words) if words else {}), **_given(facts)}
    problem, training, assumed = _complete(said)
    if training and _differentiates(problem):
        problem["features"] = _feature_names([*problem["features"], "lse"])
    forward = [name for name in problem["features"] if name not in BACKWARD_ONLY]
    problems = [{**problem, "direction": "forward", "features": forward}]
    if training:
        problems.append({**problem, "direction": "backward"})
    return Explanation(problems, [decide(dict(p)) for p in problems], assumed)


def kernel_runs(
    direction: int,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    features: tuple[str, ...],
    order: int,
) -> bool:
    """Whether an order of back ends, as a number, gives attention that is trained to a kernel;
    direction 0 is the forward."""
    facts: dict[str, Any] = {"device": _device_name(device)}
    if facts["device"] == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts["sm"] = 10 * major + minor
    answer = explain(
        dtype=dtype,
        head_dim=head_dim,
        features=features,
        training=True,
        backend=",".join(backends.order_names(order)),
        **facts,
    )
    return bool(answer.decisions[direction]["route"] == "kernel")


def _differentiates(problem: dict[str, Any]) -> bool:
    """Whether a backward of this library needs the forward's log-sum-exp; elsewhere PyTorch's own
    attention is left to autograd (_operators/attention.py)."""
    if problem["op"] != "attention" or "paged" in problem["features"]:
        return False
    if "deterministic" in problem["features"]:
        return True
    has_routes = problem["device"] in ("cpu", "cuda") and _core.library is not None
    return has_routes and problem["order"][0] != "aten_sdpa"


def _given(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if value is not None}


def _facts_of_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **call: Any
) -> dict[str, Any]:
    """What `anyflash.attention(q, k, v, **call)` asks for, as keywords of `explain`."""
    call = _given(call)
    longest_k = k.size(0) if k.dim() == 3 else k.size(1)
    if "block_table" in call:
        longest_k *= call["block_table"].size(1)
    longest_k = int(call.get("max_seqlen_k", longest_k))
    left, right = (-1 if w >= longest_k else w for w in call.get("window_size", (-1, -1)))
    right = 0 if call.get("causal") else right
    asked = {
        "packed": "cu_seqlens_q" in call,
        "paged": "block_table" in call,
        "causal": right == 0,
        "window": left >= 0 or right > 0,
        "softcap": call.get("softcap", 0.0) > 0,
        "alibi": "alibi_slopes" in call,
        "bias_grad": "bias" in call and call["bias"].requires_grad,
        "dropout": call.get("dropout_p", 0.0) > 0,
        "gqa": q.size(-2) != k.size(-2),
        "lse": call.get("return_lse", False),
        "deterministic": call.get("deterministic", False),
        **{name: name in call for name in ("seqused_k", "leftpad_k", "bias", "sinks")},
    }
    if asked["deterministic"] and asked["bias_grad"]:
        bias = call["bias"]
        asked["deterministic_bias_grad"] = bias.dim() < 4 or 1 in bias.shape
    inputs = [q, k, v, call.get("bias"), call.get("sinks")]
    graded = any(t.requires_grad for t in inputs if t is not None)
    facts = {
        "device": _device_name(q.device), "dtype": q.dtype, "head_dim": q.size(-1),
        "head_dim_v": v.size(-1), "features": [name for name, there in asked.items() if there],
        "training": graded and torch.is_grad_enabled(), "backend": call.get("backend"),
    }  # fmt: skip
    if facts["device"] == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        facts["sm"] = 10 * major + minor
    return _given(facts)


def _device_name(device: torch.device) -> str:
    """The kind of a device, by core/problem.h's names; a torch for HIP calls its devices cuda."""
    number, _ = device_numbers(device)
    return DEVICES[number]


def _complete(said: dict[str, Any]) -> tuple[dict[str, Any], bool, list[str]]:
    """Fills in what was left open: (problem without direction, training, what was assumed)."""
    if unknown := sorted(set(said) - _KEYWORDS):
        raise ValueError(
            f"explain: unknown keyword {', '.join(unknown)}; "
            f"expected {', '.join(sorted(_KEYWORDS))}"
        )
    assumed: list[str] = []

    def get(name: str, default: Any, show: str | None = None) -> Any:
        if name not in said:
            assumed.append(show or f"{name} {default}")
        return said.get(name, default)

    gpu = torch.cuda.is_available() and torch.version.hip is None
    device = str(get("device", "cuda" if "sm" in said or (gpu and "isa" not in said) else "cpu"))
    if device not in DEVICES:
        raise ValueError(f"explain: device must be one of {', '.join(DEVICES)}, got {device}")
    sm = 0
    if device == "cuda":
        here = torch.cuda.get_device_capability() if gpu else (8, 0)
        sm = int(
            get(
                "sm",
                here[0] * 10 + here[1],
                None if gpu else f"compute capability sm_{here[0]}{here[1]}",
            )
        )
    driver = _driver_of(said) if device == "cuda" else 0
    if device == "cuda" and not driver:
        assumed.append("a driver that is new enough")
    isa = str(said.get("isa", _loader.cpu_isa())) if device == "cpu" else "none"
    op = said.get("op", "attention")
    dtype = _dtype_name(
        get("dtype", "fp32" if device == "cpu" else "fp16" if 0 < sm < 80 else "bf16")
    )
    head_dim = int(get("head_dim", 64)) if op == "attention" else 0
    head_dim_v = int(said.get("head_dim_v", head_dim))
    features = _feature_names(said.get("features", ()))
    if head_dim_v != head_dim and "unequal_head_dims" not in features:
        features.append("unequal_head_dims")
    order, explicit = _order(said.get("backend"))
    problem = {
        "op": op, "device": device, "sm": sm, "driver": driver, "isa": isa,
        "isa_lowered": device == "cpu" and "isa" not in said and _loader.cpu_isa_is_lowered(),
        "dtype": dtype, "head_dim": head_dim, "head_dim_v": head_dim_v,
        "features": features, "order": order, "explicit": explicit,
        "torch_version": int(said.get("torch_version", torch_version())),
    }  # fmt: skip
    return problem, bool(get("training", False, "inference (no gradients)")), assumed


def _driver_of(said: dict[str, Any]) -> int:
    """The CUDA that the driver knows: as said, or this machine's; 0 without one."""
    if "driver" in said:
        return _drivers.version_of(said["driver"])
    here = _machine.driver()
    return here["version"] if here else 0


def _dtype_name(dtype: Any) -> str:
    text = str(dtype).replace("torch.", "")
    for name, aliases in DTYPES.items():
        if text in aliases:
            return name
    raise ValueError(f"explain: dtype must be one of {', '.join(DTYPES)}, got {text}")


def _order(backend: str | None) -> tuple[list[str], bool]:
    """The back ends that a call made here would try, and whether the user chose them."""
    code = backends.resolve(backend) or backends.code_of(backends.environment_order())
    return list(backends.order_names(code)), code != backends.DEFAULT_CODE


def _feature_names(features: Iterable[str]) -> list[str]:
    names = [features] if isinstance(features, str) else list(dict.fromkeys(features))
    if unknown := [name for name in names if name not in FEATURE_WORDS]:
        raise ValueError(
            f"explain: unknown feature {', '.join(unknown)}; expected {', '.join(FEATURE_WORDS)}"
        )
    return [name for name in FEATURE_WORDS if name in names]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m anyflash explain`."""
    parser.add_argument(
        "words", nargs="*", help="the shape in words: bf16 causal head_dim 128 on sm_90 training"
    )
    parser.add_argument("--device", choices=DEVICES)
    parser.add_argument("--sm", type=int, help="compute capability without the dot: 75, 80, 90")
    parser.add_argument("--driver", help="version of NVIDIA's driver: 550, 580.65")
    parser.add_argument("--isa", choices=backends.ISAS, help="instruction set of a CPU")
    parser.add_argument("--dtype", help="fp16, bf16, fp32 or fp64")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--head-dim-v", type=int)
    parser.add_argument(
        "--feature", action="append", dest="features", help="once per feature: causal, window, ..."
    )
    parser.add_argument(
        "--training", action="store_true", default=None, help="explain the backward too"
    )
    parser.add_argument(
        "--backend", help="back ends in order, as in ANYFLASH_BACKEND: kernel,sdpa,math"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable output")


def main(options: argparse.Namespace) -> int:
    """Prints the explanation; 0: it runs, 1: nothing can run it, 2: question not understood."""
    flags = {
        name: value for name, value in vars(options).items() if name in _FLAGS and value is not None
    }
    try:
        explanation = explain(" ".join(options.words), **flags)
    except ValueError as error:
        print(error)
        return 2
    print(json.dumps(explanation.as_dict(), indent=2) if options.json else explanation)
    return 0 if explanation.runs else 1


_FLAGS = _KEYWORDS - {"op", "torch_version"}
