"""Where and with what numbers were measured: hardware, versions, commit, date."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moesaic.versions import versions

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMINFO = Path("/proc/meminfo")
CONTAINERS = (  # where the kernel says what a container's memory is limited to and what it has taken: cgroups 2 and 1
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# what decides how fast a matmul of each dtype can be
ISA_FLAGS = (
    *("avx2", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
TUNING = (  # variables that change what is fast
    *("ONEDNN_", "DNNL_", "MKL_", "OMP_", "KMP_", "GOMP_", "ATEN_CPU_"),
    *("MALLOC_", "LD_PRELOAD", "GLIBC_TUNABLES"),  # new gradients are page faults
)
# of float32, as oneDNN refuses bfloat16 on CPUs without AVX-512; torch.mm would leave float32 to MKL
ASK_ONEDNN = """
import torch
x = torch.ones(64, 64)
with torch.backends.mkldnn.verbose(1):
    torch.ops.mkldnn._linear_pointwise(x, x, None, "none", [], "")
"""


def machine() -> dict[str, Any]:
    """Hardware, versions and the date. Asks oneDNN in a child process what it uses, which takes seconds."""
    import torch

    return {
        "cpu": _cpu_field("model name") or platform.processor() or platform.machine(),
        "cores": num_cores(),
        "isa": machine_flags(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "onednn_isa": onednn_isa(),
        "l2_bytes": cache_bytes(2),
        "l3_bytes": cache_bytes(3),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "versions": versions("transformers"),
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(TUNING)},
        "commit": commit(),
        "sources": sources(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine_flags() -> list[str]:
    """Those of ISA_FLAGS that the CPU has."""
    has = _cpu_field("flags").split()
    return [flag for flag in ISA_FLAGS if flag in has]


def num_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(level: int, caches: Path = CACHES) -> int | None:
    """Size of one cache of that level, or None where the system does not say."""
    for index in sorted(caches.glob("index*")):
        try:
            kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
            if int((index / "level").read_text()) == level and kind != "Instruction":
                return int(size.rstrip("KMG")) * UNITS.get(size[-1], 1)
        except (OSError, ValueError):
            continue
    return None


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, and within a container's limit; None where the system does not say."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", MEMINFO.read_text())
    except OSError:
        return None
    left = [int(found[1]) << 10] if found else []
    for folder, limit, used in CONTAINERS:
        with suppress(OSError, ValueError, IndexError):  # "max" where there is no limit
            files = re.findall(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
            taken = int((folder / used).read_text()) - int(files[-1])  # files that nobody reads give way
            left.append(max(int((folder / limit).read_text()) - taken, 0))
    return min(left, default=None)


def onednn_isa() -> str:
    """The instructions oneDNN really uses: ONEDNN_MAX_CPU_ISA may hold it below what the CPU has."""
    asked = subprocess.run([sys.executable, "-c", ASK_ONEDNN], capture_output=True, text=True, check=False)
    found = re.search(r"info,cpu,isa:(.*)", asked.stdout)
    return found[1].strip() if found else "unknown"


def commit() -> str | None:
    """Commit of the checkout the package runs from, with a + where files differ from it; None outside of one."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=10"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return None
    tracked = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True, check=False
    )
    return described.stdout.strip() or None if described.returncode == tracked.returncode == 0 else None


def sources() -> str:
    """Digest of the package's files as they are, which may be ahead of the commit."""
    together = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        together.update(path.read_bytes())
    return together.hexdigest()[:12]


def _cpu_field(name: str) -> str:
    try:
        found = re.search(rf"^{name}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""
