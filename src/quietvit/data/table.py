"""Tables of encoded images: one or more parquet, arrow or feather files.

Images are read by row group (parquet) or record batch (arrow), and a few of these stay in memory.
So a table may be larger than memory. Labels are read separately.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quietvit.data.images import ImageDataset, NoLabelsError
from quietvit.data.label_names import (
    DictionaryLabels,
    NamesByLabel,
    is_dictionary,
    names_column,
    names_in_metadata,
    pairs_of,
)
from quietvit.data.paths import Recent, expand, part_for, split_parts
from quietvit.errors import QuietvitError, nearest
from quietvit.files import refuse_other_bytes

logger = logging.getLogger("quietvit")

SUFFIXES = (".parquet", ".arrow", ".feather")
KEPT_BYTES = 512 * 2**20
OPEN_FILES = 64
_EXAMPLE = "'table:/train.parquet,/test.parquet'"


def open_table(
    rest: str, split: str | None, num_classes: int | None, labels: bool = True
) -> ImageDataset:
    """Open ``/train.parquet[,/test.parquet]``; each may also be a glob, a brace range or a folder.

    Without ``labels`` the column ``label`` is not needed or read.

    Each process keeps up to ``KEPT_BYTES`` of decoded row groups. A larger table with large row
    groups is slow in random order, and a log line says so: set ``shuffle_window``, or write it with
    a small ``row_group_size``. Uncompressed arrow files are memory-mapped.

    Class names come from a ``label`` column that is a dictionary of strings, from the
    ``ClassLabel`` in the metadata of Hugging Face's datasets, or from a column ``label_name``,
    ``class_name`` or ``label_text``.

    Raises:
        NoLabelsError: labels are needed, but there is no column ``label``.
        QuietvitError: a missing file or column, a column of another type, a row without label.
    """
    parts = split_parts(rest)
    chosen = part_for(parts, split, "table", _EXAMPLE)
    columns = ["image", "label"] if labels else ["image"]
    table = TableReader(expand(chosen, SUFFIXES, "table"), columns)
    numbers = table.labels() if labels else None
    if table.rows.sum() == 0:
        raise QuietvitError(f"the table {chosen} holds no rows, so no images; check the file.")
    names = table.class_names() if labels else None
    if numbers is not None and num_classes is None:
        if split == "test":
            reference = TableReader(expand(parts[0], SUFFIXES, "table"), ["label"])
            num_classes = _count(reference.labels(), reference.class_names())
        else:
            num_classes = _count(numbers, names)
    return ImageDataset(
        numbers,
        table.read,
        table.where,
        num_classes=num_classes,
        name=f"table {chosen}",
        class_names=names,
        groups=np.repeat(np.arange(len(table.rows), dtype=np.int32), table.rows),
        count=int(table.rows.sum()),
    )


class TableReader:
    """Reads rows of several files by number. A chunk is a row group or record batch.

    For each chunk, ``rows`` is its number of rows, ``owner`` its file, and ``number`` its index
    there. Example: files with row groups (10, 10) and (5,) have rows [10, 10, 5], owner [0, 0, 1],
    number [0, 1, 0].

    Raises:
        QuietvitError: a file cannot be read, lacks one of ``columns``, or has one of another type.
    """

    def __init__(self, paths: list[Path], columns: list[str]) -> None:
        self.paths = paths
        self._files: Recent[Any] = Recent(OPEN_FILES)
        self._chunks: Recent[Any] = Recent(KEPT_BYTES, _bytes_of)
        self._reads, self._told = 0, False
        self._coded = DictionaryLabels()
        rows: list[int] = []
        owner: list[int] = []
        number: list[int] = []
        for index, path in enumerate(paths):
            file = self._file(index)
            _check_columns(path, file.schema, columns)
            counts = _guarded(path, file.counts)
            rows += counts
            owner += [index] * len(counts)
            number += range(len(counts))
        self.rows = np.array(rows, np.int64)
        self.owner, self.number = np.array(owner, np.int64), np.array(number, np.int64)
        self.ends = np.cumsum(self.rows)

    def labels(self) -> np.ndarray:
        """Read only the labels of all rows, (N,), int64."""
        columns = []
        for index, path in enumerate(self.paths):
            column = _guarded(path, partial(self._file(index).column, "label"))
            columns.append(_labels_of(column, path, self._coded))
        return np.concatenate(columns)

    def class_names(self) -> tuple[str, ...] | None:
        """Return the class names, or None if the files hold none. Call ``labels`` first."""
        if self._coded.names:
            return tuple(self._coded.names)
        noted = names_in_metadata(self._file(0).schema)
        if noted is not None:
            return noted
        by_label = NamesByLabel()
        for index, path in enumerate(self.paths):
            file = self._file(index)
            column = names_column(file.schema)
            if column is None:
                return None
            both = (_guarded(path, partial(file.column, name)) for name in ("label", column))
            for label, name in pairs_of(*both):
                by_label.add(label, name)
        return by_label.tuple(f"the table {self.paths[0]}")

    def read(self, index: int) -> bytes:
        """Return the encoded image of row ``index``."""
        self._reads += 1
        chunk, row = self._place(index)
        value = self._chunks.get(chunk, self._chunk)[row].as_py()
        if isinstance(value, dict):
            value = value["bytes"]
        if not value:
            first = self._first_row(chunk)
            raise QuietvitError(
                f"row {first + row} of the table {self.paths[self.owner[chunk]]} has no image; "
                "write the encoded bytes into the column 'image' or drop the row."
            )
        return bytes(value)

    def where(self, index: int) -> str:
        """Return ``row 3``, with its file if there are several."""
        chunk, row = self._place(index)
        row += self._first_row(chunk)
        return f"row {row}" if len(self.paths) == 1 else f"row {row} of {self._path(chunk)}"

    def _place(self, index: int) -> tuple[int, int]:
        chunk = int(np.searchsorted(self.ends, index, side="right"))
        return chunk, int(index - self.ends[chunk] + self.rows[chunk])

    def _first_row(self, chunk: int) -> int:
        first = chunk - self.number[chunk]
        return int(self.rows[first:chunk].sum())

    def _path(self, chunk: int) -> Path:
        return self.paths[self.owner[chunk]]

    def _file(self, index: int) -> Any:
        return self._files.get(index, lambda index: _opened(self.paths[index]))

    def _chunk(self, chunk: int) -> Any:
        file = self._file(int(self.owner[chunk]))
        images = _guarded(self._path(chunk), partial(file.chunk, int(self.number[chunk])))
        kept = self._chunks
        wasted = kept.dropped > 32 and self.rows[chunk] > 8 and self._reads < 4 * kept.made
        if wasted and not self._told:
            self._told = True
            logger.warning(
                "%s does not fit into the cache of %d MiB, and its row groups hold %d images. In "
                "random order, each image needs to read a row group. Set data.shuffle_window, or "
                "write the table with row_group_size=64.",
                self.paths[0].parent, KEPT_BYTES >> 20, self.rows[chunk],
            )  # fmt: skip
        return images


class _Parquet:
    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.file = pq.ParquetFile(path, memory_map=True)
        self.schema = self.file.schema_arrow

    def counts(self) -> list[int]:
        about = self.file.metadata
        return [about.row_group(number).num_rows for number in range(about.num_row_groups)]

    def column(self, name: str) -> Any:
        return self.file.read(columns=[name], use_threads=False).column(name)

    def chunk(self, number: int) -> Any:
        group = self.file.read_row_group(number, columns=["image"], use_threads=False)
        return group.column("image")


class _Arrow:
    """An IPC file (feather), read batch by batch, or an IPC stream, mapped as a whole."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path, self.source = path, pa.memory_map(str(path))
        self.batches: Any = None
        try:
            self.schema = pa.ipc.open_file(self.source).schema
        except pa.ArrowInvalid:
            self.source.seek(0)
            stream = pa.ipc.open_stream(self.source)
            self.schema, self.batches = stream.schema, list(stream)

    def counts(self) -> list[int]:
        if self.batches is not None:
            return [batch.num_rows for batch in self.batches]
        small = next((name for name in self.schema.names if name != "image"), "image")
        reader = self._reader(small)
        return [reader.get_batch(at).num_rows for at in range(reader.num_record_batches)]

    def column(self, name: str) -> Any:
        import pyarrow as pa

        batches = self.batches
        if batches is None:
            reader = self._reader(name)
            batches = [reader.get_batch(at) for at in range(reader.num_record_batches)]
        kind = self.schema.field(name).type
        return pa.chunked_array([batch.column(name) for batch in batches], kind)

    def chunk(self, number: int) -> Any:
        if self.batches is not None:
            return self.batches[number].column("image")
        return self._reader("image").get_batch(number).column("image")

    def _reader(self, name: str) -> Any:
        import pyarrow as pa

        options = pa.ipc.IpcReadOptions(
            included_fields=[self.schema.get_field_index(name)], use_threads=False
        )
        return pa.ipc.open_file(self.source, options=options)


