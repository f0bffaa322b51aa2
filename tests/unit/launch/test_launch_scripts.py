"""The launch scripts without Slurm: dry runs, settings, and decisions at the end of an attempt."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from megatron_let.config.recipes import load_recipe
from tests.helpers.runs import ROOT

DEEPSPEED = ROOT / "launch/pretrain_7b_let_deepspeed.sh"
SCRIPTS = sorted(set((ROOT / "launch").glob("pretrain_*.sh")) - {DEEPSPEED})


@pytest.fixture
def site(tmp_path: Path) -> Path:
    path = tmp_path / "site.sh"
    path.write_text(
        f'LET_RUNS={tmp_path}/runs; : "${{LET_PYTHON:=/bin/true}}"\n'
        ': "${DATA=/d/pile}" "${LET_MODELS:=/models}" "${LET_FABRIC:=infiniband}"\n'
    )
    return path


def launch(script: Path, site: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    result = subprocess.run(
        ["bash", str(script), *arguments], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**kept, "LET_SITE": str(site), **variables},
    )  # fmt: skip
    return result.returncode, result.stdout


def test_each_paper_recipe_has_a_script() -> None:
    names = [script.stem.removeprefix("pretrain_") for script in SCRIPTS]
    assert len(names) == 6
    for name in names:
        size, method = name.split("_")
        assert (ROOT / f"configs/{method}_{size}.yaml").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_dry_run_shows_job_and_command(script: Path, site: Path) -> None:
    code, shown = launch(script, site, "--dry-run", "--", "--train-iters", "5", "--lr", "1e-4")
    assert code == 0, shown
    size, method = script.stem.removeprefix("pretrain_").split("_")
    for expected in (
        "#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --signal=URG@600",
        f"configs/{method}_{size}.yaml", "--nproc-per-node 8", "--exit-signal SIGURG",
        "torch.distributed.run", "--train-iters 5 --lr 1e-4", f"runs/{method}_{size}",
        "#   DATA=/d/pile", "#   TEACHER=/models/SmolLM2-", "#   OMP_NUM_THREADS=",
    ):  # fmt: skip
        assert expected in shown, expected


def test_deepspeed_dry_run_shows_one_node_and_its_recipe(site: Path) -> None:
    code, shown = launch(DEEPSPEED, site, "--dry-run")
    assert code == 0, shown
    for expected in (
        "#SBATCH --nodes=1", "#SBATCH --gpus-per-node=8", "#SBATCH --signal=URG@600",
        "configs/let_7b_deepspeed.yaml", "--nproc-per-node 8", "runs/let_7b_deepspeed",
        "#   TEACHER=/models/SmolLM2-1.7B",
    ):  # fmt: skip
        assert expected in shown, expected
    settings = load_recipe(ROOT / "configs/let_7b_deepspeed.yaml")
    assert settings["engine"] == "deepspeed" and settings["exit-signal-handler"]
    assert settings["save"] == settings["load"] == "${OUTPUT}/checkpoints"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_recipe_saves_asynchronously_to_the_run_folder(script: Path) -> None:
    size, method = script.stem.removeprefix("pretrain_").split("_")
    settings = load_recipe(ROOT / f"configs/{method}_{size}.yaml")
    # Without any one of the three Megatron saves synchronously, or fails.
    assert settings["async-save"] and settings["use-persistent-ckpt-worker"]
    assert settings["async-strategy"] == "mcore" and settings["exit-signal-handler"]
    assert settings["save"] == settings["load"] == "${OUTPUT}/checkpoints"


# Table 3, appendix B: layers, width, feed-forward, heads, peak rate, batch per GPU, accumulation.
# The appendix gives no batch per GPU for 3B; 8 x 8 is this package's.
PAPER = {
    "1p4b": (24, 2048, 5461, 32, 4e-4, 16, 4),
    "3b": (None, None, None, None, 3e-4, 8, 8),
    "7b": (32, 4096, 11008, 32, 3e-4, 4, 16),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_recipe_and_header_have_the_papers_sizes(script: Path) -> None:
    size, method = script.stem.removeprefix("pretrain_").split("_")
    header = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", script.read_text(), re.MULTILINE))
    assert header["job-name"] == f"{method}_{size}"
    ranks = int(header["nodes"]) * int(header["gpus-per-node"])
    assert ranks == 32
    settings = load_recipe(ROOT / f"configs/{method}_{size}.yaml")
    names = ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "lr")
    for name, expected in zip(names, PAPER[size], strict=False):
        assert expected is None or settings[name] == expected, name
    micro, accumulation = PAPER[size][-2:]
    assert settings["micro-batch-size"] == micro
    assert settings["global-batch-size"] == micro * accumulation * ranks == 2048
    assert settings["seq-length"] == settings["max-position-embeddings"] == 1280
    # 20B tokens, warm-up over a tenth of the steps, decay to a tenth of the peak rate.
    assert settings["train-iters"] * 2048 * 1280 == pytest.approx(20e9, rel=1e-3)
    assert settings["lr-warmup-iters"] == pytest.approx(settings["train-iters"] / 10, abs=1)
    assert settings["min-lr"] == pytest.approx(settings["lr"] / 10)
    adam = {"adam-beta1": 0.9, "adam-beta2": 0.999, "weight-decay": 0.01, "clip-grad": 1.0}
    assert settings.items() >= adam.items() and settings["lr-decay-style"] == "cosine"
    for name in ("use-distributed-optimizer", "overlap-grad-reduce", "overlap-param-gather"):
        assert settings[name], name


@pytest.mark.parametrize("size", PAPER)
def test_baseline_and_let_differ_only_in_the_method(size: str) -> None:
    baseline, let = (load_recipe(ROOT / f"configs/{m}_{size}.yaml") for m in ("baseline", "let"))
    names = {name for name in baseline.keys() | let.keys() if baseline.get(name) != let.get(name)}
    assert {name for name in names if not name.startswith("let-")} <= {"tokenizer-model"}


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ("pyxis", "--container-image=image.sqsh"),
        ("pyxis", "/d:/d,/models/SmolLM2-135M:/models/SmolLM2-135M,/a:/b"),
        ("apptainer", "apptainer exec --nv"),
        ("apptainer", "/d,/models/SmolLM2-135M,/a:/b image.sqsh bash"),
    ],
)
def test_container_runs_the_same_inner_script(container: str, expected: str, site: Path) -> None:
    site.write_text(site.read_text().replace(":=/bin/true", ":="))
    code, shown = launch(
        SCRIPTS[0], site, "--dry-run",
        LET_CONTAINER=container, LET_IMAGE="image.sqsh", LET_MOUNTS="/a:/b",
    )  # fmt: skip
    shown = shown.replace("\\,", ",")
    assert code == 0 and expected in shown, shown
    assert "launch/lib/node.sh ranks megatron_let.pretrain" in shown
    assert "rank.sh python3 -u -m megatron_let.pretrain" in shown, "the container's Python"


def test_container_mounts_hub_cache_for_a_hub_id(site: Path) -> None:
    code, shown = launch(
        SCRIPTS[0], site, "--dry-run", LET_CONTAINER="apptainer", LET_IMAGE="image.sqsh",
        TEACHER="owner/name", HF_HOME="/cache/hf",
    )  # fmt: skip
    shown = shown.replace("\\,", ",")
    assert code == 0 and ",/cache/hf image.sqsh" in shown and ",owner/name" not in shown, shown


@pytest.fixture
def resilient_python(tmp_path: Path) -> str:
    """A Python that has ft_launcher."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\n[ "$2" = megatron_let.run.restarts_in_job ] && echo yes\n')
    path.chmod(0o755)
    return str(path)


