import dataclasses
import json

import pytest

from mc_jax import config as configs
from mc_jax.config import Config, ConfigError

# Every knob there is. A new one is a decision: it must earn its place here, and be read somewhere.
FIELDS = (
    "model.num_layers",
    "model.model_dim",
    "model.num_heads",
    "model.mlp_dim",
    "model.memory",
    "model.memory_depth",
    "model.memory_branch",
    "model.aggregation",
    "model.segment_length",
    "model.segmentation",
    "model.segment_init",
    "model.chunk_length",
    "model.top_k",
    "model.router_blocks",
    "model.router_keys",
    "model.router_dim",
    "model.online_logit",
    "model.cache_scale",
    "model.convolution_width",
    "model.tie_embeddings",
    "model.layer_pattern",
    "model.attention_window",
    "data.corpus",
    "data.tokenizer",
    "data.vocab_size",
    "data.context_length",
    "training.steps",
    "training.batch_size",
    "training.accumulation",
    "training.optimizer",
    "training.learning_rate",
    "training.learning_rate_factors",
    "training.schedule",
    "training.warmup_steps",
    "training.decay_steps",
    "training.final_learning_rate",
    "training.weight_decay",
    "training.beta1",
    "training.beta2",
    "training.train",
    "training.freeze",
    "training.adapter_rank",
    "training.top_k_anneal_steps",
    "training.gradient_clip",
    "training.compute_dtype",
    "training.remat",
    "training.seed",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "mesh.replica",
    "mesh.fsdp",
    "mesh.sequence",
    "mesh.tensor",
    "evaluation.every",
    "evaluation.tokens",
    "evaluation.stride",
    "evaluation.batch_size",
    "evaluation.sample_prompt",
    "evaluation.sample_tokens",
)
MOST_FIELDS = 80


def changed(**fields: object) -> Config:
    """The default config with fields changed: changed(model__num_layers=3)."""
    config = Config()
    for path, value in fields.items():
        section, name = path.split("__")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config


def test_the_list_of_fields_is_frozen():
    actual = tuple(
        f"{section}.{name}" for section, fields in configs.to_dict(Config()).items() for name in fields
    )
    assert actual == FIELDS, "a config field was added, renamed or removed: change FIELDS if that is decided"
    assert len(FIELDS) <= MOST_FIELDS, f"more than {MOST_FIELDS} settings: take one out before adding one"


def test_every_field_tells_what_it_is(capsys):
    from mc_jax.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    lines = [line.strip("│| ") for line in capsys.readouterr().out.splitlines()]
    for field in FIELDS:
        option = "--" + field.replace("_", "-")
        (at,) = (number for number, line in enumerate(lines) if line.startswith((option + " ", option + ",")))
        assert not lines[at + 1].startswith(("(default", "--")), f"{field} needs a docstring in mc_jax/config"


