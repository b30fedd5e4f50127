"""The model of real engines in tests, and what it needs for LoRA and for structured output.

Its weights are random, drawn wide enough that its outputs are diverse: a wrong or stale KV block changes the tokens.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 2048
RANK = 8
HIDDEN, LAYERS, KV_WIDTH = 256, 4, 128


def write_model(path: Path) -> None:
    """Write a random Llama of 4 layers as safetensors."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        dtype="float32",
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.12,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_adapter(path: Path, seed: int) -> None:
    """Write a LoRA adapter for queries and values, with random weights that change the model's tokens."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    path.mkdir(parents=True)
    chance = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(LAYERS):
        for module, width in (("q_proj", HIDDEN), ("v_proj", KV_WIDTH)):
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            down = torch.randn(RANK, HIDDEN, generator=chance) * 0.1
            up = torch.randn(width, RANK, generator=chance) * 0.1
            weights |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer whose tokens are the digits, then words of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    digits = {str(i): i + 3 for i in range(10)}
    words = {f"w{i}": i for i in range(13, VOCABULARY)}
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **digits, **words}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
