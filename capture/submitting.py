"""The commands around the server: serve, submit, status, watch, cancel.

What they need is imported inside them, so that help is instant.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from datastore import console

if TYPE_CHECKING:
    from capture.client import Client
    from capture.messages import TaskStatus

__all__ = ["register"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
Url = Annotated[
    str | None, typer.Option("--url", envvar="ADS_CAPTURE_URL", metavar="URL", help="The server.", show_default=False)
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", envvar="ADS_CAPTURE_TOKEN", metavar="TEXT", help="What requests must bear.", show_default=False
    ),
]
TaskId = Annotated[str, typer.Argument(metavar="TASK", help="As submit printed it.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line of capture."""
    for command in (serve, submit, status, watch, cancel):
        app.command(command.__name__)(command)


def serve(
    *,
    model: Annotated[str, typer.Option("--model", metavar="NAME|DIR", help="A model of the Hub or a directory.")],
    host: Annotated[str, typer.Option("--host", help="Address; others than the loopback need --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8765,
    token: Token = None,
    experiments_root: Annotated[
        Path, typer.Option("--experiments-root", metavar="DIR", help="Where the experiment trees lie.")
    ] = Path("experiments"),
    store_root: Annotated[
        Path | None,
        typer.Option("--store-root", metavar="DIR", help="Where stores may be asked for; default with the trees."),
    ] = None,
    models_root: Annotated[
        Path | None, typer.Option("--models-root", metavar="DIR", help="Directories that may be loaded on request.")
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks", metavar="FILE", help="Where tasks are kept; default in the store root, by port."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit, tag or branch on the Hub.")] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="NAME|DIR", help="A LoRA adapter over the model.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="8bit|4bit", help="Quantise with bitsandbytes while loading.")
    ] = None,
    expert_workspace: Annotated[
        str, typer.Option("--expert-workspace", metavar="SIZE", help="Memory to multiply INT4 experts out in.")
    ] = "2GiB",
    layers: Annotated[
        str | None, typer.Option("--layers", metavar="SPEC", help="Load no layer above these; default all.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str | None, typer.Option("--dtype", help="Default the checkpoint's.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option("--batch-tokens", min=1, help="Padded tokens a batch; default by model and device.")
    ] = None,
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", min=1, help="Most tokens a chunk.")] = 1024,
    memory: console.Memory = console.DEFAULT_MEMORY,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.")
    ] = False,
) -> None:
    """Hold a model and capture on request; answers while it loads and works, and ends by Ctrl-C or plain kill."""
    if host not in LOOPBACK and not token:
        raise typer.BadParameter(
            f"--host {host} is reached by other machines, so requests must bear a token: give --token, or set "
            "ADS_CAPTURE_TOKEN."
        )
    for option, root in (("--experiments-root", experiments_root), ("--store-root", store_root)):
        if root is not None and not root.is_dir():
            raise typer.BadParameter(f"{option} {root} is not a directory; name the one with the experiment trees.")
    try:
        from capture import serving
    except ModuleNotFoundError as error:
        raise typer.BadParameter(
            f"The server needs {error.name}, which is not installed: pip install 'activation-datastore[capture,serve]'."
        ) from None
    from capture.modelholder import Setup
    from capture.roots import Roots

    sock = serving.listen(host, port)
    trees, stores = experiments_root.resolve(), (store_root or experiments_root).resolve()
    serving.serve(
        sock,
        Setup(
            model=model,
            revision=revision,
            dtype=dtype,
            device=device,
            layers=layers,
            memory=memory,
            batch_tokens=batch_tokens,
            chunk_tokens=chunk_tokens,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            quantize=quantize,
            expert_workspace=console.parse_bytes(expert_workspace),
        ),
        roots=Roots(experiments=trees, stores=stores, models=models_root.resolve() if models_root else None),
        tasks=tasks or stores / f".capture-tasks-{sock.getsockname()[1]}.sqlite",
        token=token,
        host=host,
    )