def test_the_default_config_is_valid():
    assert configs.validate(Config()) == Config()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model__segment_length": 100, "model__chunk_length": 64},
            "model.chunk_length 64 does not divide model.segment_length 100; "
            "set model.segment_length to 64 or 128, or model.chunk_length to a divisor of 100",
        ),
        (
            {"model__segment_length": 32, "model__chunk_length": 64},
            "model.chunk_length 64 does not divide model.segment_length 32; "
            "set model.segment_length to 64, or model.chunk_length to a divisor of 32",
        ),
        (
            {"model__model_dim": 100, "model__num_heads": 16},
            "model.num_heads 16 does not divide model.model_dim 100; "
            "set model.model_dim to 96 or 112, or model.num_heads to a divisor of 100",
        ),
        (
            {"training__batch_size": 8, "training__accumulation": 3},
            "training.accumulation 3 does not divide training.batch_size 8; "
            "set training.batch_size to 6 or 9, or training.accumulation to a divisor of 8",
        ),
        ({"model__num_layers": 0}, "model.num_layers is 0; set it to 1 or more"),
        ({"model__num_layers": "four"}, "model.num_layers is 'four'; set it to an integer"),
        ({"model__num_layers": True}, "model.num_layers is True; set it to an integer"),
        ({"model__tie_embeddings": 1}, "model.tie_embeddings is 1; set it to True or False"),
        (
            {"model__memory": "liner"},
            "model.memory is 'liner'; set it to 'linear' or 'swla' or 'delta' or 'dla' or 'titans'",
        ),
        (
            {"training__compute_dtype": "float16"},
            "training.compute_dtype is 'float16'; set it to 'float32' or 'bfloat16' or None",
        ),
        ({"model__router_dim": 0}, "model.router_dim is 0; set it to 1 or more"),
        (
            {"model__router_dim": 4, "model__router_keys": "keys"},
            "model.router_dim 4 has no effect with model.router_keys 'keys'; set it to None",
        ),
        (
            {"model__router_dim": 4, "model__aggregation": "residual"},
            "model.router_dim 4 has no effect with model.aggregation 'residual'; set it to None",
        ),
        ({"training__learning_rate": 0.0}, "training.learning_rate is 0.0; set it above 0"),
        (
            {"training__learning_rate_factors": ("mlp=0",)},
            "training.learning_rate_factors has 'mlp=0'; write PATTERN=FACTOR with a factor above 0, "
            "for example router_query=10",
        ),
        (
            {"training__learning_rate_factors": ("mlp=2", "mlp=3")},
            "training.learning_rate_factors has mlp twice; leave one out",
        ),
        (
            {"training__learning_rate": float("nan")},
            "training.learning_rate is nan; set it to a finite number",
        ),
        ({"training__gradient_clip": -1.0}, "training.gradient_clip is -1.0; set it above 0"),
        ({"training__weight_decay": -0.1}, "training.weight_decay is -0.1; set it to 0 or more"),
        ({"training__beta2": 1.0}, "training.beta2 is 1.0; set it in [0, 1)"),
        ({"training__seed": -1}, "training.seed is -1; set it to 0 or more"),
        ({"mesh__fsdp": 0}, "mesh.fsdp is 0; set it to 1 or more, or to -1"),
        ({"mesh__sequence": -1}, "mesh.sequence is -1; set it to 1 or more"),
        ({"mesh__tensor": -1}, "mesh.tensor is -1; set it to 1 or more"),
        (
            {"training__steps": 10},
            "training.warmup_steps 100 is more than training.steps 10; "
            "set training.warmup_steps to 10 or less",
        ),
        (
            {"training__schedule": "wsd"},
            "training.schedule 'wsd' needs training.decay_steps; set it, for example to 100",
        ),
        (
            {"training__decay_steps": 7},
            "training.decay_steps 7 has no effect with training.schedule 'cosine'; set it to None",
        ),
        (
            {"training__schedule": "wsd", "training__decay_steps": 901},
            "training.warmup_steps 100 and training.decay_steps 901 are more than training.steps 1000; "
            "set training.decay_steps to 900 or less",
        ),
        (
            {"training__schedule": "constant", "training__final_learning_rate": 1e-4},
            "training.final_learning_rate 0.0001 has no effect with training.schedule 'constant'; "
            "set it to 0",
        ),
        (
            {"data__tokenizer": "bpe"},
            "data.tokenizer 'bpe' has no size; set data.vocab_size, for example to 4096",
        ),
        (
            {"data__vocab_size": 4096},
            "data.vocab_size 4096 has no effect with data.tokenizer 'bytes'; "
            "set data.tokenizer to 'bpe' or data.vocab_size to None",
        ),
        (
            {"evaluation__stride": 8192},
            "evaluation.stride 8192 is more than data.context_length 4096; "
            "set evaluation.stride to 4096 or less",
        ),
    ],
)
def test_a_contradiction_names_field_and_cure_in_one_line(fields, message):
    with pytest.raises(ConfigError) as error:
        configs.validate(changed(**fields))
    assert str(error.value) == message


def test_an_integer_may_stand_for_a_number():
    configs.validate(changed(training__learning_rate=1))


def test_a_config_survives_json():
    config = changed(data__tokenizer=None, training__compute_dtype="bfloat16", evaluation__stride=7)
    assert configs.from_json(configs.to_json(config)) == config


def test_an_mlp_memory_from_before_there_were_branches_goes_on_as_plain():
    sections = json.loads(configs.to_json(changed(model__memory="titans", model__memory_depth=2)))
    assert configs.from_dict(sections).model.memory_branch is None, "what this release wrote is as it was"
    del sections["model"]["memory_branch"]
    assert configs.from_dict(sections).model.memory_branch == "plain"
    sections["model"] |= {"memory": "linear", "memory_depth": None}
    assert configs.from_dict(sections).model.memory_branch is None, "a matrix has no branch"


def test_json_has_every_field():
    sections = json.loads(configs.to_json(Config()))
    assert {f"{section}.{name}" for section, fields in sections.items() for name in fields} == set(FIELDS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"modle": {}}', "there is no setting modle; did you mean model?"),
        ('{"model": {"num_layer": 3}}', "there is no setting model.num_layer; did you mean num_layers?"),
        ("{", "config.json is not JSON"),
    ],
)
def test_a_config_json_that_cannot_be_read_says_why(text, message):
    with pytest.raises(ConfigError) as error:
        configs.from_json(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_differences_name_fields_and_both_values():
    assert configs.differences(Config(), Config()) == {}
    assert configs.differences(changed(model__num_layers=3), Config()) == {"model.num_layers": (3, 12)}


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.num_layers = 3  # pyrefly: ignore
