"""Rows shared among workers of Ray Data, for `attnpack batch`: what comes back, in any order, and nothing lost.

Ray Data starts a worker again that was killed, and gives its rows out once more, for ever. So an actor beside the
workers counts how often rows were begun: those that end every worker are tried alone, and then given up.
"""

import logging
import os
import socket
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from attnpack_cli.errors import UserError
from attnpack_fx.ray import NOT_A_ROW, Answers
from attnpack_fx.warning import AttnpackWarning

#: How often rows are tried together, and after that alone.
_TOGETHER = _ALONE = 2
_COLUMNS = ("number", "answer", "error", "warned", "refused", "worker")


@dataclass(frozen=True)
class Told:
    """What came of one row.

    number: the row's. warned: what the worker warned of since it last told. worker: its machine and process.
    """

    number: int
    answer: str
    error: str
    warned: tuple[str, ...]
    worker: str


class Begun:
    """Counts how often something was begun since it last ended."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, name: str) -> int:
        self._begun[name] += 1
        return self._begun[name]

    def end(self, name: str) -> None:
        del self._begun[name]


class Worker:
    """`Answers`, whose warnings and refusals travel with the rows: Ray would print them as tracebacks."""

    def __init__(self, options: Mapping[str, Any], begun: Any) -> None:
        self._begun, self._refused = begun, ""
        try:
            self._answers = Answers(**options)
        except (UserError, ValueError, OSError) as error:
            self._refused = str(error)

    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", AttnpackWarning)
            found = [("", "")] * len(rows["number"])
            if not self._refused:
                try:
                    found = self._found(rows)
                except NOT_A_ROW as error:
                    # Dynamo says it once more, around what was raised.
                    self._refused = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        warned = sorted({str(each.message) for each in caught if issubclass(each.category, AttnpackWarning)})
        told = {"warned": warned, "refused": self._refused, "worker": f"{socket.gethostname()} {os.getpid()}"}
        answers, errors = zip(*found, strict=True)
        return {"number": rows["number"], "answer": list(answers), "error": list(errors)} | {
            name: [value] * len(found) for name, value in told.items()
        }

    def _found(self, rows: Mapping[str, Any]) -> list[tuple[str, str]]:
        numbers = [int(number) for number in rows["number"]]
        together = f"rows {numbers}"
        if self._begin(together) <= _TOGETHER:
            found = self._answered(rows)
        else:
            found = [self._alone(rows, place, number) for place, number in enumerate(numbers)]
        self._end(together)
        return found

    def _alone(self, rows: Mapping[str, Any], place: int, number: int) -> tuple[str, str]:
        name = f"row {number}"
        times = self._begin(name)
        if times > _ALONE:
            return "", f"the worker died {times - 1} times over this row alone; Ray's logs may say why"
        (found,) = self._answered({column: values[place : place + 1] for column, values in rows.items()})
        self._end(name)
        return found

    def _answered(self, rows: Mapping[str, Any]) -> list[tuple[str, str]]:
        answered = self._answers(rows)
        return list(zip(answered["answer"], answered["error"], strict=True))

    def _begin(self, name: str) -> int:
        import ray

        return ray.get(self._begun.begin.remote(name))

    def _end(self, name: str) -> None:
        self._begun.end.remote(name)


def answered(
    rows: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    size: int,
    workers: int | None = None,
    address: str | None = None,
) -> Iterator[list[Told]]:
    """Answer rows on workers of Ray, and yield what comes back, batch by batch.

    Args:
        rows: `images`, paths, and `prompt` of each.
        options: arguments of `Answers`.
        size: how many rows a worker is given at once.
        workers: how many; as many as the cluster has GPUs unless given, or one where it has none.
        address: of a cluster; None starts Ray on this machine, and ends it.

    Raises:
        UserError: where there is no such cluster or it is too small, and what workers refuse.
    """
    # Before Ray is imported, which reads them: it would send statistics, and print what its developers want to know.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    import ray.data

    try:
        _start(workers, address)
        count, cpus, gpus = share(ray.nodes(), workers)
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        order = sorted(range(len(rows)), key=lambda number: _length(rows[number]), reverse=True)
        given = ray.data.from_items(
            [{"number": number, **rows[number]} for number in order], override_num_blocks=-(-len(rows) // size)
        )
        told = given.map_batches(
            Worker,
            fn_constructor_kwargs={"options": dict(options), "begun": ray.remote(num_cpus=0)(Begun).remote()},
            batch_size=None,
            # Rows wait for the next worker that is free, and not for one of their own.
            compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for batch in told.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            yield _told(batch)
    finally:
        ray.shutdown()


def share(nodes: Sequence[Mapping[str, Any]], workers: int | None) -> tuple[int, int, float]:
    """Return how many workers there are, and how many CPUs and GPUs each has, so that all find room.

    Args:
        nodes: as `ray.nodes()` tells of them.
        workers: how many are asked for.

    Raises:
        UserError: for more than there are CPUs.
    """
    alive = [each["Resources"] for each in nodes if each["Alive"]]
    gpus = int(sum(each.get("GPU", 0) for each in alive))
    if gpus:
        alive = [each for each in alive if each.get("GPU")]
    count = workers or gpus or 1
    rooms = [int(each.get("CPU", 0)) for each in alive]
    fitting = [cpus for cpus in range(1, max(rooms, default=0) + 1) if sum(room // cpus for room in rooms) >= count]
    if not fitting:
        raise UserError(f"--workers {count}: got {sum(rooms)} CPUs, expected one for each; ask for fewer workers")
    return count, fitting[-1], (1 / -(-count // gpus) if gpus else 0)


def _start(workers: int | None, address: str | None) -> None:
    import ray

    # Ray counts fewer CPUs than workers where more are asked for than this machine has.
    cpus = workers if address is None and workers is not None and workers > (os.cpu_count() or 1) else None
    local = {"include_dashboard": False, "num_cpus": cpus} if address is None else {}
    try:
        with _silenced():
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    # Ray raises no more than Exception where it does not start in time.
    except Exception as error:
        if address is None:
            raise UserError(f"Ray does not start on this machine: {error}") from error
        raise UserError(
            f"--address {address}: no cluster of Ray answers ({error}); expected the head of one, with the same "
            "versions of Ray and Python. Where it asks for a token, set RAY_AUTH_MODE=token"
        ) from error


@contextmanager
def _silenced() -> Iterator[None]:
    """Drop what is written to standard error, by C++ too: Ray's says how much it will log, at any level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _length(row: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of one shape come together by it, and the longest first: they take the most memory, and time."""
    return len(row["images"]), len(row["prompt"])


def _told(batch: Mapping[str, Any]) -> list[Told]:
    rows = [
        dict(zip(_COLUMNS, values, strict=True)) for values in zip(*(batch[name] for name in _COLUMNS), strict=True)
    ]
    for row in rows:
        if row["refused"]:
            raise UserError(str(row["refused"]))
    return [
        Told(int(row["number"]), row["answer"], row["error"], tuple(row["warned"]), str(row["worker"])) for row in rows
    ]
