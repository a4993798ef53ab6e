"""Build the small language model in the box from nothing but packages.

    instructions -> SmolLM2 writes short texts; its likeliest tokens are kept at every step
                 -> a byte-level BPE tokenizer of 3,072 tokens
                 -> the teacher's distributions, moved from its tokens onto those of the tokenizer
                 -> a Llama of 1.8 million parameters, trained on them
                 -> textgen_env/models/tiny, with its card and checksums

Each shard of the corpus and each epoch of the training is a file that appears by one rename and
has random numbers of its own: a build that was killed goes on where it was and ends the same
(bit-equal on one machine with the same number of threads).

    python scripts/build_tiny_lm.py                     # the model in the package
    python scripts/build_tiny_lm.py --quick             # a weak one in a few minutes, in build/quick
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_lm_muon import Muon
from tiny_lm_seeds import draw
from tiny_lm_texts import END, SAMPLES, TEACHER_K, TEMPERATURE, TOP_P, Alignment, Array, Texts, ends_of, sampled_from
from tokenizers import Tokenizer, decoders, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgen_env.files import whole_file, whole_folder, write_file
from textgen_env.models import load_language_model
from textgen_env.prompts import make_prompts

MAX_PROMPT, MAX_NEW = 72, 56  # tokens of the teacher
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    """What decides the result, besides the machine. A work folder belongs to one of these."""

    teacher: str = "smollm2"
    shards: int = 5
    texts: int = 2048  # a shard
    rows: int = 256  # texts that the teacher writes at a time
    vocabulary: int = 3072
    width: int = 192  # of the model's hidden states, a multiple of 96
    layers: int = 3  # few: a step of one text takes as long as there are layers
    epochs: int = 10
    batch: int = 2048  # tokens
    rate: float = 6e-3  # of AdamW, which trains embeddings and norms
    muon_rate: float = 0.02  # of Muon, which trains the other matrices
    seed: int = 0


QUICK = Settings(shards=2, texts=256, rows=128, epochs=4)


# --- the corpus


def write_corpus(folder: Path, s: Settings) -> list[Path]:
    """Return the paths of the shards, after writing those that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shard:04}.npz" for shard in range(s.shards)]
    missing = [shard for shard, path in enumerate(paths) if not path.exists()]
    if missing:
        teacher = load_language_model(s.teacher)
        for shard in tqdm(missing, "corpus", initial=s.shards - len(missing), total=s.shards, unit="shard"):
            write_shard(teacher, paths[shard], np.random.default_rng([s.seed, shard]), s)
    return paths


