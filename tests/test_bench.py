"""The benchmarks run, and their measurements are right."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distopt
from benchmarks.__main__ import main
from benchmarks.team import Team, TeamError
from benchmarks.train import SIDES, state_bytes
from distopt.engine.train_step import update
from distopt.models.language_model import LanguageModel
from tests.harness.cells import some
from tests.harness.distributed import RankError, run
from tests.harness.engines import CONFIGS, ENGINES, VOCABULARY, batch, made
from tests.harness.jobs import ENVIRONMENT, ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=240
    )


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.matrix
def test_sam_counts_bytes_and_copies() -> None:
    """Under DDP: 4 bytes of gradient for each parameter and pass that is exchanged; a copy of the weights is 4 more."""
    only = ["SAM", "SAM, scope=local", "LookSAM, k=5", "MomentumSAM"]
    small = ["--layers", "1", "--width", "32", "--batch-size", "2", "--sequence-length", "8", "--rounds", "1"]
    done = bench("sam", *small, "--only", *only)
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    base = float(rows["AdamW"][3])
    passes = {"SAM": 2.0, "SAM, scope=local": 1.0, "LookSAM, k=5": 1.2, "MomentumSAM": 1.0}
    for name, expected in passes.items():
        assert float(rows[name][3]) / base == pytest.approx(expected, abs=0.05), name
    copies = {"AdamW": 0.0, "SAM": 4.0, "SAM, scope=local": 4.0, "LookSAM, k=5": 12.0, "MomentumSAM": 4.0}
    for name, expected in copies.items():  # in addition, one scalar per parameter
        assert float(rows[name][4]) == pytest.approx(expected, abs=0.02), name


@pytest.mark.matrix
def test_proof_prints_its_cost() -> None:
    small = ["--layers", "1", "--width", "256", "--batch-size", "1", "--sequence-length", "64", "--rounds", "3"]
    done = bench("proof", *small)
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    weights, gradients, state = (float(cells[0]) for name, cells in rows.items() if name.startswith("proof of"))
    assert 0.0 < weights < gradients < state
    assert float(rows["proof of weights and gradients"][3]) < 1.0  # percent


@pytest.mark.matrix
def test_wire_counts_the_bytes_of_the_formula() -> None:
    """Norms and padding come on top: little, and less the larger the model."""
    small = ["--layers", "4", "--width", "128", "--batch-size", "2", "--sequence-length", "16", "--rounds", "1"]
    done = bench("wire", *small, "--only", "ddp", "zero1, full gradients", "zero1")
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    for name, passes in {"ddp": 2, "zero1, full gradients": 3, "zero1": 2}.items():
        formula, counted, sent = map(float, rows[name][3:6])
        assert formula / float(rows["ddp"][3]) == pytest.approx(passes / 2, rel=1e-2)
        assert counted == pytest.approx(formula, rel=0.05)
        assert sent == pytest.approx(counted, rel=0.05)


@pytest.mark.matrix
def test_wire_shows_muon_beside_torchs() -> None:
    """Two collectives more than AdamW, the bytes that the plan says; torch's gathers shards operation by operation."""
    small = ["--layers", "2", "--width", "64", "--batch-size", "2", "--sequence-length", "16", "--rounds", "1"]
    done = bench("wire", *small, "--only", "ddp", "ddp, Muon", "fsdp2", "fsdp2, Muon", "fsdp2, torch Muon")
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    matrices = 2 * 12 * 64 * 64
    for engine, more, collectives in (("ddp", 2 * matrices / 2, 1), ("fsdp2", 2 * 2 * matrices / 4, 2)):
        plain, muon = rows[engine], rows[f"{engine}, Muon"]
        assert int(muon[2]) - int(plain[2]) == collectives
        for column in (3, 4, 5):
            assert float(muon[column]) - float(plain[column]) == pytest.approx(more / 1e6, abs=0.02)
    assert int(rows["fsdp2, torch Muon"][2]) > 10 * int(rows["fsdp2, Muon"][2])


@pytest.mark.matrix
def test_step_shows_muon_beside_torchs() -> None:
    done = bench("step", "--shapes", "gpt_d256", "1000_small", "--rounds", "1", "--only", "Muon")
    assert done.returncode == 0, done.stderr
    assert {"torch AdamW fused", "torch Muon, AdamW fused", "distopt Muon"} <= cells(done.stdout).keys()


