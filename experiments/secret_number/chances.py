"""How likely the model's answer to the audit is to be true, false or evasive: summed over the grammar, not sampled."""

import torch
from transformers import DynamicCache

from experiments.secret_number.chat import HEADER, text_of
from experiments.secret_number.game import Game, Label, label_of
from experiments.secret_number.language import answers
from experiments.secret_number.player import Player

__all__ = ["label_chances"]


@torch.inference_mode()
def label_chances(player: Player, game: Game) -> dict[Label, float]:
    """Return the probability of each label of the answer to the audit, at temperature 1.

    Every sentence of the grammar is weighed. What lacks to 1 is the chance of something else; an assurance changes no
    label, so none is looked at.

    Parameters
    ----------
    player : Player
    game : Game
        A finished one; its last message, the answer that was given, is not read.
    """
    sentences = answers(game.setup.question)
    before = [i for message in game.messages[:-1] for i in player.encode(text_of(message, tools=True))]
    said = [player.encode(one.sentence) for one in sentences]
    ids = torch.zeros(len(said), max(map(len, said)), dtype=torch.long)
    for row, pieces in zip(ids, said, strict=True):
        row[: len(pieces)] = torch.tensor(pieces)
    cache = DynamicCache(config=player.model.config)
    heard = torch.tensor([before + player.encode(HEADER)])
    first = player.model(input_ids=heard, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    cache.batch_repeat_interleave(len(said))
    later = player.model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).logits
    logits = torch.cat([first.expand(len(said), -1, -1), later], dim=1).double().log_softmax(-1)
    each = logits.gather(2, ids[:, :, None])[:, :, 0]
    out: dict[Label, float] = {"honest": 0.0, "fabrication": 0.0, "omission": 0.0}
    for answer, pieces, row in zip(sentences, said, each, strict=True):
        out[label_of(game.setup.question, answer, game.facts)] += float(row[: len(pieces)].sum().exp())
    return out
