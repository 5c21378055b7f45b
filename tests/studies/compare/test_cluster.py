"""compare on a Ray cluster: the same numbers, whoever is killed meanwhile; and what is refused."""

import os
import signal
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from compare_files import compare, numbers_in, write_config
from safetensors.torch import load_file

from distill_lightning import InputError, KDModule, SupervisedModule
from distill_lightning.callbacks import RunKeeper
from distill_lightning.studies.compare import cluster, cluster_task
from distill_lightning.studies.compare.config import parse_config
from distill_lightning.studies.compare.experiment import Experiment

pytestmark = pytest.mark.usefixtures("undrawn")

SPARED = "spared"


class Killed:
    """In the middle of the second epoch, the processes of one teacher and of one student are killed, once each."""

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        folder = next(item for item in self.trainer.callbacks if isinstance(item, RunKeeper)).folder
        if batch_idx == 0:
            with (folder / "epochs.txt").open("a") as file:
                file.write(f"{os.getpid()} {self.current_epoch}\n")
        is_teacher = folder.name == "teacher_1"
        is_one = is_teacher or folder.parts[-2:] == ("kd", "seed_1")
        spared = folder.parents[2 if is_teacher else 3] / SPARED
        killed = folder / "killed"
        if is_one and (self.current_epoch, batch_idx) == (1, 1) and not (spared.exists() or killed.exists()):
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KilledSupervised(Killed, SupervisedModule):
    pass


class KilledKD(Killed, KDModule):
    pass


CONFIG = {
    "data": {
        "class_path": "DigitsDataModule",
        "init_args": {"subset": 128, "batch_size": 32, "val_size": 100, "test_size": 200, "image_size": 8},
    },
    "teachers": {"network": {"class_path": "SmallResNet", "init_args": {"width": 2}}, "number": 1},
    "student": {"class_path": "SmallResNet", "init_args": {"width": 2}},
    "supervised": {"class_path": f"{__name__}.KilledSupervised"},
    "methods": {"kd": {"class_path": f"{__name__}.KilledKD"}},
    "epochs": 3,
    "seeds": [0, 1],
    "teachers_store": None,
    "threads_per_run": 1,
    "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
    "accelerator": "cpu",
}  # fmt: skip


def weights_in(folder):
    paths = sorted((folder / "out/runs").glob("**/student.safetensors"))
    return {path.relative_to(folder): load_file(path) for path in paths}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One run after the other, in this process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / SPARED).touch()
    compare(write_config(CONFIG, folder), folder / "out")
    return folder


