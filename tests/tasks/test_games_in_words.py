"""The games in words: what is understood, and that a game in words goes as the game of tokens does."""

from __future__ import annotations

import string

import pytest

from textgen_env import TableModel, make_task
from textgen_env.errors import ConfigError, PromptError
from textgen_env.tasks.conversation import GuessNumber, TwentyQuestions, Wordle
from textgen_env.tasks.conversation.questions import ANIMALS, QUESTIONS
from textgen_env.tasks.exact import expected_reward

END, OPEN = "<|im_end|>", "<|im_start|>"
CHATML = (
    f"{{% for m in messages %}}{OPEN}{{{{ m.role }}}}\n{{{{ m.content }}}}{END}\n{{% endfor %}}"
    f"{{% if add_generation_prompt %}}{OPEN}assistant\n{{% endif %}}"
)
ANIMAL = len(QUESTIONS)  # the id of the first animal


@pytest.mark.parametrize(
    ("game", "text", "move"),
    [
        (GuessNumber(), "I think it is 4, or 5.", (4,)),
        (GuessNumber(), "Is it 12? No, 6!", (6,)),
        (GuessNumber(), "Four", None),
        (GuessNumber(), "Is it \u0664?", None),  # a digit, and none that a model is told of
        (GuessNumber(numbers=100), "It is 7.", (0, 7)),
        (Wordle(), "Maybe LANE, or core", tuple(map(string.ascii_lowercase.index, "lane"))),
        (Wordle(), "planes", None),
        (TwentyQuestions(), "Does it eat meat?", (4,)),
        (TwentyQuestions(), "Has it fur, or is it the cat?", (2,)),
        (TwentyQuestions(), "It is a Cat. Has it fur?", (ANIMAL,)),
        (TwentyQuestions(), "an owl", (ANIMAL + list(ANIMALS).index("owl"),)),
        (TwentyQuestions(), "It is furry, in a category of its own.", None),
        (TwentyQuestions(animals=2), "the duck", None),  # an animal of a longer list
        (TwentyQuestions(), "", None),
    ],
)
def test_the_first_move_in_a_text_is_understood(game, text, move):
    assert game.understand(text) == move


@pytest.fixture(scope="module")
def chat_model():
    """A chat model with a token a character."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [END, OPEN, "<unk>", "\n", *string.printable[:95]]
    letters = Tokenizer(models.WordLevel({word: i for i, word in enumerate(characters)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": [OPEN]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(characters), **sizes, eos_token_id=0, max_position_embeddings=2048)
    return LlamaForCausalLM(config).eval(), tokenizer


def played(task, secret, said):
    """Return the partner's replies to what the agent says, turn by turn, the reward, and why the game ended."""
    env = task.make_env(top_k=None)
    tokenizer = task.model.tokenizer
    env.reset(options={"prompt": list(task.test_prompts)[secret]})
    reward, info = 0.0, {}
    for text in said:
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]:
            _, paid, _, _, info = env.step(token)
            reward += paid
    return [turn.text for turn in info["turns"] if turn.speaker == "partner"], reward, info["finish_reason"]


@pytest.mark.parametrize(
    ("name", "sizes", "secret", "said", "replies", "reward"),
    [
        ("GuessNumber", {}, 5, ["3", "6?", "So 5."], ["Higher.", "Lower.", "Right."], 1.0),
        ("GuessNumber", {}, 5, ["Hm", "5"], ["Say a number from 0 to 6.", "Right."], 1.0),
        ("GuessNumber", {"turns": 2}, 0, ["3", "2"], ["Lower.", "Lower."], 0.0),
        ("Wordle", {"words": 3}, 2, ["lane", "cave"], ["-+-+", "++++"], 1.0),
        ("TwentyQuestions", {"animals": 2}, 1, ["fur?", "a cat", "an owl"], ["No.", "No.", "Right."], 1.0),
    ],
)
def test_a_game_in_words_goes_as_its_rules_say(chat_model, name, sizes, secret, said, replies, reward):
    task = make_task(f"TextGen/{name}-v0", model=chat_model, **sizes)
    found = played(task, secret, said)
    assert found == (replies, reward, "partner" if reward else "turns")


def test_every_guess_is_answered_as_in_the_game_of_tokens(chat_model):
    game = GuessNumber(numbers=5)
    task = make_task("TextGen/GuessNumber-v0", numbers=5, model=chat_model)
    for secret in range(5):
        for guess in range(5):
            turns = 1 if guess == secret else game.turns
            expected = [game.say(game.hear((guess,), secret))] * turns
            assert played(task, secret, [str(guess)] * turns)[:2] == (expected, float(guess == secret))


@pytest.mark.parametrize(
    ("model", "error", "says"),
    [
        ("tiny", PromptError, "has no chat template"),
        (TableModel(["a"], [1.0], end=None), ConfigError, "has no tokenizer: .* needs a chat model, such as smollm2"),
    ],
)
def test_a_model_that_cannot_chat_is_named(model, error, says):
    with pytest.raises(error, match=says):
        make_task("TextGen/Wordle-v0", model=model)


def test_bounds_of_other_models_say_how_to_find_them(chat_model):
    with pytest.raises(
        ConfigError,
        match=r"no bounds are known for TextGen/Wordle-v0 at words=12 turns=3 seed=0 model=tuple: .*benchmarks\.bounds",
    ):
        make_task("TextGen/Wordle-v0", model=chat_model).bounds()


@pytest.mark.parametrize("game", [GuessNumber(), Wordle(), TwentyQuestions()])
def test_what_the_language_model_reaches_in_words_is_below_the_best_play(game):
    bounds = make_task(f"TextGen/{type(game).__name__}-v0", model="smollm2").bounds()
    assert bounds.best == pytest.approx(expected_reward(game, best=True), abs=1e-6)
    assert 0 < bounds.language_model < bounds.best
