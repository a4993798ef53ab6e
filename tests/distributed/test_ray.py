"""Actors write, one learner learns: on a Ray in this process, and on clusters of several nodes on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from stable_baselines3.common.callbacks import BaseCallback
from typer.testing import CliRunner
from weather import CONFIG as WEATHER
from weather import RUN_FILES, read_csv, weather

from agents.benchmark.cells import run_cell
from agents.benchmark.config import BenchmarkConfig
from agents.benchmark.grid import run_benchmark
from agents.cli.app import app
from agents.distributed.actors import OUTSTANDING, Collector, RayTextSource, store_bound
from agents.distributed.cells import RayCellRunner
from agents.distributed.connection import SMALLEST_STORE, check_versions, connected, import_ray, probe, versions
from agents.runs.checkpoint import newest_checkpoint
from agents.runs.config import RunConfig
from agents.runs.optimum import TextTree
from agents.runs.run import load_run, open_run, resume, train
from agents.text_dqn.replay import EpisodeReplay
from textgen_env.errors import ClusterError, ConfigError, ModelError, RewardError

ray = pytest.importorskip("ray")

CONFIG = replace(WEATHER, agent_settings={**WEATHER.agent_settings, "buffer_size": 4000}, eval_samples=50)
BENCHMARK = BenchmarkConfig(("Needle",), ("random", "sample"), seeds=(0, 1), steps=64, texts=8, evaluations=2)


def opened(config=CONFIG, **given):
    return open_run(config, **{"model": weather(), **given})


def collector(seed=1):
    actor = Collector()
    actor.open(CONFIG, {"model": weather()}, seed)
    return actor


def weights_of(agent):
    return {name: tensor.numpy() for name, tensor in agent.q_net_target.state_dict().items()}


def processes():
    """How many processes of Ray this machine has."""
    names = subprocess.run(["ps", "-eo", "comm,args"], capture_output=True, text=True).stdout.splitlines()
    return sum("raylet" in name or "gcs_server" in name or "ray::" in name for name in names)


# --- without Ray


def test_an_actor_sends_what_the_learner_would_have_stored_itself():
    actor, run = collector(), opened()
    run.agent.set_random_seed(1)  # the same texts
    run.agent.env.seed(1)

    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls <= 2 * actor.steps  # the step that it stops in is not stored

    run.agent.learning_starts = 10_000  # the actor has the weights of an untrained network
    run.agent.learner.beta_start = run.agent.beta
    run.agent.learn(10_000, Stop())
    actor.learner.beta_start = actor.learner.beta
    weights = weights_of(run.agent)
    batches = [actor.collect(0, weights, 0.0) for _ in range(2)]

    replay = run.agent.replay_buffer
    stored = {(e, *where) for e, ring in enumerate(replay.episodes) for where in ring}
    got = {name: [] for name in replay.store}
    for batch in batches:
        for name, array in batch.steps.items():
            got[name].append(np.split(array, np.cumsum(batch.lengths)[:-1]))
    assert sum(len(batch.lengths) for batch in batches) == len(stored) == 2 * CONFIG.envs
    for name, split in got.items():
        sent = sorted(episode.tobytes() for part in split for episode in part)
        kept = sorted(replay.store[name][e, first : first + length].tobytes() for e, first, length in stored)
        assert sent == kept, name


def test_episodes_survive_take_and_put_in_any_ring():
    actor, run = collector(), opened()
    batch = actor.collect(0, weights_of(run.agent), 0.0)
    assert len(batch.lengths) == len(batch.infos) >= CONFIG.envs  # a text has at most as many tokens as a batch steps
    assert [info["episode"]["l"] for info in batch.infos] == batch.lengths.tolist()
    replay = run.agent.replay_buffer
    for _ in range(250):  # more than the 500 steps of each ring
        replay.put(batch.steps, batch.lengths)
    assert replay.episodes_seen == 250 * len(batch.lengths)
    assert 3900 < replay.size() <= 4000
    tokens = [tuple(episode) for episode in np.split(batch.steps["token"], np.cumsum(batch.lengths)[:-1])]
    held = [(e, *where) for e, ring in enumerate(replay.episodes) for where in ring]
    together = replay.batch(held)
    for got, real in zip(together.tokens.numpy(), together.acted.numpy(), strict=True):
        assert tuple(got[real]) in tokens


def test_actors_with_different_seeds_write_different_texts():
    run = opened()
    first, same, other = (collector(seed).collect(0, weights_of(run.agent), 0.0).steps["token"] for seed in (1, 1, 2))
    assert first.tolist() == same.tolist()
    assert first.tolist() != other.tolist()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'textgen-env\[distributed\]'"):
        import_ray()


def test_an_address_that_does_not_answer_is_refused_in_time(tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"no Ray answers at {address} within 0.3 s"):
            probe(address, 0.3)
        assert time.monotonic() - started < 5
    with pytest.raises(ClusterError, match="no Ray answers"):  # closed by now
        train(CONFIG, tmp_path / "run", model=weather(), text_source=RayTextSource(1, address))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", [".a:1", "a" * 70 + ":1", "[::1]:1"])
def test_an_address_that_is_none_does_not_answer_either(address):
    with pytest.raises(ClusterError, match="no Ray answers"):
        probe(address, 1)


def test_a_port_is_written_in_ascii():
    with pytest.raises(ConfigError, match="HOST:PORT"):
        probe("127.0.0.1:²", 1)


def test_a_port_is_one_that_there_is():
    with pytest.raises(ConfigError, match="a port from 1 to 65535"):
        probe("127.0.0.1:99999", 1)


def test_a_server_that_is_no_ray_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer():
            connection, _ = other.accept()
            with connection:
                connection.recv(64)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ClusterError, match="is no Ray head"):
            probe(f"127.0.0.1:{other.getsockname()[1]}", 5)
        thread.join()


def test_other_versions_on_a_node_are_named():
    check_versions(versions(), versions(), "actor 0")
    with pytest.raises(ClusterError, match=r"actor 3 has torch 1\.0 instead of .*same versions on every node"):
        check_versions(versions() | {"torch": "1.0"}, versions(), "actor 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--actors", "2"], "--actors belong to a cluster: add --engine ray"),
        (["--engine", "rai"], "--engine must be local or ray, got 'rai'"),
        (
            ["--engine", "ray", "--address", "here"],
            "with a port from 1 to 65535, or 'auto'; got 'here'",
        ),
        (["--engine", "ray", "--agent", "ppo", "--steps", "64"], "text_dqn only, got agent 'ppo'"),
    ],
)
def test_wrong_options_are_refused_in_one_line(options, message, tmp_path):
    result = CliRunner().invoke(app, ["train", *options, "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_judge_of_prefixes_is_not_asked_by_actors():
    run = open_run(RunConfig(agent_settings={"score": "judge"}))
    with pytest.raises(ConfigError, match="score='judge' asks the reward about prefixes"), RayTextSource(1)(run, print):
        pass


def test_actors_are_counted():
    with pytest.raises(ConfigError, match="actors must be"):
        RayTextSource(0)


def test_the_head_travels_in_less_than_5_mb():
    run = open_run(RunConfig())  # the model in the box; a head does not depend on the vocabulary
    assert sum(array.nbytes for array in weights_of(run.agent).values()) < 5_000_000


def test_a_missing_model_is_an_error_of_the_caller():
    with pytest.raises(ModelError):
        Collector().open(replace(CONFIG, model="no-such-model", objects=()), {}, 0)


# --- a Ray in this process


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with two actors: its folder, its result, and what it said."""
    folder, said = tmp_path_factory.mktemp("runs") / "weather", []
    before = processes()
    engine = RayTextSource(2)

    def listening(run, say):
        return engine(run, said.append)

    result = train(CONFIG, folder, model=weather(), text_source=listening)
    assert not ray.is_initialized()
    deadline = time.monotonic() + 20
    while processes() > before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes() <= before
    return folder, result, said


