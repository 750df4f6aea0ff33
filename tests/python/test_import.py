"""`import flash_attn` in fresh interpreters: its cost, who wins on sys.path, what probes find.

The interpreters run with -S, so that only what a test puts there is on sys.path. Real
installations: test_packaging.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

SITES = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
PROBE = """
import importlib.metadata as metadata, importlib.util as util, json
ABSENT = ("flash_attn.cute", "flash_attn_interface", "flash_attn_3")
spec = util.find_spec("flash_attn")
import flash_attn, flash_attn_2_cuda
print(json.dumps({
    "file": flash_attn.__file__,
    "raw": flash_attn_2_cuda.__file__,
    "version": flash_attn.__version__,
    "metadata": [metadata.version("flash-attn"), metadata.version("flash_attn")],
    "same_spec": spec.origin == flash_attn.__spec__.origin == flash_attn.__file__,
    "locations": list(spec.submodule_search_locations),
    "owners": getattr(metadata, "packages_distributions", dict)().get("flash_attn", []),
    "absent": [n for n in ABSENT if util.find_spec(n)],
}))
"""


def _run(code: str, *, check: bool = True, options: tuple[str, ...] = ("-S",), **environment: str):
    env = {n: x for n, x in os.environ.items() if not n.startswith(("ANYFLASH_", "PYTHON"))}
    env.update(environment)
    done = subprocess.run(
        [sys.executable, *options, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture
def site(tmp_path) -> Path:
    """A site-packages folder as the wheel leaves it, the package itself by a link."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    shutil.copy(REPOSITORY / "python/_anyflash_dropin.py", folder)
    shutil.copy(REPOSITORY / "startup/anyflash.pth", folder)
    (folder / "anyflash").symlink_to(REPOSITORY / "python/anyflash", target_is_directory=True)
    return folder


def _startup(*sites: Path) -> str:
    """What the interpreter does at its start, for these folders after those of torch."""
    lines = ["import site, sys", f"sys.path += {SITES!r}"]
    return "\n".join([*lines, *(f"site.addsitedir({str(folder)!r})" for folder in sites), ""])


def _broken_upstream(folder: Path) -> Path:
    package = folder / "flash_attn"
    (package / "layers").mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("undefined symbol: _ZN3c10")\n')
    (package / "layers/__init__.py").touch()
    (folder / "flash_attn_2_cuda.py").write_text('raise ImportError("undefined symbol: _ZN3c10")\n')
    info = folder / "flash_attn-2.7.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.7.4\n")
    (info / "top_level.txt").write_text("flash_attn\nflash_attn_2_cuda\n")
    return folder


def test_probes_of_clients(site):
    """find_spec, metadata in both spellings, the package's owner, a real file (for unsloth)."""
    found = json.loads(_run(_startup(site) + PROBE, CUDA_VISIBLE_DEVICES="").stdout)
    dropin = site / "anyflash/dropin"
    assert found["file"] == str(dropin / "flash_attn/__init__.py")
    assert found["raw"] == str(dropin / "flash_attn_2_cuda.py")
    assert found["version"] == "2.8.3" and found["metadata"] == ["2.8.3", "2.8.3"]
    assert found["same_spec"]
    assert os.path.isfile(os.path.join(found["locations"][0], "flash_attn_interface.py"))
    assert found["absent"] == []
    if sys.version_info >= (3, 10):
        assert set(found["owners"]) == {"flash-attn"}


def test_import_stays_light(site):
    """Nothing heavy comes along, and nothing is said."""
    code = """
import torch, sys, time
before = set(sys.modules)
begin = time.perf_counter()
import flash_attn
seconds = time.perf_counter() - begin
heavy = ("einops", "triton", "torch._dynamo", "torch._inductor", "transformers", "sympy")
print([n for n in heavy if n in sys.modules and n not in before], seconds)
"""
    runs = [_run(_startup(site) + code, options=("-S", "-W", "error")) for _ in range(2)]
    assert all(r.stdout.startswith("[] ") and not r.stderr for r in runs), runs[0]
    # The budget is 50 ms on an idle machine (benchmarks/bench_startup.py); this one may be busy.
    assert min(float(r.stdout.split()[-1]) for r in runs) < 0.25