def submit(
    *,
    experiment: Annotated[str, typer.Option("--experiment", metavar="NAME", help="A tree below the server's root.")],
    prompt_set: Annotated[str, typer.Option("--prompt-set", metavar="NAME", help="Which responses of the tree.")],
    model_variant: Annotated[
        str | None, typer.Option("--model-variant", metavar="NAME", help="Which model of the tree.")
    ] = None,
    responses_from: Annotated[
        str | None, typer.Option("--responses-from", metavar="NAME", help="Whose responses; default the variant's own.")
    ] = None,
    layers: console.Layers = None,
    components: console.Components = "residual",
    ids: console.Ids = None,
    limit: console.Limit = None,
    response_only: Annotated[bool, typer.Option("--response-only", help="Store the response's rows only.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Capture again what is there.")] = False,
    output_suffix: Annotated[
        str | None, typer.Option("--output-suffix", metavar="TEXT", help="The store is PROMPT_SET_TEXT.zarr.")
    ] = None,
    store: Annotated[
        str | None, typer.Option("--store", metavar="PATH", help="Below the server's store root; default in the tree.")
    ] = None,
    follow: Annotated[bool, typer.Option("--watch", help="Wait until it has ended, and show how far it is.")] = False,
    url: Url = None,
    token: Token = None,
    as_json: console.Json = False,
) -> None:
    """Ask a server for a capture; the same one goes on where it was interrupted."""
    from capture.client import Client

    chosen = console.parse_list(ids)
    client = Client(url, token=token)
    started = client.capture(
        experiment,
        prompt_set,
        model_variant=model_variant,
        layers=layers,
        components=components or "residual",
        prompt_ids=chosen,
        responses_from=responses_from,
        limit=limit,
        response_only=response_only,
        skip_existing=False if replace else None,
        output_suffix=output_suffix,
        store=store,
    )
    if follow:
        _watch(client, started.task_id, as_json=as_json)
    elif as_json:
        console.emit_json(started.model_dump())
    else:
        behind = f", behind {started.ahead} others" if started.ahead else ""
        print(f"task {started.task_id}: capture of {prompt_set} into {started.store}{behind}")
        print(f"next: python -m capture watch {started.task_id}")


def status(
    task_id: Annotated[str | None, typer.Argument(metavar="[TASK]", help="One task; default all.")] = None,
    *,
    url: Url = None,
    token: Token = None,
    as_json: console.Json = False,
) -> None:
    """Show the server's model and its captures, or how far one is."""
    from capture.client import Client

    client = Client(url, token=token)
    if task_id is not None:
        one = client.status(task_id)
        console.emit_json(one.model_dump()) if as_json else _show([one])
        return
    health, found = client.health(), client.tasks()
    if as_json:
        console.emit_json({**health.model_dump(), "tasks": [one.model_dump() for one in found]})
        return
    print(
        f"{health.model or 'no model'}: {'loaded' if health.loaded else 'loading' if health.model else 'none loaded'}"
    )
    _show(found)


def watch(task_id: TaskId, *, url: Url = None, token: Token = None, as_json: console.Json = False) -> None:
    """Follow a capture until it has ended; the exit code is 1 unless it was completed."""
    from capture.client import Client

    _watch(Client(url, token=token), task_id, as_json=as_json)


def cancel(task_id: TaskId, *, url: Url = None, token: Token = None, as_json: console.Json = False) -> None:
    """Cancel a capture; what it has finished is kept for the same one to go on with."""
    from capture.client import Client

    found = Client(url, token=token).cancel(task_id)
    if as_json:
        console.emit_json(found.model_dump())
    else:
        print(f"task {task_id}: {'being cancelled' if found.status == 'running' else found.status}")


def _watch(client: "Client", task_id: str, *, as_json: bool) -> None:
    last = None
    try:
        with console.progress(quiet=as_json) as bar:
            shown = bar.add_task("capture", total=None, note="")
            for last in client.events(task_id):
                bar.update(shown, completed=last.progress.rollouts, total=last.progress.of or None, note=_note(last))
    except KeyboardInterrupt:
        raise console.Interrupted(
            f"stopped watching; the capture goes on: python -m capture watch {task_id}, or cancel {task_id}"
        ) from None
    assert last is not None  # the client raises where there was no event
    if as_json:
        console.emit_json(last.model_dump())
    else:
        _show([last])
    if last.status != "completed":
        raise typer.Exit(1)


def _note(one: "TaskStatus") -> str:
    if one.status == "starting":
        return f"waits behind {one.ahead}" if one.ahead else "waits for the model"
    eta = f", {one.progress.eta_seconds:,.0f} s to go" if one.progress.eta_seconds is not None else ""
    return f"{console.human_bytes(one.progress.raw_bytes)} of {console.human_bytes(one.progress.raw_bytes_total)}{eta}"


def _show(found: "Iterable[TaskStatus]") -> None:
    for one in found:
        done, stored = one.progress, console.human_bytes(one.progress.stored_bytes)
        print(
            f"{one.task_id}  {one.status:<11}  {one.experiment}/{one.prompt_set}  {done.rollouts} of {done.of} "
            f"rollouts, {done.tokens:,} of {done.tokens_total:,} tokens, {stored} stored, {one.elapsed:,.0f} s  "
            f"{one.store}"
        )
        for line in (*one.notes, *([f"{one.skipped} rollouts were in the store already"] if one.skipped else [])):
            print(f"          {line}")
        if one.error:
            print(f"          {one.error}")
