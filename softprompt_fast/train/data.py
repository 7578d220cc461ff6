# SPDX-License-Identifier: Apache-2.0
"""Datasets for training: rows of a JSONL or CSV file or of the Hugging Face hub, as token ids with labels.

A row is an input and a target (the loss is taken on the target only) or a target alone. Whatever is wrong with rows
is said for all of them at once, by line.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_fast.losses import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_COLUMNS = (("prompt", "completion"), (None, "text"))
FILE_SUFFIXES = (".jsonl", ".csv")
TOO_LONG = ("cut", "drop", "refuse")
_NAMED = 5  # lines that an error message lists


@dataclass(frozen=True)
class Columns:
    """Where a row's parts stand. All None: ``prompt`` and ``completion``, or else ``text``."""

    input: str | None = None
    target: str | None = None
    task: str | None = None

    def among(self, names: Iterable[str], where: str) -> Columns:
        """The same with the defaults filled in for a dataset whose columns are `names`.

        Raises:
            ValueError: a column isn't there; names those that are.
        """
        names = list(names)
        chosen = [(self.input, self.target)] if self.input or self.target else list(DEFAULT_COLUMNS)
        for given, target in chosen:
            found = Columns(given, target or "completion", self.task)
            missing = [name for name in (found.input, found.target, found.task) if name and name not in names]
            if not missing:
                return found
        wanted = missing if len(chosen) == 1 else ["prompt and completion, or text", *filter(None, [self.task])]
        raise ValueError(f"{where}: expected column {', '.join(wanted)}; found {', '.join(map(str, names)) or 'none'}")


@dataclass(frozen=True)
class Row:
    """One row as it was read. ``line``: of the file (of a hub dataset: the row), counted from 1."""

    line: int
    input: str | None
    target: str
    task: int = 0


@dataclass(frozen=True)
class Example:
    """One row as tokens: ``ids[given:]`` are labelled. ``task``: of a multitask prompt."""

    line: int
    ids: list[int]
    given: int
    task: int = 0


def is_file_name(source: str) -> bool:
    """Whether `source` is meant as a file; else it is a dataset of the hub."""
    return Path(source).exists() or source.endswith((*FILE_SUFFIXES, ".json", ".txt", ".parquet"))


def read_rows(source: str, columns: Columns | None = None, *, split: str = "train") -> list[Row]:
    """The rows of a ``.jsonl`` or ``.csv`` file, or of a dataset of the Hugging Face hub.

    Args:
        source: a file's path, or a name on the hub.
        columns: where the parts stand.
        split: of a hub dataset.

    Raises:
        OSError: the file can't be read, or the hub has no such dataset.
        ValueError: no rows, a missing column, or rows that are malformed or empty (names them by line).
        ModuleNotFoundError: the package ``datasets`` is missing (hub datasets only).
    """
    records = _read_file(Path(source)) if is_file_name(source) else _read_hub(source, split)
    rows, problems = [], []
    found: Columns | None = None
    for line, record in records:
        if isinstance(record, str):
            problems.append(f"line {line}: {record}")
            continue
        if found is None:
            found = (columns or Columns()).among(record, source)
        try:
            rows.append(_row(line, record, found))
        except ValueError as error:
            problems.append(f"line {line}: {error}")
    _refuse(source, problems)
    if not rows:
        raise ValueError(f"{source}: expected at least one row, found none")
    return rows


