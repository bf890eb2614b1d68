"""Beam search with the algorithm of s2s-ft's decoder, written anew, for any device.

What it keeps of the past is the states between the layers, once for each hypothesis: in each step every layer makes the
keys and values of everything before anew, and states are copied when hypotheses change places. Repeated n-grams are
looked for on the host. A step feeds the last token and ``[MASK]``; nothing ends before the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minilm_fast.config import Config
from minilm_fast.ops import reference

EPSILON = 1e-5
"""Of the norms: the original's decoder takes this one whatever the configuration says."""


@dataclass(frozen=True)
class Search:
    """What is searched for: ``steps`` tokens after each source."""

    beams: int
    steps: int
    ngram: int
    mask: int
    sep: int


class OriginalDecoder:
    """The network and its search.

    Args:
        state: fp32 tensors by canonical name.
        dtype: of weights and activations.
    """

    def __init__(
        self,
        config: Config,
        state: Mapping[str, torch.Tensor],
        search: Search,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.search = config, search
        self._state = {name: x.to(device, dtype) for name, x in state.items()}
        self._device = device

    def _linear(self, name: str, x: torch.Tensor, with_bias: bool = True) -> torch.Tensor:
        return F.linear(x, self._state[f"{name}.weight"], self._state[f"{name}.bias"] if with_bias else None)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], self._state[f"{name}.LayerNorm.weight"], self._state[f"{name}.LayerNorm.bias"], EPSILON
        )

    def _embed(self, ids: torch.Tensor, first: int, kinds: torch.Tensor) -> torch.Tensor:
        tables = [
            self._state[f"bert.embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
        ]
        positions = torch.arange(first, first + ids.shape[1], device=self._device)
        return self._norm("bert.embeddings", tables[0][ids] + tables[1][positions] + tables[2][kinds])

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)

    def _layer(self, index: int, x: torch.Tensor, past: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
        name = f"bert.encoder.layer.{index}"
        everything = x if past is None else torch.cat([past, x], dim=1)
        q = self._heads(self._linear(f"{name}.attention.self.query", x))
        k = self._heads(self._linear(f"{name}.attention.self.key", everything, with_bias=False))
        v = self._heads(self._linear(f"{name}.attention.self.value", everything))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + mask
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = self._norm(f"{name}.attention.output", x + self._linear(f"{name}.attention.output.dense", context))
        wide = F.gelu(self._linear(f"{name}.intermediate.dense", x))
        return self._norm(f"{name}.output", x + self._linear(f"{name}.output.dense", wide))

    def _states(self, x: torch.Tensor, past: list[torch.Tensor] | None, mask: torch.Tensor) -> list[torch.Tensor]:
        """The embedded input and what each layer makes of it."""
        found = [x]
        for index in range(self.config.num_hidden_layers):
            found.append(self._layer(index, found[-1], None if past is None else past[index], mask))
        return found

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        x = self._norm("cls.predictions.transform", F.gelu(self._linear("cls.predictions.transform.dense", hidden)))
        word = self._state["bert.embeddings.word_embeddings.weight"]
        return F.linear(x, word, self._state["cls.predictions.bias"]).float().log_softmax(-1)

    @torch.inference_mode()
    def __call__(self, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Decodes sources of one length.

        Args:
            sources: int64 ``[batch, length]``.

        Returns:
            ``(ids, scores)``: int64 ``[batch, steps]`` and fp32 ``[batch]`` of each source's best hypothesis.
        """
        search, (batch, length) = self.search, sources.shape
        tokens = torch.zeros(batch, 0, dtype=torch.int64, device=self._device)
        past, current = None, sources
        scores = torch.zeros(batch, 1, device=self._device)
        for step in range(search.steps):
            rows = current.shape[0]
            ids = torch.cat([current, current.new_full((rows, 1), search.mask)], dim=1)
            kinds = torch.full_like(ids[0], self.config.target_type_id)
            kinds[: length if step == 0 else 0] = self.config.source_type_id
            before = 0 if step == 0 else length + step - 1
            found = self._states(self._embed(ids, before, kinds), past, self._mask(ids.shape[1], before))
            log_p = self._constrained(self._log_probabilities(found[-1][:, -1]), tokens)
            past = [x[:, :-1] if past is None else torch.cat([past[i], x[:, :-1]], 1) for i, x in enumerate(found)]
            scores, chosen, parents = self._choose(log_p.view(batch, -1, log_p.shape[-1]), scores)
            origin = (parents + torch.arange(batch, device=self._device)[:, None] * (rows // batch)).flatten()
            past = [x[origin] for x in past]
            current = chosen.flatten()[:, None]
            tokens = torch.cat([tokens[origin], current], dim=1)
        return tokens.view(batch, search.beams, -1)[:, 0], scores[:, 0]

    def _mask(self, rows: int, before: int) -> torch.Tensor:
        """Additive ``[rows, columns]``: source rows see the source, the last row sees all, the one before not it."""
        hidden = torch.zeros(rows, before + rows, device=self._device)
        hidden[:-1, -1] = -10000.0
        return hidden.to(next(iter(self._state.values())).dtype)

    def _constrained(self, log_p: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        count = tokens.shape[1]
        if self.search.ngram and count:
            host = tokens.int().cpu()
            lengths = torch.full((host.shape[0],), count, dtype=torch.int32)
            banned = reference.ban_repeated_ngrams(host, lengths, self.search.ngram, host.new_zeros(0))
            for row, words in enumerate(banned):
                log_p[row, words[words >= 0].long().to(self._device)] += reference.FORBIDDEN
        log_p[:, self.search.sep] = reference.FORBIDDEN
        return log_p

    def _choose(self, log_p: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, ids and parents ``[batch, beams]``: the best of each hypothesis, then the best of those."""
        best, ids = log_p.topk(self.search.beams, dim=-1)
        total = (best + scores[:, :, None]).flatten(1)
        top, index = total.topk(self.search.beams, dim=-1)
        return top, ids.flatten(1).gather(1, index), index // self.search.beams
