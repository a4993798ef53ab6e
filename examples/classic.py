"""The classic loop on real text: can a Q-network pick the next token better than the model's rank 1?

SmolLM2 proposes ten candidates for every next token of a text. A pruned copy of it reads the prefix,
and a small Q-network on its hidden state learns which of the ten earns 1 by being the true token.
Rank 1 is the baseline. The network starts at how often each rank is right, and can gain only by learning
about this kind of text; the language model itself learns nothing.

That gain is small, since "rank 2" is another token in every state, and few texts mislead: on the Python
reference the agent is right in 36.9% of 7,321 held-out decisions and rank 1 in 37.7%. TextDQN therefore
learns values of tokens, not of ranks.

    python examples/classic.py                                     # about 3 minutes on 2 cores
    python examples/classic.py --train my/texts --test other/texts

Without folders it reads the Python language reference, which every Python carries, a fifth of its
topics held out. The chosen token does not change the rest of the text, so gamma is 0.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import argparse
import itertools
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from agents import DeepQLearningModel, ExperienceReplay, PrunedTransformerModel, train_model
from agents.classic.data import text_loader
from agents.classic.loop import LabelledBatch
from textgen_env.models import load_pretrained
from textgen_env.models.device import pick_dtype

ACTIONS = 10  # candidates a token


def main() -> None:
    options = read_options()
    with tempfile.TemporaryDirectory() as folder:
        if options.train is None:
            options.train, options.test = python_reference(Path(folder))
        run(options)


def run(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # The environment: a language model that proposes, and texts that know the answer.
    language_model, tokenizer = load_pretrained(options.model, pick_dtype("auto"))
    train_data = text_loader(options.train, language_model.to(device), tokenizer, ACTIONS)
    test_data = text_loader(options.test, language_model, tokenizer, ACTIONS)

    # The agent: a pruned transformer that reads, a network that values, a memory.
    transformer = PrunedTransformerModel(options.model, options.prune, dtype=pick_dtype("auto"))
    dq_learning_model = DeepQLearningModel(transformer.hidden_size, ACTIONS)
    optimizer = torch.optim.Adam(dq_learning_model.parameters(), lr=1e-4)
    replay_buffer = ExperienceReplay(capacity=50_000, seed=options.seed)
    print(f"transformer: {transformer.report()}")

    decisions = itertools.islice(train_data, options.batches)
    first = next(decisions)
    start_at_rank_1(dq_learning_model, first)
    history = train_model(
        transformer,
        dq_learning_model,
        optimizer,
        1,
        tokenizer,
        itertools.chain([first], decisions),
        replay_buffer,
        device,
        gamma=0.0,
        epsilon=0.5,
        batch_size=256,
        updates_per_batch=5,  # about 2.5 updates see each decision; at 20 the network memorises it
        seed=options.seed,
    )
    trained = history[0]
    missed = train_data.dataset.missed / train_data.dataset.rows
    print(f"trained: {trained.transitions} decisions ({missed:.1%} without the true token), {trained.updates} updates")

    # Held-out text: the agent's choice and rank 1, on the same decisions.
    agent, rank_1 = choose(itertools.islice(test_data, options.test_batches), transformer, dq_learning_model, device)
    compare(agent, rank_1)


@torch.no_grad()
def start_at_rank_1(dq_learning_model: DeepQLearningModel, batch: LabelledBatch) -> None:
    """Set the output bias to how often each rank is right, for all states; rank 1 is most often."""
    last = dq_learning_model.layers[-1]
    last.weight.zero_()
    last.bias.copy_(batch.rewards[batch.attention_mask.bool()].mean(dim=0))


@torch.inference_mode()
def choose(
    batches: Iterable[LabelledBatch],
    transformer: PrunedTransformerModel,
    dq_learning_model: DeepQLearningModel,
    device: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rewards of the greedy agent and of rank 1 at every decision: two (n,) tensors."""
    agent, rank_1 = [], []
    for batch in batches:
        real = batch.attention_mask.bool()
        states = transformer(batch.input_ids.to(device), batch.attention_mask.to(device)).float().cpu()[real]  # (n, d)
        rewards = batch.rewards[real]  # (n, A)
        actions = dq_learning_model(states.to(device)).argmax(dim=1, keepdim=True).cpu()
        agent.append(rewards.gather(1, actions).squeeze(1))
        rank_1.append(rewards[:, 0])
    return torch.cat(agent), torch.cat(rank_1)


def compare(agent: torch.Tensor, rank_1: torch.Tensor) -> None:
    """Print both accuracies, and their paired difference with its standard error."""
    gain = agent - rank_1
    error = float(gain.std()) / math.sqrt(len(gain))
    mean = float(gain.mean())
    print(f"held out: {len(gain)} decisions; rank 1 is right in {rank_1.mean():.2%}, the agent in {agent.mean():.2%}")
    print(f"difference: {100 * mean:+.2f} points (standard error {100 * error:.2f})")
    if abs(mean) < 2 * error:
        print("No difference: that is within two standard errors of zero.")
    elif mean > 0:
        print("The agent beats the language model's own first choice on this text.")
    else:
        print("The agent is worse than the language model's own first choice; give it more text.")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a name, folder or hub id of a causal model")
    parser.add_argument("--prune", type=float, default=0.2, help="share of each layer's weights")
    parser.add_argument("--train", type=Path, help="a folder with *.txt files")
    parser.add_argument("--test", type=Path, help="another one, held out")
    parser.add_argument("--batches", type=int, default=150, help="of 512 decisions, to train on")
    parser.add_argument("--test-batches", type=int, default=30, help="to test on")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.train is None) != (options.test is None):
        parser.error("give both --train and --test, or neither")
    return options


def python_reference(folder: Path) -> tuple[Path, Path]:
    """Write the topics of Python's own help as files; every fifth goes to the second folder."""
    from pydoc_data.topics import topics

    train, test = folder / "train", folder / "test"
    for place in (train, test):
        place.mkdir()
    for i, name in enumerate(sorted(topics)):
        (test if i % 5 == 4 else train).joinpath(f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return train, test


if __name__ == "__main__":
    main()