@pytest.fixture(scope="module")
def address():
    """Of a cluster of two machines, as far as Ray can tell, with a CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    own = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would let everything else on the machine go before its workers.
        patch.setenv("RAY_worker_niceness", "0")
        ray_cluster = Cluster(initialize_head=True, head_node_args={**own, "include_dashboard": False})
        try:
            ray_cluster.add_node(**own)
            ray_cluster.wait_for_nodes()
            yield ray_cluster.address
        finally:
            ray_cluster.shutdown()


@pytest.mark.slow
def test_killed_workers_leave_the_undisturbed_table(undisturbed, address, tmp_path):
    import ray

    shown = compare(write_config(CONFIG, tmp_path), tmp_path / "out", "--ray", address)
    assert not ray.is_initialized()
    # Once each; the students who wait for the teacher are not at fault.
    for title in ("teacher_1", "kd, seed 1"):
        assert shown.count(f"{title}: its worker was lost; it is tried again") == 1
    assert shown.count("tried again") == 2
    for name in ("teacher_1", "kd/seed_1"):
        lines = (tmp_path / "out/runs" / name / "epochs.txt").read_text().split()
        assert [int(epoch) for epoch in lines[1::2]] == [0, 1, 1, 2], "it went on from its checkpoint"
        assert list(Counter(lines[::2]).values()) == [2, 2], "in another process"
    assert numbers_in(tmp_path / "out/results.csv") == numbers_in(undisturbed / "out/results.csv")
    ours, theirs = weights_in(tmp_path), weights_in(undisturbed)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 5
    for path, weights in ours.items():
        assert all(torch.equal(value, theirs[path][name]) for name, value in weights.items()), path


@pytest.mark.slow
def test_a_cluster_of_the_callers_own_is_used_and_kept(undisturbed, address, tmp_path):
    import ray

    (tmp_path / SPARED).touch()
    alone = write_config({**CONFIG, "methods": {}, "teachers": {}, "seeds": [0]}, tmp_path)
    ray.init(address, log_to_driver=False)
    try:
        compare(alone, tmp_path / "out", "--ray", "auto")
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    ours, theirs = numbers_in(tmp_path / "out/results.csv"), numbers_in(undisturbed / "out/results.csv")
    assert [row["nll"] for row in ours] == [row["nll"] for row in theirs if row["method"] == "alone"][:1]


def node(cpus, gpus=0, *, is_alive=True):
    return {"Alive": is_alive, "Resources": {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})}


@pytest.mark.parametrize(
    ("accelerator", "nodes", "gpus"),
    [
        ("auto", [node(4)], 0),
        ("auto", [node(8), node(2, 4)], 1),
        ("cuda", [node(2, 1)], 1),
        ("cpu", [node(2, 4)], 0),
        ("auto", [node(2), node(8, 8, is_alive=False)], 0),
    ],
)
def test_a_run_has_its_threads_and_a_gpu_where_there_are_any(accelerator, nodes, gpus):
    assert cluster.needs_of_a_run(accelerator, 2, nodes) == {"num_cpus": 2, "num_gpus": gpus}


@pytest.mark.parametrize("nodes", [[node(1), node(1)], [node(8), node(1, 1)], [node(8, is_alive=False)], []])
def test_what_no_machine_has_is_not_waited_for(nodes):
    with pytest.raises(InputError, match="a run has 2 threads.* no machine of the cluster that much, at most"):
        cluster.needs_of_a_run("auto", 2, nodes)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("loc", "ray must be local, auto or the address of a cluster, host:port, got 'loc'"),
        ("host:", "ray must be local"),
        ("127.0.0.1:1", "ray: nothing answers at 127.0.0.1:1: .*refused"),
        ("ray://127.0.0.1:1", "ray: nothing answers at ray://127.0.0.1:1"),
    ],
)
def test_addresses_at_which_there_is_no_cluster_are_refused_at_once(address, said):
    with pytest.raises(InputError, match=said):
        cluster._check_address(address)


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"ray is not installed: pip install 'distill-lightning\[ray\]'"):
        compare(write_config(CONFIG, tmp_path), tmp_path / "out", "--ray", "local")


def test_what_there_is_to_wait_for_is_said(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"CPU": 2}}]
    ray = SimpleNamespace(init=lambda *given, **more: said.append("init"), nodes=lambda: nodes, put=lambda parcel: 1)
    ray.Queue, ray.is_initialized, said = (lambda **more: None), (lambda: False), []
    monkeypatch.setattr(cluster, "package", lambda name, extra: ray)
    config = SimpleNamespace(threads_per_run=1, accelerator="cpu")
    experiment = SimpleNamespace(config=config, splits={}, backbones={})
    cluster.RayPool(experiment, "local", said.append)._connect()
    assert said == ["ray: starting Ray", "init", "ray: waiting for a worker, which has the first run begin"]


def test_the_cluster_says_how_many_runs_are_made_at_a_time(tmp_path):
    with pytest.raises(InputError, match="workers is 2, but .* leave it out"):
        parse_config([write_config(CONFIG, tmp_path), "--ray", "local", "--workers", "2"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("place", "has no folder .*none: call compare in a folder that all machines"),
        ("output", "does not see .*at_work.lock: give a folder with --output that all machines"),
        ("data", r"ray: data: .* reads others than the machine that has called compare \(train: "),
    ],
)
def test_a_machine_that_sees_other_files_makes_no_run(tmp_path, monkeypatch, change, said):
    config = parse_config([write_config(CONFIG, tmp_path), "--output", str(tmp_path / "out")])
    splits = Experiment(config).splits
    if change == "data":
        config = replace(config, data={**CONFIG["data"], "init_args": {**CONFIG["data"]["init_args"], "subset": 64}})
    if change != "output":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/at_work.lock").touch()
    monkeypatch.setattr(cluster_task, "package", lambda name, extra: SimpleNamespace(get=lambda parcel: parcel))
    monkeypatch.setattr(cluster_task, "_LATE", 0.0)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "none" if change == "place" else tmp_path
    parcel = cluster_task.Parcel(config, place, 1, splits, {})
    run = SimpleNamespace(folder=tmp_path, depends_on=())
    answer = cluster_task.make_there([parcel], "token", run, None)
    with pytest.raises(InputError, match=said):
        raise answer.refused


def test_a_run_is_not_made_before_those_that_somebody_else_makes():
    other = cluster_task.Answer("host", elsewhere="process 1 on another")
    assert cluster_task.make_there([], "token", None, None, other).is_early
