"""What users install, in fresh virtual environments, beside a broken flash-attn; and gone again.

How they are made: installations.py.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
from installations import (
    LINUX,
    MACHINE,
    NO_COMPILER,
    REPOSITORY,
    SMOKE,
    Environment,
    build,
    call,
    check_out,
    doctor_of,
)
from tree import tracked

sys.path.append(str(REPOSITORY / "scripts"))
from test_matrix import find_python  # noqa: E402


def content(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def facts(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("anyflash/_build.json"))


@LINUX
def test_the_wheel_holds_what_it_should_and_no_more(wheel):
    names = content(wheel)
    libraries = {"libanyflash_kernels.so", "libanyflash_ops.so"}
    assert {n for n in names if ".so" in n} == {f"anyflash/{name}" for name in libraries}
    assert set(facts(wheel)["crc32"]) == libraries
    assert "anyflash/_lists.py" in names
    for name in ("anyflash.pth", "anyflash.start"):
        assert any(re.fullmatch(rf"anyflash-[\d.]+\.data/purelib/{name}", n) for n in names)
    assert {
        "anyflash/cmake/anyflashConfig.cmake",
        "anyflash/include/anyflash/attention.h",
        "anyflash/include/anyflash/autograd.h",
        "anyflash/include/anyflash/kernels.h",
        "anyflash/include/anyflash/kernels/launch.h",
    } <= names
    top = {n.split("/")[0] for n in names}
    assert {t for t in top if not t.startswith("anyflash-")} == {"anyflash", "_anyflash_dropin.py"}
    assert not [
        n
        for n in names
        if n.endswith(".pyc") or "egg-info" in n or n.startswith("anyflash/dropin/anyflash")
    ]
    assert facts(wheel)["binary"]


@LINUX
def test_the_wheel_is_small(wheel, pytestconfig):
    """A release has code for five GPU architectures, the wheel of other runs for one."""
    assert wheel.stat().st_size <= (20e6 if pytestconfig.getoption("--dist") else 5e6)


@LINUX
def test_one_wheel_for_every_python(wheel):
    """Its kernels need no C++ library of the system, and no newer glibc than manylinux2014 has,
    where the system that built it has libstdc++ as an archive."""
    tag = f"manylinux2014_{MACHINE}.manylinux_2_17_{MACHINE}"
    assert re.fullmatch(rf"anyflash-[\d.]+-py3-none-{tag}\.whl", wheel.name)


VERSIONS = ("3.9", "3.10", "3.11", "3.12", "3.13", "3.14")


@LINUX
@pytest.mark.parametrize("version", VERSIONS)
def test_each_python_installs_the_wheel_and_calls_its_kernels(wheel, tmp_path, version):
    """Without torch, which is installed for one Python only; test_matrix.py has the others."""
    python = find_python(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    environment = Environment(tmp_path / "venv", tmp_path, python)
    uv = (sys.executable, "-m", "uv", "--offline", "pip")  # knows older ones than pip does
    call(*uv, "install", "--python", environment.python, "--no-deps", wheel)
    code = (
        "import ctypes; from pathlib import Path\n"
        f"library = ctypes.CDLL(str(Path({str(environment.site)!r}) / 'anyflash' / "
        "'libanyflash_kernels.so'))\n"
        "library.anyflash_layout.restype = ctypes.c_char_p\n"
        "print(library.anyflash_cpu_isa(), b'TensorView ' in library.anyflash_layout())"
    )
    isa, layout = environment.run(code).stdout.split()
    assert int(isa) > 0 and layout == "True"


@LINUX
@pytest.mark.parametrize("name", ["manylinux2014", "manylinux_2_17"])
def test_pip_download_finds_the_wheel_by_both_names(wheel, tmp_path, name):
    target = ("--platform", f"{name}_{MACHINE}", "--python-version", "3.12")
    index = ("--no-index", "--no-deps", "--find-links", wheel.parent, "--only-binary", ":all:")
    command = (sys.executable, "-m", "pip", "download", *index, *target, "-d", tmp_path)
    call(*command, "anyflash")
    assert (tmp_path / wheel.name).is_file()


@LINUX
def test_every_python_file_of_the_tree_is_in_the_wheel(wheel, source):
    package = source / "python"
    files = {p.relative_to(package).as_posix() for p in package.rglob("*.py")}
    assert files <= content(wheel)


@LINUX
def test_the_drop_in_has_no_record(wheel, source):
    """So that `pip uninstall flash-attn` never takes anyflash's files."""
    names = content(wheel)
    assert not [n for n in names if n.startswith("anyflash/dropin/") and n.endswith("/RECORD")]
    assert not list(source.rglob("RECORD"))


