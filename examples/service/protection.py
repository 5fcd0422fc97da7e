"""Protection of the service from foreign web pages, for which any browser may send requests.

A service on one's own machine can be reached by every page that a browser there shows. A page can
send it requests, or make its own host name point to this machine (DNS rebinding), so that the
browser takes the service for a part of the page.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import Problem, as_text

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'self'; style-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Protection:
    """Refuses requests of foreign pages, and adds headers that restrict what the page can do.

    A host is accepted if it is an IP address, ``localhost`` or one of ``hosts``: no foreign page
    has one of these. An ``Origin``, which browsers send, must be the service itself.
    """

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app = app
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_protected(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        problem = self._problem(Headers(scope=scope))
        if problem is None:
            return await self._app(scope, receive, send_protected)
        status, message = problem
        response = JSONResponse({"problems": [Problem(field="", message=message)]}, status)
        await response(scope, receive, send_protected)

    def _problem(self, headers: Headers) -> tuple[int, str] | None:
        """Return the status and the message of a refusal, or None."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            return 421, (
                f"Host is {as_text(host)}; expected an IP address, or one of "
                f"{', '.join(sorted(self._hosts))}; start the service with --allow-host for more"
            )
        own_origins = (f"http://{host}".lower(), f"https://{host}".lower())
        if origin is not None and origin.lower() not in own_origins:
            return 403, (
                f"Origin is {as_text(origin)}; expected the service's own page; requests of other "
                "pages are refused"
            )
        return None

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self._hosts or bool(ip_address(name))
        except ValueError:
            return False
