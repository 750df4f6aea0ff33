"""Every remedy that the doctor can print is followed, in an installation that has the problem.

What nobody can follow here, because it
needs a GPU, a driver or a package index, is printed where it belongs, and said to be so below.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from installations import LINUX, NO_COMPILER, call
from installations import doctor_of as doctor

from anyflash._remedies import REMEDIES

NOT_HERE = {
    "newer_torch": "needs a package index",
    "install_torch": "needs a package index; that it is printed: test_doctor_without_torch",
    "cuda_torch": "needs an NVIDIA driver; that it is printed: test_doctor.py",
    "build_for_gpu": "needs a GPU; that it is printed: test_doctor.py",
    "newer_driver": "needs an NVIDIA driver; that it is printed: test_doctor.py",
    "driver": "needs an NVIDIA driver; that it is printed: test_doctor.py",
    "ask_torch": "needs an NVIDIA driver",
    "torch_for_gpu": "needs a GPU",
    "report": "is about faults that nobody knows yet",
    "transformers": "tests/consumers/test_transformers_integration.py calls it",
}


def finding(report: dict, kind: str) -> dict:
    found = [f for f in report["problems"] + report["notes"] if f["kind"] == kind]
    assert found, f"{kind} is not advised: {report['problems']} {report['notes']}"
    return found[0]


def gone(report: dict, kind: str) -> bool:
    return not [f for f in report["problems"] + report["notes"] if f["kind"] == kind]


def follow(environment, advice: dict, **variables) -> None:
    """Types the command as it is printed, in a shell of the environment; answers yes."""
    assert advice["command"] in advice["remedy"]
    path = f"{environment.python.parent}:/usr/bin:/bin"
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    shell = ("bash", "-c", f"yes | {{ {advice['command']}; }}")
    call(*shell, cwd=environment.site.parent, PATH=path, **offline, **variables)


def test_every_remedy_is_followed_or_excused():
    followed = {
        name[len("test_follow_") :] for name in globals() if name.startswith("test_follow_")
    }
    assert followed | set(NOT_HERE) == set(REMEDIES)
    assert not followed & set(NOT_HERE)


def test_follow_uninstall(environment, pure_wheel, broken_upstream):
    """The broken package goes, anyflash and its flash_attn stay."""
    environment.install(broken_upstream)
    environment.install(pure_wheel)
    advice = finding(doctor(environment), "uninstall")
    assert "undefined symbol" in advice["what"]
    follow(environment, advice)
    assert not (environment.site / "flash_attn").exists()
    assert gone(doctor(environment), "uninstall")
    assert environment.smoke()["version"] == "2.8.3"


def test_follow_remove_folder(environment, pure_wheel):
    """A folder that no installed package owns is nothing for pip."""
    environment.install(pure_wheel)
    folder = environment.site.parent / "flash_attn"  # where the doctor is started
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('half a copy')\n")
    advice = finding(doctor(environment), "remove_folder")
    assert str(folder) in advice["what"]
    folder.rename(folder.with_name("old"))
    assert gone(doctor(environment), "remove_folder")
    assert environment.smoke()["version"] == "2.8.3"


def test_follow_leave_path(environment, pure_wheel, tmp_path):
    environment.install(pure_wheel)
    other = tmp_path / "other"
    (other / "flash_attn").mkdir(parents=True)
    (other / "flash_attn/__init__.py").write_text("flash_attn_func = None\n")
    advice = finding(doctor(environment, PYTHONPATH=str(other)), "leave_path")
    assert str(other) in advice["remedy"]
    assert gone(doctor(environment), "leave_path")


def test_follow_use_other(environment, pure_wheel, tmp_path):
    environment.install(pure_wheel)
    other = environment.site / "flash_attn"
    other.mkdir()
    (other / "__init__.py").write_text("other = flash_attn_func = True\n")
    advice = finding(doctor(environment), "use_other")
    name, value = advice["remedy"].rpartition("set ")[2].split("=")
    environment.run("import flash_attn; assert flash_attn.other", **{name: value})


def test_follow_use_anyflash(environment, pure_wheel):
    environment.install(pure_wheel)
    finding(doctor(environment, ANYFLASH_DROPIN="0"), "use_anyflash")
    assert gone(doctor(environment), "use_anyflash")
    assert environment.smoke()["version"] == "2.8.3"


@pytest.mark.parametrize("way", ["PYTHONPATH", "wheel"])
def test_follow_put_on_path(environment, pure_wheel, companion, tmp_path, way):
    """A --target folder runs no start-up files."""
    folder = tmp_path / "target"
    environment.install("--target", folder, pure_wheel)
    advice = finding(doctor(environment, PYTHONPATH=str(folder)), "put_on_path")
    path = str(folder)
    if way == "PYTHONPATH":
        path = f"{advice['remedy'].split('put ')[1].split(' first')[0]}:{path}"
    else:
        environment.install("--target", folder, companion())
    assert gone(doctor(environment, PYTHONPATH=path), "put_on_path")
    assert environment.smoke(PYTHONPATH=path)["file"].startswith(str(folder))


def test_follow_rename_variable(environment, pure_wheel):
    environment.install(pure_wheel)
    advice = finding(doctor(environment, ANYFLASH_BACKENDS="math"), "rename_variable")
    assert gone(
        doctor(environment, **{advice["remedy"].split()[3].rstrip("?"): "math"}), "rename_variable"
    )


def test_follow_correct_variable(environment, pure_wheel):
    """One mistake is one problem, though every call meets it."""
    environment.install(pure_wheel)
    report = doctor(environment, ANYFLASH_BACKEND="sdpa,fast")
    wrong = [p for p in report["problems"] if "compiled operators" not in p["what"]]
    assert [p["kind"] for p in wrong] == ["correct_variable"] and "'fast'" in wrong[0]["what"]
    assert gone(doctor(environment, ANYFLASH_BACKEND="sdpa,math"), "correct_variable")


def test_follow_more_back_ends(environment, pure_wheel):
    environment.install(pure_wheel)
    finding(doctor(environment, ANYFLASH_BACKEND="sdpa"), "more_back_ends")
    assert gone(doctor(environment, ANYFLASH_BACKEND="sdpa,math"), "more_back_ends")


@LINUX
def test_follow_reinstall(environment, wheel):
    """A damaged library, and the wheel it came from."""
    environment.install(wheel)
    library = environment.site / "anyflash/libanyflash_ops.so"
    library.write_bytes(library.read_bytes()[:5000])
    advice = finding(doctor(environment), "reinstall")
    assert str(wheel) in advice["command"]
    follow(environment, advice)
    assert gone(doctor(environment), "reinstall")
    assert environment.smoke()["provider"] == "binary"


@LINUX
def test_follow_compiler(environment, source, pure_wheel, tmp_path):
    """Without a compiler the folder was installed as pure Python; now there is one."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    environment.pip(
        "install", "--no-index", "--no-deps", "--no-build-isolation", tree, CXX=NO_COMPILER
    )
    advice = finding(doctor(environment), "compiler")
    assert str(tree) in advice["command"]
    # Behind the environment's own programs: cmake's folder may hold another python.
    command = f"PATH=$PATH:{Path(shutil.which('cmake') or '').parent}; {advice['command']}"
    quick = {"ANYFLASH_CUDA": "0", "CMAKE_BUILD_TYPE": "Quick", "CXXFLAGS": "-O1"}
    follow(environment, {**advice, "command": command, "remedy": command}, **quick)
    assert gone(doctor(environment), "compiler")
    assert environment.smoke()["provider"] == "binary"


def test_doctor_without_torch(tmp_path, pure_wheel):
    """The patient it exists for: an answer, not a traceback."""
    empty = tmp_path / "empty"
    call("python3", "-m", "venv", "--without-pip", empty)
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(call(empty / "bin/python", "-c", code).stdout.strip())
    shutil.unpack_archive(pure_wheel, site, "zip")
    done = call(empty / "bin/python", "-m", "anyflash", "doctor", check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "needs PyTorch" in done.stderr
    assert f"What to do: {REMEDIES['install_torch'].text()[0]}" in done.stderr
    done = call(empty / "bin/python", "-c", "import anyflash", check=False, cwd=tmp_path)
    assert "ImportError: anyflash needs PyTorch" in done.stderr
