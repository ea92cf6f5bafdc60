"""The base of all quantization methods: the frozen config, what it declares, and the registry.

Each method is one file in ``methods``, and is registered from there automatically.
"""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError

from quietvit.errors import QuietvitError, nearest
from quietvit.plugins import METHODS, load_plugins
from quietvit.quantization.calibrated import Calibrated
from quietvit.quantization.calibration import Calibration
from quietvit.quantization.overrides import Overrides, OverridesField
from quietvit.quantization.quantizers import MAX_BITS, MIN_BITS
from quietvit.quantization.slot import Slot
from quietvit.signatures import ReadableModel
from quietvit.tracing import MATMUL_KINDS, Site, Trace


def _bits(value: Any) -> Any:
    if value is None:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        raise ValueError(f"bits are an integer from {MIN_BITS} to {MAX_BITS}, or None for float")
    return value


def _edge_bits(value: Any) -> Any:
    if value == "same":
        return value
    try:
        return _bits(value)
    except ValueError as error:
        raise ValueError(f"{error}, or 'same' for the working bits") from None


def _patterns(value: Any) -> Any:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple | set | frozenset):
        raise ValueError("give a pattern of site names, or a sequence of them, such as ('head',)")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


Bits = Annotated[int | None, BeforeValidator(_bits)]
EdgeBits = Annotated[int | Literal["same"] | None, BeforeValidator(_edge_bits)]
Granularity = Literal["per_tensor", "per_channel"]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns)]


def between(low: float, high: float) -> AfterValidator:
    """Field annotation: a number in (low, high]."""

    def check(value: float) -> float:
        if not low < value <= high:
            raise ValueError(f"must be above {low:g} and at most {high:g}")
        return value

    return AfterValidator(check)


class Method(ReadableModel):
    """Base config of all methods: frozen, without unknown fields, validated when it is built.

    To add a method, write a subclass with ``calibrate`` and decorate it with
    ``@register_method("its-name")``. Its class variables fill the tables of methods.

    Raises QuietvitError for an unknown field (names the nearest one) or a value out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: ClassVar[str] = ""
    """Set by ``register_method``."""
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ("images",)
    """What it needs: ``images``, ``gradients``."""
    cost: ClassVar[str] = "seconds"
    deployable: ClassVar[bool] = True
    """Whether standard integer kernels compute with its codes."""
    published: ClassVar[str] = ""
    """The setting and the figures of the paper."""
    images: ClassVar[int] = 32
    """Calibration images of the published setting."""
    kinds: ClassVar[frozenset[str]] = MATMUL_KINDS
    """Kinds of sites that the method quantizes."""

    weight_bits: Bits = 8
    """Bits of weights, 2 to 16; None keeps them all in float."""
    activation_bits: Bits = 8
    """Bits of activations, 2 to 16; None keeps them all in float."""
    patch_embed_bits: EdgeBits = 8
    """Bits of both operands of the first layer: a number, None for float, or ``"same"``."""
    head_bits: EdgeBits = 8
    """Bits of both operands of the last layer, like ``patch_embed_bits``."""
    exclude: Patterns = ()
    """fnmatch patterns of site names that stay float."""
    overrides: OverridesField = Overrides()
    """Bits of single roles or sites. They replace all bits above, but ``exclude`` comes first.

    A mapping from a role of the trace (``post_softmax``) or an fnmatch pattern of site names to an
    int, ``"float"``, ``"same"`` (the working bits) or ``"W4A8"``; or the name of a preset
    (``"attention-maps-8"``). An operand's role means that operand; a site's role means both its
    operands. A full site name wins over patterns, and patterns win over roles.
    """
    conv_output_bits: Bits = None
    """Bits of the outputs of convolutions, after BatchNorm and ReLU; None keeps them in float.

    It applies only to outputs that nothing else quantizes. onnxruntime computes a convolution in
    integers only if its output is quantized, or if it cuts an image into separate patches.
    """

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise QuietvitError(_explain(type(self), error)) from None

    @abstractmethod
    def calibrate(self, calibration: Calibration) -> Calibrated:
        """Choose quantizers, adjustments and compensations; note what was left out.

        ``calibration.model`` is a private copy, so its weights may be changed.
        """

    def slot_bits(self, slot: Slot) -> int | None:
        """Bits of an operand, None for float. Every method decides bits only here.

        ``exclude`` comes first, then ``overrides``, then ``working_bits``.
        """
        if self.excluded_by(slot.site) is not None:
            return None
        key = self.overrides.key_for(slot)
        if key is None:
            return self.working_bits(slot)
        working = self.weight_bits if slot.is_weight else self.activation_bits
        bits = self.overrides.bits(key, slot)
        return working if bits == "same" else bits

    def working_bits(self, slot: Slot) -> int | None:
        """Bits of an operand that is neither excluded nor overridden. Subclasses may refine it."""
        working = self.weight_bits if slot.is_weight else self.activation_bits
        if working is None:
            return None
        edge = {"patch_embed": self.patch_embed_bits, "head": self.head_bits}
        bits = edge.get(slot.site.role, "same")
        return working if bits == "same" else bits

    def may_learn_step(self, slot: Slot) -> bool:
        """Whether the step of a uniform quantizer may take any value (see ``learn_steps``)."""
        return True

    def excluded_by(self, site: Site) -> str | None:
        """The first pattern in ``exclude`` that matches the site's name, or None."""
        return next((p for p in self.exclude if fnmatch.fnmatchcase(site.name, p)), None)

    def check_sites(self, trace: Trace) -> None:
        """Raise QuietvitError for conflicts, or if ``exclude`` or ``overrides`` matches nothing."""
        names = [site.name for site in trace.sites if site.kind in self.kinds]
        for pattern in self.exclude:
            if not fnmatch.filter(names, pattern):
                raise QuietvitError(
                    f"exclude={pattern!r} matches none of the {len(names)} sites"
                    f"{nearest(pattern, names)} print(quietvit.trace(model, example)) lists them."
                )
        self.overrides.check(trace, self.exclude)

    def why_float(self, slot: Slot) -> str:
        """Why ``slot_bits`` leaves this operand float, for the coverage report."""
        pattern = self.excluded_by(slot.site)
        if pattern is not None:
            return f"excluded by {pattern!r}"
        key = self.overrides.key_for(slot)
        if key is None or self.overrides.bits(key, slot) == "same":
            return self.why_working_float(slot)
        return f"float by overrides[{key!r}]"

    def why_working_float(self, slot: Slot) -> str:
        side = "weight_bits" if slot.is_weight else "activation_bits"
        if getattr(self, side) is None:
            return f"{side}=None"
        return f"{slot.site.role}_bits=None"

    @property
    def label(self) -> str:
        """``W4A8``, with 32 where float."""
        return f"W{self.weight_bits or 32}A{self.activation_bits or 32}"

    def policy(self) -> str:
        """One paragraph: bits, first and last layer, overrides, exclusions."""

        def shown(bits: int | str | None) -> str:
            if bits is None:
                return "float"
            return "at the working bits" if bits == "same" else f"at {bits} bits"

        excluded = ", ".join(self.exclude) or "none"
        overridden = f", overrides: {self.overrides}" if self.overrides else ""
        edges = f"patch embedding {shown(self.patch_embed_bits)}, head {shown(self.head_bits)}"
        return (
            f"{self.name} {self.label} (32 is float); {edges}{overridden}, excluded: {excluded}; "
            "norms, softmax, activation functions, residual adds and biases float"
        )


