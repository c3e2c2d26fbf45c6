"""Tokenisers of the scorers: prompts -> (B, context) ids, and how long a prompt is before it is cut."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def open_clip() -> ModuleType:
    """The library, imported late: it takes seconds. Raises ImportError with what to type where it is missing."""
    try:
        return importlib.import_module("open_clip")
    except ModuleNotFoundError as problem:
        if problem.name != "open_clip":
            raise
        raise ImportError(
            "open_clip is not installed in the Python that runs ComfyUI. Install it there, and start ComfyUI again:\n"
            f"  {sys.executable} -m pip install open_clip_torch"
        ) from None


BERT_VOCABULARY = Path(__file__).parent / "vocabulary" / "bert-base-uncased.txt"


class ClipTokens:
    """CLIP's byte pairs, cut at the context's end with the end token kept."""

    def __init__(self, context: int = 77) -> None:
        self.context = context
        self.tokenizer = open_clip().SimpleTokenizer(context_length=context)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        return self.tokenizer(list(prompts))

    def length(self, prompt: str) -> int:
        return len(self.tokenizer.encode(prompt)) + 2


class BertTokens:
    """BERT's uncased word pieces. Gives ids and the attention mask, stacked: (B, 2, context)."""

    def __init__(self, context: int = 35) -> None:
        from tokenizers.implementations import BertWordPieceTokenizer

        self.context = context
        self.tokenizer = BertWordPieceTokenizer(str(BERT_VOCABULARY), lowercase=True)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        self.tokenizer.enable_truncation(self.context)
        self.tokenizer.enable_padding(length=self.context)
        coded = self.tokenizer.encode_batch(list(prompts))
        return torch.tensor([[c.ids, c.attention_mask] for c in coded])

    def length(self, prompt: str) -> int:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        return len(self.tokenizer.encode(prompt).ids)


class FolderTokens:
    """The tokeniser whose files lie beside a network's weights, as Hugging Face keeps them."""

    FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")

    def __init__(self, folder: Path, context: int) -> None:
        from transformers import AutoTokenizer

        self.context = context
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)

    @classmethod
    def there(cls, folder: Path) -> bool:
        return any((folder / name).is_file() for name in cls.FILES)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        coded = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        )
        return coded["input_ids"]

    def length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])


def cut(prompts: Sequence[str], tokens: Any) -> list[str]:
    """What to tell the user of prompts that the network sees only in part."""
    return [
        f"prompt of {length} tokens cut to {tokens.context}: {prompt[:60]!r} ..."
        for prompt in dict.fromkeys(prompts)
        if (length := tokens.length(prompt)) > tokens.context
    ]
