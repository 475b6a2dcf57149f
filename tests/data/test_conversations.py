"""Conversations: what a template makes of them, which tokens are scored, and how they lie in rows."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from untrained import config_of, model_of

from mc_jax.cli import main
from mc_jax.data._readers import Reading
from mc_jax.data.conversations import ChatTemplate, conversation, read_template
from mc_jax.data.dataset import open_prepared
from mc_jax.data.documents import Document, tokenize
from mc_jax.data.prepare import prepare
from mc_jax.data.rows import Rows
from mc_jax.data.split import Share
from mc_jax.data.store import memory_store, open_store, write_store
from mc_jax.data.tokenizer import ByteTokenizer, train_bpe
from mc_jax.data.windows import evaluation_windows
from mc_jax.training.step import token_losses

CHAT = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Anne."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Bath."},
]
# As templates of tokenizers are written, with blocks on lines of their own.
CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def responses(document: Document) -> list[str]:
    assert document.responses is not None
    return [document.text[start:stop] for start, stop in document.responses]


def store_of(*documents: Document, tokenizer=None):
    tokenizer = tokenizer or ByteTokenizer()
    return memory_store(tokenize(documents, tokenizer), tokenizer)


def test_a_prompt_and_its_response_stand_as_they_are():
    for name in ("response", "completion"):
        found = conversation("a:1", {"prompt": "2 + 2 =", name: " 4"}, ChatTemplate(), place="a:1")
        assert found.text == "2 + 2 = 4"
        assert responses(found) == [" 4"]


def test_messages_are_written_by_the_plain_template_or_by_the_user_s():
    plain = conversation("a:1", {"messages": CHAT}, ChatTemplate(), place="a:1")
    assert plain.text == ("<|user|>\nWho?\n<|assistant|>\nAnne.\n<|user|>\nWhere?\n<|assistant|>\nIn Bath.\n")
    assert responses(plain) == ["Anne.\n", "In Bath.\n"]
    own = conversation("a:1", {"messages": CHAT}, ChatTemplate(CHATML), place="a:1")
    assert own.text.startswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\nAnne.<|im_end|>\n")
    assert responses(own) == ["Anne.<|im_end|>\n", "In Bath.<|im_end|>\n"]
    pair = conversation("a:1", {"prompt": "Who?", "response": "Anne."}, ChatTemplate(CHATML), place="a:1")
    assert responses(pair) == ["Anne.<|im_end|>\n"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_tokens_of_responses_are_scored_and_the_end_after_the_last(tokenizer):
    used = ByteTokenizer() if tokenizer == "bytes" else train_bpe(["Who? Anne. Where? In Bath."] * 9, 270)
    document = conversation("a:1", {"messages": CHAT}, ChatTemplate(), place="a:1")
    store = store_of(document, tokenizer=used)
    tokens = store.document(0)
    mask = store.is_scored(0, 0, len(tokens) + 1)
    assert used.decode(tokens) == document.text
    assert used.decode(tokens[mask[:-1]]) == "".join(responses(document))
    assert mask[-1], "the separator after the last response is learned, or a model would not end"
    assert store.num_bytes == len("".join(responses(document)).encode())
    assert store.num_scored == int(mask.sum())
    # As a model is asked: the prompt is tokenized by itself.
    prompt = used.encode(document.text[: document.responses[0][0]])
    np.testing.assert_array_equal(tokens[: len(prompt)], prompt)


def test_an_end_after_a_prompt_is_not_learned():
    store = store_of(Document("a", "Yes. And you?", ((0, 4),)))
    assert store.is_scored(0, 0, 14).tolist() == [True] * 4 + [False] * 10


def test_a_store_on_disk_has_the_same_mask_and_is_one_that_older_code_refuses(tmp_path):
    documents = [Document("a", "ab", ((1, 2),)), Document("b", "cd"), Document("c", "e", ((0, 1),))]
    tokenizer = ByteTokenizer()
    memory = store_of(*documents)
    write_store(tmp_path / "store", tokenize(documents, tokenizer), tokenizer)
    disk = open_store(tmp_path / "store", tokenizer)
    np.testing.assert_array_equal(disk.scored, [0, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(memory.scored, disk.scored)
    assert disk.content_hash() == memory.content_hash()
    assert (
        disk.content_hash() != store_of(*(Document(one.name, one.text) for one in documents)).content_hash()
    )
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())["version"] == 2
    (tmp_path / "store" / "scored.bin").write_bytes(b"\1" * 8)
    with pytest.raises(ValueError, match=r"scored\.bin is missing or not as it was written"):
        open_store(tmp_path / "store", tokenizer)
    write_store(tmp_path / "plain", tokenize([Document("b", "cd")], tokenizer), tokenizer)
    assert not (tmp_path / "plain" / "scored.bin").exists()
    assert json.loads((tmp_path / "plain" / "manifest.json").read_text())["version"] == 1


@pytest.mark.parametrize("align", [1, 4])
def test_rows_hold_conversations_whole_and_every_scored_token_once(align):
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(2, 15, 40).tolist(), 50, 3, 15, 16, 1]
    documents = [
        Document(str(number), chr(97 + number % 26) * length, ((length // 2, length),))
        for number, length in enumerate(lengths)
    ]
    store = store_of(*documents)
    laid = Rows(store, context_length=16, align=align)
    rows = [laid[number] for number in range(len(laid))]
    assert sum(int(row["loss_mask"].sum()) for row in rows) == store.num_scored
    found = []
    for row in rows:
        for number in np.unique(row["document_ids"]):
            places = np.flatnonzero(row["document_ids"] == number)
            assert places[0] % align == 0
            text = [t for t in row["inputs"][places].tolist() if t != store.separator_id]
            found.append("".join(map(chr, text)))
    whole = [document.text for document in documents if len(document.text) < 16]
    for text in whole:
        assert text in found, "a conversation that a row can hold was cut"
    targets = sum(((row["loss_mask"] > 0) & (row["targets"] != store.separator_id)).sum() for row in rows)
    assert targets == sum(len(document.text) - document.responses[0][0] for document in documents)


def test_a_held_out_part_is_of_whole_conversations(tmp_path):
    lines = [{"prompt": f"{number}? ", "response": f"{number}!"} for number in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "out",
        held_out=Share(),
        tokenizer="bytes",
        reading=Reading(template=ChatTemplate()),
    )
    assert (len(found.train), len(found.held_out)) == (4, 1)
    text = found.tokenizer.decode(found.held_out.document(0))
    assert re.fullmatch(r"(\d)\? \1!", text), text


def test_every_scored_token_weighs_alike_in_the_loss_of_a_batch():
    """By hand: the mean of the losses of responses, each read alone, whatever rows they lie in."""
    documents = [Document(str(n), "a" * n + "b" * (9 - n) + ".", ((n, 10),)) for n in (1, 4, 8)]
    store = store_of(*documents)
    # Of caches a packed document has others than one alone, for segments lie where rows have them.
    model = model_of(config_of(context_length=32, aggregation="none"))
    alone = []
    for batch in evaluation_windows(store, context_length=32, stride=32, batch_size=1):
        losses = np.asarray(token_losses(model, {name: jnp.asarray(x) for name, x in batch.items()}))
        alone += losses[batch["loss_mask"] > 0].tolist()
    assert len(alone) == store.num_scored
    rows = Rows(store, context_length=24)
    batch = {name: jnp.stack([jnp.asarray(rows[i][name]) for i in range(len(rows))]) for name in rows[0]}
    packed = np.asarray(token_losses(model, batch))
    np.testing.assert_allclose(np.sort(packed[batch["loss_mask"] > 0]), np.sort(alone), rtol=2e-5)


def test_the_command_prepares_conversations_that_training_and_eval_read(tmp_path, capsys):
    lines = [{"messages": CHAT}, *({"prompt": f"{n} + 1 =", "response": f" {n + 1}"} for n in range(12))]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    words = [
        "prepare",
        str(tmp_path / "chat.jsonl"),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        "bytes",
    ]
    assert main([*words, "--responses", "--template", str(tmp_path / "tokenizer_config.json")]) == 0
    assert "of them scored" in capsys.readouterr().out
    dataset = open_prepared(tmp_path / "out")
    texts = [dataset.tokenizer.decode(dataset.train.document(n)) for n in range(len(dataset.train))]
    assert all("<|im_start|>assistant\n" in text for text in texts)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            {"text": "x"},
            "a:1 has neither messages nor texts prompt and response (or completion); it has: text",
        ),
        ({"prompt": "x", "response": ""}, "has an empty response"),
        ({"messages": []}, "messages is no list"),
        ({"messages": [{"role": "user", "content": None}]}, "messages is no list"),
        ({"messages": CHAT[:1]}, 'has no message of the role "assistant"'),
        (["x"], "messages is no list"),
        ("x", "it has: str"),
    ],
)
def test_what_is_no_conversation_is_one_line_with_its_place(line, told):
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        conversation("a:1", line, ChatTemplate(), place="a:1")
    assert "\n" not in str(error.value)


def test_a_template_that_cannot_be_meant_is_one_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "after.jinja").write_text(
        "{{ messages | map(attribute='content') | join }}{{ messages | length }}"
    )
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no system') }}")
    words = ["prepare", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    for options, told in (
        (["--responses", "--template", "broken.jinja"], "is no Jinja template (line 1"),
        (["--responses", "--template", "none.json"], 'has no text "chat_template"'),
        (["--responses", "--template", "no.jinja"], "there is no file"),
        (["--responses", "--template", "after.jinja"], "a.jsonl:1: the template writes a response otherwise"),
        (["--responses", "--template", "refuses.jinja"], "does not take the messages (no system)"),
        (["--template", "after.jinja"], "--template has no effect without --responses"),
        (["--responses", "--text-field", "body"], "--text-field has no effect with --responses"),
    ):
        given = [str(tmp_path / word) if "." in word else word for word in options]
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    assert main(["prepare", str(tmp_path / "a.txt"), *words[2:], "--responses"]) == 2
    assert "has no prompts and responses" in capsys.readouterr().err


def test_a_template_reaches_nothing(tmp_path):
    template = ChatTemplate("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="does not take the messages"):
        template.render(CHAT)
    assert read_template(None).render(CHAT[:1], asks=True) == "<|user|>\nWho?\n<|assistant|>\n"
