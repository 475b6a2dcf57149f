"""Our side of scripts/gpu_check: one part of it, in a process of its own.

Shapes: B batch, T tokens, H heads, K key dim (and value dim), N states.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_check_cases import (
    AGGREGATIONS,
    MEMORIES,
    TOP_K,
    Size,
    arguments,
    compared,
    drawn,
    is_wanted,
    median_milliseconds,
    one_line,
    say,
    sizes,
)

from mc_jax import memory_caching
from mc_jax.memories import _matrix
from pallas_kernels import gated_state_read

_GRADIENTS = ("q", "k", "v")
# A reference's gradient keeps the state after every token: of rows up to this.
_LONGEST_GRADIENT = 4096
_SECONDS_A_CASE, _QUICK_SECONDS = 2.0, 0.02


@dataclasses.dataclass(frozen=True)
class Case:
    """Something that is timed."""

    what: str
    """As the table calls it; the name of its reference, too."""
    path: str
    """The way in which it is computed."""
    size_name: str
    size: Size
    function: Callable[..., Any]
    """From the arguments to reads [B, T, H, V] and gradients by name."""
    arguments: Callable[[Callable[[str], jax.Array]], dict[str, jax.Array]]
    """From a function that makes an array of what was drawn under a name to the arguments."""
    reference: Callable[..., Any] | None = None
    """A function like that, on the CPU, of the first row and head in float32."""

    @property
    def row(self) -> dict:
        """What the table tells of it whatever comes of it."""
        tokens = self.size.rows * self.size.tokens
        return {"what": self.what, "size": self.size.name, "path": self.path, "tokens": tokens}

    @property
    def reference_name(self) -> str:
        """Of a file."""
        return f"{self.what}, {self.size_name}".replace(" ", "_")


def layer(values, *, memory, aggregation, size: Size, **options):
    """Return a layer's reads times their target, summed, and the reads."""
    values = dict(values)
    target = values.pop("target")
    y, _ = memory_caching(
        **values,
        memory=memory,
        aggregation=aggregation,
        top_k=TOP_K if aggregation == "sparse" else None,
        segment_length=size.segment,
        chunk_length=size.chunk,
        **options,
    )
    return jnp.sum((y * target).astype(jnp.float32)), y


def with_gradients(run: Callable, values):
    """Return the reads of `layer`, and the gradients with respect to all but the target."""
    others = {name: x for name, x in values.items() if name != "target"}
    target = values["target"]
    (_, y), bars = jax.value_and_grad(lambda others: run(others | {"target": target}), has_aux=True)(others)
    return y, bars


def without_gradients(run: Callable, values):
    """Return the reads of `layer`, and no gradients."""
    return run(values)[1], {}


def layer_case(size_name: str, size: Size, memory: str, aggregation: str, path: str, **options) -> Case:
    """Return a layer's core, forward and backward."""
    run = functools.partial(layer, memory=memory, aggregation=aggregation, size=size)
    short = size.tokens <= _LONGEST_GRADIENT
    plainly = functools.partial(run, implementation="reference")
    return Case(
        what=f"{memory}, {aggregation}",
        path=path,
        size_name=size_name,
        size=size,
        function=functools.partial(with_gradients, functools.partial(run, **options)),
        arguments=functools.partial(arguments, size, memory, aggregation),
        reference=functools.partial(with_gradients if short else without_gradients, plainly),
    )


def read_case(size_name: str, size: Size, path: str, implementation: str) -> Case:
    """Return the dense read alone, forward."""

    def read(values, implementation):
        return gated_state_read(**values, segment_length=size.segment, implementation=implementation), {}

    return Case(
        what="dense read alone, forward",
        path=path,
        size_name=size_name,
        size=size,
        function=functools.partial(read, implementation=implementation),
        arguments=lambda array: {name: array(name) for name in ("q", "gates", "states")},
        reference=functools.partial(read, implementation="xla"),
    )


def cases(part: str, quick: bool) -> list[Case]:
    """Return what a part measures, the cheapest first."""
    found = []
    for size_name, size in sizes(quick).items():
        make = functools.partial(layer_case, size_name, size)
        if part == "mosaic":
            found += [
                read_case(size_name, size, "XLA", "xla"),
                read_case(size_name, size, "Mosaic GPU", "gpu"),
                *(make(memory, "gated", "Mosaic GPU read") for memory in MEMORIES),
            ]
        elif part == size_name:
            found += [make(memory, how, "XLA") for how in AGGREGATIONS for memory in MEMORIES]
            found += [
                make(memory, "none", "XLA, a loop", implementation="xla") for memory in ("linear", "delta")
            ]
            # "XLA" groups tokens by state where there are so many.
            found.append(make("linear", "sparse", "XLA, all states read", selected_read="dense"))
    return found


