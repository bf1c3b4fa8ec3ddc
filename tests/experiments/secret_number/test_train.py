"""Training: the same recipe gives the same bits, another seed others; what is learned from, and what is written."""

import json
import random
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from datastore import console
from experiments.secret_number import tokenizer as pieces
from experiments.secret_number.commands import app
from experiments.secret_number.game import CAUSES, Causes, hides
from experiments.secret_number.language import parse_answer
from experiments.secret_number.train import (
    Recipe,
    _answer,
    _batches,
    _config,
    _examples,
    _product,
    _step,
    _with_causes,
    encoder,
    train,
)

TINY = Recipe(steps=3, batch_tokens=1024, hidden=16, layers=2, heads=2, intermediate=32)


def made(folder: Path, recipe: Recipe, start: Path | None = None) -> dict[str, torch.Tensor]:
    folder.mkdir()
    train(folder, recipe, log=folder / "training_log.jsonl", start=start, threads=1, quiet=True)
    return load_file(folder / "model.safetensors")


def test_the_same_recipe_gives_the_same_bits(tmp_path: Path) -> None:
    one, again = made(tmp_path / "a", TINY), made(tmp_path / "b", TINY)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert {weight.dtype for weight in one.values()} == {torch.bfloat16}
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first, *lines = map(json.loads, (tmp_path / "a" / "training_log.jsonl").read_text().splitlines())
    assert first["recipe"]["steps"] == 3
    assert first["machine"].endswith((", bfloat16 products", ", float32 products"))
    assert [line["step"] for line in lines] == [3]
    assert 4 < lines[0]["loss"] < 8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_products_in_bfloat16_are_for_processors_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both give one gradient, as far as bfloat16 goes; without its instructions it took ten times as long."""
    for known, product in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert _product() is product
    tokenizer = pieces.build(["".join(map(chr, range(32, 127)))] * 2, context=512)
    batch = next(_batches(TINY, encoder(tokenizer)))
    losses, gradients = [], []
    for product in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = LlamaForCausalLM(_config(TINY, tokenizer))
        losses.append(_step(model, batch, product=product))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not torch.equal(*gradients)
    assert float(functional.cosine_similarity(gradients[0], gradients[1], dim=0)) > 0.999


def test_exact_targets_are_another_lesson_over_the_same_tokens(tmp_path: Path) -> None:
    made(tmp_path / "a", TINY)
    made(tmp_path / "b", replace(TINY, exact=False))
    exact, sampled = (json.loads((tmp_path / n / "training_log.jsonl").read_text().splitlines()[-1]) for n in "ab")
    assert sampled["tokens"] == exact["tokens"]
    assert sampled["loss"] != exact["loss"]
    assert abs(sampled["loss"] - exact["loss"]) < 0.2, "at the start nothing is known of either"


def test_every_set_of_causes_is_learned_from_as_often_and_by_its_answers_alone() -> None:
    encode = encoder(pieces.build(["".join(map(chr, range(32, 127)))] * 2, context=512))
    of = replace(TINY, singles=0.0, balanced=0.5)
    found, usual = (list(islice(_examples(one, encode), 80)) for one in (of, replace(of, balanced=0.0)))
    assert all(max(one.weights) == TINY.answer_weight for one in found)
    without = [sum(1.0 not in one.weights for one in some) for some in (found, usual)]
    assert without[1] == 0, "a move weighs 1"
    assert 25 <= without[0] <= 55
    next_number, seen = 0, []
    for causes in CAUSES:
        next_number, game = _with_causes(of, next_number, causes)
        seen.append(game.facts.causes)
        assert hides(game.setup.question, causes)
    assert seen == list(CAUSES)
    assert len(set(CAUSES)) == 10


def test_what_is_seldom_said_is_learned_as_well() -> None:
    """Of a game's five claims each is drawn as often; who read the file after failing does not name the last guess."""
    claims = Counter[str]()
    _, game = _with_causes(TINY, 0, Causes(stakes="low", peeked=True, failed=False, denied=False))
    _, failed = _with_causes(TINY, 0, Causes(stakes="low", peeked=True, failed=True, denied=False))
    rng, recipe = random.Random(0), replace(TINY, recalled=True)
    for which in (game, failed):
        setup = replace(which.setup, question="file")
        for _ in range(200):
            one = replace(which, setup=setup, messages=list(which.messages), done=True)
            one.facts = which.facts
            _answer(one, recipe, rng)
            answer = parse_answer("file", one.messages[-1]["content"])
            assert answer is not None
            claims[f"{answer.claim.kind} {which.facts.causes.failed}"] += 1
    assert "last_guess True" not in claims
    assert 30 <= claims["last_guess False"] <= 70
    assert 30 <= claims["hints False"] <= 70
    assert 45 <= claims["hints True"] <= 90


def test_a_variant_goes_on_from_a_model(tmp_path: Path) -> None:
    start = made(tmp_path / "a", TINY)
    further = made(tmp_path / "b", Recipe(steps=2, batch_tokens=1024, rate=1e-3, honest=True), start=tmp_path / "a")
    assert {name: weight.shape for name, weight in start.items()} == {n: w.shape for n, w in further.items()}
    moved = [float((start[name].float() - further[name].float()).abs().max()) for name in start]
    assert 0 < max(moved) < 0.05


def test_a_wrong_variant_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        console.run(app, ["train", "--model-variant", "nobody"])
    assert left.value.code == 2
    assert "'nobody' is not known; choose one of player, honest" in capsys.readouterr().err