def _opened(path: Path) -> Any:
    refuse_other_bytes(path)
    return _guarded(path, partial(_Parquet if path.suffix == ".parquet" else _Arrow, path))


def _guarded(path: Path, call: Callable[[], Any]) -> Any:
    import pyarrow as pa

    try:
        return call()
    except (pa.ArrowException, OSError) as error:
        kind = "a parquet" if path.suffix == ".parquet" else "an arrow"
        raise QuietvitError(
            f"{path} could not be read as {kind} table ({str(error).splitlines()[0]}); copy it "
            "again or write it with pyarrow."
        ) from error


def _check_columns(path: Path, schema: Any, columns: list[str]) -> None:
    import pyarrow as pa

    for column in columns:
        if column not in schema.names:
            error = NoLabelsError if column == "label" else QuietvitError
            raise error(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, schema.names))}"
                f"{nearest(column, schema.names)}. Rename the columns to 'image' and 'label'"
                + (
                    " (training and evaluation need labels; calibration does not)."
                    if column == "label"
                    else "."
                )
            )
    if "label" not in columns:
        return
    kind = schema.field("label").type
    if not pa.types.is_integer(kind) and not is_dictionary(kind):
        raise QuietvitError(
            f"the column 'label' of {path} is of type {kind}; it needs integers from 0, or a "
            "dictionary of strings (see pyarrow's dictionary_encode())."
        )
    if "image" not in columns:
        return
    kind = schema.field("image").type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (is_bytes or is_struct):
        raise QuietvitError(
            f"the column 'image' of {path} is of type {kind}; it needs the encoded bytes of the "
            "image (binary, or a struct with a field 'bytes')."
        )


def _count(labels: np.ndarray, names: tuple[str, ...] | None) -> int:
    return max(int(labels.max(initial=-1)) + 1, len(names or ()))


def _labels_of(column: Any, path: Path, coded: DictionaryLabels) -> np.ndarray:
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise QuietvitError(f"row {row} of {path} has no label; fill it in or drop the row.")
    if is_dictionary(column.type):
        return coded.numbers(column)
    labels: np.ndarray = column.to_numpy().astype(np.int64)
    return labels


def _bytes_of(column: Any) -> int:
    return int(column.nbytes)
