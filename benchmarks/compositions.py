"""Every composition of methods that is allowed, on tiny models: does it run, is it right, does it take less?

    python -m benchmarks.compositions                                  # all pairs on three models, 200 triples in turn
    python -m benchmarks.compositions --models llama --triples 0 --out compositions.json

For each, 12 tokens are generated twice op by op. Logits must be finite and both runs equal bit by bit. The bytes of
numbers of keys and values must not exceed those of the cheapest member alone, but for what `tests/compositions.py`
names: a basis, tokens that merged layers keep, dense tokens that wait until there are enough to be coded; scales and
indices are counted apart. With every member at a setting where it changes nothing, logits must be the dense ones to
1e-4 of their scale. Settings are those of `MEMBERS` there. Compositions that a policy refuses stand beside, and why.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import measure
from tests.compositions import MEMBERS, MODELS, Composition, Subject, failures, legal, names, policy, refusal, triples


def run(subject: Subject, members: Composition) -> dict[str, Any]:
    """One composition on one model; bytes by kind, None where it raises."""
    found = failures(subject, members)
    raised = any(each.startswith("raises") for each in found)
    return {
        "model": subject.name,
        "members": [member.name for member in members],
        "failures": found,
        "bytes": None if raised else subject.result(policy(members)).held,
    }


def grid(models: Sequence[str], number: int) -> Iterator[tuple[str, Composition]]:
    """Singles and pairs on every model, and triples on models in turn; what is of one model follows one another."""
    alone = ((model, members) for model in models for count in (1, 2) for members in legal(count))
    found = [*alone, *zip(itertools.cycle(models), triples(number), strict=False)]
    yield from sorted(found, key=lambda each: models.index(each[0]))


def refused() -> dict[str, str]:
    """Pairs that a policy does not allow, and the reason."""
    pairs = ((pair, refusal(pair)) for pair in itertools.combinations(MEMBERS, 2))
    return {names(pair): reason for pair, reason in pairs if reason is not None}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--triples", type=int, default=200, metavar="N", help="how many of the legal triples (200)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every result, and on what it was made")
    given = parser.parse_args(arguments)
    if not 0 <= given.triples <= len(legal(3)):
        parser.error(f"--triples: got {given.triples}, expected 0 to {len(legal(3))}, as many as are legal")
    result: dict[str, Any] = {**measure.environment(), "refused": refused(), "compositions": []}
    warnings.filterwarnings("ignore")  # a model without vision tokens says so at every composition
    for model, group in itertools.groupby(grid(given.models, given.triples), key=lambda each: each[0]):
        subject = Subject(model)
        for _, members in group:
            found = run(subject, members)
            result["compositions"].append(found)
            print(f"{model}: {names(members)}: {'; '.join(found['failures']) or 'right'}", flush=True)
            if given.out:
                given.out.write_text(json.dumps(result, indent=1) + "\n")
    wrong = sum(bool(each["failures"]) for each in result["compositions"])
    print(f"{len(result['compositions'])} compositions, {wrong} of them wrong; {len(result['refused'])} pairs refused")


if __name__ == "__main__":
    main()
