"""The command line: which parts run, for how long, and where their results go."""

import argparse
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import render
from benchmarks.gpu.apart import context_lost, described
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.part import NotYetError, Part, Run, WrongResultError
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.store import Store

#: Memories whose largest batch is looked for, besides all of the device; for a dry run one that a few samples fill.
_MEMORY_GB, _DRY_MEMORY_GB = (24.0, 80.0), (0.0012,)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu", description="Measure the packed cache on a GPU: see docs/gpu.md."
    )
    parser.add_argument("--part", choices=("all", *(part.name for part in PARTS)), default="all")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="only cases with TEXT in their name"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for each part, cases begun are finished (8)")
    parser.add_argument("--seed", type=int, help="of checked inputs, as a failed check prints it (new ones)")
    parser.add_argument("--install", action="store_true", help="install what is missing first (`bare.py`)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where results go (benchmarks/results/<device>)")
    parser.add_argument("--memory-gb", type=float, nargs="+", help="for the largest batch (24 80, and all there is)")
    parser.add_argument(
        "--fresh", action="store_true", help="measure again what is there already, with --only just that"
    )
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU; needs --out, and times mean nothing")
    parser.add_argument(
        "--render", action="store_true", help="write docs/gpu.md from the results there are, measure nothing"
    )
    given = parser.parse_args(arguments)
    if given.dry and (given.out is None or given.out.resolve().is_relative_to(render.RESULTS)):
        parser.error(f"--dry: expected --out with a folder that is not in {render.RESULTS}, which holds measurements")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0, or 1 if a result was wrong, 2 if there is no device."""
    given = parse(arguments)
    if given.render:
        render.PAGE.write_text(render.page(render.RESULTS))
        print(f"wrote {render.PAGE}")
        return 0
    try:
        machine = Machine(given.dry)
    except RuntimeError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    folder = given.out or render.RESULTS / re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    memory = given.memory_gb or (_DRY_MEMORY_GB if given.dry else (*_MEMORY_GB, int(machine.total_bytes / 1e9)))
    wrong: dict[str, str] = {}
    for part in PARTS:
        if given.part in ("all", part.name):
            found = run_part(part, machine, folder, given, tuple(memory))
            wrong |= {f"{part.name}, {name}": reason for name, reason in found.items()}
            if context_lost():
                wrong[part.name] = "the CUDA context of this process is lost, and nothing more was run; run it again"
                break
    if wrong:
        print(
            f"\n{len(wrong)} failed:\n" + "\n".join(f"  {name}: {reason}" for name, reason in wrong.items()), flush=True
        )
    return 1 if wrong else 0


def run_part(
    part: Part, machine: Machine, folder: Path, given: argparse.Namespace, memory: tuple[float, ...]
) -> dict[str, str]:
    """Measure the cases that are not there yet, as long as there is time; which are wrong of all that are there, and
    why.
    """
    began = time.monotonic()
    header = {"part": part.name, "dry": machine.dry, **machine.record()}
    # With `--only`, what else has been measured stays.
    results = Store(folder / f"{part.name}.json", header, given.fresh and not given.only)
    if results.replaced:
        print(f"{part.name}: results with another {', '.join(results.replaced)} are replaced")
    if "ceilings" not in results.content:
        results.content["ceilings"] = ceilings(machine)
    run = Run(machine, results.content["ceilings"], results.cases, memory, given.seed)
    wanted = {name: call for name, call in part.cases(run).items() if all(text in name for text in given.only)}
    todo = [name for name in wanted if given.fresh or name not in results.cases]
    print(f"\n{part.title}: {len(todo)} of {len(wanted)} cases to measure on {machine.name}", flush=True)
    left: list[str] = []
    longest = 0.0
    for name in todo:
        started = time.monotonic()
        # Not begun where it would, as long as the longest before, go on beyond the end.
        if started - began + longest > given.minutes * 60:
            left.append(name)
            continue
        try:
            result = wanted[name]()
        except NotYetError as reason:
            print(f"  {name}: not yet, {reason}", flush=True)
            left.append(name)
            continue
        except WrongResultError as error:
            result = {"wrong": str(error)}
        # A kernel that does not compile, say: what else there is to measure is of interest all the same.
        except Exception as error:
            traceback.print_exc()
            result = {"wrong": described(error)}
        results.record(name, result)
        longest = max(longest, time.monotonic() - started)
        state = next((f"{key}: {result[key]}" for key in ("wrong", "skipped") if key in result), None)
        print(f"  {name}: {state or result.get('says', 'measured')} ({time.monotonic() - started:.1f} s)", flush=True)
        if context_lost():
            break
    part.close()
    shown = {name: case for name, case in results.cases.items() if name in wanted}
    print("\n".join([*part.table(shown), *part.verdict(shown)]))
    if left:
        print(f"{part.name}: {len(left)} cases are left, run the command again: {'; '.join(left)}", flush=True)
    return {name: case["wrong"] for name, case in shown.items() if "wrong" in case}
