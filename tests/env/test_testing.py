"""The contract passes what is in the box, and catches each way of breaking it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from toys import PROMPTS, Worth, letters

from textgen_env import Generation, TextGenEnv, TextGenVectorEnv, make_task
from textgen_env.errors import ContractError, RewardError, TextGenError
from textgen_env.models.table import TableModel, TableSlots
from textgen_env.rewards import Reward, batch_reward
from textgen_env.tasks import TASKS
from textgen_env.testing import check_env, check_language_model, check_reward, check_vector_env

SMALL = {"top_k": 4, "max_new_tokens": 5, "max_prompt_tokens": 4, "observation": "full"}
DIAGNOSTIC = [id for id in TASKS if hasattr(make_task(id).reward, "process")]


# --- what is in the box


def test_a_broken_contract_is_an_assertion_and_an_error_of_this_package():
    assert issubclass(ContractError, AssertionError)
    assert issubclass(ContractError, TextGenError)


def test_the_table_model_keeps_the_contract_exactly():
    check_language_model(letters(), PROMPTS[:2], k=3, tolerance=0.0)


def test_a_transformer_keeps_the_contract(tiny_lm):
    from textgen_env import load_language_model

    check_language_model(load_language_model(tiny_lm), ["the film", "the long film was"], k=3)


@pytest.mark.parametrize(
    ("reward", "partial"),
    [
        ("sentiment", False),
        ("keywords", False),
        ("readability", False),
        ("metre", False),
        ("rouge", False),
        ("rhyme", False),
        ("json", False),
        (Worth(), False),
        (len, False),
        ([["sentiment", 1.0], ["rhyme", 1.0]], True),
        ({"name": "shaped", "reward": "json", "potential": "length"}, True),
    ],
)
def test_rewards_in_the_box_keep_the_contract(reward, partial):
    check_reward(reward, partial=partial)


@pytest.mark.parametrize("id", DIAGNOSTIC)
def test_diagnostic_tasks_keep_the_contract(id):
    task = make_task(id)
    check_env(task.make_env(observation="full"))
    check_vector_env(
        task.make_vec(3, observation="full"), lambda: task.make_env(observation="full"), steps=20, tolerance=0.0
    )


@pytest.mark.parametrize("changes", [{}, {"top_k": None}, {"reward_at": "step", "top_p": 0.8, "stop": ("ab",)}])
def test_the_environments_keep_the_contract(changes):
    def single():
        return TextGenEnv(letters(), PROMPTS, Worth(), **(SMALL | changes))

    check_env(single())
    vec = TextGenVectorEnv(3, letters(), PROMPTS, Worth(), **(SMALL | changes))
    check_vector_env(vec, single, tolerance=0.0)


# --- language models that break a promise


class Broken(TableModel):
    """A table whose slots answer ``change(slots, rows, proposals)``; methods can be replaced."""

    def __init__(self, change=None, **methods):
        super().__init__("ab!", by_sum_of(3), end="!", name="broken")
        self.change, self.methods = change, methods

    def slots(self, rows, length, k):
        slots = TableSlots(self, rows, length, k)
        propose = slots.propose
        if self.change:
            slots.propose = lambda rows, block_end: self.change(slots, rows, propose(rows, block_end))
        for name, method in self.methods.items():
            setattr(slots, name, lambda *args, method=method: method(slots, *args))
        return slots


def by_sum_of(vocab):
    """Probabilities that depend on all ids so far."""

    def table(ids):
        weights = 1.0 + (np.arange(vocab) * (sum(ids) + len(ids)) + np.arange(vocab)) % 5
        return weights / weights.sum()

    return table


def replaced(**arrays):
    """Proposals with arrays changed by functions of them."""

    def change(slots, rows, found):
        kept = {name: getattr(found, name) for name in ("candidates", "logprobs", "hidden")}
        return SimpleNamespace(**{name: arrays.get(name, lambda x: x)(array) for name, array in kept.items()})

    return change


def held(slots, rows, found):
    """The same arrays at every call."""
    store = slots.__dict__.setdefault("store", {})
    return store.setdefault((slots.k, tuple(rows), tuple(tuple(slots.ids_of(row)) for row in rows)), found)


def drifting(slots, rows, found):
    """Something random."""
    noise = np.random.default_rng().normal(size=found.hidden.shape).astype(np.float32)
    return replaced(hidden=lambda x: x + noise)(slots, rows, found)


def averaged(slots, rows, found):
    """A row depends on how many there are."""
    return replaced(hidden=lambda x: x / np.float32(len(rows)))(slots, rows, found)


def forgetful_fork(slots, src, dst):
    """Shares the prompt only."""
    TableSlots.start(slots, dst, [slots.ids_of(row)[:1] for row in src])


def aliased_save(slots, row):
    """A reference to what the row holds now."""
    return slots, row


def aliased_load(slots, row, saved):
    held_slots, other = saved
    ids = held_slots.ids_of(other)
    TableSlots.start(slots, np.array([row]), [ids[:-1] or ids])


def no_block(slots, rows, block_end):
    return TableSlots.propose(slots, rows, np.zeros_like(block_end))


def late_advance(slots, rows, tokens):
    """Appends the wrong token."""
    TableSlots.advance(slots, rows, 1 - np.minimum(tokens, 1))


def reversing_rebuild(slots):
    """Lets the rows change places."""
    rows = np.arange(slots.rows)
    TableSlots.start(slots, rows, [slots.ids_of(row) for row in rows[::-1]])


def shapes_wrong(x):
    return x[:, :1]


BROKEN_MODELS = {
    "float64": (Broken(replaced(logprobs=lambda x: x.astype(np.float64))), "logprobs must be"),
    "too few": (Broken(replaced(candidates=shapes_wrong)), "candidates must be"),
    "int64": (Broken(replaced(candidates=lambda x: x.astype(np.int64))), "candidates must be"),
    "nan": (Broken(replaced(hidden=lambda x: x * np.float32("nan"))), "hidden states must be finite"),
    "positive": (Broken(replaced(logprobs=lambda x: -x)), "must be in"),
    "twice": (Broken(replaced(candidates=lambda x: np.minimum(x, 0))), "sorted|listed twice"),
    "unsorted": (Broken(replaced(candidates=lambda x: x[:, ::-1], logprobs=lambda x: x[:, ::-1])), "sorted|id i"),
    "shared": (Broken(held), "in arrays that nobody else writes to"),
    "random": (Broken(drifting), "propose again|proposing again"),
    "batch": (Broken(averaged), "must not depend on its neighbours"),
    "mass": (Broken(replaced(logprobs=lambda x: x - 1)), "sum to 1"),
    "no block": (Broken(propose=no_block), "end token must not be proposed"),
    "advance": (Broken(advance=late_advance), "advancing by a token"),
    "fork": (Broken(fork=forgetful_fork), "a forked row must propose"),
    "save": (Broken(save=aliased_save, load=aliased_load), "saved row must come back|was saved must not change"),
    "rebuild": (Broken(rebuild=reversing_rebuild), "rebuilding must keep"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_a_broken_language_model_is_caught(name):
    model, says = BROKEN_MODELS[name]
    with pytest.raises(ContractError, match=says):
        check_language_model(model, ["ab", "bba"], k=2, tolerance=1e-6)


def test_the_broken_model_without_a_change_keeps_the_contract():
    check_language_model(Broken(), ["ab", "bba"], k=2, tolerance=0.0)


def test_a_model_whose_vocabulary_is_wrong_is_caught():
    model = Broken()
    model.vocab_size = 1
    with pytest.raises(ContractError, match="token ids and end_ids must be in 0"):
        check_language_model(model, ["ab", "bba"])
    model = Broken()
    model.embed = lambda ids: np.zeros((*ids.shape, 2), np.float32)
    with pytest.raises(ContractError, match="embed must answer"):
        check_language_model(model, ["ab", "bba"])
    model = Broken()
    model.continuations = lambda prompt, ids, candidates: ["a" * len(candidates)] * len(candidates)
    with pytest.raises(ContractError, match="one string a candidate"):
        check_language_model(model, ["ab", "bba"])


# --- rewards that break a promise


@batch_reward
def ranked(generations):
    return np.argsort(np.argsort([len(g.completion) for g in generations])).astype(float)


@batch_reward
def positional(generations):
    return [len(g.completion) + 0.1 * (i > 0) for i, g in enumerate(generations)]


@batch_reward
def writes(generations):
    for g in generations:
        g.metadata["seen"] = True
    return [0.0 for _ in generations]


def lucky(completion):
    return float(np.random.default_rng().random())


@batch_reward
def never_empty(generations):
    return [float(len(g.completion)) for g in generations] or [0.0]


@pytest.mark.parametrize(
    ("reward", "error", "says"),
    [
        (ranked, ContractError, "alone and in a batch"),
        (positional, ContractError, "alone and in a batch"),
        (writes, ContractError, "must leave the generations"),
        (lucky, ContractError, "alone and in a batch|again"),
        (never_empty, RewardError, "shape"),
        (lambda completion: float("inf"), RewardError, "finite"),
        (lambda completion: "good", RewardError, "numbers"),
    ],
)
def test_a_broken_reward_is_caught(reward, error, says):
    generations = [Generation("p", text, metadata={}) for text in ("a", "bb", "ccc")]
    with pytest.raises(error, match=says):
        check_reward(reward, generations)


class Running(Reward):
    """The length of the text, with a running score whose methods can be replaced."""

    name = "running"

    def __init__(self, **methods):
        self.methods = methods

    def __call__(self, generations):
        return np.array([float(len(g.completion)) for g in generations])

    def running(self):
        def state(text):
            return SimpleNamespace(value=float(len(text)))

        methods = {
            "start": lambda prompt, reference, metadata: state(""),
            "extend": lambda s, text: state(text),
            "lookahead": lambda s, texts: np.array([len(text) for text in texts], np.float32),
        }
        return SimpleNamespace(**(methods | self.methods))


def adds_in_place(state, text):
    state.value = float(len(text))
    return state


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ({"lookahead": lambda s, texts: np.array([len(text) for text in texts])}, "float32"),
        ({"lookahead": lambda s, texts: np.zeros(len(texts), np.float32)}, "values of extend"),
        ({"extend": adds_in_place}, "leave the state|values of extend"),
        ({"start": lambda p, r, m: SimpleNamespace(value=float("nan"))}, "finite"),
        (
            {
                "extend": lambda s, text: SimpleNamespace(value=len(text) / 2),
                "lookahead": lambda s, texts: np.array([len(text) / 2 for text in texts], np.float32),
            },
            "must be its reward",
        ),
        (
            {
                "extend": lambda s, text: SimpleNamespace(value=s.value + 1),
                "lookahead": lambda s, texts: np.array([s.value + 1 for _ in texts], np.float32),
            },
            "in which|must be its reward",
        ),
    ],
)
def test_a_broken_running_score_is_caught(methods, says):
    check_reward(Running())
    with pytest.raises(ContractError, match=says):
        check_reward(Running(**methods))


# --- environments that break a promise


def single(**changes):
    return TextGenEnv(letters(), PROMPTS, Worth(), **(SMALL | changes))


def vector(**changes):
    return TextGenVectorEnv(3, letters(), PROMPTS, Worth(), **(SMALL | changes))


def observer(env):
    """The name of the method that shows an environment's rows as they are."""
    return "observe" if hasattr(env, "observe") else "_observation"


