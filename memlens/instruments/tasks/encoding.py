"""Tokenizing a context and its continuation as lm-evaluation-harness' `HFLM` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memlens.errors import OptionError, SequenceError
from memlens.models.bos import puts_bos_first


@dataclass(frozen=True)
class PairTokens:
    """A request as token ids.

    Attributes:
        context: The tokens given.
        continuation: The tokens scored.
        dropped: Number of tokens cut from the left of the context because it was too long for the model.
    """

    context: list[int]
    continuation: list[int]
    dropped: int = 0


@dataclass(frozen=True)
class PairEncoder:
    """Tokenizes requests as lm-evaluation-harness does, so that log-likelihoods can be compared with its own.

    Spaces at the end of a context move to the continuation. Context and continuation are tokenized together,
    and the continuation starts after as many tokens as the context alone has. An empty context becomes the
    beginning-of-text token, or the end-of-text token where there is none. A request that is too long for the
    model loses tokens on the left. Its last token is scored but not fed, so a request may have one token more
    than the model's context.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        bos: Whether the beginning-of-text token is put before every context.
        n_ctx: Most tokens that the model is fed, one less than those of a request; None for no limit.

    Example:
        >>> import memlens as ml
        >>> encoder = PairEncoder.of(ml.load_model("zoo/pythia-s"))
        >>> encoder("Mara was ", "old") == encoder("Mara was", " old")
        True
    """

    tokenizer: Any
    bos: bool = False
    n_ctx: int | None = None

    @classmethod
    def of(cls, model: Any, *, prepend_bos: bool | None = None, n_ctx: int | None = None) -> PairEncoder:
        """Return the encoder of a TransformerLens model or a Hugging Face tokenizer.

        Args:
            model: The model, whose context length is the limit; or a tokenizer.
            prepend_bos: None does what the checkpoint's own tokenizer does (see `memlens.models.bos`).
            n_ctx: The limit, in place of the model's.

        Raises:
            OptionError: There is no tokenizer, or `prepend_bos` is True and the tokenizer has no such token.
        """
        tokenizer = getattr(model, "tokenizer", model if callable(getattr(model, "encode", None)) else None)
        if tokenizer is None:
            raise OptionError(
                f"{type(model).__name__} has no tokenizer: a task's texts need one; give a tokenizer instead."
            )
        if prepend_bos is None:
            prepend_bos = puts_bos_first(model)
        if prepend_bos and tokenizer.bos_token_id is None:
            raise OptionError("prepend_bos=True, but the tokenizer has no beginning-of-text token.")
        return cls(tokenizer, prepend_bos, n_ctx or getattr(getattr(model, "cfg", None), "n_ctx", None))

    def __call__(self, context: str, continuation: str) -> PairTokens:
        """Return the token ids of a request.

        Raises:
            SequenceError: The context or the continuation has no token, or the continuation alone is too long
                for the model.
        """
        given, scored = self._pair(context, continuation)
        if not scored or not given:
            raise SequenceError(
                f"the context {context[-40:]!r} and the continuation {continuation[:40]!r} leave no token to "
                f"{'score' if given else 'give'}: change the text."
            )
        dropped = 0 if self.n_ctx is None else max(0, len(given) + len(scored) - self.n_ctx - 1)
        if dropped >= len(given):
            raise SequenceError(
                f"the continuation {continuation[:40]!r} has {len(scored)} tokens, and the model's context "
                f"holds {self.n_ctx}: shorten it."
            )
        return PairTokens(given[dropped:], scored, dropped)

    def prompt(self, context: str) -> list[int]:
        """Return the token ids of a text to be continued; for an empty text, the first token alone.

        >>> import memlens as ml
        >>> encoder = PairEncoder.of(ml.load_model("zoo/pythia-s"))
        >>> encoder.prompt("Mara was") == encoder("Mara was", " old").context
        True
        """
        return self.ids(context) or [self._first()]

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text, after the beginning-of-text token if `bos` and it has none."""
        begins = self.bos and not text.startswith(self.tokenizer.bos_token)
        return [self.tokenizer.bos_token_id] * begins + self._bare(text)

    def _first(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if not context:
            first = self._first()
            scored = self._bare(continuation)
            return (scored[:1], scored[1:]) if scored[:1] == [first] else ([first], scored)
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        given, whole = self.ids(bare), self.ids(bare + continuation)
        return given, whole[len(given) :]

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)
