"""TextDQN: where it starts, what it converges to, and what SB3 users do with it."""

from __future__ import annotations

import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import PROMPTS, TABLE, TOKENS, Counted, RunningWorth, Worth, letters, worth

import textgen_env  # noqa: F401  (registers the environment)
from agents.baselines.one_step import LookaheadAgent, SampleAgent
from agents.baselines.values import LearnedValues
from agents.runs.optimum import TextTree
from agents.sb3_vec import SB3VecEnv
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.head import LAST_TOKENS, TOGETHER, CandidateHead, near_the_end
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.sources import Collected
from agents.text_dqn.targets import OBJECTIVES, soft_value
from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env import TableModel
from textgen_env.errors import ConfigError, ModelError, RewardError, UnknownName
from textgen_env.prompts import Prompt

SCORES = ("score", "candidate_scores")


def make(num_envs: int = 8, keys: tuple[str, ...] = NEEDED_KEYS, **settings):
    settings = {"model": letters(), "prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4} | settings
    return gym.make_vec("TextGen-v0", num_envs=num_envs, observation=keys, **settings)


def positions(ids: tuple[int, ...]) -> np.ndarray:
    """Hidden states that tell every text of up to four tokens apart: one-hot by position."""
    hidden = np.zeros((4, 3), np.float32)
    hidden[np.arange(len(ids)) % 4, ids] = 1.0
    return hidden.ravel()


SMALL = {
    "q_net_kwargs": {"dropout": 0.0, "heads": 1, "width": 64},
    "optimizer_kwargs": {"weight_decay": 0.0},
}


def small_agent(env, **kwargs) -> TextDQN:
    settings = {
        "beta": 0.5,
        "learning_starts": 0,
        "steps_per_update": 16,
        "unjudged": 0,
        "learning_rate": 3e-3,
        "buffer_size": 4_000,
        "policy_kwargs": {"q_net_kwargs": {"dropout": 0.0}, "optimizer_kwargs": {"weight_decay": 0.0}},
        "seed": 0,
    }
    return TextDQN("CandidatePolicy", env, **(settings | kwargs))


def randomised(agent: TextDQN) -> TextDQN:
    """Give the last layers weights, so that values depend on everything."""
    torch.manual_seed(0)
    for network in (agent.q_net, agent.q_net_target):
        for head in network.heads:
            torch.nn.init.normal_(head.value.weight, std=0.3)
    agent.q_net_target.load_state_dict(agent.q_net.state_dict())
    return agent


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_before_the_first_update_the_policy_is_the_language_model(top_p):
    env = make(top_p=top_p)
    observation, _ = env.reset(seed=0)
    expected = SampleAgent().probabilities(observation)
    np.testing.assert_allclose(small_agent(env).probabilities(observation), expected, atol=1e-6)


def test_before_the_first_update_the_policy_is_score_lookahead_where_scores_are_seen():
    env = make(keys=NEEDED_KEYS + SCORES)
    observation, _ = env.reset(seed=0)
    observation, *_ = env.step(np.zeros(8, np.int64))
    agent = small_agent(env, beta=0.3)
    np.testing.assert_allclose(
        agent.probabilities(observation), LookaheadAgent(beta=0.3).probabilities(observation), atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted({*OBJECTIVES} - {"peng"}))  # peng is biased, as its description says
def test_q_converges_to_the_exact_soft_values(target):
    """Three letters, three tokens, 13 prefixes that hidden states tell apart; the optimum is enumerated."""
    model = TableModel(["a", "b", "c"], [0.5, 0.3, 0.2], end=None, features=positions)
    env = make(
        32, model=model, prompts=["c"], top_k=3, max_new_tokens=3, reward=lambda text: float(text in {"bca", "aab"})
    )
    toy = TextTree(make(1, model=model, prompts=["c"], top_k=3, max_new_tokens=3, reward=env.episodes.reward), "c")
    values, exact = toy.soft_values(0.5)
    settings = {"beta_start": 2.0, "tau": 0.1, "policy_kwargs": SMALL}
    agent = small_agent(env, target=target, score=None, **settings)  # Q itself, beside no potential

    agent.learn(20_000 if target == "q_sharp" else 4_000)  # a distribution takes longer than its mean

    observations, _ = agent.policy.obs_to_tensor(toy.observations)
    with torch.no_grad():
        learned = agent.q_net_target(observations).double()
    if target == "residual":  # it fixes Q up to one number a state, which no policy depends on
        learned += torch.from_numpy(values)[:, None] - soft_value(torch.from_numpy(toy.log_mu), learned, 0.5)[:, None]
    assert np.abs(learned.numpy() - exact).max() < 0.06
    reached = toy.point(agent.probabilities(toy.observations))
    assert reached.reward - 0.5 * reached.kl == pytest.approx(values[0], abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("reward_at", ["end", "step"])
def test_running_scores_lead_to_the_same_optimum_however_they_are_paid(reward_at):
    settings = {"keys": NEEDED_KEYS + SCORES, "prompts": ["a"], "max_new_tokens": 3, "reward_at": reward_at}
    toy = TextTree(make(1, **settings), "a")
    start = toy.point(LookaheadAgent(beta=0.5).probabilities(toy.observations))
    best = toy.soft_values(0.5)[0][0]
    agent = small_agent(make(**settings), policy_kwargs=SMALL)

    agent.learn(3_000)

    reached = toy.point(agent.probabilities(toy.observations))
    gap = best - (reached.reward - 0.5 * reached.kl)
    assert gap < 0.25 * (best - (start.reward - 0.5 * start.kl))
    assert gap < 0.02


@pytest.mark.slow
def test_a_reward_on_a_token_that_greedy_decoding_never_takes_is_found():
    model = TableModel(["a", "b", "c"], [0.7, 0.25, 0.05], end=None)
    env = make(32, model=model, prompts=["a"], top_k=3, max_new_tokens=3, reward=lambda text: float(text == "bcb"))
    agent = small_agent(env, beta=0.05, beta_start=1.0, policy_kwargs=SMALL, steps_per_update=32)

    agent.learn(6_000)

    mean, _ = evaluate_policy(agent, agent.get_env(), n_eval_episodes=16, deterministic=True)
    assert mean == 1.0


def test_masked_candidates_are_never_chosen():
    env = make(top_p=0.5)  # on_illegal="raise": choosing one would end the test
    agent = randomised(small_agent(env))
    agent.learn(400)
    observation, _ = env.reset(seed=0)
    policy = agent.probabilities(observation)
    assert (policy[~env.action_masks()] == 0).all()
    assert not env.action_masks().all()


def test_values_of_single_states_are_those_of_whole_episodes():
    """The running memory is summed in two ways: from the prefix when acting, along the episode when learning."""
    env = make(keys=NEEDED_KEYS + SCORES)
    agent = randomised(small_agent(env, policy_kwargs={"q_net_kwargs": {"heads": 2, "dropout": 0.0}}))
    observation, _ = env.reset(seed=1)
    seen, tokens = [], []
    rng = np.random.default_rng(0)
    for _ in range(3):
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in env.action_masks()])
        seen.append(observation)
        tokens.append(observation["candidates"][np.arange(8), actions])
        observation, _, terminated, *_ = env.step(actions)
        rows = ~terminated
        if not rows.all():
            break
    stacked = {key: torch.from_numpy(np.stack([o[key] for o in seen], 1)) for key in seen[0]}

    with torch.no_grad():
        looked_up = agent.q_net_target.look_up(stacked["candidates"], torch.from_numpy(np.stack(tokens, 1)))
        episodes = agent.q_net_target.episode_values(stacked, looked_up).mean(0)
        single = [agent.q_net_target({k: torch.from_numpy(v) for k, v in o.items()}) for o in seen]

    assert len(seen) > 1
    torch.testing.assert_close(episodes, torch.stack(single, 1), atol=1e-5, rtol=1e-5)


