"""`python -m anyflash doctor`: what is installed, what will run, what to do about each problem.

Written for someone who wants attention to run and has never heard of ABIs. It only reads. Every
section is collected on its own: what is broken (a library, a driver) does not end the report.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import torch

from . import _drivers, _files, _loader, _machine, _threads, sdpa
from ._core import torch_version
from ._remedies import REMEDIES
from .explain import explain

if TYPE_CHECKING:
    import argparse

# What people mostly run: (label, words for explain()). Each is asked for every device found.
COMMON_SHAPES = (
    ("training, causal, head_dim 128", "{dtype} causal head_dim 128 training"),
    ("training, packed, head_dim 64", "{dtype} packed causal head_dim 64 training"),
    ("inference, head_dim 64", "fp32 head_dim 64 inference"),
    ("inference, head_dim 128", "fp16 head_dim 128 inference"),
    ("inference, window, grouped heads", "{dtype} causal window gqa head_dim 128 inference"),
    ("decoding, paged cache", "{dtype} paged seqused_k causal gqa head_dim 128 inference"),
    ("training, softcap", "{dtype} causal softcap head_dim 256 training"),
    ("training, ALiBi", "{dtype} causal alibi head_dim 64 training"),
    ("training, dropout", "{dtype} causal dropout head_dim 64 training"),
)

ENVIRONMENT = {
    "ANYFLASH_BACKEND": "back ends in order, such as sdpa,math",
    "ANYFLASH_STRICT": "1: an error instead of a fallback",
    "ANYFLASH_CHECK": "1: check also what makes the GPU wait",
    "ANYFLASH_VERBOSE": "1: say what runs also where all is well",
    "ANYFLASH_CPU_ISA": "instruction set of CPU kernels: none, avx2, avx512, avx512bf16, amx, neon",
    "ANYFLASH_PROVIDER": "binary, python or auto: which operators to load",
    "ANYFLASH_SDPA": "1: anyflash.accelerate_sdpa() at import anyflash",
    "ANYFLASH_DROPIN": "0: flash_attn is not ours; append: only where there is no other",
    "ANYFLASH_BUILD": "when installing; 0: no compiled operators, 1: an error without them",
    "ANYFLASH_CUDA": "when installing; 0: no CUDA kernels, 1: with them, without a GPU too",
    "ANYFLASH_CUDA_ARCHS": "when installing: GPU architectures to compile for",
    "ANYFLASH_NVRTC": "when installing: NVRTC libraries to compile with, joined by colons",
    "ANYFLASH_MACHINE": "when building a wheel: for which processors, x86_64 or aarch64",
    "ANYFLASH_WERROR": "when installing; 1: a compiler's warning is an error",
    "ANYFLASH_TORCH_INCLUDE": "when installing: the folder with torch's headers",
    "ANYFLASH_COMPANION_VERSION": "when building the flash-attn wheel: its version",
}


@dataclasses.dataclass(repr=False)
class Report:
    """Facts per section, and what follows: a problem needs an answer, a note is good to know."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def problem(self, what: str, remedy: str, **fields: str) -> None:
        """Adds a problem; remedy and fields are those of REMEDIES."""
        self.problems.append(_finding(what, remedy, fields))

    def note(self, what: str, remedy: str = "", **fields: str) -> None:
        self.notes.append(_finding(what, remedy, fields))

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        findings = {"problems": self.problems, "notes": self.notes}
        return {"healthy": self.healthy, **self.facts, **findings}

    def __repr__(self) -> str:
        from ._doctor_text import render

        return render(self)


def _finding(what: str, remedy: str, fields: dict[str, str]) -> dict[str, str]:
    if not remedy:
        return {"what": what, "kind": "", "remedy": "", "command": ""}
    text, command = REMEDIES[remedy].text(source=_machine.source(), **fields)
    return {"what": what, "kind": remedy, "remedy": text, "command": command}


