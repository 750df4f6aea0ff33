"""The types that the package ships, where mypy does not see that they are whole."""

from __future__ import annotations

import inspect

import anyflash
from anyflash.attention import _Options


def test_overloads_of_attention_take_all_its_keywords() -> None:
    parameters = inspect.signature(anyflash.attention).parameters.values()
    keywords = {x.name: x.annotation for x in parameters if x.kind is x.KEYWORD_ONLY}
    del keywords["return_lse"]
    named = {name: kind.__forward_arg__ for name, kind in _Options.__annotations__.items()}
    assert named == keywords
