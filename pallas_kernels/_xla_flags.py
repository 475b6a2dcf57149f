"""What XLA must be told before it starts: on CPUs it fuses some operations wrongly.

XLA hands groups of operations to the library YNNPACK. In jaxlib 0.12.0.1 a group of more than one product can
read memory that nothing has written: a titans memory of depth 2 whose segments are one chunk gave numbers
that were wrong, or NaN, and differed from run to run (docs/results.md, "XLA on CPUs"). The flag is known to
jaxlib 0.11.2 as well.
"""

import os
from pathlib import Path

_GOOGLE = "0x1ae0"  # the maker's number on the PCI bus
_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_ONE_PRODUCT_A_CALL = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


def call_libraries_for_single_products(devices: Path = Path("/sys/bus/pci/devices")) -> None:
    """Let XLA call libraries for single products alone; to be called before JAX starts a backend.

    What XLA_FLAGS says of it already stays. A machine with TPUs computes there, and its libtpu, which reads
    the same flags, may not know this one: nothing is changed.

    Args:
      devices: a folder with a folder for each device on the PCI bus, with its maker in a file `vendor`.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    has_tpu = any(vendor.read_text().strip() == _GOOGLE for vendor in devices.glob("*/vendor"))
    if _FLAG not in flags and not has_tpu:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}={_ONE_PRODUCT_A_CALL}".strip()
