# SPDX-License-Identifier: Apache-2.0
"""PrefixKV: what it holds, and that a saved one is found whole, lazily and with the right base, or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from softprompt_fast import prefix_kv
from softprompt_fast.errors import IncompatibleBaseError, PrefixError, PrefixFingerprintError
from softprompt_fast.prefix_kv import PrefixKV, Scales, base_config_fields, model_fingerprint
from tests import warm


def make(
    seed: int = 0, *, tokens: int = 4, shapes: tuple = ((2, 8), (2, 8)), dtype: torch.dtype = torch.float32
) -> PrefixKV:
    """A random prefix with (Hkv, D) a layer."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return PrefixKV(
        [random(heads, tokens, dim) for heads, dim in shapes],
        [random(heads, tokens, dim) for heads, dim in shapes],
        next_logits=random(11),
        method="PROMPT_TUNING",
        fingerprint="0123456789abcdef-fedcba9876543210",
        metadata={"name": f"seed {seed}", "list": [1, 2.5, None]},
    )


def llama(seed: int = 0, **changes: object) -> Any:
    # Not at the top: the child processes below import this module and need no transformers.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def assert_equal(a: PrefixKV, b: PrefixKV) -> None:
    assert (a.method, a.fingerprint, a.metadata) == (b.method, b.fingerprint, b.metadata)
    assert (a.next_logits is None) == (b.next_logits is None)
    assert a.next_logits is None or torch.equal(a.next_logits, b.next_logits)
    assert len(a.keys) == len(b.keys)
    for x, y in zip(a.keys + a.values, b.keys + b.values, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert a.digest == b.digest


# ---------------------------------------------------------------------------- in memory


def test_it_is_frozen_and_counts_its_bytes() -> None:
    weight = torch.randn(2, 3, 4, requires_grad=True)
    prefix = PrefixKV([weight * 2], [weight * 3], method="CARTRIDGE", fingerprint="a-b")
    assert not prefix.keys[0].requires_grad and not prefix.values[0].requires_grad
    assert prefix.num_virtual_tokens == 3 and prefix.num_layers == 1
    assert prefix.nbytes == 2 * 24 * 4
    assert prefix.to(dtype=torch.float32) is prefix
    half = prefix.to(dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.nbytes == prefix.nbytes // 2


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ([], [], "found 0 and 0"),
        ([(2, 3, 4)], [], "found 1 and 0"),
        (
            [(2, 3, 4), (2, 5, 4)],
            [(2, 3, 4), (2, 5, 4)],
            r"layer 1: expected \[Hkv, P, D\] with P = 3, found \[2, 5, 4\]",
        ),
        ([(2, 3, 4)], [(1, 3, 4)], r"layer 0: .*found \[2, 3, 4\] and \[1, 3, 4\]"),
        ([(1, 2, 3, 4)], [(1, 2, 3, 4)], "layer 0"),
    ],
)
def test_shapes_that_do_not_fit(keys: list, values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixKV([torch.zeros(s) for s in keys], [torch.zeros(s) for s in values], method="CPT", fingerprint="a-b")


def test_metadata_has_to_be_json() -> None:
    with pytest.raises(ValueError, match="metadata: expected what JSON can hold"):
        PrefixKV(
            [torch.zeros(1, 1, 1)], [torch.zeros(1, 1, 1)], method="CPT", fingerprint="a-b", metadata={"x": object()}
        )


def test_check_compatible_says_expected_and_found() -> None:
    make().check_compatible(llama(vocab_size=11))
    with pytest.raises(IncompatibleBaseError, match="layers: the base has 3, the prefix 2"):
        make().check_compatible(llama(vocab_size=11, num_hidden_layers=3))
    with pytest.raises(IncompatibleBaseError, match=r"the base has \(4, 8\), the prefix \[\(2, 8\)\]"):
        make().check_compatible(llama(vocab_size=11, num_key_value_heads=4))
    with pytest.raises(IncompatibleBaseError, match="vocabulary: the base has 64, the prefix 11"):
        make().check_compatible(llama().config)


def test_digest_sees_every_part() -> None:
    prefix = make()
    assert prefix.digest == make().digest and re.fullmatch("[0-9a-f]{64}", prefix.digest)
    parts = {
        "next_logits": prefix.next_logits,
        "method": prefix.method,
        "fingerprint": prefix.fingerprint,
        "metadata": prefix.metadata,
    }
    others = [{"next_logits": None}, {"method": "CPT"}, {"fingerprint": "c-d"}, {"metadata": {}}]
    digests = {prefix.digest} | {PrefixKV(prefix.keys, prefix.values, **(parts | o)).digest for o in others}
    digests.add(PrefixKV(prefix.values, prefix.keys, **parts).digest)
    nudged = [key.clone() for key in prefix.keys]
    nudged[1].view(-1)[-1] += 1e-6
    digests.add(PrefixKV(nudged, prefix.values, **parts).digest)
    assert len(digests) == 7


# ---------------------------------------------------------------------------- saved and loaded


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(1, 5),
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 5)), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    verify=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, seed: int, tokens: int, shapes: list, dtype: torch.dtype, verify: bool
) -> None:
    directory = tmp_path_factory.mktemp("prefix")
    prefix = make(seed, tokens=tokens, shapes=tuple(shapes), dtype=dtype)
    assert not PrefixKV.is_saved_at(directory)
    prefix.save_pretrained(directory)
    assert PrefixKV.is_saved_at(directory)
    assert_equal(PrefixKV.from_pretrained(directory, verify=verify), prefix)


