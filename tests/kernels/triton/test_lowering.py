"""What Inductor makes of the operators on a GPU, read from the code it generates; needs no GPU."""

import re

import pytest

from . import compiled


def lowered(batch: int, tokens: int, stored: str = "plain") -> tuple[str, list[str]]:
    done = compiled.run("-m", "tests.kernels.triton.lowering", str(batch), str(tokens), stored)
    assert done.returncode == 0 and "def call(" in done.stdout, done.stderr[-3000:]
    guards = [line.removeprefix("GUARD ") for line in done.stdout.splitlines() if line.startswith("GUARD ")]
    return done.stdout, guards


@pytest.mark.slow
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
    assert re.match(r"arg1_1, arg2_1, ", ours[0][1])
    assert "arg1_1, arg2_1" in ours[1][1]
    # One guard chooses the way.
    assert sum("393216" in guard for guard in guards) == 1
    assert_no_number_fixed(guards)


def assert_no_number_fixed(guards: list[str]) -> None:
    """Whether there are as many packed keys as values decides whether kernels take them; how many does not."""
    equal = [guard for guard in guards if guard.startswith("Eq(")]
    assert all(re.fullmatch(r"Eq\(s\d+, s\d+\)", guard) for guard in equal) and len(equal) <= 1, guards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("4 bits", ["append_kernel", "absorb_coded_kernel", "tokens_coded_kernel", "combine_coded_kernel"]),
        ("rows", ["append_kernel", "absorb_coded_kernel", "combine_coded_kernel"]),
        ("soft cap and sinks", ["append_kernel", "absorb_kernel", "tokens_kernel", "combine_kernel"]),
    ],
)
def test_codes_and_sinks_go_to_the_kernels_as_they_are(stored, expected):
    code, guards = lowered(1, 9216, stored)
    calls = re.findall(r"(\w+?)_\d+\.run\((.*)", code)
    assert [name for name, _ in calls if name.endswith("_kernel")] == expected
    assert [name for name, _ in calls if not name.endswith("_kernel")] == ["triton_poi_fused"] * 3
    assert "clone" not in code and "extern_kernels" not in code and "torch.ops" not in code
    assert_no_number_fixed(guards)
