"""Jobs on a real Slurm: started, warned, killed, hung, refused, steered, cancelled, out of disk."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_let.control import DONE, SAVE_NOW, STOP
from tests.helpers.runs import ROOT, largest_difference
from tests.launch.jobs import Job, Launcher, kill

pytestmark = pytest.mark.distributed

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("pretrain_*.sh"))
NEVER = 10000


@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_takes_the_script_at_its_size(script: str, launcher: Launcher) -> None:
    result = subprocess.run(
        ["sbatch", "--test-only", f"launch/{script}"], cwd=ROOT, env=launcher.environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "on nodes n[1-4]" in result.stderr


def test_warned_run_goes_on_as_if_nothing_had_been(launcher: Launcher) -> None:
    """Signal, checkpoint, requeue, resume, DONE; the losses are those of a run left alone."""
    flags = ("--train-iters", 30, "--save-interval", NEVER)
    whole = launcher.submit("whole", *flags)
    assert whole.wait()["ExitCode"] == "0:0", whole.output[-6000:]
    warned = launcher.submit("warned", *flags)
    warned.until(lambda: warned.iteration >= 5, "iteration 5")
    warned.signal("URG")
    details = warned.wait()
    assert (details["JobState"], details["Restarts"]) == ("COMPLETED", "1"), warned.output[-6000:]
    assert "launch: requeueing run warned at iteration" in warned.output
    attempts = [line.split("\t") for line in (warned.folder / "attempts.tsv").open()]
    assert [attempt[1] for attempt in attempts] == [warned.number] * 2
    saved = int(attempts[1][2])
    assert 5 <= saved < 30, "the second attempt starts where the first one saved"
    # Each step once: what the signal saved was not trained again.
    assert [row["iteration"] for row in warned.run.rows if "lm_loss" in row] == list(range(1, 31))
    for key in ("lm_loss", "grad_norm", "learning_rate"):
        assert largest_difference(warned.run, whole.run, key) == 0.0, key
    assert (warned.folder / "checkpoints" / DONE).exists()
    _check_record(whole)
    _check_status(launcher, warned)
    again = launcher.submit("warned", *flags)
    assert again.wait()["ExitCode"] == "0:0"
    assert "run warned is done (iteration 30)" in again.output


def _check_record(job: Job) -> None:
    """What an attempt was, and nothing secret."""
    attempt = job.folder / "attempts/0001"
    for name in ("command.txt", "commit.txt", "nodes.txt", "packages.txt", "recipe.yaml"):
        assert (attempt / name).read_text().strip(), name
    variables = (attempt / "environment.txt").read_text()
    assert "OMP_NUM_THREADS=1" in variables and "HOME=" not in variables
    for rank in ("rank_0000.log", "rank_0001.log"):
        assert "==== attempt 1, job" in (job.folder / "logs" / rank).read_text()
    # Rank 0's and the last rank's, which prints the losses.
    assert "lm loss:" in job.output and "megatron_let: device CPU" in job.output


def _check_status(launcher: Launcher, job: Job) -> None:
    result = subprocess.run(
        ["bash", str(ROOT / "launch/status.sh"), str(job.folder)], text=True, capture_output=True,
        env=launcher.environment(LET_PYTHON=sys.executable),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    lines = {line[:11].strip(): line[12:] for line in result.stdout.splitlines()}
    assert lines["state"] == "done" and lines["step"] == "30 of 30 (100.0 %)"
    assert "tokens/s" in lines["speed"] and lines["checkpoint"].startswith("step 30,")
    assert lines["attempts"].startswith("2, the last as job")


def test_killed_rank_ends_the_job_and_a_second_one_stops_it(launcher: Launcher) -> None:
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
        _wait_for_idle_nodes(launcher, start)
    details = job.wait()
    assert (details["JobState"], details["ExitCode"]) == ("FAILED", "4:0"), job.output[-3000:]
    assert "stands at iteration 0 after two tries: not requeued" in job.output


def _wait_for_idle_nodes(launcher: Launcher, start: float) -> None:
    while launcher.cluster.command("squeue", "-h", "-t", "R,CG"):
        assert time.monotonic() - start < 60, "a crashed rank leaves the nodes within a minute"
        time.sleep(0.1)


def test_hung_rank_is_found_and_ends_the_job(launcher: Launcher) -> None:
    job = launcher.submit(
        "hung", "--train-iters", NEVER, "--save-interval", NEVER,
        "--distributed-timeout-seconds-after-init", 5, LET_MAX_RESTARTS="0",
    )  # fmt: skip
    job.until(lambda: job.iteration >= 3, "iteration 3")
    start = kill(job.rank(1), signal.SIGSTOP)
    details = job.wait()
    print(f"{time.monotonic() - start:.1f} s from the hang to the end, with a timeout of 5 s")
    assert details["ExitCode"] == "5:0", job.output[-3000:]
    assert "rank 0 on node n1 failed first" in job.output
    assert "Timed out waiting" in job.output


def test_unfit_node_is_named_before_training(launcher: Launcher, tmp_path: Path) -> None:
    """A program in nvidia-smi's place shows one GPU too few on the second node."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/bash\n[[ $SLURMD_NODENAME == n2 ]] && count=7 || count=8\n"
        "case $1 in *memory.total) value=81559 ;; *) value=0 ;; esac\n"
        "for ((i = 0; i < count; i++)); do echo $value; done\n"
    )
    program.chmod(0o755)
    path = f"{tmp_path}:{launcher.cluster.environment['PATH']}"
    job = launcher.submit("unfit", LET_PREFLIGHT="on", LET_GPUS_PER_NODE="8", PATH=path)
    details = job.wait()
    assert details["ExitCode"] == "3:0", job.output[-3000:]
    assert "launch: node n2: 7 GPUs, 8 expected" in job.output
    assert "error: nodes n2 are not fit to train: submit again with --exclude=n2" in job.output
    assert not (job.folder / "checkpoints").exists(), "no training was started"


