"""What the doctor advises: words, and where there is one the command to type.

tests/python/test_remedies.py follows each of them in an installation that has the problem.
"""

from __future__ import annotations

from typing import NamedTuple


class Remedy(NamedTuple):
    """Advice with {fields}; ``command`` is for a shell, in the folder that ``do`` names."""

    do: str
    command: str = ""

    def text(self, **fields: str) -> tuple[str, str]:
        """(the advice in one line, its command), the fields filled in."""
        do, command = self.do.format(**fields), self.command.format(**fields)
        return (f"{do}: {command}" if command else do), command


_REINSTALL = "python -m pip install --force-reinstall --no-deps --no-cache-dir {source}"

REMEDIES = {
    "reinstall": Remedy("reinstall anyflash", _REINSTALL),
    "compiler": Remedy(
        "install a C++ compiler (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) if "
        "there is none, then reinstall anyflash",
        _REINSTALL,
    ),
    "newer_torch": Remedy("for the compiled ones", 'python -m pip install "torch>=2.10"'),
    "install_torch": Remedy("install PyTorch", "python -m pip install torch"),
    "cuda_torch": Remedy("install a CUDA build of torch (see the selector on pytorch.org)"),
    "driver": Remedy("update the NVIDIA driver, or install a torch built for an older CUDA"),
    "newer_driver": Remedy("to use them, update the NVIDIA driver"),
    "ask_torch": Remedy(
        "see whether CUDA_VISIBLE_DEVICES is set, and what torch says",
        'python -c "import torch; torch.cuda.init()"',
    ),
    "torch_for_gpu": Remedy("install a torch build whose list contains this GPU"),
    # Without the start-up hook pip does not see anyflash's own flash_attn, and finds the other one.
    "uninstall": Remedy("remove it", "ANYFLASH_DROPIN=0 python -m pip uninstall flash-attn"),
    "remove_folder": Remedy("rename or remove that folder; no installed package owns it"),
    "use_other": Remedy("to use that one instead, set ANYFLASH_DROPIN=append"),
    "use_anyflash": Remedy("unset ANYFLASH_DROPIN to use anyflash"),
    "leave_path": Remedy("remove {folder} from PYTHONPATH, or start Python in another folder"),
    "put_on_path": Remedy("put {dropin} first in PYTHONPATH, or install the flash-attn wheel"),
    "rename_variable": Remedy("did you mean {name}?"),
    "correct_variable": Remedy("correct the variable, or unset it"),
    "more_back_ends": Remedy("unset ANYFLASH_STRICT, or add math to ANYFLASH_BACKEND"),
    "report": Remedy(
        "try ANYFLASH_BACKEND=math, and report this with the output of "
        "python -m anyflash doctor --json"
    ),
    "transformers": Remedy(
        "call anyflash.integrations.transformers.enable(flash_attention_2=True) before models are "
        "imported"
    ),
}
