"""Every operation beside its plain reference, on whatever device there is.

Shapes: B batch, T tokens, H heads, K key dim (and value dim), E hidden dim, N states, k choices.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as ops
from pallas_kernels._state import OnlineState
from pallas_kernels.state_read import has_hopper_kernel

_B, _T, _H, _K, _E, _N = 2, 150, 4, 64, 128, 5
_SEGMENT, _CHUNK = 32, 16
# Largest root mean squares of differences, over those of the reference: of values, of gradients. Accelerators
# multiply float32 with the precision of bfloat16 or little more, unless they are told otherwise.
_ROUNDING = (5e-3, 2e-2)
_FLOAT32_ON_CPU = (1e-5, 1e-5)


def _kernel_and_xla(platform: str, _dtype) -> tuple[str, ...]:
    return ("tpu", "xla") if platform == "tpu" else ("xla",)


def _any_form(platform: str, _dtype) -> tuple[str, ...]:
    return (platform, "xla") if platform in ("tpu", "gpu") else ("xla",)


def _groupings_and_kernel(platform: str, dtype) -> tuple[str, ...]:
    return (("tpu_union", "tpu_pairs") if platform == "tpu" else ()) + _groupings(platform, dtype)


def _groupings(platform: str, _dtype) -> tuple[str, ...]:
    # XLA expands "ragged_dot" on GPUs, where nothing picks it.
    return ("gather", "blocks") if platform == "gpu" else ("gather", "blocks", "ragged_dot")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An operation on random arguments."""

    name: str
    """Operation and variant."""
    run: Callable[..., Any]
    """The operation, on the arguments in order; takes `implementation`."""
    arguments: tuple[Any, ...]
    """In float32; queries, keys and values, arrays on their own, are given in bfloat16 too."""
    versions: Callable[[str, Any], tuple[str, ...]] = _kernel_and_xla
    """Implementations to check, by platform and dtype of queries."""
    differentiable: bool = True
    """There are gradients to compare."""


@dataclasses.dataclass(frozen=True)
class Check:
    """How far an implementation is from the reference."""

    name: str
    """Operation and variant."""
    implementation: str
    """Which was checked."""
    dtype: str
    """The dtype of queries, keys, values."""
    values: float
    """Root mean square of the differences, over that of the reference, of the worst result."""
    gradients: float | None
    """Worst error of a gradient likewise; None where there is none."""
    allowed: tuple[float, float]
    """How large they may be."""
    error: str | None = None
    """Why it did not run, in one line; None: it did."""

    @property
    def passed(self) -> bool:
        """It ran, and both are small enough; a NaN is not."""
        return (
            self.error is None
            and self.values <= self.allowed[0]
            and (self.gradients is None or self.gradients <= self.allowed[1])
        )


def selftest() -> bool:
    """Compare every kernel with its plain reference on this machine's device; print a table; do all agree?

    On a TPU or a GPU both what is made for it and XLA's versions are compared, elsewhere the latter. It takes
    minutes: what takes long is compiling.
    """
    from rich.console import Console
    from rich.table import Table

    device = jax.devices()[0]
    table = Table("operation", "version", "numbers", "values", "gradients", "")
    console = Console()
    checks = []
    with console.status("comparing") as status:
        for check in run_checks(device.platform, cases()):
            status.update(f"{check.name}, {check.implementation}")
            checks.append(check)
            verdict = "agrees"
            if not check.passed:
                verdict = check.error or "DIFFERS, allowed are {:.0e}, {:.0e}".format(*check.allowed)
            table.add_row(
                check.name,
                check.implementation,
                check.dtype,
                f"{check.values:.1e}",
                "none" if check.gradients is None else f"{check.gradients:.1e}",
                verdict,
            )
    console.print(
        f"on {device.device_kind}: differences from the reference, relative to it (root mean squares)"
    )
    console.print(table)
    failed = sum(not check.passed for check in checks)
    console.print(f"{failed} of {len(checks)} differ" if failed else f"all {len(checks)} agree")
    return not failed


