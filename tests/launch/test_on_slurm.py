"""Jobs on a real Slurm: signalled, killed, hung, on unfit nodes, steered, out of disk."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_let.files.names import DONE, SAVE_NOW, STOP
from tests.helpers.programs import write_program
from tests.helpers.runs import ROOT, largest_difference
from tests.launch.jobs import Job, Launcher, kill

pytestmark = pytest.mark.distributed

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("pretrain_*.sh"))
NEVER = 10000
# Random, so that a recorded diff of this file does not contain it.
SECRET = secrets.token_hex(8)


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_the_script_at_its_size(script: str, launcher: Launcher) -> None:
    result = subprocess.run(
        ["sbatch", "--test-only", f"launch/{script}"], cwd=ROOT, env=launcher.environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    nodes = "n1" if "deepspeed" in script else "n[1-4]"
    assert f"on nodes {nodes} in" in result.stderr


def test_signalled_run_resumes_with_the_losses_of_an_uninterrupted_run(launcher: Launcher) -> None:
    """Signal, checkpoint, requeue, resume, DONE."""
    flags = ("--train-iters", 30, "--save-interval", NEVER)
    wandb = ("--wandb-project", "let", "--wandb-exp-name", "whole")
    whole = launcher.submit("whole", *flags, *wandb, SOME_TOKEN=SECRET)
    assert whole.wait()["ExitCode"] == "0:0", whole.output[-6000:]
    warned = launcher.submit("warned", *flags)
    warned.until(lambda: warned.iteration >= 5, "iteration 5")
    again = launcher.submit("warned", *flags)
    waiting = again.details()
    assert (waiting["JobState"], waiting["Reason"]) == ("PENDING", "Dependency"), "one at a time"
    warned.signal("URG")
    details = warned.wait()
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "1"), warned.output[-6000:]
    assert "launch: requeueing run warned at iteration" in warned.output
    attempts = [line.split("\t") for line in (warned.folder / "attempts.tsv").open()]
    assert [attempt[1] for attempt in attempts] == [warned.number] * 2
    saved = int(attempts[1][2])
    assert 5 <= saved < 30, "the second attempt starts where the first one saved"
    # Each step once: no step is repeated after the signal.
    assert [row["iteration"] for row in warned.run.rows if "lm_loss" in row] == list(range(1, 31))
    for key in ("lm_loss", "grad_norm", "learning_rate"):
        assert largest_difference(warned.run, whole.run, key) == 0.0, key
    assert (warned.folder / "checkpoints" / DONE).exists()
    for rank in ("rank_0000.log", "rank_0001.log"):
        log = (warned.folder / "logs" / rank).read_text()
        assert "==== attempt 1, job" in log and "==== attempt 2, job" in log, "appended"
    _check_record(whole)
    _check_status(launcher, warned)
    assert again.wait()["ExitCode"] == "0:0"
    assert "run warned is done (iteration 30)" in again.output


def _check_record(job: Job) -> None:
    """Check that the record of an attempt is complete and contains no secret."""
    attempt = job.folder / "attempts/0001"
    for name in ("command.txt", "commit.txt", "nodes.txt", "packages.txt", "recipe.yaml"):
        assert (attempt / name).read_text().strip(), name
    variables = (attempt / "environment.txt").read_text()
    assert "OMP_NUM_THREADS=1" in variables
    for path in attempt.iterdir():
        assert path.is_dir() or SECRET not in path.read_text(), path
    assert (attempt / "nodes.txt").read_text().split() == ["n1", "n2"]
    command = (attempt / "command.txt").read_text()
    assert "torch.distributed.run" in command and "--train-iters 30" in command
    assert f"wandb sync {job.folder}/wandb/offline-run-" in job.output
    # Output of rank 0 and of the last rank, which prints the losses.
    assert "scheduled an async checkpoint save at iteration" in job.output
    assert "lm loss:" in job.output and "megatron_let: device CPU" in job.output


def _check_status(launcher: Launcher, job: Job) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "launch/status.sh"), job.folder.name], text=True, capture_output=True,
        env=launcher.environment(LET_PYTHON=sys.executable),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = {line[:11].strip(): line[12:] for line in result.stdout.splitlines()}
    assert lines["state"] == "done" and lines["step"] == "30 of 30 (100.0 %)"
    assert "tokens/s" in lines["speed"] and lines["checkpoint"].startswith("step 30,")
    assert lines["attempts"].startswith("2, the last as job")
    assert lines["last end"].startswith("attempt 2 with code 0")


def test_second_killed_rank_without_progress_ends_the_run(launcher: Launcher) -> None:
    job = launcher.submit("killed", "--train-iters", NEVER, "--save-interval", NEVER)
    for attempt in (1, 2):
        mark = f"launch: run killed, attempt {attempt},"
        job.until(lambda mark=mark: mark in job.output, f"attempt {attempt}")
        begun = job.iteration
        job.until(lambda begun=begun: job.iteration not in (0, begun), "a step")
        start = kill(job.rank(1), signal.SIGKILL)
        node = "n2"
        found = f"launch: rank 1 on node {node} failed first, with exit code 137"
        job.until(lambda found=found, n=attempt: job.output.count(found) == n, "its report")
        seconds = time.monotonic() - start
        print(f"attempt {attempt}: {seconds:.1f} s from the kill to the report")
        assert seconds < 60
        job.until_nodes_are_free()
        assert time.monotonic() - start < 60
    details = job.wait()
    assert (details["JobState"], details["ExitCode"]) == ("FAILED", "4:0"), job.output[-3000:]
    assert "at iteration 0 after two attempts: not requeued" in job.output
    # Its messages would hide the last lines of the failed rank.
    assert "torch.distributed.elastic" not in job.output


def test_hung_rank_ends_the_job_after_the_timeout(launcher: Launcher) -> None:
    job = launcher.submit(
        "hung", "--train-iters", NEVER, "--save-interval", NEVER,
        "--distributed-timeout-seconds-after-init", 10, LET_MAX_RESTARTS="0",
    )  # fmt: skip
    job.until(lambda: job.iteration >= 3, "iteration 3")
    start = kill(job.rank(1), signal.SIGSTOP)
    details = job.wait()
    print(f"{time.monotonic() - start:.1f} s from the hang to the end, with a timeout of 10 s")
    assert details["ExitCode"] == "5:0", job.output[-3000:]
    assert "rank 0 on node n1 failed first" in job.output
    assert "Timed out waiting" in job.output


def test_unfit_node_is_reported_before_training(launcher: Launcher, tmp_path: Path) -> None:
    """A fake nvidia-smi shows one GPU too few on the third node."""
    path = write_program(
        tmp_path / "nvidia-smi",
        "[[ $SLURMD_NODENAME == n3 ]] && count=7 || count=8",
        "case $1 in *memory.total) value=81559 ;; *driver*) exit 1 ;; *) value=0 ;; esac",
        "for ((i = 0; i < count; i++)); do echo $value; done",
    )
    # The number of nodes is that of the script's header.
    job = launcher.submit("unfit", options=(), LET_PREFLIGHT="on", LET_GPUS_PER_NODE="8", PATH=path)
    details = job.wait()
    assert details["ExitCode"] == "3:0", job.output[-3000:]
    assert "launch: node n3: 7 GPUs, 8 expected" in job.output
    assert "error: nodes n3 are not fit to train: submit again with --exclude=n3" in job.output
    assert not (job.folder / "checkpoints").exists(), "no training was started"


@pytest.mark.slow
def test_different_node_is_reported_before_training(launcher: Launcher, tmp_path: Path) -> None:
    """The second node has a clock 7 s ahead and another version of Triton."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata, os, time\n"
        "if os.environ.get('SLURMD_NODENAME') == 'n2':\n"
        "    clock, version = time.time, importlib.metadata.version\n"
        "    time.time = lambda: clock() + 7\n"
        "    other = lambda name: '1.0' if name == 'triton' else version(name)\n"
        "    importlib.metadata.version = other\n"
    )
    path = f"{tmp_path}:{launcher.cluster.environment.get('PYTHONPATH', '')}"
    job = launcher.submit("unequal", LET_PREFLIGHT="on", PYTHONPATH=path)
    assert job.wait()["ExitCode"] == "3:0", job.output[-3000:]
    assert "launch: node n2: triton is 1.0, " in job.output
    assert "launch: node n2: its clock is +7." in job.output
    assert "submit again with --exclude=n2" in job.output


