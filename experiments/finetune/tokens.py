"""Text -> tokens of the model's tokenizer, as windows for the trainer."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer import data

# Bytes that are encoded at once; a piece ends at the end of a line.
_PIECE = 2**20


class Tokens:
    """The tokens of a text, in memory, as int32."""

    def __init__(self, tokens: np.ndarray, fingerprint: str):
        """Takes int32[length]."""
        self._tokens, self.fingerprint = tokens, fingerprint

    def __len__(self) -> int:
        return len(self._tokens)

    def windows(self, starts: np.ndarray, context: int) -> np.ndarray:
        """Gives int32[len(starts), context + 1]."""
        return np.stack([self._tokens[start : start + context + 1] for start in starts])


def encode(text: data.Text, folder: Path, *, vocab_size: int, min_length: int) -> data.Text:
    """Encodes both sides by the folder's tokenizer.json.

    Args:
      text: Bytes in UTF-8; other bytes become the replacement character.
      folder: The model's.
      vocab_size: How many tokens the model has.
      min_length: Tokens that each side has to have.

    Raises:
      Refusal: If there is no tokenizer, if it has tokens that the model has not, or if the text is
        too short.
    """
    tokenizer, digest = _read(folder)
    sides = []
    for side in (text.train, text.held_out):
        assert isinstance(side, data.Pieces)
        tokens = np.concatenate([np.zeros(0, np.int32), *_encode(side, tokenizer)])
        if len(tokens) and tokens.max() >= vocab_size:
            raise Refusal(
                f"--model {folder}: tokenizer.json gives token {tokens.max()}, but vocab_size in "
                f"config.json is {vocab_size}"
            )
        if len(tokens) < min_length:
            raise Refusal(
                f"--data: too little text: {len(tokens)} tokens on one side, but a window takes "
                f"{min_length}; give more text or a shorter --context"
            )
        sides.append(Tokens(tokens, f"{side.fingerprint}{digest}"))
    train, held_out = sides
    summary = f"{len(train):,} tokens to train on, {len(held_out):,} held out; {text.summary}"
    return data.Text(train=train, held_out=held_out, summary=summary, unit="token")


def _read(folder: Path) -> tuple[Any, str]:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        content = path.read_bytes()
        return Tokenizer.from_buffer(content), hashlib.sha256(content).hexdigest()[:8]
    except OSError as error:
        raise Refusal(f"--model {folder}: tokenizer.json: {error.strerror}") from error
    except Exception as error:  # tokenizers raise Exception itself
        raise Refusal(f"--model {folder}: tokenizer.json: {str(error)[:200]}") from error


def _encode(side: data.Pieces, tokenizer: Any) -> list[np.ndarray]:
    parts, start = [], 0
    while start < len(side):
        piece = side.read(start, min(_PIECE, len(side) - start)).tobytes()
        end = piece.rfind(b"\n") + 1
        if start + len(piece) < len(side) and end:
            piece = piece[:end]
        start += len(piece)
        encoded = tokenizer.encode(piece.decode(errors="replace"), add_special_tokens=False)
        parts.append(np.asarray(encoded.ids, np.int32))
    return parts