def test_values_of_many_states_are_the_same_a_part_at_a_time():
    """Without gradients they are computed ``TOGETHER`` at a time."""
    head = CandidateHead(6, 5, dropout=0.0)
    torch.nn.init.normal_(head.value.weight)
    states = (9, 40)
    assert states[0] * states[1] > 2 * TOGETHER
    hidden, scalars, places = (torch.randn(*states, n) for n in (6, 1, len(LAST_TOKENS) - 1))
    candidates, candidate_scalars = torch.randn(*states, 3, 64), torch.randn(*states, 3, 1)
    given = (hidden, scalars, places, candidates, candidate_scalars, torch.randn(*states, 32), torch.randn(*states, 64))
    with torch.no_grad():
        parts = head(*given)
    torch.testing.assert_close(parts, head(*given).detach())


def test_the_last_tokens_have_weights_of_their_own_and_others_share_theirs():
    marks = LAST_TOKENS[:-1]
    np.testing.assert_array_equal(near_the_end(torch.tensor(marks).unsqueeze(-1)), np.eye(len(marks)))
    left = np.arange(1, 20)
    expected = [np.interp(left, LAST_TOKENS, row, right=0.0) for row in np.eye(len(LAST_TOKENS))[:-1]]
    np.testing.assert_allclose(
        near_the_end(torch.from_numpy(left).float().unsqueeze(-1)), np.transpose(expected), atol=1e-6
    )


