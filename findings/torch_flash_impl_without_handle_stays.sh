#!/usr/bin/env bash
# torch 2.13.0: an implementation of flash attention whose registration returned nothing cannot be undone.
#
# torch.nn.attention.register_flash_attention_impl says that the callable may return a handle. Where it returns None, which its type
# allows, the implementation is active, but current_flash_attention_impl() is None, restore_flash_attention_impl() restores nothing, and
# another implementation that is activated later comes on top of it. One would expect the name, and an error or the kernels of before.
# The operator here stands for those of attention, so that no GPU is needed.
#
#   before                  current None, sin(0) 0.0
#   with a handle           current A, sin(0) 1.0
#   restored                current None, sin(0) 0.0
#   without a handle        current None, sin(0) 2.0
#   restored                current None, sin(0) 2.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0
"$folder/venv/bin/python" - 2> /dev/null <<'PY' | tee "$folder/seen"
import torch
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    register_flash_attention_impl,
    restore_flash_attention_impl,
)

libraries = []


class Handle:
    def remove(self):
        libraries.pop()._destroy()


def override(value):
    libraries.append(torch.library.Library("aten", "IMPL"))
    libraries[-1].impl("sin", lambda x: torch.full_like(x, value), "CPU", allow_override=True)


def with_handle():
    override(1.0)
    return Handle()


def without_handle():
    override(2.0)


def show(when):
    value = torch.zeros(()).sin().item()
    print(f"{when:23s} current {current_flash_attention_impl()}, sin(0) {value}")


show("before")
register_flash_attention_impl("A", register_fn=with_handle)
activate_flash_attention_impl("A")
show("with a handle")
restore_flash_attention_impl()
show("restored")
register_flash_attention_impl("B", register_fn=without_handle)
activate_flash_attention_impl("B")
show("without a handle")
restore_flash_attention_impl()
show("restored")
PY
diff "$folder/seen" - <<'SEEN'
before                  current None, sin(0) 0.0
with a handle           current A, sin(0) 1.0
restored                current None, sin(0) 0.0
without a handle        current None, sin(0) 2.0
restored                current None, sin(0) 2.0
SEEN