def diagnose(probe: bool = True) -> Report:
    """Collects everything.

    Args:
        probe: Also try to import other flash_attn copies (a second or two each).
    """
    report = Report()
    sections: dict[str, Callable[[Report], Any]] = {
        "anyflash": _anyflash,
        "operators": _operators,
        "torch": _torch,
        "cpu": _cpu,
        "gpus": _gpus,
        "flash_attn": lambda report: _flash_attn(report, probe),
        "clients": _clients,
        "environment": _environment,
        "decisions": _decisions,
        "trial": _trial,
    }
    for name, collect in sections.items():
        try:
            report.facts[name] = collect(report)
        except Exception as error:  # noqa: BLE001 - a broken section is a finding
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            report.facts[name] = {"error": text}
            report.problem(f'The section "{name}" could not be collected: {text}', "reinstall")
    return report


def _anyflash(report: Report) -> dict[str, Any]:
    import anyflash

    return {
        "version": anyflash.__version__,
        "folder": str(Path(anyflash.__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _operators(report: Report) -> dict[str, Any]:
    """Which of the two operator sets is in use, and if it is the slower one, why."""
    state: dict[str, Any] = {
        "provider": _loader.provider,
        "reasons": list(_loader.reasons),
        "files": _machine.library_files(),
        "build": _files.build_facts(),
        "kernels": _machine.kernel_state(),
    }
    for file in state["files"].values():
        if file["damage"]:
            report.problem(f"{file['damage']}. It is not opened.", "reinstall")
    if _loader.provider == "none":
        report.problem(f"No operators could be loaded: {'; '.join(_loader.reasons)}.", "reinstall")
    elif _loader.provider == "python":
        _explain_python_operators(report, state)
    return state


def _explain_python_operators(report: Report, state: dict[str, Any]) -> None:
    if state["kernels"]["available"]:
        same = "Results and CPU kernels are the same; a call costs some microseconds more."
        if not _threads.has_threads():
            same += " But kernels run on one thread, because torch's threads were not found."
    else:
        times = "2 to 6" if torch_version() >= 202 else "5 to 11"
        same = f"Results are the same, without anyflash's kernels: expect {times} times the time."
    because = f" Reason: {'; '.join(state['reasons'])}." if state["reasons"] else ""
    build = state["build"]
    if os.environ.get("ANYFLASH_PROVIDER", "auto") == "python":
        report.note("The Python operators are in use: ANYFLASH_PROVIDER=python asks for them.")
    elif torch_version() < 210:
        report.note(
            "The Python operators are in use: the compiled ones need torch 2.10 or newer, this is "
            f"{torch.__version__}. {same}",
            "newer_torch",
        )
    elif state["files"]["libanyflash_ops.so"]["present"]:
        report.problem(
            "The compiled operators are installed but could not be used; the Python operators "
            f"stand in for them. {same}{because}",
            "reinstall",
        )
    elif any("ANYFLASH_BUILD=0" in reason for reason in build.get("reasons", ())):
        report.note(f"The Python operators are in use: ANYFLASH_BUILD=0 chose them. {same}")
    else:
        what = (
            f"The compiled operators are not there ({_files.why_not_built()}); the Python "
            f"operators stand in for them. {same}"
        )
        if any(reason.startswith("operators:") for reason in build.get("reasons", ())):
            report.note(what, "compiler")
        else:
            report.problem(what, "reinstall" if build.get("binary") else "compiler")


def _torch(report: Report) -> dict[str, Any]:
    driver = _machine.driver()
    state = {
        "version": torch.__version__,
        "folder": str(Path(torch.__file__).parent),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cuda_available": torch.cuda.is_available(),
        "driver": driver,
        "threads": torch.get_num_threads(),
        "sdpa_accelerated": sdpa.is_accelerated(),
    }
    if driver is None or state["cuda_available"]:
        return state
    if torch.version.cuda is None:
        report.problem(
            "This machine has an NVIDIA driver, but this torch was built without CUDA: everything "
            "runs on the CPU.",
            "cuda_torch",
        )
    elif driver["cuda"] and _drivers.major(driver["cuda"]) < _drivers.major(torch.version.cuda):
        report.problem(
            f"The NVIDIA driver knows CUDA {driver['cuda']}, torch was built for CUDA "
            f"{torch.version.cuda}: torch cannot use the GPU.",
            "driver",
        )
    elif driver["devices"]:
        report.problem(
            "There is a GPU and a driver, but torch cannot use them.",
            "ask_torch",
        )
    return state


def _cpu(report: Report) -> dict[str, Any]:
    """The instruction set that kernels use here, and the attention kernels that calls get."""
    kernels: list[str] = []
    if _wrong_variables():
        return {"isa": "none", "isa_lowered": False, "kernels": kernels}
    for dtype in ("bf16", "fp16", "fp32"):
        answer = explain(f"{dtype} head_dim 64 training", device="cpu", backend="auto")
        kernels += [d["instance"] for d in answer.decisions if d["instance"] is not None]
    isa, lowered = _loader.cpu_isa(), _loader.cpu_isa_is_lowered()
    return {"isa": isa, "isa_lowered": lowered, "kernels": kernels}


def _gpus(report: Report) -> list[dict[str, Any]]:
    gpus = _machine.gpus()
    for gpu in gpus:
        if not gpu.get("supported_by_torch", True):
            report.problem(
                f"{gpu['name']} (sm_{gpu['sm']}): this torch has no code for it, it was built for "
                f"{', '.join(gpu['torch_archs'])}.",
                "torch_for_gpu",
            )
    instances = _machine.kernel_state()["instances"] if gpus else []
    for gpu in gpus:
        if why := _drivers.why_no_kernels(gpu, _machine.driver(), instances):
            report.note(*why, sm=str(gpu["sm"]))
    return gpus


def _flash_attn(report: Report, probe: bool) -> dict[str, Any]:
    """Which flash_attn an import finds, and what else is on the path."""
    from . import _installs

    state = _installs.survey(probe)
    if not state["ours"]:
        _not_ours(report, state)
    elif state["import_error"]:
        report.problem(f"import flash_attn fails: {state['import_error']}", "reinstall")
    for copy in state["copies"]:
        if copy["ours"]:
            continue
        broken = f", which does not work ({copy['error']})" if copy["works"] is False else ""
        remedy = "uninstall" if copy["distribution"] else "remove_folder"
        if state["ours"]:
            where = f"Another flash_attn is at {copy['folder']}{broken}."
            report.note(f"{where} anyflash comes first.", remedy if broken else "use_other")
        elif broken and copy["folder"] == state["winner"]:
            report.problem(f"import flash_attn finds {copy['folder']}{broken}.", remedy)
    if state["ours"] and state["metadata_version"] != state["version"]:
        report.note(
            f"Package metadata says flash-attn {state['metadata_version']}, the import is "
            f"{state['version']}.",
            "uninstall",
        )
    return state


def _not_ours(report: Report, state: dict[str, Any]) -> None:
    from . import _installs

    winner = state["winner"]
    finds = f"import flash_attn finds {winner or 'nothing'}"
    setting = (state["hook"]["setting"] or "").lower()
    if setting in ("0", "off", "no", "false", "append"):
        report.note(f"{finds}, because ANYFLASH_DROPIN={setting}.", "use_anyflash")
    elif not (_installs.DROPIN / "flash_attn/__init__.py").is_file():
        report.problem(f"{finds}: anyflash's own flash_attn folder is missing.", "reinstall")
    elif not state["hook"]["on_path"]:
        report.problem(
            f"{finds}, not anyflash: this installation runs no start-up files (anyflash.pth), as "
            "folders of pip install --target do not.",
            "put_on_path",
            dropin=str(_installs.DROPIN),
        )
    else:
        report.problem(
            f"{finds}, which comes before anyflash on the path.",
            "leave_path",
            folder=str(Path(winner).parent) if winner else "that folder",
        )


def _clients(report: Report) -> list[dict[str, Any]]:
    """The clients of flash_attn that are installed here, and what each uses."""
    from . import _clients as clients

    gpu = torch.cuda.is_available()
    found = clients.installed(gpu)
    refused = [client for client in found if client["name"] == "transformers" and not gpu]
    if refused:
        report.note(
            f"transformers {refused[0]['version']} refuses flash_attention_2 where there is no "
            "GPU.",
            "transformers",
        )
    return found


def _environment(report: Report) -> dict[str, str]:
    import difflib

    from . import backends

    ours = {n: value for n, value in sorted(os.environ.items()) if n.startswith("ANYFLASH_")}
    for name in ours:
        if name not in ENVIRONMENT:
            close = difflib.get_close_matches(name, ENVIRONMENT, n=1)
            what = f"{name} is set, but anyflash reads no such variable."
            report.note(what, *(["rename_variable"] if close else []), name="".join(close))
    for error in _wrong_variables():
        report.problem(error, "correct_variable")
    if backends.is_set("ANYFLASH_STRICT"):
        report.note("ANYFLASH_STRICT is set: a call that would fall back is an error.")
    if backends.is_set("ANYFLASH_SDPA") and (reason := sdpa.obstacle()) is not None:
        report.note(f"ANYFLASH_SDPA is set, but does nothing: {reason}.")
    return ours


def _wrong_variables() -> list[str]:
    """What is wrong with the variables that every call reads; such a call then fails."""
    from . import backends

    errors = []
    for read in (backends.environment_order, _loader.cpu_isa):
        try:
            read()
        except ValueError as error:
            errors.append(str(error))
    return errors


def _decisions(report: Report) -> list[dict[str, Any]]:
    """For each device of this machine and each common shape what runs: `explain`'s answers."""
    if _wrong_variables():
        return []  # said already, and the cause of all that would fail here
    devices: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}}
    for gpu in _machine.gpus():
        if gpu["kind"] == "cuda":
            devices.setdefault(f"sm_{gpu['sm']}", {"device": "cuda", "sm": gpu["sm"]})
        else:
            devices.setdefault(gpu["kind"], {"device": gpu["kind"]})
    rows = []
    for device, where in devices.items():
        dtype = "bf16" if where.get("sm", 80) >= 80 else "fp16"
        for label, words in COMMON_SHAPES:
            answer = explain(words.format(dtype=dtype), **where)
            row = {"device": device, "shape": label, "dtype": answer.problems[0]["dtype"]}
            directions = [problem["direction"] for problem in answer.problems]
            row["routes"] = dict(zip(directions, (d["route"] for d in answer.decisions)))
            row["reasons"] = dict(zip(directions, (d["reasons"] for d in answer.decisions)))
            rows.append(row)
            if not answer.runs:
                order = ", ".join(answer.problems[0]["order"])
                report.problem(
                    f"{device}: {label}: no back end of {order} can run it.",
                    "more_back_ends",
                )
    return rows


def _trial(report: Report) -> dict[str, str]:
    """Runs a small attention, forward and backward, on every device: what counts in the end."""
    if _wrong_variables():
        return {}
    notices = logging.getLogger("anyflash")
    found = {}
    for device in ["cpu", *(gpu["device"] for gpu in _machine.gpus())]:
        was_disabled, notices.disabled = notices.disabled, True  # the table says the same
        try:
            found[device] = _small_attention(device)
        except Exception as error:  # noqa: BLE001 - whatever fails here is the finding
            found[device] = f"{type(error).__name__}: {error}"
        finally:
            notices.disabled = was_disabled
        if found[device] != "ok":
            report.problem(f"A small attention on {device} failed: {found[device]}", "report")
    return found


def _small_attention(device: str) -> str:
    from .attention import attention

    dtype = torch.float32 if device == "cpu" else torch.float16
    q, k, v = (torch.randn(1, 16, 2, 32, dtype=dtype, device=device) for _ in range(3))
    out = attention(q.requires_grad_(), k, v, causal=True)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    finite = bool(out.isfinite().all() and gradient.isfinite().all())
    return "ok" if finite else "the result is not finite"


def main(options: argparse.Namespace) -> int:
    """Prints the report; 0 when healthy, 1 when there is a problem."""
    report = diagnose(probe=not options.no_probe)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    return 0 if report.healthy else 1
