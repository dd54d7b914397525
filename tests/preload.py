"""Imported once by the server that test processes are forked from."""

from parallel import host

host.enable()

import megatron_m1.training.run  # noqa: E402, F401
