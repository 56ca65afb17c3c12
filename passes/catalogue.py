"""Every composable method there is: a new one is a file of its own, its test, and an entry here."""

from attnpack_fx.passes.method import Method

METHODS: tuple[type[Method], ...] = ()
