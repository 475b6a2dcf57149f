"""A run before its chips are rented: what its training step needs and how long it takes."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mc_jax.config import Config, validate
from mc_jax.parallel import AXES, make_mesh, must_fit, spec
from mc_jax.parallel.mesh import filled
from mc_jax.planning.chips import CHIPS, GPUS
from mc_jax.planning.collectives import Collective, collectives, read_collective
from mc_jax.planning.cost import forget_schedules, has_schedules, keep_schedules, kernels_of
from mc_jax.planning.formulas import Flops, flops_of
from mc_jax.planning.memory import (
    Memory,
    capacity_of,
    chip_bytes,
    compiled_memory,
    refused_memory,
    state_parts,
)
from mc_jax.planning.parts import by_part
from mc_jax.planning.program import operations
from mc_jax.planning.speed import Speed, speed_of
from mc_jax.planning.topology import Topology, read_topology
from mc_jax.planning.turns import counts_of, kernel_works
from mc_jax.training.optimizer import make_optimizer
from mc_jax.training.patterns import trained_part
from mc_jax.training.run import abstract_state, drawing
from mc_jax.training.step import Parameters, make_step, merge_model, token_losses

_VOCABULARY = 32_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before it is started. Sizes are in bytes, of one chip; times in seconds."""

    topology: str
    """The topology as the user wrote it, such as "v5p:4x4x4"."""
    slices: int
    """How many of these."""
    chips: int
    """Devices in all: of a v4 or tpu7x, whose chips hold two, halves."""
    mesh: dict[str, int]
    """Sizes of its axes."""
    rows: int
    """Rows of a batch per chip."""
    remat: str
    """What is computed again (`training.remat`)."""
    vocabulary: int
    """Ids of the tokenizer."""
    vocabulary_source: str
    """What that number was taken from."""
    parameters: dict[str, int]
    """Parameters of each part of the model, adapters among them."""
    trained: int
    """How many of them are trained."""
    flops: Flops
    """FLOPs by formula (`mc_jax.planning.formulas`)."""
    memory: Memory
    """On one chip."""
    collectives: tuple[Collective, ...]
    """What the compiled step sends; empty where nothing was compiled."""
    speed: Speed | None
    """None where nothing was compiled, or it does not fit."""


def plan(
    config: Config,
    *,
    topology: str,
    slices: int = 1,
    vocab_size: int | None = None,
    estimate: bool = True,
) -> Plan:
    """Compile a run's training step for TPUs that are not here, and read what it costs; of GPUs, formulas.

    Args:
      config: of the run; its data need not be here.
      topology: such as "v5e:4x4" or "h100:8".
      slices: how many of these.
      vocab_size: of the tokenizer; None: the config's, else that of its data, else 32,000.
      estimate: tell the speed, too. libtpu has to be told before it starts (`keep_schedules`, which this
        calls): a process that has compiled for a TPU before cannot be told any more.

    Raises:
      ValueError: settings that contradict each other or do not fit the devices, or an unknown topology.
    """
    validate(config)
    where = read_topology(topology, slices)
    vocabulary, source = vocabulary_of(config, vocab_size)
    if not where.is_tpu:
        return _by_formula(config, where, vocabulary, source)
    if estimate:
        keep_schedules()
    devices = where.devices()
    chip = CHIPS[where.chip]
    mesh = make_mesh(config.mesh, devices)
    must_fit(mesh, config)
    capacity = capacity_of(devices[0], chip.memory)
    with jax.set_mesh(mesh):
        if estimate:
            forget_schedules()
        traced, state, batch = trace_step(config, vocabulary)
        try:
            compiled = traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            memory = refused_memory(str(error), state, batch)
            if memory is None:
                raise
            compiled = None
        else:
            memory = compiled_memory(compiled, state, batch, capacity)
    flops = flops_of(config, state.parameters)
    sent, speed = (), None
    if compiled is not None:
        text = compiled.as_text()
        assert text is not None
        found = list(operations(text))
        sent = collectives(found, mesh, chip, where)
        if estimate:
            if any(one.is_kernel for one in found) and not has_schedules():
                raise ValueError(
                    "libtpu was started before it was told to write its schedules down; "
                    "call mc_jax.planning.keep_schedules() first, or plan in a process of its own"
                )
            works = list(kernel_works(traced.jaxpr.jaxpr))
            speed = speed_of(
                found,
                kernels_of(found, counts_of(works)),
                sent,
                lambda one: read_collective(one, mesh, chip, where),
                chip,
                chips=mesh.size,
                tokens=flops.tokens,
                flops=flops.step,
                kernel_products=sum(work.times * work.products for work in works),
            )
    sizes = dict(mesh.shape)
    return Plan(
        topology=where.name,
        slices=slices,
        chips=mesh.size,
        mesh=sizes,
        rows=config.training.batch_size // (sizes["replica"] * sizes["fsdp"]),
        remat=config.training.remat,
        vocabulary=vocabulary,
        vocabulary_source=source,
        parameters=by_part(state.parameters, config.model),
        trained=sum(leaf.size for leaf in jax.tree.leaves(_trained(config, state.parameters))),
        flops=flops,
        memory=memory,
        collectives=sent,
        speed=speed,
    )