def test_ranks_are_restarted_in_the_job_on_request(site: Path, resilient_python: str) -> None:
    code, shown = launch(
        SCRIPTS[0], site, "--dry-run", LET_PYTHON=resilient_python, LET_HANG_SECONDS="50",
        LET_RESTARTS_IN_JOB="7",
    )  # fmt: skip
    assert code == 0 and "torch.distributed.run" not in shown, shown
    (command,) = (line for line in shown.splitlines() if "restarts_in_job" in line)
    for expected in (
        "--nnodes $SLURM_NNODES --node-rank $SLURM_NODEID --nproc-per-node 8",
        "--rdzv-endpoint first-node:20000+job+attempt", "--max-restarts 7",
        "setup:150,step:50,checkpointing:150", "--ft-rank-out-of-section-timeout 150",
        "checkpoints/latest_checkpointed_iteration.txt", "/launch/lib/rank.sh",
    ):  # fmt: skip
        assert expected in command, expected
    assert command.rstrip().endswith("--enable-ft-package")


@pytest.mark.parametrize("restarts", [None, "0"])
def test_ranks_start_with_torchrun_unless_asked(
    restarts: str | None, site: Path, resilient_python: str
) -> None:
    variables = {} if restarts is None else {"LET_RESTARTS_IN_JOB": restarts}
    code, shown = launch(SCRIPTS[0], site, "--dry-run", LET_PYTHON=resilient_python, **variables)
    assert code == 0 and "torch.distributed.run" in shown and "enable-ft" not in shown, shown
    assert "LET_RESTARTS_IN_JOB" not in shown


