"""A real Slurm whose two nodes are this machine, for tests and demonstrations.

munged, slurmctld and two slurmd run in the foreground under the caller, with ports, folders and a
munge socket of their own, and are stopped by their process ids. Needs the packages ``slurm-wlm``
and ``munge`` (Debian, Ubuntu) but no service of the system, and no right that the caller lacks.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import psutil

NODES = ("n1", "n2")
_DAEMONS = ("munged", "slurmctld", "slurmd")
_CONFIG = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=30
SlurmdTimeout=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=16 \
RealMemory=8000
PartitionName=debug Nodes={nodes} Default=YES State=UP PriorityTier=1 GraceTime=60 \
PreemptMode=REQUEUE
PartitionName=urgent Nodes={nodes} State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_packages() -> str | None:
    """What has to be installed first, as a sentence; None where nothing has."""
    # Daemons are not on everybody's path.
    missing = [name for name in (*_DAEMONS, "sbatch") if not shutil.which(name, path=_PATH)]
    if missing:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    return None


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class LocalSlurm:
    """A running Slurm.

    Attributes:
        environment: for every command that is to talk to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf", "PATH": _PATH}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str) -> str:
        """The output of a command such as sbatch or scontrol."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
        return done.stdout

    def start(self) -> None:
        """Start the daemons and wait until both nodes are idle."""
        self._write_files()
        self._start_daemon("munged", "--foreground", "--force", *self._munge_files())
        self.wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start_daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self._states() == ["idle", "idle"], "both nodes to be idle")

    def start_node(self, node: str) -> None:
        self._start_daemon("slurmd", "-D", "-N", node, name=node)

    def lose_node(self, node: str) -> None:
        """What a power failure does: everything on the node is gone at once."""
        self._kill([self._daemons.pop(node), *self.processes(node=node)])
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def shorten_hold(self, job: str) -> None:
        """Let a job start soon that Slurm holds for two minutes since it was queued again.

        Not at once: a node refuses a job ("Job credential revoked") that starts in the second in
        which its attempt before was ended.
        """
        shown = self.run("scontrol", "show", "job", job)
        start = re.search(r"\bStartTime=([\d:T-]+)", shown)
        if "Reason=BeginTime" not in shown or not start:
            return
        if datetime.fromisoformat(start[1]) > datetime.now() + timedelta(seconds=5):
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def processes(self, job: str | None = None, node: str | None = None) -> list[psutil.Process]:
        """What runs under this Slurm beside its daemons: all, or of one job or node."""
        daemons = {daemon.pid for daemon in self._daemons.values()}
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            if (
                variables.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                and process.pid not in daemons
                and job in (None, variables.get("SLURM_JOB_ID"))
                and node in (None, variables.get("SLURMD_NODENAME"))
                and "SLURMD_NODENAME" in variables
            ):
                found.append(process)
        return found

    def stop(self) -> None:
        """End jobs, daemons and what is left of them."""
        if "slurmctld" in self._daemons:
            self.run("scancel", f"--user={_user()}")
        self._kill(self.processes())
        self._kill([*reversed(self._daemons.values()), *self.processes()])
        self._daemons.clear()

    def wait(self, condition: Callable[[], bool], what: str, limit: float = 60) -> None:
        """Until the condition holds.

        Raises:
            RuntimeError: it does not within the limit, or a daemon has ended.
        """
        ends = time.monotonic() + limit
        while not condition():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} ended with {daemon.returncode}:\n{self._log(name)}")
            if time.monotonic() > ends:
                raise RuntimeError(f"waited {limit:.0f} s for {what}")
            time.sleep(0.2)

    def _write_files(self) -> None:
        for name in ("state", "log", *NODES):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o400)
        config = _CONFIG.format(
            host=socket.gethostname(),
            user=_user(),
            folder=self.folder,
            ports=_free_ports(3),
            nodes="n[1-2]",
        )
        (self.folder / "slurm.conf").write_text(config)

    def _munge_files(self) -> Iterator[str]:
        for option, name in (
            ("socket", "munge.socket"),
            ("key-file", "munge.key"),
            ("pid-file", "munge.pid"),
            ("log-file", "log/munge.log"),
            ("seed-file", "munge.seed"),
        ):
            yield f"--{option}={self.folder}/{name}"

    def _start_daemon(self, program: str, *arguments: str, name: str | None = None) -> None:
        name = name or program
        with (self.folder / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                # They end with this process, also where it is killed.
                ["setpriv", "--pdeathsig", "KILL", program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _states(self) -> list[str]:
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=debug", "--format=%T"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    def _log(self, name: str) -> str:
        return (self.folder / "log" / f"{name}.out").read_text(errors="replace")[-3000:]

    def _kill(self, processes: list[psutil.Process | subprocess.Popen[bytes]]) -> None:
        for process in processes:
            try:
                process.kill()
            except (psutil.NoSuchProcess, ProcessLookupError):
                continue
        for process in processes:
            try:
                process.wait(10)
            except (psutil.Error, subprocess.TimeoutExpired):
                continue


@contextmanager
def local_slurm(folder: Path) -> Iterator[LocalSlurm]:
    """A Slurm for the length of a block. Its files and logs stay in ``folder``."""
    cluster = LocalSlurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    """A port for slurmctld, and neighbours for the nodes."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            start = first.getsockname()[1]
        ports = [start + offset for offset in range(count)]
        if all(_is_free(port) for port in ports):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