def _read_file(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Line number and record; in place of a record that can't be read, what is wrong with it."""
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(f"{path}: expected a file named {' or '.join(FILE_SUFFIXES)}, or a dataset of the hub")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from (_read_csv if path.suffix == ".csv" else _read_jsonl)(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 ({error})") from error


def _read_jsonl(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            yield line, f"no valid JSON ({error.msg})"
            continue
        yield line, record if isinstance(record, dict) else f"expected a JSON object, found {text.strip()[:40]!r}"


def _read_csv(file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for record in reader:
            if None in record:
                yield reader.line_num, f"expected {len(reader.fieldnames or [])} fields, found more"
            else:
                yield reader.line_num, record
    except csv.Error as error:
        yield reader.line_num, f"no valid CSV ({error})"


def _read_hub(name: str, split: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except OSError as error:
        raise OSError(f"{name}: no such file, and no dataset of the hub that can be had ({error})") from error
    yield from enumerate(dataset, start=1)


def _row(line: int, record: dict[str, Any], columns: Columns) -> Row:
    def text(column: str, may_be_empty: bool) -> str:
        if not isinstance(value := record.get(column), str):
            raise ValueError(f"{column}: expected text, found {'nothing' if value is None else repr(value)[:40]}")
        if not value and not may_be_empty:
            raise ValueError(f"{column}: empty")
        return value

    task = 0
    if columns.task is not None:
        try:
            task = int(record[columns.task])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{columns.task}: expected a number, found {record.get(columns.task)!r}") from None
    assert columns.target is not None
    given = None if columns.input is None else text(columns.input, may_be_empty=True)
    return Row(line, given, text(columns.target, may_be_empty=False), task)


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, at least one where ``share > 0``; equal rows never end up on both sides.

    Raises:
        ValueError: nothing would be left to train on.
    """
    if not share:
        return list(rows), []

    def place(row: Row) -> str:
        return hashlib.sha256(f"{seed}\n{row.input}\n{row.target}".encode()).hexdigest()

    places = sorted({place(row) for row in rows})
    held_out = set(places[: max(1, round(share * len(places)))])
    train = [row for row in rows if place(row) not in held_out]
    if not train:
        raise ValueError(f"validation: a share of {share} of {len(places)} distinct row(s) leaves none to train on")
    return train, [row for row in rows if place(row) in held_out]


@dataclass(frozen=True)
class Encoded:
    """Examples, and how many rows were cut or dropped because they were too long."""

    examples: list[Example]
    cut: int
    dropped: int

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all token ids, labels and tasks in their order."""
        content = hashlib.sha256()
        for example in self.examples:
            content.update(f"{example.ids} {example.given} {example.task}\n".encode())
        return content.hexdigest()


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    max_length: int,
    too_long: str = "cut",
    end_of_text: bool = True,
    first_is_predicted: bool = True,
) -> Encoded:
    """Rows as token ids with labels.

    Input and target are tokenised apart, as they are when the model generates, and the target may be closed by the
    tokenizer's end-of-text token.

    Args:
        source: for messages.
        max_length: own tokens a row may have. A longer one is cut: its input from the left (a BOS token stays), its
            target from the right.
        too_long: "cut", "drop" such rows, or "refuse" the dataset.
        end_of_text: close targets with the end-of-text token, where the tokenizer has one.
        first_is_predicted: whether a row's first own token can be labelled: the last virtual token predicts it, but a
            prefix of keys and values predicts nothing. A BOS token never is.

    Raises:
        ValueError: rows without a label, or too long ones with ``too_long="refuse"`` (by line).
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    inputs = _token_ids(tokenizer, [row.input or "" for row in rows], special=True)
    targets = _token_ids(tokenizer, [row.target for row in rows], special=False)
    examples, unlabelled, long, cut = [], [], [], 0
    for row, given, target in zip(rows, inputs, targets, strict=True):
        if end_of_text and eos is not None and target[-1:] != [eos]:
            target = [*target, eos]
        if len(given) + len(target) > max_length:
            long.append(f"line {row.line}: {len(given) + len(target)} tokens")
            if too_long == "drop":
                continue
            cut += 1
            given, target = _cut(given, target, max_length, bos)
        ids = given + target
        start = len(given)
        if start == 0 and ids and (not first_is_predicted or ids[0] == bos):
            start = 1
        if start >= len(ids):
            unlabelled.append(f"line {row.line}: no token of it can be labelled")
        examples.append(Example(row.line, ids, start, row.task))
    if too_long == "refuse":
        _refuse(f"{source}: more than {max_length} tokens", long)
    _refuse(source, unlabelled)
    if not examples:
        raise ValueError(f"{source}: all {len(rows)} rows have more than {max_length} tokens; no row is left")
    return Encoded(examples, cut, len(long) if too_long == "drop" else 0)


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False).input_ids


def _cut(given: list[int], target: list[int], length: int, bos: int | None) -> tuple[list[int], list[int]]:
    head = given[:1] if bos is not None and given[:1] == [bos] else []
    target = target[: length - len(head)]
    room = length - len(head) - len(target)
    return head + (given[len(head) :][-room:] if room else []), target


def collate(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask``, ``labels`` (int64 ``[B, S]``, padded right, -100 where none) and ``task_ids``
    (``[B]``)."""
    width = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), width), pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.tensor(example.ids)
        mask[row, :length] = 1
        labels[row, example.given : length] = ids[row, example.given : length]
    tasks = torch.tensor([example.task for example in examples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "task_ids": tasks}


def lines_of(batch: Mapping[str, Any], examples: Sequence[Example]) -> list[int]:
    """Lines of the rows that a batch of :func:`collate` was made of, found by their tokens."""
    lines: dict[tuple[int, ...], int] = {tuple(example.ids): example.line for example in examples}
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(dim=1).tolist(), strict=True)
    return [lines[tuple(ids[:length])] for ids, length in rows if tuple(ids[:length]) in lines]


def _refuse(where: str, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{where}: {'; '.join(problems[:_NAMED])}{more}")
