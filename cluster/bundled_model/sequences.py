"""Documents as token sequences of the training length; a sequence is of one kind, and <bos> is its first token."""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from cluster.bundled_model.corpus import SHARES, Document, Kind
from cluster.bundled_model.tokenizer import BOS_ID, EOS_ID


def pack(documents: list[Document], tokenizer: Tokenizer, num_tokens: int) -> dict[Kind, Tensor]:
    """The documents of each kind, joined by <eos> and cut: [num_sequences, num_tokens + 1] int64 per kind.

    Conversations are not cut: a sequence holds those that fit, each with its <bos>, the last one possibly shortened.
    """
    packed = {}
    for kind in Kind:
        texts = [document.text for document in documents if document.kind is kind]
        encoded = [[*encoding.ids, EOS_ID] for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        rows = _whole(encoded, num_tokens) if kind is Kind.CHAT else _cut(encoded, num_tokens)
        packed[kind] = torch.tensor(rows, dtype=torch.int64).reshape(-1, num_tokens + 1)
    return packed


def _cut(encoded: list[list[int]], num_tokens: int) -> list[list[int]]:
    stream = [token_id for ids in encoded for token_id in ids]
    starts = range(0, len(stream) - num_tokens + 1, num_tokens)
    return [[BOS_ID, *stream[start : start + num_tokens]] for start in starts]


def _whole(encoded: list[list[int]], num_tokens: int) -> list[list[int]]:
    rows, row = [], []
    for ids in encoded:
        row += [BOS_ID, *ids]
        if len(row) > num_tokens:
            rows.append(row[: num_tokens + 1])
            row = []
    return rows


def mixture(packed: dict[Kind, Tensor], num_sequences: int, seed: int) -> Tensor:
    """[num_sequences, num_tokens + 1] in random order, in the kinds' shares; a kind that runs out starts again."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for kind, share in SHARES.items():
        wanted, available = round(share * num_sequences), len(packed[kind])
        epochs = -(-wanted // available)
        order = torch.cat([torch.randperm(available, generator=generator) for _ in range(epochs)])
        rows.append(packed[kind][order[:wanted]])
    joined = torch.cat(rows)
    return joined[torch.randperm(len(joined), generator=generator)]
