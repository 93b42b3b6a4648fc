"""`moebius-serve`: a page to paint on, and an HTTP API, on this machine."""

from __future__ import annotations

import ipaddress
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Annotated
from urllib.parse import quote, urlsplit

import typer

from moebius_runtime import console
from moebius_runtime.commands.options import DEFAULT, DEFAULT_BUNDLE, ModeName, PrecisionName
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

SITE_OPTIONS = frozenset({"site", "host", "port", "allow_host", "no_token", "open", "version"})
"""What `--site` reads. Every other option concerns a bundle, which a site's browser runs without this server."""

app = typer.Typer(no_args_is_help=False, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    context: typer.Context,
    bundle: Annotated[
        Path, typer.Argument(help="The folder that `moebius-export onnx` wrote, or hub:OWNER/REPO[@REVISION].")
    ] = DEFAULT_BUNDLE,
    host: Annotated[str, typer.Option(help="Address to listen on. Others than loopback need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port, which is printed.")] = 8080,
    runtime: Annotated[
        str, typer.Option(help="As in `moebius-inpaint`; auto: the best that can run here.")
    ] = "ort-cpu",
    device: Annotated[str | None, typer.Option(help="Of the runtime, as in `moebius-inpaint`.")] = None,
    precision: Annotated[PrecisionName | None, typer.Option(help="Of the U-Net, as in `moebius-inpaint`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="On the CPU. Default: the physical cores.")] = None,
    mode: Annotated[ModeName, typer.Option(help="Taken where a request names none.")] = DEFAULT,
    segmenter: Annotated[
        Path | None,
        typer.Option(help="A folder with a SAM-type encoder and decoder (ONNX): the page selects objects by a click."),
    ] = None,
    site: Annotated[
        Path | None,
        typer.Option(help="Serve a site of `moebius-export web` in place of a bundle: it runs in the browser."),
    ] = None,
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
    max_megapixels: Annotated[float, typer.Option(min=0.01, max=100, help="Of one picture.")] = 100.0,
    open: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    version: console.Version = False,
) -> None:
    """Serves a page with a brush, and an HTTP API that IOPaint's, OpenAI's and moebius-gimp's clients speak."""
    try:
        import uvicorn  # noqa: F401 - first, so that a missing extra is reported before a bundle is loaded

        from moebius_serve.app import create_app
        from moebius_serve.server import Server
    except ModuleNotFoundError as error:
        raise RuntimeUnavailableError(
            f"moebius-serve needs the package {error.name}. Install it: pip install 'moebius-edge[serve]'"
        ) from error
    from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline
    from moebius_serve.guard import Access
    from moebius_serve.jobs import Jobs
    from moebius_serve.limits import Limits
    from moebius_serve.segmenter import Segmenter

    if site is not None:
        _refuse_bundle_options(context)
        _serve_site(site, host, port, _hosts(host, allow_host or []), no_token, open)
        return
    limits = Limits(queue=queue, pixels=int(max_megapixels * 1e6))
    access = Access(_hosts(host, allow_host or []), _origins(allow_origin or []), _token(token))
    _check_address(host, access.token, no_token)
    folder = None if save_dir is None else _save_folder(save_dir)
    listening = _listen(host, port)
    found = None if segmenter is None else Segmenter(segmenter, threads)
    pipeline = InpaintPipeline.from_bundle(
        bundle,
        runtime,
        threads=threads,
        memory="fast",
        precision=None if precision is None else precision.value,
        device=device,
    )
    pipeline.check(InpaintOptions(mode=mode.value))
    for note in pipeline.backend.take_notes():
        console.warn(note)
    if pipeline.manifest.stand_in:
        console.warn("this bundle has stand-in weights (random numbers): the picture inside the mask is noise")
    jobs = Jobs(pipeline, limits, folder)
    application = create_app(pipeline, jobs, access, limits, mode=mode.value, segmenter=found)
    fragment = "" if access.token is None else f"#token={quote(access.token, safe='')}"
    ready = _announced(bundle, host, listening, open, fragment)
    Server(application, jobs, limits, ready).run(sockets=[listening])
    jobs.stop()
    jobs.join(30)


def _refuse_bundle_options(context: typer.Context) -> None:
    """Refuses what was given beside `--site` and would have no effect, also by its default value.

    Raises:
        InputError: names each such option.
    """
    given = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        kind = "DEFAULT" if source is None else source.name  # typer versions differ in where this enumeration lies
        if name in SITE_OPTIONS or kind.startswith("DEFAULT"):
            continue
        if kind == "ENVIRONMENT":
            given.append(f"the variable {parameter.envvar}")
        else:
            given.append(str(context.params[name]) if parameter.param_type_name == "argument" else parameter.opts[0])
    if given:
        raise InputError(
            f"--site serves files that the browser runs: {', '.join(given)} would have no effect. Leave "
            f"{'it' if len(given) == 1 else 'them'} out, or serve a bundle without --site"
        )


def _serve_site(site: Path, host: str, port: int, hosts: frozenset[str], no_token: bool, open: bool) -> None:
    """Serves a site until SIGINT or SIGTERM."""
    from moebius_serve.guard import Access
    from moebius_serve.limits import Limits
    from moebius_serve.server import Server
    from moebius_serve.site import create_site

    if not _is_loopback(host) and not no_token:
        raise InputError(f"--host {host} can be reached from other machines; add --no-token to serve the site to them")
    limits = Limits()
    application = create_site(site, Access(hosts), limits)
    listening = _listen(host, port)
    if not _is_loopback(host):
        console.warn("browsers store the model and use WebGPU over https or on localhost only")
    Server(application, None, limits, _announced(site, host, listening, open)).run(sockets=[listening])


def _announced(what: Path, host: str, listening: socket.socket, open: bool, fragment: str = "") -> Callable[[], None]:
    """What a server calls once it accepts connections: prints the address, and opens it with `fragment` if asked."""
    shown = "localhost" if _is_loopback(host) else f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"

    def ready() -> None:
        console.out.print(f"serving {what} at {address}")
        if open:
            threading.Thread(target=webbrowser.open, args=(address + fragment,), daemon=True).start()

    return ready


def _check_address(host: str, token: str | None, no_token: bool) -> None:
    """Refuses an address that others can reach without a token, unless that is asked for."""
    if _is_loopback(host) or token is not None:
        return
    if not no_token:
        raise InputError(
            f"--host {host} can be reached from other machines; give --token, or --no-token to serve everyone"
        )
    console.warn(f"everyone who reaches {host} can use this server: it has no token")


def _token(token: str | None) -> str | None:
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token != ""):
        raise InputError("--token is empty or holds characters that a header cannot carry; use letters and digits")
    return token


def _origins(origins: list[str]) -> frozenset[str]:
    for origin in origins:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != origin or not parts.netloc:
            raise InputError(f"--allow-origin {origin}: expected https://NAME or http://NAME:PORT, without a path")
    return frozenset(origin.lower() for origin in origins)


def _save_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; choose another --save-dir") from error
    return folder


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
    found: set[str] = set()
    try:
        known = socket.getaddrinfo(socket.gethostname(), None)
    except OSError:  # the machine's name has no address
        return found
    for family, _, _, _, address in known:
        if family in (socket.AF_INET, socket.AF_INET6):
            found.add(str(address[0]).lower())
    return found


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; `InputError` where the port is taken or the address is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        if sys.platform != "win32":
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


def main() -> None:
    """Entry point of `moebius-serve`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
