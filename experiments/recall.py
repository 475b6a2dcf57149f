"""A small model that recalls by its cached memories: what a growing memory is worth, in two minutes.

- Data: the embedded corpus "pairs": names with words, then the names again, whose words alone are learned;
  64 documents of 16 names and 85 lines are held out.
- Machine: any processor with two cores; no accelerator.
- Expected: two minutes of training on idle cores; 0.08 to 0.12 bits per byte on the words that are held out.
  Of words that were told 80 tokens ago it recalls some 81 %, without its caches 6 % (chance is 3 %), and a
  model without a cache, of as many parameters, 43 % (`mc-jax eval runs/recall --tasks word-pairs`).
"""

from mc_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, TrainingConfig


def config() -> Config:
    """Two layers with memories of 16 x 16 numbers a head, too few for 16 names; a row caches 15 of each."""
    return Config(
        model=ModelConfig(
            num_layers=2,
            model_dim=64,
            num_heads=4,
            mlp_dim=128,
            memory="linear",
            aggregation="gated",
            segment_length=16,
            segment_init="independent",
            chunk_length=16,
        ),
        data=DataConfig(corpus="pairs", tokenizer="bpe", vocab_size=483, context_length=256),
        training=TrainingConfig(
            steps=400,
            batch_size=16,
            optimizer="muon",
            learning_rate=1e-2,
            warmup_steps=40,
            checkpoint_every=100,
        ),
        evaluation=EvaluationConfig(
            every=50, tokens=4096, sample_prompt="Anne garden\nEmma letter\nFrank ring\nEmma"
        ),
    )
