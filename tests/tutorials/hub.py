"""A cache of the Hugging Face hub in which a tutorial finds its model, whatever that is."""

from __future__ import annotations

from pathlib import Path

from graphprune.calibration.text.builtin import builtin_text

COMMIT = "0" * 40


def cached(home: Path, repository: str) -> Path:
    """Return the folder, empty so far, where the cache of `HF_HOME` keeps a repository's files."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def save_tiny(folder: Path) -> None:
    """Save a small Llama whose tokens are letters, and which has learnt some of our own text."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    letters = [chr(code) for code in range(32, 127)]
    config = LlamaConfig(
        vocab_size=len(letters) + 1,
        hidden_size=36,
        intermediate_size=1536,  # as in the tutorial's output
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    words = {letter: number for number, letter in enumerate([*letters, "[UNK]"])}
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    text = torch.tensor([words.get(letter, len(letters)) for letter in builtin_text()[:61_440]])
    for ids in text.view(-1, 16, 64):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