def breaks(env, **changes):
    """Let ``env`` observe what functions of the key's array make of it."""
    observation = getattr(env, observer(env))
    setattr(
        env, observer(env), lambda: {key: changes.get(key, lambda x: x)(value) for key, value in observation().items()}
    )
    return env


def stepping(env, change):
    """Let ``env.step`` answer ``change`` of what it would."""
    step = env.step
    env.step = lambda actions: change(*step(actions))
    return env


def shared(env):
    """The same arrays at every call."""
    observation, store = getattr(env, observer(env)), {}

    def same():
        for key, value in observation().items():
            store.setdefault(key, value.copy())[...] = value
        return dict(store)

    setattr(env, observer(env), same)
    return env


def unseeded(env):
    """Draws its prompts by itself."""
    rng = np.random.default_rng()
    prompts = env.episodes.prompts
    env.episodes.prompts = SimpleNamespace(draw=lambda _: prompts.draw(rng))
    return env


def lenient(env):
    """Takes any action for the first."""
    step = env.step
    env.step = lambda action: step(action if 0 <= action < 4 else 0)
    return env


def unending(env):
    """Answers steps after the end."""
    step, last = env.step, []

    def on(action):
        if not last or not last[-1][2]:
            last.append(step(action))
        return last[-1]

    env.step, reset = on, env.reset
    env.reset = lambda **kwargs: (last.clear(), reset(**kwargs))[1]
    return env


