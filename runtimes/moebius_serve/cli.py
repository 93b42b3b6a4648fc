"""`moebius-serve`: a page to paint on, and an HTTP API, on this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
import threading
from pathlib import Path
from typing import Annotated, Any

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

DEFAULT_BUNDLE = Path("moebius-bundle")

app = typer.Typer(no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    bundle: Annotated[Path, typer.Argument(help="What `moebius-export onnx` wrote.")] = DEFAULT_BUNDLE,
    host: Annotated[str, typer.Option(help="Address to listen on. Others than loopback need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port, which is printed.")] = 8080,
    runtime: Annotated[str, typer.Option(help="As in `moebius-inpaint`; auto: the best that can run here.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Of the U-Net, as in `moebius-inpaint`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="On the CPU. Default: the physical cores.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="MOEBIUS_TOKEN", help="Every call must carry it. Better given as MOEBIUS_TOKEN."),
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Serve another address without a token: anyone there can use it.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name that this server is reached by; may be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A page elsewhere that may call, as https://NAME; may be repeated.")
    ] = None,
    save_dir: Annotated[Path | None, typer.Option(help="Also keep every result there. Default: nothing.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Pictures that may wait or run.")] = 16,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="Of one picture.")] = 100.0,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Serves a page with a brush, and an HTTP API that IOPaint's, OpenAI's and moebius-gimp's clients speak."""
    from moebius_runtime.pipeline import InpaintPipeline
    from moebius_serve.guard import Access
    from moebius_serve.limits import Limits

    try:
        import uvicorn

        from moebius_serve.app import create_app
    except ModuleNotFoundError as error:
        raise RuntimeUnavailableError(
            f"moebius-serve needs the package {error.name}. Install it: pip install 'moebius-edge[serve]'"
        ) from error
    from moebius_serve.jobs import Jobs

    access = Access(_hosts(host, allow_host or []), frozenset(allow_origin or ()), token)
    if not _is_loopback(host) and token is None:
        if not no_token:
            raise InputError(
                f"--host {host} can be reached from other machines; give --token, or --no-token to serve everyone"
            )
        console.warn(f"everyone who reaches {host} can use this server: it has no token")
    limits = Limits(queue=queue, pixels=int(max_megapixels * 1e6))
    listening = _listen(host, port)
    pipeline = InpaintPipeline.from_bundle(bundle, runtime, threads=threads, memory="fast", precision=precision)  # type: ignore[arg-type]
    for note in pipeline.backend.take_notes():
        console.warn(note)
    if pipeline.manifest.stand_in:
        console.warn("this bundle has random test weights: what is filled in is noise")
    jobs = Jobs(pipeline, limits)
    bound = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{'localhost' if _is_loopback(host) else shown}:{bound}/"

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            jobs.stop()  # ends streams of events, which uvicorn waits for
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            console.out.print(f"serving {bundle} at {address}")
            if open_page:
                threading.Thread(target=_open, args=(address,), daemon=True).start()

    config = uvicorn.Config(
        create_app(pipeline, jobs, access, limits),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=15,
        h11_max_incomplete_event_size=64 << 10,
        ws="none",
    )
    Server(config).run(sockets=[listening])
    jobs.stop()
    jobs.join(30)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(host: str, more: list[str]) -> frozenset[str]:
    """Names that the Host header may have. The address "all interfaces" stands for none of its own."""
    own = {"localhost", "127.0.0.1", "::1", *(name.lower() for name in more)}
    if host not in ("0.0.0.0", "::"):
        own.add(host.lower())
    elif not more:
        own |= {socket.gethostname().lower(), *_addresses()}
    return frozenset(own)


def _addresses() -> set[str]:
    """This machine's own addresses: an address in the Host header cannot be rebound by a name server."""
    found = set()
    for family, _, _, _, address in socket.getaddrinfo(socket.gethostname(), None):
        if family in (socket.AF_INET, socket.AF_INET6):
            found.add(str(address[0]).lower())
    return found


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; `InputError` where the port is taken or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        listening.set_inheritable(True)
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --port, or --port 0 for "
            "any free one"
        ) from error
    return listening


def _open(address: str) -> None:
    import webbrowser

    webbrowser.open(address)


def main() -> None:
    """Entry point of `moebius-serve`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
