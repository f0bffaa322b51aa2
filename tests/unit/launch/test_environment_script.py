"""launch/lib/environment.sh with fake Python, pip and uv: no network and no installation."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = Path("launch/lib/environment.sh")
# Programs that the script may call; Python is not one of them.
TOOLS = ["bash", "cat", "cksum", "cut", "dirname", "find", "flock", "grep", "mkdir", "mv", "rm"]
TOOLS += ["tail"]

# Answers the probe with a verdict, creates environments that hold a copy of itself, and mimics pip.
STUB_PYTHON = """\
#!/usr/bin/env bash
case "$*" in
*ensurepip*) echo "{verdict}" ;;
*"import sys, pip"*) exit 0 ;;
*"-m venv"*)
    mkdir -p "$4/bin" "$4/lib/python3.12/site-packages"
    cat "$0" >"$4/bin/python"
    chmod +x "$4/bin/python"
    echo "version = {version}" >"$4/pyvenv.cfg"
    ;;
*"-m pip install"*)
    echo "$*" >>"$STUB_CALLS"
    sleep "${{STUB_PIP_SECONDS:-0}}"
    if [[ -n ${{STUB_PIP_ERROR:-}} ]]; then echo "$STUB_PIP_ERROR"; exit 1; fi
    packages="$(dirname "$0")/../lib/python3.12/site-packages"
    mkdir -p "$packages/megatron/core/datasets"
    : >"$packages/megatron/core/datasets/${{STUB_HELPER:-helpers_cpp.so}}"
    ;;
