"""Every composable method there is: a new one is a file of its own, its test, and an entry here."""

from attnpack_fx.passes.method import Method

from attnpack_fx.passes.gear import GEAR
from attnpack_fx.passes.kivi import KIVI

METHODS: tuple[type[Method], ...] = (GEAR, KIVI)
