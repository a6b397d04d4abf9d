"""What the JSON of steps, stats, diff and what-if begins with: program, command, and the records that were read."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesaic.trace.store import Trace


def provenance(*records: "tuple[Path | None, Trace]") -> dict[str, Any]:
    """The same keys everywhere; a record's are those of `moesaic trace --json`. Its file is None where it was made by
    the command itself."""
    import torch

    from moesaic import __version__

    return {
        "moesaic": __version__,
        "torch": str(torch.__version__),
        "command": shlex.join(["moesaic", *sys.argv[1:]]),
        "records": [
            {
                "file": None if file is None else str(file),
                "model": trace.model,
                "config": trace.configs[0].digest() if trace.configs else None,
                "seed": trace.seed,
                "versions": dict(trace.versions),
                "layers": list(trace.layers),
                "origins": list(trace.origins),
                "missing": list(trace.missing),
            }
            for file, trace in records
        ],
    }
