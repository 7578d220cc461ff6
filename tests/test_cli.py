# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints where, what it leaves on disk, and the exit code of every kind of failure."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from softprompt_fast import PrefixKV, SoftPrompt, SoftPromptModel, __version__, info
from softprompt_fast.backends import _registry
from softprompt_fast.cli._session import Exit
from softprompt_fast.cli.app import app

ROOT = Path(__file__).parent.parent
WORDS = ["<pad>", "<unk>", "the", "film", "is", "good", "bad", "positive", "negative", "Review", "Sentiment", ":", "a"]


def save_base(folder: Path, *, hidden: int = 32) -> Path:
    """A tiny model with a tokenizer of whole words, as ``--base`` takes it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> SoftPromptModel:
    """The base with two different prompts, "a" and "b"."""
    found = SoftPromptModel.from_pretrained(base)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        found.add_prompt(name, SoftPrompt.for_model("PROMPT_TUNING", found.base, num_virtual_tokens=4))
    return found.eval()


@pytest.fixture(scope="module")
def adapters(model: SoftPromptModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    for name in "ab":
        model.save_prompt(name, folder / name)
    return {name: folder / name for name in "ab"}


def call(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def call_process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "softprompt_fast.cli", *(str(arg) for arg in args)]
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def assert_failed(result: Result, code: Exit, *parts: str) -> None:
    assert result.exit_code == code, result.output
    message = " ".join(result.stderr.split())  # typer wraps usage errors to the terminal's width
    for part in parts:
        assert part in message
    assert "Traceback" not in result.output


def test_version_and_help():
    assert call("--version").stdout == f"softprompt-fast {__version__}\n"
    shown = " ".join(call("--help").stdout.split())
    for command in ("demo", "compile", "generate", "train", "info", "tune"):
        assert command in shown
        assert "Exit codes: 0 done" in " ".join(call(command, "--help").stdout.split())
    assert "Exit codes: 0 done" in shown


def test_help_needs_no_heavy_import():
    code = "import sys; from softprompt_fast.cli.app import app; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- the commands do their work ---------------------------------------------------------------------------------


def test_info(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(_registry.ENVIRONMENT_VARIABLE, raising=False)
    found = json.loads(call("info", "--json").stdout)
    assert found["version"] == __version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["ops"] == {op: _registry.available_backends(op) for op in _registry.OPS}
    assert found["ops"]["prefix_attention"]["torch"] == []
    assert found["extension"]["loaded"] in (True, False) and found["extension"]["reason"]
    tables = found["triton"]["tables"]  # in this process, for the interpreter
    assert found["triton"]["serves"] == bool(tables) and all(Path(path).is_file() for path in tables.values())
    text = call("info").stdout
    for name in (*_registry.OPS, *_registry.BACKENDS, "CPU features", "extension", "CUDA kernels", "Triton kernels"):
        assert name in text


def test_compile(base: Path, adapters: dict[str, Path], model: SoftPromptModel, tmp_path: Path):
    result = call("compile", adapters["a"], "--base", base, "-o", tmp_path / "prefix", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    saved = PrefixKV.from_pretrained(tmp_path / "prefix", base_model=model.base)
    expected = model.compile_prompt("a")
    for ours, theirs in zip(saved.keys + saved.values, expected.keys + expected.values, strict=True):
        assert torch.equal(ours, theirs)
    assert (said["method"], said["num_virtual_tokens"], said["num_layers"]) == ("PROMPT_TUNING", 4, 2)
    assert said["bytes"] == expected.nbytes and said["sha256"] == saved.digest and said["dtype"] == "float32"


@pytest.mark.parametrize(("option", "dtype"), [("--int8", torch.int8), ("--fp8", torch.float8_e4m3fn)])
def test_compile_to_8_bits(
    option: str, dtype: torch.dtype, base: Path, adapters: dict[str, Path], model: SoftPromptModel, tmp_path: Path
):
    result = call("compile", adapters["a"], "--base", base, "-o", tmp_path / "prefix", option, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    saved = PrefixKV.from_pretrained(tmp_path / "prefix", base_model=model.base)
    expected = model.compile_prompt("a").quantize(dtype=dtype)
    assert all(torch.equal(x.float(), y.float()) for x, y in zip(saved.keys, expected.keys, strict=True))
    kind = str(dtype).removeprefix("torch.")
    assert said["dtype"] == kind and said["bytes"] == saved.nbytes and said["quantization"] == saved.quantization
    shown = call("compile", adapters["a"], "--base", base, "-o", tmp_path / "again", option).stderr
    assert f"{kind} error (relative, worst layer): keys" in " ".join(shown.split())
    args = ("--base", base, "--prompt", f"a={tmp_path / 'prefix'}", "--max-new-tokens", 3, "--json")
    assert json.loads(call("generate", "the film", *args).stdout)["results"][0]["prompt"] == "a"


def test_compile_prints_for_people_on_standard_error(base: Path, adapters: dict[str, Path], tmp_path: Path):
    result = call("compile", adapters["a"], "--base", base, "-o", tmp_path / "prefix")
    assert result.exit_code == 0, result.output
    assert "4 virtual tokens, 2 layers" in " ".join(result.stderr.split()) and result.stdout == ""


def test_generate_a_prompt_per_text(base: Path, adapters: dict[str, Path], model: SoftPromptModel):
    texts = ["the film is good", "the film", "a bad film"]
    prompts = ["a", None, "b"]
    args = ["generate", *texts, "--base", base, "--max-new-tokens", 6, "--json"]
    args += [part for name, folder in adapters.items() for part in ("--prompt", f"{name}={folder}")]
    args += [part for name in prompts for part in ("--prompt-name", name or "none")]
    result = call(*args)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(prompts, texts, strict=True))
    for row in rows:  # each alone, with no padding
        ids = torch.tensor([[WORDS.index(word) for word in row["text"].split()]])
        new = model.generate(input_ids=ids, prompt=row["prompt"], max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert row["continuation"].split() == [WORDS[i] for i in new if WORDS[i] not in ("<pad>", "<unk>")]
    assert rows[0]["continuation"] != rows[2]["continuation"], "two prompts that change nothing test nothing"


def test_generate_takes_a_compiled_prefix(base: Path, adapters: dict[str, Path], tmp_path: Path):
    call("compile", adapters["a"], "--base", base, "-o", tmp_path / "prefix")
    common = ("generate", "the film is", "--base", base, "--max-new-tokens", 5, "--json", "--prompt")
    from_prefix, from_adapter = (
        json.loads(call(*common, f"a={folder}").stdout)["results"] for folder in (tmp_path / "prefix", adapters["a"])
    )
    assert from_prefix == from_adapter


def test_generate_samples_by_seed(base: Path, adapters: dict[str, Path]):
    common = ("generate", "the film", "--base", base, "--prompt", f"a={adapters['a']}", "--max-new-tokens", 12)
    sampled = [
        json.loads(call(*common, "--temperature", 5, "--seed", seed, "--json").stdout)["results"] for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_prints_for_people(base: Path, adapters: dict[str, Path]):
    result = call("generate", "the film", "--base", base, "--prompt", f"a={adapters['a']}", "--max-new-tokens", 3)
    assert result.stdout.startswith("[a] the film")


# ---- and fail with the right code -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["generate", "--base", "x"], ["texts"]),
        (
            ["generate", "text", "--base", "x", "--prompt", "no-equals-sign"],
            ["--prompt", "NAME=DIR", "no-equals-sign"],
        ),
        (["generate", "text", "--base", "x", "--prompt", "none=folder"], ["other than 'none'"]),
        (["generate", "text", "--base", "x", "--prompt", "n=a", "--prompt", "n=b"], ["every name may be given once"]),
        (["generate", "text", "--base", "x", "--prompt", "n=a", "--prompt", "m=b"], ["say which", "n, m"]),
        (
            ["generate", "text", "--base", "x", "--prompt", "n=a", "--prompt-name", "m"],
            ["unknown: m", "known: n, none"],
        ),
        (
            ["generate", "1", "2", "3", "--base", "x", "--prompt", "n=a", "--prompt-name", "n", "--prompt-name", "n"],
            ["expected 1 or 3", "found 2"],
        ),
        (["generate", "text", "--base", "x", "--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["compile", "folder", "-o", "out"], ["--base"]),
        (["no-such-command"], ["no-such-command"]),
    ],
)
def test_wrong_command_lines(args: list[str], parts: list[str]):
    assert_failed(call(*args), Exit.USAGE, *parts)


def test_two_kinds_of_8_bits(adapters: dict[str, Path], tmp_path: Path):
    result = call("compile", adapters["a"], "--base", "x", "-o", tmp_path, "--int8", "--fp8")
    assert_failed(result, Exit.USAGE, "--int8, --fp8", "expected one of the two")


def test_wrong_dtype(adapters: dict[str, Path], tmp_path: Path):
    result = call("compile", adapters["a"], "--base", "x", "-o", tmp_path, "--dtype", "int8")
    assert_failed(result, Exit.USAGE, "--dtype", "expected float32, bfloat16 or float16", "'int8'")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: tune would run")
def test_tune_without_a_gpu(tmp_path: Path):
    result = call("tune", "--op", "merge_states", "-o", tmp_path, "--json")
    assert_failed(result, Exit.UNEXPECTED, "the GPU at hand" if info.collect()["triton"]["serves"] else "triton")
    assert json.loads(result.stdout)["exit_code"] == 1 and not list(tmp_path.iterdir())


def test_tune_of_what_is_not_there():
    pytest.importorskip("triton")
    assert_failed(call("tune", "--op", "attention"), Exit.INPUT, "op: expected", "merge_states", "found attention")
    wrong = call("tune", "--op", "merge_states", "--kernel", "x")
    assert_failed(wrong, Exit.INPUT, "kernel: expected forward, backward, found x")


def test_missing_folders(base: Path, adapters: dict[str, Path], tmp_path: Path):
    missing = tmp_path / "missing"
    assert_failed(call("compile", missing, "--base", base, "-o", tmp_path), Exit.IO, "no such directory")
    assert_failed(call("generate", "text", "--base", base, "--prompt", f"a={missing}"), Exit.IO, "no such directory")
    assert_failed(call("compile", adapters["a"], "--base", missing, "-o", tmp_path), Exit.IO, "missing")


def test_an_adapter_of_another_base(adapters: dict[str, Path], tmp_path: Path):
    wider = save_base(tmp_path / "wider", hidden=48)
    result = call("compile", adapters["a"], "--base", wider, "-o", tmp_path / "out", "--json")
    assert_failed(result, Exit.INPUT, "32", "48")
    failure = json.loads(result.stdout)
    assert failure["exit_code"] == Exit.INPUT and "48" in failure["error"]
    assert not (tmp_path / "out").exists()


def test_a_lora_adapter(base: Path, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    save_file({"base_model.model.q_proj.lora_A.weight": torch.zeros(8, 32)}, tmp_path / "adapter_model.safetensors")
    assert_failed(call("generate", "text", "--base", base, "--prompt", f"l={tmp_path}"), Exit.INPUT, "LORA")


def test_an_altered_prefix(base: Path, adapters: dict[str, Path], tmp_path: Path):
    call("compile", adapters["a"], "--base", base, "-o", tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert_failed(call("generate", "the film", "--base", base, "--prompt", f"a={tmp_path}"), Exit.INPUT)


def test_disk_full(base: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(PrefixKV, "save_pretrained", full)
    result = call("compile", adapters["a"], "--base", base, "-o", tmp_path)
    assert_failed(result, Exit.IO, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("raised", "code", "parts"),
    [
        (RuntimeError("lost"), Exit.UNEXPECTED, ["unexpected RuntimeError: lost", "SOFTPROMPT_FAST_DEBUG=1"]),
        (KeyError("prompt: unknown 'x'"), Exit.INPUT, ["error: prompt: unknown 'x'"]),
        (ModuleNotFoundError("No module named 'gguf'"), Exit.IO, ["gguf", "softprompt-fast[demo]"]),
        (_registry.BackendError("no backend"), Exit.INPUT, ["error: no backend"]),
        (KeyboardInterrupt(), Exit.INTERRUPTED, ["interrupted"]),
    ],
)
def test_exit_code_of_every_kind_of_error(
    raised: BaseException, code: Exit, parts: list[str], monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise raised

    monkeypatch.setattr("softprompt_fast.info.collect", fail)
    monkeypatch.delenv("SOFTPROMPT_FAST_DEBUG", raising=False)
    assert_failed(call("info"), code, *parts)


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise RuntimeError("lost")

    monkeypatch.setattr("softprompt_fast.info.collect", fail)
    monkeypatch.setenv("SOFTPROMPT_FAST_DEBUG", "1")
    assert isinstance(call("info").exception, RuntimeError)


# ---- as a real process ------------------------------------------------------------------------------------------


def test_json_is_all_that_a_process_prints(base: Path, adapters: dict[str, Path]):
    args = ("generate", "the film", "--base", base, "--prompt", f"a={adapters['a']}", "--max-new-tokens", 2, "--json")
    done = call_process(*args)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["prompt"] == "a"


def test_exit_codes_of_a_process(base: Path, adapters: dict[str, Path], tmp_path: Path):
    expected = {
        Exit.OK: call_process("info", "--json"),
        Exit.USAGE: call_process("compile"),
        Exit.INPUT: call_process(
            "generate", "the", "--base", base, "--prompt", f"a={adapters['a']}", SOFTPROMPT_FAST_BACKEND="warp"
        ),
        Exit.IO: call_process("compile", tmp_path / "missing", "--base", base, "-o", tmp_path),
    }
    assert {code: done.returncode for code, done in expected.items()} == {code: code for code in expected}
    assert not [done for done in expected.values() if "Traceback" in done.stderr]
    assert "expected 'auto' or one of reference, torch" in expected[Exit.INPUT].stderr