@pytest.mark.slow
def test_node_whose_doctor_fails_is_reported(launcher: Launcher, tmp_path: Path) -> None:
    """Python does not start on the second node; the first one is not reported."""
    python = tmp_path / "python"
    write_program(python, "[[ $SLURMD_NODENAME == n2 ]] && echo 'libc is gone' >&2 && exit 127",
                  f'exec {sys.executable} "$@"')  # fmt: skip
    job = launcher.submit("silent", LET_PREFLIGHT="on", LET_PYTHON=str(python))
    assert job.wait()["ExitCode"] == "3:0", job.output[-3000:]
    assert "launch: node n2: the doctor did not finish" in job.output
    assert "libc is gone" in job.output and "--exclude=n2," in job.output


@pytest.mark.slow
def test_slow_network_is_reported_before_training(launcher: Launcher) -> None:
    job = launcher.submit("slow", LET_PREFLIGHT="on", LET_MIN_BUS_GBPS="1000")
    assert job.wait()["ExitCode"] == "3:0", job.output[-3000:]
    assert "GB/s, under LET_MIN_BUS_GBPS=1000" in job.output
    assert "between the nodes is under LET_MIN_BUS_GBPS=1000 (code 3): check" in job.output
    assert "--exclude" not in job.output, "no single node is reported"
    assert not (job.folder / "checkpoints").exists(), "no training was started"