@pytest.mark.slow
def test_each_row_draws_its_own_random_number():
    env = make(64, prompts=["a"])
    agent = small_agent(env)
    observation, _ = env.reset(seed=0)
    actions, _ = agent.predict(observation)
    counts = np.bincount(np.concatenate([agent.predict(observation)[0] for _ in range(100)]), minlength=4) / 6400
    assert len(set(actions.tolist())) > 1
    np.testing.assert_allclose(counts, agent.probabilities(observation)[0], atol=0.03)


def test_beta_can_be_changed_after_training():
    env = make()
    agent = randomised(small_agent(env))
    observation, _ = env.reset(seed=0)
    q = agent.q_net_target({k: torch.from_numpy(v) for k, v in observation.items()}).detach().numpy()
    for beta in (0.01, 0.7):
        agent.beta = beta
        tilted = np.exp(observation["logprobs"] + q / beta - (q / beta).max(-1, keepdims=True))
        np.testing.assert_allclose(
            agent.probabilities(observation), tilted / tilted.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6
        )
    with pytest.raises(ConfigError, match="beta must be a positive number"):
        agent.beta = 0.0


@pytest.mark.slow
def test_saved_agents_act_the_same_and_hold_no_language_model(tmp_path, tiny_lm):
    env = make(model=tiny_lm, prompts=["the film"])
    agent = randomised(small_agent(env))
    agent.learn(200)
    agent.save(tmp_path / "agent.zip")
    agent.save_replay_buffer(tmp_path / "replay.safetensors")

    loaded = TextDQN.load(tmp_path / "agent.zip", env=env)
    loaded.load_replay_buffer(tmp_path / "replay.safetensors")

    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(loaded.probabilities(observation), agent.probabilities(observation))
    assert loaded.replay_buffer.size() == agent.replay_buffer.size() > 0
    names = [name for name in agent.policy.state_dict() if "layers" in name or "lm_head" in name]
    assert names == []
    with zipfile.ZipFile(tmp_path / "agent.zip") as file:
        weights = torch.load(file.open("policy.pth"), weights_only=True)
    assert set(weights) == set(agent.policy.state_dict())


@pytest.mark.slow
def test_the_same_seed_learns_the_same_agent():
    def learned():
        agent = small_agent(make())
        agent.learn(400)
        return np.concatenate([p.detach().numpy().ravel() for p in agent.q_net.parameters()])

    np.testing.assert_array_equal(learned(), learned())


