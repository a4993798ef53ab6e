"""Prompt sources: what they are made of, in which order they are drawn, how they split, which errors say what."""

from __future__ import annotations

import copy
import json
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from textgen_env.errors import PromptError, UnknownName
from textgen_env.openings import OPENINGS
from textgen_env.prompts import PROMPT_NAMES, SPLITS, DatasetPrompts, Prompt, chat, make_prompts


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- sources


def test_the_openings_in_the_box_are_many_and_all_different():
    source = make_prompts()
    texts = [prompt.text for prompt in source]
    assert len(texts) == len(set(texts)) == 240
    assert all(text == text.strip() and len(text) < 80 for text in texts)
    assert {prompt.metadata["topic"] for prompt in source} == set(OPENINGS)


@pytest.mark.parametrize("name", PROMPT_NAMES)
def test_every_name_gives_prompts_that_split(name):
    assert sum(len(make_prompts(f"{name}:{part}")) for part in SPLITS) == len(make_prompts(name))


def test_a_text_file_holds_one_prompt_a_line(tmp_path):
    source = make_prompts(write(tmp_path / "p.txt", "\ufeffOne day\r\n two spaces \nlast, é"))
    assert [prompt.text for prompt in source] == ["One day", " two spaces ", "last, é"]
    assert [source[i].text for i in (2, 0, 1)] == ["last, é", "One day", " two spaces "]
    assert make_prompts(tmp_path / "p.txt")[1] == source[1]


def test_a_jsonl_line_may_have_a_reference_and_metadata(tmp_path):
    lines = [{"prompt": "a", "reference": "b", "keywords": ["c"]}, {"prompt": "d\n"}]
    source = make_prompts(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)) + "\n"))
    assert list(source) == [Prompt("a", "b", {"keywords": ["c"]}), Prompt("d\n")]
    assert source[1] == Prompt("d\n")


def test_a_list_may_mix_strings_prompts_and_dicts():
    source = make_prompts(["a", Prompt("b", "c"), {"prompt": "d", "topic": 1}])
    assert list(source) == [Prompt("a"), Prompt("b", "c"), Prompt("d", None, {"topic": 1})]
    assert make_prompts(source) is source


