"""Our side of scripts/bench_layers, and the whole of what it prints: see its --help.

Both sides are pinned to one core and run in turn, ours first, pair after pair. Ratios are of processor time:
other work on the core takes wall time from either side, but no processor time.

Shapes: B batch, T tokens, L segment, S segments, H heads, K key dim (and value dim), D model, E hidden dim.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
_ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(_ROOT))

import jax  # noqa: E402 (after the platform is chosen)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mc_jax import memory_caching  # noqa: E402

_RECORD = _ROOT / "tests/caching/data/memory_caching_0_1_0.npz"
_AGGREGATIONS = ("residual", "gated", "soup", "sparse")
_PROJECTIONS = ("q", "k", "v", "u", "o")
_HEADS, _TOP_K = 4, 2
# The shapes of docs and both packages' own examples differ; these are the ones that the targets name.
_BATCH, _KEY_DIM, _SEGMENT = 2, 32, 64
_MLP_DIM, _MLP_CHUNK = 128, 64
_MIB = 2**20


class Torch:
    """The process of scripts/_bench_layers_torch.py."""

    def __init__(self, python: str) -> None:
        """Start it, on the same core as this one."""
        script = _ROOT / "scripts/_bench_layers_torch.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def do(self, command: str, **arguments: object) -> dict[str, float]:
        """Have a command carried out and return its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("bench_layers: error: the PyTorch side stopped; its own words are above")
        return json.loads(answer)


def timed(run) -> dict[str, float]:
    """Run once and return wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}


def time_pairs(name: str, ours, torch: Torch, *, pairs: int, ours_each: int) -> None:
    """Print the medians of both sides, run in turn; ours `ours_each` times a pair, since it is short."""
    ours_times, torch_times = [], []
    jax.block_until_ready(ours())  # compiles
    for _ in range(pairs):
        ours_times += [timed(ours) for _ in range(ours_each)]
        torch_times.append(torch.do("run"))
    kinds = ("processor", "wall")
    ours_median, torch_median = (
        {kind: 1e3 * statistics.median(one[kind] for one in times) for kind in kinds}
        for times in (ours_times, torch_times)
    )
    processor, wall = (torch_median[kind] / ours_median[kind] for kind in kinds)
    print(
        f"{name:<34}{ours_median['processor']:>12.1f}{torch_median['processor']:>12.1f}"
        f"{processor:>10.2f}{wall:>12.2f}",
        flush=True,
    )


def print_times_head(title: str, other: str) -> None:
    """Print the head of a table of times."""
    print(f"\n{title}")
    print(f"{'forward and backward, one core':<34}{'mc_jax ms':>12}{other + ' ms':>12}", end="")
    print(f"{'times':>10}{'times, wall':>12}")


def sums_of_keys(u: jax.Array, k: jax.Array, segment_length: int) -> tuple[jax.Array, jax.Array]:
    """Return router queries and online logits [B, T, H] with which scores are <u, sum of keys>.

    memory-caching pools running sums of a segment's keys where our router takes their mean.
    """
    batch, length, *rest = k.shape
    k = jnp.pad(k, [(0, 0), (0, -length % segment_length), (0, 0), (0, 0)])
    running = jnp.cumsum(k.reshape(batch, -1, segment_length, *rest), axis=2)
    running = running.reshape(batch, -1, *rest)[:, :length]
    return segment_length * u, jnp.sum(u * running, axis=-1)


def caching_loss(arrays: dict[str, jax.Array], target: jax.Array, *, aggregation: str, segment_length: int):
    """Return sum(y * target) and y, of the layer around memory_caching that memory-caching has."""
    batch, length, _ = arrays["x"].shape
    q, k, v, u = (
        (arrays["x"] @ arrays[name]).reshape(batch, length, _HEADS, -1) for name in _PROJECTIONS[:4]
    )
    router = {}
    if aggregation != "residual":
        router["u"], router["online_logit"] = sums_of_keys(u, k, segment_length)
    y, _ = memory_caching(
        q,
        k,
        v,
        **router,
        aggregation=aggregation,
        segment_length=segment_length,
        top_k=_TOP_K if aggregation == "sparse" else None,
        chunk_length=segment_length,
    )
    y = y.reshape(batch, length, -1) @ arrays["o"]
    return jnp.sum(y * target), y


def caching_arrays(rng: np.random.Generator, dtype, *, batch: int, length: int, dim: int) -> dict:
    """Return an input, a target and square projections; u's is small, or softmaxes over sums are one-hot."""
    arrays = {name: rng.normal(size=(batch, length, dim)) for name in ("x", "target")}
    for name in _PROJECTIONS:
        arrays[name] = rng.normal(size=(dim, dim)) * dim**-0.5 * (0.05 if name == "u" else 1.0)
    return {name: array.astype(dtype) for name, array in arrays.items()}


