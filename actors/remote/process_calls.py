"""The node actor's calls about its process: signs of life, notice of its end, faults, system metrics."""

from __future__ import annotations

import os
import signal
import threading

import ray

from starling.actors.remote.remote_calls import remote_call
from starling.actors.remote.system_metrics import Usage


class ProcessCalls:
    """Takes SIGTERM as notice of the process's end, and answers for the process.

    Made in the main thread, which alone may set handlers of signals.
    """

    def __init__(self) -> None:
        self.drain_s = 0.0
        """Seconds between SIGTERM and the end of the process; 0 while there is nothing to hand over."""
        self._notice = threading.Event()
        self._noticed = False
        self._usage = Usage()
        signal.signal(signal.SIGTERM, self._on_sigterm)  # Ray's own handler would end the process at once

    def _on_sigterm(self, *_: object) -> None:
        """Notice of the end: the controller is told, and ends this process when it has handed over what it holds."""
        if self._noticed or not self.drain_s:
            os._exit(128 + signal.SIGTERM)  # asked twice, or nothing to hand over
        self._noticed = True
        self._notice.set()
        # A controller that is gone, or too slow, must not keep it.
        timer = threading.Timer(self.drain_s, os._exit, [128 + signal.SIGTERM])
        timer.daemon = True
        timer.start()

    @remote_call("watch")
    def watch(self) -> str:
        """Return when the process has got SIGTERM. Else never: the call's failure is the notice of death."""
        self._notice.wait()
        # Told once; the next call is parked for good.
        self._notice = threading.Event()
        return "SIGTERM"

    @remote_call("control")
    def ping(self) -> str:
        """Answer with Ray's name of this machine."""
        return ray.get_runtime_context().get_node_id()

    @remote_call("control")
    def usage(self) -> dict[str, float]:
        """Measure this process and its machine; see ``actors.remote.system_metrics``."""
        return self._usage.measure()

    @remote_call("control")
    def hang(self) -> None:
        """Stand still, all threads of this process, as a fault would have it."""
        os.kill(os.getpid(), signal.SIGSTOP)

    @remote_call("control")
    def preempt(self) -> None:
        """Give this process notice of its end, as a cloud would."""
        os.kill(os.getpid(), signal.SIGTERM)
