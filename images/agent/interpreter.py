"""Python in the agent's own process, where names stay from request to request."""

from __future__ import annotations

import os
import sys

from .protocol import Refused, Request, dumps, loads

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Interpreter:
    """Runs what it is given, here and now: everything else waits meanwhile, hence the deadlines."""

    def __init__(self) -> None:
        self._namespace: dict[str, Any] = {"__name__": "__agent__"}
        self._evaluating = False

    def evaluate(self, request: Request) -> dict[str, Any]:
        """Run Python in the resident interpreter; the value of a last expression is the answer."""
        import ast

        tree = ast.parse(request.payload.decode(), "<eval>")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None

        def work() -> object:
            exec(compile(tree, "<eval>", "exec"), self._namespace)  # noqa: S102 - this is what it is for
            if not isinstance(last, ast.Expr):
                return None
            return eval(compile(ast.Expression(last.value), "<eval>", "eval"), self._namespace)

        return {"value": self._guarded(work, request)}

    def call(self, request: Request) -> dict[str, Any]:
        """Call module:function with JSON arguments in the resident interpreter."""
        import importlib

        arguments: Any = loads(request.payload.decode())
        module, _, name = str(request.header["function"]).partition(":")

        def work() -> object:
            target: Any = importlib.import_module(module)
            for part in name.split("."):
                target = getattr(target, part)
            return target(*arguments["args"], **arguments["kwargs"])

        return {"value": self._guarded(work, request)}

    def _guarded(self, work: Callable[[], object], request: Request) -> object:
        """Run `work` here and now, but not for ever: everything else waits meanwhile."""
        import signal

        _complete_path()

        seconds = float(request.header.get("timeout", 5.0))

        def ring(*_: object) -> None:
            if self._evaluating:
                raise TimeoutError(f"not done after {seconds:g} s in the resident interpreter; use a command")

        before = signal.signal(signal.SIGALRM, ring)
        self._evaluating = True
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            value = work()
            dumps(value)
            return value
        except (SystemExit, KeyboardInterrupt) as error:
            raise Refused(f"{type(error).__name__} in the resident interpreter") from error
        finally:
            self._evaluating = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _complete_path() -> None:
    """Give the interpreter, started bare to be quick, the module path that commands have."""
    if "site" not in sys.modules:
        import site

        site.main()
        sys.path[:0] = [entry for entry in os.environ.get("PYTHONPATH", "").split(":") if entry not in ("", *sys.path)]
