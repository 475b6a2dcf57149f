"""The training loop, top to bottom."""

import math
import time
from contextlib import nullcontext

import jax
import jax.numpy as jnp
from etils import epath

from mc_jax.config import Config, document_alignment, validate
from mc_jax.data.pipeline import training_batches
from mc_jax.parallel import local_rows, make_mesh, must_fit, on_mesh
from mc_jax.training import run
from mc_jax.training.checkpoint import Checkpoints
from mc_jax.training.held_out import WhileTraining
from mc_jax.training.initial import Init, initial_state
from mc_jax.training.metrics import MetricsLog
from mc_jax.training.optimizer import annealed_top_k, learning_rate, make_optimizer
from mc_jax.training.patterns import trained_part
from mc_jax.training.preemption import stops_at
from mc_jax.training.progress import Progress
from mc_jax.training.run_folder import opened
from mc_jax.training.step import Parameters, make_step
from mc_jax.training.watchdog import Watchdog


def train(
    config: Config, run_dir: epath.PathLike, *, overwrite: bool = False, init: Init | None = None
) -> int:
    """Train to the config's last step, going on from the newest complete checkpoint in `run_dir`.

    The batch of a step is a function of seed and step, so a run that was killed and started again ends
    as one that was not. All processes of `processes.joined` call this alike; the first one alone tells and
    writes what the run does.

    Args:
      config: what to train.
      run_dir: the run's folder; made if missing.
      overwrite: start anew, whatever run the folder holds.
      init: whose weights a new run begins with; None: they are drawn from the config's seed.

    Returns:
      The step of the last checkpoint: the config's last step, or an earlier one after a signal that
        `stop_signals` heard.

    Raises:
      ValueError: contradictory settings, a mesh that does not fit, data or weights that are not there, or a
        folder that holds something else. Nothing is written in these cases.
    """
    validate(config)
    mesh = make_mesh(config.mesh)
    must_fit(mesh, config)
    run_dir = epath.Path(run_dir)
    settings = config.training
    is_first = jax.process_index() == 0
    if settings.adapter_rank is not None and init is None:
        raise ValueError(
            f"training.adapter_rank {settings.adapter_rank} is for weights that were trained before; add "
            "--init RUN, or leave it out"
        )
    part = trained_part(settings)
    if part is not None or settings.learning_rate_factors:  # patterns match whatever the vocabulary
        jax.eval_shape(run.drawing(config, vocab_size=1)[1])
    with (
        opened(run_dir, config, overwrite=overwrite, init=init) as folder,
        jax.set_mesh(mesh),
        Checkpoints(
            run_dir,
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            seal=folder.seal,
            check=folder.check,
        ) as checkpoints,
    ):
        config, dataset = folder.config, folder.dataset
        # Loss is per token; bits per byte needs the corpus's mean length of a token.
        bytes_per_token = dataset.train.num_bytes / dataset.train.num_scored
        graph, like = run.abstract_state(config, dataset.tokenizer.vocab_size)
        held_out = WhileTraining(config, graph, dataset)
        step_fn = make_step(graph, make_optimizer(settings), settings.accumulation, settings.remat, part)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(like.parameters))
        loaded = checkpoints.restore(like)
        if loaded is not None:
            start, state = loaded.step, loaded.state
        elif folder.provenance is not None:
            start, state = 0, initial_state(folder.provenance, config, dataset)
        else:
            start, (_, state) = 0, run.new_state(config, dataset.tokenizer.vocab_size)
        if folder.provenance is not None and is_first:
            print(folder.provenance.told(run_dir, start, config), flush=True)
        start_row = folder.begin(start)
        title = f"{run_dir.name}: {parameters / 1e6:.2f} M parameters, {len(dataset.train)} documents"
        if part is not None:
            trained = sum(leaf.size for leaf in jax.tree.leaves(part(like.parameters)))
            title += f", {trained / 1e6:.2f} M of them trained"
            title += f" (adapters of rank {settings.adapter_rank})" if settings.adapter_rank else ""
        title += f", {mesh.size} devices" if mesh.size > 1 else ""
        title += f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        title += f", going on from step {start}" if start else ""
        batches = training_batches(
            dataset.train,
            context_length=config.data.context_length,
            batch_size=settings.batch_size,
            seed=settings.seed,
            start_row=start_row,
            align=document_alignment(config.model),
            rows=local_rows(settings.batch_size),
        )
        with (
            MetricsLog(run_dir, start, checkpoint_every=settings.checkpoint_every)
            if is_first
            else nullcontext() as log,
            Progress(settings.steps, start, title) if is_first else nullcontext() as progress,
            Watchdog() as watchdog,
        ):
            seconds = log.seconds if log is not None else 0.0
            clock = time.perf_counter()

            def record(
                step: int, rate: float, metrics: dict[str, jax.Array], weights: Parameters | None = None
            ) -> None:
                nonlocal seconds, clock
                loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
                now = time.perf_counter()
                seconds, took, clock = seconds + now - clock, now - clock, now
                rows = start_row + (step - start) * settings.batch_size
                line = {
                    "step": step,
                    "tokens": rows * config.data.context_length,
                    "loss": loss,
                    "bits_per_byte": loss / math.log(2) / bytes_per_token,
                    "learning_rate": rate,
                    "grad_norm": grad_norm,
                    "tokens_per_second": settings.batch_size * config.data.context_length / took,
                    "seconds": seconds,
                }
                if weights is not None and math.isfinite(loss):
                    watchdog.done(step, measures=True)
                    line |= held_out.measure(weights)
                    now = time.perf_counter()
                    seconds, clock = seconds + now - clock, now
                watchdog.done(step)
                folder.check()
                if log is not None and progress is not None:
                    log.write(line)
                    progress.update(line)
                for name, value in (("loss", loss), ("norm of the gradient", grad_norm)):
                    if not math.isfinite(value):
                        raise checkpoints.diverged(f"the {name} of step {step} is {value}")
                checkpoints.confirm(step)

            step, pending = start, None
            for step in range(start + 1, settings.steps + 1):
                rate = learning_rate(settings, step - 1)
                top_k = None
                if settings.top_k_anneal_steps:
                    top_k = jnp.int32(annealed_top_k(config, step - 1))
                batch = on_mesh(next(batches), settings.batch_size)
                state, metrics = step_fn(state, batch, jnp.float32(rate), top_k)
                # Fetched one step late, so that the host never waits for the device.
                if pending is not None:
                    record(*pending)
                pending = step, rate, metrics
                is_last = stops_at(step) or step == settings.steps
                checkpoints.save(step, state, metrics, force=is_last)
                if held_out.is_due(step):  # now, for the next step takes the weights
                    record(*pending, state.parameters)
                    pending = None
                if is_last:
                    break
            if pending is not None:
                record(*pending)
    return step
