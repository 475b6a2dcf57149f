"""The model `mc_jax` of lm-evaluation-harness: a run, read as it was trained or otherwise."""

import itertools
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from etils import epath
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from mc_jax.data.windows import check_stride
from mc_jax.evaluation.dial import DIAL, must_have_weights, turn, turned_config
from mc_jax.evaluation.harness.generation import Decoding, decoding_of, generate_texts
from mc_jax.evaluation.harness.likelihood import (
    Continuation,
    continuation_likelihoods,
    text_log_likelihoods,
)
from mc_jax.evaluation.origin import origin_of
from mc_jax.evaluation.tasks.sample import prompt_tokens
from mc_jax.evaluation.tasks.scoring import Judge
from mc_jax.training.run import CONFIG_FILE, Run, load_run, read_config

NAME = "mc_jax"
_NEW_TOKENS = 256  # lm-eval's own, where a task says nothing
_DIAL = {name.partition(".")[2]: name for name in DIAL if not name.startswith("evaluation.")}
_LOGGER = logging.getLogger(__name__)


@register_model(NAME)
class HarnessModel(TemplateLM):
    """A run's model as lm-eval asks for it.

    A text begins with the run's separator, which is not scored. What is longer than the context is cut from
    the left, and nothing is put before the rest; `loglikelihood_rolling` reads windows instead. All is read
    on one device, in batches whose rows see nothing of each other.

    Args:
      run: as `load_run` read it, or `turn` turned it.
      batch_size: rows that are read together; no log-likelihood depends on it. None: the run's own.
      stride: targets that windows of `loglikelihood_rolling` score, but a text's first. None: lm-eval's, the
        context length.
    """

    def __init__(self, run: Run, *, batch_size: int | None = None, stride: int | None = None):
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; set it to 1 or more")
        self.run = run
        self.stride = run.config.data.context_length if stride is None else stride
        check_stride(self.stride, run.config.data.context_length)
        self.batch_size = batch_size or run.config.evaluation.batch_size
        self._tokenizer = run.dataset.tokenizer
        self._judge = Judge(model=run.model, tokenizer=self._tokenizer, batch_size=self.batch_size)
        self._cut: dict[str, int] = {}

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """What `create_from_arg_obj` gives, from "run=runs/quickstart,aggregation=sparse,top_k=1"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """Read a run and turn it.

        Args:
          arg_dict: `--model_args`: run, a folder; step; batch_size; stride; and of the dial segment_length,
            aggregation, top_k, segmentation, context_length.
          additional_config: lm-eval's own options: batch_size, where "auto" is the run's, and device,
            which it always sets: JAX has its own.

        Raises:
          ValueError: no run, an unknown setting, or one that has no effect or contradicts another.
        """
        given = dict(arg_dict)
        given.pop("trust_remote_code", None)  # lm-eval puts it there for models of the hub
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if "max_batch_size" in others:
            raise ValueError(f"--max_batch_size has no effect on the model {NAME}; leave it out")
        batch_size = given.pop("batch_size", others.get("batch_size"))
        if isinstance(batch_size, str):
            batch_size = None if batch_size.startswith("auto") else _whole_number("batch_size", batch_size)
        folder, step, stride = (given.pop(name, None) for name in ("run", "step", "stride"))
        if folder is None:
            raise ValueError(f"the model {NAME} needs a run: --model_args run=runs/quickstart")
        unknown = sorted(set(given) - set(_DIAL))
        if unknown:
            known = ", ".join(("run", "step", "batch_size", "stride", *_DIAL))
            raise ValueError(f"the model {NAME} has no setting {unknown[0]!r}; known are {known}")
        changes = {_DIAL[name]: value for name, value in given.items()}
        return cls(open_run(str(folder), step, changes), batch_size=batch_size, stride=stride)

    @property
    def eot_token_id(self) -> int:
        """The separator, which begins and ends documents."""
        return self._tokenizer.separator_id

    @property
    def max_length(self) -> int:
        """Tokens that are read at once: the context length."""
        return self.run.config.data.context_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens that are generated where a task says nothing."""
        return min(_NEW_TOKENS, max(1, self.max_length // 2))

    @property
    def tokenizer_name(self) -> str:
        """What tells tokenizers apart in lm-eval's caches: the fingerprint."""
        return f"{NAME}-{self._tokenizer.fingerprint}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, behind the separator unless `add_special_tokens` is False."""
        del kwargs
        if add_special_tokens is False:
            return self._tokenizer.encode(string).tolist()
        return prompt_tokens(self._tokenizer, string).tolist()

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; separators are left out."""
        return self._tokenizer.decode(tokens)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: which weights, read how, and how often a context was cut."""
        return {
            "model": NAME,
            **origin_of(self.run).to_json(),
            "context_length": self.max_length,
            "stride": self.stride,
            "contexts_cut": dict(self._cut),
        }

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of the context length."""
        texts = [request.args[0] for request in requests]
        with _progress("windows", disable_tqdm) as told:
            found = text_log_likelihoods(
                self._judge, texts, length=self.max_length, stride=self.stride, told=told
            )
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each prompt before the first stop."""
        found = [""] * len(requests)
        groups: dict[Decoding, list[int]] = {}
        for number, request in enumerate(requests):
            _, settings = request.args
            groups.setdefault(decoding_of(settings, self.max_gen_toks), []).append(number)
        with _progress("generated", disable_tqdm, len(requests)) as told:
            for decoding, numbers in groups.items():
                prompts = [
                    np.array(self.tok_encode(requests[number].args[0]), np.int32) for number in numbers
                ]
                self._tell_cuts(
                    "generate_until", [len(prompt) for prompt in prompts], self.max_length - decoding.tokens
                )
                texts = generate_texts(self._judge, prompts, decoding, length=self.max_length, told=told)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs
        asked = [
            Continuation(np.array(context, np.int32), np.array(tokens, np.int32))
            for _, context, tokens in requests
        ]
        self._tell_cuts(
            "loglikelihood", [len(one.context) + len(one.tokens) - 1 for one in asked], self.max_length
        )
        with _progress("continuations", disable_tqdm, len(asked)) as told:
            found = continuation_likelihoods(self._judge, asked, length=self.max_length, told=told)
        for (texts, _, _), value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, value)
        return found

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """What lm-eval's gives, but both sides tokenized apart where a token would cross the boundary."""
        context_ids, ids = super()._encode_pair(context, continuation)
        whole = context + continuation
        if int(self._tokenizer.bytes_of(itertools.chain(context_ids, ids)).sum()) == len(whole.encode()):
            return context_ids, ids
        before = context.rstrip()  # lm-eval counts white space at its end to the continuation
        return self.tok_encode(before), self.tok_encode(whole[len(before) :], add_special_tokens=False)

    def _tell_cuts(self, kind: str, lengths: Sequence[int], most: int) -> None:
        """Count the contexts that are too long, and say so."""
        too_long = sum(length > most for length in lengths)
        self._cut[kind] = self._cut.get(kind, 0) + too_long
        if too_long:
            _LOGGER.warning(
                "%s: %d of %d contexts are cut from the left to the %d tokens that a context of %d leaves",
                kind,
                too_long,
                len(lengths),
                most,
                self.max_length,
            )


def open_run(folder: str, step: int | None, changes: Mapping[str, Any]) -> Run:
    """Read a run, turned by settings of the dial; what they are refused for is told before it is loaded.

    Raises:
      ValueError: as of `load_run` and `turn`.
    """
    path = epath.Path(folder)
    if changes and (path / CONFIG_FILE).exists():
        trained = read_config(path)
        turned_config(trained, changes)
        must_have_weights(folder, trained, changes)
    run = load_run(path, step)
    return turn(run, changes) if changes else run


def _whole_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}; set it to a whole number, or to auto") from None


@contextmanager
def _progress(what: str, disable: bool, total: int | None = None) -> Generator[Callable[[int], Any]]:
    with tqdm(desc=f"{NAME}: {what}", total=total, disable=disable) as bar:
        yield bar.update
