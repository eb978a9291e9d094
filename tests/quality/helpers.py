"""A small language model whose tokenizer begins every text, and numbers counted in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LETTERS = "".join(map(chr, range(33, 123)))
"""Each is its own token: the place that it has here, and 4."""

BEGIN, END = 1, 2
WORDS = {"[UNK]": 0, "<s>": BEGIN, "</s>": END, "[PAD]": 3} | {
    letter: number for number, letter in enumerate(LETTERS, 4)
}

# Two-sided 95 % quantiles of Student's t, from a printed table, by degrees of freedom.
T = {1: 12.706, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 31: 2.040}


def save_tokenizer(path: Path, *, begins: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if begins:
        special = [("<s>", BEGIN), ("</s>", END)]
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, special)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)


def save_model(path: Path, *, begins: bool = True, **changes: Any) -> Path:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(path)
    save_tokenizer(path, begins=begins)
    return path


def save_text(path: Path, count: int, seed: int) -> np.ndarray:
    """Write so many letters; returns their tokens."""
    places = np.random.default_rng(seed).integers(0, len(LETTERS), count)
    path.write_text("".join(LETTERS[i] for i in places))
    return places + 4


def by_hand(ids: np.ndarray, count: int, length: int) -> np.ndarray:
    """The first windows of a text, each with its begin-of-text token in front."""
    size = length - 1
    rows = [[BEGIN, *ids[i * size : (i + 1) * size]] for i in range(count)]
    return np.array(rows)


def log_probabilities(path: Path, windows: np.ndarray) -> np.ndarray:
    """Of all but the last place, float64 ``[count, length - 1, vocabulary]``."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(windows)).logits.numpy()[:, :-1]
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def interval(values: np.ndarray) -> tuple[float, float, float]:
    half = T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), values.mean() - half, values.mean() + half


def expected(dense: Path, slim: Path, windows: np.ndarray) -> dict[str, Any]:
    """Everything that is said of two models on some windows."""
    p, q = log_probabilities(dense, windows), log_probabilities(slim, windows)
    targets = windows[:, 1:, None]
    losses = [-np.take_along_axis(x, targets, -1)[..., 0].mean(1) for x in (p, q)]
    agreement = interval((p.argmax(-1) == q.argmax(-1)).mean(1))
    kl = interval((np.exp(p) * (p - q)).sum(-1).mean(1))
    return {
        "losses": losses,
        "perplexities": [float(np.exp(one.mean())) for one in losses],
        "ratio": tuple(np.exp(interval(losses[1] - losses[0]))),
        "agreement": (agreement[0], max(0, agreement[1]), min(1, agreement[2])),
        "kl": (kl[0], max(0, kl[1]), kl[2]),
    }


def greedily(path: Path, prompt: str, new: int) -> list[int]:
    """Tokens after a prompt, one forward pass for each."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = [BEGIN, *(WORDS.get(letter, 0) for letter in prompt)]
    found: list[int] = []
    with torch.no_grad():
        while len(found) < new and END not in found:
            logits = model(torch.tensor([ids + found]), use_cache=False).logits
            found.append(int(logits[0, -1].argmax()))
    return found
