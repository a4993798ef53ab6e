"""The pruning benchmark on a tiny model: its perplexity by Hugging Face's own loss, and going on after a stop."""

from __future__ import annotations

import json
import math

import pytest
import torch

from benchmarks import pruning
from textgen_env.errors import RunFolderError

WORDS = ("the", "film", "was", "good", "bad", "and", "long", ".")


@pytest.fixture
def arguments(tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "CANDIDATES", 4)
    monkeypatch.setattr(pruning, "pick_dtype", lambda dtype: torch.float32)
    for part in tiny_lm:
        part.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    documents = [" ".join(WORDS[i] for i in torch.randint(8, (130,), generator=generator)) for _ in range(9)]
    (tmp_path / "text.txt").write_text("\n".join([*documents, "too short"]))
    options = ["--cuts", "ffn:0.5", "heads:0.5", "--measure", "quality", "--out", tmp_path / "out"]
    return [str(o) for o in ("--model", tmp_path / "model", "--text", tmp_path / "text.txt", *options)]


@pytest.mark.slow
def test_a_stopped_benchmark_goes_on_where_it_was(arguments, tmp_path, tiny_lm, monkeypatch):
    pruning.main(arguments)

    dense, ffn, heads = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    model, tokenizer = tiny_lm
    held_out = (tmp_path / "text.txt").read_text().splitlines()[2:9:3]
    losses = []
    for document in held_out:
        ids = tokenizer(document, return_tensors="pt")["input_ids"]  # as long as the others: their mean is the mean
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert dense["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)
    assert (dense["removed"], dense["perplexity_ratio"], dense["top_16"]) == (0, 1, 1)
    assert ffn["removed"] == pytest.approx(
        2 * 12 * 3 * 16 / model.num_parameters()
    )  # layers, channels, matrices, width
    assert 0 < ffn["top_16"] < 1
    assert "1 of key-value groups" in heads["note"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"table.md", "pruning.png", "cells.jsonl"}

    monkeypatch.setattr(pruning.Bench, "_pruned", None)  # nothing is pruned or measured again
    pruning.main(arguments)

    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == [dense, ffn, heads]
    with pytest.raises(RunFolderError, match="choose another --out"):
        pruning.main([*arguments, "--heal", "7"])
