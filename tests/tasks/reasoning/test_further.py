"""Further data: read, cut and measured before and after, with standard errors of pairs."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from nso_hf.running.paired import Measured, before_and_after
from nso_hf.tasks.reasoning.before_after import BeforeAndAfter
from nso_hf.tasks.reasoning.dealing import dealt
from nso_hf.tasks.reasoning.examples import Columns, Example
from nso_hf.tasks.reasoning.further import FurtherOptions
from nso_hf.tasks.reasoning.prompts import PromptFormat
from nso_hf.tasks.reasoning.texts import losses, num_predicted, pieces
from tests.tiny_models import byte_tokenizer, save_model


def loaded(seen=(), max_length=50, tokenizer=None, seed=0, **options):
    prompt_format = PromptFormat(tokenizer or byte_tokenizer())
    return FurtherOptions(**options).load(prompt_format, seen, Columns(), max_length, seed)


def test_means_and_errors_are_those_of_numpy():
    generator = np.random.default_rng(0)
    right = generator.integers(0, 2, 50).tolist()
    again = generator.integers(0, 2, 50).tolist()
    before, after = (Measured([float(x) for x in answers], [1] * 50) for answers in (right, again))
    assert before.mean == pytest.approx(np.mean(right), rel=1e-12)
    assert before.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(50), rel=1e-12)
    found = before_and_after("task", "accuracy", before, after)
    change = np.subtract(again, right)
    assert found["change"] == pytest.approx(change.mean(), rel=1e-12)
    assert found["change_stderr"] == pytest.approx(change.std(ddof=1) / math.sqrt(50), rel=1e-12)
    assert found["after"] == {"accuracy": after.mean, "stderr": after.stderr}
    none = before_and_after("task", "accuracy", None, after)
    assert none["before"] is none["change"] is none["change_stderr"] is None


def test_the_error_of_a_mean_over_tokens_is_that_of_drawing_texts_again():
    generator = np.random.default_rng(1)
    counts = generator.integers(5, 60, 400)
    sums = counts * generator.normal(3, 0.5, 400)
    measured = Measured(sums.tolist(), counts.tolist())
    assert measured.mean == pytest.approx(sums.sum() / counts.sum(), rel=1e-12)
    drawn = generator.integers(0, 400, (4000, 400))
    bootstrap = (sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)).std()
    # The bootstrap's own error is 1 / sqrt(2 * 4000) = 1.1 % of it: four of them.
    assert measured.stderr == pytest.approx(bootstrap, rel=0.045)


class Processes(SimpleNamespace):
    """What `dealt` reads of an accelerator."""


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_every_item_is_dealt_and_each_process_has_as_many_batches(count, processes):
    shares = [
        dealt(
            list(range(count)), lambda i: -i, 4, Processes(process_index=p, num_processes=processes)
        )
        for p in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {i for share in shares for batch in share for i in batch} == set(range(count))
    assert all(0 < len(batch) <= 4 for share in shares for batch in share)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_losses_are_those_of_each_piece_alone(tmp_path, kind):
    """Against log_softmax in a plain loop, one piece at a time and without padding."""
    model = AutoModelForCausalLM.from_pretrained(save_model(kind, tmp_path)).train()
    prompt_format = PromptFormat(byte_tokenizer())
    texts = [p for n in (1, 30, 7, 90, 2) for p in pieces("word " * n, prompt_format, 64)]
    assert max(len(ids) for ids, _ in texts) == 64
    found = losses(model, texts, Accelerator(cpu=True), batch_size=3, description="x")
    assert model.training
    model.eval()
    for (ids, _), loss in zip(texts, found, strict=True):
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = -sum(log_p[i, token].item() for i, token in enumerate(ids[1:]))
        # float32 logits of about 1, in sums of 63 terms of about 5.5: each off by some 1e-6.
        assert loss == pytest.approx(expected, abs=1e-4)


def test_pieces_hold_all_tokens_once():
    tokenizer = byte_tokenizer()
    without = pieces("abcdefg", PromptFormat(tokenizer), 3)
    assert [tokenizer.decode(ids) for ids, _ in without] == ["abc", "def"]  # of "g" nothing is left
    assert [num_predicted(piece) for piece in without] == [2, 2]

    class Beginning(PromptFormat):
        """As of a tokenizer that begins each text with a token of its own."""

        _around = ([1], [])

    with_start = pieces("abcdefg", Beginning(tokenizer), 3)
    assert [tokenizer.decode(ids[1:]) for ids, _ in with_start] == ["ab", "cd", "ef", "g"]
    assert all(ids[0] == 1 and labels[0] == -100 for ids, labels in with_start)
    assert sum(map(num_predicted, with_start)) == 7
    assert pieces("", PromptFormat(tokenizer), 3) == []
    special = pieces("a</s>", PromptFormat(tokenizer), 9)[0][0]
    assert tokenizer.eos_token_id not in special  # what is written of it is text


def test_a_text_is_measured_by_its_pieces_and_a_table_by_its_rows(tmp_path):
    (tmp_path / "prose.txt").write_text("0123456789" * 12, encoding="utf-16")
    rows = "".join(json.dumps({"text": "a" * n}) + "\n" for n in (120, 1, 60, 3))
    (tmp_path / "rows.jsonl").write_text(rows)
    prose, table = loaded(forgetting_data=[f"{tmp_path}/prose.txt", f"t={tmp_path}/rows.jsonl"])
    assert (prose.name, prose.kind, table.name, table.measure) == ("prose", "text", "t", "loss")
    assert [len(text) for text in prose.texts] == [1, 1, 1]  # 50 + 50 + 20 tokens
    assert [len(text) for text in table.texts] == [3, 2, 1]  # nothing is predicted of one token
    (some,) = loaded(forgetting_data=[f"t={tmp_path}/rows.jsonl"], further_size=2)
    assert len(some.texts) == 2 and all(text in table.texts for text in some.texts)


def test_questions_from_files_folders_and_generators(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"{i}", "text": "t"} for i in range(9)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    marked = [{"question": f"q{i}", "answer": f"so #### {i}"} for i in range(4)]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text("\n".join(map(json.dumps, marked)))
    specs = [str(tmp_path), f"gsm8k:{tmp_path}/other"]
    longer = 'longer=reasoning_gym:chain_sum{"min_terms": 5, "max_terms": 5}'
    folder, preset, generated = loaded(
        [Example("q3", "3")], forgetting_data=specs, also_test=[longer]
    )
    assert folder.examples == [Example(f"q{i}", f"{i}") for i in range(9) if i != 3]
    assert preset.name == "other" and preset.examples[0] == Example("q0", "0", ("so",))
    assert (generated.name, generated.option, generated.measure) == (
        "longer",
        "also_test",
        "accuracy",
    )
    assert 190 < len(generated.examples) <= 200
    assert all(e.question.count("+") + e.question.count("-") >= 4 for e in generated.examples)
    (named,) = loaded(also_test=["two words=reasoning_gym:chain_sum"], further_size=5)
    assert named.name == "two words" and len(named.examples) == 5
    (task,) = loaded(forgetting_data=["reasoning_gym:chain_sum"], further_size=5, seed=3)
    assert task.name == "chain_sum" and len(task.examples) == 5


def test_wrong_further_data(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"question": "q", "answer": "a"}')
    (tmp_path / "numbers.jsonl").write_text('{"text": "a b"}\n{"text": 5}')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 9)
    (tmp_path / "short.txt").write_text("ab")
    wrong = {
        "no/such.txt": r"^forgetting_data='no/such.txt': no such file or folder",
        f"{tmp_path}/one.jsonl": r"^forgetting_data=.*one.jsonl': leaves 1 questions",
        f"{tmp_path}/short.txt": r"^forgetting_data=.*short.txt': leaves 1 texts",
        f"{tmp_path}/numbers.jsonl": r"^forgetting_data=.*row 2 has no text in the column 'text'",
        f"{tmp_path}/latin.txt": r"^forgetting_data=.*latin.txt': it is no text, or in another",
        "reasoning_gym:chain_sum{min: 3}": r"^forgetting_data=.*its options are no JSON",
        "reasoning_gym:": r"^forgetting_data='reasoning_gym:': names no task",
        "reasoning_gym:chain_sums": r"^forgetting_data=.*chain_sums': no such task. Try chain_sum",
        'reasoning_gym:chain_sum{"min_terms": -1}': r"^forgetting_data=\{'min_terms': -1\}: ",
        "": r"^forgetting_data='': names no data",
    }
    for spec, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            loaded(forgetting_data=[spec])
    with pytest.raises(ValueError, match=r"^further_size=1: must be an integer, at least 2"):
        FurtherOptions(further_size=1)
    with pytest.raises(ValueError, match=r"^forgetting_data='gsm8k': must be a list"):
        FurtherOptions(forgetting_data="gsm8k")
    twice = ["a=reasoning_gym:chain_sum"], ["a=reasoning_gym:leg_counting"]
    with pytest.raises(ValueError, match=r"also_test=.*: two further data sets are called 'a'"):
        FurtherOptions(forgetting_data=twice[0], also_test=twice[1])
    encoder_decoder = PromptFormat(byte_tokenizer(), is_encoder_decoder=True)
    with pytest.raises(ValueError, match="an encoder-decoder has no loss on a text by itself"):
        FurtherOptions(forgetting_data=[f"{tmp_path}/short.txt"]).load(
            encoder_decoder, [], Columns(), 50, 0
        )


def test_without_test_questions_there_are_no_further_ones(tmp_path):
    (tmp_path / "prose.txt").write_text("0123456789" * 12)
    sets = loaded(forgetting_data=[f"{tmp_path}/prose.txt"], also_test=["reasoning_gym:chain_sum"])
    trainer = SimpleNamespace(args=SimpleNamespace(output_dir=tmp_path))
    assert [found.name for found in BeforeAndAfter(trainer, [], sets)._sets] == ["prose"]
