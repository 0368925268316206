from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/*.md"))
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SHELL = {"bash", "console", "sh", "shell", ""}


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def load_generator() -> Any:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "scripts" / "cli_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands_in(text: str) -> list[list[str]]:
    """Words of every `zscore …` call in the shell blocks of a page, from the word behind `zscore` on."""
    calls = []
    for language, block in FENCE.findall(text):
        if language not in SHELL:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True) if "zscore " in line else []
            if words and words[0].rpartition("/")[2] == "zscore":
                calls.append(words[1:])
    return calls


def problems_of(call: list[str], group: Any) -> list[str]:
    if not call or call[0].startswith("-"):
        known = {option for parameter in group.params for option in parameter.opts} | {"--help", "-h"}
        return [word for word in call if word not in known]
    if call[0] not in group.commands:
        return [call[0]]
    command = group.commands[call[0]]
    if hasattr(command, "commands"):  # a group of commands
        if call[1] not in command.commands:
            return [" ".join(call[:2])]
        command = command.commands[call[1]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    used = {word.split("=")[0] for word in call[1:] if re.match(r"--?[a-zA-Z]", word)}
    return sorted(used - known - {"--help", "-h"})


@pytest.fixture(scope="module")
def group() -> Any:
    from typer.main import get_command

    from zscore.cli.app import build_app

    return get_command(build_app())


def test_the_command_reference_is_what_the_commands_say() -> None:
    generator = load_generator()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == generator.render(), "run `make docs`"


def test_the_generator_writes_and_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = load_generator()
    monkeypatch.setattr(generator, "TARGET", tmp_path / "cli.md")
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", "--check"])
    assert generator.main() == 1
    monkeypatch.setattr(sys, "argv", ["cli_reference.py"])
    assert generator.main() == 0
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", "--check"])
    assert generator.main() == 0
    (tmp_path / "cli.md").write_text("older")
    assert generator.main() == 1


def test_every_command_has_a_section() -> None:
    from zscore.cli.app import COMMANDS, GROUPS

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    names = [*COMMANDS, *(f"{group} {name}" for group, (_, commands) in GROUPS.items() for name in commands)]
    assert [name for name in names if f"\n## zscore {name}\n" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "mailto:")):
            continue
        place, _, anchor = link.partition("#")
        target = page.parent / place if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_the_pages_exist(page: Path, group: Any) -> None:
    calls = commands_in(page.read_text(encoding="utf-8"))
    assert [(call, wrong) for call in calls if (wrong := problems_of(call, group))] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_in_the_pages_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))) <= targets


def test_the_readme_opens_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in lines if line.strip() and not line.startswith("```")][:2]
    assert [line.split("#")[0].strip() for line in shown] == ["make demo", "make test"]


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    modules = [path for path in (ROOT / "zscore").glob("*.py") if not path.name.startswith("__")]
    folders = [path for path in (ROOT / "zscore").iterdir() if path.is_dir() and (path / "__init__.py").exists()]
    engines = [path for path in (ROOT / "zscore" / "engines").glob("*.py") if not path.name.startswith("__")]
    names = [path.name for path in modules] + [f"{path.name}/" for path in folders]
    names += [f"engines/{path.name}" for path in engines]
    assert [name for name in names if name not in text] == []


def test_every_place_on_the_map_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("## Rooms")[2].partition("\n## ")[0]
    folders = [ROOT, ROOT / "zscore", ROOT / "trainers" / "zscore_trainers"]
    names = re.findall(r"`([a-z_/]+(?:\.py|/))`", table)
    assert [name for name in names if not any((folder / name).exists() for folder in folders)] == []


def test_decisions_are_numbered_and_settled() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(len(pages)))
    for page in pages[1:]:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(page.name[:4])}. "), page.name
        assert re.search(r"^Status: (proposed|accepted|replaced by ADR \d+)$", text, flags=re.MULTILINE), page.name
        assert anchors(page) >= {"context", "decision", "consequences"}, page.name


def test_no_help_shows_its_own_markup() -> None:
    """In a raw docstring the mark that keeps examples on lines of their own would be printed, and wouldn't work."""
    help_texts = load_generator().render()
    assert "\\b" not in help_texts
    assert "\n  Examples:\n    zscore report\n" in help_texts


def test_the_changelog_has_the_version_that_is_built() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_a_shell_block_holds_is_read_as_a_shell_would() -> None:
    page = "```console\n$ zscore score a/ \\\n    --out b.parquet  # why\n.venv/bin/zscore --version\nls\n```\n"
    page += "```python\nzscore nothing\n```\n"
    assert commands_in(page) == [["score", "a/", "--out", "b.parquet"], ["--version"]]


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (["score", "a/", "--out=b"], []),
        (["score", "a/", "--no-such-option"], ["--no-such-option"]),
        (["no-such-command"], ["no-such-command"]),
        (["--version"], []),
        (["--no"], ["--no"]),
    ],
)
def test_wrong_calls_are_seen(call: list[str], wrong: list[str], group: Any) -> None:
    assert problems_of(call, group) == wrong
