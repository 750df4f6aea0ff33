"""`python -m anyflash doctor`: what is installed, what will run, and what to do about each problem.

Written for someone who wants attention to run and has never heard of ABIs. It only reads: every section is collected on its
own, so that whatever is broken (a damaged library, no driver, an old torch) is reported and does not end the report.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import torch

from . import _machine
from .explain import ROUTE_TITLES, explain, torch_version

if TYPE_CHECKING:
    import argparse

# What people mostly run: (label, words for explain()). Each is asked for every device of this machine.
COMMON_SHAPES = (
    ("training, causal, head_dim 128", "{dtype} causal head_dim 128 training"),
    ("training, packed, head_dim 64", "{dtype} packed causal head_dim 64 training"),
    ("inference, fp32, head_dim 64", "fp32 head_dim 64 inference"),
    (
        "inference, sliding window, grouped heads",
        "{dtype} causal window gqa head_dim 128 inference",
    ),
    ("decoding with a paged cache", "{dtype} paged seqused_k causal gqa head_dim 128 inference"),
    ("training with softcap", "{dtype} causal softcap head_dim 256 training"),
    ("training with ALiBi", "{dtype} causal alibi head_dim 64 training"),
    ("training with dropout", "{dtype} causal dropout head_dim 64 training"),
)

ENVIRONMENT = {
    "ANYFLASH_BACKEND": "back ends in order, such as sdpa,math",
    "ANYFLASH_STRICT": "1: an error instead of a fallback",
    "ANYFLASH_CHECK": "1: check also what makes the GPU wait",
    "ANYFLASH_PROVIDER": "binary, python or auto: which operators to load",
    "ANYFLASH_DROPIN": "0: flash_attn is not ours; append: only where there is no other",
}

REINSTALL = "reinstall anyflash from its checkout: pip install --force-reinstall --no-deps ."


@dataclasses.dataclass
class Report:
    """Facts per section, and what follows from them. A problem needs doing something about; a note is good to know."""

    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    problems: list[dict[str, str]] = dataclasses.field(default_factory=list)
    notes: list[dict[str, str]] = dataclasses.field(default_factory=list)

    def problem(self, what: str, remedy: str) -> None:
        self.problems.append({"what": what, "remedy": remedy})

    def note(self, what: str, remedy: str = "") -> None:
        self.notes.append({"what": what, "remedy": remedy})

    @property
    def healthy(self) -> bool:
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        return {
            "healthy": self.healthy,
            **self.facts,
            "problems": self.problems,
            "notes": self.notes,
        }


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
        "gpus": _gpus,
        "flash_attn": lambda r: _flash_attn(r, probe),
        "environment": _environment,
        "decisions": _decisions,
    }
    for name, collect in sections.items():
        try:
            report.facts[name] = collect(report)
        except Exception as error:  # noqa: BLE001 - a broken section is a finding, not the end of the report
            report.facts[name] = {
                "error": "".join(traceback.format_exception_only(type(error), error)).strip()
            }
            report.problem(
                f'the section "{name}" could not be collected: {report.facts[name]["error"]}',
                REINSTALL,
            )
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
    from . import _loader

    reasons = list(_loader.reasons)
    files = _machine.library_files()
    state = {
        "provider": _loader.provider,
        "reasons": reasons,
        "files": files,
        "native": _machine.native_state(),
    }
    if _loader.provider == "binary":
        return state
    ops = files["libanyflash_ops.so"]
    because = f" ({'; '.join(reasons)})" if reasons else ""
    if os.environ.get("ANYFLASH_PROVIDER", "auto") == "python":
        report.note(
            "The Python operators are in use, because ANYFLASH_PROVIDER=python asks for them."
        )
    elif torch_version() < 210:
        report.note(
            f"The Python operators are in use: the compiled ones need torch 2.10 or newer, this is {torch.__version__}. "
            "Results are the same; each call costs some microseconds more.",
            'for the compiled ones: pip install "torch>=2.10"',
        )
    elif not ops["present"]:
        report.problem(
            "The compiled operators were not built when anyflash was installed, so the Python operators are in use. Results "
            f"are the same; each call costs some microseconds more, and anyflash's own kernels are out of reach.{because}",
            f"install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), then {REINSTALL}",
        )
    else:
        damage = f" The file looks damaged: {ops['damage']}." if ops["damage"] else ""
        report.problem(
            f"The compiled operators are here but could not be used, so the Python operators are.{damage}{because}",
            REINSTALL,
        )
    return state


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
    }
    if driver is None or state["cuda_available"]:
        return state
    if torch.version.cuda is None:
        report.problem(
            "This machine has an NVIDIA driver, but this torch was built without CUDA: everything runs on the CPU.",
            "install a CUDA build of torch (see the selector on pytorch.org)",
        )
    elif driver["cuda"] and int(driver["cuda"].split(".")[0]) < int(
        torch.version.cuda.split(".")[0]
    ):
        report.problem(
            f"The NVIDIA driver knows CUDA {driver['cuda']}, torch was built for CUDA {torch.version.cuda}: torch cannot use the GPU.",
            "update the NVIDIA driver, or install a torch built for an older CUDA",
        )
    elif driver["devices"]:
        report.problem(
            "There is a GPU and a driver, but torch cannot use them.",
            'see what torch says: python -c "import torch; torch.cuda.init()"; check CUDA_VISIBLE_DEVICES',
        )
    return state


def _gpus(report: Report) -> list[dict[str, Any]]:
    gpus = _machine.gpus()
    for gpu in gpus:
        if not gpu["supported_by_torch"]:
            report.problem(
                f"{gpu['name']} (sm_{gpu['sm']}): this torch has no code for it (it was built for {', '.join(gpu['torch_archs'])}).",
                "install a torch build whose list contains this GPU",
            )
    return gpus


def _flash_attn(report: Report, probe: bool) -> dict[str, Any]:
    """Which flash_attn an import finds, and what else is on the path."""
    from . import _installs

    state = _installs.survey(probe)
    setting = (state["hook"]["setting"] or "").lower()
    others = [copy for copy in state["copies"] if not copy["ours"]]
    if not state["ours"]:
        _not_ours(report, state, setting)
    for copy in others:
        broken = f", which does not work ({copy['error']})" if copy["works"] is False else ""
        if state["ours"]:
            remedy = (
                "pip uninstall flash-attn"
                if broken
                else "to use that one instead: ANYFLASH_DROPIN=append"
            )
            report.note(
                f"Another flash_attn is at {copy['folder']}{broken}. It is not used: anyflash comes first.",
                remedy,
            )
        elif broken and copy["folder"] == state["winner"]:
            report.problem(
                f"import flash_attn finds {copy['folder']}{broken}.",
                "pip uninstall flash-attn, or unset ANYFLASH_DROPIN",
            )
    if state["ours"] and state["metadata_version"] != "2.8.3":
        report.note(
            f"Package metadata says flash-attn {state['metadata_version']}, the import is 2.8.3.",
            "pip uninstall flash-attn removes the older entry",
        )
    return state


def _not_ours(report: Report, state: dict[str, Any], setting: str) -> None:
    found = state["winner"] or "nothing"
    if setting in ("0", "off", "no", "false", "append"):
        report.note(
            f"import flash_attn finds {found}, because ANYFLASH_DROPIN={setting}.",
            "unset ANYFLASH_DROPIN to use anyflash",
        )
    elif state["hook"]["installed"] is None and not state["hook"]["on_path"]:
        report.problem(
            f"import flash_attn finds {found}, not anyflash: the file anyflash.pth, which puts it on the path, is not installed here.",
            f"{REINSTALL}; or call anyflash.dropin's folder by hand: PYTHONPATH={_dropin_folder()}",
        )
    else:
        report.problem(
            f"import flash_attn finds {found}, which comes before anyflash on the path.",
            "remove that folder from PYTHONPATH or from the folder you start Python in",
        )


def _dropin_folder() -> str:
    from . import _installs

    return str(_installs.DROPIN)


def _environment(report: Report) -> dict[str, str]:
    import difflib

    from . import backends

    found = {
        name: value for name, value in sorted(os.environ.items()) if name.startswith("ANYFLASH_")
    }
    for name in found:
        if name not in ENVIRONMENT:
            close = difflib.get_close_matches(name, ENVIRONMENT, n=1)
            report.note(
                f"{name} is set, but anyflash reads no such variable.",
                f"did you mean {close[0]}?" if close else "",
            )
    try:
        backends.environment_chain()
    except ValueError as error:
        report.problem(str(error), "correct the variable, or unset it")
    if backends.is_set("ANYFLASH_STRICT"):
        report.note(
            "ANYFLASH_STRICT=1: where the first back end cannot run a call, it is an error and not a fallback."
        )
    return found


def _decisions(report: Report) -> list[dict[str, Any]]:
    """For each device of this machine and each common shape, what runs: `explain`'s answers."""
    devices: dict[str, dict[str, Any]] = {"cpu": {"device": "cpu"}}
    for gpu in _machine.gpus():
        devices.setdefault(f"sm_{gpu['sm']}", {"device": "cuda", "sm": gpu["sm"]})
    rows = []
    for device, where in devices.items():
        sm = where.get("sm", 0)
        dtype = "bf16" if device == "cpu" or sm >= 80 else "fp16"
        for label, words in COMMON_SHAPES:
            answer = explain(words.format(dtype=dtype), **where)
            routes = {p["direction"]: d["route"] for p, d in zip(answer.problems, answer.decisions)}
            why = {p["direction"]: d["reasons"] for p, d in zip(answer.problems, answer.decisions)}
            rows.append(
                {
                    "device": device,
                    "shape": label,
                    "dtype": answer.problems[0]["dtype"],
                    "routes": routes,
                    "reasons": why,
                }
            )
            if not answer.runs:
                report.problem(
                    f"{device}: {label}: no back end of {', '.join(answer.problems[0]['chain'])} can run it.",
                    "unset ANYFLASH_STRICT, or add math to ANYFLASH_BACKEND",
                )
    return rows


