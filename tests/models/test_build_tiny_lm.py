"""The script that builds the model in the box: moving distributions between vocabularies, the
baseline it is compared with, and that a killed build ends like one that was not."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from forked import Forked, script
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from textgen_env.openings import OPENINGS

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def build():
    sys.path.insert(0, str(SCRIPTS))
    try:
        import build_tiny_lm
    finally:
        sys.path.remove(str(SCRIPTS))
    return build_tiny_lm


@pytest.mark.slow
def test_the_prompts_in_the_box_are_not_those_of_the_teacher(build):
    rng = np.random.default_rng(0)
    openings = {build.draw(rng)[1] for _ in range(20_000)}
    offered = {
        template.format(word) for topic in OPENINGS.values() for template, words in topic.items() for word in words
    }
    assert len(openings) > 2_000
    assert not openings & offered


# --- from one vocabulary to the other


class Teacher:
    """A vocabulary and nothing else."""

    tokens = ("<end>", "abc", "ab", "a", "c", "\n", "ca", "b")
    vocab_size, end_ids = len(tokens), (0,)

    @property
    def tokenizer(self):
        return self

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i].replace("\n", "Ċ") for i in ids]

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids)


@pytest.fixture
def alignment(build):
    vocabulary = {build.END: 0, "a": 1, "b": 2, "c": 3, "ab": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([build.END])
    return build.Alignment(Teacher(), tokenizer)


def distributions(texts):
    """Target distribution of each token as {token: probability}."""
    found = []
    for targets, weights in zip(texts.targets, texts.weights, strict=True):
        sums = Counter()
        for target, weight in zip(targets.tolist(), weights.tolist(), strict=True):
            sums[target] += weight
        found.append({target: pytest.approx(weight, abs=1e-6) for target, weight in sums.items() if weight > 0})
    return found


def test_distributions_move_to_the_pieces_of_the_teacher_s_tokens(build, alignment):
    # The opening "c", then "abc" = ab + c, then a line break, which is an end.
    candidates, probs = np.zeros((2, build.TEACHER_K), int), np.zeros((2, build.TEACHER_K))
    candidates[0, :4], probs[0, :4] = [1, 2, 3, 4], [0.4, 0.3, 0.2, 0.1]  # abc, ab, a, c
    candidates[1, :3], probs[1, :3] = [5, 0, 6], [0.5, 0.25, 0.25]  # line break, end, ca
    tokens, step, ids = np.array([4, 1, 5]), np.array([-1, 0, 1]), np.array([3, 4, 3, 0])

    texts = alignment.aligned([tokens], [step], [ids], candidates, probs)

    assert distributions(texts) == [
        {3: 1.0},  # the opening is the text itself
        {4: 0.7, 1: 0.2, 3: 0.1},  # abc and ab both begin with the piece ab
        {3: 1.0},  # after the piece ab, only abc goes on
        {0: 0.75, 3: 0.25},  # a line break and the end token are both an end; ca begins with c
    ]
    assert texts.written.tolist() == [False, True, True, True]
    assert texts.nats == pytest.approx(-math.log(0.4) - math.log(0.5))


def test_where_the_vocabularies_do_not_meet_the_target_is_the_text(build, alignment):
    # The opening "c", then a + b, which are one token of the student's, then "c".
    candidates, probs = np.zeros((3, build.TEACHER_K), int), np.zeros((3, build.TEACHER_K))
    candidates[0, :2], probs[0, :2] = [3, 4], [0.6, 0.4]  # a, c
    candidates[1, 0], probs[1, 0] = 7, 1.0  # b
    candidates[2, :3], probs[2, :3] = [4, 6, 3], [0.5, 0.25, 0.25]  # c, ca, a
    tokens, step, ids = np.array([4, 3, 7, 4]), np.array([-1, 0, 1, 2]), np.array([3, 4, 3])

    texts = alignment.aligned([tokens], [step], [ids], candidates, probs)

    assert distributions(texts) == [{3: 1.0}, {4: 1.0}, {3: 0.75, 1: 0.25}]
    assert texts.nats == pytest.approx(-math.log(0.6) - math.log(0.5))


# --- the baseline


def brute_force(train, asked, vocabulary):
    """Interpolated Kneser-Ney by the book, with dictionaries: probability of each (context, token)."""
    grams = Counter()
    for text in train:
        padded = [0, 0, 0, *text]
        grams.update(tuple(padded[i - 3 : i + 1]) for i in range(3, len(padded)))
    levels = [grams]
    for _ in range(3):
        levels.append(Counter(gram[1:] for gram in levels[-1]))

    def probability(gram):
        if not gram:
            return 1 / vocabulary
        counts = levels[4 - len(gram)]
        ones, twos = (sum(1 for c in counts.values() if c == n) for n in (1, 2))
        discount = ones / (ones + 2 * twos) if ones else 0.5
        following = [c for g, c in counts.items() if g[:-1] == gram[:-1]]
        lower = probability(gram[1:])
        if not following:
            return lower
        return (max(counts[gram] - discount, 0) + discount * len(following) * lower) / sum(following)

    return [probability(gram) for gram in asked]


def texts_of(build, lists, written=True):
    ids = np.array([i for text in lists for i in text])
    nothing = np.zeros((len(ids), build.TEACHER_K))
    first = np.cumsum([0, *map(len, lists)])
    return build.Texts(first, ids, np.full(len(ids), written), nothing, nothing, 0.0)


def test_the_baseline_equals_kneser_ney_by_the_book_and_is_a_distribution(build):
    rng = np.random.default_rng(0)
    train = [rng.choice(6, rng.integers(2, 12), p=[0.1, 0.4, 0.2, 0.1, 0.1, 0.1]).tolist() for _ in range(60)]
    held_out = [rng.integers(0, 7, 8).tolist() for _ in range(10)]
    asked = []
    for text in held_out:
        padded = [0, 0, 0, *text]
        asked += [tuple(padded[i - 3 : i + 1]) for i in range(3, len(padded))]
    expected = -np.log(brute_force(train, asked, 7)).mean()
    assert build.kneser_ney(texts_of(build, train), texts_of(build, held_out), 7) == pytest.approx(expected, rel=1e-9)
    every = [np.exp(-build.kneser_ney(texts_of(build, train), texts_of(build, [[i]]), 7)) for i in range(7)]
    assert sum(every) == pytest.approx(1, rel=1e-9)


def test_muon_steps_like_the_one_of_torch(build):
    """torch's multiplies in bfloat16: eight bits of the step."""
    import torch

    mine, theirs = [torch.nn.Parameter(torch.zeros(8, 24)) for _ in range(2)]
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.1}
    optimizers = build.Muon([mine], **settings), torch.optim.Muon([theirs], **settings)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mine.grad = theirs.grad = torch.randn(8, 24, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    assert theirs.abs().max() > 0.02
    assert torch.allclose(mine, theirs, atol=5 * 0.02 / 2**7)


# --- killed and resumed


@pytest.fixture(scope="module")
def toy_teacher(build, tmp_path_factory):
    """A random Llama whose tokenizer knows the words of the instructions, as a folder."""
    import torch
    from tokenizers import trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = np.random.default_rng(0)
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [" ".join(build.draw(rng)) + "\n<|im_start|>user<|im_end|>assistant everyday" for _ in range(500)]
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=["<e>"], show_progress=False))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, **shape, eos_token_id=0, initializer_range=0.3))
    folder = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(folder)
    return folder


