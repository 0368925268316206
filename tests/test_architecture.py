"""The rules of ARCHITECTURE.md that a program can hold."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("zscore", "kernels", "trainers", "scripts", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)
PACKAGES = ("zscore", "kernels/zscore_kernels", "trainers/zscore_trainers")
PACKAGED = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in {"zscore", "kernels", "trainers"}]
HEAVY = {"torch", "transformers", "vllm", "triton", "scipy", "pyarrow", "polars", "PIL", "fsspec"}

MAX_FILE = 400
MAX_BODY = 40
MAX_KERNEL_BODY = 100
MAX_POSITIONAL = 5


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the first statement behind the docstring: a long signature or explanation is no long function."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (function.end_lineno or 0) - body[0].lineno + 1 if body else 0


def is_jitted(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def tracked_texts() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    wanted = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".ini", ".sh", ".html", ""}
    return [path for path in paths if path.suffix in wanted and path.is_file()]


def test_imports_point_one_way(tmp_path: Path) -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--cache-dir", tmp_path, "--config", ROOT / ".importlinter"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "jaxtyping", "zscore_kernels", *sys.stdlib_module_names}
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, named(path)


def command_names() -> list[str]:
    from zscore.cli.app import COMMANDS

    return list(COMMANDS)


@pytest.mark.parametrize("command", ["", *command_names()])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys; from zscore.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    arguments = [*command.split(), "--help"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout
    assert not HEAVY & set(done.stderr.split())


def cpu_seconds(*arguments: str) -> float:
    """Least of five, since the machine may be busy."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_takes_at_most_300_ms_of_cpu() -> None:
    script = str(Path(sys.executable).with_name("zscore"))
    assert cpu_seconds(script, "--help") - cpu_seconds("-c", "pass") <= 0.3


def test_importing_the_library_imports_nothing_heavy() -> None:
    code = "import sys, zscore; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "vllm", "triton"} & set(done.stdout.split())


def test_the_public_api_is_exact() -> None:
    import zscore

    assert sorted(zscore.__all__) == ["Failure", "LevelDistribution", "Score", "Scorer", "ZscoreError"]
    for name in zscore.__all__:
        assert getattr(zscore, name) is not None
    with pytest.raises(AttributeError):
        _ = zscore.no_such_name


@pytest.mark.parametrize("package", PACKAGES)
def test_types_are_shipped(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_every_file_says_what_it_is_for() -> None:
    assert [named(path) for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))] == []


def test_files_are_short() -> None:
    sizes = {named(path): path.read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE} == {}


def test_functions_are_short() -> None:
    too_long = []
    for path in SOURCES:
        limit = MAX_KERNEL_BODY if "kernels" in path.relative_to(ROOT).parts else MAX_BODY
        plain = [function for function in functions(path) if not is_jitted(function)]
        too_long += [f"{named(path)}:{node.lineno} {node.name}" for node in plain if body_lines(node) > limit]
    assert too_long == []


def test_few_arguments_are_positional() -> None:
    too_many = []
    for path in SOURCES:
        if "cli" in path.parts:  # Typer reads options from the signature
            continue
        for node in functions(path):
            arguments = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            counted = [name for name in arguments if name not in {"self", "cls"}]
            if len(counted) > MAX_POSITIONAL and not is_jitted(node):
                too_many.append(f"{named(path)}:{node.lineno} {node.name}")
    assert too_many == []


def test_what_is_left_to_do_names_its_issue() -> None:
    promise = re.compile(r"\b(TODO|FIXME|XXX)\b(?!.*(#\d+|https://))")
    assert [named(path) for path in SOURCES if promise.search(path.read_text(encoding="utf-8"))] == []


def test_tests_are_at_least_as_long_as_what_they_test() -> None:
    def lines(paths: list[Path]) -> int:
        return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)

    assert lines(list((ROOT / "tests").rglob("*.py"))) >= lines(PACKAGED)


def test_no_file_names_a_private_machine() -> None:
    # Put together here, so that this file doesn't find itself.
    private = re.compile(
        "|".join(["/" + "work/", "/opt" + "/wheels", "/opt" + "/pypi", "/" + "root/", "/home" + r"/\w"])
    )
    found = [
        f"{named(path)}:{number}"
        for path in tracked_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if private.search(line)
    ]
    assert found == []
