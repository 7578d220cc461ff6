# SPDX-License-Identifier: Apache-2.0
"""``softprompt-fast serve``."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from softprompt_fast.cli._session import session

PROMPTS, LISTEN, LIMITS = "Prompts", "Listening", "Limits"


def serve(
    model: Annotated[str, typer.Option(help="Base model: a folder, a hub name, or 'demo' for the bundled one.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="NAME=DIR of a PEFT adapter or a compiled prefix. May be given several times.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            exists=True,
            file_okay=False,
            help="Folder whose subfolders are prompts, each under its name.",
            rich_help_panel=PROMPTS,
        ),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin",
            help="Let clients load and remove prompts of the --prompts folder. Needs an API key.",
            rich_help_panel=PROMPTS,
        ),
    ] = False,
    device_bytes: Annotated[
        int | None, typer.Option(help="Prefixes that batches attend to, in bytes.", rich_help_panel=PROMPTS)
    ] = None,
    host_bytes: Annotated[
        int | None, typer.Option(help="Prefixes kept in host memory, in bytes.", rich_help_panel=PROMPTS)
    ] = None,
    prefix_dtype: Annotated[
        str | None, typer.Option(help="Keep prefixes in int8 or float8_e4m3fn.", rich_help_panel=PROMPTS)
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address; other than loopback ones need an API key.", rich_help_panel=LISTEN),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 lets the system choose.", rich_help_panel=LISTEN)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SOFTPROMPT_FAST_API_KEY",
            show_envvar=True,
            help="What clients must send as a bearer token. Better by the environment: others see command lines.",
            rich_help_panel=LISTEN,
        ),
    ] = None,
    served_model_name: Annotated[
        str | None,
        typer.Option(help="Name of the base without a prompt; left out: the end of --model.", rich_help_panel=LISTEN),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Jinja template, or a file with one, in place of the tokenizer's.", rich_help_panel=LISTEN),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Rows that run together.", rich_help_panel=LIMITS)] = 32,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that wait; more are told 429.", rich_help_panel=LIMITS)
    ] = 256,
    max_prefill_tokens: Annotated[
        int, typer.Option(help="New requests' tokens between two steps.", rich_help_panel=LIMITS)
    ] = 512,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Tokens of a row, virtual ones included; the base's positions.", rich_help_panel=LIMITS),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds a request may take; 600 unless told otherwise.", rich_help_panel=LIMITS),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Seconds for running requests at the end.", rich_help_panel=LIMITS)
    ] = 30.0,
    engine: Annotated[str, typer.Option(help="embedded, or vllm with this package's plugin.")] = "embedded",
    dtype: Annotated[str, typer.Option(help="Of the base: float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Serve many soft prompts over one base through OpenAI's HTTP API; each prompt is a model name."""
    with session(as_json=False, extra="vllm" if engine == "vllm" else "serve") as run:
        from softprompt_fast.serving.settings import ServeSettings, SettingsError

        try:
            settings = ServeSettings(
                model=model,
                prompts=_named_folders(prompts or []),
                prompts_folder=folder,
                host=host,
                port=port,
                api_key=api_key,
                engine=engine,
                dtype=dtype,
                served_model_name=served_model_name,
                chat_template=chat_template,
                max_batch=max_batch,
                max_waiting=max_waiting,
                max_prefill_tokens=max_prefill_tokens,
                max_model_len=max_model_len,
                timeout=timeout,
                grace=grace,
                device_bytes=device_bytes,
                host_bytes=host_bytes,
                prefix_dtype=prefix_dtype,
                admin=admin,
            )
        except SettingsError as error:
            raise typer.BadParameter(str(error)) from None
        if settings.engine == "vllm":
            from softprompt_fast.demo import assets

            if settings.model == assets.DEMO_MODEL:  # which only this package knows
                found = str(assets.demo_model_dir(run.say))
                settings = replace(settings, model=found, served_model_name=settings.base_name)
            importlib.import_module("softprompt_fast.integrations.vllm.serve").run(settings)
        else:
            from softprompt_fast.serving import embedded

            embedded.run(settings, run.say)


def _named_folders(prompts: list[str]) -> dict[str, Path]:
    folders = {}
    for prompt in prompts:
        name, equals, folder = prompt.partition("=")
        if not (name and equals and folder) or name in folders:
            raise typer.BadParameter(f"expected NAME=DIR, each NAME once, found {prompt!r}", param_hint="--prompt")
        folders[name] = Path(folder)
    return folders