def test_views_of_one_tensor_can_be_saved(tmp_path: Path) -> None:
    flat = torch.randn(4, 6, 2, 8).permute(1, 2, 0, 3)  # as prefix tuning hands them over
    prefix = PrefixKV(list(flat[0::2]), list(flat[1::2]), method="PREFIX_TUNING", fingerprint="a-b")
    prefix.save_pretrained(tmp_path)
    assert_equal(PrefixKV.from_pretrained(tmp_path), prefix)


def test_saving_over_the_file_one_is_mapped_from(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    mapped = PrefixKV.from_pretrained(tmp_path)
    make(1).save_pretrained(tmp_path)
    assert_equal(mapped, make(0))
    mapped.save_pretrained(tmp_path)
    assert_equal(PrefixKV.from_pretrained(tmp_path), make(0))


def test_the_json_file_describes_it(tmp_path: Path) -> None:
    prefix = make(shapes=((2, 8), (1, 16)))
    prefix.save_pretrained(tmp_path)
    described = json.loads((tmp_path / prefix_kv.METADATA_NAME).read_text())
    assert described == {
        "format_version": 1,
        "digest": prefix.digest,
        "method": "PROMPT_TUNING",
        "num_virtual_tokens": 4,
        "num_layers": 2,
        "num_kv_heads": [2, 1],
        "head_dim": [8, 16],
        "value_head_dim": [8, 16],
        "dtype": "float32",
        "fingerprint": prefix.fingerprint,
        "metadata": prefix.metadata,
    }
    with safe_open(tmp_path / prefix_kv.TENSORS_NAME, "pt") as file:
        assert json.loads(file.metadata()["prefix_kv"]) == described
    (tmp_path / prefix_kv.METADATA_NAME).unlink()  # a convenience: the tensors' file is complete
    assert_equal(PrefixKV.from_pretrained(tmp_path), prefix)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads memory maps from Linux's /proc")
def test_tensors_are_mapped_and_read_lazily(tmp_path: Path) -> None:
    make(tokens=4096, shapes=((8, 64),) * 4).save_pretrained(tmp_path)  # 64 MiB
    path = tmp_path / prefix_kv.TENSORS_NAME

    def resident() -> int:
        """KiB of the file's mappings that are in memory."""
        mappings = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
        ours = [mapping for mapping in mappings if str(path) in mapping]
        assert ours, "the file is not mapped"
        return sum(int(size) for mapping in ours for size in re.findall(r"(?m)^Rss: +(\d+) kB", mapping))

    prefix = PrefixKV.from_pretrained(tmp_path, verify=False)
    assert prefix.nbytes > 64 << 20
    assert resident() < 4 << 10
    prefix.values[2].sum()
    assert 8 << 10 <= resident() < 16 << 10  # that tensor of 8 MiB and some read-ahead


def test_non_finite_values_are_not_saved(tmp_path: Path) -> None:
    prefix = make()
    prefix.values[1][0, 0, :2] = float("nan")
    with pytest.raises(ValueError, match=r"'layers\.1\.value': 2 of 64 values are NaN or infinite"):
        prefix.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------- int8


def test_quantized_size_values_and_facts() -> None:
    prefix = make(tokens=37, shapes=((2, 8), (3, 16)))
    small = prefix.quantize(16)
    assert small.dtype == torch.int8 and small.num_virtual_tokens == 37 and small.scales.block == 16
    entries = 37 * (2 * 8 + 3 * 16) * 2
    assert small.nbytes == entries + (2 + 3) * 3 * 2 * 4 + 11 * 4  # three blocks of scales, next_logits
    floats = small.dequantize()
    assert floats.scales is None and floats.dtype == torch.float32 and small.dequantize(torch.bfloat16).nbytes > 0
    facts = small.quantization
    assert facts["block"] == 16 and facts["from"] == "float32" and floats.quantization == facts
    for layer in range(2):
        for which, error in (("keys", "key_error"), ("values", "value_error")):
            exact, found = getattr(prefix, which)[layer], getattr(floats, which)[layer]
            assert facts[error][layer] == pytest.approx(((found - exact).norm() / exact.norm()).item(), rel=1e-4)
            scale = getattr(small.scales, which)[layer].repeat_interleave(16, 1)[:, :37, None]
            assert ((found - exact).abs() <= scale * 0.5001).all()
        assert 0 < facts["output_error"][layer] < 0.05
    assert prefix.quantization is None and prefix.scales is None
    assert prefix.quantize(1).quantization["key_error"][0] < facts["key_error"][0]
    assert small.metadata["name"] == "seed 0" and small.digest != prefix.digest != floats.digest
    assert prefix.to(dtype=torch.bfloat16).quantize().quantization["from"] == "bfloat16"


def test_a_quantized_prefix_keeps_its_dtype_when_moved() -> None:
    small = make().quantize(2)
    assert small.to(dtype=torch.bfloat16) is small and small.to(device="cpu") is small
    moved = small.to(device="meta", dtype=torch.bfloat16)
    assert moved.dtype == torch.int8 and moved.device.type == "meta"
    assert {scale.device.type for scale in moved.scales.keys + moved.scales.values} == {"meta"}
    assert {scale.dtype for scale in moved.scales.keys} == {torch.float32}


@given(tokens=st.integers(1, 9), block=st.integers(1, 12), verify=st.booleans())
@settings(max_examples=20, deadline=None)
def test_quantized_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: int, block: int, verify: bool) -> None:
    directory = tmp_path_factory.mktemp("prefix")
    prefix = make(tokens=tokens, shapes=((2, 8), (1, 3))).quantize(block)
    prefix.save_pretrained(directory)
    found = PrefixKV.from_pretrained(directory, verify=verify)
    assert_equal(found, prefix)
    assert found.scales.block == block and found.quantization == prefix.quantization
    for x, y in zip(found.dequantize().keys, prefix.dequantize().keys, strict=True):
        assert torch.equal(x, y)
    described = json.loads((directory / prefix_kv.METADATA_NAME).read_text())
    assert (described["format_version"], described["dtype"], described["scale_block"]) == (2, "int8", block)