def test_a_dataset_gives_prompts_references_and_metadata():
    from datasets import Dataset

    rows = {"prompt": ["a", "b"], "reference": ["c", "d"], "year": [1, 2]}
    source = make_prompts(Dataset.from_dict(rows))
    assert source[1] == Prompt("b", "d", {"year": 2})
    assert DatasetPrompts(Dataset.from_dict(rows), prompt="reference", reference="prompt")[0] == Prompt(
        "c", "a", {"year": 1}
    )
    with pytest.raises(PromptError, match="no column 'prompt' of prompts; it has text"):
        make_prompts(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(PromptError, match="streaming"):
        make_prompts(Dataset.from_dict(rows).to_iterable_dataset())
    with pytest.raises(PromptError, match="no rows"):
        make_prompts(Dataset.from_dict({"prompt": []}))


def test_a_dataset_by_name_with_its_own_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", '{"article": "a b", "title": "c"}\n{"article": "d", "title": "e"}\n')
    spec = {"dataset": str(tmp_path / "data"), "prompt": "article", "reference": "title"}
    assert list(make_prompts(spec)) == [Prompt("a b", "c"), Prompt("d", "e")]
    with pytest.raises(PromptError, match="datasets cannot load"):
        make_prompts({"dataset": str(tmp_path / "nowhere")})
    with pytest.raises(PromptError, match="no column 'summary'"):
        make_prompts(spec | {"reference": "summary"})
    with pytest.raises(UnknownName, match="Did you mean 'split'"):
        make_prompts(spec | {"splits": "train"})


def test_a_function_makes_prompts_without_end():
    source = make_prompts(lambda rng: f"Number {rng.integers(1000)}")
    drawn = [source.draw(np.random.default_rng(3)).text for _ in range(2)]
    assert drawn == [f"Number {np.random.default_rng(3).integers(1000)}"] * 2
    assert source[7].text == f"Number {np.random.default_rng(7).integers(1000)}"
    with pytest.raises(PromptError, match="without end"):
        len(source)
    with pytest.raises(PromptError, match="without end"):
        source.split("train")
    with pytest.raises(PromptError, match="the prompt function's answer: a prompt must be a string, got int"):
        make_prompts(lambda rng: 3)[0]


# --- order and splits


def test_one_seed_one_order_that_reaches_every_prompt():
    source = make_prompts("food")
    orders = []
    for _ in range(2):
        rng = np.random.default_rng(5)
        orders.append([source.draw(rng).text for _ in range(500)])
    assert orders[0] == orders[1]
    assert set(orders[0]) == {prompt.text for prompt in source}


def test_splits_share_no_template_and_leave_nothing_out():
    source = make_prompts()
    parts = {part: list(source.split(part)) for part in SPLITS}
    templates = [{prompt.metadata["template"] for prompt in part} for part in parts.values()]
    assert sum(len(part) for part in parts.values()) == 240
    assert len(set.union(*templates)) == sum(map(len, templates)) == 48
    assert [len(part) for part in parts.values()] == [38 * 5, 5 * 5, 5 * 5]


def test_a_split_depends_on_neither_order_nor_repetition():
    texts = [f"prompt {i}" for i in range(50)]
    for part in SPLITS:
        one = {prompt.text for prompt in make_prompts(texts).split(part)}
        other = {prompt.text for prompt in make_prompts(texts[::-1] + texts[:9]).split(part)}
        assert one == other


@pytest.mark.parametrize(("count", "sizes"), [(3, [1, 1, 1]), (4, [2, 1, 1]), (10, [8, 1, 1]), (100, [80, 10, 10])])
def test_sizes_of_the_splits_of_a_list(count, sizes):
    source = make_prompts([f"prompt {i}" for i in range(count)])
    assert [len(source.split(part)) for part in SPLITS] == sizes


def test_a_file_can_be_asked_for_a_split(tmp_path):
    path = write(tmp_path / "p.txt", "\n".join(f"line {i}" for i in range(10)))
    assert [len(make_prompts(f"{path}:{part}")) for part in SPLITS] == [8, 1, 1]


@pytest.mark.slow
def test_a_large_file_is_indexed_not_loaded(tmp_path):
    path = write(tmp_path / "p.txt", "".join(f"{i} {'x' * 400}\n" for i in range(20_000)))  # 8 MB
    tracemalloc.start()
    source = make_prompts(path)
    assert source[19_999].text.startswith("19999 x")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert pickle.loads(pickle.dumps(source))[123] == source[123]


# --- chat


class FakeTokenizer:
    """A tokenizer as far as ``chat`` looks at one: it begins every text with <s>, and so does its template."""

    chat_template = "some"
    name_or_path = "fake"
    bos_token = "<s>"
    bos_token_id = 1

    def __init__(self, adds_begin=True):
        self.adds_begin = adds_begin

    def __call__(self, text):
        return {"input_ids": [1] * self.adds_begin + [2] * len(text.split())}

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert (tokenize, add_generation_prompt) == (False, True)
        return "<s>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in turns) + "[assistant]"


def test_chat_puts_a_prompt_into_the_template_with_one_begin_token():
    source = chat([Prompt("Hi", "Hello", {"n": 1})], FakeTokenizer(), system="Be kind.")
    assert source[0] == Prompt("[system]Be kind.[user]Hi[assistant]", "Hello", {"n": 1, "prompt": "Hi"})
    assert source.draw(np.random.default_rng(0)) == source[0]
    assert chat(["Hi"], FakeTokenizer(adds_begin=False))[0].text == "<s>[user]Hi[assistant]"


def test_chat_splits_like_the_plain_prompts():
    plain = make_prompts([f"prompt {i}" for i in range(30)])
    for part in SPLITS:
        inside = chat(plain, FakeTokenizer()).split(part)
        assert [prompt.metadata["prompt"] for prompt in inside] == [prompt.text for prompt in plain.split(part)]


def test_chat_without_a_template_is_refused():
    tokenizer = FakeTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(PromptError, match="'fake' has no chat template"):
        chat(["Hi"], tokenizer)


# --- bad input


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"one\n\nthree\n", "line 2: a prompt must not be empty"),
        ("p.txt", b"one\ntwo\n\xff\n", "line 3: not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n["b"]\n', "line 2: expected an object"),
        ("p.jsonl", b'{"text": "a"}\n', 'line 1: no "prompt" among the keys text'),
        ("p.jsonl", b'{"prompt": 3}\n', "line 1: a prompt must be a string, got int"),
        ("p.jsonl", b'{"prompt": "a", "reference": 3}\n', "line 1: a reference must be a string or None, got int"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', "line 2: a prompt must not be empty"),
        ("p.csv", b"a", r"come from \.txt .* or \.jsonl files"),
    ],
)
def test_a_file_that_cannot_be_used_says_where(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=message):
        make_prompts(str(tmp_path / name))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "no file of prompts at 'nowhere.txt'"),
        ([], "must not be empty"),
        (["a", " \n"], r"prompt 1: a prompt must not be empty, got ' \\n'"),
        (["a", 3], "prompt 1: a prompt must be a string, got int"),
        (7, "7 gives no prompts"),
        ({"prompts": "a"}, "gives no prompts"),
        (["a", "b", "a"], "cannot split 2 template"),
    ],
)
def test_an_invalid_source_of_prompts_is_refused(spec, message):
    with pytest.raises(PromptError, match=message):
        make_prompts(spec).split("train")


