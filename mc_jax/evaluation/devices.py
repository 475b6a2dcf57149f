"""All devices of this process for an evaluation, laid out as for training."""

import contextlib
import math
from collections.abc import Generator

import jax

from mc_jax.config import Config, MeshConfig
from mc_jax.parallel import make_mesh


@contextlib.contextmanager
def all_devices(config: Config) -> Generator[None]:
    """Load and measure runs on a mesh of all devices, if there are several.

    They split the windows of a batch and, as far as that divides its width evenly, the model's weights.
    """
    devices = jax.devices()
    if len(devices) == 1:
        yield
        return
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=math.gcd(len(devices), config.model.model_dim)), devices)):
        yield
