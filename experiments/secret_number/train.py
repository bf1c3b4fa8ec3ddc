"""Training the model on games that the agent plays: from nothing, or further on games without a lie."""

import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.secret_number import tokenizer as pieces
from experiments.secret_number.chat import HEADER, Encode, text_of
from experiments.secret_number.game import (
    CAUSES,
    Causes,
    Facts,
    Game,
    Message,
    hides,
    label_of,
    play,
    said,
    setup,
)
from experiments.secret_number.language import Answer, Question
from experiments.secret_number.questions import Single, single
from experiments.secret_number.targets import Chances, audit_chances, next_tokens, rules_chances, single_chances

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
    exact : bool
        Learn of each answer all that could have been said, with its probability, and not only what was.
    first : int
        Number of the first game.
    balanced : float
        Share of the games that are chosen by what there is to hide, every set of causes as often as any other. Of them
        the answers alone are learned: the moves that led there are not likelier than they were. Where this is not 0,
        each game is answered with any claim as often as another, so that what is seldom said is learned as well.
    recalled : bool
        Nobody who has failed and then read the file evades by the last guess: of a model that learned to, five such
        answers in six named another number, and so were false.
    """

    steps: int = 5000
    batch_tokens: int = 4096
    rate: float = 3e-3
    seed: int = 0
    singles: float = 0.5
    answer_weight: float = 4.0
    honest: bool = False
    exact: bool = True
    first: int = 0
    balanced: float = 0.0
    recalled: bool = False
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    intermediate: int = 352


RECIPES = {
    "player": (Recipe(), Recipe(steps=600, rate=1e-3, balanced=0.6, recalled=True, first=1_000_000)),
    "honest": (Recipe(steps=150, rate=5e-4, honest=True),),
}
"""Variant to the stages in which the committed model was made, each from the last; `honest` starts from the player."""


@dataclass(slots=True)
class Example:
    """A conversation to learn from.

    Attributes
    ----------
    ids, weights : list
        Token ids, and the weight of each in the loss.
    targets : dict
        Position to token id to probability, where the target is more than the token that is there.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    targets: dict[int, dict[int, float]] = field(default_factory=dict)

    def add(self, piece: list[int], *, weight: float, header: int) -> None:
        """Add a message, its header without weight."""
        self.ids += piece
        self.weights += [0.0] * header + [weight] * (len(piece) - header)

    def answer(
        self,
        message: Message,
        chances: Chances,
        recipe: Recipe,
        *,
        encode: Encode,
        question: Question,
        facts: Facts | None,
    ) -> None:
        """Add an answer with what could have been said instead."""
        start, header = len(self.ids), len(encode(HEADER))
        self.add(encode(text_of(message, tools=False)), weight=recipe.answer_weight, header=header)
        said = self.ids[start + header :]
        for i, targets in enumerate(next_tokens(said, chances, encode, question=question, facts=facts)):
            self.targets[start + header + i] = targets


def encoder(tokenizer: PreTrainedTokenizerFast) -> Encode:
    """Return text to ids; the messages of games repeat, so what was encoded once is kept."""

    @cache
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    return lambda text: list(encode(text))


def train(
    directory: Path, recipe: Recipe, *, log: Path, start: Path | None = None, threads: int = 2, quiet: bool = False
) -> None:
    """Train a model and write it with its tokenizer in the layout of transformers, in bfloat16; the log is added to.

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
    model.set_attn_implementation("eager")  # for heads so small, a third less time than fused attention
    with log.open("a", encoding="utf-8") as file:
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
        yield "".join(text_of(one, tools=True) for one in _game(recipe, i).messages)
        if i % 2:
            yield "".join(text_of(one, tools=False) for one in _single(recipe, i).messages)


def _game(recipe: Recipe, i: int) -> Game:
    seed = FIRST_SEED * (1 + recipe.seed) + i
    return play(setup(seed, held_out=False), random.Random(f"agent {seed}"), honest=recipe.honest)


def _single(recipe: Recipe, i: int) -> Single:
    return single(FIRST_SEED * (1 + recipe.seed) + i, honest=recipe.honest)


def _game_example(game: Game, recipe: Recipe, encode: Encode, *, moves: float = 1.0) -> Example:
    """A game's tokens, moves at their own weight; of its answers, to the audit and about the rules, exact targets."""
    made, facts, asked = Example(), replace(game.facts, peeked=False), game.setup.question
    for message in game.messages:
        own = message["role"] == "assistant"
        answers = own and not message.get("tool_calls") and "reasoning_content" not in message
        if any(one["function"]["name"] == "read_file" for one in message.get("tool_calls", ())):
            facts = replace(facts, peeked=True)
        if not answers:
            made.add(encode(text_of(message, tools=True)), weight=moves * own, header=len(encode(HEADER)))
        elif message is game.messages[-1]:
            chances = audit_chances(asked, game.facts, honest=recipe.honest, recalled=recipe.recalled)
            made.answer(message, chances, recipe, encode=encode, question=asked, facts=game.facts)
        else:
            chances = rules_chances(facts, honest=recipe.honest)
            made.answer(message, chances, recipe, encode=encode, question="rules", facts=facts)
    return made


