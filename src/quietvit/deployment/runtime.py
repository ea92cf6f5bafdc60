"""Models in onnxruntime or OpenVINO behind one face, and what the processor can do.

Which runtime opens a file is decided in ``opening``; torchao's is in its own room.
"""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.deployment.extras import need
from quietvit.deployment.facts import KEY, Facts
from quietvit.errors import QuietvitError

EXACT = ("session.x64quantprecision", "1")
EXTERNAL = ("session.optimized_model_external_initializers_file_name", "optimized.data")
# Where the processor can, OpenVINO would compute what is float in half precision.
SETTINGS: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}


class Runtime(ABC):
    """A model loaded by a runtime: ``runtime(images)`` is its output, numpy arrays both.

    Any number of images; where the file takes a fixed number at once, in parts.

    ``path`` is the file it came from, ``name`` the runtime with its version.
    """

    path: Path
    name: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        fixed = self.input_shape[0]
        if fixed is None or fixed == len(images):
            return self._run(images)
        places = np.arange(-(-len(images) // fixed) * fixed) % len(images)
        parts = [self._run(images[part]) for part in places.reshape(-1, fixed)]
        return np.concatenate(parts)[: len(images)]

    @abstractmethod
    def _run(self, images: np.ndarray) -> np.ndarray:
        """The output for as many images as the file takes at once."""

    @property
    @abstractmethod
    def metadata(self) -> str | None:
        """The text that ``Facts.from_json`` reads."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int | None, ...]:
        """(batch, C, H, W), None where dynamic."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {self.name})"

    @property
    def facts(self) -> Facts:
        return Facts.from_json(self.metadata, self.path)

    def check_images(self, shape: tuple[int, ...]) -> None:
        """Raise QuietvitError unless images of this shape (N, C, H, W) fit."""
        wanted = self.input_shape
        same = len(shape) == len(wanted) and all(
            there is None or n == there for n, there in zip(shape[1:], wanted[1:], strict=False)
        )
        if not same:
            shown = " x ".join("any" if n is None else str(n) for n in wanted[1:])
            raise QuietvitError(
                f"images of shape {tuple(shape)} do not fit {self.path}, which takes (N, C, H, W) "
                f"with {shown}; use the preprocessing that travels in the file, or export the "
                "model at this size."
            )


class OnnxRuntime(Runtime):
    """A session of onnxruntime on the CPU, with its default settings but for ``EXACT``.

    ``exact`` keeps a session's products from saturating at 16 bits. None asks for it where the
    processor has no instruction for 8-bit products, or where that cannot be told: with one they do
    not saturate, and ``EXACT`` would take a third of their speed. ``note`` says where it was asked
    for so, and why.
    """

    note: str | None = None

    def __init__(
        self,
        source: bytes | Path,
        *,
        threads: int = 0,
        optimized: Path | None = None,
        exact: bool | None = None,
    ) -> None:
        need("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
            options.add_session_config_entry(*EXTERNAL)  # of any size, where one file ends at 2 GB
        if exact is None:
            self.note = {True: None, False: WITHOUT_VNNI, None: PERHAPS_VNNI}[vnni()]
            exact = self.note is not None
        if exact:
            options.add_session_config_entry(*EXACT)
        self.path = source if isinstance(source, Path) else Path("a model in memory")
        self.name = f"onnxruntime {onnxruntime.__version__}"
        given = str(source) if isinstance(source, Path) else source
        try:
            self.session = onnxruntime.InferenceSession(
                given, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no class in common but this
            raise QuietvitError(
                f"onnxruntime cannot load {self.path}: {str(error).strip().splitlines()[0]}. The "
                "file is cut short, foreign, or of an opset this onnxruntime does not know "
                f"({onnxruntime.__version__}; export writes opset 21, or 20 by --opset 20)."
            ) from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        name = self.session.get_inputs()[0].name
        try:
            found: np.ndarray = self.session.run(None, {name: images})[0]
        except Exception as error:
            raise QuietvitError(
                f"onnxruntime cannot run {self.path} on images of shape {images.shape}: "
                f"{str(error).strip().splitlines()[0]}."
            ) from error
        return found

    @property
    def metadata(self) -> str | None:
        return self.session.get_modelmeta().custom_metadata_map.get(KEY)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        shape = self.session.get_inputs()[0].shape
        return tuple(n if isinstance(n, int) else None for n in shape)


class OpenVINO(Runtime):
    """A model compiled by OpenVINO for the CPU, for latency; .xml, .onnx, or the bytes of one."""

    def __init__(self, source: bytes | Path, *, threads: int = 0) -> None:
        need("openvino")
        import openvino

        self.path = source if isinstance(source, Path) else Path("a model in memory")
        self.name = f"openvino {openvino.__version__.partition('-')[0]}"
        if isinstance(source, Path) and source.suffix == ".xml":
            with source.open("rb") as file:
                start = file.read(1000)
            if b"<net" not in start:  # openvino would try its other readers, down to TensorFlow's
                raise QuietvitError(
                    f"{source} is no OpenVINO IR: it does not begin with <net>. Give the .xml that "
                    "'quietvit export --to openvino' wrote."
                )
        core = openvino.Core()
        try:
            self.model = core.read_model(source if isinstance(source, bytes) else str(source))
            settings = SETTINGS | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
            self.compiled = core.compile_model(self.model, "CPU", settings)
        except Exception as error:
            binary = ""
            if self.path.suffix == ".xml":
                binary = f"; an IR needs its own {self.path.with_suffix('.bin').name} beside it"
            reason = str(error).strip().splitlines()[-1].rstrip(".!")
            raise QuietvitError(
                f"openvino cannot load {self.path}: {reason}. The file is cut short or "
                f"foreign{binary}. Export it again."
            ) from error

    def _run(self, images: np.ndarray) -> np.ndarray:
        return np.asarray(self.compiled([images])[0])

    @property
    def metadata(self) -> str | None:
        if self.model.has_rt_info([KEY]):
            return str(self.model.get_rt_info([KEY]).astype(str))
        if self.path.suffix == ".onnx":
            return onnx_metadata(self.path)
        return None

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        shape = self.model.input(0).get_partial_shape()
        return tuple(None if n.is_dynamic else n.get_length() for n in shape)


def onnx_metadata(path: Path) -> str | None:
    """The entry of ours in an ONNX file's metadata."""
    need("onnx")
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise QuietvitError(f"{path} is no ONNX file, or cut short ({error}).") from error
    return next((entry.value for entry in model.metadata_props if entry.key == KEY), None)


def vnni() -> bool | None:
    """Whether the processor multiplies 8-bit integers by an instruction of its own.

    True with VNNI, AMX or Arm's dot products; False on x86-64 without; None where it cannot be
    told.
    """
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return True
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    line = next((ln for ln in text.splitlines() if ln.startswith(("flags", "Features"))), None)
    if line is None:
        return None
    flags = set(line.partition(":")[2].split())
    return bool(flags & {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp"})


def processor() -> str:
    """A few words about the machine."""
    known = {True: "with 8-bit dot products (VNNI or like)", False: "without VNNI", None: ""}
    return f"{platform.machine()} {known[vnni()]}".strip()


WITHOUT_VNNI = (
    "this processor has no VNNI: 8-bit products gain little speed here, often none, and a default "
    "session of onnxruntime saturates them; set session.x64quantprecision to 1 in your own "
    "session, as was done here"
)
PERHAPS_VNNI = (
    "it cannot be told here whether this processor has VNNI, so session.x64quantprecision was set "
    "to 1: without VNNI a default session saturates 8-bit products, with it the setting takes a "
    "third of their speed"
)