@pytest.mark.slow
@pytest.mark.parametrize("score", [None, "learned"])
@pytest.mark.parametrize("factor", [4.0**-5, 4.0**4])
def test_a_reward_in_other_units_is_learned_from_alike(score, factor):
    """Rewards and beta times a power of 4, which loses no digit: the same texts, and Q times as much."""
    values = []
    for unit in (1.0, factor):
        env = make(reward=lambda text, unit=unit: unit * (text.count("a") - 0.5 * text.count("b")))
        agent = small_agent(env, beta=0.5 * unit, score=score, policy_kwargs=SMALL).learn(800)
        observation, _ = env.reset(seed=3)
        values.append(agent.learner.q(observation) / unit)
    assert np.ptp(values[0], axis=1).min() > 0.1  # something was learned
    np.testing.assert_allclose(*values, rtol=0 if score is None else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["learned", "judge"])
def test_scores_that_are_learned_replace_those_that_the_environment_shows(score):
    """The agent acts, writes and values texts as one that is shown none; what the replay holds is the reward."""
    env = make(keys=NEEDED_KEYS + SCORES, reward=FromThreeQuarters())
    agent = small_agent(env, score=score, policy_kwargs=SMALL).learn(640)
    observation, _ = env.reset(seed=3)
    blind = {key: value for key, value in observation.items() if key not in SCORES}
    assert agent.learner.scorer_r2 > 0  # it has learned scores
    np.testing.assert_array_equal(agent.probabilities(observation), agent.probabilities(blind))
    np.testing.assert_array_equal(agent.learner.q(observation), agent.learner.q(blind))
    assert not set(SCORES) & set(LearnedValues(agent, env).needs)
    texts = agent.replay_buffer.texts()
    ids = [tokens[:length] for tokens, length in zip(texts.tokens.tolist(), texts.lengths, strict=True)]
    expected = [worth(letters().decode(text)) + 0.75 for text in ids]
    np.testing.assert_allclose(texts.rewards, expected, atol=1e-6)


class FromThreeQuarters(Worth):
    """A reward whose running score begins above 0."""

    def __call__(self, generations):
        return super().__call__(generations) + 0.75

    def running(self):
        return RunningFromThreeQuarters()


class RunningFromThreeQuarters(RunningWorth):
    def start(self, prompt, reference, metadata):
        return Counted("", 0.75)


def test_a_callback_that_stops_leaves_the_texts_whole():
    """The next ``learn`` goes on in the middle of the text, and nothing is lost or glued together."""
    endless = TableModel(["a", "b", "c"], [0.5, 0.3, 0.2], end=None)
    env = make(4, max_new_tokens=5, model=endless, prompts=["c"], top_k=3)
    agent = small_agent(env, learning_starts=10**6)
    agent.learn(10_000, StopsAt(28), reset_num_timesteps=True)
    assert (agent.num_timesteps, agent.learner.steps) == (28, 28)
    agent.learn(32, reset_num_timesteps=False)
    assert (agent.num_timesteps, agent.learner.steps) == (60, 60)
    for episodes in agent.replay_buffer.episodes:
        assert list(episodes) == [(0, 5), (5, 5), (10, 5)]
    texts = agent.replay_buffer.texts()
    assert texts.rewards.tolist() == [worth(endless.decode(ids)) for ids in texts.tokens.tolist()]


class StopsAt(BaseCallback):
    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def _on_step(self):
        return self.num_timesteps < self.steps


def test_texts_from_elsewhere_are_counted():
    """As SB3 counts those of an environment: a checkpoint says how many there were."""
    env = make()
    source = small_agent(env, learning_starts=10**6).learn(80).replay_buffer

    class Elsewhere:
        def collect(self, learner, logger, progress, steps_left):
            steps, lengths = source.take()
            return Collected(steps, lengths, [{"episode": {"r": 0.0, "l": 1}}] * len(lengths), int(lengths.sum()))

    agent = small_agent(env, learning_starts=10**6)
    agent.episode_source = Elsewhere()
    agent.learn(1)
    assert agent._episode_num == agent.replay_buffer.episodes_seen > 10