def test_control_files_save_and_stop_a_run_with_one_task_per_rank(
    launcher: Launcher, tmp_path: Path
) -> None:
    """SAVE_NOW and STOP, after the preflight, with ranks started by srun instead of torchrun.

    A fake apptainer records its arguments and runs the command after the image.
    """
    path = write_program(
        tmp_path / "apptainer", f'echo "$@" >{tmp_path}/arguments',
        'while [[ $1 != image.sif ]]; do shift; done; shift; exec "$@"',
    )  # fmt: skip
    job = launcher.submit(
        "steered", "--train-iters", NEVER, "--save-interval", NEVER,
        options=("--nodes=2", "--ntasks-per-node=2"), LET_RANKS_PER_NODE="2", LET_PREFLIGHT="on",
        LET_CONTAINER="apptainer", LET_IMAGE="image.sif", PATH=path,
    )  # fmt: skip
    job.until(lambda: job.iteration >= 3, "iteration 3")
    assert (tmp_path / "arguments").read_text().startswith("exec --nv --pwd")
    assert "preflight: 2 nodes, 4 ranks compared" in job.output
    assert "preflight: all-reduce" in job.output
    (job.folder / "checkpoints" / SAVE_NOW).touch()
    job.until(lambda: job.checkpoint >= 3, "a checkpoint")
    saved = job.checkpoint
    job.until(lambda: job.iteration > saved + 3, "further steps")
    (job.folder / "checkpoints" / STOP).touch()
    assert job.wait()["ExitCode"] == "0:0", job.output[-3000:]
    assert job.checkpoint > saved
    assert f"was stopped by {job.folder}/checkpoints/STOP at iteration" in job.output
    refused = launcher.submit("steered", "--train-iters", NEVER)
    assert refused.wait()["ExitCode"] == "6:0"
    assert f"{job.folder}/checkpoints/STOP" in refused.output


def test_cancel_during_a_checkpoint_keeps_the_previous_one(launcher: Launcher) -> None:
    flags = ("--save-interval", 20)
    job = launcher.submit("cancelled", "--train-iters", NEVER, *flags)
    cut = _stop_writers_during_a_save(job, 20)
    start = time.monotonic()
    job.cancel()
    print(f"{time.monotonic() - start:.1f} s from the cancel to free nodes")
    # Orphaned writers that hold the output open would cost a minute.
    assert time.monotonic() - start < 30
    assert job.checkpoint == cut - 20
    assert job.details()["JobState"] == "CANCELLED"
    resumed = launcher.submit("cancelled", "--train-iters", cut + 5, *flags,
                              "--override-opt_param-scheduler")  # fmt: skip
    assert resumed.wait()["ExitCode"] == "0:0", resumed.output[-6000:]
    assert f"from iteration {cut - 20};" in resumed.output
    assert resumed.checkpoint == cut + 5


def _stop_writers_during_a_save(job: Job, interval: int) -> int:
    """Let a checkpoint begin but not finish; return its iteration."""
    job.until(lambda: job.checkpoint >= interval, "a first checkpoint")
    for writer in job.writers():
        writer.send_signal(signal.SIGSTOP)
    # What was written before is complete two steps later.
    begun = job.iteration
    job.until(lambda: job.iteration >= begun + 2, "two more steps")
    cut = job.checkpoint + interval
    job.until((job.folder / f"checkpoints/iter_{cut:07d}").exists, "the start of a checkpoint")
    return cut


