"""`python -m anyflash [doctor] | info | explain | demo`, `--cmake-dir`, `--library`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from typing import Any

from . import __version__, _defs, _doctor, _files, _machine
from .explain import add_arguments as add_explain_arguments
from .explain import main as explain_main


def _info(options: argparse.Namespace) -> int:
    """What this installation was built with and holds."""
    import anyflash

    from . import _loader

    kernels = _machine.kernel_state()
    facts = {
        "version": anyflash.__version__,
        "operators": _loader.provider,
        "files": _machine.library_files(),
        "build": kernels["build"],
        "instances": kernels["instances"],
        "tiles": [{"kernel": kernel, **columns} for kernel, columns in _defs.tiles()],
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    kind = "compiled" if facts["operators"] == "binary" else "Python"
    print(f"anyflash {facts['version']}, {kind} operators")
    for name, file in facts["files"].items():
        size = f"{file['bytes'] // 1024} KiB" if file["present"] else "not built"
        print(f"  {name:26s} {size}")
    if kernels["error"]:
        print(f"  kernels                    not available: {kernels['error']}")
    for name, value in facts["build"].items():
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"  {name:26s} {text}")
    print(f"{len(facts['instances'])} compiled kernels")
    for instance in facts["instances"]:
        print("  " + "  ".join(f"{key} {value}" for key, value in instance.items()))
    print("tiles of attention on GPUs, the first that the GPU has the shared memory for")
    for tile in facts["tiles"]:
        print("  " + "  ".join(f"{key} {value}" for key, value in tile.items()))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from . import demo  # imports transformers and matplotlib

    return demo.main(options)


class _Locate(argparse.Action):
    """An option that prints the path of a file for C++ programs."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        _files.answer(self.option_strings[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m anyflash", description="flash_attn that always imports and always runs"
    )
    parser.add_argument("--version", action="version", version=f"anyflash {__version__}")
    for option, what in (
        ("--cmake-dir", "print the folder for find_package(anyflash), and exit"),
        ("--library", "print the library that registers the operators in C++, and exit"),
    ):
        parser.add_argument(option, action=_Locate, nargs=0, help=what)
    commands = parser.add_subparsers(dest="command")

    command = commands.add_parser(
        "doctor", help="what is installed, what will run, what to do about problems"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.add_argument(
        "--no-probe", action="store_true", help="do not try to import other flash_attn copies"
    )
    command.set_defaults(run=_doctor.main)

    command = commands.add_parser("info", help="what was built: version, architectures, kernels")
    command.add_argument("--json", action="store_true", help="machine-readable output")
    command.set_defaults(run=_info)

    command = commands.add_parser(
        "explain", help="which back end runs a shape, and why no other does"
    )
    add_explain_arguments(command)
    command.set_defaults(run=explain_main)

    command = commands.add_parser(
        "demo", help="a sentence-embedding model and a small language model through flash_attn"
    )
    command.add_argument("--out", default="out/demo", help="folder for demo.json and demo.png")
    command.add_argument("--short", action="store_true", help="a few sentences and steps only")
    command.set_defaults(run=_demo)
    return parser


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments or ["doctor"])
    return options.run(options)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # `| head` ends this program as it ends others; not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
