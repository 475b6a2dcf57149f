"""The PyTorch side of scripts/bench_layers: makes layers, runs them and writes what they find, as it is told.

A command is a line of JSON on standard input, and so is the answer on standard output. Runs on Python 3.11.
"""

import json
import pathlib
import sys
import time

import numpy as np
import torch
from memory_caching import LinearMemoryBackend, MCConfig, MemoryCachingLayer
from titans_pytorch import NeuralMemory

PROJECTIONS = ("q", "k", "v", "u", "o")
# What the package calls our aggregations.
NAMES = {"residual": "residual", "gated": "grm", "soup": "soup", "sparse": "ssc"}


class Caching:
    """memory-caching's layer with the weights and the input of a file."""

    def __init__(self, *, arrays: str, aggregation: str, heads: int, segment_length: int, top_k: int) -> None:
        """Read float32 or float64 arrays: x, target, and a matrix for every projection."""
        loaded = {name: torch.from_numpy(array) for name, array in np.load(arrays).items()}
        self.x, self.target = loaded["x"].requires_grad_(), loaded["target"]
        config = MCConfig(
            d_model=self.x.shape[-1],
            num_heads=heads,
            aggregation=NAMES[aggregation],
            segment_size=segment_length,
            state_init_mode="checkpoint",
            ssc_top_k=top_k,
        )
        self.layer = MemoryCachingLayer(config=config, backend=LinearMemoryBackend()).to(self.x.dtype)
        self.projected: dict[str, torch.Tensor] = {}
        for name in PROJECTIONS:
            projection = getattr(self.layer, f"{name}_proj")
            projection.weight.data = loaded[name].T.contiguous()
            projection.register_forward_hook(self._keeper(name))

    def _keeper(self, name: str):
        def keep(module, inputs, output):
            output.retain_grad()
            self.projected[name] = output

        return keep

    def run(self) -> None:
        """Forward and backward."""
        self.layer.zero_grad()
        self.x.grad = None
        self.y = self.layer(self.x)
        torch.sum(self.y * self.target).backward()

    def found(self) -> dict[str, np.ndarray]:
        """What the last run found: y, the gradients, and the projections with theirs."""
        tensors = {"y": self.y, "x_bar": self.x.grad}
        for name in PROJECTIONS:
            gradient = getattr(self.layer, f"{name}_proj").weight.grad
            if gradient is not None:  # residual does not look at u
                tensors[f"{name}_bar"] = gradient.T
                tensors[f"projected_{name}_bar"] = self.projected[name].grad
            tensors[f"projected_{name}"] = self.projected[name]
        return {name: tensor.detach().numpy() for name, tensor in tensors.items()}


class Titans:
    """titans-pytorch's NeuralMemory as it comes, with one head and an MLP of depth 2, 4 times as wide."""

    def __init__(self, *, length: int, dim: int, chunk_length: int, fresh: bool) -> None:
        """Take gradients at every chunk's own start (`fresh`), or all at the sequence's start."""
        torch.manual_seed(0)
        self.layer = NeuralMemory(
            dim=dim, chunk_size=chunk_length, batch_size=chunk_length if fresh else None
        )
        self.x = torch.randn(1, length, dim, requires_grad=True)
        self.target = torch.randn(1, length, dim)

    def run(self) -> None:
        """Forward and backward."""
        self.layer.zero_grad()
        self.x.grad = None
        y, _ = self.layer(self.x)
        torch.sum(y * self.target).backward()


def main() -> None:
    """Carry out commands until standard input ends."""
    torch.set_num_threads(1)
    case: Caching | Titans | None = None
    for line in sys.stdin:
        command = json.loads(line)
        answer: dict[str, float] = {}
        match command.pop("do"):
            case "caching":
                case = Caching(**command)
            case "titans":
                case = Titans(**command)
            case "run":
                wall, processor = time.perf_counter(), time.process_time()
                case.run()
                answer = {
                    "wall": time.perf_counter() - wall,
                    "processor": time.process_time() - processor,
                }
            case "save":
                np.savez(pathlib.Path(command["path"]), **case.found())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
