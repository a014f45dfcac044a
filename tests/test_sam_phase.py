"""The benchmark of a SAM phase: its text, its rounding to four bits, its search, and its runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.phase_methods import METHODS, SIZES, Chosen
from benchmarks.phase_runs import Runs, quantize
from benchmarks.prose import paragraphs, write_readmes
from benchmarks.sam_phase import best
from distopt.models.language_model import LanguageModel, blocks
from tests.harness import jobs
from tests.harness.engines import CONFIGS


def test_four_bits_are_the_nearest_of_fifteen_values_in_groups_of_a_row() -> None:
    """The oracle goes over groups and weights one by one; the output layer, tied to the embedding, stays as it is."""
    made = LanguageModel("llama", {**CONFIGS["llama"], "hidden_size": 64, "intermediate_size": 96})
    model = made.empty(made.describe(256))
    for unit in (*blocks(model), model):
        made.fill(model, unit, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    quantize(model)
    rounded = 0
    for name, p in model.named_parameters():
        if "proj" not in name:
            assert torch.equal(p, before[name]), name
            continue
        rounded += 1
        for row, exact in zip(p.detach()[:3].double(), before[name][:3].double()):
            for start in range(0, len(row), 32):
                group, values = row[start : start + 32].tolist(), exact[start : start + 32].tolist()
                scale = max(map(abs, values)) / 7.0
                nearest = [min(range(-7, 8), key=lambda k, v=v: abs(v - k * scale)) * scale for v in values]
                assert group == pytest.approx(nearest, rel=1e-6, abs=1e-9), name
    assert rounded == 7 * made.describe(256).num_hidden_layers


def test_the_second_domain_is_prose_and_has_no_paragraph_twice(tmp_path: Path) -> None:
    prose = "This package reads files of several kinds, and writes them again in the order that they were read in."
    code = "for key, value in sorted(TABLE.items()):\n    print(f'{key}: {value:>10.3f}', file=sys.stderr, flush=True)"
    assert paragraphs(f"# Title\n\n{prose}\n\n{code}\n\nShort.\n") == [prose]
    file = tmp_path / "readmes.jsonl"
    write_readmes(file)
    found = [p for line in file.read_text().splitlines() for p in json.loads(line)["text"].split("\n\n")]
    assert len(found) > 100 and len(set(found)) == len(found)


def test_the_search_goes_on_while_the_best_is_at_an_end() -> None:
    tried: list[float] = []

    def score(value: float) -> float:
        tried.append(value)
        return abs(value - 0.9)

    assert best(score, start=0.1, factor=3.0) == 0.9
    assert tried == [0.033, 0.1, 0.3, 0.9]
    tried.clear()
    assert best(score, start=0.9, factor=3.0) == 0.9
    assert len(tried) == 3
    assert best(lambda value: -value, start=1.0, factor=2.0, most=5) == 8.0


def test_results_of_other_options_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Runs(file, {"steps": 700, "sequences": 256})
    assert Runs(file, {"steps": 700, "sequences": 256}).records == {}
    with pytest.raises(ValueError, match=r"results.json has runs with steps 700, now it is 400: give another --output"):
        Runs(file, {"steps": 400, "sequences": 256})


def test_layer_wise_sam_perturbs_the_last_half_of_the_blocks() -> None:
    chosen = Chosen(tuning_lr=1e-3, lr=2e-3, rho=0.1, preconditioned_rho=0.3)
    assert METHODS["SAM-upper"].words(chosen, SIZES["0.4M"]) == [
        "sam=on",
        r"param_groups.overrides={embed|layers\.0\.|layers\.1\.: {sam_rho: 0}}",
        "sam.rho=0.1",
    ]


@pytest.mark.matrix
def test_every_phase_is_trained_once_and_tabulated(tmp_path: Path) -> None:
    sizes = "--steps 4 --phase-steps 2 --tuning-steps 2 --batch-size 2 --sequence-length 16 --sequences 4 --seeds 2"
    rates = "--lr 1e-3 --tuning-lr 1e-3 --rho 0.1 --only AdamW SAM-upper --output results"
    command = ["-m", "benchmarks", "sam_phase", *sizes.split(), *rates.split()]
    done = jobs.python(*command, cwd=tmp_path, seconds=240)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["AdamW", "SAM, last half of the blocks"]
    file = tmp_path / "results" / "results.json"
    found = json.loads(file.read_text())["runs"]
    assert len(found) == 2 * (1 + 2 * 2)
    for name, record in found.items():
        assert record["seconds"] > 0.0 and 0.0 < record["loss"] < 8.0, name
    assert (tmp_path / "results" / "table.md").read_text() == done.out
    trained = file.with_name("runs") / "seed1001-AdamW-lr0.001" / "metrics.jsonl"
    before = trained.stat().st_mtime_ns
    again = jobs.python(*command, cwd=tmp_path, seconds=240)
    assert again.out == done.out and trained.stat().st_mtime_ns == before
    refused = jobs.python(*command, "--steps", "5", cwd=tmp_path, seconds=240)
    assert refused.code == 1
    assert "results.json has runs with steps 4, now it is 5: give another --output" in refused.err