def write_shard(teacher: Any, path: Path, rng: np.random.Generator, s: Settings) -> None:
    """Let the teacher write the texts of one shard, each row going on to the next text when one ends.

    Saved: openings and texts as token ids, end to end, with their lengths; and for each token of
    the texts the candidates that it was drawn from, best first, with log-probabilities (n, TEACHER_K).
    """
    jobs = [draw(rng) for _ in range(-(-s.texts // SAMPLES))]
    prompts = [
        teacher.encode(
            f"<|im_start|>user\n{instruction} Use simple, everyday words.<|im_end|>\n<|im_start|>assistant\n{opening}"
        )
        for instruction, opening in jobs
    ]
    ends = ends_of(teacher)
    slots = teacher.slots(s.rows, MAX_PROMPT + MAX_NEW, TEACHER_K)
    written: list[list[tuple[int, Array, Array]]] = [[] for _ in range(s.texts)]
    waiting, free, active = iter(range(s.texts)), list(range(s.rows)), {}
    while True:
        fresh = list(zip(free, waiting, strict=False))
        slots.start(np.array([row for row, _ in fresh], np.int64), [prompts[text // SAMPLES] for _, text in fresh])
        active.update(fresh)
        if not active:
            break
        busy = np.array(sorted(active))
        found = slots.propose(busy, np.zeros(len(busy), bool))
        chosen = sample(sampled_from(found.logprobs), rng.random(len(busy)))
        tokens = found.candidates[np.arange(len(busy)), chosen].astype(np.int64)
        slots.advance(busy, tokens)
        free = []
        for i, row in enumerate(busy.tolist()):
            text = written[active[row]]
            text.append((int(tokens[i]), found.candidates[i], found.logprobs[i]))
            if tokens[i] in ends or len(text) == MAX_NEW:
                del active[row]
                free.append(row)
    steps = [step for text in written for step in text]
    opened = [teacher.encode(opening) if opening else [] for _, opening in jobs]
    save_npz(
        path,
        opened=np.array([i for ids in opened for i in ids], np.uint16),
        opened_lengths=np.array([len(ids) for ids in opened], np.uint8),
        tokens=np.array([token for token, _, _ in steps], np.uint16),
        lengths=np.array([len(text) for text in written], np.uint8),
        candidates=np.stack([ids for _, ids, _ in steps]).astype(np.uint16),
        logprobs=np.stack([logprobs for _, _, logprobs in steps]).astype(np.float16),
    )


def sample(probs: Array, uniform: Array) -> Array:
    """Return the column that each row's random number picks, (n,)."""
    return np.minimum((probs.cumsum(-1) < uniform[:, None]).sum(-1), (probs > 0).sum(-1) - 1)


def save_npz(path: Path, **arrays: Array) -> None:
    with whole_file(path) as half_made, half_made.open("wb") as file:
        np.savez(file, **arrays)


# --- from the teacher's tokens to the student's


def train_tokenizer(path: Path, shards: Sequence[Path], teacher: Any, s: Settings) -> Tokenizer:
    """Return the student's tokenizer. It cuts texts into words as the teacher's does, so that words align."""
    if not path.exists():
        texts = []
        for shard in shards:
            with np.load(shard) as data:
                for tokens, lengths in (("opened", "opened_lengths"), ("tokens", "lengths")):
                    ends = data[lengths].astype(int).cumsum()
                    texts += [teacher.decode(part) for part in np.split(data[tokens], ends[:-1])]
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = teacher.tokenizer.backend_tokenizer.pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=s.vocabulary, special_tokens=[END], initial_alphabet=ByteLevel.alphabet(), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        with whole_file(path) as half_made:
            tokenizer.save(str(half_made))
    return Tokenizer.from_file(str(path))


# --- training


def student(tokenizer: Tokenizer, s: Settings) -> LlamaForCausalLM:
    """Return the untrained model: heads of 32, three of them to each head of keys and values."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=s.width,
            intermediate_size=s.width * 8 // 3,
            num_hidden_layers=s.layers,
            num_attention_heads=s.width // 32,
            num_key_value_heads=s.width // 96,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.token_to_id(END),
            eos_token_id=tokenizer.token_to_id(END),
            attn_implementation="eager",  # for texts this short, three times as fast to train on a CPU
        )
    )


def batches(lengths: Array, size: int, rng: np.random.Generator) -> list[Array]:
    """Return all texts in random batches of at most ``size`` tokens, texts of similar length together."""
    order = np.argsort(lengths + rng.uniform(0, 8, len(lengths)), kind="stable")
    groups: list[list[int]] = [[]]
    longest = 0
    for text in order:
        longest = max(longest, int(lengths[text]))
        if longest * (len(groups[-1]) + 1) > size and groups[-1]:
            groups.append([])
            longest = int(lengths[text])
        groups[-1].append(int(text))
    return [np.array(groups[i]) for i in rng.permutation(len(groups))]


def losses(model: LlamaForCausalLM, texts: Texts, batch: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for every token of a batch that the teacher wrote, the cross entropy with the teacher's
    distribution and with the token itself, (n,) each, nats."""
    first, lengths = texts.first[batch], np.diff(texts.first)[batch]
    places = first[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)  # (b, L)
    real = texts.written[places] & (np.arange(lengths.max()) < lengths[:, None])
    ids = torch.from_numpy(texts.ids[places])
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logprobs = model.lm_head(hidden[torch.from_numpy(real[:, 1:])]).float().log_softmax(-1)  # (n, V)
    predicted = places[real]
    targets = torch.from_numpy(texts.targets[predicted].astype(np.int64))
    soft = -(logprobs.gather(1, targets) * torch.from_numpy(texts.weights[predicted])).sum(-1)
    return soft, -logprobs.gather(1, torch.from_numpy(texts.ids[predicted])[:, None])[:, 0]


def train(path: Path, model: LlamaForCausalLM, texts: Texts, held_out: Texts, s: Settings) -> list[float]:
    """Train ``model`` and return its held-out loss after each epoch, nats a token.

    With Muon (Jordan et al. 2024), 288 batches reached a held-out perplexity of 34 where AdamW alone
    reached 125 on the same texts.
    """
    hidden, rest = [], []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        Muon(hidden, lr=s.muon_rate, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=s.rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True),
    ]
    history: list[float] = []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        history = saved["history"]
    lengths = np.diff(texts.first)
    for epoch in range(len(history), s.epochs):
        model.train()
        todo = batches(lengths, s.batch, np.random.default_rng([s.seed, 1 << 20, epoch]))
        for i, batch in enumerate(tqdm(todo, f"epoch {epoch + 1} of {s.epochs}", unit="batch")):
            done = (epoch + i / len(todo)) / s.epochs
            share = min(1.0, 40 * done + 0.02) * (0.5 + 0.5 * math.cos(math.pi * done))
            for optimizer, rate in zip(optimizers, (s.muon_rate, s.rate), strict=True):
                optimizer.param_groups[0]["lr"] = rate * share
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
                loss = losses(model, texts, batch)[0].mean()
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
        history.append(held_out_loss(model, held_out, s))
        tqdm.write(f"epoch {epoch + 1}: held-out perplexity {math.exp(history[-1]):.2f}")
        states = [optimizer.state_dict() for optimizer in optimizers]
        with whole_file(path, (RuntimeError,)) as half_made:
            torch.save({"model": model.state_dict(), "optimizers": states, "history": history}, half_made)
    return history


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, texts: Texts, s: Settings) -> float:
    model.eval()
    groups = batches(np.diff(texts.first), s.batch, np.random.default_rng(0))
    return float(torch.cat([losses(model, texts, batch)[1] for batch in groups]).mean())


# --- how good it is


def kneser_ney(texts: Texts, held_out: Texts, vocabulary: int, order: int = 4) -> float:
    """Return the loss of an interpolated Kneser-Ney model on the written tokens of ``held_out``, nats a token.

    A gram is one integer in base ``vocabulary``, its last token the lowest digit. Shorter grams
    count the different tokens that they follow. Source: Chen and Goodman 1999.
    """

    def grams(part: Texts) -> Array:
        """Every token with the three before it; texts are preceded by end tokens (0)."""
        place = np.arange(len(part.ids)) - np.repeat(part.first[:-1], np.diff(part.first))
        found = np.zeros(len(part.ids), np.int64)
        for back in range(order):
            found += np.where(place >= back, np.roll(part.ids, back), 0) * vocabulary**back
        return found

    seen, counts = np.unique(grams(texts), return_counts=True)
    asked = grams(held_out)[held_out.written]
    levels = [(seen, counts)]
    for n in range(order - 1, 0, -1):
        levels.append(np.unique(levels[-1][0] % vocabulary**n, return_counts=True))
    probs = np.full(len(asked), 1 / vocabulary)
    for n, (seen, counts) in enumerate(reversed(levels), 1):
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once else 0.5
        contexts, index = np.unique(seen // vocabulary, return_inverse=True)
        total, kinds = np.bincount(index, counts), np.bincount(index)
        gram = asked % vocabulary**n
        here = np.minimum(np.searchsorted(seen, gram), len(seen) - 1)
        count = np.where(seen[here] == gram, counts[here], 0)
        there = np.minimum(np.searchsorted(contexts, gram // vocabulary), len(contexts) - 1)
        mixed = (np.maximum(count - discount, 0) + discount * kinds[there] * probs) / total[there]
        probs = np.where(contexts[there] == gram // vocabulary, mixed, probs)
    return float(-np.log(probs).mean())


# --- the package


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, figures: dict[str, Any]) -> None:
    """Write model, tokenizer, card and checksums to ``out``, which appears by one rename."""
    with whole_folder(out) as made:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, model_max_length=256)
        fast.save_pretrained(made)
        ends = {"bos_token_id": model.config.bos_token_id, "eos_token_id": fast.eos_token_id}
        model.generation_config = GenerationConfig(**ends)
        model.half().save_pretrained(made)
        (made / "README.md").write_text(card(made, figures), encoding="utf-8")
        sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(made.iterdir())}
        (made / "checksums.json").write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)


def samples(folder: Path, tokens: int = 20, count: int = 20) -> list[tuple[str, str]]:
    """Return test openings, evenly spaced, and what the model writes after them, sampling all of its vocabulary."""
    model = load_language_model(str(folder), "float32")
    offered = list(make_prompts("openings:test"))
    prompts = offered[:: len(offered) // count][:count]
    rows, rng = np.arange(len(prompts)), np.random.default_rng(0)
    slots = model.slots(len(prompts), 64, None)
    slots.start(rows, [model.encode(prompt.text) for prompt in prompts])
    texts: list[list[int]] = [[] for _ in prompts]
    for _ in range(tokens):
        probs = np.exp(slots.propose(rows, np.ones(len(rows), bool)).logprobs.astype(np.float64))
        chosen = sample(probs / probs.sum(-1, keepdims=True), rng.random(len(rows)))
        slots.advance(rows, chosen)
        for text, token in zip(texts, chosen.tolist(), strict=True):
            text.append(token)
    return [(prompt.text, model.decode(text)) for prompt, text in zip(prompts, texts, strict=True)]


def card(folder: Path, figures: dict[str, Any]) -> str:
    """Return the model card."""
    lines = "\n".join(f"- **{prompt}**{text}" for prompt, text in samples(folder))
    return CARD.format(samples=lines, **figures)


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tiny: the small language model of textgen-env

A Llama of {parameters:,} parameters with its own byte-level BPE tokenizer of {vocabulary:,} tokens, in
float16. It writes short, everyday English: reviews, diary lines, little stories, notes on work, travel,
food, weather and people. It is made to run and to train agents on in seconds; it knows nothing, and what
it says of the world is not to be believed. Texts longer than about 100 tokens are outside its training.

**How it was made.** SmolLM2-135M-Instruct (Apache-2.0, by Hugging Face TB) wrote {texts:,} texts,
{tokens:,} of this tokenizer's tokens, from instructions and openings in `scripts/tiny_lm_seeds.py`
(temperature {temperature}, nucleus {top_p}). At each token the model learned the distribution that the
teacher drew from, moved onto its own vocabulary, for {epochs} epochs. No other text was used. The command:

    {command}

**How good it is.** {held_out:,} tokens of texts that neither was trained on, from other instructions; nats
of the whole text divided by the same number of this tokenizer's tokens:

| | perplexity a token | nats a token |
|---|---|---|
| interpolated Kneser-Ney 4-gram on the same texts | {ngram_ppl:.2f} | {ngram:.3f} |
| **tiny** | **{tiny_ppl:.2f}** | **{tiny:.3f}** |
| the teacher, as it was sampled | {teacher_ppl:.2f} | {teacher:.3f} |

**Twenty samples** of 20 tokens after test prompts of the package, evenly spaced, drawn from the whole
vocabulary with seed 0, end of text not offered, none left out:

{samples}
"""


def build(s: Settings, work: Path, out: Path, command: str) -> dict[str, Any]:
    """Make the model in ``out`` with everything on the way kept in ``work``; return its figures."""
    work.mkdir(parents=True, exist_ok=True)
    given, noted = json.dumps(asdict(s), indent=2), work / "settings.json"
    if noted.exists() and noted.read_text(encoding="utf-8") != given:
        raise SystemExit(f"{work} holds a build with other settings ({noted}): give another --work, or remove it")
    write_file(noted, given)
    paths = write_corpus(work / "corpus", s)
    teacher = load_language_model(s.teacher)
    tokenizer = train_tokenizer(work / "tokenizer.json", paths[1:] or paths, teacher, s)
    alignment = Alignment(teacher, tokenizer)
    held_out = alignment.read(paths[0], slice(0, s.texts // 4))
    rest = [alignment.read(paths[0], slice(s.texts // 4, None))]
    texts = Texts.joined(rest + [alignment.read(path) for path in tqdm(paths[1:], "tokens", unit="shard")])
    torch.manual_seed(s.seed)
    model = student(tokenizer, s)
    history = train(work / "training.pt", model, texts, held_out, s)
    ngram, tokens = kneser_ney(texts, held_out, len(alignment.student_width)), int(held_out.written.sum())
    figures: dict[str, Any] = {"ngram": ngram, "tiny": history[-1], "teacher": held_out.nats / tokens}
    figures |= {f"{name}_ppl": math.exp(nats) for name, nats in list(figures.items())}
    figures |= {"held_out": tokens, "tokens": len(texts.ids), "texts": len(texts), "epochs": s.epochs}
    figures |= {"parameters": model.num_parameters(), "vocabulary": tokenizer.get_vocab_size()}
    save(out, model, tokenizer, figures | {"temperature": TEMPERATURE, "top_p": TOP_P, "command": command})
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the small language model in the box.")
    parser.add_argument("--quick", action="store_true", help="a weak model in a few minutes")
    parser.add_argument("--work", type=Path, help="folder for what is made on the way; a killed build resumes from it")
    parser.add_argument("--out", type=Path, help="folder for the model")
    parser.add_argument("--threads", type=int, default=2)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), help=f"default: {field.default}")
    given = vars(parser.parse_args())
    torch.set_num_threads(given["threads"])
    changed = {field.name: given[field.name] for field in fields(Settings) if given[field.name] is not None}
    work = given["work"] or ROOT / "build" / ("quick" if given["quick"] else "tiny_lm")
    out = given["out"] or (work / "model" if given["quick"] else ROOT / "textgen_env" / "models" / "tiny")
    command = " ".join(["python", "scripts/build_tiny_lm.py", *sys.argv[1:]])
    figures = build(replace(QUICK if given["quick"] else Settings(), **changed), work, out, command)
    for name, title in (("ngram", "4-gram baseline"), ("tiny", "this model"), ("teacher", "the teacher itself")):
        print(f"{title:>20}: perplexity {figures[name + '_ppl']:6.2f} a token")
    print(f"on {figures['held_out']:,} held-out tokens; {figures['parameters']:,} parameters in {out}")


if __name__ == "__main__":
    main()