def options(teacher, work):
    size = {"shards": 3, "texts": 64, "rows": 32, "vocabulary": 300, "batch": 1024, "threads": 1}
    size |= {"width": 96, "layers": 1, "epochs": 3}
    size |= {"teacher": teacher, "work": work, "out": work / "model"}
    return [f"--{name}={value}" for name, value in size.items()]


def start(teacher, work):
    return Forked(work.parent, script, SCRIPTS / "build_tiny_lm.py", *options(teacher, work))


def checksums(work):
    sums = json.loads((work / "model" / "checksums.json").read_text())
    return {name: sum for name, sum in sums.items() if name != "README.md"}  # which names the command


@pytest.mark.slow
def test_a_build_that_was_killed_ends_with_the_same_files(toy_teacher, tmp_path):
    whole = subprocess.run(  # a process with other hashes
        [sys.executable, str(SCRIPTS / "build_tiny_lm.py"), *options(toy_teacher, tmp_path / "whole")],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert whole.returncode == 0, whole.stderr
    assert "4-gram baseline" in whole.stdout

    rng = random.Random(0)
    killed = tmp_path / "killed"
    for sign in ("settings.json", "corpus/0000.npz", "training.pt"):  # each shows that a stage has begun
        process = start(toy_teacher, killed)
        while not (killed / sign).exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    last = start(toy_teacher, killed)
    said = last.communicate()
    assert last.returncode == 0, said
    assert checksums(killed) == checksums(tmp_path / "whole")


@pytest.mark.slow
def test_a_work_folder_of_other_settings_is_refused(toy_teacher, tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_text("{}")
    process = start(toy_teacher, tmp_path / "work")
    assert "holds a build with other settings" in process.communicate()
    assert process.returncode == 1
