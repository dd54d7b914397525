"""tools/report.py as it is called from a shell in the root of the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def report(*arguments):
    command = [sys.executable, "tools/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_report_is_written_into_the_run_folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    done = report(tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / name for name in ("report.png", "report.html", "report.json")]
    assert done.stdout.split() == [str(file) for file in files]
    assert all(file.stat().st_size for file in files)


@pytest.mark.parametrize(("content", "sentence"), [(None, "cannot read"), ("", "holds no record")])
def test_run_without_records_is_one_sentence_and_exit_code_2(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = report(tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert sentence in done.stderr and str(tmp_path) in done.stderr
