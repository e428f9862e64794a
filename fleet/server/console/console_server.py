"""The web server of the console and of the operators' API."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Middleware

from fleet.errors import CredentialsError, FleetError
from fleet.http_api.api_address import ApiAddress
from fleet.http_api.http_server import HttpServer
from fleet.operator_api.operation import PREFIX
from fleet.server.console.api_errors import message_of, problem_response
from fleet.server.console.api_routes import OperatorApi
from fleet.server.console.authentication import (
    HEALTH_PATH,
    Authentication,
    Handler,
)
from fleet.server.console.blocking_calls import BlockingCalls
from fleet.server.console.rendering import render, set_static_url
from fleet.server.console.return_page import ReturnPage
from fleet.server.console.security_headers import header_setter
from fleet.server.console.sign_in import SignIn
from fleet.server.console.static_files import StaticFiles
from fleet.server.console_address import published_console_url
from fleet.server.operations.context import OperationContext

TITLES: Final = {403: "Not allowed", 404: "There is no such page", 503: "Not available now"}

MakeRoutes = Callable[[OperationContext, BlockingCalls], Sequence[web.RouteDef]]
"""A function that makes routes over a fleet, with threads for blocking calls."""


class ConsoleServer(HttpServer):
    """The server, as a context manager."""

    def __init__(
        self,
        address: ApiAddress,
        context: OperationContext,
        tls: ssl.SSLContext | None,
        make_routes: Sequence[MakeRoutes] = (),
    ) -> None:
        """Store the values. `make_routes` are the pages and other parts of the console."""
        advice = "choose another with --console"
        super().__init__("console", address.host, address.port, advice, tls)
        self._context = context
        self._make_routes = make_routes
        self._calls = BlockingCalls()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._calls.close()

    def _application(self) -> web.Application:
        operators = self._context.registry.operators
        authentication = Authentication(
            operators, self._calls, port=self.port, has_tls=self._tls is not None
        )
        files = StaticFiles()
        set_static_url(files.url)
        pages = ReturnPage(authentication.cookie, has_tls=authentication.has_tls)
        app = web.Application(middlewares=[errors_to_pages(pages), authentication.authenticate])
        app.on_response_prepare.append(header_setter(has_tls=self._tls is not None))
        app.router.add_routes(OperatorApi(self._context, self._calls).routes())
        app.router.add_routes(SignIn(operators, self._calls, authentication, pages).routes())
        app.router.add_routes(files.routes())
        app.router.add_get(HEALTH_PATH, _health)
        for make in self._make_routes:
            app.router.add_routes(make(self._context, self._calls))
        return app


async def _health(_: web.Request) -> web.Response:
    return web.Response(text="ok")


def errors_to_pages(pages: ReturnPage) -> Middleware:
    """Return a middleware that turns failures into errors of the API, or into pages."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except ConnectionError:
            raise
        except Exception as error:
            if isinstance(error, web.HTTPException) and error.status < 400:
                raise
            if request.path.startswith(PREFIX + "/"):
                return problem_response(error)
            if isinstance(error, CredentialsError):
                raise await pages.leave(request) from None
            return problem_page(error)

    return answer


def problem_page(error: Exception) -> web.Response:
    """Return a page about an error. That of an unexpected one is in the log alone."""
    response = problem_response(error)  # also writes the log
    status = response.status
    message = message_of(error) if isinstance(error, FleetError) else response.reason
    next_step = "Go back, or begin again at the overview."
    if status == 503:
        next_step = "The server tries again by itself; load this page again in a few seconds."
    title = TITLES.get(status, "This did not work")
    return render("problem.html", status, title=title, message=message, next_step=next_step)


def start_console(
    stack: ExitStack,
    address: ApiAddress,
    context: OperationContext,
    tls: ssl.SSLContext | None,
    make_routes: Sequence[MakeRoutes] = (),
) -> ConsoleServer:
    """Start the console on `stack`, and publish its URL in the fleet's folder.

    Raises:
        ConfigError: it cannot listen.
    """
    server = stack.enter_context(ConsoleServer(address, context, tls, make_routes))
    stack.enter_context(published_console_url(context.home.folder, server.url))
    return server