def test_damaged_quantized_files(tmp_path: Path) -> None:
    path = tmp_path / prefix_kv.TENSORS_NAME
    for changes, message in (
        ({"scale_block": 3}, r"header and tensors disagree \(scales of layer 0: expected float32 \[2, 2\]"),
        ({"scale_block": 0}, "header and tensors disagree .*found 0"),
        ({"scale_block": None}, "header and tensors disagree .*found None"),
        ({"format_version": 1}, "header and tensors disagree .*found int8 without scales"),
    ):
        make().quantize(1).save_pretrained(tmp_path)
        rewrite_header(tmp_path, **changes)
        with pytest.raises(PrefixError, match="does not have the digest"):
            PrefixKV.from_pretrained(tmp_path)
        with pytest.raises(PrefixError, match=message):
            PrefixKV.from_pretrained(tmp_path, verify=False)
    make().quantize(1).save_pretrained(tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del tensors["layers.1.value_scale"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(PrefixError, match=r"header and tensors disagree .*layers\.1\.value_scale"):
        PrefixKV.from_pretrained(tmp_path, verify=False)


def test_what_can_not_be_quantized() -> None:
    with pytest.raises(ValueError, match="the prefix is int8 already"):
        make().quantize().quantize()
    for block in (0, -1, 2.0, None):
        with pytest.raises(ValueError, match=rf"block: expected a number of tokens > 0, found {block}"):
            make().quantize(block)
    infinite = make()
    infinite.keys[0][0, 0, 0] = float("inf")
    with pytest.raises(ValueError, match="1 of 64 values are NaN or infinite"):
        infinite.quantize()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"scales": None},
            "expected int8 or float8_e4m3fn throughout with scales, floating without, found int8 without scales",
        ),
        ({"keys": [torch.zeros(2, 4, 8)]}, "found float32, int8 with scales"),
        ({"block": 0}, "scales: expected a block of > 0 tokens, found 0"),
        ({"block": 4}, r"scales of layer 0: expected float32 \[2, 1\], found float32 \[2, 2\]"),
        ({"value_scales": ()}, "scales: expected 1 layers, found 1 of keys and 0 of values"),
        ({"value_scales": (torch.zeros(2, 2).half(),)}, r"expected float32 \[2, 2\], found float16 \[2, 2\]"),
    ],
)
def test_scales_that_do_not_fit(change: dict, message: str) -> None:
    entries, scale = torch.zeros(2, 4, 8, dtype=torch.int8), torch.zeros(2, 2)
    scales = Scales((scale,), change.get("value_scales", (scale,)), change.get("block", 2))
    with pytest.raises(ValueError, match=message):
        PrefixKV(
            change.get("keys", [entries]),
            [entries],
            method="CPT",
            fingerprint="a-b",
            scales=change.get("scales", scales),
        )


