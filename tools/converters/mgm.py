"""MGM, a small GPT-2 whose words are bacterial genera."""

from __future__ import annotations

import pickletools
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


def convert(source: Path, target: Path) -> None:
    """Convert MGM, a GPT-2 whose words are bacterial genera."""
    config = GPT2Config.from_json_file(source / "config.json")
    state = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model = GPT2LMHeadModel(config)
    missing = model.load_state_dict(state, strict=False)
    # Old checkpoints also store the causal masks, which transformers now builds itself.
    unexpected = [name for name in missing.unexpected_keys if not name.endswith(".attn.bias")]
    if missing.missing_keys or [n for n in unexpected if not n.endswith(".attn.masked_bias")]:
        raise ValueError(f"the MGM checkpoint does not fit GPT-2: {missing}")
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(target)

    words = _pickled_strings(source / "MicroTokenizer.pkl", after="toks")
    if len(words) != config.vocab_size:
        raise ValueError(f"found {len(words)} words for a vocabulary of {config.vocab_size}")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(target)


def _pickled_strings(path: Path, after: str) -> list[str]:
    """Read the list of strings stored under a key of a pickle, without unpickling it.

    Args:
        path: A pickle file.
        after: The attribute or dict key whose value is the list.

    Returns:
        The strings in order; the list must hold nothing but strings spelt out in place.
    """
    found: list[str] | None = None
    previous = None
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        if opcode.name in ("MEMOIZE", "FRAME", "MARK", "APPENDS"):
            continue
        if found is not None:
            if "UNICODE" not in opcode.name or argument == "vocab":
                break
            found.append(argument)
        elif opcode.name == "EMPTY_LIST" and previous == after:
            found = []
        previous = argument
    return found or []
