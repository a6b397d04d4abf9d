"""What ran: the versions that reports, logs and records name."""

import importlib.metadata
import platform

from moesaic import __version__


def versions(*packages: str) -> dict[str, str]:
    """moesaic, Python and torch with its build ("2.15.0+cu132"; what pip knows of it says "2.15.0" alone), and of
    `packages` those that are installed."""
    import torch

    found = {"moesaic": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return found | {name: version for name in packages if (version := _installed(name))}


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