def largest_difference(actual: jax.Array, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest element."""
    return float(np.max(np.abs(np.asarray(actual) - expected)) / np.max(np.abs(expected)))


def compare_caching(torch: Torch, folder: pathlib.Path, *, quick: bool) -> None:
    """Print times and agreement of memory_caching and memory-caching's layer."""
    length = 256 if quick else 2048
    dim = _HEADS * _KEY_DIM
    arrays = caching_arrays(np.random.default_rng(0), np.float32, batch=_BATCH, length=length, dim=dim)
    np.savez(folder / "caching.npz", **arrays)
    target = jnp.asarray(arrays.pop("target"))
    arrays = {name: jnp.asarray(array) for name, array in arrays.items()}
    print_times_head(
        f"Linear memory, T = {length}, B = {_BATCH}, {_HEADS} heads x {_KEY_DIM}, segment {_SEGMENT}, "
        "checkpoint segments, beside memory-caching 0.1.0",
        "torch",
    )
    differences = []
    for aggregation in _AGGREGATIONS:
        loss = functools.partial(caching_loss, aggregation=aggregation, segment_length=_SEGMENT)
        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        torch.do(
            "caching",
            arrays=str(folder / "caching.npz"),
            aggregation=aggregation,
            heads=_HEADS,
            segment_length=_SEGMENT,
            top_k=_TOP_K,
        )
        ours = functools.partial(step, arrays, target)
        time_pairs(aggregation, ours, torch, pairs=3 if quick else 2, ours_each=5)
        torch.do("save", path=str(folder / "found.npz"))
        found = np.load(folder / "found.npz")
        (_, y), gradients = ours()
        differences.append(
            (
                aggregation,
                largest_difference(y, found["y"]),
                max(
                    largest_difference(gradients[name], found[f"{name}_bar"])
                    for name in arrays
                    if f"{name}_bar" in found
                ),
            )
        )
    print("\nLargest relative difference from memory-caching 0.1.0, float32, same weights and inputs")
    print(f"{'':<34}{'values':>12}{'gradients':>12}")
    for name, value, gradient in differences:
        print(f"{name:<34}{value:>12.1e}{gradient:>12.1e}", flush=True)


def mlp_loss(parameters: dict[str, jax.Array], x: jax.Array, target: jax.Array):
    """Return sum(y * target) of a Titans layer: norm, projections, coefficients from x, an MLP memory."""
    batch, length, dim = x.shape
    normed = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    q, k, v = ((normed @ parameters[name])[:, :, None] for name in ("q", "k", "v"))
    q, k = (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6) for y in (q, k))
    retention, momentum, step = jnp.split(jax.nn.sigmoid(normed @ parameters["coefficients"]), 3, axis=-1)
    y, _ = memory_caching(
        q,
        k,
        v,
        memory="titans",
        aggregation="none",
        retention=retention,
        momentum=momentum,
        step=step / (2 * _MLP_CHUNK),  # a chunk is one gradient step of all its tokens
        initial_state=(parameters["w_in"], parameters["w_out"]),
        segment_length=length,
        chunk_length=_MLP_CHUNK,
        branch="plain",  # as theirs
    )
    return jnp.sum(y.reshape(batch, length, dim) * target)


def compare_mlp(torch: Torch, *, quick: bool) -> None:
    """Print times of an MLP memory and titans-pytorch's, with its gradients taken where ours are and not."""
    length = 256 if quick else 2048
    dim, hidden = _MLP_DIM, 4 * _MLP_DIM
    rng = np.random.default_rng(0)
    shapes = {
        **dict.fromkeys(("q", "k", "v"), (dim, dim)),
        "coefficients": (dim, 3),
        "w_in": (1, dim, hidden),
        "w_out": (1, hidden, dim),
    }
    parameters = {
        name: jnp.asarray(rng.normal(size=shape) * shape[-2] ** -0.5, jnp.float32)
        for name, shape in shapes.items()
    }
    x, target = (jnp.asarray(rng.normal(size=(1, length, dim)), jnp.float32) for _ in range(2))
    step = jax.jit(jax.value_and_grad(mlp_loss, argnums=(0, 1)))
    ours = functools.partial(step, parameters, x, target)
    print_times_head(
        f"MLP memory (titans), T = {length}, B = 1, one head, dim {dim}, hidden {hidden}, "
        f"chunk {_MLP_CHUNK}, beside titans-pytorch 0.5.5",
        "torch",
    )
    for fresh, name in (
        (True, "gradients at each chunk's start"),
        (False, "all at the sequence's start"),
    ):
        torch.do("titans", length=length, dim=dim, chunk_length=_MLP_CHUNK, fresh=fresh)
        torch.do("run")  # its first run is slower
        time_pairs(name, ours, torch, pairs=9, ours_each=1)
    print("(ours takes them at each chunk's start in both rows; theirs by default at the sequence's start)")


