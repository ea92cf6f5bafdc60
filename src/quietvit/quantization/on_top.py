"""Methods that work on top of another one: ``QwT(base=RepQViT(weight_bits=4))``.

What each of them does is in its own file in ``methods``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, PlainSerializer, model_validator

from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.method import Method, get_method
from quietvit.quantization.slot import Slot
from quietvit.tracing import Trace

SHARED = (
    *("weight_bits", "activation_bits", "patch_embed_bits", "head_bits"),
    *("exclude", "overrides", "conv_output_bits"),
)


def _method(value: Any) -> Any:
    """Accept a config, the name of a method, or the dict of a saved file."""
    if isinstance(value, str):
        return get_method(value)()
    if isinstance(value, dict) and value.keys() == {"name", "fields"}:
        return get_method(value["name"])(**value["fields"])
    if not isinstance(value, Method):
        raise ValueError("give the config of a method, such as quietvit.RTN(weight_bits=4)")
    return value


def _stored(method: Method) -> dict[str, Any]:
    return {"name": method.name, "fields": method.model_dump()}


Base = Annotated[Method, BeforeValidator(_method), PlainSerializer(_stored)]


class OnTop(Method):
    """Base config of methods that refine the result of another method, ``base``.

    Bits, exclusions and overrides come from the base. Other values beside it raise an error.
    """

    default_base: ClassVar[str] = "rtn"

    base: Base = None  # type: ignore[assignment]  # ``_agree`` puts ``default_base`` there
    """Config of the method to refine; None takes ``default_base`` at the given bits."""

    @model_validator(mode="before")
    @classmethod
    def _agree(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        fields = dict(value)
        shared = {name: fields[name] for name in SHARED if name in fields}
        if fields.get("base") is None:
            fields["base"] = get_method(cls.default_base)(**shared)
        base = _method(fields["base"])
        if isinstance(fields["base"], str):
            base = type(base)(**shared)
        rebuilt = type(base)(**shared)
        for name in shared:
            have, wanted = getattr(base, name), getattr(rebuilt, name)
            if have != wanted:
                raise ValueError(
                    f"{name}={wanted!r} differs from the base's {have!r}; give bits, exclusions "
                    "and overrides to the base only"
                )
        return fields | {name: getattr(base, name) for name in SHARED} | {"base": base}

    def calibrate_base(self, calibration: Calibration) -> Calibrated:
        return self.base.calibrate(calibration)

    def slot_bits(self, slot: Slot) -> int | None:
        return self.base.slot_bits(slot)

    def may_learn_step(self, slot: Slot) -> bool:
        return self.base.may_learn_step(slot)

    def check_sites(self, trace: Trace) -> None:
        self.base.check_sites(trace)

    def why_float(self, slot: Slot) -> str:
        return self.base.why_float(slot)

    def policy(self) -> str:
        return f"{self.name} on top of {self.base.policy()}"
