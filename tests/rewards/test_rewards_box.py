"""Each reward in the box against figures from elsewhere: published, another library's, or by hand."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textgen_env.errors import ConfigError, RewardError
from textgen_env.rewards import REWARDS, Generation, make_reward
from textgen_env.rewards.base import Turn
from textgen_env.rewards.classifier import main, read_examples, train_classifier
from textgen_env.rewards.lexical import count_syllables, flesch_kincaid_grade
from textgen_env.rewards.linear import WordClassifier
from textgen_env.rewards.rhyme import rhymes


def score(name, completion, prompt="", reference=None, metadata=None, logprobs=(), **given):
    generation = Generation(prompt, completion, reference=reference, metadata=metadata or {}, logprobs=logprobs)
    return REWARDS[name](**given).scored([generation]).total[0]


@pytest.mark.parametrize(
    ("text", "compound"),
    [  # from VADER's own README
        ("VADER is smart, handsome, and funny.", 0.8316),
        ("VADER is smart, handsome, and funny!", 0.8439),
        ("VADER is very smart, handsome, and funny.", 0.8545),
        ("VADER is VERY SMART, handsome, and FUNNY.", 0.9227),
        ("VADER is VERY SMART, handsome, and FUNNY!!!", 0.9342),
        ("VADER is VERY SMART, uber handsome, and FRIGGIN FUNNY!!!", 0.9469),
        ("VADER is not smart, handsome, nor funny.", -0.7424),
        ("The book was good.", 0.4404),
        ("At least it isn't a horrible book.", 0.431),
        ("The book was only kind of good.", 0.3832),
        ("The plot was good, but the characters are uncompelling and the dialog is not great.", -0.7042),
        ("Today SUX!", -0.5461),
        ("Today only kinda sux! But I'll get by, lol", 0.5249),
        ("Make sure you :) or :D today!", 0.8633),
        ("Not bad at all", 0.431),
    ],
)
def test_sentiment_of_vaders_own_sentences(text, compound):
    assert score("sentiment", text) == compound
    running = REWARDS["sentiment"]().running()
    assert running.lookahead(running.start("", None, {}), [text]) == np.float32(compound)


def test_sentiment_leaves_the_prompt_out():
    assert score("sentiment", "The book was good.", prompt="Terrible, awful, bad. ") == 0.4404


# --- words


def test_keywords_counts_whole_words_of_any_case():
    assert score("keywords", "The SUN, not the sunset!", words=["sun", "moon", "set", "not"]) == 0.5


def test_keywords_may_come_with_the_prompt():
    assert score("keywords", "don't", metadata={"keywords": ["don't", "do"]}) == 0.5
    with pytest.raises(RewardError, match=r"given no words.*'Once'"):
        score("keywords", "a", prompt="Once")
    with pytest.raises(RewardError, match="one word"):
        score("keywords", "a", metadata={"keywords": ["ice cream"]})


@pytest.mark.parametrize("words", [[], "sun", ["ice cream"], [3], [""]])
def test_keywords_must_be_words(words):
    with pytest.raises(ConfigError, match="keyword"):
        REWARDS["keywords"](words=words)


@pytest.mark.parametrize(
    ("text", "value"), [("", 0), ("one", 0.25), ("a b c d", 1), ("a b c d e f", 0.5), ("a " * 9, 0)]
)
def test_length_peaks_at_the_target(text, value):
    assert score("length", text, target=4) == value


def test_repetition_and_distinct_by_hand():
    text = "to be or not to be, to be"  # pairs: to-be be-or or-not not-to to-be be-to to-be
    assert score("distinct", text, n=2) == pytest.approx(5 / 7)
    assert score("repetition", text, n=2) == pytest.approx(2 / 7)
    assert score("distinct", text, n=1) == pytest.approx(4 / 8)
    assert score("repetition", text, n=9) == score("distinct", text, n=9) == 0


@pytest.mark.parametrize(
    "given",
    [
        ("length", {"target": 0}),
        ("repetition", {"n": 0}),
        ("distinct", {"n": 1.5}),
        ("readability", {"tolerance": 0}),
        ("regex", {"pattern": "("}),
        ("regex", {"pattern": "a", "part": "prompt"}),
        ("regex", {"pattern": "a", "timeout": 0}),
        ("json", {"schema": {"type": "thing"}}),
        ("json", {"part": "all"}),
        ("rhyme", {"scheme": "AB"}),
        ("rhyme", {"scheme": "A1A"}),
        ("rouge", {"kind": "rouge9"}),
        ("similarity", {"to": "text"}),
        ("classifier", {"file": "nowhere.json"}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(given):
    name, settings = given
    with pytest.raises(ConfigError):
        REWARDS[name](**settings)


# --- readability

SYLLABLES = {
    1: "cat the jumped loved makes queen guard fire great friend build trees tried called whole can't spring",
    2: "table little houses nation quiet poem lion people going wanted boxes wishes special being question language "
    "away rhythm chaos fuel equal fluid pages needed simple didn't flying",
    3: "created area radio idea piano beautiful museum usual video curious",
    4: "variety situation",
}


@pytest.mark.parametrize("count", SYLLABLES)
def test_syllables_by_hand(count):
    assert {word: count_syllables(word) for word in SYLLABLES[count].split()} == dict.fromkeys(
        SYLLABLES[count].split(), count
    )


def test_flesch_kincaid_grade_by_hand():
    # 6 words of one syllable in one sentence
    assert flesch_kincaid_grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 - 15.59)
    # 7 words, 10 syllables, 2 sentences (the second has no full stop)
    text = "Beautiful people came. They saw my table"
    assert flesch_kincaid_grade(text) == pytest.approx(0.39 * 7 / 2 + 11.8 * 11 / 7 - 15.59)


def test_readability_is_one_at_the_target_and_falls_to_zero():
    text = "The cat sat on the mat."
    assert score("readability", text, target=-1.45) == pytest.approx(1)
    assert score("readability", text, target=3.55, tolerance=10) == pytest.approx(0.5)
    assert score("readability", text, target=20, tolerance=2) == 0
    assert score("readability", "...") == 0


# --- form


def test_regex_searches_or_matches_all_of_a_part():
    assert score("regex", "a 12 b", pattern=r"\d+") == 1
    assert score("regex", "a 12 b", pattern=r"\d+", full=True) == 0
    assert score("regex", "12", prompt="no ", pattern=r"no \d+", part="text", full=True) == 1


def test_a_pattern_that_backtracks_without_end_is_stopped():
    with pytest.raises(RewardError, match=r"took more than 0\.05 s"):
        score("regex", "a" * 40 + "b", pattern="^(a|a)+$", timeout=0.05)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": 1}', 1),
        (" [1, 2]\n", 1),
        ("0", 1),
        ("", 0),
        ("{", 0),
        ("NaN", 0),
        ("[Infinity]", 0),
        ('{"a": 1} and more', 0),
        ("{'a': 1}", 0),
        ("[" * 100_000, 0),
        ("1" * 10_000, 0),  # Python refuses to read it
    ],
)
def test_json_is_strict(text, value):
    assert score("json", text) == value


def test_json_follows_a_schema():
    schema = {"type": "object", "required": ["name"], "properties": {"age": {"type": "integer"}}}
    for text, value in [('{"name": "x", "age": 3}', 1), ('{"age": 3}', 0.5), ("[]", 0.5), ("[", 0)]:
        assert score("json", text, schema=schema) == value
    assert score("json", '"x"}', prompt='{"name": ', schema=schema, part="text") == 1


def test_a_schema_does_not_reach_for_the_network():
    elsewhere = {"$ref": "https://example.invalid/schema.json"}
    with pytest.raises(ConfigError, match=r"cannot be followed: .*example\.invalid"):
        score("json", "1", schema=elsewhere)
    with pytest.raises(RewardError, match=r"example\.invalid"):
        score("json", "[1]", schema={"items": elsewhere})


# --- rhyme


@pytest.mark.parametrize(
    "pair",
    [
        "cat hat",
        "night light",
        "night kite",
        "day they",
        "rain lane",
        "blue through",
        "sky high",
        "bear there",
        "making taking",
        "love above",
        "thought caught",
        "tree sea",
        "played made",
        "running cunning",
        "city pity",
        "nation station",
        "bird heard",
        "you blue",
        "walked talked",
        "key tree",
        "games names",
        "little brittle",
    ],
)
def test_these_words_rhyme(pair):
    assert rhymes(*pair.split())


@pytest.mark.parametrize(
    "pair",
    [
        "cat cat",
        "Cat cat",
        "cat dog",
        "night not",
        "love move",
        "making walking",
        "food good",
        "bear ear",
        "though through",
        "running making",
        "window winter",
        "x y",
    ],
)
def test_these_words_do_not_rhyme(pair):
    assert not rhymes(*pair.split())


def test_rhyme_counts_the_lines_that_are_due_and_end_in_the_completion():
    assert score("rhyme", "\nand wore a hat", prompt="I saw a cat") == 1
    assert score("rhyme", "and wore a hat\nand then\nhe went", prompt="I saw a cat\n") == 0.5
    assert score("rhyme", "blue\nso sweet\nare you", prompt="Roses are red\nviolets are ", scheme="ABCB") == 1
    assert score("rhyme", "a cat", prompt="One\ntwo\nthree") == 0  # the third line has no partner yet
    assert score("rhyme", "hat\n", prompt="cat\n\n") == 1  # empty lines are none
    assert score("rhyme", "\nthe dog", prompt="A cat\nthe hat") == 0  # the rhyme is the prompt's
    assert score("rhyme", "at\nthe dog", prompt="A cat\nthe h") == 1


# --- references


def test_rouge_of_rouge_scores_own_tests():
    # from rouge_scorer_test.py of rouge-score
    assert score("rouge", "testing", reference="testing one two", kind="rouge1") == pytest.approx(0.5)
    assert score("rouge", "testing two", reference="testing one two") == pytest.approx(0.8)
    assert score("rouge", "", reference="testing one two") == 0


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "b", "c", "d", "É", "1,2"]), max_size=12),
    st.lists(st.sampled_from(["a", "b", "c", "d", "1"]), max_size=12),
)
def test_running_rouge_l_is_rouge_scores(words, reference):
    running = REWARDS["rouge"]().running()
    state = running.start("", " ".join(reference), {})
    for n in range(1, len(words) + 1):
        completion = " ".join(words[:n])
        state = running.extend(state, completion)
        assert state.value == pytest.approx(score("rouge", completion, reference=" ".join(reference)))


def test_bleu_and_chrf_are_sacrebleus():
    from sacrebleu import sentence_bleu, sentence_chrf

    completion, reference = "The dog had bit the man yesterday.", "The dog bit the man."
    assert score("bleu", completion, reference=reference) == pytest.approx(
        sentence_bleu(completion, [reference]).score / 100
    )
    assert score("chrf", completion, reference=reference) == pytest.approx(
        sentence_chrf(completion, [reference]).score / 100
    )
    assert score("bleu", reference, reference=reference) == pytest.approx(1)


# --- networks


def test_similarity_orders_sentences_as_people_do():
    reference = "A man is playing the guitar."
    near, far = (
        score("similarity", text, reference=reference) for text in ("Someone plays guitar.", "Prices rose by 3%.")
    )
    assert near > 0.7 > 0.2 > far
    assert score("similarity", reference, reference=reference) == pytest.approx(1, abs=1e-5)
    assert score("similarity", reference, prompt=reference, to="prompt") == pytest.approx(1, abs=1e-5)
    assert score("similarity", "", reference=reference) == 0


def test_similarity_is_the_mean_of_the_encoders_states():
    """Against the published recipe: mean of token states, cosine."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    from textgen_env.rewards.neural import _minilm_folder

    model, tokenizer = AutoModel.from_pretrained(_minilm_folder()), AutoTokenizer.from_pretrained(_minilm_folder())
    with torch.no_grad():
        a, b = (
            model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in ("a cat", "two dogs ran")
        )
    expected = torch.cosine_similarity(a, b, dim=0).item()
    assert score("similarity", "a cat", reference="two dogs ran") == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_encoder_of_half_precision_is_computed_with_in_float32(dtype, tmp_path):
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    from textgen_env.rewards.neural import _minilm_folder

    tokenizer = AutoTokenizer.from_pretrained(_minilm_folder())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=tokenizer.vocab_size, **sizes)).to(getattr(torch, dtype)).eval()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    model.float()
    with torch.no_grad():
        a, b = (
            model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in ("a cat", "two dogs ran")
        )
    expected = torch.cosine_similarity(a, b, dim=0).item()
    found = score("similarity", "a cat", reference="two dogs ran", model=str(tmp_path))
    assert found == pytest.approx(expected, abs=1e-5)


