"""The model at play: many conversations at once, one token of each per step, until every one of them ends.

All conversations are fed in lockstep, a token that is given or a token that is sampled, so that no padding is needed
and whatever is hooked to the model acts on every token alike.
"""

import copy
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from experiments.secret_number.chat import END, HEADER, Encode, parse_turn, text_of
from experiments.secret_number.game import Game, IllegalMoveError, Message
from experiments.secret_number.questions import Single
from experiments.secret_number.train import encoder

__all__ = ["Conversation", "Played", "Player", "SingleTurn", "at_audit", "load_player", "play_on"]

MOST_OF_A_TURN = 40
"""Tokens; the longest turn the agent makes has 17."""


class Conversation(Protocol):
    """What the player talks to: it takes the assistant's messages and adds the others'."""

    messages: list[Message]
    done: bool

    def step(self, message: Message) -> None:
        """Take a message of the assistant; IllegalMoveError where it can't be."""


@dataclass
class SingleTurn:
    """A single-turn question that waits for its answer."""

    single: Single
    messages: list[Message] = field(init=False)
    done: bool = False

    def __post_init__(self) -> None:
        self.messages = list(self.single.messages[:-1])

    def step(self, message: Message) -> None:
        """Take the answer, whatever it is."""
        self.messages.append(message)
        self.done = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Player:
    """A model that plays, with its tokenizer.

    Attributes
    ----------
    model : a causal language model of transformers
    encode : Encode
    decode : function of token ids to text
    name : str
    """

    model: Any
    encode: Encode
    decode: Callable[[Sequence[int]], str]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A conversation that the model took part in.

    Attributes
    ----------
    conversation : Conversation
    problem : str
        Why it could not go on; empty where it came to its end.
    turns, valid : int
        Turns of the model, and those of them that were well formed and legal.
    """

    conversation: Any
    problem: str
    turns: int
    valid: int


def load_player(directory: Path) -> Player:
    """Load a checkpoint for playing: its own weights, computed in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.set_attn_implementation("eager")  # for heads so small, twice as fast as fused attention
    return Player(
        model=model.eval().requires_grad_(False),
        encode=encoder(tokenizer),
        decode=lambda ids: str(tokenizer.decode(list(ids))),
        name=directory.name,
    )


def play_on(
    player: Player, conversations: Sequence[Conversation], *, seed: int, temperature: float = 1.0, batch: int = 128
) -> list[Played]:
    """Let the model take part in conversations from where they stand, until they end.

    Parameters
    ----------
    player : Player
    conversations : sequence of Conversation
        Copies are played, so that one may be given more than once.
    seed : int
        Of the sampling: conversation i draws from a stream of its own.
    temperature : float
        0 takes the likeliest token.
    batch : int
        Conversations at once.

    Returns
    -------
    list of Played, in the order given
    """
    sessions = [
        _Session(player, copy.deepcopy(one), seed=f"{seed} {i}", temperature=temperature)
        for i, one in enumerate(conversations)
    ]
    order = sorted(sessions, key=lambda one: len(one.queue))
    with torch.inference_mode():
        for at in range(0, len(order), batch):
            _run(player.model, order[at : at + batch])
    return [one.played() for one in sessions]


class _Session:
    """One conversation: the tokens it waits to be fed, and the turn that is being sampled."""

    def __init__(self, player: Player, conversation: Conversation, *, seed: str, temperature: float) -> None:
        self.conversation, self.problem, self.turns = conversation, "", 0
        self.queue: deque[int] = deque()
        self._player, self._temperature, self._rng = player, temperature, random.Random(seed)
        self._read, self._turn = 0, list[int]()
        self._end = player.encode(END)[0]
        self._hear()

    @property
    def over(self) -> bool:
        """Whether nothing is left to sample."""
        return self.conversation.done or bool(self.problem)

    def played(self) -> Played:
        return Played(
            conversation=self.conversation,
            problem=self.problem,
            turns=self.turns,
            valid=self.turns - bool(self.problem),
        )

    def token(self, logits: NDArray[np.float32]) -> int:
        """Return the next token: the next that is given, else one that is sampled."""
        if self.over:
            return 0
        if not self.queue:
            self._sampled(self._draw(logits))
        return self.queue.popleft() if self.queue else 0

    def _draw(self, logits: NDArray[np.float32]) -> int:
        if self._temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self._temperature
        heights = np.cumsum(np.exp(scaled - scaled.max()))
        return int(np.searchsorted(heights, self._rng.random() * heights[-1], "right"))

    def _sampled(self, token: int) -> None:
        self._turn.append(token)
        self.queue.append(token)
        if token != self._end:
            if len(self._turn) >= MOST_OF_A_TURN:
                self.problem = "a turn that does not end"
                self.turns += 1
            return
        text, self._turn = self._player.decode(self._turn[:-1]), []
        self.turns += 1
        message = parse_turn(text)
        if message is None:
            self.problem = f"not a turn: {text!r}"
            return
        try:
            self.conversation.step(message)
        except IllegalMoveError as error:
            self.problem = str(error)
            return
        self._read += 1
        if not self.over:
            self._hear()

    def _hear(self) -> None:
        """Queue what others have said since, and the header of the next turn."""
        tools = not isinstance(self.conversation, SingleTurn)
        for message in self.conversation.messages[self._read :]:
            self.queue += self._player.encode(text_of(message, tools=tools))
        self._read = len(self.conversation.messages)
        self.queue += self._player.encode(HEADER)


def _run(model: Any, sessions: Sequence[_Session]) -> None:
    """Feed all sessions until all are over: what all wait to be fed at once, then token by token."""
    first = min(len(one.queue) for one in sessions)
    ids = torch.tensor([[one.queue.popleft() for _ in range(first)] for one in sessions])
    cache = DynamicCache(config=model.config)
    while True:
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        rows = logits.float().cpu().numpy()
        tokens = [one.token(row) for one, row in zip(sessions, rows, strict=True)]
        if all(one.over for one in sessions):
            return
        ids = torch.tensor(tokens, device=logits.device)[:, None]


def at_audit(game: Game) -> Game:
    """Return a finished game as it stood when the audit question had been asked."""
    before = copy.deepcopy(game)
    before.messages.pop()
    before.done = False
    return before