def test_missing_submodules_are_missing_modules(site):
    """FlashAttention-4's among them, where it is not installed."""
    code = """
for name, missing in (("cute", "cute"), ("cute.interface", "cute"), ("layers.mine", "layers.mine")):
    try:
        __import__("flash_attn." + name)
    except ModuleNotFoundError as error:
        assert error.name == "flash_attn." + missing and error.name in str(error)
    else:
        print(name)
"""
    assert _run(_startup(site) + code).stdout == ""


@pytest.mark.parametrize("first", ["upstream", "anyflash"])
def test_a_broken_upstream_loses(site, tmp_path, first):
    upstream = _broken_upstream(tmp_path / "other" / "site-packages")
    order = (upstream, site) if first == "upstream" else (site, upstream)
    found = json.loads(_run(_startup(*order) + PROBE).stdout)
    assert found["file"].startswith(str(site)) and found["metadata"] == ["2.8.3", "2.8.3"]
    layers = _run(_startup(*order) + "import flash_attn.layers as m; print(m.__file__)").stdout
    assert layers.startswith(str(site))


@pytest.mark.parametrize("mode", ["0", "off", "append", "1"])
def test_the_mode_decides_who_wins(site, tmp_path, mode):
    upstream = _broken_upstream(tmp_path / "other" / "site-packages")
    done = _run(_startup(upstream, site) + "import flash_attn", check=False, ANYFLASH_DROPIN=mode)
    assert ("undefined symbol" in done.stderr) == (mode != "1")
    version = "import importlib.metadata as m; print(m.version('flash_attn'))"
    done = _run(_startup(upstream, site) + version, ANYFLASH_DROPIN=mode)
    assert done.stdout.strip() == ("2.8.3" if mode == "1" else "2.7.4")


@pytest.mark.parametrize("mode, found", [("0", False), ("append", True), ("", True), (None, True)])
def test_modes_without_another_flash_attn(site, mode, found):
    environment = {} if mode is None else {"ANYFLASH_DROPIN": mode}
    code = "import importlib.util as u; print(u.find_spec('flash_attn') is not None)"
    assert _run(_startup(site) + code, **environment).stdout.strip() == str(found)


def test_a_checkout_of_the_user_wins(site, tmp_path):
    (tmp_path / "mine/flash_attn").mkdir(parents=True)
    (tmp_path / "mine/flash_attn/__init__.py").write_text("mine = True\n")
    code = "import flash_attn; print(flash_attn.mine)"
    done = _run(_startup(site) + code, PYTHONPATH=str(tmp_path / "mine"))
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("first", ["cute", "anyflash"])
def test_flash_attention_4_stays_reachable(site, tmp_path, first):
    """It installs flash_attn/cute alone, without an __init__.py above."""
    other = tmp_path / "other" / "site-packages"
    (other / "flash_attn/cute").mkdir(parents=True)
    (other / "flash_attn/cute/__init__.py").write_text("fourth = True\n")
    (other / "flash_attn/layers.py").touch()
    order = (other, site) if first == "cute" else (site, other)
    code = "import flash_attn, flash_attn.cute as c; print(flash_attn.__version__, c.fourth)"
    assert _run(_startup(*order) + code).stdout.split() == ["2.8.3", "True"]


def test_a_broken_upstream_beside_flash_attention_4(site, tmp_path):
    """Sharing a folder with cute lets other submodules in, never an __init__ or the raw module."""
    other = _broken_upstream(tmp_path / "other" / "site-packages")
    (other / "flash_attn/cute").mkdir()
    (other / "flash_attn/cute/__init__.py").touch()
    code = "import flash_attn.cute, flash_attn.flash_attn_interface as i; print(i.__file__)"
    assert _run(_startup(other, site) + code).stdout.startswith(str(site))


def test_without_site_processing_the_hook_can_be_called(site):
    """`python -S` runs no start-up files, nor do --target folders: the hook or the folder helps."""
    bare = f"import sys; sys.path += {SITES + [str(site)]!r}\n"
    assert "ModuleNotFoundError" in _run(bare + "import flash_attn", check=False).stderr
    code = "import _anyflash_dropin as d; print(d.install()); import flash_attn; print(d.install())"
    folder = str(site / "anyflash/dropin")
    assert _run(bare + code).stdout.split() == [folder, "None"]
    done = _run(
        f"import sys; sys.path += {SITES!r}\nimport flash_attn",
        PYTHONPATH=f"{folder}{os.pathsep}{site}",
    )
    assert not done.stderr
