"""PyInstaller: the compiled operators and kernels, and what the doctor reads."""

from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, copy_metadata

binaries = collect_dynamic_libs("anyflash")
datas = [*collect_data_files("anyflash", includes=["_build.json"]), *copy_metadata("anyflash")]
hiddenimports = ["anyflash._lists"]
