"""The doctor's report as text for a terminal."""

from __future__ import annotations

import textwrap
from typing import Any

from . import _drivers
from ._doctor import ENVIRONMENT, Report
from .explain import ROUTE_TITLES


def render(report: Report) -> str:
    """The whole report."""
    facts = report.facts
    blocks = [
        heading(facts),
        _decision_table(facts["decisions"]),
        _clients(facts["clients"]),
        _variables(facts["environment"]),
    ]
    for title, findings in (("Notes", report.notes), ("Problems", report.problems)):
        if findings:
            blocks.append("\n".join([title, *(_finding(i, f) for i, f in enumerate(findings, 1))]))
    count = len(report.problems)
    verdict = f"{count} problem{'s' if count > 1 else ''}; what to do is said above."
    blocks.append("Healthy." if report.healthy else verdict)
    return "\n\n".join(block for block in blocks if block)


def summary(report: Report) -> str:
    """The heading and the verdict: what the demo shows."""
    verdict = "Healthy."
    if not report.healthy:
        verdict = f"{len(report.problems)} problem(s): see python -m anyflash doctor"
    return f"{heading(report.facts)}\n{verdict}"


def heading(facts: dict[str, Any]) -> str:
    """One line each for anyflash, its operators, torch, the CPU, every GPU, and what the import
    finds."""
    own, operators, torch_facts = facts["anyflash"], facts["operators"], facts["torch"]
    lines = []
    if not _failed(own):
        lines.append(f"anyflash    {own['version']}, Python {own['python']}")
    if not _failed(operators):
        compiled = operators["provider"] == "binary"
        lines.append(f"operators   {'compiled' if compiled else 'Python'}{_kernels(operators)}")
    if not _failed(torch_facts):
        lines.append(f"torch       {_torch(torch_facts)}")
        sdpa = "anyflash's kernels" if torch_facts["sdpa_accelerated"] else "PyTorch's own kernels"
        lines.append(f"SDPA        {sdpa} on CPU tensors (anyflash.accelerate_sdpa)")
    if not _failed(facts["cpu"]):
        lines.append(f"CPU         {_cpu(facts['cpu'])}")
    for gpu in facts["gpus"] if isinstance(facts["gpus"], list) else ():
        kind = f"sm_{gpu['sm']}" if gpu["kind"] == "cuda" else gpu["kind"]
        memory = f", {gpu['memory_gib']:.0f} GiB" if gpu["memory_gib"] else ""  # not told: MPS
        lines.append(f"GPU         {gpu['name']}, {kind}{memory}")
    trial = facts["trial"]
    if trial and not _failed(trial):
        results = ", ".join(f"{device} {result}" for device, result in trial.items())
        lines.append(f"trial run   {results} (attention, forward and backward)")
    found = facts["flash_attn"]
    if not _failed(found):
        owner = "anyflash" if found["ours"] else found["winner"] or "not found"
        owner += ", by its flash-attn wheel" if found["companion"] else ""
        version = found["metadata_version"] or "none"
        lines.append(f"flash_attn  {owner} (version in the package metadata: {version})")
    return "\n".join(lines)


def _kernels(operators: dict[str, Any]) -> str:
    devices = [instance["device"] for instance in operators["kernels"]["instances"]]
    counts = [f"{devices.count(name) or 'no'} {name.upper()} kernels" for name in ("cpu", "cuda")]
    return f", {' and '.join(counts)} built"


def _cpu(facts: dict[str, Any]) -> str:
    """avx512bf16, attention kernels bf16 avx512bf16, fp16 avx512, fp32 avx512"""
    kernels = [name.split("_") for name in facts["kernels"]]
    forwards = [f"{dtype} {arch}" for _, way, dtype, _, arch in kernels if way == "forward"]
    isa = facts["isa"]
    if facts["isa_lowered"]:
        isa += " (ANYFLASH_CPU_ISA allows no more)"
    elif isa == "none":
        isa = "no kernel of anyflash's runs here"
    return f"{isa}, attention kernels {', '.join(forwards)}" if forwards else isa


def _torch(facts: dict[str, Any]) -> str:
    built = f"built for CUDA {facts['cuda']}" if facts["cuda"] else "built without CUDA"
    if facts["hip"]:
        built = f"built for HIP {facts['hip']}"
    driver = facts["driver"]
    seen = "no NVIDIA driver"
    if driver and driver["version"]:
        seen = f"NVIDIA driver {_drivers.text_of(driver['version'])}"
    return f"{facts['version']} ({built}; {seen}; {facts['threads']} CPU threads)"


def _failed(section: Any) -> bool:
    return isinstance(section, dict) and "error" in section


def _decision_table(rows: Any) -> str:
    if not rows or _failed(rows):
        return ""
    lines = ["What runs for common shapes (python -m anyflash explain says why)"]
    device = ""
    used: set[str] = set()
    for row in rows:
        if row["device"] != device:
            device = row["device"]
            lines += ["", f"  {device:40s} {'forward':15s} backward"]
        forward, backward = row["routes"]["forward"], row["routes"].get("backward", "")
        lines.append(f"  {row['dtype'] + ' ' + row['shape']:40s} {forward:15s} {backward}".rstrip())
        used |= {forward, backward}
    lines.append("")
    lines += [f"  {name:15s} {title}" for name, title in ROUTE_TITLES.items() if name in used]
    if "none" in used:
        lines.append(f"  {'none':15s} nothing in the order of back ends can run it")
    return "\n".join(lines)


def _clients(found: Any) -> str:
    if not found or _failed(found):
        return ""
    names = [f"{client['name']} {client['version']}" for client in found]
    width = max(map(len, names))
    lines = [f"  {name:{width}s}  {client['uses']}" for name, client in zip(names, found)]
    return "\n".join(["Clients of flash_attn that are installed here, and what they use", *lines])


def _variables(found: dict[str, str]) -> str:
    if _failed(found) or not found:
        return ""
    lines = [f"  {name}={value}   ({ENVIRONMENT.get(name, '?')})" for name, value in found.items()]
    return "\n".join(["Environment", *lines])


def _finding(number: int, finding: dict[str, str]) -> str:
    text = textwrap.fill(
        finding["what"],
        96,
        initial_indent=f"  {number}. ",
        subsequent_indent="     ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    if finding["remedy"]:
        text += f"\n     What to do: {finding['remedy']}"
    return text