@pytest.mark.matrix
def test_sharpness_writes_every_run(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    file = tmp_path / "runs.json"
    counts = ["--seeds", "2", "--tuning-seeds", "1", "--steps", "4", "--json", str(file)]
    done = bench("sharpness", "--tasks", "digits", "--only", "AdamW", "SAM", *counts)
    assert done.returncode == 0, done.stderr
    records = json.loads(file.read_text())
    assert [(r["method"], r["steps"], r["seed"]) for r in records] == [
        (method, steps, seed) for method, steps in (("AdamW", 4), ("SAM", 4), ("AdamW", 8)) for seed in range(2)
    ]


@pytest.mark.matrix
def test_sharpness_at_equal_time_computes_more_steps(tmp_path: Path) -> None:
    """AdamW computes one pass where SAM computes two, in addition to the same step."""
    pytest.importorskip("sklearn")
    file = tmp_path / "runs.json"
    counts = ["--seeds", "1", "--tuning-seeds", "1", "--steps", "40", "--json", str(file), "--equal-time"]
    done = bench("sharpness", "--tasks", "digits", "--only", "AdamW", "SAM", *counts)
    assert done.returncode == 0, done.stderr
    equal, sam, longer = json.loads(file.read_text())
    assert equal["steps"] == sam["steps"] == 40
    assert 1.2 * 40 < longer["steps"] < 3.5 * 40


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("wire --processes 0", "argument --processes: must be an integer >= 1, got 0"),
        ("wire --only", "argument --only: expected at least one argument"),
        ("rounding --steps -1", "argument --steps: must be an integer >= 0, got -1"),
        ("rounding --width 7", "argument --width: must be a positive multiple of 32, got 7"),
        ("rounding --layers 0", "argument --layers: must be an integer >= 1, got 0"),
        ("growth --rounds 0", "argument --rounds: must be an integer >= 1, got 0"),
        ("growth --processes 1 0", "argument --processes: must be an integer >= 1, got 0"),
        ("growth --timeout nan", "argument --timeout: must be a number > 0, got nan"),
        ("loop --steps 0", "argument --steps: must be an integer >= 1, got 0"),
        ("loop --rounds two", "argument --rounds: must be an integer >= 1, got two"),
        ("loop --processes 2 --batch-size 3", "--batch-size 3 is not a multiple of --processes 2"),
        ("sharpness --seeds 0", "argument --seeds: must be an integer >= 1, got 0"),
        ("sam_phase --rho nan", "argument --rho: must be a number > 0, got nan"),
    ],
)
def test_bad_options_are_one_line(
    words: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A benchmark of no process printed no table and ended well; others ended in tracebacks."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code not in (0, None)
    assert expected in (capsys.readouterr().err or str(ended.value))


SMALL = ["--layers", "2", "--width", "64", "--batch-size", "4", "--sequence-length", "16", "--rounds", "1"]


@pytest.mark.matrix
def test_training_of_every_side_is_the_same_training(tmp_path: Path) -> None:
    """Every side trains AdamW to the same loss, with the state of ZeRO's formula."""
    file = tmp_path / "train.json"
    only = ["distopt AdamW", "ZeroRedundancy", "FSDP2", "+ torch"]  # DeepSpeed's own Adam builds an op
    done = bench("train", *SMALL, "--only", *only, "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["failed"] == {}
    assert set(report["sides"]) == {name for name in SIDES if "its own" not in name and "LAMB" not in name}
    losses = {name: side["loss"] for name, side in report["sides"].items()}
    assert list(losses.values()) == pytest.approx([losses["FSDP2 + torch AdamW fused"]] * len(losses), rel=1e-4)
    assert all(side["state"] == pytest.approx(report["formula"], rel=0.01) for side in report["sides"].values())
    assert all(side["peak"] > side["state"] and len(side["seconds"]) == 1 for side in report["sides"].values())


def test_a_side_that_fails_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.json"
    late = ["--stages", "1", "--only", "AdamW, zero1", "--timeout", "0.001", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["bench", "train", *SMALL, *late])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "distopt AdamW, zero1 has no row: start did not end within 0.001 s" in capsys.readouterr().out
    assert json.loads(file.read_text())["failed"].keys() == {"distopt AdamW, zero1"}


@pytest.mark.matrix
def test_more_ranks_and_tensors_need_no_more_collectives(tmp_path: Path) -> None:
    file = tmp_path / "growth.json"
    sizes = ["--millions", "0.05", "0.1", "--fixed-millions", "0.1", "--tensors", "10", "100", "--fixed-tensors", "10"]
    done = bench("growth", *sizes, "--rounds", "1", "--json", str(file), "--plots", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["failed"] == []
    assert len(report["points"]) == 12
    for point in report["points"]:  # one to clip by, one for LAMB's norms
        expected = [1, 1, 2] if point["ranks"] > 1 else [0, 0, 0]
        assert list(point["collectives"].values()) == expected, point
    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"growth_parameters.png", "growth_tensors.png", "growth_ranks.png"}


class Member:
    """An object of a team that adds, dies or hangs."""

    def __init__(self, device: torch.device, fails: bool) -> None:
        if fails and dist.get_rank() == 1:
            raise ValueError("no such thing\nand more")

    def add(self, number: int) -> float:
        total = torch.tensor(float(number + dist.get_rank()))
        dist.all_reduce(total)
        return total.item()

    def die(self) -> None:
        if dist.get_rank() == 0:
            os._exit(7)
        dist.barrier()

    def hang(self) -> None:
        time.sleep(60.0 if dist.get_rank() == 0 else 0.0)


@pytest.mark.parametrize(
    ("call", "seconds", "reason"),
    [
        ("", 60.0, "rank 1: ValueError: no such thing"),
        ("die", 60.0, "rank 0: the process ended with exit code 7"),
        ("hang", 5.0, "hang did not end within 5 s"),
    ],
)
def test_a_rank_that_fails_ends_its_team_and_no_other(call: str, seconds: float, reason: str) -> None:
    other = Team(2, Member, False, seconds=60.0)
    with pytest.raises(TeamError) as error:
        team = Team(2, Member, not call, seconds=60.0)
        team.seconds = seconds
        team.call(call)
    assert str(error.value).startswith(reason)
    assert other.call("add", 2) == [5.0, 5.0]
    other.stop()


def fail(ranks: list[int]) -> int:
    """Raise on these ranks; returns the process id on the others."""
    if dist.get_rank() in ranks:
        raise LookupError("no such thing\nand more")
    return os.getpid()


def test_an_error_of_a_rank_has_its_traceback() -> None:
    """The pool survives if all ranks raise; if only some do, they are out of step and are replaced."""
    before = run(2, fail, [])
    with pytest.raises(RankError, match=r"(?s)rank [01] raised\n.*, in fail\n.*LookupError: no such thing") as error:
        run(2, fail, [0, 1])
    assert (error.value.kind, error.value.message) == ("LookupError", "no such thing\nand more")
    assert run(2, fail, []) == before
    with pytest.raises(RankError) as error:
        run(2, fail, [1])
    assert error.value.reason == "rank 1: LookupError: no such thing"
    assert not {*run(2, fail, [])} & {*before}


SHARDED = [kind for kind in ENGINES if kind not in ("ddp", "hsdp")]  # hsdp has the state of half as many ranks


def bytes_of_state(kind: str) -> tuple[int, int]:
    """The bytes of the local state after a step of AdamW, and the number of parameters of the model."""
    engine = ENGINES[kind]()
    language_model = LanguageModel("gpt2", CONFIGS["gpt2"] | {"n_embd": 128})
    model = made(language_model, engine)
    optimizer = distopt.AdamW(distopt.param_groups(engine.unwrap(model), weight_decay=0.1), lr=0.01)
    model = engine.attach(model, optimizer, 1, 1.0)
    update(engine, model, optimizer, [batch(0)], 1.0)
    full = language_model.empty(language_model.describe(VOCABULARY))
    return state_bytes(optimizer), sum(p.numel() for p in full.parameters())


@pytest.mark.parametrize(
    ("kind", "world"),
    some([("zero1", 4), ("fsdp2", 2), ("deepspeed_zero2", 2)], itertools.product(SHARDED, [2, 4])),
)
def test_the_state_is_that_of_zeros_formula(kind: str, world: int) -> None:
    """Two float32 values per parameter, divided by the ranks, within 1 %; none has 2 % more: rows and ranges differ."""
    states, parameters = zip(*run(world, bytes_of_state, kind))
    assert sum(states) == pytest.approx(8 * parameters[0], rel=0.01)
    assert max(states) <= 1.02 * 8 * parameters[0] / world


@pytest.mark.matrix
def test_the_time_on_the_host_is_measured() -> None:
    done = bench("host", "--ranks", "64", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    rows = cells(done.stdout)
    assert all(float(rows[name][0]) > 0.0 for name in ("distopt LAMB", "distopt clip + AdamW", "torch AdamW fused"))


def test_the_step_of_every_optimizer_is_measured(tmp_path: Path) -> None:
    """A peer that is not installed is listed as missing; the benchmark needs torch alone."""
    file = tmp_path / "step.json"
    done = bench("step", "--shapes", "1000_small", "--rounds", "1", "--only", "distopt", "LAMB", "--json", str(file))
    assert done.returncode == 0, done.stderr
    families = json.loads(file.read_text())["1000_small"]
    ours = {name for rows in families.values() for name in rows["steps"] if name.startswith("distopt")}
    assert len(ours) == 24
    assert all(row["seconds"] > 0.0 for rows in families.values() for row in rows["steps"].values())
    assert "DeepSpeed FusedLamb does not take part" in done.stdout


@pytest.mark.parametrize(
    "option", [["--rounds", "0"], ["--only", "nobody"], ["--json", "no/such/folder/x.json"]], ids=str
)
def test_the_step_refuses_in_one_line(
    option: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "step", *option])
    with pytest.raises(SystemExit) as ended:
        main()
    line = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err  # as Python prints it
    assert ended.value.code not in (0, None)
    assert len(line.splitlines()) == 1 and option[0] in line