@pytest.mark.slow
def test_a_ray_run_leaves_the_same_folder_and_ends_after_exactly_its_steps(run):
    folder, result, _ = run
    assert (result.finished, result.steps) == (True, 1500)
    assert sorted(path.name for path in folder.iterdir()) == RUN_FILES
    rows = read_csv(folder / "metrics.csv")
    assert float(rows[-1]["steps"]) == 1500
    assert float(rows[-1]["n_updates"]) == 1500 // 20
    assert float(rows[-1]["actors"]) == 2
    assert 0 <= float(rows[-1]["max_lag"])
    assert float(rows[-1]["bytes_per_step"]) >= EpisodeReplay.bytes_per_step(opened().agent.observation_space)
    assert RunConfig.from_json((folder / "config.json").read_text()).agent == "text_dqn"


@pytest.mark.slow
def test_the_local_and_the_ray_run_reach_the_same_score(run, tmp_path):
    train(CONFIG, tmp_path / "local", model=weather())
    values = []
    for folder in (run[0], tmp_path / "local"):
        loaded = load_run(folder, model=weather())
        trees = [TextTree(loaded.env, prompt) for prompt in loaded.test_prompts]
        agent = np.mean([tree.point(loaded.agent.probabilities(tree.observations)).reward for tree in trees])
        mu = np.mean([tree.point(np.exp(tree.log_mu)).reward for tree in trees])
        values.append(agent)
        assert agent > mu + 0.2  # exact expected rewards: no sampling noise in either
    assert values[0] == pytest.approx(values[1], abs=0.1)


