"""Laws of the package as a whole: what an import loads, what is declared, where imports point."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import quietvit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "quietvit"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
EXTRAS = {
    "lightning",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pycocotools",
    "pytorch_lightning",
    "torchao",
    "transformers",
}
HEAVY = {"accelerate", "matplotlib", "pyarrow", "sklearn", "tensorboard", "timm", "torchvision"}


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(statement: str) -> set[str]:
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    return {name.partition(".")[0] for name in json.loads(run_python(code).splitlines()[-1])}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in a tree."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def imports_when_loaded(tree: ast.Module) -> Iterator[str]:
    """The same, leaving out function bodies and what stands under ``if TYPE_CHECKING``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ClassDef):
            members = [part for part in node.body if not isinstance(part, ast.FunctionDef)]
            yield from imports(ast.Module(members, []))
        else:
            yield from imports(node)


def test_import_loads_no_extra_and_nothing_heavy() -> None:
    loaded = loaded_after("import quietvit")
    assert "quietvit" in loaded
    assert not loaded & (EXTRAS | HEAVY | {"torch", "numpy"})


def test_every_public_name_resolves_without_extras() -> None:
    run_python(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))\n"
        "import quietvit\n"
        "for name in quietvit.__all__: assert getattr(quietvit, name) is not None, name\n"
    )


def test_packages_that_the_pages_name_are_attributes() -> None:
    """``import quietvit`` is enough for ``quietvit.detection.hf_detector``, on any page."""
    pages = [*SOURCE.parents[1].glob("docs/**/*.md"), SOURCE.parents[1] / "README.md"]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    named = packages & set(re.findall(r"quietvit\.(\w+)\.\w+", text))
    assert {"detection", "decay"} <= named
    script = "import quietvit\nfor name in {!r}: getattr(quietvit, name)\n"
    run_python(script.format(sorted(named)))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_extras_are_imported_inside_functions_only(path: Path) -> None:
    found = set(imports_when_loaded(ast.parse(path.read_text("utf-8"))))
    assert not found & EXTRAS, f"{path}: import {sorted(found & EXTRAS)} where they are needed"


def test_every_import_is_declared() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for lines in PROJECT["optional-dependencies"].values():
        declared |= {canonicalize_name(Requirement(line).name) for line in lines}
    providers = importlib.metadata.packages_distributions()
    for path in modules():
        for name in imports(ast.parse(path.read_text("utf-8"))):
            if name in sys.stdlib_module_names or name == "quietvit":
                continue
            distributions = {canonicalize_name(found) for found in providers.get(name, [name])}
            assert distributions & declared, f"{path} imports {name}, which pyproject.toml lacks"


def test_lower_bounds_match_the_constraints_file() -> None:
    pinned = {}
    for line in (ROOT / "requirements" / "lower-bounds.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[canonicalize_name(name)] = Version(version)
    claimed: dict[str, Version] = {}
    extras = {
        name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "dev"
    }
    for requirement in map(Requirement, chain(PROJECT["dependencies"], *extras.values())):
        (bound,) = [part for part in requirement.specifier if part.operator == ">="]
        name, version = canonicalize_name(requirement.name), Version(bound.version)
        assert claimed.setdefault(name, version) == version, f"two bounds of {name}"
    assert claimed == pinned
    (installed,) = [line for line in MAKEFILE.splitlines() if line.strip().startswith("--editable")]
    assert set(extras) | {"dev"} == set(installed.partition("[")[2].partition("]")[0].split(","))


def test_make_takes_torch_from_its_own_index_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAKEFLAGS", "MFLAGS", "TORCH_INDEX"):  # of the make that runs this test
        monkeypatch.delenv(name, raising=False)

    def printed(*settings: str) -> str:
        command = ["make", "-n", "demo", "VENV=nowhere", *settings]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    text = printed("TORCH_INDEX=https://host/cpu")
    first, second = re.findall(r'"nowhere/bin/python" -m pip install (.*)', text)
    assert first.split() == ["--index-url", '"https://host/cpu"', "torch", "torchvision"]
    assert second.startswith("--editable")
    assert "about 7 GB" in printed()
    assert "--index-url" not in printed()


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_verb"):
        quietvit.no_such_verb  # noqa: B018
    assert set(quietvit.__all__) <= set(dir(quietvit))


def test_package_is_typed() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_imports_point_downwards() -> None:
    pytest.importorskip("importlinter.cli")
    code = (
        "import sys; from importlinter.cli import lint_imports; "
        f"sys.exit(lint_imports(config_filename={str(ROOT / 'pyproject.toml')!r}, no_cache=True))"
    )  # in a process of its own, since import-linter silences the loggers of this one
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_modules_import_each_other() -> None:
    """Imports lead in no circle, whatever its length.

    Imports inside functions and under ``if TYPE_CHECKING`` count like all others, since each of
    them makes a reader go round too. The module ``quietvit`` is left out: it names what is public
    of every room, and modules read their version there.
    """
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("quietvit", cache_dir=None)
    imported = {
        module: graph.find_modules_directly_imported_by(module) - {"quietvit"}
        for module in graph.modules - {"quietvit"}
    }
    graphlib.TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle


def test_a_release_has_absolute_links_and_the_address_of_its_repository(monkeypatch):
    """A package index shows the README without the repository."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    hook = build.CustomMetadataHook(str(ROOT), {})
    readme = (ROOT / "README.md").read_text("utf-8")
    monkeypatch.delenv("QUIETVIT_URL", raising=False)
    hook.update(plain := {"version": "1.2.3"})
    assert (plain["readme"]["text"], plain["urls"]) == (readme, {})
    monkeypatch.setenv("QUIETVIT_URL", "https://git.example/us/quietvit/")
    hook.update(released := {"version": "1.2.3"})
    assert released["urls"]["Homepage"] == "https://git.example/us/quietvit"
    targets = re.findall(r"\]\(([^)]*)\)", released["readme"]["text"])
    assert len(targets) == len(re.findall(r"\]\(([^)]*)\)", readme)) > 20
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert "https://git.example/us/quietvit/raw/v1.2.3/docs/evidence.png" in targets
    assert "https://git.example/us/quietvit/blob/v1.2.3/docs/qat.md#what-it-gains" in targets
    monkeypatch.setenv("QUIETVIT_URL", "git.example")
    with pytest.raises(ValueError, match="give an address with https"):
        hook.update({"version": "1.2.3"})