esac
"""


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def stub_python(path: Path, version: str, refusal: str | None = None) -> Path:
    """Write a program that answers as Python `version`, or with `refusal` as the probe would."""
    verdict = f"no {refusal}" if refusal else f"ok {version} {path}"
    return write_program(path, STUB_PYTHON.format(verdict=verdict, version=version))


@dataclass
class Checkout:
    """A copy of the files that the script reads, with a separate PATH."""

    root: Path
    bin: Path
    calls: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    @property
    def stamp(self) -> Path:
        return self.venv / ".let-stamp"

    def environment(self, variables: dict[str, str]) -> dict[str, str]:
        home = str(self.root / "home")
        return {"PATH": str(self.bin), "HOME": home, "STUB_CALLS": str(self.calls), **variables}

    def command(self, *extras: str) -> list[str]:
        return [str(self.bin / "bash"), str(self.root / SCRIPT), *extras]

    def run(self, *extras: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*extras),
            env=self.environment(variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def shell(self, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run bash code in the checkout's root; the code sources the script."""
        return subprocess.run(
            [str(self.bin / "bash"), "-c", code],
            cwd=self.root,
            env=self.environment(variables),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def found(self, **variables: str) -> str:
        """Return the interpreter that the search selects."""
        return self.shell(f". {SCRIPT}; _environment_find_python", **variables).stdout.strip()

    def installs(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a checkout"
    for file in (SCRIPT, Path("setup.py"), Path("constraints.txt")):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, root / file)
    tools = tmp_path / "bin"
    tools.mkdir()
    # The stubs call the last three.
    for name in [*TOOLS, "chmod", "env", "sleep"]:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"the script calls {name}, which is not installed")
        (tools / name).symlink_to(path)
    return Checkout(root, tools, tmp_path / "calls")


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout whose environment has Python 3.12 and the extra `dev`."""
    stub_python(checkout.bin / "python3.12", "3.12.4")
    result = checkout.run("dev")
    assert result.returncode == 0, result.stderr
    assert len(checkout.installs()) == 1
    return checkout


def test_search_prefers_312_over_newer_ones_on_path(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.14", "3.14.0")
    stub_python(checkout.bin / "python3.13", "3.13.1")
    pyenv = checkout.root / "pyenv"
    wanted = stub_python(pyenv / "versions/3.12.7/bin/python", "3.12.7")
    assert checkout.found(PYENV_ROOT=str(pyenv)) == str(wanted)


def test_search_prefers_313_over_a_newer_one(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3", "3.14.0")
    wanted = stub_python(checkout.root / "home/.pyenv/versions/3.13.0/bin/python", "3.13.0")
    assert checkout.found() == str(wanted)


def test_search_skips_broken_and_unsuitable_interpreters(checkout: Checkout) -> None:
    write_program(checkout.bin / "python3.12", "#!/usr/bin/env bash\nexit 127\n")
    stub_python(checkout.bin / "python3", "3.12.4", "is Python 3.12.4 without the module ensurepip")
    wanted = stub_python(checkout.bin / "python3.13", "3.13.1")
    assert checkout.found() == str(wanted)


def test_search_falls_back_to_uv(checkout: Checkout) -> None:
    wanted = stub_python(checkout.root / "managed/python3.12", "3.12.4")
    uv = f'[[ "$*" == "python find --system 3.12" ]] && echo "{wanted}"'
    write_program(checkout.bin / "uv", f"#!/usr/bin/env bash\n{uv}\n")
    assert checkout.found() == str(wanted)


def test_python_variable_overrides_the_search_if_new_enough(checkout: Checkout) -> None:
    preferred = stub_python(checkout.bin / "python3.12", "3.12.4")
    asked = stub_python(checkout.root / "asked", "3.13.1")
    assert checkout.found(PYTHON=str(asked)) == str(asked)
    old = stub_python(checkout.root / "old", "3.11.7", "is Python 3.11.7")
    result = checkout.shell(f". {SCRIPT}; _environment_find_python", PYTHON=str(old))
    assert result.stdout.strip() == str(preferred)
    assert f"PYTHON={old} is Python 3.11.7: looking for another" in result.stderr


def test_no_python_prints_one_line_and_creates_nothing(
    checkout: Checkout,
) -> None:
    stub_python(checkout.bin / "python3", "3.11.7", "is Python 3.11.7")
    result = checkout.run("dev")
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "found no Python 3.12 or newer" in line
    assert f"{checkout.bin}/python3 is Python 3.11.7" in line
    assert "python3.12-venv" in line
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    ("before", "verdict"),
    [
        ("", f"ok {sys.version_info[0]}.{sys.version_info[1]}."),
        ("sys.version_info = (3, 11, 7)", "no is Python 3.11.7"),
        ("sys.modules['ensurepip'] = None", "without the module ensurepip"),
        ("sys.version_info = (3, 14, 0); os.environ['PATH'] = ''", "without a C++ compiler"),
    ],
    ids=["this-python", "too-old", "no-ensurepip", "no-wheel-and-no-compiler"],
)
def test_probe_accepts_or_gives_the_reason(checkout: Checkout, before: str, verdict: str) -> None:
    probe = checkout.shell(f'. {SCRIPT}; printf %s "$_ENVIRONMENT_PROBE"').stdout
    result = subprocess.run(
        [sys.executable, "-I", "-c", f"import os, sys\n{before}\n{probe}"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert verdict in result.stdout, result


def test_first_run_installs_and_prints_the_interpreter(ready: Checkout) -> None:
    (call,) = ready.installs()
    assert call.endswith("--constraint constraints.txt --editable .[dev]")
    result = ready.run("dev")
    assert result.stdout == f"{ready.venv}/bin/python\n"


def test_matching_stamp_skips_pip_and_search_within_2_seconds(ready: Checkout) -> None:
    (ready.bin / "python3.12").unlink()
    start = time.perf_counter()
    result = ready.run("dev")
    seconds = time.perf_counter() - start
    assert (result.returncode, result.stderr) == (0, "")
    assert ready.run().returncode == 0, "fewer extras than installed are satisfied"
    assert len(ready.installs()) == 1
    assert seconds < 2  # 0.02 s measured; the margin is for a busy machine


@pytest.mark.parametrize("name", ["setup.py", "constraints.txt", ".venv/pyvenv.cfg"])
def test_stale_stamp_installs_again(ready: Checkout, name: str) -> None:
    with (ready.root / name).open("a") as file:
        file.write("# changed\n")
    assert ready.run().returncode == 0
    assert ready.installs()[1].endswith(".[dev]"), "extras asked for earlier are kept"
    assert ready.run().returncode == 0
    assert len(ready.installs()) == 2


def test_new_extra_is_added_to_installed_ones(ready: Checkout) -> None:
    assert ready.run("evaluation").returncode == 0
    assert ready.installs()[1].endswith(".[dev,evaluation]")
    assert ready.run("evaluation", "dev").returncode == 0
    assert len(ready.installs()) == 2


def test_unknown_extra_fails(checkout: Checkout) -> None:
    result = checkout.run("devel")
    assert result.returncode != 0
    assert "no extra 'devel'" in result.stderr
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    ("pip_says", "remedy"),
    [
        ("ERROR: [Errno 28] No space left on device", "free about 10 GB"),
        ("Failed to establish a new connection: [Errno -2]", "check the network"),
        ("error: something else", "the lines above say why"),
    ],
    ids=["disk", "network", "other"],
)
def test_failed_pip_prints_a_remedy_and_is_repeated(
    checkout: Checkout, pip_says: str, remedy: str
) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    result = checkout.run(STUB_PIP_ERROR=pip_says)
    assert result.returncode != 0
    *_, shown, sentence = result.stderr.splitlines()
    assert shown == pip_says
    assert remedy in sentence
    assert not checkout.stamp.exists()
    assert checkout.run().returncode == 0
    assert len(checkout.installs()) == 2


def test_half_installed_package_is_removed_before_reinstall(ready: Checkout) -> None:
    packages = ready.venv / "lib/python3.12/site-packages"
    for name, files in {"half": ["METADATA", "RECORD"], "whole": ["METADATA", "INSTALLER"]}.items():
        (packages / f"{name}-1.0.dist-info").mkdir()
        for file in files:
            (packages / f"{name}-1.0.dist-info" / file).touch()
    ready.stamp.unlink()
    assert ready.run().returncode == 0
    assert len(ready.installs()) == 2
    assert [path.name for path in packages.glob("*.dist-info")] == ["whole-1.0.dist-info"]


def test_failed_update_is_repeated_after_its_cause_is_reverted(ready: Checkout) -> None:
    constraints = ready.root / "constraints.txt"
    text = constraints.read_text()
    constraints.write_text("# changed\n")
    assert ready.run(STUB_PIP_ERROR="interrupted halfway").returncode != 0
    constraints.write_text(text)
    assert ready.run().returncode == 0
    assert len(ready.installs()) == 3


def test_missing_dataset_helper_fails(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.14", "3.14.0")
    result = checkout.run(STUB_HELPER="not_compiled")
    assert result.returncode != 0
    assert "dataset helper did not compile" in result.stderr
    assert not checkout.stamp.exists()


def test_environment_without_stamp_is_kept_and_completed(ready: Checkout) -> None:
    ready.stamp.unlink()
    kept = ready.venv / "lib/kept"
    kept.touch()
    result = ready.run("dev")
    assert result.returncode == 0
    assert "making" not in result.stderr
    assert kept.exists()
    assert ready.stamp.exists()


def test_copied_checkout_recreates_its_environment(ready: Checkout) -> None:
    (ready.venv / "lib/of-the-original").touch()
    copy = Checkout(ready.root.with_name("another checkout"), ready.bin, ready.calls)
    shutil.copytree(ready.root, copy.root)
    result = copy.run("dev")
    assert result.returncode == 0, result.stderr
    assert f"{copy.venv} is a copy of {ready.venv}" in result.stderr
    assert not (copy.venv / "lib/of-the-original").exists()
    assert ready.run("dev").stderr == ""


def test_link_to_the_environment_of_another_checkout_fails_and_keeps_it(ready: Checkout) -> None:
    kept = ready.venv / "lib/of-the-original"
    kept.touch()
    other = Checkout(ready.root.with_name("another checkout"), ready.bin, ready.calls)
    shutil.copytree(ready.root, other.root, ignore=shutil.ignore_patterns(".venv"))
    other.venv.symlink_to(ready.venv)
    result = other.run("dev")
    assert result.returncode != 0
    assert f"{other.venv} is a link to {ready.venv}" in result.stderr
    assert kept.exists() and ready.run("dev").stderr == ""


def test_folder_that_is_not_an_environment_fails(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    other = checkout.root / "thesis"
    other.mkdir()
    (other / "chapter").touch()
    result = checkout.run(LET_VENV=str(other))
    assert result.returncode != 0
    assert "holds files but is no Python environment" in result.stderr
    assert [path.name for path in other.iterdir()] == ["chapter"]


def test_partly_created_environment_is_completed(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    (checkout.venv / "bin").mkdir(parents=True)
    (checkout.venv / ".let-lock").touch()
    assert checkout.run().returncode == 0


def test_relative_let_venv_is_resolved(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    code = f'. {SCRIPT}; ensure_environment && echo "$LET_PYTHON"'
    result = checkout.shell(code, LET_VENV="elsewhere")
    assert result.stdout == f"{checkout.root}/elsewhere/bin/python\n"
    assert not checkout.venv.exists()


def test_concurrent_callers_install_once(checkout: Checkout) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    environment = checkout.environment({"STUB_PIP_SECONDS": "1"})
    callers = [
        subprocess.Popen(checkout.command("dev"), env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [caller.communicate(timeout=60)[1].decode() for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0], errors
    assert len(checkout.installs()) == 1


def test_second_caller_waits_for_the_lock(ready: Checkout) -> None:
    ready.stamp.unlink()
    with (ready.venv / ".let-lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        caller = subprocess.Popen(
            ready.command(), env=ready.environment({}), stderr=subprocess.PIPE, text=True
        )
        assert caller.stderr is not None
        assert "waiting for another process" in caller.stderr.readline()
        assert len(ready.installs()) == 1
    _, errors = caller.communicate(timeout=60)
    assert caller.returncode == 0, errors
    assert len(ready.installs()) == 2


@pytest.mark.parametrize("options", ["", "set -euo pipefail; "], ids=["plain", "strict"])
def test_sourcing_sets_let_python_and_keeps_the_shell_options(
    checkout: Checkout, options: str
) -> None:
    stub_python(checkout.bin / "python3.12", "3.12.4")
    before = checkout.shell(f'{options}echo "$-"').stdout
    code = f'{options}. {SCRIPT}; ensure_environment dev && echo "$-"; echo "$LET_PYTHON"'
    result = checkout.shell(code)
    assert result.stdout == f"{before}{checkout.venv}/bin/python\n", result.stderr


def test_strict_caller_stops_when_the_environment_fails(checkout: Checkout) -> None:
    result = checkout.shell(f"set -euo pipefail; . {SCRIPT}; ensure_environment; echo reached")
    assert result.returncode != 0
    assert result.stdout == ""


def test_script_is_executable() -> None:
    assert os.access(ROOT / SCRIPT, os.X_OK)