def render(report: Report) -> str:
    """The report as text for a terminal."""
    facts = report.facts
    blocks = [_heading(facts), _flash_attn_lines(facts), _decision_table(facts.get("decisions"))]
    for title, findings in (("Notes", report.notes), ("Problems", report.problems)):
        if findings:
            blocks.append("\n".join([title, *(_finding(i, f) for i, f in enumerate(findings, 1))]))
    blocks.append(
        "Healthy."
        if report.healthy
        else f"{len(report.problems)} problem(s); the remedies are above."
    )
    return "\n\n".join(blocks)


def summary(report: Report) -> str:
    """The first lines of `render` and the verdict: what the demo shows."""
    verdict = (
        "Healthy."
        if report.healthy
        else f"{len(report.problems)} problem(s): run python -m anyflash doctor"
    )
    return f"{_heading(report.facts)}\n{_flash_attn_lines(report.facts)}\n{verdict}"


def _finding(number: int, finding: dict[str, str]) -> str:
    remedy = f"\n     what to do: {finding['remedy']}" if finding["remedy"] else ""
    return f"  {number}. {finding['what']}{remedy}"


def _failed(section: Any) -> bool:
    return not section or (isinstance(section, dict) and "error" in section)


def _heading(facts: dict[str, Any]) -> str:
    own, ops, torch_facts = facts["anyflash"], facts["operators"], facts["torch"]
    lines = [
        "anyflash: unknown"
        if _failed(own)
        else f"anyflash {own['version']}, Python {own['python']}"
    ]
    if not _failed(torch_facts):
        cuda = (
            f"built for CUDA {torch_facts['cuda']}" if torch_facts["cuda"] else "built without CUDA"
        )
        driver = torch_facts["driver"]
        seen = (
            f"driver for CUDA {driver['cuda']}" if driver and driver["cuda"] else "no NVIDIA driver"
        )
        lines.append(
            f"torch      {torch_facts['version']} ({cuda}; {seen}; {torch_facts['threads']} CPU threads)"
        )
    for gpu in facts["gpus"] if isinstance(facts["gpus"], list) else ():
        lines.append(f"GPU        {gpu['name']}, sm_{gpu['sm']}, {gpu['memory_gib']:.0f} GiB")
    if not _failed(ops):
        lines.append(f"operators  {'compiled' if ops['provider'] == 'binary' else 'Python'}")
    return "\n".join(lines)