@pytest.mark.slow
def test_a_benchmark_that_stops_ends_its_ray():
    cells = iter(RayCellRunner()(BENCHMARK, BENCHMARK.cells, 1))
    next(cells)
    cells.close()
    assert not ray.is_initialized()


# --- a cluster


@pytest.fixture(scope="module")
def head():
    """A head without cores for actors."""
    from ray.cluster_utils import Cluster

    settings = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **settings})
        yield cluster
        cluster.shutdown()


class Nodes:
    """What joins a head, and leaves it."""

    def __init__(self, head):
        self.head, self.address, self.joined = head, head.address, []

    def join(self, cores=1, **env):
        node = self.head.add_node(num_cpus=cores, env_vars=env, object_store_memory=80 * 2**20)
        self.joined.append(node)
        return node

    def kill(self, node):
        self.joined.remove(node)
        self.head.remove_node(node, allow_graceful=False)

    def leave(self):
        for node in self.joined:
            self.head.remove_node(node)


@pytest.fixture
def cluster(head):
    """A cluster whose nodes join in the test and leave after it."""
    nodes = Nodes(head)
    yield nodes
    ray.shutdown()
    nodes.leave()


@pytest.fixture
def started_ray(cluster):
    """A connection that the program has made: engines use it, one after the other, and leave it open."""
    cluster.join(cores=2)
    with connected(cluster.address, 2, 20.0, SMALLEST_STORE):
        yield


class Pause(BaseCallback):
    """A learner that stops for a while, once its actors are busy."""

    def __init__(self, pool, run):
        super().__init__()
        self.pool, self.bound, self.counts, self.used = pool, store_bound(run, 2), [], 0

    def _on_step(self):
        if not self.counts:  # the run lasts until both actors are up, and then a little
            self.model._total_timesteps = self.num_timesteps + 200
            if self.pool.writing < 2:
                time.sleep(0.2)  # leaves the cores to the actor that starts
        if len(self.pool.pending) == 2 * OUTSTANDING - 1 and not self.counts:
            ready = []
            deadline = time.monotonic() + 60
            while len(ready) < len(self.pool.pending) and time.monotonic() < deadline:
                ready, _ = ray.wait(list(self.pool.pending), num_returns=len(self.pool.pending), timeout=1)
            time.sleep(0.5)  # an actor that went on unasked would do so now
            self.used = sum(ray.get(request).nbytes for request in ready) + 3 * sum(
                array.nbytes for array in weights_of(self.model).values()
            )
            self.counts = [len(ready), len(self.pool.pending)]
        return self.num_timesteps < self.model._total_timesteps


@pytest.mark.slow
@pytest.mark.usefixtures("started_ray")
def test_a_learner_that_pauses_finds_a_bounded_number_of_batches_and_an_error_is_the_users():
    run = opened()
    said = []
    with RayTextSource(2)(run, said.append) as pool:
        pause = Pause(pool, run)
        run.agent.learn(10_000_000, pause)
        assert pause.counts == [2 * OUTSTANDING - 1] * 2  # all that was asked for, and no more
        assert 0 < pause.used < pause.bound
        assert run.agent.num_timesteps == run.agent._total_timesteps
        cores = len(os.sched_getaffinity(0))
        assert ("warning" in "".join(said)) == (cores < 2)
    assert run.agent.episode_source is None
    assert ray.is_initialized()

    def fails(completion):
        raise OSError("lost its nerve")

    broken = opened(replace(CONFIG, steps=400), reward=fails)
    with RayTextSource(1)(broken, said.append), pytest.raises(RewardError, match="lost its nerve"):
        broken.agent.learn(400)


