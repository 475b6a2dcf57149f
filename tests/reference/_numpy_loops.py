"""Memory Caching in NumPy loops, one row, head and token at a time, with gradients by hand.

Slow (every token runs its memories anew from their first tokens) and unlike the reference in its form, which
it checks: states come from runs over lists of tokens, not from one run that is reset.
"""

import math

import numpy as np

SEGMENT = 4


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x):
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + np.tanh(inner)) + 0.5 * x * (1 - np.tanh(inner) ** 2) * inner_slope


def combine(factors, *weights):
    """Sum of matrices, or of MLPs, times factors."""
    if isinstance(weights[0], tuple):
        return tuple(combine(factors, *layer) for layer in zip(*weights, strict=True))
    return sum(f * w for f, w in zip(factors, weights, strict=True))


def read_in_numpy(weights, x, branch):
    if not isinstance(weights, tuple):
        return x @ weights
    z = gelu(x @ weights[0]) @ weights[1]
    return x + (z if branch == "plain" else z / math.sqrt(1 + z @ z / len(z)))


def gradient_in_numpy(weights, k, v, memory, branch):
    """By the chain rule, written out; [0] first layer, [1] second, or the matrix alone."""
    error = -v if memory == "dla" else read_in_numpy(weights, k, branch) - v
    if not isinstance(weights, tuple):
        return np.outer(k, error)
    w_in, w_out = weights
    hidden = k @ w_in
    if branch == "bounded":
        z = gelu(hidden) @ w_out
        length = math.sqrt(1 + z @ z / len(z))
        error = (np.eye(len(z)) / length - np.outer(z, z) / len(z) / length**3) @ error
    return np.outer(k, (w_out @ error) * gelu_slope(hidden)), np.outer(gelu(hidden), error)


def write_in_numpy(k, v, a, h, m, p, *, memory, branch, initial, fresh, chunk_starts):
    """States after each token, by plain loops."""
    states = []
    nothing = combine((0,), initial), (0 * k[0], 0 * v[0])
    weights = anchor = initial
    momentum, previous = nothing
    for t in range(len(k)):
        if fresh[t]:
            weights, (momentum, previous) = initial, nothing
        if chunk_starts[t] or fresh[t]:
            anchor = weights
        if memory in ("linear", "swla"):
            weights = a[t] * weights + h[t] * np.outer(k[t], v[t])
            if memory == "swla":
                weights = weights + p[t] * np.outer(*previous)
        elif memory == "delta":
            weights = a[t] * (np.eye(len(k[t])) - h[t] * np.outer(k[t], k[t])) @ weights + h[t] * np.outer(
                k[t], v[t]
            )
        else:
            decay = 0 if memory == "dla" else m[t]
            gradient = gradient_in_numpy(anchor, k[t], v[t], memory, branch)
            momentum = combine((decay, -h[t]), momentum, gradient)
            weights = combine((a[t], 1), weights, momentum)
        previous = (k[t], v[t])
        states.append(weights)
    return states


def softmax_in_numpy(logits):
    exponentials = np.exp(np.asarray(logits) - np.max(logits))
    return exponentials / exponentials.sum()


def in_numpy(inputs, *, memory, aggregation, initial, coefficients=None, documents=None, **settings):
    """The whole, in loops: y [B, T, H, V]."""
    batch, length, heads = inputs["q"].shape[:3]
    y = np.zeros((batch, length, heads, inputs["v"].shape[-1]))
    ones = np.ones((batch, length, heads))
    c = {"retention": ones, "step": ones, "momentum": 0 * ones, "previous_step": 0 * ones}
    c |= coefficients or {}
    for b in range(batch):
        document = np.zeros(length, int) if documents is None else documents[b]
        for head in range(heads):
            row = {name: None if x is None else x[b, :, head] for name, x in {**inputs, **c}.items()}
            y[b, :, head] = row_in_numpy(
                row,
                document,
                memory=memory,
                aggregation=aggregation,
                initial=tuple(w[head] for w in initial) if isinstance(initial, tuple) else initial[head],
                **settings,
            )
    return y


def row_in_numpy(
    row,
    document,
    *,
    memory,
    aggregation,
    initial,
    segment_init="checkpoint",
    segmentation="constant",
    top_k=None,
    blocks=1,
    chunk_length=2,
    segment_length=SEGMENT,
    branch="bounded",
):
    q, u, r = row["q"], row["u"], row["router_keys"]
    length = len(q)

    def states_of(tokens):
        """States of a memory that is run over these tokens alone."""
        scalars = [row[name][tokens] for name in ("retention", "step", "momentum", "previous_step")]
        new_segment = [segment_init == "independent" and t % segment_length == 0 for t in tokens]
        new_document = [t > 0 and document[t] != document[t - 1] for t in tokens]
        return write_in_numpy(
            row["k"][tokens],
            row["v"][tokens],
            *scalars,
            memory=memory,
            branch=branch,
            initial=initial,
            fresh=np.array(new_document) | (np.array(new_segment) & (segmentation == "constant")),
            chunk_starts=[t % segment_length % chunk_length == 0 for t in tokens],
        )

    y = []
    for t in range(length):
        start = min(j for j in range(length) if document[j] == document[t])  # of the document
        segment_start = t // segment_length * segment_length
        ends = range(segment_length - 1, segment_start, segment_length)
        ends = [e for e in ends if document[e] == document[t]]
        groups = [(max(start, e + 1 - segment_length), e) for e in ends]
        if segmentation == "logarithmic":
            sizes = [2**d for d in reversed(range(10)) if len(ends) >> d & 1]
            groups, used = [], 0
            for size in sizes:
                groups.append((max(start, ends[used] + 1 - segment_length), ends[used + size - 1]))
                used += size
        first_token = {"checkpoint": start, "independent": max(start, segment_start)}[segment_init]
        online = states_of(list(range(first_token, t + 1)))[-1]
        cached, scores = [], []
        for first, last in groups:
            from_token = start if segment_init == "checkpoint" else first
            cached.append(states_of(list(range(from_token, last + 1)))[-1])
            part = segment_length // blocks
            parts = [[j for j in range(first, last + 1) if j // part == i] for i in range(length)]
            if blocks == 1:
                parts = [list(range(first, last + 1))]
            scores.append(max(u[t] @ r[p].mean(0) for p in parts if p))
        if row["online_logit"] is None:
            logit = u[t] @ r[max(start, segment_start) : t + 1].mean(0)
        else:
            logit = row["online_logit"][t]

        if aggregation == "none":
            cached, gates = [], [1.0]
        elif aggregation == "average":
            cached = cached[::-1][:top_k]
            gates = np.ones(len(cached) + 1) / (len(cached) + 1)
        elif aggregation == "residual":
            gates = np.ones(len(cached) + 1)
        else:
            if aggregation == "sparse":
                best = np.argsort(-np.array(scores), kind="stable")[:top_k]  # ties to the older
                cached, scores = [cached[i] for i in best], [scores[i] for i in best]
            gates = softmax_in_numpy([*scores, logit])
        memories = [*cached, online]
        if aggregation == "soup":
            y.append(read_in_numpy(combine(gates, *memories), q[t], branch))
            continue
        output = sum(g * read_in_numpy(w, q[t], branch) for g, w in zip(gates, memories, strict=True))
        if aggregation == "residual" and isinstance(initial, tuple):
            output = output - (len(memories) - 1) * q[t]
        y.append(output)
    return np.stack(y)
