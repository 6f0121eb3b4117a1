"""From a method and a path to a route: two dictionaries."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import unquote

from agentmem_cluster.errors import BadRequest, NotFound
from agentmem_node.api.routes import Route

_ID = "{id}"
_PATH_SHOWN_MAX = 200


class MethodNotAllowed(BadRequest):
    """The path exists, the method does not: 405, with the ones that do in `Allow`."""

    code, status = "method_not_allowed", 405

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(
            f"{method[:20]} is not possible here.", hint=f"Use {allowed}.", allow=allowed
        )
        self.allowed = allowed


class Router:
    """Fixed paths come first: `/memories/search` is never the memory whose id is `search`."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self._fixed: dict[str, dict[str, Route]] = {}
        self._with_id: dict[tuple[str, str], dict[str, Route]] = {}
        for route in routes:
            before, found, after = route.path.partition(_ID)
            methods = (
                self._with_id.setdefault((before, after), {})
                if found
                else self._fixed.setdefault(route.path, {})
            )
            methods[route.method] = route
            if route.method == "GET":
                methods["HEAD"] = route

    def find(self, method: str, path: str) -> tuple[Route, str]:
        """(route, the id in the path or ""). `path` is as received, percent-escapes and all.

        A slash at the end is ignored. Raises NotFound or MethodNotAllowed.
        """
        methods, memory_id = self._methods(path)
        route = methods.get(method)
        if route is None:
            raise MethodNotAllowed(method, allowed(methods))
        return route, memory_id

    def allowed(self, path: str) -> str:
        """The methods of a path, for the Allow header. Raises NotFound."""
        return allowed(self._methods(path)[0])

    def _methods(self, path: str) -> tuple[dict[str, Route], str]:
        methods = self._fixed.get(path)
        if methods is not None:
            return methods, ""
        if path.endswith("/") and path != "/":
            path = path[:-1]
            methods = self._fixed.get(path)
            if methods is not None:
                return methods, ""
        for (before, after), candidate in self._with_id.items():
            if path.startswith(before) and path.endswith(after):
                # Unescaped after the match: an id with an escaped slash is still one segment.
                raw = path[len(before) : len(path) - len(after)]
                if raw and "/" not in raw:
                    return candidate, unquote(raw)
        shown = path if len(path) <= _PATH_SHOWN_MAX else path[:_PATH_SHOWN_MAX] + "..."
        raise NotFound(
            f"There is nothing at {shown}.", hint="GET /docs shows what there is.", path=shown
        )


def allowed(methods: Iterable[str]) -> str:
    return ", ".join(sorted({*methods, "OPTIONS"}))
