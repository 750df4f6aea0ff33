"""What only a GPU can show. Not part of `make test`; scripts/gpu_check.sh runs it."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that torch can use"))