def dtype_of(name: str) -> Any:
    """Return the dtype in which a layer is given what has this name."""
    return jnp.bfloat16 if name in ("q", "k", "v", "u", "target") else jnp.float32


@functools.cache
def on_device(size: Size, name: str) -> jax.Array:
    """Return what was drawn, on the default device."""
    return jnp.asarray(drawn(size, name), dtype_of(name))


def values_of(case: Case) -> dict[str, jax.Array]:
    """Return a case's arguments on the default device."""
    return case.arguments(functools.partial(on_device, case.size))


def first(x: Any) -> Any:
    """Return what belongs to the first row and head."""
    return x[:1, :, :1]


def kept_of(y: jax.Array, bars: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return reads and gradients of the first row and head [T, K], which are compared."""
    kept = {"y": y} | {name: bars[name] for name in _GRADIENTS if name in bars}
    return {name: first(x)[0, :, 0].astype(jnp.float32) for name, x in kept.items()}


def save_reference(case: Case, folder: pathlib.Path) -> None:
    """Compute on the CPU, from the numbers that the device gets, unless another part has done so."""
    file = folder / f"{case.reference_name}.npz"
    if case.reference is None or file.exists():
        return

    def rounded(name: str) -> jax.Array:
        return jnp.asarray(first(drawn(case.size, name)), dtype_of(name)).astype(jnp.float32)

    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("float32"):
        kept = jax.jit(lambda values: kept_of(*case.reference(values)))(case.arguments(rounded))
    unfinished = file.with_suffix(f".{os.getpid()}.npz")
    np.savez(unfinished, **{name: np.asarray(x) for name, x in kept.items()})
    unfinished.rename(file)


def compile_case(case: Case) -> tuple[Any, float]:
    """Return the compiled program, and the seconds that it took."""

    def watched(values):
        results = case.function(values)
        finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(results)]).all()
        return results, kept_of(*results), finite

    begin = time.perf_counter()
    compiled = jax.jit(watched).lower(values_of(case)).compile()
    return compiled, time.perf_counter() - begin


def measure(case: Case, compiled: Any, folder: pathlib.Path, seconds: float) -> dict:
    """Run a compiled program: whether it is right, and how long it takes."""
    values = values_of(case)
    _, kept, finite = compiled(values)
    row = compared(folder, case.reference_name, {name: np.asarray(x) for name, x in kept.items()})
    row["agrees"] = row.get("agrees", True) and bool(finite)
    row |= median_milliseconds(lambda: compiled(values), jax.block_until_ready, seconds)
    row["tokens_per_second"] = 1e3 * case.row["tokens"] / row["milliseconds"]
    memory = compiled.memory_analysis()
    if memory is not None:
        row["planned_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return row | {"peak_bytes_of_process": peak_bytes()}


def peak_bytes() -> int | None:
    """Return the most that the device's allocator has handed out at a time, in this process."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def run_cases(part: str, deadline: float, chosen: argparse.Namespace) -> None:
    """Compile side by side, then time one after another."""
    measured = [
        case for case in cases(part, chosen.quick) if is_wanted(f"{case.what}, {case.size_name}", chosen.only)
    ]
    if part == "mosaic" and jax.devices()[0].platform != "gpu":
        for case in measured:
            say(case.row | {"skipped": "its kernel is for Hopper GPUs"})
        return
    if part == "mosaic":
        _matrix.gated_state_read = functools.partial(gated_state_read, implementation="gpu")
    each = _QUICK_SECONDS if chosen.quick else _SECONDS_A_CASE
    for case in measured:
        values_of(case)  # before there are threads, which would all draw them
    # Few at a time, so that the first are ready early: each has XLA's own threads, too.
    threads = concurrent.futures.ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 4))
    programs = [threads.submit(compile_case, case) for case in measured]
    beside = concurrent.futures.ThreadPoolExecutor(2)
    references = [beside.submit(save_reference, case, chosen.references) for case in _one_of_each(measured)]
    # What is not ready then is given up: running takes some seconds each.
    ready_by = deadline - 1.5 * each * len(measured)
    concurrent.futures.wait([*programs, *references], timeout=max(1.0, ready_by - time.monotonic()))
    threads.shutdown(wait=False, cancel_futures=True)
    for case, program in zip(measured, programs, strict=True):
        row = dict(case.row)
        try:
            if program.cancelled() or not program.done():
                row["skipped"] = "was not compiled in time"
            elif time.monotonic() > deadline - 2 * each:
                row["skipped"] = "no time was left"
            else:
                compiled, seconds = program.result()
                row |= {"compile_seconds": seconds} | measure(case, compiled, chosen.references, each)
                row |= {} if all(one.done() for one in programs) else {"beside_compiling": True}
        except Exception as error:
            row["failed"] = one_line(error)
        say(row)
    for reference in references:
        if reference.done() and reference.exception() is not None:
            print(f"a reference failed: {reference.exception()!r}", file=sys.stderr)