def test_a_temperature_that_cannot_be_chosen_stays_what_it_was():
    env = make()
    agent = small_agent(env)

    def broken(text):
        raise ValueError("no quota left")

    with pytest.raises(RewardError):
        agent.choose_beta(make(reward=broken), texts=16)
    assert agent.beta == 0.5
    single = gym.make("TextGen-v0", model=letters(), prompts=PROMPTS, reward=Worth(), top_k=4, observation="full")
    with pytest.raises(ConfigError, match=r"give it gym.make_vec\(.*got TextGenEnv"):
        agent.choose_beta(single)
    with pytest.raises(ConfigError, match="lacks hidden, which the agent was trained with"):
        agent.choose_beta(make(keys=tuple(key for key in NEEDED_KEYS if key != "hidden")))
    with pytest.raises(ConfigError, match="particles must be a whole number"):
        agent.write(["a"], particles=0)
    chosen = agent.choose_beta(env, texts=20, prompts=[Prompt(text) for text in PROMPTS[:3]])
    assert chosen.texts == 21  # seven for each prompt
    assert agent.choose_beta(env, texts=1, prompts=[Prompt("a")]).beta in (
        0.5,
        LANGUAGE_MODEL,
    )  # one text is no evidence


def test_an_agent_meets_only_environments_of_its_own_sizes_and_model(tmp_path):
    agent = small_agent(make())
    agent.save(tmp_path / "agent.zip")
    agent.save_pretrained(tmp_path / "agent")
    other = TableModel([*"cba", *TOKENS[3:]], TABLE)
    shorter = {"max_new_tokens": 3, "max_prompt_tokens": 1 + make().unwrapped.episodes.config.max_prompt_tokens}
    for settings, said in (
        ({"top_k": 3}, "trained with top_k=4, the environment has 3: make it with top_k=4"),
        ({"max_new_tokens": 3}, "trained with max_new_tokens=4, the environment has 3"),
        (shorter, "trained with max_new_tokens=4, the environment has 3"),  # spaces of the same shape
        ({"max_prompt_tokens": 3}, "does not fit the environment. Observation spaces do not match"),
        ({"model": other}, "has another vocabulary"),
    ):
        env = make(**settings)
        for meet in (
            agent.set_env,
            lambda env: TextDQN.load(tmp_path / "agent.zip", env),
            lambda env: TextDQN.from_pretrained(tmp_path / "agent", env),
        ):
            with pytest.raises((ConfigError, ModelError), match=said):
                meet(env)
    agent.set_env(make())
    assert agent.learn(16).num_timesteps == 16


def test_what_load_is_given_is_set_or_refused(tmp_path):
    small_agent(make()).save(tmp_path / "agent.zip")
    loaded = TextDQN.load(tmp_path / "agent.zip", make(), verbose=1, tensorboard_log=str(tmp_path), batch_size=3)
    assert (loaded.verbose, loaded.tensorboard_log, loaded.learner.batch_size) == (1, str(tmp_path), 3)
    with pytest.raises(ConfigError, match="has no settings batchsize, colour"):
        TextDQN.load(tmp_path / "agent.zip", make(), batchsize=3, colour="red")
    loaded.env = None  # as after ``load(path)``
    with pytest.raises(ConfigError, match=r"no environment to learn in: use load\(path, env=env\)"):
        loaded.learn(8)


@pytest.mark.slow
def test_single_environments_and_their_lists_are_taken_as_by_sb3():
    def one():
        return gym.make("TextGen-v0", model=letters(), prompts=PROMPTS, reward=Worth(), top_k=4, observation="full")

    check_env(one())
    agent = small_agent(DummyVecEnv([one, one]))
    agent.learn(100)
    assert small_agent(one()).learn(40).num_timesteps == 40
    observation, _ = one().reset(seed=0)
    assert agent.probabilities(observation).shape == (4,)
    action, _ = agent.predict(observation)
    assert action.shape == ()


