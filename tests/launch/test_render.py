from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from megagpt import cli, config, outcome
from megagpt.errors import UserError
from megagpt.launch import hostfile, kubernetes, refusals, slurm, torchrun
from megagpt.launch.commands import read_hosts, spelled
from megagpt.launch.layout import fill_layout
from megagpt.launch.profiles import load_cluster
from megagpt.launch.spec import Cluster, Launch
from megagpt.launch.srun import srun_command

GOLDEN = Path(__file__).parent / "golden"
NASTY = {"COMMAS": "mlx5_0,mlx5_1", "QUOTES": "a 'b' \"c\"", "LINES": "one\ntwo\t$HOME `id` \\ é"}
CLUSTER = Cluster(
    partition="h100",
    account="lab-7",
    time="24:00:00",
    gpu_type="h100",
    cpus_per_task=12,
    modules=("cuda/12.8", "nccl"),
    network_interface="ib0",
    spares=1,
    environment=NASTY,
    image="registry/megagpt:1",
    claim="runs",
    queue="training",
)
LAUNCH = Launch(
    kind="slurm",
    name="gpt3-6.7b",
    out="/shared/runs/gpt3-6.7b",
    folder="/shared",
    command=("/venv/bin/python", "-m", "megagpt.cli", "train", "/shared/run.toml", "--out", "/shared/runs/gpt3-6.7b"),
    nodes=2,
    gpus_per_node=8,
    cluster=CLUSTER,
    hosts=("n1", "me@n2"),
    source="/shared/megagpt",
)
LAYOUT = "data 2 x pipeline 1 x tensor 8"
TEXTS = {
    "slurm.sh": slurm.batch_script(LAUNCH, layout=LAYOUT),
    "sweep.sh": slurm.sweep_script(
        [dataclasses.replace(LAUNCH, out=f"/shared/sweep/optim.lr={lr}") for lr in ("1e-4", "2e-4")],
        out=Path("/shared/sweep"),
        layout=LAYOUT,
    ),
    "data.sh": slurm.data_script(dataclasses.replace(LAUNCH, command=("megagpt", "data", "build", "a b")), tasks=64),
    "torchrun.sh": torchrun.torchrun_script(LAUNCH, layout=LAYOUT),
    "local.sh": torchrun.local_script(dataclasses.replace(LAUNCH, nodes=1), layout=LAYOUT),
    "hostfile.txt": hostfile.plan_text(LAUNCH, layout=LAYOUT),
    "jobset.yaml": kubernetes.job_set(
        dataclasses.replace(LAUNCH, kind="kubernetes", out="/workspace/runs/gpt3-6.7b"), layout=LAYOUT
    ),
}


@pytest.mark.parametrize("name", list(TEXTS))
def test_every_rendered_text_is_the_one_that_was_read_and_approved(name):
    path = GOLDEN / name
    if os.environ.get("MEGAGPT_WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(TEXTS[name])
    assert TEXTS[name] == path.read_text()


@pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".sh")])
def test_scripts_are_sound_to_bash_and_shellcheck(name, tmp_path):
    (tmp_path / name).write_text(TEXTS[name])
    subprocess.run(["bash", "-n", name], cwd=tmp_path, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--exclude=SC2016", name], cwd=tmp_path, check=True)


def test_values_of_any_kind_reach_the_process_that_a_script_starts(tmp_path):
    show = ("python3", "-c", "import json, os; print(json.dumps(dict(os.environ)))")
    launch = dataclasses.replace(LAUNCH, command=show, folder=str(tmp_path), nodes=1)
    text = torchrun.local_script(launch, layout=LAYOUT)
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True)
    assert NASTY.items() <= json.loads(done.stdout).items()
    assert "LINES" not in slurm.batch_script(launch, layout=LAYOUT)


def test_the_manifest_fits_the_schema_of_jobset_and_of_the_pods_in_it():
    manifest = yaml.safe_load(TEXTS["jobset.yaml"])
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None
    assert read.to_dict() == manifest  # a field that the schema does not know is lost on the way
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] = "0"
    with pytest.raises(ValueError, match="backoffLimit"):
        JobsetV1alpha2JobSet.from_dict(manifest)


def test_the_manifest_says_what_jobset_asks_for():
    manifest = yaml.safe_load(TEXTS["jobset.yaml"])
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    values = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    assert values["LINES"] == NASTY["LINES"].replace("$", "$$")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8, "cpu": 96}
    assert "--node-rank=$(JOB_COMPLETION_INDEX)" in container["command"]


