"""The command `mc-jax prepare`: text files to a folder that training reads."""

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mc_jax._arguments import UsageError, parse
from mc_jax.stop_signals import current

_SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Tokenize text files into a folder that training reads.

    Files are .txt and .md (a document each), .jsonl and .ndjson (one a line), .json (one an element of an
    array) and .parquet (one a row); all but the last also with .gz, .bz2, .xz or .zst.
    """

    inputs: Annotated[
        tyro.conf.Positional[tuple[str, ...]],
        tyro.conf.arg(metavar="INPUT [INPUT ...]", help_behavior_hint="(required)"),
    ]
    """Training text: files, folders, patterns such as 'books/**/*.txt', or - for standard input."""
    output: Path
    """Folder to be made, for --data.corpus of mc-jax train; it is there whole or not at all."""
    held_out: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="FILE ...|SHARE|none", help_behavior_hint="(default: 0.01)"),
    ] = ()
    """What is scored, not trained on: files, "none", or the share of the inputs that is split off."""
    seed: int = 0
    """Draws the documents that are split off; another one draws others."""
    tokenizer: str = "bpe"
    """"bpe" (byte-level, trained on the inputs), "bytes", or a tokenizer.json that mc-jax wrote."""
    vocab_size: int | None = None
    """Ids of the "bpe" tokenizer, for example 4096; None with another."""
    text_field: str = "text"
    """Field of JSON, or column of .parquet, that has the text; a.b is field b of field a."""
    responses: tyro.conf.FlagCreatePairsOff[bool] = False
    """Lines, elements or rows have a prompt and a response (or completion), or chat messages; the responses
    alone are learned and scored."""
    template: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --responses: the chat template, in Jinja or in a tokenizer_config.json; None: a plain one."""
    format: str | None = None
    """Read all files as this, such as jsonl or txt.gz, whatever they are called; None: by their names, and
    standard input as txt."""
    skip_bad: tyro.conf.FlagCreatePairsOff[bool] = False
    """Count what cannot be read, leave it out and go on; else the first such place ends it."""
    drop_duplicates: tyro.conf.FlagCreatePairsOff[bool] = False
    """Leave out documents that are equal to an earlier or a held-out one; they are counted anyway."""


def prepare(arguments: Sequence[str]) -> None:
    """Tokenize text, jsonl or parquet files into a token store."""
    chosen = parse(PrepareArguments, arguments, program="mc-jax prepare")
    if not chosen.inputs:
        raise UsageError("no input is named; write mc-jax prepare FILE ... --output FOLDER")
    if chosen.template is not None and not chosen.responses:
        raise UsageError("--template has no effect without --responses; add that, or leave it out")
    if chosen.responses and chosen.text_field != PrepareArguments.text_field:
        raise UsageError("--text-field has no effect with --responses; leave it out")
    fraction = _fraction(chosen.held_out)
    if fraction is None and chosen.seed:
        raise UsageError("--seed has no effect without a share that is held out; leave it out")

    from mc_jax.data._readers import Reading
    from mc_jax.data.conversations import read_template
    from mc_jax.data.files import read_json, remove_unfinished
    from mc_jax.data.prepare import prepare as write_store
    from mc_jax.data.split import Share
    from mc_jax.data.summary import KIND, SUMMARY_FILE, VERSION, told_lines

    current().tidy = remove_unfinished

    files = () if chosen.held_out == ("none",) else chosen.held_out
    with contextlib.closing(_ProgressLine()) as line:
        dataset = write_store(
            chosen.inputs,
            chosen.output,
            held_out=files if fraction is None else Share(fraction=fraction, seed=chosen.seed),
            tokenizer=chosen.tokenizer,
            vocab_size=chosen.vocab_size,
            reading=Reading(
                text_field=chosen.text_field,
                template=read_template(chosen.template) if chosen.responses else None,
                format=chosen.format,
                skip_bad=chosen.skip_bad,
                drop_duplicates=chosen.drop_duplicates,
            ),
            told=line.tell,
        )
    for name, store in (("training", dataset.train), ("held-out", dataset.held_out)):
        if store is not None:
            scored = "" if store.scored is None else f", {store.num_scored:,} of them scored"
            told = (
                f"{store.num_bytes:,} {'scored ' if scored else ''}bytes, {store.num_tokens:,} tokens{scored}"
            )
            print(f"{name}: {len(store):,} documents, {told}")
    path = chosen.output.expanduser() / SUMMARY_FILE
    for told in told_lines(read_json(path, kind=KIND, version=VERSION, fields=(), cure="prepare it again")):
        print(told)
    if dataset.held_out is not None and fraction is not None:
        first, *others = dataset.held_out.names
        print(
            f"held out was split off the inputs: {first}{f' and {len(others):,} more' if others else ''}; "
            "--held-out names files, a share, or none"
        )
    print(f"all of these counts are in {path}")
    print(
        f"train on it: mc-jax train RECIPE --data.corpus {shlex.quote(str(chosen.output))} "
        "--data.tokenizer None --data.vocab-size None"
    )


def _fraction(held_out: Sequence[str]) -> float | None:
    """The share of the inputs that is to be held out; None: what is held out is named, or nothing is."""
    if not held_out:
        return 0.01
    with contextlib.suppress(ValueError):
        return float(held_out[0]) if len(held_out) == 1 else None
    return None


class _ProgressLine:
    """How much is done, and the time left: on a terminal one line that changes, in a log one now and then."""

    def __init__(self):
        self._is_terminal = sys.stderr.isatty()
        self._every = 0.2 if self._is_terminal else _SECONDS_BETWEEN_LINES
        self._what, self._begin, self._last = "", 0.0, time.monotonic()

    def tell(self, what: str, done: float) -> None:
        """Say what is being done, and how much of it is, from 0 to 1."""
        now = time.monotonic()
        if what != self._what:
            self._what, self._begin = what, now
        if now - self._last < self._every or not done:
            return
        self._last = now
        left = (now - self._begin) * (1 - done) / done
        line = f"{what}: {done:.0%}, {int(left // 60)}:{int(left % 60):02} left"
        print(
            f"\r{line:60}" if self._is_terminal else line,
            end="" if self._is_terminal else "\n",
            file=sys.stderr,
        )
        sys.stderr.flush()

    def close(self) -> None:
        """Leave the line."""
        if self._is_terminal and self._what:
            print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