M = TypeVar("M", bound="type[Method]")
_METHODS: dict[str, type[Method]] = {}
_BUILT_IN = "quietvit.quantization.methods"


def register_method(name: str) -> Callable[[M], M]:
    """Class decorator: register a method for ``get_method`` and ``list_methods``.

    Raises QuietvitError if another class has this name. A class of the same module and name may
    replace itself, as in a notebook.
    """

    def add(cls: M) -> M:
        if not cls.__module__.startswith(f"{_BUILT_IN}."):
            _discover()  # so that the names of quietvit's own methods are taken
        before = _METHODS.get(name)
        if before is not None and _origin(before) != _origin(cls):
            raise QuietvitError(
                f"a method named {name!r} is registered already ({_origin(before)}). Give "
                f"{_origin(cls)} another name."
            )
        cls.name = name
        _METHODS[name] = cls
        return cls

    return add


def _origin(cls: type[Method]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _discover() -> None:
    package = importlib.import_module(_BUILT_IN)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def list_methods(pattern: str = "*") -> list[str]:
    """Names of the registered methods that match the fnmatch ``pattern``, sorted."""
    _discover()
    load_plugins(METHODS)
    return sorted(fnmatch.filter(_METHODS, pattern.lower()))


def get_method(name: str) -> type[Method]:
    """Return the method's config class. Raises QuietvitError with near names if unknown."""
    _discover()
    broken = [] if name.lower() in _METHODS else load_plugins(METHODS)
    if name.lower() not in _METHODS:
        raise QuietvitError(
            " ".join(
                [
                    f"unknown quantization method {name!r}{nearest(name.lower(), _METHODS)}.",
                    f"Known: {', '.join(sorted(_METHODS))}. To use a method of your own, import "
                    "the module that registers it (on the command line: --plugin my_module).",
                    *broken,
                ]
            )
        )
    return _METHODS[name.lower()]


def _explain(cls: type[Method], error: ValidationError) -> str:
    parts = []
    for detail in error.errors():
        field = ".".join(str(part) for part in detail["loc"][:1])
        if detail["type"] == "extra_forbidden":
            known = sorted(cls.model_fields)
            hint = nearest(field, known) or f"; fields are {', '.join(known)}"
            parts.append(f"{field} is not a field{hint}")
        else:
            text = detail["msg"].removeprefix("Value error, ")
            parts.append(f"{field}={detail['input']!r}: {text}" if field else text)
    return f"{cls.__name__}: {'; '.join(dict.fromkeys(parts))}"