def test_srun_gets_all_gpus_of_a_node_and_no_environment_on_its_command_line():
    command = srun_command(LAUNCH, nodes=["n3", "n1"], attempt=4)
    expected = "--ntasks=16 --ntasks-per-node=8 --nodelist=n3,n1 --cpus-per-task=12 --gpu-bind=none --export=ALL"
    assert set(expected.split()) <= set(command)
    assert command[-len(LAUNCH.command) :] == list(LAUNCH.command)
    pyxis = dataclasses.replace(LAUNCH, cluster=dataclasses.replace(CLUSTER, container="pyxis", mounts=("/data",)))
    mounts = "/data:/data,/shared:/shared,/shared/runs/gpt3-6.7b:/shared/runs/gpt3-6.7b"
    assert f"--container-mounts={mounts}" in srun_command(pyxis, nodes=["n1", "n2"], attempt=1)
    apptainer = dataclasses.replace(LAUNCH, cluster=dataclasses.replace(CLUSTER, container="apptainer"))
    assert "apptainer exec --nv" in shlex.join(srun_command(apptainer, nodes=["n1", "n2"], attempt=1))
    with pytest.raises(ValueError, match="2 nodes are needed, and 1 given"):
        srun_command(LAUNCH, nodes=["n1"], attempt=1)


@pytest.mark.parametrize("preset", [name for name in config.preset_names() if name != "gpt3-175b"])
@pytest.mark.parametrize("nodes", [1, 2, 16])
def test_every_preset_gets_a_legal_layout_that_fills_its_nodes(preset, nodes):
    if preset == "quickstart" and nodes > 1:
        pytest.skip("its batch is of 4 sequences")
    gpus = 2 if preset == "quickstart" else 8
    run = fill_layout(config.load(preset), nodes=nodes, gpus_per_node=gpus, gpu_memory_gib=80)
    assert run.parallel.world_size() == nodes * gpus
    assert run.parallel.tensor <= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 12 --parallel.tensor 8 --parallel.pipeline 5", "96 GPUs cannot be cut into tensor 8 x pipeline 5"),
        ("--parallel.tensor 16 --nodes 2", "parallel.tensor = 16 does not divide gpus_per_node = 8"),
        ("--nodes 0", "nodes = 0 must be at least 1"),
        ("--cluster nowhere", "no cluster profile 'nowhere'"),
        ("--set optim.lr", "--set optim.lr has no value"),
        ("--sweep optim.lr", "--sweep optim.lr names no values"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_before_anything_is_written(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = f"launch slurm gpt3-6.7b --gpus-per-node 8 --dry-run {words}"
    assert cli.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_prints_the_script_alone_and_tells_what_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = shlex.split("launch slurm gpt3-6.7b --nodes 16 --gpus-per-node 8 --dry-run")
    assert cli.main(words) == 0
    script = capsys.readouterr().out
    assert script.splitlines()[1].endswith("128 ranks = data 16 x pipeline 1 x tensor 8, on 16 nodes.")
    (tmp_path / "runs/gpt3-6.7b/launch").mkdir(parents=True)
    (tmp_path / "runs/gpt3-6.7b/launch/job.sh").write_text(script)
    assert cli.main([*words, "--set", "optim.lr=1e-4"]) == 0
    assert "the same as the last submission" in capsys.readouterr().err
    assert cli.main([*words, "--nodes", "8"]) == 0
    assert "-#SBATCH --nodes=16\n+#SBATCH --nodes=8" in capsys.readouterr().err


def test_settings_may_be_written_as_set_key_value():
    words = ["--set", "optim.lr=1e-4", "--set=data.mixture=a 1 b 2", "--nodes", "2"]
    assert spelled(words) == ["--optim.lr", "1e-4", "--data.mixture", "a", "1", "b", "2", "--nodes", "2"]


def test_a_hostfile_may_have_slots_and_remarks(tmp_path):
    (tmp_path / "hosts").write_text("n1 slots=8\n# spare\n\nn2\n")
    assert read_hosts([str(tmp_path / "hosts")]) == ("n1", "n2")
    with pytest.raises(UserError, match="does not begin with a dash"):
        read_hosts(["-oProxyCommand=x"])


PARTITIONS = refusals.partitions("h100*|1-00:00:00|16\nh100*|1-00:00:00|2\ncpu|infinite|4\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": "h10"}, "partition = h10 is not one of this cluster's. Did you mean h100?"),
        ({"time": "2-00"}, "time = 2-00 is over partition h100's limit of 1-00:00:00."),
        ({"time": "soon"}, "time = soon is no time limit."),
        ({"time": "3"}, "time = 3 is not longer than signal_seconds = 300"),
        ({"spares": 17}, "19 nodes are more than the 18 of partition h100."),
    ],
)
def test_what_the_partition_cannot_do_is_refused_with_a_remedy(change, message):
    launch = dataclasses.replace(LAUNCH, cluster=dataclasses.replace(CLUSTER, **change))
    refusals.check_partition(LAUNCH, PARTITIONS)
    with pytest.raises(UserError) as error:
        refusals.check_partition(launch, PARTITIONS)
    assert str(error.value).startswith(message)