def test_every_module_of_the_drop_in_belongs_to_the_name():
    dropin = REPOSITORY / "python/anyflash/dropin"
    listed = (dropin / "flash_attn-2.8.3.dist-info/top_level.txt").read_text().split()
    modules = {
        path.parent.name if path.name == "__init__.py" else path.stem
        for path in tracked("python/anyflash/dropin/*.py", "python/anyflash/dropin/*/__init__.py")
    }
    assert modules <= set(listed)


@LINUX
def test_install_use_and_uninstall(environment, wheel):
    environment.install(wheel)
    found = environment.smoke()
    assert found["file"] == str(environment.site / "anyflash/dropin/flash_attn/__init__.py")
    assert found["version"] == "2.8.3"
    assert found["provider"] == "binary"
    installed = {
        p["name"].replace("_", "-"): p["version"]
        for p in json.loads(environment.pip("list", "--format=json").stdout)
    }
    assert installed["flash-attn"] == "2.8.3" and "anyflash" in installed
    environment.pip("uninstall", "-y", "anyflash")
    assert environment.files() == environment.empty


@LINUX
def test_a_requirement_on_flash_attn_is_satisfied(environment, wheel, tmp_path):
    client = tmp_path / "client"
    client.mkdir()
    (client / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "client"\nversion = "1"\n'
        'dependencies = ["flash-attn>=2.5"]\n[tool.setuptools]\npy-modules = []\n'
    )
    environment.install(wheel)
    environment.pip("install", "--no-index", "--no-build-isolation", client)
    assert "client requires" not in environment.pip("check", check=False).stdout


@LINUX
def test_a_broken_flash_attn_installed_before(environment, wheel, broken_upstream):
    environment.install(broken_upstream)
    environment.install(wheel)
    assert environment.smoke()["version"] == "2.8.3"
    said = environment.run("import flash_attn").stderr
    assert f"flash_attn-2.7.4, in {environment.site}, is not used" in said
    for mode in ("0", "off", "append"):
        failed = environment.run(SMOKE, check=False, ANYFLASH_DROPIN=mode)
        assert "undefined symbol" in failed.stderr
        version = "import importlib.metadata as m; print(m.version('flash-attn'))"
        assert environment.run(version, ANYFLASH_DROPIN=mode).stdout.strip() == "2.7.4"


@LINUX
def test_nothing_replaces_the_drop_in_by_accident(environment, wheel, broken_upstream):
    """pip refuses to replace or remove what has no RECORD, and changes nothing."""
    environment.install(wheel)
    before = environment.files()
    for command in (("uninstall", "-y", "flash-attn"), ("install", "--no-deps", broken_upstream)):
        refused = environment.pip(*command, check=False)
        assert refused.returncode and "RECORD" in refused.stderr, refused.stderr
        assert environment.files() == before
    assert environment.smoke()["version"] == "2.8.3"
    if sys.version_info >= (3, 10):
        owners = "import importlib.metadata as m; print(m.packages_distributions()['flash_attn'])"
        assert environment.run(owners).stdout.strip() == "['flash-attn']"
    environment.pip("uninstall", "-y", "anyflash")
    assert environment.files() == environment.empty


def test_a_checkout_on_pythonpath_wins(environment, pure_wheel, tmp_path):
    (tmp_path / "mine/flash_attn").mkdir(parents=True)
    (tmp_path / "mine/flash_attn/__init__.py").write_text("mine = True\n")
    environment.install(pure_wheel)
    environment.run("import flash_attn; assert flash_attn.mine", PYTHONPATH=str(tmp_path / "mine"))


