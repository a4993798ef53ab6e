"""The same run on a Ray cluster: actors write, one learner learns.

    actor (N of them)                                      learner (this process)
    environment, language model,    -- episodes, as -->    EpisodeReplay, updates, checkpoints,
    a copy of the slow network         replay rows         evaluation
                                    <-- weights, a --
                                        version, beta

The learner is the ordinary ``TextDQN.learn`` of a run; only where its texts come from is another.
It asks each actor for a batch with the newest weights, and has at most ``OUTSTANDING`` such requests
with it: that bounds memory and staleness alike, since an actor that nobody asks waits. Ray is
imported when an engine starts; without the extra ``[distributed]`` everything else works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.logger import Logger

from agents.distributed.connection import SMALLEST_STORE, check_versions, connected, versions
from agents.runs.config import RunConfig
from agents.runs.run import Run, open_run
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.learner import Learner
from agents.text_dqn.replay import EpisodeReplay
from agents.text_dqn.sources import Collected, add_step
from agents.user_code import send_by_value
from textgen_env.config import check_at_least
from textgen_env.errors import ClusterError, ConfigError
from textgen_env.models.device import own_cores

Array = npt.NDArray[Any]


OUTSTANDING = 2
"""Batches that the learner asks an actor for at a time: it writes one while the other travels."""


LAG_FACTOR = 4
"""A batch is stale when the network was updated so many times as often as usual since it was asked for."""


DEATHS = 3
"""Deaths for each actor, without a single batch in between, after which a run gives up."""


POLL = 1.0
"""Seconds to wait for a batch before looking whether the run should stop."""


# --- what an actor does: plain Python, without Ray


@dataclass(frozen=True)
class WrittenTexts:
    """Whole episodes, as ``EpisodeReplay.take`` hands them over, and what is known of them."""

    steps: dict[str, Array]  # (S, ...) a name
    lengths: npt.NDArray[np.int64]  # (E,)
    infos: list[dict[str, Any]]  # E dicts with SB3's "episode", and "reward_parts"
    version: int  # of the weights that acted
    kl: float  # nats a token, behaviour against language model

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, which is nearly all that travels."""
        return sum(array.nbytes for array in self.steps.values()) + self.lengths.nbytes


class Collector:
    """Writes texts with the weights that it is given."""

    def open(self, config: RunConfig, given: Mapping[str, Any], seed: int) -> dict[str, str]:
        """Open the run's environment and agent here; return the versions of what they run on.

        The agent's replay only has to hold what is written between two batches.
        """
        torch.set_num_threads(1)  # actors share the cores already
        self.steps = config.env_config().max_new_tokens
        settings = {**config.agent_settings, "buffer_size": config.envs * rows_in_actor(config)}
        run = open_run(replace(config, agent_settings=settings), **given)
        assert isinstance(run.agent, TextDQN)
        assert run.agent.env is not None
        self.learner, self.env, self.version = run.agent.learner, run.agent.env, -1
        run.agent.set_random_seed(seed)
        self.observation: Any = self.env.reset()
        return versions()

    def collect(self, version: int, weights: Mapping[str, Array], progress: float) -> WrittenTexts:
        """Take as many steps as the longest text has, and return the texts that have ended meanwhile."""
        learner = self.learner
        if version != self.version:
            learner.slow_network.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
            self.version = version
        ended: list[list[dict[str, Any]]] = [[] for _ in range(self.env.num_envs)]
        kl = []
        for _ in range(self.steps):
            acted = learner.act(self.observation, progress)
            kl.append(acted.kl)
            new_obs, rewards, dones, infos = self.env.step(acted.actions)
            add_step(learner, self.observation, new_obs, acted, rewards, dones, infos)
            self.observation = new_obs
            for row in np.flatnonzero(dones):
                ended[row].append({name: infos[row][name] for name in ("episode", "reward_parts")})
        steps, lengths = learner.replay.take()
        return WrittenTexts(steps, lengths, [info for row in ended for info in row], version, float(np.mean(kl)))


def rows_in_actor(config: RunConfig) -> int:
    """Return the steps that each environment of an actor can have open or finished at a time."""
    return 2 * config.env_config().max_new_tokens + 2


# --- what the learner sees of them


