"""The ``kdkit`` command: signatures only. Bodies are imported when a command runs, so that ``--help`` is instant."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn, get_args

import typer

from kdkit.cli import complete
from kdkit.cli.models_app import models_app
from kdkit.cli.options import First, Force, Fresh, Json, Kind, Only, Recipe, Sets, Until, Variables, group
from kdkit.cli.plugins_app import plugins_app
from kdkit.cli.rewards_app import rewards_app
from kdkit.cli.runs_app import RUNS, Out, runs_app
from kdkit.cli.sandbox_app import sandbox_app

__all__ = ["app", "main"]

_NAME: Final = "kdkit"
_COMPLETING: Final = "_KDKIT_COMPLETE"
"""Set by the scripts that --install-completion writes."""
_INTERRUPTED: Final = 130
"""What shells make of a program that Ctrl-C ended."""

app = group("Turn a large language model into a small one from one YAML recipe.")
app.add_typer(plugins_app, name="plugins")
app.add_typer(runs_app, name="runs")
app.add_typer(models_app, name="models")
app.add_typer(sandbox_app, name="sandbox")
app.add_typer(rewards_app, name="rewards")

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        metavar="[NAME=]MODEL",
        autocompletion=complete.models,
        help="Directory, stages/NAME of a run, Hub id or known name; repeatable. NAME is shown above its answers.",
    ),
]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        autocompletion=complete.files,
        help="One prompt a line, or JSON Lines with 'prompt' or 'messages'; - is standard input.",
    ),
]


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer calls it with the option's value
    if value:
        import kdkit

        typer.echo(f"kdkit {kdkit.__version__}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to errors; may stand anywhere.")] = False,
) -> None:
    """Turn a large language model into a small one from one YAML recipe.

    Results go to stdout, logs to stderr. Exit codes: 0 ok, 1 a stage failed, 2 usage or recipe invalid, 3 plugin
    missing or broken, 4 environment unmet, 5 quality gate missed, 130/143 stopped by a signal.
    """


@app.command()
def run(
    recipe: Recipe,
    *,
    sets: Sets = None,
    variables: Variables = None,
    out: Out = RUNS,
    first: First = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    fresh: Fresh = False,
    inline: Annotated[bool, typer.Option("--inline", help="Run every stage in this process, to debug it.")] = False,
) -> None:
    """Run a recipe: finished stages are reused, an interrupted one resumes."""
    from kdkit.cli.run import run as body
    from kdkit.engine.selection import Selection

    chosen = Selection(first=first, until=until, only=tuple(only or ()), force=tuple(force or ()), fresh=fresh)
    raise typer.Exit(body(recipe, sets or [], variables or [], out, chosen, inline=inline))


@app.command()
def plan(
    recipe: Recipe,
    *,
    sets: Sets = None,
    variables: Variables = None,
    first: First = None,
    until: Until = None,
    only: Only = None,
    force: Force = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Show what a run would do with each stage, and why."""
    from kdkit.cli.plan import plan as body
    from kdkit.engine.selection import Selection

    chosen = Selection(first=first, until=until, only=tuple(only or ()), force=tuple(force or ()), fresh=fresh)
    raise typer.Exit(body(recipe, sets or [], variables or [], chosen, as_json=as_json))


@app.command()
def validate(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", autocompletion=complete.recipes, help="Recipe files.")
    ],
    *,
    sets: Sets = None,
    variables: Variables = None,
    as_json: Json = False,
) -> None:
    """Check recipes completely without running anything."""
    from kdkit.cli.validate import validate as body

    raise typer.Exit(body(recipes, sets or [], variables or [], as_json))


