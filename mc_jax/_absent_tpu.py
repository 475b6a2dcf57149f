"""libtpu on a machine without a TPU: there it compiles for TPUs that are elsewhere."""

import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # the maker's number on the PCI bus


def quiet_libtpu(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Keep libtpu from asking the network for this machine's TPU where there is none, and from complaining.

    Call it before JAX starts a backend. What the environment says already stays.

    Args:
      devices: a folder with a folder for each device on the PCI bus, with its maker in a file `vendor`.
    """
    if any(vendor.read_text().strip() == _GOOGLE for vendor in devices.glob("*/vendor")):
        return
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is locked, for no chip is held
    }.items():
        os.environ.setdefault(name, value)
