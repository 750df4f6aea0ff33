"""The version of anyflash, written here only: pyproject.toml and CMakeLists.txt read this line."""

__version__ = "0.1.0"