def vocabulary_of(config: Config, vocab_size: int | None) -> tuple[int, str]:
    """Return the size of the vocabulary, and where it is from; no corpus has to be here."""
    if vocab_size is not None:
        if vocab_size < 1:
            raise ValueError(f"--vocab-size {vocab_size} is no size; set it to 1 or more, such as 32000")
        return vocab_size, "as told"
    if config.data.vocab_size is not None:
        return config.data.vocab_size, "data.vocab_size"
    if config.data.tokenizer == "bytes":
        from mc_jax.data.tokenizer import ByteTokenizer

        return ByteTokenizer().vocab_size, "bytes"
    folder = Path(config.data.corpus).expanduser()
    if (folder / "tokenizer.json").is_file():
        from mc_jax.data.tokenizer import load_tokenizer

        return load_tokenizer(folder / "tokenizer.json").vocab_size, f"the tokenizer of {folder}"
    return _VOCABULARY, f"assumed, for {folder} is not here; --vocab-size tells another"


def trace_step(config: Config, vocabulary: int) -> tuple[jax.stages.Traced, Any, dict[str, Any]]:
    """Return the very step of training, traced on the current mesh, and shapes of its state and batch."""
    settings = config.training
    graph, state = abstract_state(config, vocabulary)
    part = trained_part(settings)
    step: Any = make_step(graph, make_optimizer(settings), settings.accumulation, settings.remat, part)
    laid = jax.NamedSharding(jax.sharding.get_mesh(), spec("batch", "tokens"))
    batch = _batch(config, settings.batch_size, laid)
    top_k = jax.ShapeDtypeStruct((), jnp.int32) if settings.top_k_anneal_steps else None
    return step.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32), top_k), state, batch


def _trained(config: Config, parameters: Parameters) -> Parameters:
    part = trained_part(config.training)
    return parameters if part is None else part(parameters)


def _batch(config: Config, rows: int, sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    shape = (rows, config.data.context_length)
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        for name in ("inputs", "targets", "document_ids")
    }
    return batch | {"loss_mask": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}


def _by_formula(config: Config, where: Topology, vocabulary: int, source: str) -> Plan:
    """The plan of GPUs: state and gradients, divided as on TPUs, and what is left per GPU for activations."""
    gpu = GPUS[where.chip]
    chips = where.sides[0] * where.slices
    mesh = jax.sharding.AbstractMesh(filled(config.mesh, chips, where.slices), AXES)
    must_fit(mesh, config)  # pyrefly: ignore - it asks for sizes alone
    sizes = dict(mesh.shape)
    if config.training.compute_dtype is None:
        training = dataclasses.replace(config.training, compute_dtype="bfloat16")
        config = dataclasses.replace(config, training=training)
    graph, draw = drawing(config, vocabulary)
    state = jax.eval_shape(draw)
    rows = config.training.batch_size // (sizes["replica"] * sizes["fsdp"])
    shares = sizes["fsdp"] * sizes["tensor"]

    def saved(parameters, batch):
        def loss(p):
            return jnp.sum(token_losses(merge_model(graph, p), batch, remat=config.training.remat))

        return jax.vjp(loss, parameters)[1]

    kept = jax.eval_shape(saved, state.parameters, _batch(config, rows // config.training.accumulation))
    # The weights are among what is saved, and are counted already.
    activations = chip_bytes(kept) - chip_bytes(state.parameters)
    parts = {name: size // shares for name, size in state_parts(state).items()}
    parts["gradients"] = chip_bytes(_trained(config, state.parameters)) // shares
    parts["activations, as saved for the gradient"] = max(0, activations) // (
        sizes["sequence"] * sizes["tensor"]
    )
    flops = flops_of(config, state.parameters)
    return Plan(
        topology=where.name,
        slices=where.slices,
        chips=chips,
        mesh=sizes,
        rows=rows,
        remat=config.training.remat,
        vocabulary=vocabulary,
        vocabulary_source=source,
        parameters=by_part(state.parameters, config.model),
        trained=sum(leaf.size for leaf in jax.tree.leaves(_trained(config, state.parameters))),
        flops=flops,
        memory=Memory(
            parts=parts,
            total=math.ceil(sum(parts.values())),
            capacity=int(gpu.memory),
            host=0,
            is_compiled=False,
        ),
        collectives=(),
        speed=None,
    )
