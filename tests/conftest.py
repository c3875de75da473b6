"""What holds for every test, wherever pytest was started from."""

from __future__ import annotations

import signal

# A shell that starts a command in the background has it ignore SIGINT, and so would everything that tests start: those
# that interrupt something would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
