"""The PyTorch side of scripts/gpu_check: the same layers in chunks, written plainly, eager or compiled.

It is what one would write in an afternoon: matrix products over chunks, states in float32, a loop over chunks
where a state must be known before the next (delta, titans). "sparse" reads all states, most with gates of 0.

Shapes: B batch, H heads, N chunks, C chunk, S segments, T tokens, K key dim (and value dim).
"""

import argparse
import functools
import os
import pathlib
import sys
import time

import torch
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

_SECONDS_A_CASE, _QUICK_SECONDS = 1.0, 0.02
# Pieces of a row in the dense read, each of which reads the states before its end.
_PIECES = 8

Tensor = torch.Tensor


def shares(logs: Tensor) -> Tensor:
    """Return products of coefficients [..., C, C]: of those after j up to i, for i >= j, from logarithms."""
    total = logs.cumsum(-1)
    size = logs.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=logs.device).tril()
    return torch.where(below, total[..., :, None] - total[..., None, :], -torch.inf).exp()


def linear(q, k, v, retention, step) -> tuple[Tensor, Tensor]:
    """Return reads and the states after each chunk."""
    logs = retention.log()
    products, enter = shares(logs), logs.cumsum(-1).exp()
    writes = ((products[..., -1, :] * step)[..., None] * k).to(k.dtype).mT @ v
    between = shares(logs.sum(-1))  # of chunks
    ends = (between @ writes.float().flatten(-2)).unflatten(-1, writes.shape[-2:])
    starts = torch.cat([torch.zeros_like(ends[:, :, :1]), ends[:, :, :-1]], 2)
    scores = (q @ k.mT) * products * step[..., None, :]
    return scores.to(q.dtype) @ v + (q * enter[..., None]).to(q.dtype) @ starts.to(q.dtype), ends


def delta_chunks(k, v, retention, step):
    """Return what chunks do to a state: removed, added, into, through; and products of retentions."""
    logs = retention.log()
    products, enter = shares(logs), logs.cumsum(-1).exp()
    wide_k, wide_v = k.float(), v.float()
    system = (step[..., None] * products * (wide_k @ wide_k.mT)).tril(-1)
    system = system + torch.eye(k.shape[-2], device=k.device)
    sides = step[..., None] * torch.cat([enter[..., None] * wide_k, wide_v], -1)
    solved = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True)
    removed, added = solved.split([k.shape[-1], v.shape[-1]], -1)
    return removed, added, products[..., -1, :, None] * wide_k, enter[..., -1, None, None], products, enter


def delta_step(state, removed, added, into, through) -> tuple[Tensor, Tensor]:
    """Return the state after a chunk and what was written."""
    written = added - removed @ state
    return through * state + into.mT @ written, written


def delta_reads(q, k, products, enter, starts, written) -> Tensor:
    """Return the reads of all chunks."""
    scores = ((q @ k.mT) * products).to(q.dtype)
    return scores @ written.to(q.dtype) + (q * enter[..., None]).to(q.dtype) @ starts.to(q.dtype)


def titans_chunks(k, retention, momentum):
    """Return products of retentions and momenta, alone and joined, and of what enters a chunk."""
    kept, pushed = shares(retention.log()), shares(momentum.log())
    pushed_since = momentum.log().cumsum(-1).exp()
    joined = kept @ pushed
    moved_since = (kept @ pushed_since[..., None])[..., 0]
    since = retention.log().cumsum(-1).exp(), moved_since, pushed_since
    into = torch.cat([joined[..., -1, :, None] * k, pushed[..., -1, :, None] * k], -1)
    return joined, since, into


def titans_step(state, surprise, k, v, step, into, kept, moved, pushed):
    """Return state and momentum after a chunk, and its errors."""
    error = step[..., None] * (v - k @ state)
    change, more = (into.mT @ error).chunk(2, -2)
    return kept * state + moved * surprise + change, pushed * surprise + more, error


def titans_reads(q, k, joined, since, starts, errors) -> Tensor:
    """Return the reads of all chunks."""
    scores = ((q @ k.mT) * joined).to(q.dtype)
    queries = torch.cat([q * since[0][..., None], q * since[1][..., None]], -1).to(q.dtype)
    return scores @ errors.to(q.dtype) + queries @ starts.to(q.dtype)


