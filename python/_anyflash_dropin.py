"""The start-up hook of anyflash: makes ``import flash_attn`` find ``anyflash/dropin``.

``anyflash.pth`` (and, from Python 3.15 on, ``anyflash.start``) call ``install()`` in every
interpreter start. So it uses only modules that ``site`` has already imported, imports neither
torch nor anyflash, and never raises.

The environment variable ``ANYFLASH_DROPIN`` steers it: unset or ``1`` puts the folder before
every installed package, ``append`` behind them (a working flash-attn then wins), ``0`` leaves
``sys.path`` alone. So does anyflash's wheel called flash-attn: then that serves the import, under
the name and version that its user chose.
"""

import os
import sys

_OFF = ("0", "off", "no", "false")
_SITE = ("site-packages", "dist-packages")


def install():
    """Puts the folder of the drop-in on ``sys.path``.

    Returns:
        The folder, or None if it was there already, is missing, or is not wanted.
    """
    mode = os.environ.get("ANYFLASH_DROPIN", "1").strip().lower()
    here = os.path.dirname(os.path.abspath(__file__))
    folder = os.path.join(here, "anyflash", "dropin")
    if mode in _OFF or folder in sys.path or not os.path.isdir(folder):
        return None
    sites = [p for p in sys.path if os.path.basename(p) in _SITE or p == here]
    if any(os.path.isfile(os.path.join(p, "flash_attn", "_companion.py")) for p in sites):
        return None
    # Just before the first site directory (or the one that holds this file): behind the standard
    # library, the script's folder and PYTHONPATH, so a user's own checkout wins; ahead of every
    # installed flash-attn, also a broken one.
    position = len(sys.path)
    if mode != "append":
        position = sys.path.index(sites[0]) if sites else position
    sys.path.insert(position, folder)
    return folder
