"""`EditedTop`: the best texts so far, drawn by the model or edited by a function of the user's."""

import collections

import pytest
import torch
from conftest import EOS, ALDRIFTTrainer, lora_config, pool_of, tiny_gpt2

from aldrift_hf import EditedTop
from aldrift_hf.algorithm.samplers import edited
from aldrift_hf.algorithm.samplers.kept import KeptDraws, of_prompt
from aldrift_hf.streams import generator
from aldrift_hf.types import Completions, Proposals

LETTERS = "abcd"
LONGEST = 6
COST = {"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}


class Letters:
    """Texts of up to five letters, of which the cost is the sum of their letters'; what has "dd" the prior excludes.

    Tokens are the letters' places from 1; 0 ends a text. What is asked of it as edits is kept.
    """

    eos_token_ids = (0,)

    def __init__(self):
        self.asked = []

    def decode(self, completions):
        return ["".join(LETTERS[token - 1] for token in row[:-1]) for row in completions.tokens()]

    def encode(self, texts):
        known = [{*text} <= {*LETTERS} and len(text) < LONGEST for text in texts]
        return [[*(LETTERS.index(each) + 1 for each in text), 0] if ok else None for text, ok in zip(texts, known)]

    def proposals(self, *texts_of_prompts, prompts=None):
        texts = [text for texts in texts_of_prompts for text in texts]
        tokens = [[*row, *[0] * (LONGEST - len(row))] for row in self.encode(texts)]
        shape = (len(texts_of_prompts), len(texts_of_prompts[0]))
        rows = torch.tensor(prompts or range(shape[0])).repeat_interleave(shape[1])
        cost = torch.tensor([sum(map(COST.get, text)) for text in texts], dtype=torch.float64)
        log_prior = torch.tensor([-torch.inf if "dd" in text else -float(len(text)) for text in texts]).double()
        length = torch.tensor([len(text) + 1 for text in texts])
        return Proposals(rows, Completions(torch.tensor(tokens), length), cost.view(shape), log_prior.view(shape),
                         torch.zeros(shape).double())  # fmt: skip

    def redraw(self, step, spans, screen=None):
        assert step == len(self.asked) + 1
        texts = self.decode(Completions.of(spans.after, 0))
        assert not any(map(any, (spans.tokens, spans.old, spans.widths))), "nothing is left to draw"
        self.asked.append(texts)
        half = len(texts) // self.prompts
        return self.proposals(*(texts[half * place : half * (place + 1)] for place in range(self.prompts)))

    def rung(self, sampler, *texts, size=4, seed=0):
        self.asked, self.prompts = [], len(texts)
        chance, drawn = generator(seed), self.proposals(*texts)
        pool = sampler.pool(drawn, self)
        return sampler.move(pool, sampler.select(pool, 0.0, 1.0, size, chance), 1.0, self.redraw, chance)


def swapped(texts, rng):
    """One letter of each text changed at random."""
    for text in texts:
        place = rng.randrange(max(len(text), 1))
        yield text[:place] + rng.choice(LETTERS) + text[place + 1 :]


def test_the_best_are_distinct_and_in_order_and_stay_from_rung_to_rung():
    letters, sampler = Letters(), EditedTop(lambda texts, rng: ["ab", "dd", "ca", "ab"], edits_per_draw=1, remembered=5)
    moved = letters.rung(sampler, ["bb", "ddd", "c", "bb", "d"])
    assert letters.decode(moved.pool.completions) == ["ab", "c", "bb", "ca", "d"], "ties: the prior's likelier first"
    assert sorted(letters.asked[0]) == ["ab", "c", "c", "ca", "dd"], "three edits, and the best text in place of more"
    again = EditedTop(lambda texts, rng: ["a"], edits_per_draw=1, remembered=5)
    again.load_state_dict(sampler.state_dict())
    moved = letters.rung(again, ["b", "bbb"])
    assert letters.decode(moved.pool.completions) == ["a", "b", "ab", "c", "bb"]
    again.load_state_dict({})
    assert not again.state_dict()


def test_of_equal_costs_the_newest_come_first_where_that_is_asked_for():
    """A text is as old as when it was first met, though it is drawn or made again; a checkpoint keeps the order."""
    sampler = EditedTop(lambda texts, rng: ["ab"], edits_per_draw=1, newest_first=True)
    moved = Letters().rung(sampler, ["ba", "c", "aab", "b"])
    assert Letters().decode(moved.pool.completions) == ["ab", "b", "aab", "ba", "c"]
    again = EditedTop(lambda texts, rng: ["aaab"], edits_per_draw=1, newest_first=True)
    again.load_state_dict(sampler.state_dict())
    moved = Letters().rung(again, ["ba", "aaba"])
    assert Letters().decode(moved.pool.completions) == ["aaab", "aaba", "ab", "b", "aab", "ba", "c"]


def test_what_the_prior_excludes_comes_last():
    letters, sampler = Letters(), EditedTop(lambda texts, rng: ["a"], edits_per_draw=1)
    moved = letters.rung(sampler, ["dd", "ddbbb", "dbcd"])
    assert letters.decode(moved.pool.completions) == ["a", "dbcd", "dd", "ddbbb"]


def test_edits_are_made_of_the_best_and_a_few_at_a_time():
    """The second generation's parents are what the first one found; a rung asks for `edits_per_draw` per draw."""
    seen = []

    def edit(texts, rng):
        seen.append(texts)
        return ["a" * (6 - len(seen))]

    letters, sampler = Letters(), EditedTop(edit, edits_per_draw=6)
    letters.rung(sampler, ["dbd", "dbdb"])
    assert [len(texts) for texts in letters.asked] == [5, 5, 2]
    assert [len(texts) for texts in seen] == 3 * [2 * edited.GENERATION]
    assert {*seen[0]} <= {"dbd", "dbdb"}
    assert "aaaaa" in seen[1], "the best so far is hardly missed by ten draws by rank"
    assert sampler.whole_texts(70) == 10
    assert sampler.draws_for(70) == sampler.draws_for(76) == 70
    assert sampler.whole_texts(3) == 1


@pytest.mark.parametrize(("n", "flatness"), [(20, edited.LEARNED), (300, edited.PARENTS)])
def test_ranks_are_chosen_in_the_stated_proportion(n, flatness):
    expected = torch.tensor([1 / (rank + flatness * n) for rank in range(1, n + 1)]).double()
    torch.testing.assert_close(edited._by_rank(n, flatness), expected)


def test_rows_to_learn_from_are_chosen_by_rank():
    letters, sampler = Letters(), EditedTop(lambda texts, rng: ["b"], edits_per_draw=1)
    moved = letters.rung(sampler, ["d", "c", "bc"], size=20_000)
    counts = moved.selection.index[0].bincount(minlength=4).double()
    chances = edited._by_rank(4, edited.LEARNED) / edited._by_rank(4, edited.LEARNED).sum()
    assert moved.selection.index.shape == (1, 20_000)
    assert float(((counts - 20_000 * chances) ** 2 / (20_000 * chances)).sum()) < 16.3, "chi-square, p = 0.001"


def test_each_prompt_has_its_own_best():
    """Also where they have not the same number of distinct texts."""
    letters, sampler = Letters(), EditedTop(lambda texts, rng: [max(texts)], edits_per_draw=1)
    moved = letters.rung(sampler, ["b", "c", "d"], ["a", "a", "a"], size=50)
    texts = letters.decode(moved.pool.completions)
    assert texts == ["b", "c", "d", "a", "a", "a"]
    assert moved.selection.index[1].unique().tolist() == [0], "the repeats of a shorter row are not learned from"
    assert letters.decode(sampler._best.of(1).completions) == ["a"]


def test_the_order_of_edits_does_not_matter():
    """A set has another order in each process, and all processes must evaluate the same edits."""
    words = [first + second for first in LETTERS for second in LETTERS]
    asked = []
    for order in (words, words[::-1], {*words}):
        letters = Letters()
        letters.rung(EditedTop(lambda texts, rng, order=order: order), ["d", "c"])
        asked.append(letters.asked)
    assert asked[0] == asked[1] == asked[2]
    assert len({*asked[0][0]}) == 5


def test_texts_that_cannot_be_written_are_left_out():
    letters, sampler = Letters(), EditedTop(lambda texts, rng: ["xy", "abcabc", "ab"], edits_per_draw=1)
    letters.rung(sampler, ["d", "c"])
    assert letters.asked == [["ab", "c"]], "the best text stands in for what is missing, and costs no call"
    assert sampler.metrics(None, 1.0) == {"edits": 1.0}
    sampler.edit = lambda texts, rng: ["xy"]
    letters.rung(sampler, ["d", "c"])
    assert letters.asked == [["ab", "ab"]], "a search that has run dry is no error"
    with pytest.raises(ValueError, match=r"of no text that edit\(\) returned can the tokenizer write .*=6 tokens"):
        letters.rung(EditedTop(lambda texts, rng: ["xy"]), ["d", "c"])
    with pytest.raises(ValueError, match="must be at least 1"):
        EditedTop(swapped, edits_per_draw=0)


# ---- In a run of the trainer -----------------------------------------------------------------------------------------


def test_an_edit_that_is_none_is_left_out():
    """As a crossover that came to nothing."""
    letters, sampler = Letters(), EditedTop(lambda texts, rng: [None, "ca", None], edits_per_draw=1)
    letters.rung(sampler, ["bb", "ab"])
    assert "ca" in letters.asked[0]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda texts, rng: 1 / 0, r"edit\(\) raised ZeroDivisionError: division by zero\. It is called as edit\(te"),
        (lambda texts: texts, r"edit\(\) raised TypeError: .*takes 1 positional argument but 2 were given"),
        (lambda texts, rng: (text[99] for text in texts), r"edit\(\) raised IndexError"),
        (lambda texts, rng: [texts], r"edit\(\) raised TypeError: unhashable"),
        (lambda texts, rng: "ca", r"edit\(\) returned the text 'ca'\. Return a list of texts"),
        (lambda texts, rng: ["a", 3], r"edit\(\) returned 3, which is no text"),
    ],
)
def test_an_edit_that_fails_is_named(edit, said):
    letters = Letters()
    with pytest.raises((RuntimeError, TypeError), match=f"EditedTop: {said}"):
        letters.rung(EditedTop(edit, edits_per_draw=1), ["bb", "ab"])