def _flash_attn_lines(facts: dict[str, Any]) -> str:
    state = facts["flash_attn"]
    if _failed(state):
        return "flash_attn unknown"
    owner = "anyflash" if state["ours"] else state["winner"] or "not found"
    return f"flash_attn {owner} (package metadata: {state['metadata_version'] or 'none'})"


def _decision_table(rows: Any) -> str:
    if _failed(rows):
        return "What runs: unknown"
    lines = ["What runs for common shapes (python -m anyflash explain tells why)"]
    device = ""
    used: list[str] = []
    for row in rows:
        if row["device"] != device:
            device = row["device"]
            lines += ["", f"  {device:45s} {'forward':15s} backward"]
        forward, backward = row["routes"]["forward"], row["routes"].get("backward", "")
        lines.append(f"  {row['dtype'] + ' ' + row['shape']:45s} {forward:15s} {backward}".rstrip())
        used += [forward, backward]
    lines.append("")
    lines += [f"  {name:15s} {title}" for name, title in ROUTE_TITLES.items() if name in used]
    return "\n".join(lines)


def main(options: argparse.Namespace) -> int:
    """Prints the report; 0 when healthy, 1 when there is a problem."""
    report = diagnose(probe=not options.no_probe)
    print(json.dumps(report.as_dict(), indent=2) if options.json else render(report))
    return 0 if report.healthy else 1
