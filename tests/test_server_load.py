# SPDX-License-Identifier: Apache-2.0
"""Many clients at once, a real model: no text is wrong and no request is lost."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from softprompt_fast import SoftPrompt, SoftPromptModel
from softprompt_fast.demo import load_demo_model
from softprompt_fast.demo.assets import load_reviews
from softprompt_fast.serving.engine import Engine
from tests.serving import PATIENCE, served

REQUESTS, CLIENTS, PROMPTS, NEW = 200, 16, 20, 8


@pytest.mark.real
@pytest.mark.slow
def test_two_hundred_requests_over_twenty_prompts():
    base, tokenizer = load_demo_model()
    model = SoftPromptModel(base)
    reviews = [review.text for review in load_reviews()]
    tokens = torch.tensor(tokenizer(" ".join(reviews[:200]))["input_ids"])
    rng = random.Random(0)
    for i in range(PROMPTS):
        # Prompts of real words, so that no two of the most probable tokens are ever as probable but for rounding.
        prompt = SoftPrompt.for_model("PROMPT_TUNING", base, num_virtual_tokens=rng.randint(16, 128))
        first = rng.randrange(len(tokens) - 128)
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.copy_(base.get_input_embeddings()(tokens[first : first + len(parameter)]))
        model.add_prompt(f"prompt-{i}", prompt.requires_grad_(False))
    asked = [(f"prompt-{rng.randrange(PROMPTS)}", rng.choice(reviews)) for _ in range(REQUESTS)]

    def ask(client: openai.OpenAI, name: str, text: str, stream: bool) -> str:
        options = {"model": name, "prompt": text, "max_tokens": NEW, "temperature": 0, "timeout": PATIENCE}
        if not stream:
            return client.completions.create(**options).choices[0].text
        chunks = client.completions.create(**options, stream=True)
        return "".join(choice.text for chunk in chunks for choice in chunk.choices)

    with Engine(model, tokenizer) as engine, served(engine) as url, ThreadPoolExecutor(CLIENTS) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        waiting = [pool.submit(ask, client, *request, stream=i % 2 == 0) for i, request in enumerate(asked)]
        found = [answer.result(PATIENCE) for answer in waiting]
        assert engine.bank_metrics()["held_prefixes"] == 0
    for (name, text), answer in zip(asked, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, prompt=name, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(alone, skip_special_tokens=True), (name, text)