@pytest.mark.parametrize(
    ("restarts", "tasks", "installed"),
    [("3", "2", False), ("3", "4", True)],
    ids=["not installed", "a task per rank"],
)
def test_restarts_that_cannot_be_had_end_the_attempt(
    restarts: str, tasks: str, installed: bool, tmp_path: Path, resilient_python: str
) -> None:
    (tmp_path / "logs").mkdir()
    variables = {
        "LET_FABRIC": "ethernet", "LET_PYTHON": resilient_python if installed else "/bin/true",
        "LET_RANKS_PER_NODE": "2", "LET_RESTARTS_IN_JOB": restarts, "LET_ATTEMPT": "1",
        "LET_NODE_SHIFT": "0", "LET_MASTER_ADDR": "localhost", "LET_MASTER_PORT": "1",
        "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo", "OUTPUT": str(tmp_path),
        "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NTASKS": tasks, "SLURM_NODEID": "0",
        "SLURM_PROCID": "0", "SLURMD_NODENAME": "n0", "SLURM_TASKS_PER_NODE": "1(x2)",
    }  # fmt: skip
    command = ["bash", str(ROOT / "launch/lib/node.sh"), "ranks", "megatron_let.pretrain"]
    result = subprocess.run(command, env={**os.environ, **variables}, capture_output=True)
    assert result.returncode == 2
    log = (tmp_path / "logs" / "node_n0.log").read_text()
    assert f"LET_RESTARTS_IN_JOB is '{restarts}'" in log


@pytest.mark.parametrize(
    ("module", "node", "expected"),
    [
        # The preflight's ranks have no steps that a monitor could watch.
        ("megatron_let.doctor.nodes", "0", "torch.distributed.run"),
        ("megatron_let.pretrain", "0", "--local-addr address --max"),
        ("megatron_let.pretrain", "1", "--no-python --max"),
    ],
)
def test_launcher_of_a_module_and_node(
    module: str, node: str, expected: str, resilient_python: str
) -> None:
    script = f"""
        . {ROOT}/launch/lib/launcher.sh
        OUTPUT=/run LET_PYTHON={resilient_python} LET_RANKS_PER_NODE=8 LET_RESTARTS_IN_JOB=3
        compose=compose_torchrun
        if restarts_in_job {module}; then compose=compose_ft_launcher; fi
        $compose 2 {node} address 1234
        echo "${{launcher[@]}} ordered ${{CROSS_SLURM_PROCID:-}}"
    """
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert expected in result.stdout
    assert module != "megatron_let.pretrain" or f"ordered {node}" in result.stdout


@pytest.mark.parametrize("option", [["--job-name=two"], ["--job-name", "two"], ["-J", "two"]])
def test_job_name_is_the_run_name(option: list[str], site: Path) -> None:
    code, shown = launch(SCRIPTS[0], site, "--dry-run", *option)
    assert code == 0 and f"# run folder: {site.parent}/runs/two\n" in shown