@app.command()
def generate(
    models: Models,
    *,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to ask; repeatable.")
    ] = None,
    file: PromptFile = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message of every prompt that has none.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give prompts as they are, without the chat template.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="T", help="Sample at this temperature; default: greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", metavar="P", help="Sample from the most probable tokens up to P.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Sample from the K most probable tokens.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help="Of sampling; default: 17.")] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option("--precision", help="Of the weights; auto is bf16 where that is faster."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Print the answers of models to the same prompts, side by side.

    Text becomes a message of the user where the model has a chat template. Decoding is greedy unless --temperature,
    --top-p or --top-k is given. One model is in memory at a time. On a terminal wide enough the answers stand in
    columns, otherwise one below the other; a file gets plain text.

    \b
    Example:
      kdkit generate --model base=smollm2-135m-instruct \\
        --model kd=runs/quickstart/latest/stages/kd --prompt "Why is the sky blue?"
    """  # noqa: D301 - click keeps the lines of a paragraph that starts with this character
    from kdkit.cli.generate import Request
    from kdkit.cli.generate import generate as body

    request = Request(
        models=models,
        prompts=prompts or [],
        file=file,
        system=system,
        raw=raw,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        precision=precision,
    )
    raise typer.Exit(body(request, as_json=as_json))


@app.command()
def report(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", autocompletion=complete.reports, help="Run directory or recipe; default: latest."
        ),
    ] = None,
    *,
    as_json: Json = False,
) -> None:
    """Print the report of a run."""
    from kdkit.cli.report import report as body

    raise typer.Exit(body(run, as_json))


@app.command("serve-teacher")
def serve_teacher(
    model: Annotated[
        str,
        typer.Argument(
            metavar="[NAME=]MODEL",
            autocompletion=complete.models,
            help="As in generate --model. NAME is what clients call it.",
        ),
    ],
    *,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", help="0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option("--api-key-env", metavar="VARIABLE", help="Environment variable with the key that clients send."),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp32"],
        typer.Option("--precision", help="Of the weights; auto is bf16 where that is faster."),
    ] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", help="Prompts computed together.")] = 32,
    max_top_k: Annotated[int, typer.Option("--max-top-k", metavar="K", help="Log-probabilities per token.")] = 512,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Tokens of a prompt with its answer.")
    ] = 32768,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="Tokens of an answer.")] = 4096,
    max_requests: Annotated[
        int, typer.Option("--max-requests", metavar="N", help="Requests under way; others are asked to come again.")
    ] = 64,
) -> None:
    """Serve a model's answers and log-probabilities to recipes on other machines (teacher: {use: openai}).

    The protocol is that of OpenAI's completions with vLLM's prompt_logprobs. Ctrl-C ends it. Listening on other
    addresses than this machine's own needs a key.

    \b
    Example:
      KDKIT_KEY=... kdkit serve-teacher teacher=smollm2-135m-instruct --host 0.0.0.0 --api-key-env KDKIT_KEY
    """  # noqa: D301 - click keeps the lines of a paragraph that starts with this character
    from kdkit.cli.serve import ServeRequest
    from kdkit.cli.serve import serve_teacher as body

    request = ServeRequest(
        model=model,
        host=host,
        port=port,
        api_key_env=api_key_env,
        precision=precision,
        batch_size=batch_size,
        max_top_k=max_top_k,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
        max_requests=max_requests,
    )
    raise typer.Exit(body(request))


@app.command()
def doctor(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Measure nothing, and use no network.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine offers and what is missing: hardware, disks, extras, Hub, models, sandbox.

    Matrix products in fp32, bf16 and fp16 are timed on every device, in a process of its own, for about 0.3 seconds
    each. The Hub is asked by one HEAD request for its front page, without token and for at most 3 seconds, unless
    HF_HUB_OFFLINE is set. Neither happens with --quick.
    """
    from kdkit.cli.doctor import doctor as body

    raise typer.Exit(body(as_json=as_json, quick=quick))


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", autocompletion=complete.files, help="Write it to a file.")
    ] = None,
) -> None:
    """Write the JSON schema of recipes, for editors."""
    from kdkit.cli.validate import schema as body

    raise typer.Exit(body(out))


@app.command("new-plugin")
def new_plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the component, such as my-loss.")],
    *,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            autocompletion=complete.kinds,
            help=f"What it is: {', '.join(get_args(Kind))}; required.",
        ),
    ] = None,
    parent: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where kdkit-NAME/ is made.")] = Path(),
) -> None:
    """Write a package with a component of your own that works, tests included, and print the next three commands.

    docs/how-to/new-plugin.md goes from there to a published plugin.
    """
    from kdkit.cli.new_plugin import new_plugin as body

    raise typer.Exit(body(name, kind, parent))


def main() -> NoReturn:
    """Entry point: runs a command and exits with its code. Errors that a person can cause are one line."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal or locale that is not UTF-8 gets escapes instead of an error, as stderr does anyway.
        sys.stdout.reconfigure(errors="backslashreplace")
    if _COMPLETING in os.environ:
        app(prog_name=_NAME)  # ends here: a shell waits, and what errors need would take most of the time
    try:
        sys.exit(_run())
    except KeyboardInterrupt:  # while something was imported: within a command typer sees to it
        sys.exit(_INTERRUPTED)


def _run() -> int:
    """Run the command; its exit code where it does not exit by itself."""
    from kdkit.api.errors import KdkitError

    try:
        app(args=[text for text in sys.argv[1:] if text != "--debug"], prog_name=_NAME)
    except KdkitError as error:
        from kdkit.cli.output import print_error

        print_error(error)
        return int(error.exit_code)
    return 0
