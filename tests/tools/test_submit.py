"""tools/submit.py without a Slurm: what it checks, and the scripts that it writes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_m1.cluster.programs import PROGRAMS
from megatron_m1.cluster.script import LAUNCHERS
from megatron_m1.config_loading import CONF
from megatron_m1.errors import EXIT_HANG, EXIT_INPUT, EXIT_STOPPED, EXIT_USAGE
from tests.docs.test_docs import commands
from tools import submit

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/cluster.md"
CLUSTERS = sorted(path.stem for path in (CONF / "cluster").glob("*.yaml"))
TRAIN = ("experiment=text01_456b", "data.train=[data/a]")
ARGUMENTS = {
    "pretrain": ("model=tiny", "train.global_batch=64"),
    "train_rl": ("experiment=rl_tiny", "rl.prompts_per_batch=64"),
    "score": ("checkpoint.load=runs/a", "tokens=a.npy", "out=b.npy"),
    "convert": ("--", "import", "--hf", "a", "--out", "b"),
}
ONE_PROCESS = ("cluster.gpus_per_node=0", "cluster.processes_per_node=1")

Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    """The script that ``--dry-run`` shows."""

    def run(*words: str) -> str:
        code = submit.main(["--dry-run", *words])
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, "")
        return printed.out

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Shown:
    """The sentences with which a job is refused."""

    def run(*words: str) -> str:
        assert submit.main(list(words)) == EXIT_USAGE
        printed = capsys.readouterr()
        assert printed.out == ""
        return printed.err

    return run


def options(script: str) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE)


def launched(script: str) -> list[str]:
    """The words of the program as bash reads them."""
    (line,) = re.findall(r"^launch env .* -u \\\n(.*)$", script, re.MULTILINE)
    printed = ["bash", "-c", f"printf '%s\\0' {line}"]
    done = subprocess.run(printed, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_script_is_one_that_bash_reads(
    cluster: str, program: str, launcher: str, shown: Shown, tmp_path: Path
) -> None:
    site = ONE_PROCESS if program == "convert" else ()
    script = shown(
        *(f"cluster={cluster}", "nodes=1", *site, "--launcher", launcher, "--program", program),
        *ARGUMENTS[program],
    )
    text = "#!/bin/bash" + script.split("#!/bin/bash")[1]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert text.endswith("ending $?\n")
    assert ("--signal=USR1@" in text) == (program in ("pretrain", "train_rl"))


def test_sixty_four_nodes_of_h800(shown: Shown) -> None:
    script = shown("cluster=h800", "nodes=64", *TRAIN)
    assert script.startswith("512 processes = pp 8 x dp 8 x cp 1 x tp 8")
    assert "GiB on the fullest process" in script.split("#!/bin/bash")[0]
    assert options(script) == [
        *("--job-name=pretrain-m1_456b", "--nodes=64", "--ntasks-per-node=1"),
        *("--gpus-per-node=8", "--mem=0", "--time=24:00:00", "--exclusive", "--signal=USR1@900"),
        *("--requeue", f"--output={ROOT}/runs/text01_456b/slurm/%j.out", "--open-mode=append"),
    ]
    assert "export NCCL_IB_HCA=mlx5" in script
    assert "--nproc-per-node=8" in script
    assert "tools/doctor.py --nodes=64 --gpus=8 \\\n  --folder=runs/text01_456b" in script
    assert launched(script)[-1] == "world_size=512"


def test_srun_starts_a_task_for_each_gpu(shown: Shown) -> None:
    script = shown(
        "cluster=h800", "nodes=64", "--launcher", "srun", "cluster.cpus_per_node=96", *TRAIN
    )
    assert {"--ntasks-per-node=8", "--cpus-per-task=12"} <= set(options(script))
    assert "RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS" in script
    assert "cluster.agent" not in script


def test_settings_of_a_site(shown: Shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M1_CONTAINER", "images/m1.sqsh")
    script = shown(
        *("cluster=h800", "nodes=64", "cluster.partition=big", "cluster.account=a1"),
        *("cluster.qos=high", "cluster.exclude=n[3,7]", "cluster.sbatch=['--switches=1']"),
        *("cluster.container.mounts=[/data:/data,/runs]", "cluster.container.workdir=/code/m1"),
        *("cluster.srun=['--mpi=none']", "cluster.setup=['module load a']", *TRAIN),
    )
    given = {"--partition=big", "--account=a1", "--qos=high", "--exclude=n[3,7]", "--switches=1"}
    assert given <= set(options(script))
    assert (
        "--kill-on-bad-exit=1 --container-image=images/m1.sqsh --container-workdir=/code/m1 "
        "--container-mounts=/data:/data,/runs --mpi=none"
    ) in script
    assert "\nmodule load a\n" in script
    # A container has an interpreter of its own.
    assert "\nM1_PYTHON=python\n" in script


def test_what_the_environment_says_goes_first(shown: Shown) -> None:
    script = shown("cluster=h800", "nodes=64", *TRAIN)
    (line,) = re.findall(r"^.*NCCL_IB_HCA.*$", script, re.MULTILINE)
    for given, expected in (({}, "mlx5"), ({"NCCL_IB_HCA": "mlx5_2"}, "mlx5_2")):
        command = ["bash", "-uc", f'{line}\necho "$NCCL_IB_HCA"']
        done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
        assert done.stdout == f"{expected}\n"


@pytest.mark.parametrize("text", ['it\'s a "test" $HOME `date`', "a\\b; exit 1", "f(x, {y: 2})"])
def test_overrides_reach_the_program_unchanged(text: str, shown: Shown) -> None:
    script = shown("cluster=local", "model=tiny", f"train.sample_prompt={text}")
    assert f"train.sample_prompt={text}" in launched(script)


def test_a_chain_is_an_array_of_which_one_runs_at_a_time(shown: Shown) -> None:
    script = shown("cluster=local", "model=tiny", "--chain", "5")
    assert "--array=1-5%1" in options(script)
    assert any(option.endswith("/%A_%a.out") for option in options(script))
    assert 'scancel --quiet --state=PENDING "$SLURM_ARRAY_JOB_ID"' in script


def test_requeue_is_the_sites(shown: Shown) -> None:
    assert "scontrol requeue" in shown("cluster=local", "model=tiny")
    script = shown("cluster=local", "model=tiny", "cluster.requeue=false")
    assert "--no-requeue" in options(script) and "scontrol requeue" not in script


def test_a_layout_that_does_not_fit_the_nodes_is_refused(refused: Shown) -> None:
    errors = refused("cluster=h800", "nodes=3", *TRAIN)
    assert errors.splitlines() == [
        f"error: 24 processes cannot be divided by parallel.{factors} = 64: start a multiple of 64"
        for factors in ("tp*cp*pp = 8*1*8", "etp*ep*pp = 1*8*8")
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=tiny"], "cluster is missing: give cluster=NAME, one of h800, local"),
        (["cluster=h801"], "cluster=h801 is not one of h800, local"),
        (["cluster=local", "nodes=0"], "nodes=0 must be at least 1"),
        (["cluster=local", "--chain", "0"], "--chain 0 must be at least 1"),
        (["cluster=local", "cluster.partitoin=a"], "did you mean cluster.partition?"),
        (["cluster=local", "cluster.time_limit=soon"], "cluster.time_limit=soon is not MINUTES or"),
        (["cluster=local", "cluster.signal_lead=0"], "cluster.signal_lead=0 must be at least 1"),
        (["cluster=local", "cluster.sbatch=[a]"], "cluster.sbatch: a does not begin with a dash"),
        (["cluster=h800", "cluster.processes_per_node=4"], "each process has a GPU of its own"),
        (["cluster=local", "modle=tiny"], "unknown key modle: did you mean model?"),
        (["cluster=local", "data=indexed"], "data.train is empty"),
        (["cluster=local", "dry_run=true"], "dry_run=true trains nothing"),
        (["cluster=local", "--program", "score"], "checkpoint.load is missing"),
        (
            ["cluster=h800", "--program", "convert", "--", "verify", "--ckpt", "a", "--hf", "b"],
            "a conversion is one process with --workers of its own, not 8",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(
    words: list[str], sentence: str, refused: Shown
) -> None:
    assert sentence in refused(*words)


def test_the_arguments_of_a_conversion_are_those_of_its_tool(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        submit.main(["cluster=local", "--program", "convert", "--", "import", "--hf"])
    assert "argument --hf: expected one argument" in capsys.readouterr().err


def test_without_slurm_there_is_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit.main(["cluster=local", "model=tiny", f"run_dir={tmp_path}/run"]) == EXIT_INPUT
    assert "error: sbatch is not here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_no_torch_is_needed() -> None:
    code = "import sys, tools.submit; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


COMMANDS = [
    command[command.index("tools/submit.py") + 1 :]
    for command in commands(PAGE)
    if "tools/submit.py" in command
]


@pytest.mark.parametrize("words", COMMANDS, ids=shlex.join)
def test_the_pages_commands_make_jobs(words: list[str], shown: Shown) -> None:
    assert "#!/bin/bash" in shown(*[word for word in words if word != "--dry-run"])


STUBS = """
say() { echo "$*"; }
step() { echo "step: ${*: -2}"; }
squeue() { echo RUNNING; }
scontrol() { echo "scontrol $*"; }
SLURM_JOB_ID=7 M1_PYTHON=python M1_ATTEMPT=attempt restarts=0
"""


def ended(script: str, code: int) -> list[str]:
    """What a job says and does when its program ends with a code."""
    body = script[script.index("ending() {") : script.index('say "pretrain on')]
    done = subprocess.run(
        ["bash", "-c", f"{STUBS}\n{body}\nending {code}"], capture_output=True, text=True
    )
    assert done.returncode == code
    return done.stdout.splitlines()


def test_a_hang_names_its_failure_and_is_queued_again(shown: Shown) -> None:
    script = shown("cluster=local", "model=tiny")
    summary = "step: megatron_m1.cluster.failures attempt"
    assert ended(script, EXIT_HANG) == [summary, "hung: queued again", "scontrol requeue 7"]
    assert ended(script, EXIT_STOPPED) == ["stopped and saved: queued again", "scontrol requeue 7"]
    assert ended(script, 1) == ["failed with exit code 1", summary]