def stale(env):
    """Restores the observation, and nothing else."""
    observe = env._observation
    env.restore = lambda snapshot: observe()
    return env


def doubled(env):
    """Appends a token twice."""
    act = env.episodes.act

    def twice(rows, actions):
        outcome = act(rows, actions)
        if not outcome.ended[0]:
            env.episodes.slots.advance(rows, env.episodes.slots.tokens[rows, 0])
        return outcome

    env.episodes.act = twice
    return env


BROKEN_ENVS = {
    "empty mask": (lambda: breaks(single(), action_mask=lambda x: x * 0), "never be empty"),
    "outside": (lambda: breaks(single(), budget=lambda x: x + 2), "'budget' is"),
    "dtype": (lambda: breaks(single(), tokens=lambda x: x.astype(np.int64)), "'tokens' is"),
    "unsorted": (lambda: breaks(single(), logprobs=lambda x: x[::-1].copy()), "sorted by log-probability|1e4|10000"),
    "shared": (lambda: shared(single()), "fresh arrays"),
    "unseeded": (lambda: unseeded(single()), "bit for bit"),
    "int reward": (lambda: stepping(single(), lambda o, r, e, t, i: (o, 1, e, t, i)), "finite float"),
    "nan reward": (lambda: stepping(single(), lambda o, r, e, t, i: (o, float("nan"), e, t, i)), "finite float"),
    "truncates": (lambda: stepping(single(), lambda o, r, e, t, i: (o, r, e, e, i)), "truncated"),
    "no info": (lambda: stepping(single(), lambda o, r, e, t, i: (o, r, e, t, {})), "last info must have"),
    "lenient": (lambda: lenient(single()), "must raise IllegalAction"),
    "unending": (lambda: unending(single()), "must raise ResetNeeded"),
    "stale": (lambda: stale(single()), "restoring a snapshot|after restoring"),
    "free lunch": (lambda: breaks(single(), budget=lambda x: x * 0 + 1), "use up some of the budget"),
    "wrong token": (lambda: breaks(single(), tokens=lambda x: np.roll(x, 1)), "must append|leave the tokens"),
    "doubled": (lambda: doubled(single()), "one token longer|in the observation space"),
    "flat": (lambda: single(observation="tokens"), "needs a Dict observation"),
    "no mask": (lambda: single(observation=("tokens", "length")), "the key 'action_mask'"),
}