MISSING: list[tuple[dict[str, str], str]] = [
    ({"DATA": ""}, "DATA is not set"),
    ({"LET_FABRIC": "carrier-pigeon"}, "LET_FABRIC is 'carrier-pigeon'"),
    ({"LET_CONTAINER": "pyxis"}, "LET_IMAGE is not set"),
    ({"LET_SITE": "/nowhere"}, "no site file /nowhere"),
    ({"LET_PYTHON": "/nowhere/python"}, "no Python at /nowhere/python"),
    ({"LET_GPUS_PER_NODE": "eight"}, "LET_GPUS_PER_NODE is 'eight'"),
    ({"LET_RANKS_PER_NODE": "-1"}, "LET_RANKS_PER_NODE is '-1'"),
    ({"LET_DISK_GIB": "0.5"}, "LET_DISK_GIB is '0.5'"),
    ({"LET_PREFLIGHT_SECONDS": "5m"}, "LET_PREFLIGHT_SECONDS is '5m'"),
    ({"LET_MAX_RESTARTS": "unlimited"}, "LET_MAX_RESTARTS is 'unlimited'"),
    ({"LET_MAX_RESTARTS": "08"}, "LET_MAX_RESTARTS is '08'"),
    ({"LET_RESTARTS_IN_JOB": "yes"}, "LET_RESTARTS_IN_JOB is 'yes'"),
    ({"LET_HANG_SECONDS": "10m", "LET_RESTARTS_IN_JOB": "no"}, "LET_RESTARTS_IN_JOB is 'no'"),
    ({"LET_HANG_SECONDS": "10m"}, "LET_HANG_SECONDS is '10m'"),
    ({"LET_MIN_BUS_GBPS": "1,5"}, "LET_MIN_BUS_GBPS is '1,5'"),
]


@pytest.mark.parametrize(("variables", "expected"), MISSING)
def test_missing_setting_ends_a_submission_with_one_error_line(
    variables: dict[str, str], expected: str, site: Path
) -> None:
    code, shown = launch(SCRIPTS[0], site, **variables)
    assert (
        code == 2
        and shown.count("error:") == 1
        and f"error: {expected}" in shown.replace("there is ", "")
    )


@pytest.mark.parametrize(("variables", "expected"), MISSING)
def test_dry_run_names_what_is_missing_and_shows_the_rest(
    variables: dict[str, str], expected: str, site: Path
) -> None:
    code, shown = launch(SCRIPTS[0], site, "--dry-run", **variables)
    assert code == 0, shown
    missing = [line for line in shown.splitlines() if line.startswith("# missing: ")]
    assert any(expected in line for line in missing)
    assert "#SBATCH --nodes=4" in shown and "torch.distributed.run" in shown


def test_numbers_may_be_empty_and_the_bandwidth_a_decimal(site: Path) -> None:
    code, shown = launch(
        SCRIPTS[0], site, "--dry-run", LET_MAX_RESTARTS="", LET_HANG_SECONDS="0",
        LET_MIN_BUS_GBPS="1.5",
    )  # fmt: skip
    assert code == 0 and "# missing" not in shown


def test_unknown_container_ends_with_one_error_line(site: Path) -> None:
    variables = {"LET_CONTAINER": "docker", "LET_IMAGE": "x"}
    code, shown = launch(SCRIPTS[0], site, "--dry-run", **variables)
    assert code == 2 and "LET_CONTAINER is 'docker'" in shown and shown.count("error:") == 1


def test_site_file_may_read_variables_that_are_not_set(site: Path) -> None:
    # As $USER is in a container or a cron job.
    with site.open("a") as stream:
        stream.write('LET_RUNS="/scratch/$LET_NOT_SET/runs"\n')
    code, shown = launch(SCRIPTS[0], site, "--dry-run")
    assert code == 0 and "# run folder: /scratch//runs/" in shown
    code, shown = launch(SCRIPTS[0], ROOT / "launch/site.example.sh", "--dry-run")
    assert code == 0 and "unbound" not in shown


def test_scripts_have_no_site_paths_and_a_reason_per_setting() -> None:
    for path in (ROOT / "launch/env").glob("*.sh"):
        reason = False
        for line in path.read_text().splitlines():
            assert not line.startswith("export") or reason, (path, line)
            reason = line.startswith("#")
    for path in (ROOT / "launch").rglob("*.sh"):
        if path.name != "site.example.sh":
            assert not re.search(r"/(scratch|lustre|gpfs|home)/", path.read_text()), path


# The end of an attempt