def run_checks(platform: str, chosen: list[Case]) -> Iterator[Check]:
    """Yield a check for every version and dtype of these cases that a platform has.

    What takes long is compiling, which uses one core: on a machine with many, as many operations are compiled
    at a time.
    """

    def checks(case: Case) -> list[Check]:
        found = []
        for dtype in (jnp.float32, jnp.bfloat16):
            for version in case.versions(platform, dtype):
                exact = dtype == jnp.float32 and platform == "cpu"
                found.append(_check_or_error(case, version, dtype, _FLOAT32_ON_CPU if exact else _ROUNDING))
        return found

    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as threads:
        for found in threads.map(checks, chosen):
            yield from found


def cases() -> list[Case]:
    """Every operation in its variants."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    def unit(*shape: int) -> jax.Array:
        x = random.normal(size=shape)
        return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)

    def fraction(low: float, high: float) -> jax.Array:
        return jnp.asarray(random.uniform(low, high, (_B, _T, _H)), jnp.float32)

    q, k, v = unit(_B, _T, _H, _K), unit(_B, _T, _H, _K), normal(_B, _T, _H, _K)
    retention, momentum, step = fraction(0.9, 1.0), fraction(0.3, 0.6), fraction(0.1, 1.0)
    gradient_step = step / (2 * _CHUNK)
    segments = {"segment_length": _SEGMENT, "chunk_length": _CHUNK}

    def matrix(rule: str, **coefficients: jax.Array) -> Case:
        def run(q, k, v, coefficients, *, implementation):
            return ops.chunk_memory(
                q, k, v, rule=rule, **coefficients, **segments, implementation=implementation
            )

        versions = _kernel_and_xla if rule == "titans" else _any_form
        return Case(f"chunk_memory, {rule}", run, (q, k, v, coefficients), versions)

    def mlp(objective: str, branch: str = "bounded", **coefficients: jax.Array) -> Case:
        def run(q, k, v, coefficients, initial, *, implementation):
            return ops.deep_memory(
                q,
                k,
                v,
                objective=objective,
                branch=branch,
                initial_state=initial,
                **coefficients,
                **segments,
                implementation=implementation,
            )

        initial = normal(_H, _K, _E) / _K**0.5, normal(_H, _E, _K) / _E**0.5
        return Case(f"deep_memory, {objective}, {branch}", run, (q, k, v, coefficients, initial))

    gates = jax.nn.softmax(normal(_B, _T, _H, _N))
    matrices = normal(_B, _N, _H, _K, _K) / _K**0.5
    mlps = normal(_B, _N, _H, _K, _E) / _K**0.5, normal(_B, _N, _H, _E, _K) / _E**0.5
    plain_read = functools.partial(ops.gated_state_read, branch="plain")
    chosen_gates, indices = jax.lax.top_k(gates, 2)

    def routed(kind: str, states) -> Case:
        def run(q, gates, states, *, implementation):
            return ops.routed_state_read(q, gates, indices, states, implementation=implementation)

        # There is a TPU's kernel for matrices alone.
        versions = _groupings if isinstance(states, tuple) else _groupings_and_kernel
        return Case(f"routed_state_read, {kind}", run, (q, chosen_gates, states), versions)

    def decoding(rule: str, **coefficients: jax.Array) -> Case:
        numbers = {name: x[:, 0] for name, x in coefficients.items()}
        state = OnlineState(
            weights=matrices[:, 0],
            momentum=matrices[:, 1] if rule == "titans" else None,
            anchor=matrices[:, 2] if rule == "titans" else None,
            previous=(k[:, 1], v[:, 1]) if rule == "swla" else None,
        )

        def run(q, k, v, states, state, numbers, *, implementation):
            return ops.decode_step(
                state,
                q,
                k,
                v,
                states,
                chosen_gates[:, 0],
                indices[:, 0],
                online_gate=gates[:, 0, :, 0],
                slot=jnp.asarray([-1, 1], jnp.int32),
                chunk_start=jnp.asarray([False, True]) if rule == "titans" else None,
                rule=rule,
                **numbers,
                implementation=implementation,
            )

        arguments = (q[:, 0], k[:, 0], v[:, 0], matrices, state, numbers)
        return Case(f"decode_step, {rule}", run, arguments, differentiable=False)

    def convolution(x, taps, *, implementation):
        joined = x.reshape(_B, _T, -1)
        return ops.short_convolution(joined, taps, heads=_H, normalize=True, implementation=implementation)

    def read_versions(platform: str, dtype) -> tuple[str, ...]:
        hopper = platform == "gpu" and has_hopper_kernel(q.astype(dtype), matrices)
        return ("gpu", "xla") if hopper else _kernel_and_xla(platform, dtype)

    return [
        Case("short_convolution", convolution, (q, normal(4, _H * _K))),
        matrix("linear", retention=retention, step=step),
        matrix("swla", retention=retention, step=step, previous_step=step[::-1]),
        matrix("delta", retention=retention, step=step),
        matrix("titans", retention=retention, momentum=momentum, step=gradient_step),
        mlp("dot", retention=retention, step=gradient_step),
        mlp("l2", retention=retention, momentum=momentum, step=gradient_step),
        mlp("l2", "plain", retention=retention, momentum=momentum, step=gradient_step),
        Case("gated_state_read, matrices", ops.gated_state_read, (q, gates, matrices), read_versions),
        Case("gated_state_read, MLPs, bounded", ops.gated_state_read, (q, gates, mlps)),
        Case("gated_state_read, MLPs, plain", plain_read, (q, gates, mlps)),
        routed("matrices", matrices),
        routed("MLPs", mlps),
        decoding("linear", retention=retention, step=step),
        decoding("swla", retention=retention, step=step, previous_step=step[::-1]),
        decoding("delta", retention=retention, step=step),
        decoding("titans", retention=retention, momentum=momentum, step=gradient_step),
    ]


def _check_or_error(case: Case, version: str, dtype, allowed: tuple[float, float]) -> Check:
    # One kernel that does not compile on this device must not hide what the others do.
    try:
        return _check(case, version, dtype, allowed)
    except Exception as error:
        line = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        nothing = float("nan")
        return Check(case.name, version, jnp.dtype(dtype).name, nothing, nothing, allowed, f"FAILS: {line}")


def _check(case: Case, version: str, dtype, allowed: tuple[float, float]) -> Check:
    # Both sides see the same, rounded numbers; the reference computes with them in float32.
    rounded = tuple(x.astype(dtype) if _is_tokens(x) else x for x in case.arguments)
    wide = tuple(x.astype(jnp.float32) if _is_tokens(x) else x for x in rounded)
    with jax.default_matmul_precision("float32"):
        expected, expected_bars = _values_and_gradients(case, "reference")(*wide)
    found, found_bars = _values_and_gradients(case, version)(*rounded)
    values = _difference(found, expected)
    gradients = _difference(found_bars, expected_bars) if case.differentiable else None
    return Check(case.name, version, jnp.dtype(dtype).name, values, gradients, allowed)


def _is_tokens(x) -> bool:
    return isinstance(x, jax.Array) and x.ndim in (3, 4) and x.shape[-1] == _K


@functools.cache  # float32 and bfloat16 share the reference's compilation
def _values_and_gradients(case: Case, implementation: str) -> Callable:
    run = functools.partial(case.run, implementation=implementation)

    @jax.jit
    def both(*arguments):
        if not case.differentiable:
            return run(*arguments), ()
        results, vjp = jax.vjp(run, *arguments)
        leaves, tree = jax.tree.flatten(results)
        keys = jax.random.split(jax.random.key(1), len(leaves))
        bars = [jax.random.normal(key, x.shape).astype(x.dtype) for key, x in zip(keys, leaves, strict=True)]
        return results, vjp(jax.tree.unflatten(tree, bars))

    return both


def _difference(found, expected) -> float:
    def relative(a: jax.Array, b: jax.Array) -> float:
        wide_a, wide_b = (np.asarray(x.astype(jnp.float32), np.float64) for x in (a, b))
        return float(np.sqrt(np.mean((wide_a - wide_b) ** 2)) / (np.sqrt(np.mean(wide_b**2)) + 1e-8))

    return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))