def route(u, k, online_logit, segment: int, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Return the gates of the online memory [B, H, T] and of segments [B, H, T, S]."""
    tokens = u.shape[2]
    pooled = k.float().unflatten(2, (-1, segment)).mean(3)
    scores = u.float() @ pooled.mT
    own = torch.arange(tokens, device=u.device) // segment
    readable = torch.arange(pooled.shape[2], device=u.device) < own[:, None]
    scores = scores.masked_fill(~readable, -torch.inf)
    if top_k is not None:
        best = scores.detach().topk(min(top_k, scores.shape[-1]), -1).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        scores = scores.masked_fill(~chosen, -torch.inf)
    gates = torch.cat([scores, online_logit[..., None]], -1).softmax(-1)
    return gates[..., -1], gates[..., :-1]


def read(q, gates, states, segment: int) -> Tensor:
    """Return sum_s gates_s q M_s: one product a piece, states joined along their keys."""
    pieces, length = [], -(-q.shape[2] // (_PIECES * segment)) * segment
    for begin in range(0, q.shape[2], length):
        some_q, some_gates = q[:, :, begin : begin + length], gates[:, :, begin : begin + length]
        count = (begin + some_q.shape[2] - 1) // segment
        if count == 0:
            pieces.append(torch.zeros_like(some_q))
            continue
        gated = (some_gates[..., :count, None] * some_q[..., None, :]).to(q.dtype).flatten(-2)
        pieces.append(gated @ states[:, :, :count].to(q.dtype).flatten(2, 3))
    return torch.cat(pieces, 2)


class Layers:
    """The layers, of functions that are compiled or not."""

    def __init__(self, compiled: bool) -> None:
        """Take each function as it is, or compile it."""
        functions = linear, delta_chunks, delta_step, delta_reads, titans_chunks, titans_step, titans_reads
        wrap = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self._of = {function.__name__: wrap(function) for function in (*functions, route, read)}

    def run(self, values: dict[str, Tensor], memory: str, aggregation: str, size: Size) -> Tensor:
        """Return reads [B, T, H, K] of arguments [B, T, H, K] and [B, T, H]."""
        by_head = {name: x.transpose(1, 2) for name, x in values.items()}
        chunks = {name: x.unflatten(2, (-1, size.chunk)) for name, x in by_head.items()}
        reads, ends = getattr(self, f"_{memory}")(chunks)
        reads = reads.flatten(2, 3)
        if aggregation != "none":
            top_k = TOP_K if aggregation == "sparse" else None
            online, gates = self._of["route"](
                by_head["u"], by_head["k"], by_head["online_logit"], size.segment, top_k
            )
            a_segment = size.segment // size.chunk
            states = ends[:, :, a_segment - 1 :: a_segment]
            reads = online[..., None] * reads + self._of["read"](by_head["q"], gates, states, size.segment)
        return reads.transpose(1, 2).to(values["v"].dtype)

    def _linear(self, x):
        return self._of["linear"](x["q"], x["k"], x["v"], x["retention"], x["step"])

    def _delta(self, x):
        *writes, products, enter = self._of["delta_chunks"](x["k"], x["v"], x["retention"], x["step"])
        state = torch.zeros_like(writes[2][:, :, 0].mT @ writes[1][:, :, 0])
        starts, ends, written = [], [], []
        for n in range(x["k"].shape[2]):
            starts.append(state)
            state, new = self._of["delta_step"](state, *(part[:, :, n] for part in writes))
            ends.append(state)
            written.append(new)
        starts, ends, written = (torch.stack(list_, 2) for list_ in (starts, ends, written))
        return self._of["delta_reads"](x["q"], x["k"], products, enter, starts, written), ends

    def _titans(self, x):
        joined, since, into = self._of["titans_chunks"](x["k"].float(), x["retention"], x["momentum"])
        wide_k, wide_v = x["k"].float(), x["v"].float()
        state = torch.zeros_like(wide_k[:, :, 0].mT @ wide_v[:, :, 0])
        surprise = torch.zeros_like(state)
        last = [part[..., -1, None, None] for part in since]
        starts, ends, errors = [], [], []
        for n in range(wide_k.shape[2]):
            starts.append(torch.cat([state, surprise], -2))
            inputs = (part[:, :, n] for part in (wide_k, wide_v, x["step"], into, *last))
            state, surprise, error = self._of["titans_step"](state, surprise, *inputs)
            ends.append(state)
            errors.append(error)
        starts, ends, errors = (torch.stack(list_, 2) for list_ in (starts, ends, errors))
        return self._of["titans_reads"](x["q"], x["k"], joined, since, starts, errors), ends


def measure(case: tuple, layers: Layers, device: str, folder: pathlib.Path, seconds: float) -> dict:
    """Run forward and backward: whether it is right, and how long it takes."""
    memory, aggregation, size_name, size = case

    def on_device(name: str) -> Tensor:
        found = torch.from_numpy(drawn(size, name)).to(device)
        return found.to(torch.bfloat16) if found.ndim == 4 else found

    values = arguments(size, memory, aggregation, on_device)
    target = values.pop("target")
    for x in values.values():
        x.requires_grad_()

    def run() -> Tensor:
        for x in values.values():
            x.grad = None
        y = layers.run(values, memory, aggregation, size)
        (y * target).float().sum().backward()
        return y

    def wait(_: object) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    y = run()
    wait(None)
    row = {"compile_seconds": time.perf_counter() - begin}
    kept = {"y": y} | {name: values[name].grad for name in ("q", "k", "v")}
    found = {name: x[0, :, 0].detach().float().cpu().numpy() for name, x in kept.items()}
    row |= compared(folder, f"{memory}, {aggregation}, {size_name}".replace(" ", "_"), found)
    del y, kept
    row |= median_milliseconds(run, wait, seconds)
    row["tokens_per_second"] = 1e3 * size.rows * size.tokens / row["milliseconds"]
    if device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def main() -> None:
    """Measure all layers, the shorter rows first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("how", choices=("eager", "compiled"))
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--references", type=pathlib.Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    chosen = parser.parse_args()
    deadline = time.monotonic() + chosen.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    layers, each = Layers(chosen.how == "compiled"), _QUICK_SECONDS if chosen.quick else _SECONDS_A_CASE
    last = 0.0
    for size_name, size in sizes(chosen.quick).items():
        for aggregation in AGGREGATIONS:
            for memory in MEMORIES:
                what = f"{memory}, {aggregation}"
                if not is_wanted(f"{what}, {size_name}", chosen.only):
                    continue
                row = {"what": what, "size": size.name, "path": f"PyTorch, {chosen.how}"}
                row["tokens"] = size.rows * size.tokens
                begin = time.monotonic()
                try:
                    if begin + last > deadline:
                        row["skipped"] = "no time was left"
                    else:
                        case = (memory, aggregation, size_name, size)
                        row |= measure(case, layers, device, chosen.references, each)
                        last = time.monotonic() - begin
                except Exception as error:
                    row["failed"] = one_line(error)
                say(row)
                if device == "cuda":
                    torch.cuda.empty_cache()
    sys.stdout.flush()
    os._exit(0)  # PyTorch's compiling processes would be waited for


if __name__ == "__main__":
    main()