@pytest.mark.slow
def test_a_killed_learner_goes_on_from_its_checkpoint(cluster, tmp_path):
    cluster.join()
    program = (
        "import test_ray as t\n"
        "from agents.distributed.actors import RayTextSource\n"
        "t.train(t.replace(t.CONFIG, steps=100_000, checkpoint_every=200), 'run', model=t.weather(), "
        f"text_source=RayTextSource(1, {cluster.address!r}))\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.path.join(root, "tests"), os.path.dirname(__file__)])}
    learner = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while newest_checkpoint(tmp_path / "run" / "checkpoints") is None and time.monotonic() < deadline:
        assert learner.poll() is None
        time.sleep(0.1)
    learner.send_signal(signal.SIGKILL)
    learner.wait()
    at = int(newest_checkpoint(tmp_path / "run" / "checkpoints").name)
    for path in (tmp_path / "run" / "config.json", *(tmp_path / "run" / "checkpoints").glob("*/state.json")):
        path.write_text(path.read_text().replace("100000", str(at + 300)))  # a run of that many steps
    result = resume(tmp_path / "run", model=weather(), text_source=RayTextSource(1, cluster.address))
    assert (result.finished, result.steps) == (True, at + 300)


class Plan(BaseCallback):
    """Does one thing after the other, each as soon as its condition holds, and keeps what was seen.

    Args:
        calm: Seconds for which the learner sleeps after each batch until the plan is done: actors start in the half of
            the time if it and those that write leave them the cores.
    """

    def __init__(self, pool, *parts, calm=0.0):
        super().__init__()
        self.pool, self.parts, self.seen, self.calm = pool, list(parts), [], calm

    def _on_rollout_start(self):
        if self.parts and self.parts[0][0](self.pool):
            self.seen.append((self.pool.writing, self.num_timesteps))
            self.parts.pop(0)[1]()

    def _on_step(self):
        # The run lasts until the plan is done, and then for some batches more.
        if self.parts:
            self.model._total_timesteps = self.num_timesteps + 200
            time.sleep(self.calm)
        return self.num_timesteps < self.model._total_timesteps


@pytest.mark.slow
def test_a_late_node_is_used_and_what_a_killed_one_was_writing_is_dropped_once(cluster):
    first = cluster.join()
    run, said = opened(), []
    with RayTextSource(2, cluster.address)(run, said.append) as pool:
        assert "warning: 2 actors, and 1 cores for them: the rest wait for nodes" in said
        plan = Plan(
            pool,
            (lambda pool: pool.writing == 1 and run.agent.num_timesteps > 0, cluster.join),
            (lambda pool: pool.writing == 2, lambda: cluster.kill(first)),
            (lambda pool: pool.replaced >= 1, cluster.join),
            (lambda pool: pool.writing == 2, lambda: None),
            calm=0.2,
        )
        run.agent.learn(10_000_000, plan)
        assert not plan.parts
        assert run.agent.num_timesteps == run.agent._total_timesteps  # exactly
        assert pool.dropped_episodes == CONFIG.envs  # once, even if Ray places the next actor on the dead node first
        assert sum("8 unfinished texts are dropped" in line for line in said) == 1


@pytest.mark.slow
def test_batches_of_a_slow_actor_are_old_and_what_is_too_old_is_not_learned_from(cluster):
    cluster.join()
    cluster.join(SLOW="0.05")

    def here(completion):
        import os
        import time

        time.sleep(float(os.environ.get("SLOW", "0")))
        return float("sun" in completion)

    run = opened(reward=here)
    engine = RayTextSource(2, cluster.address, publish_every=1, max_lag=4)
    with engine(run, lambda line: None) as pool:
        plan = Plan(pool, (lambda pool: pool.stale_steps > 0 and pool.steps > 1000, lambda: None))
        run.agent.learn(10_000_000, plan)
        assert pool.max_seen_lag <= 4
        assert pool.stale_steps > 0
        assert run.agent.num_timesteps == run.agent._total_timesteps == pool.steps


def in_this_process(config, cells, workers, started):
    yield from (run_cell(config, cell) for cell in cells)


@pytest.mark.slow
def test_a_benchmark_on_ray_has_the_rows_of_a_local_one_and_goes_on_where_it_stopped(cluster, tmp_path):
    cluster.join(cores=2)
    local = run_benchmark(BENCHMARK, tmp_path / "local", cell_runner=in_this_process)
    rays = run_benchmark(BENCHMARK, tmp_path / "ray", cell_runner=RayCellRunner(cluster.address))

    def plain(results):
        return json.dumps([[r.cell, r.status, [{**row, "seconds": 0} for row in r.rows]] for r in results])

    assert plain(rays) == plain(local)
    asked = []

    def none_left(config, cells, workers, started):
        asked.extend(cells)
        return iter(())

    assert plain(run_benchmark(BENCHMARK, tmp_path / "ray", cell_runner=none_left)) == plain(local)
    assert asked == []