@dataclass(frozen=True)
class RayTextSource:
    """Collects the texts of a run with Ray actors; to be given to ``agents.runs.run.train``.

    Args:
        actors: How many write at a time, each on a core of its own, ``RunConfig.envs`` texts each.
        address: ``HOST:PORT`` of the head of a cluster, or ``"auto"`` for the one that this machine
            is part of. None: Ray starts in this process and ends with it, unless the program has
            started it already.
        timeout: Seconds that the cluster has to answer.
        patience: Seconds without a batch from any actor after which the run gives up.
        publish_every: Updates from one version of the weights to the next.
        max_lag: Updates after which a batch is too old to learn from. None: ``LAG_FACTOR`` times
            what batches of actors that are equally fast see.

    Raises:
        ConfigError: a number out of range.
    """

    actors: int = 2
    address: str | None = None
    timeout: float = 20.0
    patience: float = 600.0
    publish_every: int = 20
    max_lag: int | None = None

    def __post_init__(self) -> None:
        check_at_least("actors", self.actors, 1)
        check_at_least("publish_every", self.publish_every, 1)
        if self.max_lag is not None:
            check_at_least("max_lag", self.max_lag, 0)

    @contextmanager
    def __call__(self, run: Run, say: Callable[[str], None]) -> Iterator[ActorPool]:
        """Let actors write what ``run.agent`` learns from, until the context ends.

        Raises:
            ConfigError: no Ray, an agent that cannot learn so, or objects that cannot travel.
            ClusterError: no cluster answers, or it has other versions.
        """
        if not isinstance(run.agent, TextDQN):
            raise ConfigError(f"actors write for text_dqn only, got agent {run.config.agent!r}: use --engine local")
        if run.agent.settings["score"] == "judge":
            raise ConfigError(
                "score='judge' asks the reward about prefixes while it acts, and actors do not: use --engine local, or "
                "score='learned'"
            )
        store = max(SMALLEST_STORE, 2 * store_bound(run, self.actors))
        with connected(self.address, self.actors, self.timeout, store) as ray:
            pool = ActorPool(ray, self, run, say)
            run.agent.episode_source = pool
            try:
                yield pool
            finally:
                run.agent.episode_source = None
                pool.close()


def store_bound(run: Run, actors: int) -> int:
    """Return the most bytes that a run has in the object store: batches not learned from yet, and weights."""
    assert isinstance(run.agent, TextDQN)
    learner = run.agent.learner
    batch = run.config.envs * rows_in_actor(run.config) * EpisodeReplay.bytes_per_step(learner.replay.observation_space)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in learner.slow_network.state_dict().values())
    return actors * OUTSTANDING * (batch + weights) + weights


@dataclass
class Actor:
    """A process that writes, as the pool sees it."""

    number: int
    handle: Any
    opened: bool = False


