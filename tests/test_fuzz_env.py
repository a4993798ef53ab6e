"""Any order of calls, legal or not: the environments do what ``PlainEpisode`` does, or say what was wrong.

A state machine makes the calls on both. After a refused one the environment must be where it was.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
from fuzzing import LARGE, examples, no_hang, tried
from gymnasium.utils import seeding
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from toys import PROMPTS, PlainEpisode, Worth, assert_same, letters, worth

from textgen_env import TextGenEnv, TextGenVectorEnv
from textgen_env.errors import ConfigError, IllegalAction, PromptError, ResetNeeded

ROWS = 3
RULES = st.fixed_dictionaries(
    {
        "top_k": st.sampled_from([None, 2, 4]),
        "top_p": st.sampled_from([1.0, 0.72]),
        "max_new_tokens": st.sampled_from([1, 3, 5]),
        "min_new_tokens": st.sampled_from([0, 1]),
        "stop": st.sampled_from([(), ("ab",), ("b", ".")]),
        "reward_at": st.sampled_from(["end", "step"]),
    }
)
ON_ILLEGAL = st.sampled_from(["raise", "last_legal"])
SEEDS = st.none() | st.integers(0, 3)
GOOD_PROMPTS = st.sampled_from([None, *PROMPTS])
BAD_PROMPTS = st.sampled_from(["", "  ", "x", "ababababab", 3, ["a"], {"text": "a"}, {"prompt": None}])
WHICH = st.integers(0, 99)  # one of however many there are
BAD_ACTIONS = st.sampled_from([-1, 99, 1.5, "a", None, True, [0, 0], 2**70])
BAD_ROWS = st.sampled_from([[-1], [ROWS], [0.5], [True], ["0"], [[0]]])


class Machine(RuleBasedStateMachine):
    """What the machines of the single and the vector environment share: rows and their reference."""

    def open_rows(self, rules, on_illegal, rows):
        self.rules, self.on_illegal = rules, on_illegal
        self.rows: list[PlainEpisode | None] = [None] * rows
        self.mapped = [0] * rows
        self.generators: list[np.random.Generator | None] = [None] * rows
        self.arguments = {
            "model": letters(),
            "prompts": PROMPTS,
            "reward": Worth(),
            "observation": "full",
            "max_prompt_tokens": 4,
            "on_illegal": on_illegal,
            **rules,
        }

    def begin(self, row, prompt):
        if prompt is None:
            prompt = PROMPTS[int(self.generators[row].integers(len(PROMPTS)))]
        self.rows[row] = PlainEpisode(prompt, **self.rules)
        self.mapped[row] = 0

    def seed(self, row, seed):
        if seed is not None:
            self.generators[row], _ = seeding.np_random(seed + row)

    def seed_for(self, seed):
        """A seed where the reference could not know the generator otherwise."""
        return 0 if seed is None and None in self.generators else seed

    def played(self, row, which):
        """A number that stands for an action of the row, and the one that is played for it."""
        legal = [allowed for _, _, allowed in self.rows[row].candidates()]
        if self.on_illegal == "last_legal":
            action = which % len(legal)
            return action, action if legal[action] else max(np.flatnonzero(legal))
        action = np.flatnonzero(legal)[which % sum(legal)]
        return action, action

    def masked_action(self, row):
        legal = [allowed for _, _, allowed in self.rows[row].candidates()]
        return legal.index(False) if False in legal else len(legal)

    def is_live(self, row):
        return self.rows[row] is not None and self.rows[row].finish_reason is None

    def check_info(self, row, info):
        if self.on_illegal == "last_legal":
            assert info["illegal_actions"] == self.mapped[row]
        plain = self.rows[row]
        if plain.finish_reason:
            assert (info["completion"], info["finish_reason"]) == (plain.text, plain.finish_reason)
            assert info["reward_parts"] == {"worth": worth(plain.text)}
            assert info["logprob"] == pytest.approx(plain.logprob, abs=1e-4)
        else:
            assert "completion" not in info


class SingleMachine(Machine):
    snapshots = Bundle("snapshots")

    @initialize(rules=RULES, on_illegal=ON_ILLEGAL)
    def make(self, rules, on_illegal):
        self.open_rows(rules, on_illegal, 1)
        self.env = TextGenEnv(**self.arguments)
        self.seen = None

    @rule(seed=SEEDS, prompt=GOOD_PROMPTS)
    def reset(self, seed, prompt):
        seed = self.seed_for(seed)
        with no_hang():
            self.seen, info = self.env.reset(seed=seed, options=None if prompt is None else {"prompt": prompt})
        assert info == {}
        self.seed(0, seed)
        self.begin(0, prompt)
        tried["operations"] += 1

    @rule(prompt=BAD_PROMPTS)
    def reset_to_a_bad_prompt(self, prompt):
        with pytest.raises(PromptError):
            self.env.reset(options={"prompt": prompt})
        with pytest.raises(ConfigError, match="unknown reset options"):
            self.env.reset(options={"promt": "a"})
        tried["operations"] += 2

    @rule(choices=st.lists(WHICH, min_size=1, max_size=6))
    def steps(self, choices):
        for which in choices:
            tried["operations"] += 1
            if not self.is_live(0):
                with pytest.raises(ResetNeeded):
                    self.env.step(0)
                return
            action, played = self.played(0, which)
            with no_hang():
                self.seen, reward, terminated, truncated, info = self.env.step(action)
            self.mapped[0] += action != played
            assert reward == self.rows[0].step(played)
            assert (terminated, truncated) == (bool(self.rows[0].finish_reason), False)
            self.check_info(0, info)
            self.same_as_the_reference()

    @rule(action=BAD_ACTIONS)
    def step_illegally(self, action):
        with pytest.raises(IllegalAction if self.is_live(0) else ResetNeeded):
            self.env.step(action)
        if self.is_live(0) and self.on_illegal == "raise":
            with pytest.raises(IllegalAction):
                self.env.step(self.masked_action(0))
        tried["operations"] += 2

    @rule(target=snapshots)
    def snapshot(self):
        tried["operations"] += 1
        if self.rows[0] is None:
            with pytest.raises(ResetNeeded):
                self.env.snapshot()
            return multiple()
        return self.env.snapshot(), copy.deepcopy(self.rows[0]), self.mapped[0]

    @rule(saved=snapshots)
    def restore(self, saved):
        snapshot, plain, self.mapped[0] = saved
        self.rows[0] = copy.deepcopy(plain)
        self.seen = self.env.restore(snapshot)
        tried["operations"] += 1

    @rule(saved=snapshots)
    def restore_elsewhere(self, saved):
        with pytest.raises(ConfigError, match="another environment"):
            TextGenEnv(**self.arguments).restore(saved[0])
        with pytest.raises(ConfigError, match="only a snapshot"):
            self.env.restore(saved)
        tried["operations"] += 2

    @rule()
    def close(self):
        self.env.close()
        tried["operations"] += 1

    @invariant()
    def same_as_the_reference(self):
        if getattr(self, "rows", [None])[0] is not None:
            assert_same(self.seen, self.rows[0].observation())


class VectorMachine(Machine):
    snapshots = Bundle("snapshots")

    @initialize(rules=RULES, on_illegal=ON_ILLEGAL, mode=st.sampled_from(["SameStep", "NextStep", "Disabled"]))
    def make(self, rules, on_illegal, mode):
        self.open_rows(rules, on_illegal, ROWS)
        self.mode = mode
        self.env = TextGenVectorEnv(ROWS, **self.arguments, autoreset_mode=mode)
        self.seen = None

    @rule(seed=SEEDS, mask=st.none() | st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), prompt=GOOD_PROMPTS)
    def reset(self, seed, mask, prompt):
        tried["operations"] += 1
        options = {} if prompt is None else {"prompt": [prompt] * ROWS}
        if mask is not None:
            options["reset_mask"] = np.array(mask)
            if not any(mask):
                with pytest.raises(ConfigError, match="at least one True"):
                    self.env.reset(seed=seed, options=options)
                return
        if None in self.generators:  # the reference can follow no generator that it has not seen seeded
            seed, mask = seed or 0, None
            options.pop("reset_mask", None)
        with no_hang():
            self.seen, infos = self.env.reset(seed=seed, options=options)
        assert infos == {}
        for row in np.flatnonzero([True] * ROWS if mask is None else mask).tolist():
            self.seed(row, seed)
            self.begin(row, prompt)

    @rule(prompt=BAD_PROMPTS)
    def reset_badly(self, prompt):
        with pytest.raises((PromptError, ConfigError)):
            self.env.reset(options={"prompt": prompt})
        for options in ({"reset_mask": [1, 0, 0]}, {"reset_mask": np.ones(ROWS + 1, bool)}, {"mask": None}):
            with pytest.raises(ConfigError):
                self.env.reset(options=options)
        tried["operations"] += 4

    @rule(choices=st.lists(st.lists(WHICH, min_size=ROWS, max_size=ROWS), min_size=1, max_size=6))
    def steps(self, choices):
        for which in choices:
            if not self.step(which):
                return

    def step(self, which):
        tried["operations"] += 1
        restarts = [self.mode == "NextStep" and plain is not None and not self.is_live(row)
                    for row, plain in enumerate(self.rows)]  # fmt: skip
        if not all(self.is_live(row) or restarts[row] for row in range(ROWS)):
            with pytest.raises(ResetNeeded):
                self.env.step(np.zeros(ROWS, int))
            return False
        pairs = [(-7, None) if restarts[row] else self.played(row, which[row]) for row in range(ROWS)]
        with no_hang():
            self.seen, rewards, terminated, truncated, infos = self.env.step(np.array([a for a, _ in pairs]))
        assert not truncated.any()
        for row, (action, played) in enumerate(pairs):
            if restarts[row]:
                self.begin(row, None)
                assert (rewards[row], terminated[row]) == (0.0, False)
                continue
            self.mapped[row] += action != played
            assert rewards[row] == self.rows[row].step(played)
            assert terminated[row] == bool(self.rows[row].finish_reason)
            self.check_end(row, infos)
        self.same_as_the_reference()
        return True

    def check_end(self, row, infos):
        if not self.rows[row].finish_reason:
            return
        final = self.mode == "SameStep"
        assert infos["_final_info" if final else "_completion"][row]
        told = infos["final_info"] if final else infos
        self.check_info(row, {
            name: {part: values[row] for part, values in told[name].items() if not part.startswith("_")}
            if name == "reward_parts" else told[name][row]
            for name in told if not name.startswith(("_", "final"))
        })  # fmt: skip
        if final:
            assert_same(infos["final_obs"][row], self.rows[row].observation())
            self.begin(row, None)

    @rule(action=BAD_ACTIONS, row=st.integers(0, ROWS - 1))
    def step_illegally(self, action, row):
        actions = [self.played(r, 0)[0] if self.is_live(r) else 0 for r in range(ROWS)]
        actions[row] = action
        given = np.array(actions, dtype=None if isinstance(action, int) and abs(action) < 2**60 else object)
        ignored = self.mode == "NextStep" and self.rows[row] is not None and not self.is_live(row)
        if not ignored and action is not True:  # among integers, numpy makes True a 1
            with pytest.raises((IllegalAction, ResetNeeded)):
                self.env.step(given)
        with pytest.raises(IllegalAction, match="shape"):
            self.env.step(given[1:])
        tried["operations"] += 2

    @rule(pairs=st.dictionaries(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1), min_size=1))
    def fork(self, pairs):
        tried["operations"] += 1
        dst, src = list(pairs), list(pairs.values())
        if any(self.rows[row] is None for row in src):
            with pytest.raises(ResetNeeded):
                self.env.fork(src, dst)
            return
        self.seen = self.env.fork(src, dst)
        held = [(copy.deepcopy(self.rows[row]), self.mapped[row]) for row in src]
        for row, (plain, mapped) in zip(dst, held, strict=True):
            self.rows[row], self.mapped[row] = plain, mapped

    @rule(bad=BAD_ROWS)
    def fork_badly(self, bad):
        for src, dst in ((bad, [0]), ([0], bad), ([0, 1], [2, 2]), ([0, 1], [2])):
            with pytest.raises(IndexError):
                self.env.fork(src, dst)
        tried["operations"] += 4

    @rule(target=snapshots, row=st.integers(0, ROWS - 1))
    def snapshot(self, row):
        tried["operations"] += 1
        if self.rows[row] is None:
            with pytest.raises(ResetNeeded):
                self.env.episodes.save(row)
            return multiple()
        return self.env.episodes.save(row), copy.deepcopy(self.rows[row]), self.mapped[row]

    @rule(saved=snapshots, row=st.integers(0, ROWS - 1))
    def restore(self, saved, row):
        snapshot, plain, self.mapped[row] = saved
        self.rows[row] = copy.deepcopy(plain)
        self.env.episodes.load(row, snapshot)
        self.seen = self.env.observe()
        tried["operations"] += 1

    @rule()
    def close(self):
        self.env.close()
        tried["operations"] += 1

    @invariant()
    def same_as_the_reference(self):
        for row, plain in enumerate(getattr(self, "rows", [])):
            if plain is not None:
                assert_same({key: value[row] for key, value in self.seen.items()}, plain.observation())


SingleMachine.TestCase.settings = examples(40, 900, steps=50 if LARGE else 25)
VectorMachine.TestCase.settings = examples(40, 900, steps=50 if LARGE else 25)


class TestSingleEnvironment(SingleMachine.TestCase):
    """Hypothesis runs the machine as a unittest."""


@pytest.mark.slow
class TestVectorEnvironment(VectorMachine.TestCase):
    """Hypothesis runs the machine as a unittest."""