def words_changed(texts, rng):
    """One word of each text changed, or added."""
    for text in texts:
        words = text.split()
        words[rng.randrange(len(words) + 1) :][:1] = [rng.choice("abc")]
        yield " ".join([*words, rng.choice("abc")][:8])


def far(prompts, completions):
    """What is missing from eight times the letter c, which the model hardly draws."""
    return [8.0 - min(text.split().count("c"), 8) for text in completions]


def trainer_of(config, tokenizer, objective=far, **changes):
    settings = config(
        num_generations=24, num_rungs=4, tau_max=4.0, tau_step=1.0, objective_range=8.0, max_completion_length=9,
        updates_per_rung=4, per_device_train_batch_size=8, **changes.pop("settings", {}),
    )  # fmt: skip
    model = tiny_gpt2()
    return ALDRIFTTrainer(
        model, objective, settings, processing_class=tokenizer, peft_config=lora_config(model),
        sampler=EditedTop(words_changed, 5), **changes,
    )  # fmt: skip


def test_a_run_finds_by_edits_what_its_model_does_not_draw(config, tokenizer):
    """Every call is counted, once per text, and what was edited is learned from."""
    asked = collections.Counter()

    def cost(prompts, completions):
        asked.update(zip(prompts, completions, strict=True))
        return far(prompts, completions)

    trainer = trainer_of(config, tokenizer, cost, train_dataset=["", "a b"])
    trainer.train()
    rungs = trainer.record.rungs
    assert [rung["draws"] for rung in rungs] == 4 * [4]
    assert [rung["proposals"] for rung in rungs] == [2 * 24 * number for number in range(1, 5)]
    assert rungs[-1]["objective_calls"] <= len(asked) == asked.total()
    assert min(map(far, *zip(*([[""], [text]] for _, text in asked))))[0] <= 1.0
    for place, prompt in enumerate(["", "a b"]):
        kept = trainer.sampler._best.of(place)
        every = {text for of, text in [*asked][: rungs[-1]["objective_calls"]] if of == prompt}
        assert len(kept) < trainer.sampler.remembered
        assert {*trainer.sampler._policy.decode(kept.completions)} == every
    assert sum(rung["sample_objective_mean"] - rung["objective_mean"] for rung in rungs) < -4.0, "they are learned from"
    assert rungs[-1]["edits"] > 10


