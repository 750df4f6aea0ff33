"""Options of the suite. The provider belongs to a process: a run has one, `make test` runs twice.

pytest tests/python                            # the binary where it was built
pytest tests/python -m providers --provider python
pytest tests/python --device cuda
"""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--provider", default=None, choices=("binary", "python"))


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "providers: says something about each provider of the operators"
    )
    for name in ("ANYFLASH_BACKEND", "ANYFLASH_STRICT", "ANYFLASH_CHECK", "ANYFLASH_PROVIDER"):
        os.environ.pop(name, None)
    if config.getoption("--provider"):
        os.environ["ANYFLASH_PROVIDER"] = config.getoption("--provider")


def pytest_report_header(config):
    import torch

    from anyflash import _loader as loader

    wanted = config.getoption("--provider")
    if wanted and loader.provider != wanted:
        raise pytest.UsageError(f"--provider {wanted}: not available: {'; '.join(loader.reasons)}")
    device = config.getoption("--device")
    why = "".join(f"\n  {reason}" for reason in loader.reasons)
    return f"anyflash: {loader.provider} provider, torch {torch.__version__}, device {device}{why}"


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def provider() -> str:
    from anyflash import _loader as loader

    return loader.provider
