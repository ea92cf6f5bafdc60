"""The Python of the README and of the guide runs as it stands, block after block."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from quietvit import cli
from quietvit.quantization import methods_markdown
from quietvit.train.recipe import known_keys, list_recipes

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/getting-started.md", "docs/methods.md", "docs/deployment.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: str) -> list[tuple[int, str]]:
    """Line number in the page and source of every python block."""
    text = (ROOT / page).read_text("utf-8")
    return [(text.count("\n", 0, match.start(1)), match.group(1)) for match in BLOCK.finditer(text)]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(page)
    assert found, f"{page} shows no Python"
    if any("quietvit.export" in source for _, source in found):
        pytest.importorskip("onnxscript", reason="the page exports to ONNX")
        pytest.importorskip("onnxruntime", reason="the page runs what it exports")
    batch = (torch.rand(2, 3, 224, 224), torch.tensor([0, 1]))
    namespace: dict[str, object] = {"__name__": "docs", "loader": [batch, batch]}
    for line, source in found:
        code = compile("\n" * line + source, str(ROOT / page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize(
    "page", [*PAGES, "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_relative_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text("utf-8")):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_table_of_methods_is_the_one_the_command_prints() -> None:
    assert methods_markdown() in (ROOT / "docs/methods.md").read_text("utf-8")


def recipe_tables(guide: str) -> list[list[str]]:
    """The keys in the first column of each table whose first column is keys, a row a list."""
    tables = [part.partition("\n\n")[0] for part in re.split(r"^\| key \|", guide, flags=re.M)[1:]]
    rows = [row for table in tables for row in table.splitlines()[2:]]
    assert len(tables) > 2
    assert len(rows) > 20
    return [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]


def test_the_recipe_keys_of_the_guide_exist() -> None:
    known = set(known_keys()) | {"model.kwargs.*", "data.augmentation.*"}
    regularizers = [f"decay.{name}" for name in ("cd", "norm_gains", "weight", "s2d", "kure")]
    for first, *others in recipe_tables((ROOT / "docs/getting-started.md").read_text("utf-8")):
        section = first.rpartition(".")[0]
        for key in (first, *(section + key if key[0] == "." else key for key in others)):
            each = [key.replace("decay.<name>", name) for name in regularizers]
            assert set(each) <= known, key


def test_the_recipe_keys_set_on_command_lines_exist() -> None:
    pages = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]
    text = "\n".join((ROOT / page).read_text("utf-8") for page in pages).replace("\\\n", " ")
    text = re.sub(r"^quietvit quantize .*$", "", text, flags=re.M)  # fields of a method
    found = set(re.findall(r"(?:(?<!\w)-s|--set)[ =]'?([\w.]+)=", text))
    known = set(known_keys()) | {"key", "field"}
    kwargs = {key for key in found if key.startswith("model.kwargs.")}
    assert len(found) > 5
    assert found - kwargs <= known, sorted(found - kwargs - known)


def test_the_commands_and_options_named_exist() -> None:
    texts = [(ROOT / page).read_text("utf-8").replace("\\\n", " ") for page in PAGES]
    texts += [re.sub(r"\\\n#", " ", path.read_text("utf-8")) for path in list_recipes().values()]
    commands = get_command(cli.app).commands  # type: ignore[attr-defined]
    texts += [f"{command.epilog}" for command in commands.values()]
    calls = re.findall(r"^[#$ ]*quietvit ([a-z]+) (.*)$", "\n".join(texts), re.MULTILINE)
    assert len(calls) > 10
    for command, rest in calls:
        options = {name for option in commands[command].params for name in option.opts} | {"--help"}
        named = set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", f" {rest.partition('#')[0]}"))
        assert named <= options, f"quietvit {command}: {sorted(named - options)}"