def test_files_steer_a_run_with_a_task_for_each_rank(launcher: Launcher) -> None:
    """SAVE_NOW and STOP, after a look at the nodes, where srun and not torchrun starts ranks."""
    job = launcher.submit(
        "steered", "--train-iters", NEVER, "--save-interval", NEVER,
        options=("--nodes=2", "--ntasks-per-node=2"), LET_RANKS_PER_NODE="2", LET_PREFLIGHT="on",
    )  # fmt: skip
    job.until(lambda: job.iteration >= 3, "iteration 3")
    assert "preflight: 2 nodes, 4 ranks, all-reduce" in job.output
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
    assert "remove that file to go on" in refused.output


def test_cancel_within_a_checkpoint_leaves_the_previous_one(launcher: Launcher) -> None:
    flags = ("--save-interval", 10)
    job = launcher.submit("cancelled", "--train-iters", NEVER, *flags)
    cut = _freeze_within_a_save(job)
    job.cancel()
    assert job.checkpoint == cut - 10
    assert job.details()["JobState"] == "CANCELLED"
    resumed = launcher.submit("cancelled", "--train-iters", cut + 5, *flags,
                              "--override-opt_param-scheduler")  # fmt: skip
    assert resumed.wait()["ExitCode"] == "0:0", resumed.output[-6000:]
    assert f"from iteration {cut - 10};" in resumed.output
    assert resumed.checkpoint == cut + 5


def _freeze_within_a_save(job: Job) -> int:
    """Stop all ranks while a checkpoint is written; return its iteration."""
    for iteration in range(20, 400, 10):
        folder = job.folder / f"checkpoints/iter_{iteration:07d}"
        job.until(folder.exists, f"iteration {iteration}")
        if job.checkpoint == iteration - 10:
            job.freeze()
            if job.checkpoint == iteration - 10:
                return iteration
            raise AssertionError("the save was over before the ranks stood still")
    raise AssertionError("no save was caught")


def test_full_disk_is_named_and_the_last_checkpoint_stays(
    launcher: Launcher, tmp_path: Path
) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "let", tmp_path]).returncode:
        pytest.skip("a small file system cannot be mounted here")
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
        subprocess.run(["umount", tmp_path], check=True)