DECIDE = """
set -euo pipefail
. {root}/launch/lib/job.sh
scontrol() {{ echo "scontrol $1"; }}
sleep() {{ exit 0; }}
OUTPUT={output} CHECKPOINTS={output}/checkpoints ATTEMPT={output} LET_STEP_DIR={output}
RUN=run SLURM_JOB_ID=7 LET_ATTEMPT=2 LET_NODE_SHIFT=0 SLURM_RESTART_COUNT={restarts}
finish_attempt {code}
"""


OLD, HEAD = "==== attempt 1, job 7, node n1:", "==== attempt 2, job 7, node n1:"


def decide(
    output: Path,
    rank_code: int,
    *,
    starts: tuple[int, ...] = (0,),
    now: int = 100,
    mark: str = "",
    restarts: int = 0,
) -> tuple[int, str]:
    """Run `finish_attempt` after attempts that started at `starts`, with `now` saved."""
    (output / "checkpoints").mkdir()
    (output / "exits").mkdir()
    (output / "logs").mkdir()
    (output / "logs/rank_0005.log").write_text(f"{HEAD}\nof rank 5\n")
    (output / "logs/rank_0003.log").write_text(f"{OLD}\nold\n{HEAD}\nlast words\n")
    (output / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(now))
    table = "".join(f"{i}\t7\t{start}\t0\tn1\n" for i, start in enumerate(starts))
    (output / "attempts.tsv").write_text("0\t6\t100\t0\tn1\n" + table)
    if rank_code:
        # Rank 5 failed because of rank 3.
        (output / "exits/5").write_text("2000.5 1 5 n2\n")
        (output / "exits/3").write_text(f"1000.5 {rank_code} 3 n1\n")
    if mark:
        (output / "checkpoints" / mark).touch()
    return end_attempt(output, int(rank_code > 0), restarts)