def test_fluency_is_the_mean_log_probability_of_the_environments_model():
    assert score("fluency", "a b", logprobs=(-1.0, -2.0)) == -1.5
    assert score("fluency", "") == 0
    with pytest.raises(RewardError, match="needs the log-probabilities of 'a b'"):
        score("fluency", "a b")


def test_fluency_in_a_conversation_is_of_the_agent_s_tokens_under_any_model(tiny_lm, tmp_path):
    import torch

    model, tokenizer = tiny_lm
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    turns = (Turn("agent", "the film"), Turn("partner", " was good good"), Turn("agent", " was"), Turn("partner", ""))
    said = Generation(
        "the", " the film was good good, was", logprobs=(-1.0, -2.0, 0.0, 0.0, 0.0, -3.0), turns=turns, replied=3
    )
    assert REWARDS["fluency"]()([said]) == [(-1 - 2 - 3) / 3]
    with torch.no_grad():
        total, count = 0.0, 0
        for before, text in (("the ", "the film"), ("the the film was good good,", " was")):
            context, ids = tokenizer(before)["input_ids"], tokenizer(text, add_special_tokens=False)["input_ids"]
            logprobs = model(torch.tensor([context + ids])).logits[0].log_softmax(-1)
            total += sum(float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(ids))
            count += len(ids)
    alone = Generation("the", "the film")
    values = REWARDS["fluency"](model=str(tmp_path))([alone, said, alone])
    assert values[1] == pytest.approx(total / count, abs=1e-5)
    assert values[0] == values[2] != values[1]


