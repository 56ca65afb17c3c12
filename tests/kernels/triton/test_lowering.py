"""What Inductor makes of the operators on a GPU, read from the code it generates; needs no GPU."""

import re
from pathlib import Path

import pytest

from . import compiled

SCRIPT = Path(__file__).with_name("lowering.py")


def lowered(batch: int, tokens: int) -> tuple[str, list[str]]:
    done = compiled.run(str(SCRIPT), str(batch), str(tokens))
    assert done.returncode == 0 and "def call(" in done.stdout, done.stderr[-3000:]
    guards = [line.removeprefix("GUARD ") for line in done.stdout.splitlines() if line.startswith("GUARD ")]
    return done.stdout, guards


@pytest.mark.parametrize(
    ("batch", "tokens", "expected"),
    [
        (1, 576, ["append_kernel", "fused_kernel"]),
        (1, 9216, ["append_kernel", "absorb_kernel", "tokens_kernel", "combine_kernel"]),
    ],
)
def test_kernels_are_launched_from_the_generated_code(batch, tokens, expected):
    code, guards = lowered(batch, tokens)
    calls = re.findall(r"(\w+?)_\d+\.run\((.*)", code)
    ours = [(name, arguments) for name, arguments in calls if name.endswith("_kernel")]
    assert [name for name, _ in ours] == expected
    # Only the query and the new value are computed; no tail, mask or factor is copied for a kernel.
    assert [name for name, _ in calls if not name.endswith("_kernel")] == ["triton_poi_fused"] * 3
    assert "clone" not in code and "extern_kernels" not in code and "torch.ops" not in code
    # The tail's rows are written where they lie, and read from there.
    assert re.match(r"arg5_1, arg6_1, ", ours[0][1])
    assert "arg5_1, arg6_1" in ours[1][1]
    # One guard chooses the way; none fixes a number of tokens.
    assert not [guard for guard in guards if guard.startswith("Eq(")], guards
    assert sum("393216" in guard for guard in guards) == 1