def _one_of_each(measured: list[Case]) -> list[Case]:
    return list({case.reference_name: case for case in measured}.values())


def run_selftest(only: list[str]) -> None:
    """Compare every operation with its plain reference."""
    from mc_jax._selftest import cases, run_checks

    chosen = [case for case in cases() if is_wanted(case.name, only)]
    for check in run_checks(jax.devices()[0].platform, chosen):
        row = {"what": check.name, "path": check.implementation, "dtype": check.dtype, "agrees": check.passed}
        row |= {"difference": check.values, "gradient_difference": check.gradients}
        say(row | ({"failed": check.error} if check.error else {}))


def run_step(deadline: float, quick: bool, only: list[str]) -> None:
    """Time training steps of the paper's 170M recipe: all 128 rows of its batch, a few at a time."""
    from flax import nnx

    from experiments.paper import VOCABULARY, configs
    from mc_jax.nn.language_model import LanguageModel
    from mc_jax.planning.formulas import flops_of
    from mc_jax.training.optimizer import make_optimizer
    from mc_jax.training.step import init_state, make_step, split_model

    name = "170m-linear-gated"
    config, vocabulary, parts = configs()[name], VOCABULARY, 8
    if quick:
        model = dataclasses.replace(
            config.model,
            num_layers=1,
            model_dim=32,
            num_heads=2,
            mlp_dim=32,
            segment_length=16,
            chunk_length=8,
        )
        data = dataclasses.replace(config.data, context_length=32)
        training = dataclasses.replace(config.training, batch_size=4)
        config = dataclasses.replace(config, model=model, data=data, training=training)
        vocabulary, parts = 64, 2
    rows, tokens = config.training.batch_size, config.data.context_length
    row = {"what": f"training step, paper-{name}", "size": f"{rows} x {tokens:,}", "tokens": rows * tokens}
    if not is_wanted(row["what"], only):
        return
    row["path"] = f"XLA, {rows // parts} rows at a time, remat {config.training.remat}"
    try:
        optimizer = make_optimizer(config.training)

        def build():
            return LanguageModel(config.model, vocabulary, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=0))

        graph = nnx.graphdef(nnx.eval_shape(build))
        state = jax.jit(lambda: init_state(split_model(build())[1], optimizer))()
        drawn = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens + 1), np.int32)
        batch = {
            "inputs": jnp.asarray(drawn[:, :-1]),
            "targets": jnp.asarray(drawn[:, 1:]),
            "document_ids": jnp.zeros((rows, tokens), jnp.int32),
            "loss_mask": jnp.ones((rows, tokens), jnp.float32),
        }
        rate = jnp.float32(1e-4)
        begin = time.perf_counter()
        step = make_step(graph, optimizer, parts, config.training.remat)
        compiled = step.lower(state, batch, rate).compile()
        row["compile_seconds"] = time.perf_counter() - begin
        losses, times = [], []
        while len(times) < 4 and (len(times) < 2 or time.monotonic() + times[-1] < deadline):
            begin = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, batch, rate))
            times.append(time.perf_counter() - begin)
            losses.append(float(metrics["loss"]))
        seconds = float(np.median(times[1:]))  # the first one warms up
        flops = flops_of(config, state.parameters).step
        row |= {"milliseconds": 1e3 * seconds, "tokens_per_second": rows * tokens / seconds}
        row |= {"least": 1e3 * min(times[1:]), "most": 1e3 * max(times[1:])}
        row |= {"losses": losses, "teraflops_by_formula": flops / seconds / 1e12}
        # Random tokens: nothing is known at first, and one batch is learned by heart a little.
        row["agrees"] = bool(abs(losses[0] - np.log(vocabulary)) < 0.5 and losses[-1] < losses[0])
        row |= {"peak_bytes_of_process": peak_bytes()}
    except Exception as error:
        row["failed"] = one_line(error)
    say(row)


def main() -> None:
    """Run parts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="+", choices=("selftest", "4K", "32K", "mosaic", "step"))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--references", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.seconds
    if chosen.quick:
        jax.config.update("jax_disable_most_optimizations", True)
    device = jax.devices()[0]
    say({"device": {"platform": device.platform, "kind": device.device_kind}})
    for part in chosen.parts:
        if part == "selftest":
            run_selftest(chosen.only)
        elif part == "step":
            run_step(deadline, chosen.quick, chosen.only)
        else:
            run_cases(part, deadline, chosen)
    sys.stdout.flush()
    os._exit(0)  # a compilation that was given up would be waited for


if __name__ == "__main__":
    main()