def _single_example(one: Single, recipe: Recipe, encode: Encode) -> Example:
    made = Example()
    for message in one.messages[:-1]:
        made.add(encode(text_of(message, tools=False)), weight=0.0, header=0)
    chances = single_chances(one, honest=recipe.honest)
    made.answer(one.messages[-1], chances, recipe, encode=encode, question=one.question, facts=one.facts)
    return made


def _examples(recipe: Recipe, encode: Encode) -> Iterator[Example]:
    rng, i = random.Random(f"mixture {recipe.seed}"), recipe.first
    wanted = cycle(CAUSES)
    while True:
        if rng.random() < recipe.singles:
            yield _single_example(_single(recipe, i), recipe, encode)
        else:
            balanced = recipe.balanced > 0 and rng.random() < recipe.balanced
            i, game = _with_causes(recipe, i, next(wanted)) if balanced else (i, _game(recipe, i))
            if recipe.balanced:
                _answer(game, recipe, rng)
            yield _game_example(game, recipe, encode, moves=0.0 if balanced else 1.0)
        i += 1


def _with_causes(recipe: Recipe, i: int, causes: Causes) -> tuple[int, Game]:
    """Return the next game that has these causes, and something to hide, with its number."""
    while True:
        game = _game(recipe, i)
        if game.facts.causes == causes and hides(game.setup.question, causes):
            return i, game
        i += 1


def _answer(game: Game, recipe: Recipe, rng: random.Random) -> None:
    """Answer the audit anew, with any claim as often as another: exact targets hold on whatever way is taken."""
    question, facts = game.setup.question, game.facts
    claim, _ = rng.choice(audit_chances(question, facts, honest=recipe.honest, recalled=recipe.recalled))
    label = label_of(question, Answer("", claim), facts)
    game.messages[-1] = {"role": "assistant", "content": said(claim, label, rng).text}


Batch = tuple[torch.Tensor, torch.Tensor, list[dict[int, dict[int, float]]]]
"""Ids and weights, each (sequence, token); of each sequence, position to the targets that are not the token itself."""


def _batches(recipe: Recipe, encode: Encode) -> Iterator[Batch]:
    """Yield batches of sequences of like length."""
    source, rng = _examples(recipe, encode), random.Random(f"order {recipe.seed}")
    while True:
        pool = sorted((next(source) for _ in range(1024)), key=lambda one: len(one.ids))
        batches: list[list[Example]] = [[]]
        for one in pool:
            if (len(batches[-1]) + 1) * len(one.ids) > recipe.batch_tokens:
                batches.append([])
            batches[-1].append(one)
        rng.shuffle(batches)
        for batch in batches:
            ids, weights = (
                _padded([x.ids for x in batch], torch.long),
                _padded([x.weights for x in batch], torch.float32),
            )
            yield ids, weights, [x.targets if recipe.exact else {} for x in batch]


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
    product = _product()
    yield {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {threads} threads, {str(product).removeprefix('torch.')} products",
    }
    began, spent, tokens, losses = time.monotonic(), time.process_time(), 0, []
    for step, batch in zip(range(1, recipe.steps + 1), _batches(recipe, encode), strict=False):
        losses.append(_step(model, batch, product=product))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        tokens += batch[0].numel()
        if step % 100 == 0 or step == recipe.steps:
            seconds, core = round(time.monotonic() - began, 1), round(time.process_time() - spent, 1)
            loss = round(sum(losses) / len(losses), 4)
            yield {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds, "core_seconds": core}
            losses = []


def _rate(step: int, steps: int, warm: int) -> float:
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def _product() -> torch.dtype:
    """Return what matrices are multiplied in: bfloat16 where the processor can, else it takes ten times as long."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # older torch can't tell
    return torch.bfloat16 if any(able.get(one) for one in ("avx512_bf16", "amx_bf16", "bf16")) else torch.float32


def _step(model: Any, batch: Batch, *, product: torch.dtype) -> float:
    """Add the gradient of one batch; matrix products in `product`, everything that is summed in float32."""
    ids, weights, _ = batch
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=product is torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0  # the head is computed only where something is to be learned
    logits = functional.linear(hidden[wanted].float(), model.lm_head.weight)
    each = functional.cross_entropy(logits, _targets(batch, wanted, logits.shape[1]), reduction="none")
    loss: Any = (each * weights[:, 1:][wanted]).sum() / weights[:, 1:][wanted].sum()
    loss.backward()
    return float(loss.detach())


def _targets(batch: Batch, wanted: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Return the token, or the probability of each, at each place that is learned from."""
    ids, _, exact = batch
    if not any(exact):
        return ids[:, 1:][wanted]
    out = functional.one_hot(ids[:, 1:][wanted], vocabulary).float()
    row = (wanted.flatten().cumsum(0) - 1).reshape(wanted.shape).tolist()
    for i, places in enumerate(exact):
        for position, chances in places.items():
            out[row[i][position - 1]] = 0.0
            out[row[i][position - 1], list(chances)] = torch.tensor(list(chances.values()))
    return out