def print_memory(*, quick: bool) -> None:
    """Print what XLA sets aside for forward and backward beside the cache and a state a token."""
    print(
        f"\nTemporary memory of forward and backward, MiB: linear, gated, B = {_BATCH}, {_HEADS} heads, "
        f"segment {_SEGMENT}"
    )
    print(
        f"{'key dim':<10}{'T':<8}{'mc_jax':>10}{'cache':>10}{'gates':>10}{'a state a token':>18}{'times':>8}"
    )
    for key_dim in (_KEY_DIM, 4 * _KEY_DIM):
        for length in (256, 512) if quick else (1024, 2048, 4096, 8192):
            used = caching_memory(length, key_dim)
            rows, segments, state = _BATCH * _HEADS, length // _SEGMENT, 4 * key_dim**2
            cache, gates, naive = (
                size / _MIB
                for size in (rows * segments * state, 4 * rows * length * segments, rows * length * state)
            )
            print(
                f"{key_dim:<10}{length:<8}{used:>10.1f}{cache:>10.1f}{gates:>10.1f}{naive:>18.1f}"
                f"{naive / used:>8.2f}",
                flush=True,
            )


def caching_memory(length: int, key_dim: int) -> float:
    """Return the temporary MiB of a layer's forward and backward, as XLA plans them: nothing is run."""
    arrays = caching_arrays(
        np.random.default_rng(0), np.float32, batch=_BATCH, length=length, dim=_HEADS * key_dim
    )
    arrays = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    target = arrays.pop("target")
    loss = functools.partial(caching_loss, aggregation="gated", segment_length=_SEGMENT)
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(arrays, target).compile()
    return compiled.memory_analysis().temp_size_in_bytes / _MIB


def record(torch: Torch, folder: pathlib.Path) -> None:
    """Write what the test of agreement compares with: float64, 5 segments and a short one."""
    segment_length = 4
    arrays = caching_arrays(np.random.default_rng(0), np.float64, batch=1, length=22, dim=_HEADS * 3)
    arrays["u"] *= 10
    arrays["o"] = np.eye(_HEADS * 3)
    np.savez(folder / "caching.npz", **arrays)
    recorded = {"segment_length": np.int64(segment_length), "top_k": np.int64(_TOP_K)}
    for aggregation in _AGGREGATIONS:
        torch.do(
            "caching",
            arrays=str(folder / "caching.npz"),
            aggregation=aggregation,
            heads=_HEADS,
            segment_length=segment_length,
            top_k=_TOP_K,
        )
        torch.do("run")
        torch.do("save", path=str(folder / "found.npz"))
        found = np.load(folder / "found.npz")

        def per_head(name: str, found=found) -> np.ndarray:
            return found[name].reshape(*found[name].shape[:2], _HEADS, -1)

        recorded |= {name: per_head(f"projected_{name}") for name in _PROJECTIONS[:4]}
        recorded["target"] = arrays["target"].reshape(recorded["q"].shape)
        recorded[f"{aggregation}_y"] = per_head("y")
        for name in _PROJECTIONS[:4]:
            if f"projected_{name}_bar" in found:
                recorded[f"{aggregation}_{name}_bar"] = per_head(f"projected_{name}_bar")
    _RECORD.parent.mkdir(exist_ok=True)
    np.savez_compressed(_RECORD, **recorded)
    print(f"wrote {_RECORD.relative_to(_ROOT)}, {_RECORD.stat().st_size} bytes")


def main() -> None:
    """Measure what is asked for; scripts/bench_layers has checked the arguments."""
    parser = argparse.ArgumentParser()
    parser.add_argument("torch")
    parser.add_argument("parts", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_intermixed_args()
    parts = arguments.parts or ["caching", "mlp", "memory"]
    # Before JAX and torch make their threads, which then share this core.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch = Torch(arguments.torch)
    with tempfile.TemporaryDirectory() as name:
        if arguments.record:
            record(torch, pathlib.Path(name))
            return
        if "caching" in parts:
            compare_caching(torch, pathlib.Path(name), quick=arguments.quick)
        if "mlp" in parts:
            compare_mlp(torch, quick=arguments.quick)
        if "memory" in parts:
            print_memory(quick=arguments.quick)


if __name__ == "__main__":
    main()
