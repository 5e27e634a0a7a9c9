"""Fill measured numbers and tables into README.md and docs/, from model_cards/results and the tests: nothing by hand.

    python examples/write_readme.py            # or --check, which fails when a page is out of date

What a page has between `<!-- measured: NAME -->` and `<!-- end -->` is written from `BLOCKS[NAME]`, and after
`<!-- options: CLASS -->` stands what can be set in that class.
"""

import argparse
import ast
import dataclasses
import inspect
import itertools
import json
import re
import runpy
import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers_fastdiff

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "model_cards" / "results"
BLOCK = re.compile(r"(<!-- (measured|options): ([\w-]+) -->)(\n?).*?(<!-- end -->)", re.DOTALL)


def rows(name: str, **wanted) -> list[dict]:
    """Rows of a result whose columns have the wanted values."""
    found = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    return [row for row in found if all(row[column] == value for column, value in wanted.items())]


def fpdm() -> str:
    (parameters,) = rows("fpdm/parameters", size="XL/2")
    (memory,) = rows("fpdm/memory", size="XL/2", model="fixed point, average draw")
    fewer = parameters["fewer than DiT"]
    return f"XL/2: {fewer} fewer parameters than DiT, {memory['less']} less saved activations at the average draw"


def amed(evaluations: int = 5) -> str:
    found = rows("solvers-digits-dit-g1", evaluations=evaluations)
    best = lambda *families: min(row["error"] for row in found if row["family"] in families)  # noqa: E731
    return (
        f"digits, {evaluations} evaluations: error {best('learned'):.3f}; {best('searched'):.3f} for the best other solver "
        f"with searched range and grid, {best('stock', 'ours'):.3f} as it comes"
    )


def ipndm(evaluations: int = 10) -> str:
    found = rows("solvers-digits-dit-g1", evaluations=evaluations)
    ours, stock = (min((r for r in found if r["family"] == f), key=lambda row: row["error"]) for f in ("ours", "stock"))
    return (
        f"digits, {evaluations} evaluations: {ours['solver']} {ours['error']:.3f}, best of diffusers ({stock['solver']}) "
        f"{stock['error']:.3f}"
    )


def faster_diffusion() -> str:
    verdict = json.loads((RESULTS / "faster-diffusion-digits-dit-deep.json").read_text())["quality ddim:50"]["verdict"]
    steps = next(row for row in verdict if row["alternative"].startswith("fewer steps: 25"))
    return (
        f"digits, DDIM 50: as fast as {steps['alternative'].removeprefix('fewer steps: ')} ({steps['speed-up']:.1f}x), "
        f"deviation {steps['its deviation']:.1%} instead of {steps['deviation']:.1%}"
    )


def fdm() -> str:
    last = max(row["images"] for row in rows("fdm-benchmark"))
    plain, momentum = (rows("fdm-benchmark", formulation=f, images=last, evaluations=17)[0] for f in ("EDM", "EDM-FDM"))
    return (
        f"digits, equal training: Frechet distance {plain['frechet_distance']:.1f} without momentum, "
        f"{momentum['frechet_distance']:.1f} with it ([why](model_cards/fdm-benchmark.md))"
    )


def fdm_table(column: str = "evaluations", **fixed) -> str:
    """Frechet distance of every formulation over one column of the benchmark, the others as they are at the end."""
    found = rows("fdm-benchmark", **(fixed or {"images": max(row["images"] for row in rows("fdm-benchmark"))}))
    counts = sorted({row[column] for row in found})
    lines = ["| | " + " | ".join(f"{count:,} {column}" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(row["formulation"] for row in found):
        own = {row[column]: row for row in found if row["formulation"] == name}
        cells = [f"{own[c]['frechet_distance']:.1f} ± {own[c]['frechet_distance +-']:.1f}" for c in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gddim_table() -> str:
    """Error of samplers on the mixture whose network is known."""
    found = rows("gddim/mixture")
    counts = [10, 20, 50]
    lines = ["Rms error of the positions, exact CLD mixture:", ""]
    lines += ["| | " + " | ".join(f"{count} evaluations" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(row["sampler"] for row in found):
        own = {row["evaluations"]: row["error"] for row in found if row["sampler"] == name}
        if all(own.get(count) for count in counts):
            lines.append(f"| {name} | " + " | ".join(str(own[count]) for count in counts) + " |")
    return "\n".join(lines)


def gddim() -> str:
    (best,) = rows("gddim/mixture", sampler="gDDIM order 3", evaluations=20)
    return f"exact CLD mixture, order 3, 20 evaluations: error {best['error']}"


def all_methods() -> str:
    """The median and the best of every kind on every model, against diffusers' best scheduler in at most the same time."""
    kind = runpy.run_path(str(ROOT / "examples" / "benchmark_all.py"))["kind"]
    lines = ["| model | | median | best | which |", "|---|---|---|---|---|"]
    found = [row for row in rows("benchmark-all") if row["by"] == "ours" and row["error / time"] != ""]
    for model, label in dict.fromkeys((row["model"], kind(row)) for row in found):
        own = sorted((row for row in found if (row["model"], kind(row)) == (model, label)), key=lambda row: row["error / time"])
        best, ratios = own[0], [row["error / time"] for row in own]
        which = ", ".join(filter(None, (best["scheduler"], best["besides"], f"{best['steps']} steps")))
        lines.append(f"| {model} | {label} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} | {which} |")
    return "\n".join(lines)


def support() -> str:
    """The matrix that tests/ecosystem/test_support.py proves."""
    sys.path.insert(0, str(ROOT))
    try:
        from tests.ecosystem.pipelines import PIPELINES
        from tests.ecosystem.support import table
    finally:
        sys.path.remove(str(ROOT))
    return table(tuple(PIPELINES))


def options(name: str) -> str:
    """What can be set in a public class, from its docstring or, for a dataclass, from those of its fields."""
    owner = getattr(diffusers_fastdiff, name)
    if dataclasses.is_dataclass(owner):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        pairs = [
            (field.target.id, text.value.value)
            for field, text in itertools.pairwise(tree.body)
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
        ]
    else:
        arguments = inspect.cleandoc(owner.__doc__).partition("Args:\n")[2].partition("\n\n")[0]
        pairs = re.findall(r"^    (\S.*?): (.*(?:\n     .*)*)", arguments, re.MULTILINE)
    lines = [f"* `{'`, `'.join(names.split(', '))}`: {' '.join(text.split())}" for names, text in pairs]
    return "\n".join([f"`{name}`:", "", *lines])


BLOCKS: dict[str, Callable[[], str]] = {
    "fpdm": fpdm,
    "amed": amed,
    "ipndm": ipndm,
    "faster-diffusion": faster_diffusion,
    "fdm": fdm,
    "fdm-evaluations": fdm_table,
    "fdm-images": partial(fdm_table, "images", evaluations=17),
    "gddim": gddim,
    "gddim-long": gddim_table,
    "all-methods": all_methods,
    "support": support,
}


def pages() -> dict[Path, str]:
    """What every page should be."""

    def fill(match: re.Match) -> str:
        begin, kind, name, line, end = match.groups()
        return begin + line + (BLOCKS[name]() if kind == "measured" else options(name)) + line + end

    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "model_cards" / "fdm-benchmark.md"]
    return {path: BLOCK.sub(fill, path.read_text(encoding="utf-8")) for path in paths}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs from the measurements")
    args = parser.parse_args()
    for path, text in pages().items():
        if not args.check:
            path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"error: {path} is out of date; run `python examples/write_readme.py`.")


if __name__ == "__main__":
    main()