class ActorPool:
    """An ``EpisodeSource``: keeps N actors busy, and gives one of their batches at a time.

    An actor that dies is replaced by one with a seed of its own; the texts that it was writing are
    dropped, and counted. Actors for which the cluster has no core yet start when a node joins.
    """

    def __init__(self, ray: Any, engine: RayTextSource, run: Run, say: Callable[[str], None]) -> None:
        assert isinstance(run.agent, TextDQN)
        self._ray, self._engine, self._say = ray, engine, say
        self._envs = run.config.envs
        self._seeds = np.random.SeedSequence([run.config.seed, run.agent.num_timesteps])  # a resumed run draws anew
        batch = self._envs * run.config.env_config().max_new_tokens
        usual = engine.actors * OUTSTANDING * max(batch * run.agent.learner.updates_per_step, engine.publish_every)
        self.max_lag = int(LAG_FACTOR * usual) if engine.max_lag is None else engine.max_lag
        self.replaced = self.dropped_episodes = self.stale_steps = self.max_seen_lag = self.steps = 0
        self._weights: tuple[int, Any] | None = None
        self._deaths = 0  # since the last batch
        self._waited, self._started, self._last_batch = 0.0, time.perf_counter(), time.monotonic()
        send_by_value(ray)
        try:
            self._task = ray.put((run.config, dict(run.given)))
        except TypeError as error:
            raise ConfigError(
                f"model, prompts, reward and partner must be such that pickle can send them: {error}"
            ) from error
        self._class = ray.remote(num_cpus=1, max_restarts=0)(_RayCollector)
        self.pending: dict[Any, Actor] = {}  # request to the actor that was asked
        self.actors = [self._start(number) for number in range(engine.actors)]
        cores = int(ray.cluster_resources().get("CPU", 0))
        if engine.actors > cores or (engine.address is None and engine.actors > own_cores()):
            have, what = (cores, "the rest wait for nodes") if engine.actors > cores else (own_cores(), "they share")
            say(f"warning: {engine.actors} actors, and {have} cores for them: {what}")

    def _start(self, number: int) -> Actor:
        actor = Actor(number, self._class.remote())
        seed = int(self._seeds.spawn(1)[0].generate_state(1)[0])
        self.pending[actor.handle.open.remote(self._task, seed)] = actor
        return actor

    @property
    def writing(self) -> int:
        """How many actors are up."""
        return sum(actor.opened for actor in self.actors)

    def close(self) -> None:
        """End the actors and forget what they were asked for."""
        for actor in self.actors:
            self._ray.kill(actor.handle)
        self.pending.clear()
        self.actors.clear()
        self._weights = None

    # --- what ``TextDQN.learn`` calls

    def collect(self, learner: Learner, logger: Logger, progress: float, steps_left: int) -> Collected | None:
        """Return the next batch; after ``POLL`` seconds without one, None.

        The last batch is cut so that the run has exactly the steps it was to have: a text that would
        go beyond counts with the steps that were left, and is not learned from.
        """
        self._publish(learner)
        for actor in self.actors:
            if actor.opened:
                self.ask(actor, progress)
        batch = self.next_batch()
        if batch is None or self._is_stale(batch, learner, logger):
            return None
        whole = int(np.searchsorted(np.cumsum(batch.lengths), steps_left, side="right"))
        counted = min(steps_left, int(batch.lengths.sum()))
        self._record(logger, batch, counted)
        if counted == steps_left:
            self.close()  # what follows is measuring, and needs the cores
        return Collected(batch.steps, batch.lengths[:whole], batch.infos[:whole], counted)

    def _publish(self, learner: Learner) -> None:
        if self._weights is None or learner.updates - self._weights[0] >= self._engine.publish_every:
            state = {name: tensor.cpu().numpy() for name, tensor in learner.slow_network.state_dict().items()}
            self._weights = learner.updates, self._ray.put(state)

    def ask(self, actor: Actor, progress: float) -> None:
        """Have the actor write until ``OUTSTANDING`` of its batches are asked for."""
        assert self._weights is not None
        version, weights = self._weights
        for _ in range(OUTSTANDING - sum(other is actor for other in self.pending.values())):
            self.pending[actor.handle.collect.remote(version, weights, progress)] = actor

    def next_batch(self) -> WrittenTexts | None:
        """Return the batch that has been ready for longest, if one comes in time."""
        since = time.perf_counter()
        ready, _ = self._ray.wait(list(self.pending), num_returns=1, timeout=POLL)
        self._waited += time.perf_counter() - since
        if not ready:
            if time.monotonic() - self._last_batch > self._engine.patience:
                raise ClusterError(
                    f"no actor has sent anything for {self._engine.patience:.0f} s; {self.writing} of "
                    f"{self._engine.actors} are up. Does the cluster have free cores?"
                )
            return None
        actor = self.pending.pop(ready[0])
        errors = self._ray.exceptions
        try:
            answer = self._ray.get(ready[0])
        except errors.RayTaskError as error:
            if isinstance(error.cause, Exception) and not isinstance(error.cause, errors.RayError):
                raise error.cause from error  # what the local engine would have raised
            self._replace(actor, error)
            return None
        except errors.RayError as error:
            self._replace(actor, error)
            return None
        if isinstance(answer, WrittenTexts):
            self._deaths, self._last_batch = 0, time.monotonic()
            return answer
        check_versions(answer, versions(), f"actor {actor.number}")
        actor.opened = True
        return None

    def _replace(self, actor: Actor, error: Exception) -> None:
        self._ray.kill(actor.handle)
        self.pending = {request: other for request, other in self.pending.items() if other is not actor}
        self._deaths += 1
        if self._deaths >= DEATHS * self._engine.actors:
            raise ClusterError(
                f"actors died {self._deaths} times without sending anything, the last one so: {error}. Is there enough "
                "memory for a language model in each?"
            )
        lost = self._envs if actor.opened else 0
        self.replaced += 1
        self.dropped_episodes += lost
        self._say(f"actor {actor.number} died ({type(error).__name__}): replaced; {lost} unfinished texts are dropped")
        self.actors[actor.number] = self._start(actor.number)

    def _is_stale(self, batch: WrittenTexts, learner: Learner, logger: Logger) -> bool:
        lag = learner.updates - batch.version
        if lag > self.max_lag:
            self.stale_steps += int(batch.lengths.sum())
            return True
        self.max_seen_lag = max(self.max_seen_lag, lag)
        logger.record_mean("ray/lag", lag)
        return False

    def _record(self, logger: Logger, batch: WrittenTexts, steps: int) -> None:
        self.steps += steps
        logger.record_mean("rollout/kl_per_token", batch.kl)
        logger.record("ray/max_lag", self.max_seen_lag)
        logger.record("ray/actors", self.writing)
        logger.record("ray/replaced", self.replaced)
        logger.record("ray/dropped_episodes", self.dropped_episodes)
        logger.record("ray/stale_steps", self.stale_steps)
        logger.record_mean("ray/bytes_per_step", batch.nbytes / max(1, int(batch.lengths.sum())))
        logger.record("ray/learner_waited", self._waited / (time.perf_counter() - self._started))


class _RayCollector(Collector):
    """Takes configuration and objects as one reference, so that each node fetches them once."""

    def open(self, task: tuple[RunConfig, Mapping[str, Any]], seed: int) -> dict[str, str]:  # type: ignore[override]
        return super().open(*task, seed)
