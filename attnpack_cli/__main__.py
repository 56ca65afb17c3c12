"""`python -m attnpack_cli`: the same as `attnpack`."""

import sys

from attnpack_cli.main import main

sys.exit(main())
