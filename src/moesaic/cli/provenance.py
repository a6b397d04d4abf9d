"""What the JSON of every command about records and gates begins with: program, command, the records read or written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.trace.store import Trace


def provenance(*records: "tuple[Path | None, Trace]") -> dict[str, Any]:
    """The same keys everywhere. The file of a record is None where it was made by
    the command itself."""
    import torch

    from moesaic import __version__
    from moesaic.cli.output import config_of, typed

    return {
        "moesaic": __version__,
        "torch": str(torch.__version__),
        "command": typed(),
        "records": [
            {
                "file": None if file is None else str(file),
                "model": trace.model,
                "config": config_of(trace),
                "seed": trace.seed,
                "versions": dict(trace.versions),
                "layers": list(trace.layers),
                "origins": list(trace.origins),
                "missing": list(trace.missing),
            }
            for file, trace in records
        ],
    }
