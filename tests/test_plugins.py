"""Plugins: entry points of a tiny package, ``--plugin``, broken ones, and what a .qvit says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import quietvit
from quietvit import completion, plugins
from quietvit.decay import registry as regularizers
from quietvit.deployment import targets
from quietvit.errors import QuietvitError
from quietvit.quantization import list_methods, method
from test_cli import refused, run

PACKAGE = '''
import quietvit
from quietvit.decay import NormGainDecay
from quietvit.decay.gains import NormGainConfig
from quietvit.deployment import Target

@quietvit.register_method("tiny-max")
class TinyMax(quietvit.RTN):
    """RTN by another name."""

quietvit.register_regularizer("tiny_gains", NormGainConfig)(type("Tiny", (NormGainDecay,), {}))
quietvit.register_target(
    Target("tiny", suffix=".tiny", runtime="tiny", write=lambda export: export.facts, open=open)
)
'''
POINTS = """
[quietvit.methods]
tiny = tiny_pack
broken = tiny_pack.broken
taken = tiny_pack.taken

[quietvit.regularizers]
tiny = tiny_pack

[quietvit.targets]
tiny = tiny_pack
"""
TAKEN = '''
import quietvit

@quietvit.register_method("gptq")
class Mine(quietvit.RTN):
    """Wants the name of another one."""
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package ``tiny-pack`` with three plugins; all registries forget it later."""
    folder, facts = tmp_path / "tiny_pack", tmp_path / "tiny_pack-1.0.dist-info"
    folder.mkdir()
    facts.mkdir()
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "broken.py").write_text("raise TypeError('oh')\n")
    (folder / "taken.py").write_text(TAKEN)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(POINTS)
    (facts / "top_level.txt").write_text("tiny_pack\n")
    (facts / "RECORD").write_text("tiny_pack/__init__.py,,\n")
    list_methods()  # the library's own, which stay
    for table in (method._METHODS, regularizers._ENTRIES, targets._TARGETS):
        for name, entry in table.items():
            monkeypatch.setitem(table, name, entry)
    monkeypatch.setattr(plugins, "_found", {})
    plugins._packages.cache_clear()
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for table in (method._METHODS, regularizers._ENTRIES, targets._TARGETS):
        for name in [name for name in table if name.startswith("tiny")]:
            del table[name]  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.startswith("tiny_pack")]:
        del sys.modules[name]
    plugins._packages.cache_clear()


def test_entry_points_are_found_and_broken_ones_named(
    package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "tiny-max" in list_methods()
    assert len(list_methods()) == len(set(list_methods()))
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "the plugin 'broken' of the package tiny-pack" in told
    assert "TypeError: oh at " in told
    assert "broken.py, line 1" in told
    assert "'gptq' is registered already" in told
    assert len(caplog.records) == 2  # each once
    assert quietvit.quantization.get_method("gptq").__module__.startswith("quietvit.")
    with pytest.raises(QuietvitError, match=r"unknown .*'nope'.*--plugin.*'broken' of the package"):
        quietvit.quantization.get_method("nope")
    assert "tiny_gains" in [entry.name for entry in regularizers.registered_regularizers()]
    assert targets.target_of(Path("x.tiny")) is targets.target_named("tiny")


def test_a_file_says_which_package_its_method_needs(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    base = quietvit.quantization.get_method("tiny-max")()
    images = torch.randn(8, 3, 2, 2)
    for number, config in enumerate((base, quietvit.QwT(base=base))):
        own = quietvit.quantize(linear, config, images, progress=False)
        path = own.save(package / f"{number}.qvit")
        assert torch.equal(quietvit.load(path, linear)(images), own(images))
        with monkeypatch.context() as patch:
            patch.delitem(method._METHODS, "tiny-max")
            with pytest.raises(QuietvitError, match=r"\.qvit was .*'tiny-max'") as told:
                quietvit.load(path, linear)
        assert "Install the package tiny-pack, then import tiny_pack first" in str(told.value)
        assert "--plugin tiny_pack" in str(told.value)


def test_the_command_line_imports_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    (tmp_path / "tiny_mine.py").write_text(TAKEN)
    monkeypatch.setattr(plugins, "load_plugins", lambda group: [])
    for module in (method, regularizers, targets):
        monkeypatch.setattr(module, "load_plugins", lambda group: [])
    assert "no method matches" in refused(run("methods", "tiny*"))
    shown = run("methods", "tiny*", "--plugin", "tiny_pack", "--format", "csv")
    assert "tiny-max" in shown.stdout
    assert "No module named 'absent'" in refused(run("methods", "--plugin", "absent"))
    assert "line 1" in refused(run("methods", "--plugin", "tiny_pack.broken"))
    monkeypatch.chdir(tmp_path)
    assert "registered already" in refused(run("methods", "--plugin", "tiny_mine"))


def test_the_shell_completes_names() -> None:
    assert "rtn-omse,repq-vit+qwt" in completion.methods("rtn-omse,repq-vit+q")
    assert "rtn-omse" in completion.methods("rtn-")
    assert completion.recipes("digit") == ["digits"]
    assert completion.roles("post_soft") == ["post_softmax="]
    assert completion.targets("op") == ["openvino"]
    assert completion.devices("c") == ["cpu", "cuda"]
