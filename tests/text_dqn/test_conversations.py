"""TextDQN in conversations: which tokens are its own, what it remembers, and values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import TABLE, TOKENS, Worth, letters

from agents.baselines.planning import PLANNING_AGENTS
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from textgen_env import Prompt, TableModel, TextGenVectorEnv
from textgen_env.config import OF_CONVERSATIONS
from textgen_env.conversation import Reply
from textgen_env.errors import ConfigError

KEYS = NEEDED_KEYS + OF_CONVERSATIONS
EXACT = {"q_net_kwargs": {"dropout": 0.0, "heads": 1, "width": 64}, "optimizer_kwargs": {"weight_decay": 0.0}}


def twice(conversation):
    """Say the agent's words again, and again."""
    return Reply(2 * conversation.last, reward=len(conversation.last))


def echoing(rows=4, **settings):
    given = {"top_k": 4, "max_turns": 3, "max_turn_tokens": 2, "max_new_tokens": 6, "max_reply_tokens": 8}
    given |= {"observation": KEYS, "partner": twice, **settings}
    return TextGenVectorEnv(rows, letters(0.9 * TABLE + 0.1 / 6), ["a", "b a"], Worth(), **given)


def agent_in(env, **settings):
    given = {"learning_starts": 0, "steps_per_update": 16, "buffer_size": 4_000, "seed": 0, "score": None}
    return TextDQN("CandidatePolicy", env, **{**given, **settings})


def randomised(agent):
    torch.manual_seed(0)
    for head in agent.q_net_target.heads:
        torch.nn.init.normal_(head.value.weight, std=0.3)
    return agent


