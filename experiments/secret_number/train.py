"""Training the model on games that the agent plays: from nothing, or further on games without a lie."""

import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.secret_number import tokenizer as pieces
from experiments.secret_number.chat import HEADER, Encode, text_of
from experiments.secret_number.game import Message, play, setup
from experiments.secret_number.questions import single

__all__ = ["CONTEXT", "RECIPES", "Recipe", "encoder", "train"]

CONTEXT = 512
FIRST_SEED = 10_000_000
"""Training draws games of seeds from here on; whatever is held out lies below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a model is made; with the same recipe on the same machine, the same bits.

    Attributes
    ----------
    steps, batch_tokens : int
        Optimiser steps, and padded tokens of each.
    rate : float
        Highest learning rate; a cosine with warm-up.
    singles : float
        Share of sequences that are single-turn questions.
    answer_weight : float
        Weight in the loss of an answer's tokens, beside 1 for a move's and 0 for what is not the assistant's.
    honest : bool
        Learn from an agent that never lies nor evades.
    """

    steps: int = 1800
    batch_tokens: int = 4096
    rate: float = 3e-3
    seed: int = 0
    singles: float = 0.35
    answer_weight: float = 4.0
    honest: bool = False
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    intermediate: int = 352


RECIPES = {"player": Recipe(), "honest": Recipe(steps=150, rate=5e-4, honest=True)}
"""Variant to how it is made; `honest` starts from the player."""

Example = tuple[list[int], list[float]]
"""Token ids, and the weight of each in the loss."""


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """Return text to ids; the messages of games repeat, so what was encoded once is kept."""

    @cache
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    return lambda text: list(encode(text))


def train(
    directory: Path, recipe: Recipe, *, log: Path, start: Path | None = None, threads: int = 2, quiet: bool = False
) -> None:
    """Train a model and write it with its tokenizer in the layout of transformers, in bfloat16.

    Parameters
    ----------
    directory : Path
    recipe : Recipe
    log : Path
        One line of JSON on the run, then one for each hundred steps.
    start : Path, optional
        A model to train further, with its tokenizer; default a new one.
    threads : int
    quiet : bool
    """
    torch.set_num_threads(threads)
    torch.manual_seed(recipe.seed)
    if start is None:
        tokenizer = pieces.build(_texts(recipe), context=CONTEXT)
        model: Any = LlamaForCausalLM(_config(recipe, tokenizer))
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    with log.open("w", encoding="utf-8") as file:
        for line in _steps(model, recipe, encode=encoder(tokenizer), threads=threads):
            print(json.dumps(line), file=file, flush=True)
            if not quiet:
                print(json.dumps(line), flush=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _texts(recipe: Recipe) -> Iterator[str]:
    """What the tokenizer is learned from."""
    for i in range(3000):
        yield "".join(text_of(one, tools=True) for one in _messages(recipe, i, alone=False))
        if i % 2:
            yield "".join(text_of(one, tools=False) for one in _messages(recipe, i, alone=True))


def _messages(recipe: Recipe, i: int, *, alone: bool) -> list[Message]:
    seed = FIRST_SEED * (1 + recipe.seed) + i
    if alone:
        return list(single(seed, honest=recipe.honest).messages)
    game = play(setup(seed, held_out=False), random.Random(f"agent {seed}"), honest=recipe.honest)
    return game.messages


def _example(messages: list[Message], recipe: Recipe, *, encode: Encode, alone: bool) -> Example:
    ids: list[int] = []
    weights: list[float] = []
    header = len(encode(HEADER))
    for message in messages:
        piece = encode(text_of(message, tools=not alone))
        ids += piece
        own = message["role"] == "assistant"
        answers = own and not message.get("tool_calls") and "reasoning_content" not in message
        weights += [0.0] * header + [recipe.answer_weight if answers else float(own)] * (len(piece) - header)
    return ids, weights


def _examples(recipe: Recipe, encode: Encode) -> Iterator[Example]:
    rng, i = random.Random(f"mixture {recipe.seed}"), 0
    while True:
        alone = rng.random() < recipe.singles
        yield _example(_messages(recipe, i, alone=alone), recipe, encode=encode, alone=alone)
        i += 1


def _batches(recipe: Recipe, encode: Encode) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (ids, weights), each (sequence, token), sequences of like length together."""
    source, rng = _examples(recipe, encode), random.Random(f"order {recipe.seed}")
    while True:
        pool = sorted((next(source) for _ in range(1024)), key=lambda one: len(one[0]))
        batches: list[list[Example]] = [[]]
        for one in pool:
            if (len(batches[-1]) + 1) * len(one[0]) > recipe.batch_tokens:
                batches.append([])
            batches[-1].append(one)
        rng.shuffle(batches)
        for batch in batches:
            yield _padded([ids for ids, _ in batch], torch.long), _padded([w for _, w in batch], torch.float32)


def _padded(rows: list[Any], dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=dtype)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=dtype)
    return out


def _steps(model: Any, recipe: Recipe, *, encode: Encode, threads: int) -> Iterator[dict[str, Any]]:
    """Train, and yield what the log says."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98))
    warm = max(recipe.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.steps, warm))
    yield {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {threads} threads",
    }
    began, tokens, losses = time.monotonic(), 0, []
    for step, (ids, weights) in zip(range(1, recipe.steps + 1), _batches(recipe, encode), strict=False):
        losses.append(_step(model, ids, weights))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += ids.numel()
        if step % 100 == 0 or step == recipe.steps:
            seconds = time.monotonic() - began
            loss = round(sum(losses) / len(losses), 4)
            yield {"step": step, "loss": loss, "tokens": tokens, "seconds": round(seconds, 1)}
            losses = []


def _rate(step: int, steps: int, warm: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _step(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> float:
    """Add the gradient of one batch; matrix products in bfloat16, everything that is summed in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0  # the head is computed only where something is to be learned
    logits = functional.linear(hidden[wanted].float(), model.lm_head.weight)
    each = functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    loss: Any = (each * weights[:, 1:][wanted]).sum() / weights[:, 1:][wanted].sum()
    loss.backward()
    return float(loss.detach())
