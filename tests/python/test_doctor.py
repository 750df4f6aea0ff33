"""doctor: what it finds in healthy and in broken installations, and what it says about it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support import run_python, torch_version, write_lists

import anyflash
from anyflash import _clients, _core, _doctor_text, _installs, _loader, _machine
from anyflash import _doctor as doctor
from anyflash.__main__ import main


def findings(report: dict, kind: str) -> str:
    return "\n".join(f"{entry['what']} {entry['remedy']}" for entry in report[kind])


def run_doctor(*path: Path | str, **environment: str) -> tuple[int, dict, str]:
    """`python -m anyflash doctor --json` in a fresh interpreter: status, report, stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ANYFLASH_")}
    env.update(PYTHONPATH=os.pathsep.join(map(str, path)), **environment)
    command = [sys.executable, "-m", "anyflash", "doctor", "--json"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", timeout=300)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def installation(tmp_path_factory) -> Path:
    """A copy of the package as a pure-Python install has it; tests add what is broken."""
    root = tmp_path_factory.mktemp("site")
    package = root / "anyflash"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build.json", "include", "cmake")
    shutil.copytree(Path(anyflash.__file__).parent, package, ignore=ignore)
    write_lists(package)
    return root


def test_json_has_every_section(capsys):
    status = main(["doctor", "--json", "--no-probe"])
    report = json.loads(capsys.readouterr().out)
    assert status == (0 if report["healthy"] else 1)
    sections = {"anyflash", "operators", "torch", "cpu", "gpus", "flash_attn", "environment"}
    assert sections | {"decisions", "trial", "problems", "notes"} <= set(report)
    assert all("error" not in report[name] for name in sections if isinstance(report[name], dict))
    assert report["trial"]["cpu"] == "ok"


def test_text_says_what_runs(capsys):
    main(["doctor", "--no-probe"])
    text = capsys.readouterr().out
    for label, _ in doctor.COMMON_SHAPES:
        assert label in text
    assert torch.__version__ in text
    assert "aten_cpu" in text or "kernel " in text


def test_a_gpu_of_another_maker_is_no_nvidia(monkeypatch):
    """Its torch calls it cuda, and gives it a compute capability."""
    properties = types.SimpleNamespace(name="MI300X", total_memory=2**37, major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    gpu = {"device": "cuda:0", "kind": "hip", "name": "MI300X", "memory_gib": 128.0}
    assert _machine.gpus() == [gpu]
    rows = [row for row in doctor._decisions(doctor.Report()) if row["device"] == "hip"]
    routes = {row["shape"]: row["routes"]["forward"] for row in rows}
    by_math = {"training, softcap", "training, ALiBi", "training, dropout"}
    assert routes == {x: "math" if x in by_math else "aten_sdpa" for x, _ in doctor.COMMON_SHAPES}
    facts = doctor.diagnose(probe=False).facts
    assert "GPU         MI300X, hip, 128 GiB" in _doctor_text.heading({**facts, "gpus": [gpu]})
    assert "built for HIP 6.4" in _doctor_text.heading(facts)


def test_the_cpu_is_named_with_its_kernels(capsys):
    facts = doctor.diagnose(probe=False).facts
    main(["doctor", "--no-probe"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("CPU "))
    assert facts["cpu"]["isa"] == _loader.cpu_isa()
    assert facts["cpu"]["isa"] in line
    for name in facts["cpu"]["kernels"]:
        assert name in {instance["name"] for instance in _core.instances()}
        assert name.split("_")[-1] in line


@pytest.mark.skipif(_loader.cpu_isa() == "none", reason="no kernels here")
def test_a_lowered_instruction_set_is_told_from_a_cpu_without(capsys, monkeypatch):
    monkeypatch.setattr(_core, "cpu_isa", lambda: ("none", True))
    main(["doctor", "--no-probe"])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("CPU "))
    assert "none (ANYFLASH_CPU_ISA allows no more)" in line


def test_an_unknown_instruction_set():
    status, report, _ = run_doctor(Path(anyflash.__file__).parents[1], ANYFLASH_CPU_ISA="sse")
    assert status == 1
    assert "ANYFLASH_CPU_ISA: unknown instruction set 'sse'" in findings(report, "problems")


def test_decisions_are_those_of_decide():
    rows = doctor.diagnose(probe=False).facts["decisions"]
    for row, (_, words) in zip(rows, doctor.COMMON_SHAPES):
        answer = anyflash.explain(words.format(dtype="bf16"), device="cpu")
        for problem, direction in zip(answer.problems, row["routes"]):
            decided = anyflash.decide(problem)
            assert row["routes"][direction] == decided["route"]
            assert list(map(tuple, row["reasons"][direction])) == list(
                map(tuple, decided["reasons"])
            )


OLD_DRIVER = {"version": 11040, "cuda": "11.4", "devices": 1}


def test_every_problem_has_a_remedy(monkeypatch):
    monkeypatch.setattr(_machine, "driver", lambda: OLD_DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ANYFLASH_BACKEND", "sdpa,fast")
    monkeypatch.setenv("ANYFLASH_BACKENDS", "sdpa")
    report = doctor.diagnose(probe=False)
    assert all(problem["remedy"] for problem in report.problems)
    text = findings(report.as_dict(), "problems")
    assert "driver knows CUDA 11.4" in text
    assert "fast" in text
    assert "did you mean ANYFLASH_BACKEND" in findings(report.as_dict(), "notes")
    assert not report.healthy
    assert "What to do" in _doctor_text.render(report)


def test_a_torch_without_cuda_beside_a_driver(monkeypatch):
    monkeypatch.setattr(_machine, "driver", lambda: OLD_DRIVER)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "built without CUDA" in findings(doctor.diagnose(False).as_dict(), "problems")


@pytest.mark.parametrize(
    "sm, driver, what, remedy",
    (
        (
            86,
            OLD_DRIVER,
            "NVIDIA GPU: anyflash's CUDA kernels need NVIDIA driver R525 (CUDA 12.0) or newer, "
            "this is R470 (CUDA 11.4). PyTorch's own kernels run instead.",
            "update the NVIDIA driver",
        ),
        (
            90,
            {**OLD_DRIVER, "version": 13000},
            "NVIDIA GPU (sm_90): anyflash's CUDA kernels were built for sm_75, sm_80. PyTorch's "
            "own kernels run instead.",
            "ANYFLASH_CUDA_ARCHS=90",
        ),
        (
            87,  # Orin, which runs code of its own alone
            {**OLD_DRIVER, "version": 13000},
            "NVIDIA GPU (sm_87): anyflash's CUDA kernels were built for sm_75, sm_80. PyTorch's "
            "own kernels run instead.",
            "ANYFLASH_CUDA_ARCHS=87",
        ),
        (86, {**OLD_DRIVER, "version": 12000}, None, None),
    ),
)
def test_a_gpu_or_a_driver_that_the_kernels_are_not_for(monkeypatch, sm, driver, what, remedy):
    gpu = {"device": "cuda:0", "kind": "cuda", "name": "NVIDIA GPU", "memory_gib": 80, "sm": sm}
    kernels = [{"device": "cuda", "code": {75: 12000, 80: 12000}}, {"device": "cpu", "code": {}}]
    monkeypatch.setattr(_machine, "driver", lambda: driver)
    monkeypatch.setattr(_machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(_machine, "kernel_state", lambda: {"instances": kernels})
    report = doctor.Report()
    assert doctor._gpus(report) == [gpu]
    assert [note["what"] for note in report.notes] == ([what] if what else [])
    assert what is None or remedy in report.notes[0]["remedy"]


def test_a_broken_section_does_not_end_the_report(monkeypatch):
    def fail():
        raise OSError("no such luck")

    monkeypatch.setattr(_machine, "driver", fail)
    report = doctor.diagnose(probe=False)
    assert "no such luck" in findings(report.as_dict(), "problems")
    assert report.facts["decisions"]
    assert "anyflash" in _doctor_text.render(report)


@pytest.mark.parametrize(
    "archs, capability, runs",
    (
        (["sm_80", "sm_90"], (8, 9), True),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_75", "sm_80"], (9, 0), False),
        (["sm_75", "compute_80"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 1), True),
        (["sm_86"], (8, 0), False),
    ),
)
def test_runs_on(archs, capability, runs):
    assert _machine.runs_on(archs, *capability) is runs


@pytest.mark.skipif(torch_version() < 210, reason="older torch uses the Python operators anyway")
def test_a_missing_library(installation):
    status, report, _ = run_doctor(installation, installation / "anyflash/dropin")
    assert status == 1
    assert report["operators"]["provider"] == "python"
    assert report["trial"]["cpu"] == "ok"
    assert "compiled operators are not there" in findings(report, "problems")
    assert "g++" in findings(report, "problems")


@pytest.mark.skipif(torch_version() < 210, reason="older torch uses the Python operators anyway")
@pytest.mark.parametrize(
    "content",
    (b"", b"\x7fELF" + b"\0" * 3000, b"not a library" * 500),
    ids=("empty", "header", "text"),
)
def test_a_damaged_library(installation, content):
    library = installation / "anyflash/libanyflash_ops.so"
    library.write_bytes(content)
    try:
        status, report, _ = run_doctor(installation, installation / "anyflash/dropin")
    finally:
        library.unlink()
    assert status == 1
    assert report["operators"]["provider"] == "python"
    assert report["trial"]["cpu"] == "ok"
    assert "could not be used" in findings(report, "problems")
    assert "reinstall" in findings(report, "problems")


@pytest.mark.parametrize("name", ["libanyflash_ops.so", "libanyflash_kernels.so"])
@pytest.mark.parametrize("provider", ["auto", "python"])
def test_a_library_that_is_not_the_one_that_was_built(installation, name, provider):
    """It is told whether or not the library would be used."""
    library, facts = (installation / "anyflash" / name for name in (name, "_build.json"))
    library.write_bytes(b"\x7fELF")
    facts.write_text(json.dumps({"binary": True, "reasons": [], "crc32": {name: 1}}))
    try:
        status, report, _ = run_doctor(
            installation, installation / "anyflash/dropin", ANYFLASH_PROVIDER=provider
        )
    finally:
        library.unlink()
        facts.unlink()
    assert status == 1
    assert report["operators"]["files"][name]["damage"] in findings(report, "problems")
    assert f"{name} is damaged" in findings(report, "problems")


def test_operators_that_no_compiler_could_build_are_no_problem(installation):
    """zig builds the kernels alone, and the Python operators call them."""
    facts = installation / "anyflash/_build.json"
    why = "operators: there was no g++ or clang++"
    facts.write_text(json.dumps({"binary": True, "reasons": [why], "crc32": {}}))
    try:
        _, report, _ = run_doctor(installation, installation / "anyflash/dropin")
    finally:
        facts.unlink()
    assert why in findings(report, "notes") and why not in findings(report, "problems")
    assert "g++" in findings(report, "notes")


def test_python_operators_on_demand(installation):
    path = (installation, installation / "anyflash/dropin")
    status, report, _ = run_doctor(*path, ANYFLASH_PROVIDER="python")
    assert status == 0
    assert "ANYFLASH_PROVIDER=python" in findings(report, "notes")


@pytest.fixture
def upstream(tmp_path) -> Path:
    """Another flash_attn, whose compiled part does not load."""
    (tmp_path / "flash_attn").mkdir()
    text = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2')\n"
    (tmp_path / "flash_attn/__init__.py").write_text(text)
    metadata = tmp_path / "flash_attn-2.7.4.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.7.4\n")
    return tmp_path


def test_a_broken_upstream_behind_ours(installation, upstream):
    dropin = installation / "anyflash/dropin"
    path = (installation, dropin, upstream)
    status, report, _ = run_doctor(*path, ANYFLASH_PROVIDER="python")
    assert status == 0
    assert report["flash_attn"]["ours"] is True
    notes = findings(report, "notes")
    assert "undefined symbol" in notes
    assert "ANYFLASH_DROPIN=0 python -m pip uninstall flash-attn" in notes


def test_a_broken_upstream_before_ours(installation, upstream):
    path = (upstream, installation, installation / "anyflash/dropin")
    status, report, _ = run_doctor(*path, ANYFLASH_PROVIDER="python")
    assert status == 1
    assert report["flash_attn"]["ours"] is False
    problems = findings(report, "problems")
    assert "comes before anyflash" in problems
    assert "undefined symbol" in problems


def test_the_off_switch(installation):
    status, report, _ = run_doctor(installation, ANYFLASH_PROVIDER="python", ANYFLASH_DROPIN="0")
    if not report["flash_attn"]["ours"]:
        assert status == 0 or report["flash_attn"]["winner"]
        assert "ANYFLASH_DROPIN=0" in findings(report, "notes")


def test_the_report_in_a_notebook():
    report = anyflash.doctor(probe=False)
    assert repr(report) == _doctor_text.render(report)
    assert anyflash.doctor(probe=False).healthy is report.healthy  # a second call, too


def test_clients_are_named_without_importing_them():
    rows = anyflash.doctor(probe=False).facts["clients"]
    known = {client.distribution for client in _clients.CLIENTS}
    assert {row["name"] for row in rows} <= known
    for row in rows:
        assert row["version"] == importlib.metadata.version(row["name"]) and row["uses"]
    code = "import sys, anyflash; anyflash.doctor(False); print('transformers' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_transformers_without_a_gpu_has_a_remedy(monkeypatch):
    client = {"name": "transformers", "version": "5.23.0", "uses": "flash_attn"}
    monkeypatch.setattr(_clients, "installed", lambda gpu: [client])
    for gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        report = doctor.Report()
        doctor._clients(report)
        assert [note["kind"] for note in report.notes] == ([] if gpu else ["transformers"])


def test_the_command_without_arguments_is_the_doctor(capsys):
    assert main([]) in (0, 1)
    assert "What runs for common shapes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"anyflash {anyflash.__version__}\n"


def test_survey_names_the_drop_in_once():
    copies = _installs.survey(probe=False)["copies"]
    assert sum(copy["ours"] for copy in copies) == 1


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["version"] == anyflash.__version__
    assert facts["operators"] == _loader.provider
    assert main(["info"]) == 0
    assert anyflash.__version__ in capsys.readouterr().out