def test_slurms_times_are_read_as_slurm_reads_them():
    times = {"90": 5400, "1:30": 90, "2:00:00": 7200, "1-12": 129_600, "1-0:30": 88_200, "UNLIMITED": float("inf")}
    assert {text: refusals.time_seconds(text) for text in times} == times


def test_an_unset_account_a_missing_image_and_a_folder_of_one_node_are_refused():
    bare = dataclasses.replace(CLUSTER, account="")
    refusals.check_account(bare, enforced=True, default="lab-7")
    with pytest.raises(UserError, match="charges every job to an account"):
        refusals.check_account(bare, enforced=True, default="")
    with pytest.raises(UserError, match="image = /no/such.sqsh is not there"):
        refusals.check_image(dataclasses.replace(CLUSTER, container="pyxis", image="/no/such.sqsh"))
    mounts = "/dev/sda / ext4 rw 0 0\nfs:/x /shared nfs4 rw 0 0\n"
    refusals.check_shared(LAUNCH, mounts)
    with pytest.raises(UserError, match="is on ext4, this machine's own disk: 3 nodes would not see the same files"):
        refusals.check_shared(dataclasses.replace(LAUNCH, out="/home/me/run"), mounts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('partiton = "x"', "no setting is called partiton"),
        ("spares = -1", "spares must be at least 0"),
        ('[environment]\nHF_TOKEN = "x"', "environment.HF_TOKEN looks like a secret"),
        ('container = "pyxis"', "container = pyxis has no image"),
        ('partition = "a b"', "holds a space, a quote or a backslash"),
        ("spares =", "Invalid value"),
    ],
)
def test_a_wrong_profile_is_refused_by_its_file_and_setting(text, message, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load_cluster(str(tmp_path / "c.toml"))
    assert message in str(error.value)
    assert "c.toml" in str(error.value)


def test_a_host_that_falls_silent_after_it_began_is_at_fault_and_one_that_never_began_is_not(tmp_path):
    launch = dataclasses.replace(LAUNCH, out=str(tmp_path), hosts=("n1", "me@n2"), nodes=2)
    peer = outcome.ended("failed", "peer_lost", "reset", rank=0, host="inner-name")
    assert hostfile.fault_of(launch, 1, None, {"n1": 1, "me@n2": 255}) is None
    launch.log(1, 8).parent.mkdir(parents=True)
    launch.log(1, 8).touch()
    found = hostfile.fault_of(launch, 1, peer, {"n1": 1, "me@n2": 255})
    assert found is not None
    assert (found.cause, found.host) == ("node", "n2")
    own = outcome.ended("failed", "corruption", "rank 9", rank=9, host="inner-name")
    found = hostfile.fault_of(launch, 1, own, {"n1": 1, "me@n2": 255})
    assert found is not None
    assert (found.cause, found.host) == ("corruption", "n2")


def test_a_launch_over_ssh_takes_the_first_good_hosts_and_says_who_is_out():
    launch = dataclasses.replace(LAUNCH, hosts=("n1", "me@n2", "n3"), nodes=2)
    assert hostfile.with_good_hosts(launch, {}).hosts == ("n1", "me@n2")
    assert hostfile.with_good_hosts(launch, {"n2": "node: gone"}).hosts == ("n1", "n3")
    with pytest.raises(UserError, match=r"1 good hosts are left, of 2 .*n2: node: gone; n3: hang"):
        hostfile.with_good_hosts(launch, {"n2": "node: gone", "n3": "hang"})
