"""The paper's sizes: what a name says is what the model has."""

import jax
import pytest
from flax import nnx

from experiments.paper import SIZES, TOKENS_PER_STEP, VOCABULARY, configs
from mc_jax.nn import LanguageModel

MEMBERS = configs()


def test_every_memory_and_aggregation_is_there_at_every_size():
    assert len(MEMBERS) == 4 * (4 * 5 + 1) * 2


@pytest.mark.parametrize("mixer", ["linear-none", "swla-gated", "dla-soup", "titans-sparse", "transformer"])
@pytest.mark.parametrize("size", SIZES)
def test_a_model_has_the_parameters_of_its_name(size, mixer):
    config = MEMBERS[f"{size}-{mixer}"].model
    model = nnx.eval_shape(lambda: LanguageModel(config, VOCABULARY, rngs=nnx.Rngs(params=0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert count == pytest.approx(SIZES[size].parameters, rel=0.02), f"{count / 1e6:.0f} M parameters"


@pytest.mark.parametrize("name", MEMBERS)
def test_all_see_as_many_tokens_in_a_step_and_in_all(name):
    config, size = MEMBERS[name], SIZES[name.partition("-")[0]]
    assert config.training.batch_size * config.data.context_length == TOKENS_PER_STEP
    assert config.training.steps * TOKENS_PER_STEP == pytest.approx(size.tokens, rel=1e-4)
