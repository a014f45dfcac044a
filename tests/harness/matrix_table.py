"""The equivalence matrix as the tables of docs/equivalence.md."""

from __future__ import annotations

from pathlib import Path

from tests.harness.bits import KINDS
from tests.harness.engines import ENGINES
from tests.harness.matrix import NAMES, PARTS, TOLERANCE, Job

START, END = "<!-- matrix -->", "<!-- /matrix -->"
ABOUT = """\
The equivalence matrix: every optimizer on every engine. In a cell is the largest relative difference (2-norm) of a
tensor to the unsharded run, one process with a plain model, after 20 steps in float32: over 1, 2, 3 and 4 processes
(`hsdp`: 2 and 4) and 1 and 2 micro-batches a step, with two param groups, clipping, tied weights, a frozen parameter,
one that most steps do not use, shapes that do not divide, and layers of fewer rows than there are processes. `make
matrix` (CPU, gloo) computes it and writes it here:
"""
OTHERS = """\
In float64 and in bf16, the largest of all optimizers. For bf16 the unsharded run computes the gradient of each
micro-batch in bfloat16, as the engine does, so that what is left to differ is the update:
"""
TESTS = """\
The rows are those of `tests/harness/optimizers.py`. The cells are the tests
`tests/test_matrix.py::test_the_update_is_the_unsharded_one[<engine>-<processes>-<dtype>-<micro-batches>-<part>]`, where
`<part>` is `some` for {some} and `others_0` to `others_2` for the rest.
A cell is wrong, and its test fails, above {bounds}, in bf16 if it is so with
other batches too: what one process rounds up, another may round down in few of the steps. Under DeepSpeed a parameter
that a step does not use has a gradient of zeros, where the other engines have none, so that its state decays, and
bfloat16 gradients are summed in bfloat16: the unsharded run beside it does the same. The order of a sum of more than
two is DeepSpeed's own, so that bf16 is compared where there are two. Its partitions are float32: it has no float64.

What is left to differ comes with the gradients, whose sums over ranks have another order. Given equal gradients the
full weights and the state are the same bits as the unsharded ones, with clipping, of every optimizer above and of SAM's
family but FunctionalSAM (`tests/test_bits.py`):

{bits}"""


def write(path: Path, answers: dict[Job, dict[str, float | str]]) -> None:
    """Replaces what is between the markers of a file."""
    before, rest = path.read_text().split(START)
    _, after = rest.split(END)
    path.write_text(f"{before}{START}\n{render(answers)}{END}{after}")


def render(answers: dict[Job, dict[str, float | str]]) -> str:
    reasons: list[str] = []

    def cell(engine: str, dtype: str, names: list[str]) -> str:
        found = [
            answer
            for job, by_name in answers.items()
            for name, answer in by_name.items()
            if (job.engine, job.dtype) == (engine, dtype) and name in names
        ]
        right = [answer for answer in found if not isinstance(answer, str)]
        notes = dict.fromkeys(answer for answer in found if isinstance(answer, str))
        reasons.extend(reason for reason in notes if reason not in reasons)
        numbers = ", ".join(str(reasons.index(reason) + 1) for reason in notes)
        largest = f"{max(right):.1e}".replace("e-0", "e-") if any(right) else "0" if right else ""
        return " ".join(filter(None, [largest, numbers and f"refused [{numbers}]"]))

    exact = table({name: [cell(engine, "fp32", [name]) for engine in ENGINES] for name in NAMES})
    others = table({dtype: [cell(engine, dtype, NAMES) for engine in ENGINES] for dtype in ("float64", "bf16")})
    footnotes = "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, 1))
    some = ", ".join(f"`{name}`" for name in PARTS["some"])
    bounds = ", ".join(f"{bound:.0e} ({dtype})".replace("e-0", "e-") for dtype, bound in TOLERANCE.items())
    blocks = [ABOUT, exact, footnotes, OTHERS, others, TESTS.format(some=some, bounds=bounds, bits=_bits())]
    return "\n".join(block for block in blocks if block)


def _bits() -> str:
    """The worlds at which tests hold the same bits, by engine."""
    worlds = {kind: ", ".join(map(str, worlds)) for kind, worlds in KINDS.items()}
    heads, line = [["", *(f"`{kind}`" for kind in worlds)], ["---"] * (1 + len(worlds))], ["same bits at processes"]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*heads, [*line, *worlds.values()]])


def table(rows: dict[str, list[str]]) -> str:
    lines = [["", *(f"`{engine}`" for engine in ENGINES)], ["---"] * (1 + len(ENGINES))]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
