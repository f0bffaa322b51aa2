"""A real Slurm on this machine: four virtual nodes whose eight GPUs are empty files."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

NODES = ("n1", "n2", "n3", "n4")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")

_CONFIGURATION = """
ClusterName=let
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its credential expires, two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=5
# The machine's cores may be busy.
MessageTimeout=60
NodeName=n[1-4] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] \
CPUs=64 RealMemory=4000 Gres=gpu:a100:8 State=UNKNOWN
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why a cluster cannot be started here; None if it can."""
    absent = [program for program in _PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: bash tests/launch/install_slurm.sh"
    return None if os.geteuid() == 0 else "Slurm's daemons need root here"


def _free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    for first in range(17000, 30000, 50):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    probe = stack.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise RuntimeError("no free ports for Slurm")


class Cluster:
    """Slurm's daemons as child processes, and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons and wait until the nodes are idle."""
        self._write_files()
        folder = self.folder
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self._wait_for((folder / "munge.socket").exists, "munged")
        self._spawn("slurmctld", "-D", "-c")
        for node in NODES:
            self._spawn("slurmd", "-D", "-N", node)
        self._wait_for(lambda: self.command("sinfo", "-h", "-o", "%T") == "idle", "the nodes")

    def _write_files(self) -> None:
        for name in ("state", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        for index in range(8):
            (self.folder / f"gpu{index}").touch()
        first = _free_ports(1 + len(NODES))
        text = _CONFIGURATION.format(
            host=socket.gethostname(),
            folder=self.folder,
            port=first,
            first=first + 1,
            last=first + len(NODES),
        )
        (self.folder / "slurm.conf").write_text(text)
        gpus = f"NodeName=n[1-4] Name=gpu Type=a100 File={self.folder}/gpu[0-7]\n"
        (self.folder / "gres.conf").write_text(gpus)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)

    def _spawn(self, *command: str) -> None:
        log = (self.folder / f"{command[0]}.out").open("ab")
        # A separate session, so that Ctrl-C does not reach the daemons before `stop`; setpriv ends
        # them if the tests are killed.
        self._daemons.append(
            subprocess.Popen(
                ("setpriv", "--pdeathsig", "TERM", *command),
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )
        )  # fmt: skip

    def _wait_for(self, condition: object, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < deadline, f"{what} did not come up: see {self.folder}"
            time.sleep(0.2)

    def command(self, *command: str) -> str:
        """Return what one of Slurm's commands prints, repeating it for a minute while it fails."""
        deadline = time.monotonic() + 60
        while True:
            result = subprocess.run(command, env=self.environment, capture_output=True, text=True)
            if not result.returncode:
                return result.stdout.strip()
            assert time.monotonic() < deadline, f"{command}: {result.stderr}"
            time.sleep(0.5)

    def cancel_all(self) -> None:
        """Cancel all jobs and wait until they have ended."""
        deadline = time.monotonic() + 60
        while self.command("squeue", "-h") and time.monotonic() < deadline:
            self.command("scancel", "--user=root")
            time.sleep(0.2)

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons."""
        self.cancel_all()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
        self._kill_leftovers()

    def _kill_leftovers(self) -> None:
        """Kill what a failed test left, and only processes started here."""
        for process in psutil.process_iter(["name"]):
            with contextlib.suppress(psutil.Error):
                if self._is_ours(process):
                    process.kill()

    def _is_ours(self, process: psutil.Process) -> bool:
        # A step's daemon overwrites its environment with its title, but has a log of ours open.
        if process.info["name"] == "slurmstepd":
            folder = f"{self.folder}/"
            return any(file.path.startswith(folder) for file in process.open_files())
        return process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