def end_attempt(output: Path, code: int, restarts: int = 0) -> tuple[int, str]:
    """Run the end of an attempt after a step with this exit code."""
    script = DECIDE.format(root=ROOT, output=output, code=code, restarts=restarts)
    result = subprocess.run(
        ["bash", "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return result.returncode, result.stdout


@pytest.mark.parametrize(
    ("rank_code", "situation", "code", "expected"),
    [
        (0, {}, 0, "requeueing run run at iteration 100"),
        (0, {"mark": "DONE"}, 0, "run run is done at iteration 100"),
        (0, {"mark": "STOP"}, 0, "was stopped by"),
        (1, {}, 0, "rank 3 on node n1 failed first, with exit code 1"),
        (1, {"starts": (0, 100)}, 0, "requeueing"),
        (1, {"starts": (100, 100)}, 4, "at iteration 100 after two attempts: not requeued"),
        (0, {"restarts": 50}, 5, "was requeued 50 times"),
        (2, {}, 2, "error: the run cannot start with these settings"),
        (16, {}, 0, "again on another GPU (exit code 16)"),
        (17, {}, 17, "(exit code 17): not requeued"),
    ],
)
def test_exit_code_of_an_attempt_ends_or_requeues(
    rank_code: int, situation: dict[str, object], code: int, expected: str, tmp_path: Path
) -> None:
    found, shown = decide(tmp_path, rank_code, **situation)  # type: ignore[arg-type]
    assert found == code and expected in shown, shown
    assert ("scontrol requeue" in shown) == (code == 0 and "mark" not in situation)
    if rank_code:
        assert "last words" in shown and "old" not in shown, "only this attempt's lines"


@pytest.mark.parametrize(
    ("state", "failures", "tried", "printed"),
    [("DOWN", 0, 1, "x"), ("DOWN", 3, 4, "x"), ("DOWN", 99, 7, ""), ("UP", 1, 2, "x"),
     ("UP", 99, 2, "")],
)  # fmt: skip
def test_slurm_is_asked_again_while_it_does_not_answer(
    state: str, failures: int, tried: int, printed: str, tmp_path: Path
) -> None:
    script = f"""
. {ROOT}/launch/lib/job.sh
sleep() {{ echo "$1" >>{tmp_path}/waits; }}
scontrol() {{
    [[ $1 != ping ]] || {{ echo "Slurmctld(primary) at host is {state}" && return; }}
    echo >>{tmp_path}/tries
    (($(wc -l <{tmp_path}/tries) > {failures})) && echo x
}}
ask_slurm scontrol requeue 7
"""
    result = subprocess.run(["bash", "-c", script], text=True, capture_output=True)
    assert (result.stdout.strip(), result.returncode == 0) == (printed, bool(printed))
    assert len((tmp_path / "tries").read_text().splitlines()) == tried
    waits = tmp_path / "waits"
    seconds = [int(line) for line in waits.read_text().split()] if waits.exists() else []
    assert len(seconds) == tried - 1 and sum(seconds) <= 300


def test_rank_that_lost_its_peer_is_not_reported_as_cause(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "exits").mkdir()
    lost = f"{HEAD}\nRuntimeError: Connection closed by peer [::1]\n"
    (tmp_path / "logs/rank_0000.log").write_text(lost)
    (tmp_path / "logs/rank_0001.log").write_text(f"{HEAD}\nCUDA out of memory\n")
    (tmp_path / "exits/0").write_text("1000.1 1 0 n1\n")
    (tmp_path / "exits/1").write_text("1000.9 1 1 n2\n")
    code, shown = end_attempt(tmp_path, 1)
    assert code == 4 and "rank 1 on node n2 failed first" in shown and "out of memory" in shown


def test_end_before_any_rank_shows_the_node_logs(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    logs = {"n1": f"{OLD}\nold\n", "n2": f"{OLD}\nold\n{HEAD}\naddress already in use\n",
            "n3": f"{HEAD}\nof another attempt's node\n"}  # fmt: skip
    for name, text in logs.items():
        (tmp_path / f"logs/node_{name}.log").write_text(text)
    (tmp_path / "nodes.txt").write_text("n1\nn2\n")
    (tmp_path / "attempts.tsv").write_text("1\t7\t0\t0\tn1\n")
    code, shown = end_attempt(tmp_path, 1)
    assert code == 0 and "the step ended with code 1" in shown
    assert "    address already in use" in shown and "requeueing run run at iteration 0" in shown
    assert "old" not in shown and "another" not in shown


@pytest.mark.parametrize(
    ("rows", "now", "expected"),
    [
        # The job's start: attempt, job, iteration.
        ("1 7 0", 0, "--load /old --lr 1 --ckpt-step=5 --finetune --no-load-rng"),
        ("1 7 0|2 7 0", 0, "--load /old --lr 1 --ckpt-step=5 --finetune --no-load-rng"),
        ("1 7 0|2 7 100", 100, "--lr 1"),
        # Another job saved them.
        ("1 6 0|2 6 100|3 7 300", 300, "--load /old --lr 1 --ckpt-step=5 --finetune --no-load-rng"),
        ("1 6 0|2 7 300|3 7 600", 600, "--lr 1"),
        ("1 7 0|2 7 100", 100, "--lr 1 --no-save-optim --no-load-optim"),
    ],
)
def test_start_of_a_run_is_left_out_once_the_job_has_saved(
    rows: str, now: int, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(now))
    table = "".join("\t".join(row.split()) + "\t0\tn1\n" for row in rows.split("|"))
    (tmp_path / "attempts.tsv").write_text(table)
    script = f"""
set -euo pipefail
. {ROOT}/launch/lib/job.sh
OUTPUT={tmp_path} CHECKPOINTS={tmp_path} RECIPE=r SLURM_JOB_ID=7
TRAINING_ARGUMENTS=(--load /old --lr 1 --ckpt-step=5 --finetune --no-load-rng)
[[ "{expected}" != *optim* ]] || TRAINING_ARGUMENTS+=(--no-save-optim --no-load-optim)
compose_training ""
echo "${{TRAINING[*]}}"
"""
    result = subprocess.run(["bash", "-c", script], text=True, capture_output=True)
    assert result.stdout.strip().endswith(f"--wandb-save-dir {tmp_path} {expected}")


def test_evaluation_only_is_refused(site: Path) -> None:
    code, shown = launch(SCRIPTS[0], site, "--dry-run", "--", "--skip-train")
    assert code == 2 and "--skip-train" in shown


def test_rerun_request_shifts_the_ranks(tmp_path: Path) -> None:
    decide(tmp_path, 16)
    assert (tmp_path / "node_shift").read_text() == "1\n"