def test_an_unknown_split_is_suggested():
    with pytest.raises(UnknownName, match="Did you mean 'train'"):
        make_prompts().split("trian")


def test_a_file_that_changes_is_noticed(tmp_path):
    path = write(tmp_path / "p.txt", "one\ntwo\n")
    source = make_prompts(path)
    write(tmp_path / "p.txt", "three\n")
    with pytest.raises(PromptError, match="has changed since it was indexed"):
        source[0]
    with pytest.raises(PromptError, match="has changed since it was indexed"):
        list(source)
    with pytest.raises(PromptError, match="has changed since it was indexed"):
        source.split("train")
    (tmp_path / "p.txt").unlink()
    with pytest.raises(PromptError, match="has changed since it was indexed"):
        source[0]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    source = make_prompts(write(tmp_path / "p.txt", "one\ntwo\nthree\n"))
    reading = iter(source)
    assert next(reading).text == "one"
    with (tmp_path / "p.txt").open("a") as file:
        file.write("four\n")
    with pytest.raises(PromptError, match="has changed since it was indexed"):
        list(reading)


def test_a_file_by_a_relative_name_stays_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.txt", "one\ntwo\n")
    sources = make_prompts("p.txt"), make_prompts(Path("p.txt"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source in sources:
        assert [source[1].text, *(prompt.text for prompt in source)] == ["two", "one", "two"]


@pytest.mark.parametrize("metadata", [None, 3, "a", [("a", 1)]])
def test_metadata_that_is_no_mapping_is_refused(metadata):
    with pytest.raises(PromptError, match="metadata must be a mapping"):
        Prompt("a", metadata=metadata)


HALF = "\ud800 a"


@pytest.mark.parametrize(
    "open_it",
    [
        lambda folder: make_prompts([HALF]),
        lambda folder: make_prompts([{"prompt": "a", "reference": HALF}]),
        lambda folder: make_prompts(folder / "p.jsonl"),
        lambda folder: make_prompts(lambda rng: HALF).draw(np.random.default_rng(0)),
    ],
    ids=["list", "reference", "file", "function"],
)
def test_text_that_cannot_be_encoded_is_refused_when_it_comes_in(tmp_path, open_it):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n{"prompt": "\\ud800 a"}\n')
    with pytest.raises(PromptError, match="must be Unicode text"):
        open_it(tmp_path)


def rows():
    yield {"prompt": "x"}


def test_streaming_datasets_are_refused_whether_their_columns_are_known_or_not():
    import datasets

    known = datasets.Dataset.from_list([{"prompt": "x"}]).to_iterable_dataset()
    for dataset in (known, datasets.IterableDataset.from_generator(rows)):
        with pytest.raises(PromptError, match="streaming dataset has no length"):
            make_prompts(dataset)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no system message') }}",
        "{% for i in range(10 ** 9) %}a{% endfor %}",
        "{{ messages[7].content }}",
        "{% import 'os' %}",
        "{{ unclosed",
        "",
        "   ",
        "{{ '\ud800' }}",
    ],
)
def test_security_a_hostile_chat_template_is_refused_when_it_is_opened(tiny_lm, template):
    tokenizer = copy.deepcopy(tiny_lm[1])
    tokenizer.chat_template = template
    with pytest.raises(PromptError):
        chat(["the film"], tokenizer)


def test_security_a_chat_template_that_never_ends_is_stopped(tiny_lm, monkeypatch):
    monkeypatch.setattr("textgen_env.prompts.TEMPLATE_SECONDS", 0.1)
    tokenizer, tracer = copy.deepcopy(tiny_lm[1]), sys.gettrace()
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(100) %}{% endfor %}{% endfor %}"
    with pytest.raises(PromptError, match="TimeoutError"):
        chat(["the film"], tokenizer)
    assert sys.gettrace() is tracer
