from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, pointed at an empty .venv."""
    module = load_script()
    monkeypatch.setattr(module, "VENV", tmp_path)
    monkeypatch.setattr(module, "PYTHON", tmp_path / "bin" / "python")
    monkeypatch.setattr(module, "STAMP", tmp_path / "stamp.json")
    for name in ("UV_FIND_LINKS", "UV_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "SSL_CERT_FILE", "UV_HTTP_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    return module


def pip_says(script: Any, monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    answer = SimpleNamespace(stdout="\n".join(lines))
    monkeypatch.setattr(script.subprocess, "run", lambda *_args, **_options: answer)


def test_uv_looks_where_pip_looks(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip_says(
        script,
        monkeypatch,
        "global.cert='/etc/ca.pem'",
        "global.index-url='https://mirror.example/simple'",
        f"global.extra-index-url='https://a.example/simple\\nfile://{tmp_path} file://{tmp_path}/gone'",
        f"global.find-links='{tmp_path} /no/such/folder'",
        "global.timeout='60'",
    )
    found = script.uv_environment()
    assert found["SSL_CERT_FILE"] == "/etc/ca.pem"
    assert found["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert found["UV_EXTRA_INDEX_URL"] == f"https://a.example/simple file://{tmp_path}"
    assert found["UV_FIND_LINKS"] == str(tmp_path)
    assert found["UV_HTTP_TIMEOUT"] == "60"
    assert found["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_later_lines_of_pips_configuration_win(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_says(script, monkeypatch, "global.index-url='https://old'", ":env:.index-url='https://new'")
    assert script.uv_environment()["UV_DEFAULT_INDEX"] == "https://new"


def test_what_the_user_set_for_uv_goes_first(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://mine")
    pip_says(script, monkeypatch, "global.index-url='https://pip'")
    assert script.uv_environment()["UV_DEFAULT_INDEX"] == "https://mine"


def test_without_configuration_nothing_is_set(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_says(script, monkeypatch)
    assert not {"UV_DEFAULT_INDEX", "UV_FIND_LINKS", "UV_EXTRA_INDEX_URL"} & set(script.uv_environment())


@pytest.mark.parametrize(
    ("reachable", "links", "torch"),
    [
        (1, "/wheels", "torch==2.13.0+cpu"),
        (2, "/wheels,https://download.pytorch.org/whl/cpu/torch/", "torch==2.13.0+cpu"),
        (3, "/wheels", "torch==2.13.0"),
    ],
)
def test_the_cpu_build_is_looked_for_in_order(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    reachable: int,
    links: str,
    torch: str,
) -> None:
    tries: list[dict[str, str]] = []

    def probe(_command: list[str], env: dict[str, str], **_options: bool) -> SimpleNamespace:
        tries.append(env)
        return SimpleNamespace(returncode=0 if len(tries) == reachable else 1)

    monkeypatch.setattr(script.subprocess, "run", probe)
    environment, chosen = script.choose_torch({"UV_FIND_LINKS": "/wheels"}, "cpu")
    assert (environment["UV_FIND_LINKS"], chosen) == (links, torch)
    assert all(env["UV_HTTP_RETRIES"] == "0" for env in tries)
    assert "UV_HTTP_RETRIES" not in environment
    assert ("several GB" in capsys.readouterr().out) == (reachable == 3)


def test_with_a_gpu_the_plain_build_is_taken(script: Any) -> None:
    assert script.choose_torch({}, "cuda") == ({}, "torch==2.13.0")


@pytest.mark.parametrize(
    ("listing", "device"), [("GPU 0: NVIDIA H200 (UUID: …)", "cuda"), ("", "cpu"), ("No devices were found", "cpu")]
)
def test_a_gpu_is_one_that_answers(script: Any, monkeypatch: pytest.MonkeyPatch, listing: str, device: str) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    pip_says(script, monkeypatch, listing)
    assert script.has_nvidia() == device
    monkeypatch.setattr(script.shutil, "which", lambda _name: None)
    assert script.has_nvidia() == "cpu"


def fill(script: Any, stamp: str) -> None:
    (script.VENV / "bin").mkdir(exist_ok=True)
    (script.VENV / "bin" / "zscore").touch()
    script.PYTHON.touch()
    script.STAMP.write_text(stamp)


def test_everything_serves_as_base_but_not_the_other_way_round(script: Any) -> None:
    base = {"what": "base", "device": "cpu", "inputs": "1"}
    dev = {**base, "what": "dev"}
    assert not script.is_fresh(base)
    fill(script, '{"what": "dev", "device": "cpu", "inputs": "1"}')
    assert script.is_fresh(base)
    assert script.is_fresh(dev)
    fill(script, '{"what": "base", "device": "cpu", "inputs": "1"}')
    assert script.is_fresh(base)
    assert not script.is_fresh(dev)
    assert not script.is_fresh({**base, "inputs": "2"})
    assert not script.is_fresh({**base, "device": "cuda"})
    (script.VENV / "bin" / "zscore").unlink()
    assert not script.is_fresh(base)


def test_a_changed_pin_is_noticed(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script, "REQUIREMENTS", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    before = script.fingerprint()
    assert script.fingerprint() == before
    (tmp_path / "constraints.txt").write_text("torch==2.13.1\n")
    assert script.fingerprint() != before


def test_a_failure_leaves_no_stamp_and_its_own_exit_code(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script.STAMP.write_text("{}")
    monkeypatch.setattr(script.subprocess, "run", lambda *_args, **_options: SimpleNamespace(returncode=3, stdout=""))
    with pytest.raises(SystemExit, match="3"):
        script.install("base", "cpu")
    assert not script.STAMP.exists()


def test_another_python_is_refused_by_name(script: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(script, "SUPPORTED", ((4, 0), (5, 0)))
    monkeypatch.setattr(sys, "argv", ["install.py", "base"])
    assert script.main() == 2
    assert sys.executable in capsys.readouterr().out


def test_a_second_call_does_nothing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(script, "install", lambda what, _device: (calls.append(what), fill(script, "{}")))
    monkeypatch.setattr(sys, "argv", ["install.py", "base", "--device", "cpu"])
    assert (script.main(), script.main()) == (0, 0)
    assert calls == ["base"]


def test_make_help_names_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = [line for line in makefile.splitlines() if line.startswith(".PHONY:")]
    targets = phony.split()[1:]
    assert {"setup", "demo", "test", "lint", "type", "bench", "docs", "check"} <= set(targets)
    for target in targets:
        assert f"make {target} " in shown
