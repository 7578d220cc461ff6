# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: the six prompt-learning methods of PEFT 0.21, with PEFT not needed.

A `SoftPrompt` turns its parameters into what the model consumes:

- *embedding* methods (PROMPT_TUNING, P_TUNING, MULTITASK_PROMPT_TUNING, CPT) give virtual token embeddings `[P, H]`;
- *prefix* methods (PREFIX_TUNING, CARTRIDGE) give keys and values of every layer, `[Hkv, P, D]` each.

Parameters carry the names they have in PEFT's prompt encoders (`embedding.weight`, `mlp_head.0.weight`, ...), and a
live PEFT encoder's own modules can stand in for ours (`SoftPrompt.from_encoder`), so both train the same tensors.
"""

from __future__ import annotations

import copy
import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from softprompt_fast.errors import AdapterError

if TYPE_CHECKING:
    from softprompt_fast.prefix_kv import PrefixKV

TokenEmbeddings = Tensor | nn.Module
"""A token table `[V, H]`, or the module that looks ids up in it (some families scale inside that module)."""

_COMMON_DEFAULTS: dict[str, Any] = {
    "task_type": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": False,
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_transformer_submodules": None,
    "num_attention_heads": None,
    "num_layers": None,
    "modules_to_save": None,
}


@dataclass(frozen=True)
class BaseShape:
    """The sizes of a base model that a soft prompt has to fit.

    `num_kv_heads` and `head_dim` are None where layers differ from one another (heterogeneous configurations).
    """

    hidden_size: int
    embedding_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None

    @classmethod
    def of(cls, base: Any) -> BaseShape:
        """Read the sizes from a transformers model or configuration (for multimodal ones: of their text model)."""
        config = getattr(base, "config", base)
        config = getattr(config, "text_config", config)
        fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)

        def look_up(*names: str) -> Any:
            for name in names:
                value = fields.get(name)
                if value is None and not isinstance(config, Mapping):
                    value = getattr(config, name, None)  # transformers' attribute_map serves the common names
                if value is not None:
                    return value
            return None

        hidden_size = look_up("hidden_size", "n_embd", "d_model")
        num_layers = look_up("num_hidden_layers", "num_layers", "n_layer")
        num_heads = look_up("num_attention_heads", "num_heads", "n_head", "encoder_attention_heads")
        for name, value in (
            ("hidden_size", hidden_size),
            ("num_hidden_layers", num_layers),
            ("num_attention_heads", num_heads),
        ):
            if value is None:
                raise AdapterError(f"the base model's configuration ({type(config).__name__}) has no {name}")

        embedding_dim = look_up("word_embed_proj_dim", "embedding_size") or hidden_size
        if callable(get_embeddings := getattr(base, "get_input_embeddings", None)):
            embedding_dim = getattr(get_embeddings(), "embedding_dim", embedding_dim)

        num_kv_heads: int | None = None
        head_dim: int | None = None
        if not fields.get("per_layer_config"):
            head_dim = look_up("head_dim", "d_kv") or hidden_size // num_heads
            num_kv_heads = look_up("num_key_value_heads")
            if num_kv_heads is None:
                # Falcon's original multi-query attention caches a single head; its later design caches all of them.
                single = fields.get("multi_query") and not fields.get("new_decoder_architecture")
                num_kv_heads = 1 if single else num_heads
        vocab_size = look_up("vocab_size")
        return cls(hidden_size, embedding_dim, num_layers, num_heads, num_kv_heads, head_dim, vocab_size)


class SoftPrompt(nn.Module):
    """A trainable prompt of `num_virtual_tokens` virtual tokens. Make one with `from_config` or `for_model`.

    Attributes:
        method: PEFT's name of the method, e.g. ``"PROMPT_TUNING"``.
        kind: ``"embedding"`` or ``"prefix"``.
        config: content of the ``adapter_config.json`` that describes it; keys this version does not know are kept.
        num_virtual_tokens: P of one transformer submodule.
        num_transformer_submodules: 2 where encoder and decoder have a prompt each (SEQ_2_SEQ_LM), else 1.
        task_type: PEFT's task type, or None.
        modules_to_save: tensors of fully trained modules of the base (such as a classification head) that travel
            with the adapter, by their name in the base model's state dict, e.g. ``"classifier.weight"``.
    """

    method: ClassVar[str]
    kind: ClassVar[Literal["embedding", "prefix"]]
    defaults: ClassVar[dict[str, Any]] = {}
    embedding: nn.Embedding
    # Parameters that the method itself never trains, whatever `requires_grad_` says.
    always_frozen: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.config = complete_config(config)
        self.num_virtual_tokens: int = self.config["num_virtual_tokens"]
        self.num_transformer_submodules: int = self.config["num_transformer_submodules"]
        self.task_type: str | None = self.config["task_type"]
        self.modules_to_save: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ construction

    @staticmethod
    def from_config(
        config: Mapping[str, Any],
        *,
        token_embeddings: TokenEmbeddings | None = None,
        init_token_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> SoftPrompt:
        """A fresh prompt, initialised as PEFT would (the same torch seed gives the same values).

        Args:
            config: content of an ``adapter_config.json``; `peft_type`, `num_virtual_tokens` and the base's sizes
                (`token_dim`, and for prefix methods `num_layers` and `num_attention_heads`) are required.
            token_embeddings: the base's token table, for initialisations that start from real tokens: always for
                CPT, and for `prompt_tuning_init` SAMPLE_VOCAB and TEXT.
            init_token_ids: ids of the text to start from (TEXT; given alone it implies TEXT); repeated or cut to fit.
            device, dtype: of the parameters.

        Raises:
            AdapterError: an option is missing, unknown or out of range; the message names it.
        """
        config = dict(config)
        if init_token_ids is not None and "prompt_tuning_init" in _prompt_class(config).defaults:
            config["prompt_tuning_init"] = "TEXT"
        prompt = _prompt_class(config)(config)
        prompt.build()
        if prompt.needs_token_embeddings:
            prompt.start_from_tokens(token_embeddings, init_token_ids)
        elif init_token_ids is not None:
            raise AdapterError(f"init_token_ids: {prompt.method} does not start from tokens of the caller's choice")
        return prompt.to(device=device, dtype=dtype)

    @staticmethod
    def for_model(
        method: str,
        base: Any,
        *,
        num_virtual_tokens: int | None = None,
        init_token_ids: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> SoftPrompt:
        """A fresh prompt sized for `base`, a transformers model (or its configuration).

        Args:
            method: one of `METHODS`.
            num_virtual_tokens: P; CPT derives it from `cpt_token_ids`.
            init_token_ids: start PROMPT_TUNING or MULTITASK_PROMPT_TUNING from these tokens' embeddings.
            options: further keys of PEFT's configuration of that method, e.g. ``encoder_hidden_size=128``.

        Raises:
            AdapterError: unknown method; an unknown or invalid option; `base` has layers of different shapes.
        """
        config = {"peft_type": method, "task_type": "CAUSAL_LM", "num_virtual_tokens": num_virtual_tokens, **options}
        known = _COMMON_DEFAULTS.keys() | _prompt_class(config).defaults.keys() | {"peft_type"}
        if unknown := sorted(config.keys() - known):
            raise AdapterError(f"unknown option(s) {unknown} for {method}; it knows {sorted(known)}")
        shape = BaseShape.of(base)
        sizes: dict[str, Any] = {"num_layers": shape.num_layers}
        if _prompt_class(config).kind == "embedding":
            sizes |= {"token_dim": shape.embedding_dim, "num_attention_heads": shape.num_heads}
        elif shape.num_kv_heads is None or shape.head_dim is None:
            raise AdapterError(f"{method} needs layers of one shape, and {type(base).__name__} has several")
        else:
            sizes |= {"token_dim": shape.num_kv_heads * shape.head_dim, "num_attention_heads": shape.num_kv_heads}
        config = sizes | config
        if name := getattr(base, "name_or_path", None):
            config.setdefault("base_model_name_or_path", name)

        get_embeddings = getattr(base, "get_input_embeddings", None)
        return SoftPrompt.from_config(
            config,
            token_embeddings=get_embeddings() if callable(get_embeddings) else None,
            init_token_ids=init_token_ids,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def from_tensors(
        config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
    ) -> SoftPrompt:
        """The prompt that an adapter file holds, frozen. Reparameterisations are merged in such files: what is left
        of P_TUNING, projected PREFIX_TUNING and CPT is their result.

        Args:
            config: content of ``adapter_config.json``.
            tensors: ``prompt_embeddings`` of shape ``[P_total, token_dim]``, for prefix methods
                ``[P, num_layers * 2 * token_dim]``; MULTITASK_PROMPT_TUNING adds ``prefix_task_cols`` of
                ``[tasks, P_total, ranks]`` and ``prefix_task_rows`` of ``[tasks, ranks, token_dim]``.
            dtype: of the parameters (PEFT keeps prompts in fp32 whatever the base's dtype).

        Raises:
            AdapterError: a tensor is missing or has another shape than `config` says.
        """
        cls = _prompt_class(config)
        given = {key: value for key, value in config.items() if value is not None}
        prompt = cls({**_sizes_from(cls, config, tensors), **given, "inference_mode": True})
        with torch.device("meta"):
            prompt.build()
        prompt.load_adapter_tensors({name: tensor.to(dtype) for name, tensor in tensors.items()})
        return prompt.requires_grad_(False)

    @staticmethod
    def from_prefix(
        prefix: PrefixKV, *, num_frozen_tokens: int = 1, base_model_name_or_path: str | None = None
    ) -> SoftPrompt:
        """A trainable CARTRIDGE that starts from the keys and values of `prefix` (copied; 8-bit ones dequantised).

        Args:
            num_frozen_tokens: how many of the first tokens never change. The first one collects much of the attention
                of any text, and training is steadier where it stays (Eyuboglu et al. 2025).
            base_model_name_or_path: written to the adapter's configuration.

        Raises:
            AdapterError: `num_frozen_tokens` is out of range, or layers differ in shape: PEFT's format has one for
                all.
        """
        floating = prefix.dequantize() if prefix.scales is not None else prefix
        shapes = {tuple(tensor.shape) for tensor in (*floating.keys, *floating.values)}
        if len(shapes) > 1:
            raise AdapterError(f"CARTRIDGE needs keys and values of one shape, the prefix has {sorted(shapes)}")
        ((heads, tokens, dim),) = shapes
        pairs = [x for pair in zip(floating.keys, floating.values, strict=True) for x in pair]
        # [2 * layers, Hkv, P, D] -> [P, layers * 2 * Hkv * D], as key_values() reads it
        flat = torch.stack(pairs).detach().permute(2, 0, 1, 3).reshape(tokens, -1)
        config = {
            "peft_type": "CARTRIDGE",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model_name_or_path,
            "num_virtual_tokens": tokens,
            "token_dim": heads * dim,
            "num_layers": len(floating.keys),
            "num_attention_heads": heads,
            "num_frozen_tokens": num_frozen_tokens,
        }
        prompt = SoftPrompt.from_tensors(config, {"prompt_embeddings": flat})
        prompt.config["inference_mode"] = False
        return prompt.requires_grad_(True)

    @staticmethod
    def from_encoder(config: Mapping[str, Any], encoder: nn.Module) -> SoftPrompt:
        """A prompt over the very modules and parameters of a live PEFT prompt encoder: training either trains both.

        Raises:
            AdapterError: `encoder` lacks a parameter that `config` says it has, or has it in another shape.
        """
        prompt = _prompt_class(config)(config)
        with torch.device("meta"):
            prompt.build()
        live = dict(encoder.named_parameters())
        for name, ours in prompt.named_parameters():
            theirs = live.get(name)
            if theirs is None or theirs.shape != ours.shape:
                found = "none" if theirs is None else list(theirs.shape)
                raise AdapterError(f"{prompt.method}: expected parameter {name} of {list(ours.shape)}, found {found}")
        for name in dict(prompt.named_children()):
            setattr(prompt, name, getattr(encoder, name))
        for name in list(prompt._parameters):
            setattr(prompt, name, getattr(encoder, name))
        prompt.training = encoder.training  # not train(): the modules are PEFT's
        return prompt

    # ------------------------------------------------------------------ what the model consumes

    def embeddings(self, task_ids: Tensor | None = None) -> Tensor:
        """Virtual token embeddings `[P_total, H]`, P_total = P * num_transformer_submodules, differentiable.

        MULTITASK_PROMPT_TUNING needs `task_ids` (int64 `[B]`) and gives `[B, P_total, H]`; other methods ignore them,
        as PEFT does. The dtype is the parameters'; PEFT casts it to the input embeddings' dtype.

        Raises:
            TypeError: this is a prefix method.
        """
        raise TypeError(f"{self.method} learns keys and values, not embeddings: use key_values()")

    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        """A pair (key, value) a layer, each `[Hkv, P, D]`, differentiable (views of one flat tensor).

        Raises:
            TypeError: this is an embedding method.
        """
        raise TypeError(f"{self.method} learns embeddings, not keys and values: use embeddings()")

    def cpt_targets(
        self, labels: Tensor, input_type_mask: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """CPT's own loss: see `ContextAwarePromptTuning.cpt_targets`.

        Raises:
            TypeError: this is another method, trained with the model's usual loss.
        """
        raise TypeError(f"{self.method} has no loss of its own: only CPT has")

    # ------------------------------------------------------------------ PEFT's adapter file

    def adapter_tensors(self) -> dict[str, Tensor]:
        """What PEFT stores in ``adapter_model.safetensors`` for this prompt, less `modules_to_save`. Detached."""
        # In the mode training runs in: without it PyTorch takes another LSTM kernel, an ulp away from what was learnt.
        with torch.enable_grad():
            return {"prompt_embeddings": self.merged().detach()}

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of `adapter_tensors`, from the configuration alone."""
        total = self.num_virtual_tokens * self.num_transformer_submodules
        return {"prompt_embeddings": (total, self.config["token_dim"])}

    def load_adapter_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors over (no copy). Only merged prompts (`inference_mode`) can; see `from_tensors`."""
        for name, shape in self.adapter_shapes().items():
            if name not in tensors:
                raise AdapterError(f"{self.method}: the adapter has no tensor {name!r}; it has {sorted(tensors)}")
            if tuple(tensors[name].shape) != shape:
                raise AdapterError(
                    f"{self.method}: expected {name} of shape {list(shape)} from adapter_config.json, "
                    f"found {list(tensors[name].shape)}"
                )
        self.take(tensors)

    # ------------------------------------------------------------------ state

    @property
    def trainable(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(p.requires_grad for p in self.parameters())

    def requires_grad_(self, requires_grad: bool = True) -> SoftPrompt:
        """As `nn.Module.requires_grad_`, but what the method never trains stays frozen (CPT's token embeddings,
        a cartridge's first tokens)."""
        super().requires_grad_(requires_grad)
        for name, parameter in self.named_parameters():
            if name in self.always_frozen:
                parameter.requires_grad = False
        return self

    def check_finite(self) -> None:
        """Look at every value of the parameters and of `modules_to_save`.

        Raises:
            ValueError: one holds NaN or infinities; names the tensor and how many.
        """
        for name, tensor in [*self.named_parameters(), *self.modules_to_save.items()]:
            check_finite(f"{self.method} prompt, tensor {name!r}", tensor)

    def extra_repr(self) -> str:
        return f"{self.method}, num_virtual_tokens={self.num_virtual_tokens}"

    # ------------------------------------------------------------------ for subclasses

    @property
    def needs_token_embeddings(self) -> bool:
        return False

    def build(self) -> None:
        """Create the parameters with PEFT's random initialisation, in PEFT's order."""
        raise NotImplementedError

    def start_from_tokens(self, table: TokenEmbeddings | None, init_token_ids: Sequence[int] | None) -> None:
        """Replace the random initialisation by the embeddings of real tokens."""
        raise NotImplementedError

    def merged(self) -> Tensor:
        """The prompt as one 2-D tensor, reparameterisations applied."""
        raise NotImplementedError

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Put adapter tensors of checked shape in place of the parameters."""
        self.embedding.weight = nn.Parameter(tensors["prompt_embeddings"], requires_grad=False)


class _EmbeddingPrompt(SoftPrompt):
    kind = "embedding"

    def embeddings(self, task_ids: Tensor | None = None) -> Tensor:
        return self.merged()


class PromptTuning(_EmbeddingPrompt):
    """`embeddings = E`, a free matrix (Lester et al. 2021)."""

    method = "PROMPT_TUNING"
    defaults: ClassVar[dict[str, Any]] = {
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    }

    @property
    def needs_token_embeddings(self) -> bool:
        return self.config["prompt_tuning_init"] in ("SAMPLE_VOCAB", "TEXT") and not self.config["inference_mode"]

    def build(self) -> None:
        total, dim = self.adapter_shapes()["prompt_embeddings"]
        self.embedding = nn.Embedding(total, dim)

    def start_from_tokens(self, table: TokenEmbeddings | None, init_token_ids: Sequence[int] | None) -> None:
        total, init = len(self.embedding.weight), self.config["prompt_tuning_init"]
        if init == "SAMPLE_VOCAB":
            ids = torch.randint(0, len(_table(table)), (total,), dtype=torch.long)
        else:
            if not init_token_ids:
                raise AdapterError("init_token_ids: expected the tokenised prompt_tuning_init_text, found none")
            repeats = math.ceil(total / len(init_token_ids))
            ids = torch.tensor((list(init_token_ids) * repeats)[:total])
        self.embedding.weight = nn.Parameter(_look_up(table, ids, self.embedding.weight.shape[1]))

    def merged(self) -> Tensor:
        return self.embedding.weight


class MultitaskPromptTuning(PromptTuning):
    """`embeddings[b] = E * (cols[t] @ rows[t])`, t = task_ids[b]: a shared prompt scaled elementwise by a low-rank
    matrix a task (Wang et al. 2023)."""

    method = "MULTITASK_PROMPT_TUNING"
    defaults: ClassVar[dict[str, Any]] = PromptTuning.defaults | {
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
        "num_ranks": 1,
        "num_tasks": 1,
    }

    def build(self) -> None:
        super().build()
        shapes = self.adapter_shapes()
        self.prefix_task_cols = nn.Parameter(torch.normal(mean=0, std=0.02, size=shapes["prefix_task_cols"]))
        self.prefix_task_rows = nn.Parameter(torch.normal(mean=0, std=0.02, size=shapes["prefix_task_rows"]))

    def embeddings(self, task_ids: Tensor | None = None) -> Tensor:
        if task_ids is None:
            raise ValueError(f"task_ids: {self.method} needs the task of every row (int64 of shape [B]), found None")
        if task_ids.dim() != 1:
            raise ValueError(f"task_ids: expected shape [B], found {list(task_ids.shape)}")
        num_tasks = len(self.prefix_task_cols)
        # Reading values is free on the CPU only; on an accelerator it would wait for the device.
        if task_ids.device.type == "cpu" and ((task_ids < 0) | (task_ids >= num_tasks)).any():
            raise IndexError(f"task_ids: expected values in [0, {num_tasks}), found {task_ids.tolist()}")
        task_ids = task_ids.to(self.prefix_task_cols.device)
        cols = self.prefix_task_cols.index_select(0, task_ids)  # [B, P_total, ranks]
        rows = self.prefix_task_rows.index_select(0, task_ids)  # [B, ranks, H]
        return self.embedding.weight * torch.matmul(cols, rows)

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().adapter_shapes()
        total, dim = shapes["prompt_embeddings"]
        tasks, ranks = self.config["num_tasks"], self.config["num_ranks"]
        return shapes | {"prefix_task_cols": (tasks, total, ranks), "prefix_task_rows": (tasks, ranks, dim)}

    def adapter_tensors(self) -> dict[str, Tensor]:
        return {
            **super().adapter_tensors(),
            "prefix_task_cols": self.prefix_task_cols.detach(),
            "prefix_task_rows": self.prefix_task_rows.detach(),
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        super().take(tensors)
        self.prefix_task_cols = nn.Parameter(tensors["prefix_task_cols"], requires_grad=False)
        self.prefix_task_rows = nn.Parameter(tensors["prefix_task_rows"], requires_grad=False)


class PTuning(_EmbeddingPrompt):
    """`embeddings = MLP(E)` or `MLP(BiLSTM(E))` (Liu et al. 2021); merged to a free matrix once saved."""

    method = "P_TUNING"
    defaults: ClassVar[dict[str, Any]] = {
        "encoder_reparameterization_type": "MLP",
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_dropout": 0.0,
    }

    def build(self) -> None:
        total, dim = self.adapter_shapes()["prompt_embeddings"]
        hidden, encoder = self.config["encoder_hidden_size"], self.config["encoder_reparameterization_type"]
        self.embedding = nn.Embedding(total, dim)
        if self.config["inference_mode"]:
            return
        if encoder == "LSTM":
            self.lstm_head = nn.LSTM(
                input_size=dim,
                hidden_size=hidden,
                num_layers=self.config["encoder_num_layers"],
                dropout=self.config["encoder_dropout"],
                bidirectional=True,
                batch_first=True,
            )
            layers = [nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, dim)]
        else:
            layers = [nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)]
        self.mlp_head = nn.Sequential(*layers)

    def merged(self) -> Tensor:
        if self.config["inference_mode"]:
            return self.embedding.weight
        x = self.embedding.weight[None]  # a batch of one, as in PEFT: the same kernels, hence the same bits
        if self.config["encoder_reparameterization_type"] == "LSTM":
            x = self.lstm_head(x)[0]
        return self.mlp_head(x)[0]


class ContextAwarePromptTuning(_EmbeddingPrompt):
    """`embeddings = E[cpt_token_ids] + delta`: examples in the context, nudged inside a ball (Blau et al. 2024).

    Every row of `delta` is projected onto the ball of its token type's radius before it is used. The type of a virtual
    token (`cpt_tokens_type_mask`) counts in fours, 4*i + (1 input template, 2 input, 3 output template, 4 label of
    example i + 1); 0 is ignored. Labels take no gradient and a radius of 1e-10.
    """

    method = "CPT"
    defaults: ClassVar[dict[str, Any]] = {
        "cpt_token_ids": None,
        "cpt_mask": None,
        "cpt_tokens_type_mask": None,
        "opt_weighted_loss_type": "none",
        "opt_loss_decay_factor": 1.0,
        "opt_projection_epsilon": 0.1,
        "opt_projection_format_epsilon": 0.1,
        "tokenizer_name_or_path": None,
    }
    always_frozen = ("embedding.weight",)

    @property
    def needs_token_embeddings(self) -> bool:
        return not self.config["inference_mode"]

    def build(self) -> None:
        total, dim = self.adapter_shapes()["prompt_embeddings"]
        self.embedding = nn.Embedding(total, dim)
        self.embedding.requires_grad_(False)
        if not self.config["inference_mode"]:
            self.delta_embedding = nn.Embedding(total, dim)
            nn.init.zeros_(self.delta_embedding.weight)

    def start_from_tokens(self, table: TokenEmbeddings | None, init_token_ids: Sequence[int] | None) -> None:
        if init_token_ids is not None:
            raise AdapterError("init_token_ids: CPT starts from its own cpt_token_ids")
        weight = _look_up(table, torch.tensor(self.config["cpt_token_ids"]), self.embedding.weight.shape[1])
        self.embedding.weight = nn.Parameter(weight, requires_grad=False)

    def merged(self) -> Tensor:
        if self.config["inference_mode"]:
            return self.embedding.weight
        delta = self.delta_embedding.weight
        projected = self._projected(delta.detach())
        if torch.is_grad_enabled() and delta.requires_grad:
            # Projected gradient descent: the optimiser has to go on from the projected point. `.data` because the
            # value changes under autograd's eyes on purpose.
            delta.data.copy_(projected)
            learns = (self._types(delta.device) % 4 != 0)[:, None]
            projected = torch.where(learns, delta, projected)
        return self.embedding.weight.detach() + projected

    def unmerged(self, table: TokenEmbeddings | None) -> ContextAwarePromptTuning:
        """A trainable prompt with this merged one's value: `delta = merged - E[cpt_token_ids]` (to rounding).

        Raises:
            AdapterError: `table`, the base's token embeddings, is None or of another width.
        """
        if table is None:
            raise AdapterError(
                "token_embeddings: needed to train CPT on, since its delta is relative to them; found None"
            )
        prompt = ContextAwarePromptTuning(self.config | {"inference_mode": False})
        prompt.build()
        prompt.start_from_tokens(table, None)
        prompt.modules_to_save = self.modules_to_save
        with torch.no_grad():
            prompt.delta_embedding.weight.copy_(self.merged().cpu() - prompt.embedding.weight.cpu())
        return prompt.to(device=self.embedding.weight.device, dtype=self.embedding.weight.dtype)

    def _types(self, device: torch.device | None = None) -> Tensor:
        return torch.tensor(self.config["cpt_tokens_type_mask"], dtype=torch.long, device=device)

    def _projected(self, delta: Tensor) -> Tensor:
        # radius * sqrt(H / 2048), so that one epsilon serves models of any width
        radius = torch.tensor([self.config["opt_projection_format_epsilon"], self.config["opt_projection_epsilon"]])
        form, inputs = radius.to(delta.device) * torch.sqrt(torch.tensor([delta.shape[1] / 2048], device=delta.device))
        types = self._types(delta.device)
        kind = torch.where(types > 0, types % 4, 0)
        radii = torch.full_like(delta[:, 0], 1e-10, dtype=torch.float32)
        radii = torch.where((kind == 1) | (kind == 3), form, torch.where(kind == 2, inputs, radii))
        norms = torch.linalg.vector_norm(delta, dim=1)
        scale = torch.where(norms > 0, radii / torch.maximum(norms, radii), 1.0)
        return delta * scale.to(delta.dtype)[:, None]

    def cpt_targets(
        self, labels: Tensor, input_type_mask: Tensor | None = None, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Targets and weights of CPT's loss over virtual and own tokens.

        With logits of all P + S positions, PEFT's loss is::

            valid = targets[:, 1:] != -100
            loss  = (weights[:, 1:] * cross_entropy(logits[:, :-1], targets[:, 1:]))[valid].sum() / valid.sum()

        so the virtual tokens' own labels count too, once a row. The weight is 1, or with `opt_weighted_loss_type`
        "decay" `opt_loss_decay_factor ** k`, k = how many label groups of that row come after this one.

        Args:
            labels: int64 `[B, S]`, -100 where there is none.
            input_type_mask: `[B, S]` token types of the own tokens, in fours as above; all 4 (label) if None.
            padding: bool `[B, S]`, columns that are no own token and so of no type; None: there are none.

        Returns:
            targets: int64 `[B, P+S]`, -100 where no term is due. weights: fp32 `[B, P+S]`, 0 there.

        Raises:
            ValueError: shapes differ; or `input_type_mask` is None and no own token would be a label (its type follows
                the largest of `cpt_tokens_type_mask`, so that one has to be a multiple of 4; PEFT's loss is NaN).
        """
        batch = labels.shape[0]
        own_types = torch.full_like(labels, 4) if input_type_mask is None else input_type_mask.to(labels)
        if own_types.shape != labels.shape:
            raise ValueError(
                f"input_type_mask: expected the shape of labels, {list(labels.shape)}, found {list(own_types.shape)}"
            )
        if padding is not None:
            own_types = own_types.masked_fill(padding, 0)
        prompt_types = self._types(labels.device)
        last = max(self.config["cpt_tokens_type_mask"])
        if input_type_mask is None and last % 4:
            raise ValueError(
                "cpt_tokens_type_mask: expected its largest type to be a label (a multiple of 4), so that own tokens "
                f"can be labels too, found {last}; give an input_type_mask otherwise"
            )
        own_types = torch.where(own_types > 0, own_types + last, own_types)
        types = torch.cat((prompt_types.expand(batch, -1), own_types), dim=1)
        ids = torch.tensor(self.config["cpt_token_ids"], device=labels.device)
        targets = torch.cat((ids.expand(batch, -1), labels), dim=1)

        is_label = (types > 0) & (types % 4 == 0)
        targets = targets.masked_fill(~is_label, -100)
        weights = (targets != -100).float()
        if self.config["opt_weighted_loss_type"] == "decay":
            # The first position is nobody's target, so a group that only stands there does not count.
            groups = torch.where(is_label, types, 0)
            for row, row_groups in enumerate(groups):
                for later, group in enumerate(row_groups[1:].unique().flip(0)):
                    decayed = self.config["opt_loss_decay_factor"] ** later
                    weights[row] = torch.where(
                        (row_groups == group) & (group > 0), weights[row] * decayed, weights[row]
                    )
        return targets, weights


class _PrefixPrompt(SoftPrompt):
    kind = "prefix"

    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        heads, dim, layers = self.config["num_attention_heads"], self.config["token_dim"], self.config["num_layers"]
        # [P, layers * 2 * token_dim] -> [2 * layers, Hkv, P, D]
        flat = self.merged().view(self.num_virtual_tokens, 2 * layers, heads, dim // heads).permute(1, 2, 0, 3)
        if self.num_transformer_submodules == 2:
            # PEFT doubles the list for a decoder with self- and cross-attention and deals it out in fours of which
            # the last two are dropped: decoder layer i gets the pair stored at 2i, wrapping around.
            return [(flat[4 * i % (2 * layers)], flat[4 * i % (2 * layers) + 1]) for i in range(layers)]
        return [(flat[2 * i], flat[2 * i + 1]) for i in range(layers)]

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        columns = self.config["num_layers"] * 2 * self.config["token_dim"]
        return {"prompt_embeddings": (self.num_virtual_tokens, columns)}


class PrefixTuning(_PrefixPrompt):
    """Keys and values are a free matrix, or `MLP(E)` with `prefix_projection` (Li & Liang 2021)."""

    method = "PREFIX_TUNING"
    defaults: ClassVar[dict[str, Any]] = {
        "init_weights": None,
        "encoder_hidden_size": None,
        "prefix_projection": False,
    }

    @property
    def _projects(self) -> bool:
        return self.config["prefix_projection"] and not self.config["inference_mode"]

    def build(self) -> None:
        tokens, columns = self.adapter_shapes()["prompt_embeddings"]
        last: nn.Module
        if self._projects:
            dim, hidden = self.config["token_dim"], self.config["encoder_hidden_size"]
            self.embedding = nn.Embedding(tokens, dim)
            self.transform = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, columns))
            last = self.transform[-1]
        else:
            last = self.embedding = nn.Embedding(tokens, columns)
        if self.config["init_weights"] == "zero":
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def merged(self) -> Tensor:
        return self.transform(self.embedding.weight[None])[0] if self._projects else self.embedding.weight


class Cartridge(_PrefixPrompt):
    """Keys and values are a free matrix whose first `num_frozen_tokens` rows never change (Eyuboglu et al. 2025)."""

    method = "CARTRIDGE"
    defaults: ClassVar[dict[str, Any]] = {"num_frozen_tokens": 1}
    always_frozen = ("frozen_embedding",)

    def build(self) -> None:
        (tokens, columns), frozen = self.adapter_shapes()["prompt_embeddings"], self.config["num_frozen_tokens"]
        self.frozen_embedding = nn.Parameter(torch.randn(frozen, columns), requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(
            torch.randn(tokens - frozen, columns), requires_grad=not self.config["inference_mode"]
        )

    def merged(self) -> Tensor:
        if self.frozen_embedding is None:
            return self.trainable_embedding
        return torch.cat((self.frozen_embedding, self.trainable_embedding))

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        frozen = self.config["num_frozen_tokens"]
        head, tail = tensors["prompt_embeddings"].tensor_split([frozen])
        self.frozen_embedding = nn.Parameter(head, requires_grad=False) if frozen else None
        self.trainable_embedding = nn.Parameter(tail, requires_grad=False)


_CLASSES: dict[str, type[SoftPrompt]] = {
    cls.method: cls
    for cls in (PromptTuning, PTuning, MultitaskPromptTuning, ContextAwarePromptTuning, PrefixTuning, Cartridge)
}
METHODS: tuple[str, ...] = tuple(_CLASSES)
"""Names of the prompt-learning methods, as PEFT writes them in `peft_type`."""


def check_finite(what: str, tensor: Tensor) -> None:
    """Look at every value of `tensor`.

    Raises:
        ValueError: NaN or infinities among them; the message starts with `what` and says how many of how many.
    """
    if tensor.is_floating_point() and tensor.element_size() == 1:  # float8 has next to no operators
        tensor = tensor.to(torch.float16)
    if bad := tensor.numel() - int(torch.isfinite(tensor).sum()):
        raise ValueError(f"{what}: {bad} of {tensor.numel()} values are NaN or infinite")


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A plain-JSON copy of an adapter configuration with PEFT's defaults filled in. Unknown keys are kept.

    Raises:
        AdapterError: unknown method, or an option that is missing or out of range; the message names it.
    """
    cls = _prompt_class(config)
    full = copy.deepcopy(_COMMON_DEFAULTS | cls.defaults | {key: _plain(value) for key, value in config.items()})

    def require(ok: object, name: str, expected: str) -> None:
        if not ok:
            raise AdapterError(f"{name}: {cls.method} expected {expected}, found {full.get(name)!r}")

    if full["num_transformer_submodules"] is None:
        full["num_transformer_submodules"] = _default_submodules(full)
    require(full["num_transformer_submodules"] in (1, 2), "num_transformer_submodules", "1 or 2")
    if cls.method == "CPT":
        require(full["cpt_token_ids"], "cpt_token_ids", "a non-empty list of token ids")
        full["num_virtual_tokens"] = tokens = len(full["cpt_token_ids"])
        full["num_transformer_submodules"] = 1
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            full[name] = full[name] if full[name] is not None else [1] * tokens
            require(len(full[name]) == tokens, name, f"as many entries as cpt_token_ids ({tokens})")
        require(full["opt_weighted_loss_type"] in ("none", "decay"), "opt_weighted_loss_type", "'none' or 'decay'")
    if full.get("encoder_hidden_size", 0) is None:
        full["encoder_hidden_size"] = full["token_dim"]

    sizes = ["num_virtual_tokens", "token_dim"]
    sizes += ["num_layers", "num_attention_heads"] if cls.kind == "prefix" else []
    sizes += [
        name
        for name in ("encoder_hidden_size", "encoder_num_layers", "num_tasks", "num_ranks")
        if name in cls.defaults
    ]
    for name in sizes:
        require(isinstance(full[name], int) and full[name] > 0, name, "a positive integer")
    if cls.kind == "prefix":
        heads = full["num_attention_heads"]
        require(full["token_dim"] % heads == 0, "token_dim", f"a multiple of num_attention_heads ({heads})")
    if cls.method == "CARTRIDGE":
        tokens = full["num_virtual_tokens"]
        require(0 <= full["num_frozen_tokens"] <= tokens, "num_frozen_tokens", f"0 to num_virtual_tokens ({tokens})")
    if cls.method == "P_TUNING":
        name = "encoder_reparameterization_type"
        require(full[name] in ("MLP", "LSTM"), name, "'MLP' or 'LSTM'")
    return full


def _prompt_class(config: Mapping[str, Any]) -> type[SoftPrompt]:
    method = _plain(config.get("peft_type"))
    if method is None:
        raise AdapterError(f"peft_type: missing from the adapter's configuration; expected one of {list(METHODS)}")
    if method not in _CLASSES:
        raise AdapterError(
            f"peft_type: expected one of {list(METHODS)}, found {method!r}. An adapter that changes the base's "
            "weights, such as LoRA, is no prompt: merge it into the base first (PEFT's merge_and_unload) and load the "
            "result as the base model"
        )
    return _CLASSES[method]


def _sizes_from(cls: type[SoftPrompt], config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes that a configuration leaves out (older adapters, hand-written ones) and the tensors tell."""
    prompt = tensors.get("prompt_embeddings")
    if prompt is None or prompt.dim() != 2:
        return {}
    rows, columns = prompt.shape
    if cls.kind == "embedding":
        submodules = config.get("num_transformer_submodules") or _default_submodules(config)
        return {"num_virtual_tokens": rows // submodules, "token_dim": columns}
    layers = config.get("num_layers")
    return {"num_virtual_tokens": rows} | ({"token_dim": columns // (2 * layers)} if layers else {})


def _default_submodules(config: Mapping[str, Any]) -> int:
    return 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1


def _plain(value: Any) -> Any:
    """Enums and sets, as PEFT's live configurations hold them, in their JSON form."""
    if isinstance(value, enum.Enum):
        return value.value
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _table(table: TokenEmbeddings | None) -> Tensor:
    if table is None:
        raise AdapterError("token_embeddings: this initialisation starts from the base's token table, found None")
    return table if isinstance(table, Tensor) else next(table.parameters())


def _look_up(table: TokenEmbeddings | None, ids: Tensor, dim: int) -> Tensor:
    """Embeddings of `ids` as fp32, of width `dim`."""
    rows = _table(table)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(rows):
        raise AdapterError(f"token ids: expected values in [0, {len(rows)}), found {ids.tolist()}")
    look_up: Callable[[Tensor], Tensor] = rows.__getitem__ if isinstance(table, Tensor) else table  # type: ignore[assignment]
    with torch.no_grad():
        found = look_up(ids.to(rows.device)).clone().float()
    if found.shape[1] != dim:
        raise AdapterError(f"token_embeddings: expected width token_dim ({dim}), found {found.shape[1]}")
    return found