# ---------------------------------------------------------------------------- damaged, altered, foreign


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected prefix_kv\.safetensors in .*nowhere"):
        PrefixKV.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 7, 8, 500, -1])
@pytest.mark.parametrize("verify", [True, False])
def test_truncated_files_are_refused(keep: int, verify: bool, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / prefix_kv.TENSORS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PrefixError, match="truncated or damaged"):
        PrefixKV.from_pretrained(tmp_path, verify=verify)


@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_no_flipped_bit_goes_unnoticed(tmp_path_factory: pytest.TempPathFactory, position: float, bit: int) -> None:
    directory = tmp_path_factory.mktemp("prefix")
    make().save_pretrained(directory)
    path = directory / prefix_kv.TENSORS_NAME
    content = bytearray(path.read_bytes())
    index = int(position * len(content))
    content[index] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = PrefixKV.from_pretrained(directory)
    except PrefixError:
        return
    assert_equal(found, make())  # a flip in the header's white space or the order of its entries changes nothing


def rewrite_header(directory: Path, **changes: object) -> None:
    """Alter the header of a saved prefix, leaving its tensors."""
    path = directory / prefix_kv.TENSORS_NAME
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["prefix_kv"]) | changes
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"prefix_kv": json.dumps(header)})
    (directory / prefix_kv.METADATA_NAME).unlink(missing_ok=True)


def test_altered_headers(tmp_path: Path) -> None:
    for changes, message in (
        ({"fingerprint": "c-d"}, "altered or damaged, its content does not have the digest"),
        ({"metadata": {}}, "altered or damaged, its content does not have the digest"),
        ({"format_version": 3}, r"format_version 3 is newer than this softprompt_fast reads \(up to 2\)"),
        ({"format_version": "x"}, "its metadata is no description of a prefix"),
    ):
        make().save_pretrained(tmp_path)
        rewrite_header(tmp_path, **changes)
        with pytest.raises(PrefixError, match=message):
            PrefixKV.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    rewrite_header(tmp_path, num_layers=3)
    with pytest.raises(PrefixError, match=r"header and tensors disagree .*layers\.2\.key"):
        PrefixKV.from_pretrained(tmp_path, verify=False)
    save_file({"x": torch.zeros(1)}, tmp_path / prefix_kv.TENSORS_NAME)
    with pytest.raises(PrefixError, match="but no PrefixKV"):
        PrefixKV.from_pretrained(tmp_path)


def test_an_edited_json_file_is_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    path = tmp_path / prefix_kv.METADATA_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "CPT"}))
    with pytest.raises(PrefixError, match=r"prefix_kv\.json: altered, \['method'\] differ from the header"):
        PrefixKV.from_pretrained(tmp_path)
    path.write_text("{")
    with pytest.raises(PrefixError, match=r"prefix_kv\.json: altered or damaged"):
        PrefixKV.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------- interrupted saves


def test_disk_full_leaves_the_old_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            make(1).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