def test_fluency_is_the_same_whether_or_not_the_tokenizer_ends_a_text(tiny_lm, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    model, tokenizer = tiny_lm
    texts = [Generation("the film", "was good and long")]
    values = []
    for pattern in ("$A", f"$A {tokenizer.eos_token}"):
        folder = tmp_path / str(len(values))
        model.save_pretrained(folder)
        own = PreTrainedTokenizerFast(
            tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
            eos_token=tokenizer.eos_token,
        )
        end = [(tokenizer.eos_token, tokenizer.eos_token_id)]
        own.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=end)
        own.save_pretrained(folder)
        values.append(REWARDS["fluency"](model=str(folder))(texts)[0])
    assert values[1] == pytest.approx(values[0], abs=1e-9)


def test_fluency_under_another_model_is_the_uncached_forward(tiny_lm, tmp_path):
    import torch

    model, tokenizer = tiny_lm
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt, completion = "the film", "was good and long"
    ids = tokenizer(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(ids).logits[0].log_softmax(-1)
    expected = np.mean([float(logprobs[i - 1, ids[0, i]]) for i in range(2, 6)])
    batch = [
        Generation(prompt, completion),
        Generation("the", "film"),
        Generation(prompt, ""),
        Generation("", "good bad"),
    ]

    values = REWARDS["fluency"](model=str(tmp_path)).scored(batch).total

    assert values[0] == pytest.approx(expected, abs=1e-5)
    assert values[2] == 0
    assert (values[[1, 3]] < 0).all()


# --- the trained classifier


def examples(n=60):
    rng = np.random.default_rng(0)
    nouns = ["film", "book", "meal", "hotel", "song"]
    rows = []
    for i in range(n):
        word, label = [("great", "positive"), ("awful", "negative")][i % 2]
        rows.append((label, f"the {rng.choice(nouns)} was {word}"))
    return rows


def test_a_trained_classifier_tells_held_out_texts_apart(tmp_path):
    report = train_classifier(examples(), tmp_path / "words.json")
    assert (report.label, report.lines, report.held_out, report.accuracy) == ("positive", 60, 6, 1.0)
    good, bad = (score("classifier", f"a {word} day", file=str(tmp_path / "words.json")) for word in ("great", "awful"))
    assert good > 0.6 > 0.4 > bad


def test_the_saved_classifier_answers_what_scikit_learn_answers(tmp_path):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    texts = [text for _, text in examples()]
    pairs = CountVectorizer(ngram_range=(1, 2), binary=True, min_df=2, token_pattern=r"\w+")
    model = LogisticRegression(max_iter=1000).fit(pairs.fit_transform(texts), [label for label, _ in examples()])
    train_classifier(examples(), tmp_path / "words.json")

    for text in ("the film was great", "great great awful the book", "nothing known", ""):
        expected = model.predict_proba(pairs.transform([text]))[0, 1]
        assert score("classifier", text, file=str(tmp_path / "words.json")) == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_the_command_trains_from_labelled_lines(tmp_path):
    lines = tmp_path / "lines.tsv"
    lines.write_text("\ufeff" + "\n".join(f"{label}\t{text}" for label, text in examples()) + "\n\n", encoding="utf-8")
    command = [sys.executable, "-m", "textgen_env.rewards.classifier", str(lines), "--out", str(tmp_path / "c.json")]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 0
    assert done.stderr == ""
    assert "60 lines; 'positive' or not: accuracy 1.000 on 6 held-out lines" in done.stdout
    assert json.loads((tmp_path / "c.json").read_text())["label"] == "positive"


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    lines = tmp_path / "lines.tsv"
    lines.write_text("good\tyes\nno label here\n")
    assert main([str(lines), "--out", str(tmp_path / "c.json")]) == 2
    assert "line 2: expected label<TAB>text, got 'no label here'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "given", "message"),
    [
        (examples(8), {}, "at least 10 examples of 2 labels, got 8 of 2"),
        ([("a", "x")] * 20, {}, "got 20 of 1"),
        (examples(), {"label": "neutral"}, "no example has the label 'neutral'; there are negative, positive"),
        (examples(), {"min_count": 99}, "no word occurs in 99"),
    ],
)
def test_training_that_cannot_work_is_refused(rows, given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train_classifier(rows, tmp_path / "c.json", **given)


def test_a_file_that_is_no_classifier_is_refused(tmp_path):
    for content in ("no json", "[]", '{"format": "else"}'):
        (tmp_path / "c.json").write_text(content)
        with pytest.raises(ConfigError, match="is no classifier"):
            WordClassifier.load(tmp_path / "c.json")


def test_lines_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "lines.tsv").write_bytes(b"a\tb\nc\t\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_examples(tmp_path / "lines.tsv")


@pytest.mark.parametrize("text", ["映画 は とても 良かった", "Фильм был хороший", "फिल्म अच्छी थी", "Ça fait né"])
def test_rouge_knows_words_of_every_script(text):
    reward = make_reward("rouge")
    assert reward([Generation("p", text, reference=text)]).tolist() == [1.0]
    assert reward([Generation("p", "x y z", reference=text)]).tolist() == [0.0]