def test_without_any_compiler_the_install_is_pure_python_and_says_why(environment, pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert facts(pure_wheel) == {**facts(pure_wheel), "binary": False, "cuda": False}
    assert "no C++ compiler" in facts(pure_wheel)["reasons"][0]
    environment.install(pure_wheel)
    assert environment.smoke()["provider"] == "python"
    report = call(
        environment.python, "-m", "anyflash", "doctor", check=False, cwd=environment.site.parent
    )
    assert "compiler" in report.stdout


@LINUX
@pytest.mark.parametrize(
    "settings, asked",
    [
        ({"PATH": "/nowhere", "CXX": ""}, True),
        ({"PATH": "/nowhere", "CXX": "", "ANYFLASH_BUILD": "1"}, True),
        ({"CXX": "/bin/true"}, False),
        ({"CXX": NO_COMPILER}, False),
        ({"PATH": "/nowhere", "CXX": "", "ANYFLASH_BUILD": "0"}, False),
    ],
    ids=["no compiler", "no compiler, must build", "a compiler", "a wrong name", "pure Python"],
)
def test_zig_is_fetched_where_there_is_no_compiler(source, settings, asked):
    """What the build asks pip for; nothing is fetched here."""
    hidden = "import sys; sys.modules['ziglang'] = None; sys.path.insert(0, 'tools')\n"
    code = f"{hidden}import build_backend; print(build_backend.get_requires_for_build_wheel())"
    required = call(sys.executable, "-c", code, cwd=source, **settings).stdout.splitlines()[-1]
    assert ("'ziglang>=" in required) == asked
    assert not (asked and "nvidia" in required)


@LINUX
def test_a_failing_compiler_steps_down_to_pure_python(source, tmp_path):
    wheel = build(source, tmp_path, "--wheel", CXX="/bin/false")
    assert not facts(wheel)["binary"]
    assert [r.split(":")[0] for r in facts(wheel)["reasons"]] == ["cuda", "binary"]
    assert not [n for n in content(wheel) if n.endswith(".so")]


@LINUX
@pytest.mark.parametrize(
    "settings", [{"CXX": "/bin/false"}, {"CXX": NO_COMPILER}], ids=["failing", "missing"]
)
def test_a_binary_that_was_asked_for_and_cannot_be_built_is_an_error(source, tmp_path, settings):
    command = (
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        tmp_path,
        source,
    )
    assert call(*command, check=False, ANYFLASH_BUILD="1", **settings).returncode


def test_editable_install(environment, tmp_path):
    """The start-up files come along, and nothing that pip could follow to delete sources."""
    tree = check_out(tmp_path / "tree")
    environment.install("--editable", tree, ANYFLASH_BUILD="0")
    assert {"anyflash.pth", "anyflash.start"} <= environment.files()
    assert environment.smoke()["file"] == str(
        tree / "python/anyflash/dropin/flash_attn/__init__.py"
    )
    environment.pip("uninstall", "-y", "flash-attn", check=False)
    environment.pip("uninstall", "-y", "anyflash")
    assert (tree / "python/anyflash/dropin/flash_attn/__init__.py").is_file()
    assert environment.files() == environment.empty


def test_uv(environment, pure_wheel):
    uv = (sys.executable, "-m", "uv", "--offline", "pip")
    call(*uv, "install", "--python", environment.python, "--no-deps", pure_wheel)
    assert environment.smoke()["version"] == "2.8.3"
    call(*uv, "uninstall", "--python", environment.python, "anyflash")
    assert environment.files() == environment.empty


def test_the_companion_holds_the_drop_in(companion, source, pure_wheel):
    wheel = companion()
    assert wheel.name == "flash_attn-2.8.3-py3-none-any.whl"
    assert not list((source / "python/anyflash/dropin").glob("*.egg-info"))
    dropin = {
        n.split("dropin/")[1]
        for n in content(pure_wheel)
        if n.startswith("anyflash/dropin/") and n.endswith(".py")
    }
    added = {n for n in content(wheel) if n.endswith(".py")} - dropin
    assert added == {"flash_attn/_companion.py"}
    assert dropin <= content(wheel)


def test_the_companion_serves_a_target_folder(companion, environment, pure_wheel, tmp_path):
    """`pip install --target` needs a distribution that is called flash-attn."""
    folder = tmp_path / "target"
    environment.install("--target", folder, pure_wheel, companion())
    found = environment.smoke(PYTHONPATH=str(folder))
    assert found["file"] == str(folder / "flash_attn/__init__.py")
    report = doctor_of(environment, PYTHONPATH=str(folder))
    assert report["flash_attn"]["companion"] and report["flash_attn"]["ours"]
    assert not [p for p in report["problems"] if "flash_attn" in p["what"]]


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_pinned_requirement(companion, environment, pure_wheel, installer):
    """A companion of the pinned version satisfies pip and uv, and clients that compare versions."""
    environment.install(pure_wheel)
    pinned = ("install", "--no-index", "--dry-run", "flash-attn==2.6.3")
    assert environment.pip(*pinned, check=False).returncode
    wheel = companion("2.6.3")
    uv = (sys.executable, "-m", "uv", "--offline", "pip")
    if installer == "pip":
        environment.install(wheel, ANYFLASH_DROPIN="0")
    else:
        call(*uv, "install", "--python", environment.python, "--no-deps", wheel)
    assert environment.pip(*pinned).returncode == 0
    flags = ("--python", environment.python, "--no-index", "--no-deps", "--dry-run")
    call(*uv, "install", *flags, "flash-attn==2.6.3")
    found = environment.smoke()
    assert found["version"] == "2.6.3"
    assert found["file"] == str(environment.site / "flash_attn/__init__.py")
    assert environment.run("import flash_attn; print(flash_attn.__version__)").stdout == "2.6.3\n"
    assert not environment.run("import flash_attn").stderr
    report = doctor_of(environment)
    assert report["flash_attn"]["companion"]
    assert not [f for f in report["problems"] + report["notes"] if "flash-attn" in f["what"]]
    environment.pip("uninstall", "-y", "flash-attn")
    assert environment.smoke()["version"] == "2.8.3"  # the drop-in is back


def test_an_application_of_modules_alone(pure_wheel, libraries, tmp_path):
    """zipapp and the like take the modules along and no other files."""
    application = tmp_path / "app.zip"
    with zipfile.ZipFile(pure_wheel) as wheel, zipfile.ZipFile(application, "w") as out:
        for name in wheel.namelist():
            if name.endswith(".py"):
                out.writestr(name.removeprefix("anyflash/dropin/"), wheel.read(name))
    code = SMOKE.replace("metadata.version", "str").replace("flash_attn.__file__", "''")
    path = os.pathsep.join(map(str, (application, libraries)))
    done = call(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert json.loads(done.stdout.splitlines()[-1])["provider"] == "python"
    code = "from anyflash import _loader; print(_loader.reasons)"
    done = call(sys.executable, "-S", "-c", code, cwd=tmp_path, PYTHONPATH=path)
    assert "only a part of the package" in done.stdout and "compiler" not in done.stdout


def test_pyinstaller_is_told_what_to_take(environment, pure_wheel):
    """Its hooks, with what they collect from a stand-in for PyInstaller."""
    environment.install(pure_wheel)
    code = """
import importlib.metadata as metadata, pathlib, runpy, sys, types
points = metadata.entry_points()
group = "pyinstaller40"
points = points.select(group=group) if hasattr(points, "select") else points[group]
(folder,) = next(p for p in points if p.value.startswith("anyflash")).load()()
hooks = types.ModuleType("PyInstaller.utils.hooks")
hooks.copy_metadata = lambda name: [(metadata.distribution(name).metadata["Version"], name)]
hooks.collect_dynamic_libs = lambda name: ["libraries of " + name]
hooks.collect_data_files = lambda name, includes: [(i, name) for i in includes]
for name in ("PyInstaller", "PyInstaller.utils"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["PyInstaller.utils.hooks"] = hooks
for path in sorted(pathlib.Path(folder).glob("hook-*.py")):
    found = runpy.run_path(str(path))
    print(path.stem, found.get("binaries"), found["datas"], found["hiddenimports"])
"""
    lines = environment.run(code).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["hook-anyflash", "hook-flash_attn"]
    assert "libraries of anyflash" in lines[0] and "_build.json" in lines[0]
    assert "('2.8.3', 'flash-attn')" in lines[1] and "flash_attn_2_cuda" in lines[1]


def test_the_start_up_hook_costs_less_than_a_millisecond(environment, pure_wheel):
    environment.install(pure_wheel)
    line = (environment.site / "anyflash.pth").read_text()
    code = (
        f"import os, sys, time; sys.path.append({str(environment.site)!r})\n"
        f"start = time.perf_counter()\nexec({line!r})\nseconds = time.perf_counter() - start\n"
        "print(seconds, [p for p in sys.path if p.endswith('dropin')], 'torch' in sys.modules)"
    )
    runs = [environment.run(code, "-S").stdout.split() for _ in range(7)]
    assert min(float(run[0]) for run in runs) < 1e-3
    assert all("dropin" in run[1] and run[2] == "False" for run in runs)
    start = (environment.site / "anyflash.start").read_text().strip().split(":")
    environment.run(f"import importlib; importlib.import_module({start[0]!r}).{start[1]}()")