def test_an_outside_time_limit_is_not_taken_for_the_end():
    def limited():
        env = gym.make("TextGen-v0", model=letters(), prompts=PROMPTS, reward=Worth(), top_k=4, observation="full")
        return gym.wrappers.TimeLimit(env, 2)

    agent = small_agent(limited())
    agent.learn(60)
    batch = agent.replay_buffer.sample(64)
    cut = ~batch.ended.any(-1)
    assert cut.any()
    assert (batch.acted[cut].sum(-1) == 2).all()


def test_what_cannot_work_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"lacks hidden.*observation='full'"):
        small_agent(make(keys=tuple(key for key in NEEDED_KEYS if key != "hidden")))
    with pytest.raises(UnknownName, match="Did you mean 'retrace'"):
        small_agent(make(), target="retraec")
    with pytest.raises(ConfigError, match="gamma must be 1"):
        small_agent(make(keys=NEEDED_KEYS + SCORES), gamma=0.99)
    for target in ("residual", "q_sharp"):
        with pytest.raises(ConfigError, match=rf"target='{target}' needs gamma=1, got 0.9"):
            small_agent(make(), target=target, gamma=0.9)
    with pytest.raises(ConfigError, match="steps_per_update"):
        small_agent(make(), steps_per_update=0)
    with pytest.raises(ConfigError, match="needs an environment"):
        TextDQN("CandidatePolicy", None)


def test_settings_of_one_s_own_serve_several_agents():
    mine = {"q_net_kwargs": {"heads": 1}}
    three = make(1, model=TableModel(["a", "b", "c"], [0.5, 0.3, 0.2], end=None), prompts=["c"], top_k=3)
    agents = [small_agent(env, policy_kwargs=mine) for env in (three, make(1))]
    assert [agent.q_net.heads[0].embed.in_features for agent in agents] == [3, 6]
    assert mine == {"q_net_kwargs": {"heads": 1}}


def test_an_agent_of_another_vocabulary_is_refused(tmp_path, tiny_lm):
    small_agent(make(model=tiny_lm, prompts=["the film"])).save(tmp_path / "agent.zip")
    with pytest.raises(ModelError, match="another vocabulary"):
        TextDQN.load(tmp_path / "agent.zip", env=make())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:rich is experimental")  # tqdm says so of the bar that SB3 shows
def test_callbacks_progress_bar_and_tensorboard_work_as_sb3_users_expect(tmp_path):
    agent = small_agent(make(), tensorboard_log=str(tmp_path / "logs"), learning_starts=64)
    evaluation = EvalCallback(
        SB3VecEnv(make(4)), n_eval_episodes=8, eval_freq=40, log_path=str(tmp_path), best_model_save_path=str(tmp_path)
    )
    checkpoints = CheckpointCallback(40, str(tmp_path), name_prefix="agent")

    agent.learn(640, callback=[evaluation, checkpoints], log_interval=4, progress_bar=True)

    assert agent.num_timesteps == 640
    with np.load(tmp_path / "evaluations.npz") as found:
        assert found["timesteps"].tolist() == [320, 640]
        assert found["results"].shape == (2, 8)
    assert {path.name for path in tmp_path.glob("*.zip")} == {
        "best_model.zip",
        "agent_320_steps.zip",
        "agent_640_steps.zip",
    }
    assert TextDQN.load(tmp_path / "agent_640_steps.zip", env=make()).num_timesteps == 640
    events = EventAccumulator(str(next((tmp_path / "logs").iterdir()))).Reload()
    assert {"rollout/ep_rew_mean", "train/loss", "eval/mean_reward"} <= set(events.Tags()["scalars"])