LIMITED = """
import resource, signal, sys
from tests.test_prefix_kv import make
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes past the limit fail with EFBIG instead
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    make(1, tokens=4096).save_pretrained(sys.argv[1])
except OSError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits file sizes with POSIX's setrlimit")
def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = warm.run(LIMITED, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("refused:"), done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


ROOT = Path(__file__).resolve().parent.parent
KILLED = """
import os, signal, sys
from softprompt_fast import _io, prefix_kv
from tests.test_prefix_kv import make
directory, stage = sys.argv[1:]
calls = 0

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def half_a_file(tensors, path, metadata):
    whole(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

def second(*arguments):
    global calls
    calls += 1
    replace(*arguments) if calls == 1 else die()

whole, replace = prefix_kv.save_file, os.replace
if stage == "writing":
    prefix_kv.save_file = half_a_file
elif stage == "flushing":
    os.fsync = die
elif stage == "renaming":
    os.replace = die
else:
    os.replace = second
make(1).save_pretrained(directory)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process with POSIX's SIGKILL")
@pytest.mark.parametrize(("stage", "seed"), [("writing", 0), ("flushing", 0), ("renaming", 0), ("between", 1)])
def test_killed_while_saving(stage: str, seed: int, tmp_path: Path) -> None:
    make(0).save_pretrained(tmp_path)
    done = warm.run(KILLED, str(tmp_path), stage, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert_equal(PrefixKV.from_pretrained(tmp_path), make(seed))
    make(2).save_pretrained(tmp_path)  # and the next save is none the worse for it
    assert_equal(PrefixKV.from_pretrained(tmp_path), make(2))


WRITER = """
import sys
from tests.test_prefix_kv import make
prefixes = [make(seed, tokens=256) for seed in (0, 1)]
print("ready", flush=True)
while True:
    for prefix in prefixes:
        prefix.save_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process with POSIX's SIGKILL")
def test_readers_beside_a_writer_see_one_whole_version(tmp_path: Path) -> None:
    digests = {make(seed, tokens=256).digest for seed in (0, 1)}
    make(0, tokens=256).save_pretrained(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as writer:
        try:
            assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
            seen = set()
            until = time.monotonic() + 30
            while seen != digests and time.monotonic() < until:
                for _ in range(20):
                    seen.add(PrefixKV.from_pretrained(tmp_path).digest)
        finally:
            writer.kill()
    assert seen == digests
    assert PrefixKV.from_pretrained(tmp_path).digest in digests


# ---------------------------------------------------------------------------- the base model


def test_fingerprint_is_the_checkpoints_not_the_dtypes() -> None:
    model = llama()
    fingerprint = model_fingerprint(model)
    assert re.fullmatch("[0-9a-f]{16}-[0-9a-f]{16}", fingerprint)
    assert model_fingerprint(llama()) == fingerprint
    assert model_fingerprint(llama().to(torch.bfloat16)) == fingerprint
    model.config.use_cache = False
    model.config.attention_dropout = 0.5
    model.config.name_or_path = "elsewhere"
    assert model_fingerprint(model) == fingerprint


def test_fingerprint_survives_saving_and_loading(tmp_path: Path) -> None:
    model = llama()
    for index, dtype in enumerate((torch.float32, torch.bfloat16)):
        model.to(dtype).save_pretrained(tmp_path / str(index))
        loaded = type(model).from_pretrained(tmp_path / str(index), dtype=dtype, attn_implementation="eager")
        assert loaded.dtype == dtype
        assert model_fingerprint(loaded) == model_fingerprint(llama())


def test_fingerprint_tells_apart_config_and_each_weight() -> None:
    config, weights = model_fingerprint(llama()).split("-")
    other = model_fingerprint(llama(rms_norm_eps=1e-3)).split("-")
    assert other[0] != config and other[1] == weights
    other = model_fingerprint(llama(seed=1)).split("-")
    assert other[0] == config and other[1] != weights
    model = llama()
    for name, weight in model.named_parameters():
        weight.data.view(-1)[0] += 0.125
        assert model_fingerprint(model).split("-")[1] != weights, name
        weight.data.view(-1)[0] -= 0.125


def test_fingerprint_needs_weights() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"base_model: weight .* is on the meta device"):
        model_fingerprint(model)


def test_loading_for_another_base_names_what_differs(tmp_path: Path) -> None:
    model = llama()
    prefix = PrefixKV(
        make().keys,
        make().values,
        method="CARTRIDGE",
        fingerprint=model_fingerprint(model),
        metadata={"base_config": base_config_fields(model)},
    )
    prefix.save_pretrained(tmp_path)
    assert_equal(PrefixKV.from_pretrained(tmp_path, base_model=llama()), prefix)
    with pytest.raises(PrefixFingerprintError) as error:
        PrefixKV.from_pretrained(tmp_path, base_model=llama(seed=1))
    assert prefix.fingerprint in str(error.value) and model_fingerprint(llama(seed=1)) in str(error.value)
    assert str(error.value).endswith("they differ in the weights")
    with pytest.raises(
        PrefixFingerprintError, match=r"configuration, rms_norm_eps \(prefix: default, base: 0\.001\)$"
    ):
        PrefixKV.from_pretrained(tmp_path, base_model=llama(rms_norm_eps=1e-3))
    with pytest.raises(PrefixFingerprintError, match=r"num_hidden_layers \(prefix: 2, base: 1\) and the weights$"):
        PrefixKV.from_pretrained(tmp_path, base_model=llama(num_hidden_layers=1))
