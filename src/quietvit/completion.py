"""What the shell completes: recipes, methods, roles, targets and devices.

``quietvit --install-completion`` installs it. The options are in ``console`` and ``commands``.
"""

from __future__ import annotations

from collections.abc import Iterable


def recipes(incomplete: str) -> list[str]:
    """Names of the shipped recipes."""
    from quietvit.train.recipe import list_recipes

    return _starting(incomplete, list_recipes())


def methods(incomplete: str) -> list[str]:
    """Names of methods with their ranges. Complete the last part after a comma or a plus."""
    from quietvit.quantization import list_methods
    from quietvit.quantization.settings import method_forms

    at = max(incomplete.rfind(sign) for sign in ",+") + 1
    found = _starting(incomplete[at:], [*list_methods(), *method_forms()])
    return [incomplete[:at] + name for name in found]


def roles(incomplete: str) -> list[str]:
    """Roles for ``--keep``, and its presets."""
    from quietvit.quantization.overrides import PRESETS
    from quietvit.tracing.roles import ROLES

    return _starting(incomplete, [*(f"{role}=" for role in ROLES), *PRESETS])


def targets(incomplete: str) -> list[str]:
    """Names of export targets."""
    from quietvit.deployment.targets import registered_targets

    return _starting(incomplete, registered_targets())


def devices(incomplete: str) -> list[str]:
    """Names of devices, also of those that this machine lacks."""
    return _starting(incomplete, ("auto", "cpu", "cuda", "mps"))


def _starting(incomplete: str, names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))