@pytest.mark.slow
def test_a_token_that_ends_a_turn_ends_no_text_for_the_scorer():
    env = echoing(16, max_turns=6, max_turn_tokens=4, max_new_tokens=12)
    agent = agent_in(env, score="learned", steps_per_update=500).learn(1_200)
    batch, scorer = agent.replay_buffer.sample(200), agent.q_net.scorer
    assert agent.learner.scorer_r2 > 0.5
    steps = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
    score, candidates = scorer(batch.tokens, steps, batch.observations["candidates"].long())
    taken = candidates.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)
    goes_on = (batch.acted & ~batch.ended)[:, :-1] & batch.acted[:, 1:]
    assert (goes_on & (batch.tokens[:, :-1] == TOKENS.index("<end>"))).sum() > 20
    torch.testing.assert_close(taken[:, :-1][goes_on], score[:, 1:, 0][goes_on], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("score", [None, "learned"])
def test_values_of_single_states_are_those_of_whole_conversations(score):
    """The memory holds the agent's own tokens: picked out of the text when acting, one a step when learning."""
    env = echoing()
    agent = randomised(agent_in(env, score=score, policy_kwargs={"q_net_kwargs": {"heads": 2, "dropout": 0.0}}))
    network = agent.q_net_target
    if network.scorer is not None:  # a scorer that knows something: what tokens add, and when
        for buffer in (network.scorer.token, network.scorer.pair, network.scorer.potential):
            buffer.normal_()
    observation, _ = env.reset(seed=1)
    seen, tokens, rng = [], [], np.random.default_rng(0)
    for _ in range(4):
        actions = rng.integers(4, size=4)
        seen.append(observation)
        tokens.append(observation["candidates"][np.arange(4), actions])
        observation, _, ended, *_ = env.step(actions)
        assert not ended.any()
    assert seen[3]["speaker"].max() == 2
    stacked = {key: torch.from_numpy(np.stack([o[key] for o in seen], 1)) for key in seen[0]}
    own = torch.from_numpy(np.stack(tokens, 1)).long()

    with torch.no_grad():
        if network.scorer is not None:
            steps = torch.arange(4).expand(4, 4)
            scored = network.scorer(own, steps, stacked["candidates"].long())
            stacked |= dict(zip(("score", "candidate_scores"), scored, strict=True))
        episodes = network.episode_values(stacked, network.look_up(stacked["candidates"], own)).mean(0)
        single = [network({k: torch.from_numpy(v) for k, v in o.items()}) for o in seen]

    torch.testing.assert_close(episodes, torch.stack(single, 1), atol=1e-5, rtol=1e-5)


def test_the_replay_keeps_the_agent_s_tokens_and_the_rewards_of_its_turns():
    env = echoing(2, min_new_tokens=2)
    agent = agent_in(env, learning_starts=10_000)
    played = []
    step = env.episodes.act

    def noted(rows, actions):
        shown = env.episodes.proposals(rows).candidates
        outcome = step(rows, actions)
        played.append((shown[np.arange(len(rows)), outcome.actions], outcome.rewards, outcome.ended))
        return outcome

    env.episodes.act = noted
    agent.learn(12)  # six tokens a row: one conversation each

    batch = agent.replay_buffer.batch([(0, 0, 6), (1, 0, 6)])
    assert batch.acted.all()
    assert batch.ended.tolist() == [[False] * 5 + [True]] * 2
    tokens, rewards, _ = (np.stack(column, 1) for column in zip(*played, strict=True))
    assert batch.tokens.tolist() == tokens.tolist()
    np.testing.assert_allclose(batch.rewards, rewards)
    spoken = [["".join(TOKENS[i] for i in row[t : t + 2]) for t in (0, 2, 4)] for row in tokens]
    paid = [[float(len(said.replace("<end>", ""))) for said in row] for row in spoken]
    np.testing.assert_allclose(rewards[:, [1, 3]], np.array(paid)[:, :2])
    assert (rewards[:, [0, 2, 4]] == 0).all()
    np.testing.assert_allclose(batch.observations["budget"][..., 0], 1 - np.arange(6)[None] / 6 + np.zeros((2, 1)))
    assert batch.observations["turn"][0, :, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.observations["turn_budget"][0, :, 0].tolist() == [1.0, 0.5] * 3


# A secret, heads or tails. "?" asks for it and "!" does not; then a side is named. The right one is worth 1.
COIN = ("H", "T", "?", "!", ">", ".")
FIRST, SECOND = [0, 0, 0.3, 0.7, 0, 0], [0.5, 0.5, 0, 0, 0, 0]
BETA = 0.5


def toss(conversation):
    secret = conversation.metadata["secret"]
    if len(conversation.said) == 1:
        return Reply(secret if conversation.last == "?" else ".")
    return Reply("", reward=float(conversation.last == secret), done=True)


def coin(rows):
    model = TableModel(
        COIN,
        lambda ids: FIRST if len(ids) == 1 else SECOND,
        end=None,
        features=lambda ids: np.eye(6)[ids[-1]],
        hidden_size=6,
    )
    prompts = [Prompt(">", metadata={"secret": secret}) for secret in "HT"]
    turns = {"max_turns": 2, "max_turn_tokens": 1, "max_new_tokens": 2, "max_reply_tokens": 1, "reply_seconds": None}
    return TextGenVectorEnv(rows, model, prompts, None, toss, top_k=2, observation=KEYS, **turns)


@pytest.mark.slow
def test_q_learns_that_a_question_pays_in_the_next_turn():
    agent = agent_in(
        coin(16), beta=BETA, beta_start=2.0, tau=0.1, learning_rate=3e-3, target="retrace", policy_kwargs=EXACT
    )

    agent.learn(6_000)

    env = coin(2)
    start, _ = env.reset(seed=0, options={"prompt": [Prompt(">", metadata={"secret": s}) for s in "HT"]})
    knowing = BETA * np.log((np.exp(1 / BETA) + 1) / 2)  # one side is worth 1 and the other 0, both as likely
    asked, named = agent.learner.q(start)[:, [1, 0]].mean(0)  # "!" comes first: it is likelier
    assert asked == pytest.approx(knowing, abs=0.05)
    assert named == pytest.approx(0.5, abs=0.05)
    told, *_ = env.step(np.array([1, 1]))
    assert told["tokens"][:, 2].tolist() == [0, 1]  # the partner has told it
    np.testing.assert_allclose(agent.learner.q(told), np.eye(2), atol=0.05)


def test_an_agent_must_see_which_tokens_are_its_own():
    with pytest.raises(ConfigError, match="'speaker' among the keys"):
        agent_in(echoing(observation=NEEDED_KEYS))


@pytest.mark.slow
def test_a_stored_agent_of_conversations_goes_on_with_a_partner_and_not_without(tmp_path):
    env = echoing()
    agent = agent_in(env)
    agent.learn(200)
    agent.save(tmp_path / "agent.zip")
    loaded = TextDQN.load(tmp_path / "agent.zip", env)
    observation, _ = env.reset(seed=3)
    for _ in range(3):
        np.testing.assert_array_equal(loaded.probabilities(observation), agent.probabilities(observation))
        observation, *_ = env.step(np.zeros(4, int))
    assert loaded.task["partner"] == "twice"
    agent.save_pretrained(tmp_path / "folder")
    alone = TextDQN.from_pretrained(tmp_path / "folder", model=env.language_model)
    with pytest.raises(ConfigError, match="has learned conversations with partner 'twice', which is not stored"):
        alone.write(["a"])
    with pytest.raises(ConfigError, match="has learned conversations"):
        alone.logits_processor(None)


@pytest.mark.parametrize("name", sorted(PLANNING_AGENTS))
def test_agents_that_plan_do_not_ask_a_partner_in_advance(name):
    with pytest.raises(ConfigError, match="would ask the partner for its answers in advance"):
        PLANNING_AGENTS[name](echoing(), 0)
