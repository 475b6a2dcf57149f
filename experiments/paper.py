"""The models of the Memory Caching paper (arXiv:2602.24281, Table 6), and Transformer++, at four sizes.

A name is paper-SIZE-MEMORY-AGGREGATION or paper-SIZE-transformer, for example paper-1.3b-linear-gated; with
-16k at its end, rows have 16,384 tokens and not 4,096.

- SIZE: 170m (12 layers of 768, 16 heads, learning rate 3e-3, 15 B tokens), 340m (24 of 1,024, 16 heads,
  1.5e-3, 15 B), 760m (24 of 1,536, 16 heads, 1.25e-3, 30 B), 1.3b (18 of 2,048, 8 heads, 7e-4, 100 B).
- MEMORY: linear, swla (matrices), dla, titans (MLPs).
- AGGREGATION: none, gated, soup, sparse (the best 2), and null, of its successor (arXiv:2608.12435); segments
  of 256 tokens, each going on from the last.

The paper tells no MLP width. Here it is what brings a model to its size's parameters: the router's two maps,
the output gate and what MLP memories start from are paid for by the MLP, so all members of a size compare as
equals. Vocabulary 32,000, embeddings tied.

- Data: a corpus in `corpora/fineweb-32k`, made by `mc-jax prepare ... --vocab-size 32000 --output
  corpora/fineweb-32k`; the paper took FineWeb. Another one: --data.corpus FOLDER.
- Machine: as many accelerators as divide the 128 rows of a batch (32 with -16k), which share weights and
  optimizer state (mesh.fsdp -1).
- Expected: 28,610 steps of 524,288 tokens for 15 B, 57,220 for 30 B, 190,735 for 100 B. No run has been made.
- Time, as the compiler estimates it for two rows a chip (`docs/performance.md`), 100 B tokens on 64 chips:
  1.3b-linear-gated on v5p 0.29 s a step, 16 hours, on v5e 0.72 s, 38 hours, on v6e 0.27 s, 14 hours;
  1.3b-linear-sparse on v5p 0.30 s, on v5e 0.72 s, on v6e 0.28 s; 1.3b-titans-gated on v5p and v6e 0.58 s,
  31 hours; 1.3b-transformer on v5p 0.32 s, on v5e 0.73 s, on v6e 0.28 s. Others: `mc-jax plan NAME
  --topology v5p:4x4x4`.
- What drives it: the products of the MLP (a third) and of the mixer's maps (a quarter); then what is kept
  between layers, norms and the memories' kernels. With titans, these are half of it.
"""

import dataclasses
from typing import Literal

from mc_jax.config import (
    AggregationName,
    Config,
    DataConfig,
    EvaluationConfig,
    MemoryName,
    ModelConfig,
    Remat,
    TrainingConfig,
)
from mc_jax.facts import AGGREGATION_FACTS, MEMORY_FACTS

NAMES = "SIZE-MEMORY-AGGREGATION"
VOCABULARY = 32_000
TOKENS_PER_STEP = 2**19

_MEMORIES: tuple[MemoryName, ...] = ("linear", "swla", "dla", "titans")
_AGGREGATIONS: tuple[AggregationName, ...] = ("none", "gated", "soup", "sparse", "null")
_WIDTHS_OF = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A row of the paper's Table 6."""

    parameters: float
    layers: int
    dim: int
    heads: int
    learning_rate: float
    tokens: float
    remat_16k: Remat


SIZES = {
    "170m": Size(
        parameters=170e6, layers=12, dim=768, heads=16, learning_rate=3e-3, tokens=15e9, remat_16k="states"
    ),
    "340m": Size(
        parameters=340e6, layers=24, dim=1024, heads=16, learning_rate=1.5e-3, tokens=15e9, remat_16k="states"
    ),
    "760m": Size(
        parameters=760e6,
        layers=24,
        dim=1536,
        heads=16,
        learning_rate=1.25e-3,
        tokens=30e9,
        remat_16k="blocks",
    ),
    "1.3b": Size(
        parameters=1.3e9, layers=18, dim=2048, heads=8, learning_rate=7e-4, tokens=100e9, remat_16k="blocks"
    ),
}


def configs() -> dict[str, Config]:
    """All members, by what follows "paper-" in their names."""
    found = {}
    for ending, context in (("", 4096), ("-16k", 16_384)):
        for name, size in SIZES.items():
            for memory in _MEMORIES:
                for aggregation in _AGGREGATIONS:
                    member = f"{name}-{memory}-{aggregation}{ending}"
                    found[member] = _config(size, context, memory, aggregation)
            found[f"{name}-transformer{ending}"] = _config(size, context, "attention", "none")
    return found


def _config(
    size: Size, context: int, memory: MemoryName | Literal["attention"], aggregation: AggregationName
) -> Config:
    deep, top_k = _is_deep(memory), AGGREGATION_FACTS[aggregation].top_k
    model = ModelConfig(
        num_layers=size.layers,
        model_dim=size.dim,
        num_heads=size.heads,
        mlp_dim=_mlp_dim(size, memory, aggregation),
        aggregation=aggregation,
        segment_length=256,
        top_k=2 if top_k == "always" else None,
        memory_depth=2 if deep else None,
        # Where there is none, its name stays the default.
        memory=ModelConfig().memory if memory == "attention" else memory,
        layer_pattern=("attention",) if memory == "attention" else ("memory",),
    )
    return Config(
        model=model,
        data=DataConfig(corpus="corpora/fineweb-32k", tokenizer=None, context_length=context),
        training=TrainingConfig(
            steps=round(size.tokens / TOKENS_PER_STEP),
            batch_size=TOKENS_PER_STEP // context,
            learning_rate=size.learning_rate,
            warmup_steps=2000,
            # What is kept has to be there at once, and of a row of 16K tokens is four times as much.
            remat="maps" if context == 4096 else size.remat_16k,
            checkpoint_every=1000,
        ),
        evaluation=EvaluationConfig(every=1000, tokens=2**20),
    )


def _is_deep(memory: str) -> bool:
    return memory != "attention" and MEMORY_FACTS[memory].may_be_mlp


def _mlp_dim(size: Size, memory: str, aggregation: AggregationName) -> int:
    """What is left of the size's parameters for the three maps of an MLP, to the nearest multiple of 128."""
    dim = size.dim
    # Query, key, value, output; a memory's output gate; the router's query and key.
    maps = 4 + (memory != "attention") + 2 * AGGREGATION_FACTS[aggregation].uses_router
    initial = 8 * dim * (dim // size.heads) if _is_deep(memory) else 0
    left = (size.parameters - VOCABULARY * dim) / size.layers - maps * dim**2 - initial
    return round(left / (3 * dim) / _WIDTHS_OF) * _WIDTHS_OF
