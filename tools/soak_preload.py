"""Imported once by the process from which tools/soak.py forks its attempts."""

from parallel import host

host.enable()

import megatron_m1.checkpoint.starting  # noqa: E402, F401
import megatron_m1.training.beginning  # noqa: E402, F401
import megatron_m1.training.callbacks.defaults  # noqa: E402, F401
import megatron_m1.training.loop  # noqa: E402, F401
import megatron_m1.training.run  # noqa: E402, F401
import megatron_m1.training.watchdog  # noqa: E402, F401
