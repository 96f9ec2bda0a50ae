"""Our native libraries: plain C interfaces, built with the package, loaded with ctypes.

All of them are optional: ``load`` tells why one is not there, and whoever asked does without it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# By name of a function what it returns and takes, as ctypes has it.
Signatures = Mapping[str, tuple[Any, list[Any]]]


def load(
    package: str, folders: Iterable[str], version_of: str, version: int, signatures: Signatures
) -> tuple[ctypes.CDLL | None, str]:
    """Load the library of a package.

    Args:
        folders: of the package. An editable install has two: the sources, and site-packages with
            what was built.
        version_of: the function that tells the version of the interface.
        version: that this package needs.

    Returns:
        The library, and where it is or why it is not.
    """
    places = [Path(folder) / "_native" for folder in folders]
    names = (f"lib{package}.so", f"lib{package}.dylib", f"{package}.dll")
    candidates = (place / name for place in places for name in names)
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        return None, f"no library in {', '.join(map(str, places))}"
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, version_of)()
    except (OSError, AttributeError) as error:
        return None, f"{path} does not load: {error}"
    if found != version:
        return None, f"{path} has interface version {found}; this package needs {version}"
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, str(path)