def test_a_run_that_is_resumed_goes_on_with_its_best_texts(config, tokenizer, tmp_path):
    """From a rung's last update, and in the middle of one."""
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = trainer_of(config, tokenizer, settings=settings | {"output_dir": str(tmp_path / "whole")})
    whole.train()
    for step in (8, 10):
        again = trainer_of(config, tokenizer, settings=settings | {"output_dir": str(tmp_path / f"from-{step}")})
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        for one, other in zip(whole.record.rungs, again.record.rungs, strict=True):
            for name in ("sample_objective_mean", "objective_calls", "edits", "log_z"):
                assert one[name] == other[name]


def test_edits_are_written_as_the_tokenizer_reads_them(config, tokenizer):
    trainer = trainer_of(config, tokenizer)
    trainer.run.start()
    encode = trainer.run.on_prompts.encode
    a, b = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert encode(["a b", "a x", " ".join(9 * "a"), "", " ".join(8 * "a")]) == [
        [a, b, EOS], None, None, [EOS], [*[a] * 8, EOS],
    ]  # fmt: skip
    assert encode([]) == []


def test_kept_draws_are_those_of_their_prompt():
    pool = pool_of(torch.rand(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64))
    for place in (0, 1):
        one = of_prompt(pool, place)
        assert torch.equal(one.log_prior, pool.log_prior[place : place + 1])
        assert torch.equal(one.objective, pool.objective[place : place + 1])
    kept = KeptDraws("chains")
    kept.put(pool)
    assert kept.first([1, 0], 4) is None
    assert kept.first([0, 1], 2).objective.tolist() == pool.objective[:, :2].tolist()


def test_parents_are_chosen_by_rank():
    seen = []
    with pytest.raises(ValueError, match="it returned none"):  # after 60 generations of 10 parents
        Letters().rung(
            EditedTop(lambda texts, rng: seen.extend(texts) or ["xy"], edits_per_draw=50),
            ["d", "c", "b", "a", "cb", "ca"],
        )
    assert len(seen) == 600
    best = max({*seen}, key=seen.count)
    assert seen.count(best) / 600 == pytest.approx(1 / sum(1 / rank for rank in range(1, 7)), abs=0.08)


def test_of_too_many_edits_some_are_chosen_at_random():
    words = [a + b for a in "abcd" for b in "abcd"]
    letters = Letters()
    letters.rung(EditedTop(lambda texts, rng: words, edits_per_draw=5), ["d"])
    assert len({*letters.asked[0]}) == 5
    assert sorted(letters.asked[0]) != words[:5]
