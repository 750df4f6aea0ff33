"""Options of the suite. The provider belongs to a process: a run has one, `make test` runs twice.

pytest tests/python                            # the binary where it was built
pytest tests/python -m providers --provider python
pytest tests/python --device cuda           # the tests that compute something
pytest tests/python/test_norm.py --device standin  # the same on stand_in_device.cpp
"""

from __future__ import annotations

import os
import re

import pytest
from installations import (  # noqa: F401  (fixtures)
    broken_upstream,
    companion,
    crossed_wheel,
    environment,
    libraries,
    pure_wheel,
    sdist,
    source,
    user,
    wheel,
)

# Before torch is there: workers with threads of their own on the same cores wait asleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda", "standin"))
    parser.addoption(
        "--release", help="folder with a release, whose wheels are tested (make wheels)"
    )
    parser.addoption("--provider", default=None, choices=("binary", "python"))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "providers: says something about each provider of the operators"
    )
    for name in ("ANYFLASH_BACKEND", "ANYFLASH_STRICT", "ANYFLASH_CHECK", "ANYFLASH_PROVIDER"):
        os.environ.pop(name, None)
    if config.getoption("--provider"):
        os.environ["ANYFLASH_PROVIDER"] = config.getoption("--provider")
    if config.getoption("--device") == "standin":
        import stand_in_device

        stand_in_device.load()


def group_of(item: pytest.Item) -> str:
    """Tests that one process of several runs (pytest-xdist), because they share what they build."""
    return "wheels" if "source" in item.fixturenames else item.path.stem


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config, items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: group_of(item) != "wheels")  # first what takes longest
    if config.getoption("--device") == "cpu":
        return
    others = [item for item in items if "device" not in item.fixturenames]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    """A test whose name has not got its group from pytest-xdist is handed to any process, and each
    of them builds the wheels."""
    if node.config.getoption("dist") == "loadgroup":
        for name in ids:
            if not re.search(r"@\w+$", name):
                raise pytest.UsageError(f"pytest {pytest.__version__} loses the groups: {name}")


def pytest_sessionstart(session):
    import torch

    from anyflash import _loader as loader

    wanted = session.config.getoption("--provider")
    if wanted and loader.provider != wanted:
        raise pytest.UsageError(f"--provider {wanted}: not available: {'; '.join(loader.reasons)}")
    # Small tensors: more threads wait for each other longer than they work.
    torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_terminal_summary(terminalreporter, config):
    import torch

    from anyflash import _loader as loader

    device = config.getoption("--device")
    terminalreporter.line(f"{loader.provider} provider, torch {torch.__version__}, device {device}")
    for reason in loader.reasons:
        terminalreporter.line(f"  {reason}")


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def provider() -> str:
    from anyflash import _loader as loader

    return loader.provider