@pytest.mark.parametrize("name", BROKEN_ENVS)
def test_a_broken_environment_is_caught(name):
    make, says = BROKEN_ENVS[name]
    with pytest.raises(ContractError, match=says):
        check_env(make())


def forks_nothing(env):
    env.fork = lambda src, dst: env.observe()
    return env


def same_seed(env):
    reset = env.reset
    env.reset = lambda seed=None, options=None: reset(seed=[seed] * 3 if isinstance(seed, int) else seed)
    return env


def loses_final(env):
    return stepping(env, lambda o, r, e, t, i: (o, r, e, t, {}))


BROKEN_VECTORS = {
    "next step": (lambda: vector(autoreset_mode="NextStep"), "SAME_STEP"),
    "final": (lambda: loses_final(vector()), "final_obs and final_info"),
    "seeds": (lambda: same_seed(vector()), "row 1 must be what a single environment with seed 1 is"),
    "fork": (lambda: forks_nothing(vector()), "a forked row"),
    "float32": (lambda: stepping(vector(), lambda o, r, e, t, i: (o, r.astype(np.float32), e, t, i)), "float64"),
    "rewards": (lambda: stepping(vector(), lambda o, r, e, t, i: (o, r[::-1].copy(), e, t, i)), "rewards differ"),
    "truncates": (lambda: stepping(vector(), lambda o, r, e, t, i: (o, r, e, e, i)), "truncated"),
    "shared": (lambda: shared(vector()), "fresh arrays"),
    "unseeded": (lambda: unseeded(vector()), "bit for bit"),
    "empty mask": (lambda: breaks(vector(), action_mask=lambda x: x * 0), "never be empty"),
    "outside": (lambda: breaks(vector(), budget=lambda x: x + 2), "'budget' is"),
}


@pytest.mark.parametrize("name", BROKEN_VECTORS)
def test_a_broken_vector_environment_is_caught(name):
    make, says = BROKEN_VECTORS[name]
    with pytest.raises(ContractError, match=says):
        check_vector_env(make(), single)