def test_full_disk_is_reported_and_keeps_the_last_checkpoint(
    launcher: Launcher, tmp_path: Path
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "let", tmp_path]).returncode:
        pytest.skip("mounting a disk of 40 MB needs root")
    try:
        job = launcher.submit(
            "full", "--train-iters", NEVER, "--save-interval", 10, runs=tmp_path,
            LET_MAX_RESTARTS="0",
        )  # fmt: skip
        job.until(lambda: job.checkpoint >= 10, "a checkpoint")
        with (tmp_path / "filler").open("wb") as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(2**16))
                filler.flush()
        saved = job.checkpoint
        assert job.wait()["ExitCode"] == "5:0", job.output[-6000:]
        assert "No space left on device" in job.output
        assert f"error: the disk of {job.folder} has" in job.output
        assert job.checkpoint in (saved, saved + 10)
        (tmp_path / "filler").unlink()
        resumed = launcher.submit(
            "full", "--train-iters", job.checkpoint + 3, "--override-opt_param-scheduler",
            runs=tmp_path,
        )  # fmt: skip
        assert resumed.wait()["ExitCode"] == "0:0", resumed.output[-6000:]
    finally:
        # Lazily, because after a failure the job may still have files open there.
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.slow
def test_suspicious_result_runs_again_on_another_node(launcher: Launcher, tmp_path: Path) -> None:
    """An error injected by Megatron: exit code 16, all ranks on the next node, then 17."""
    # Megatron tells by the host's name whether another GPU was tried.
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "machine = os.uname()\n"
        "name = os.environ.get('SLURMD_NODENAME', machine.nodename)\n"
        "os.uname = lambda: os.uname_result((machine.sysname, name, *machine[2:]))\n"
    )
    job = launcher.submit(
        "distrusted", "--train-iters", NEVER, "--save-interval", NEVER,
        "--error-injection-rate", 5, "--error-injection-type", "persistent_error",
        PYTHONPATH=f"{tmp_path}:{launcher.cluster.environment.get('PYTHONPATH', '')}",
    )  # fmt: skip
    details = job.wait()
    assert "exit code 16" in job.output, job.output[-6000:]
    assert details["ExitCode"] == "17:0", job.output[-6000:]
    heads = [line for line in (job.folder / "logs/rank_0000.log").open() if line.startswith("====")]
    assert [head.split("node ")[1][:2] for head in heads] == ["n1", "n2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (("--time=4", "--signal=URG@120"), "exiting program after receiving SIGTERM"),
        # --exit-duration-in-mins is one or two minutes; no signal comes in that time.
        (("--time=7", "--signal=URG@1"), "minutes] datetime"),
    ],
    ids=["signal", "duration"],
)
def test_time_limit_requeues_the_run(limit: tuple[str, ...], said: str, launcher: Launcher) -> None:
    """By Slurm's signal, and by Megatron's duration if the signal is missed."""
    name = f"limited_{limit[0][-1]}"
    job = launcher.submit(
        name, "--train-iters", NEVER, "--save-interval", NEVER, options=("--nodes=2", *limit)
    )
    job.until(lambda: f"launch: run {name}, attempt 2," in job.output, "a requeue", timeout=300)
    assert said in job.output
    saved = job.checkpoint
    assert (
        saved > 0
        and f"attempt 2, job {job.number} on n[1-2], from iteration {saved};" in job.output
    )
    (job.folder / "checkpoints" / STOP).touch()
    assert job.wait()["ExitCode"] == "0:0", job.output[-3000:]


@pytest.mark.slow
def test_killed_rank_ends_a_job_with_one_task_per_rank(launcher: Launcher) -> None:
    """As with torchrun, with ranks started by srun."""
    job = launcher.submit(
        "killed_task", "--train-iters", NEVER, "--save-interval", NEVER,
        options=("--nodes=2", "--ntasks-per-node=2"), LET_RANKS_PER_NODE="2", LET_MAX_RESTARTS="0",
    )  # fmt: skip
    job.until(lambda: job.iteration >= 3, "iteration 3")
    start = kill(job.rank(2), signal.SIGKILL)
    assert job.wait()["ExitCode"] == "5:0", job.output[-3000:]
    assert "launch: rank 2 on node n2 failed first, with exit code 137" in job.output
    job.until_nodes_are_free()
    assert time.monotonic() - start < 60
