# SPDX-License-Identifier: Apache-2.0
"""Names of prompts, and the saved prefixes that they stand for. Needs no vLLM."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_fast.errors import PrefixError, PrefixFingerprintError, SoftPromptError
from softprompt_fast.prefix_kv import METADATA_NAME, TENSORS_NAME, PrefixKV, read_header

_SHOWN = 10


class UnknownPromptError(SoftPromptError, KeyError):
    """No prompt of that name."""

    __str__ = ValueError.__str__


@dataclass(frozen=True)
class Entry:
    """One version of a prompt.

    Attributes:
        name: what requests call it.
        directory: where its `PrefixKV` is saved.
        digest: of its content (`PrefixKV.digest`).
        num_virtual_tokens: P.
    """

    name: str
    directory: str
    digest: str
    num_virtual_tokens: int


class Registry:
    """Prompts by name, from a mapping and from a folder whose subfolders are prompts.

    Both are looked at anew at every look-up, so a prompt that is saved, replaced or removed while a server runs is
    seen by its next request. A name is compared with names, and never becomes part of a path.

    Args:
        prompts: name -> directory with a saved `PrefixKV`.
        folder: each visible subfolder with a saved `PrefixKV` is a prompt of its name. `prompts` go first.
        fingerprint: of the base model (`model_fingerprint`); None: prefixes of any base are taken.
        num_layers, num_kv_heads, head_dim: the base's; None: unchecked.
    """

    def __init__(
        self,
        prompts: Mapping[str, str | os.PathLike[str]] | None = None,
        folder: str | os.PathLike[str] | None = None,
        *,
        fingerprint: str | None = None,
        num_layers: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> None:
        self._prompts = {name: os.fspath(directory) for name, directory in (prompts or {}).items()}
        self._folder = None if folder is None else os.fspath(folder)
        self._fingerprint = fingerprint
        self._shape = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        self._entries: dict[str, tuple[tuple[int, int, int], Entry]] = {}
        self._verified: set[str] = set()
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Every prompt's name, sorted. Whether each can be served, `find` says."""
        return sorted(name for name, folder in self._listed().items() if name in self._prompts or _is_prompt(folder))

    def __contains__(self, name: object) -> bool:
        directory = self._listed().get(name) if isinstance(name, str) else None
        return directory is not None and (name in self._prompts or _is_prompt(directory))

    def find(self, name: str) -> Entry:
        """The version of `name` that is on disk now. Reads the file's header, once for each version.

        Raises:
            UnknownPromptError: no such name.
            PrefixError: damaged, or a PEFT adapter that was not compiled.
            PrefixFingerprintError: computed with another base model.
            OSError: it can't be read.
        """
        directory = self._listed().get(name)
        if directory is None or (name not in self._prompts and not _is_prompt(directory)):
            names = self.names()
            known = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise UnknownPromptError(f"no prompt named {name!r}; there are: {known or 'none'}")
        path = Path(directory) / TENSORS_NAME
        if not path.exists() and (Path(directory) / "adapter_config.json").exists():
            raise PrefixError(
                f"prompt {name!r}: a PEFT adapter, which has to be compiled first: softprompt-fast compile ADAPTER "
                "--base MODEL --output FOLDER"
            )
        status = path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        with self._lock:
            known_version, entry = self._entries.get(name, (None, None))
        if entry is None or known_version != version or entry.directory != directory:
            entry = self._check(name, directory, read_header(directory))
            with self._lock:
                self._entries[name] = version, entry
        return entry

    def verify(self, entry: Entry) -> None:
        """Read all of `entry` and compare it with its digest, once for each version.

        Raises:
            PrefixError: damaged, or replaced by another version.
            OSError: it can't be read.
        """
        with self._lock:
            if entry.digest in self._verified:
                return
        load(entry)
        with self._lock:
            self._verified.add(entry.digest)

    def _listed(self) -> dict[str, str]:
        if self._folder is None:
            return self._prompts
        with os.scandir(self._folder) as entries:
            found = {entry.name: entry.path for entry in entries if entry.name[0] != "."}
        return found | self._prompts

    def _check(self, name: str, directory: str, header: Mapping[str, Any]) -> Entry:
        try:
            found: dict[str, Sequence[int]] = {
                "num_layers": [header["num_layers"]],
                "num_kv_heads": header["num_kv_heads"],
                "head_dim": [*header["head_dim"], *header["value_head_dim"]],
            }
            entry = Entry(name, directory, str(header["digest"]), int(header["num_virtual_tokens"]))
            fingerprint = header["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise PrefixError(
                f"prompt {name!r}: altered or damaged, {METADATA_NAME} lacks a field ({error})"
            ) from error
        wrong = [
            f"{field} (base: {expected}, prefix: {', '.join(map(str, sorted(set(found[field]))))})"
            for field, expected in self._shape.items()
            if expected is not None and set(found[field]) != {expected}
        ]
        if wrong:
            raise PrefixFingerprintError(
                f"prompt {name!r}: made for another base model, they differ in {'; '.join(wrong)}"
            )
        if self._fingerprint is not None and fingerprint != self._fingerprint:
            raise PrefixFingerprintError(
                f"prompt {name!r}: computed with another base model: fingerprint {fingerprint}, the base served here "
                f"has {self._fingerprint}"
            )
        if entry.num_virtual_tokens < 1:
            raise PrefixError(
                f"prompt {name!r}: expected at least one virtual token, found {entry.num_virtual_tokens}"
            )
        return entry


def load(entry: Entry) -> PrefixKV:
    """The prefix of exactly this version, memory-mapped.

    Raises:
        PrefixError: damaged, or what is saved there now is another version.
        OSError: it can't be read.
    """
    prefix = PrefixKV.from_pretrained(entry.directory)
    if prefix.digest != entry.digest:
        raise PrefixError(f"prompt {entry.name!r}: replaced by another version; send the request again")
    return prefix


def _is_prompt(directory: str) -> bool:
    return PrefixKV.is_saved_at(directory) or os.path.exists(os.path.join(directory, "adapter_config.json"))
