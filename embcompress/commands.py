"""The commands of ``embcompress``."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str, kind: type, option: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in _split(text))
    except ValueError:
        raise ValueError(f"{option} must be numbers separated by commas, got {text!r}") from None


def _friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of use become one line and exit code 2, Ctrl-C exit code 130."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            print("\nstopped; the same command goes on where it was", file=sys.stderr)
            sys.exit(130)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("embcompress"):
                raise
            sys.exit(f"error: {error}; pip install 'embcompress[bench]'")
        except (ValueError, OSError) as error:
            if "EMBCOMPRESS_DEBUG" in os.environ:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped


DATA_HELP = "click log, e.g. synthetic or ml-100k=DIR; may be given several times"


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="errors with their traceback (or $EMBCOMPRESS_DEBUG)")
    ] = False,
) -> None:
    """Compressed embedding tables for PyTorch."""
    if debug:
        os.environ["EMBCOMPRESS_DEBUG"] = "1"
    if version:
        import embcompress

        print(embcompress.__version__)
        raise typer.Exit


@app.command()
@_friendly
def sweep(
    data: Annotated[list[str], typer.Option(help=DATA_HELP)],
    out: Annotated[Path, typer.Option(help="directory of the results")] = Path("sweep-results"),
    methods: Annotated[str, typer.Option(help="names, or all")] = "full,hash,qr,low_dim",
    budgets: Annotated[str, typer.Option(help="for all tables together")] = "50%,10%,1%",
    seeds: Annotated[str, typer.Option()] = "0",
    model: Annotated[str, typer.Option(help="dlrm, deepfm, dcn or wide_deep")] = "dlrm",
    split: Annotated[str, typer.Option(help="random, time, day or prequential")] = "random",
    validation: Annotated[float, typer.Option(help="share of the rows")] = 0.1,
    test: Annotated[float, typer.Option(help="share of the rows")] = 0.15,
    embedding_dim: Annotated[int, typer.Option()] = 16,
    epochs: Annotated[int, typer.Option(help="at most")] = 8,
    batch_size: Annotated[int, typer.Option()] = 512,
    learning_rates: Annotated[str, typer.Option(help="tried on validation rows")] = (
        "0.01,0.03,0.1"
    ),
    threads: Annotated[int, typer.Option(help="of torch inside an operator")] = 1,
    workers: Annotated[int, typer.Option(help="processes")] = 1,
    plan_seconds: Annotated[float, typer.Option(help="for the planner's short trainings")] = 100.0,
    cache: Annotated[Path | None, typer.Option(help="prepared click logs")] = None,
) -> None:
    """Which method loses least at which memory budget; resumes where it was stopped.

    Exit code 1: some runs failed; the same command tries them again.
    """
    from embcompress.bench.report import print_failures, print_tables, write_report
    from embcompress.bench.settings import SweepSettings, TrainingSettings
    from embcompress.bench.sweep import run_sweep
    from embcompress.methods import methods as known

    settings = SweepSettings(
        tuple(data),
        tuple(known()) if methods == "all" else _split(methods),
        _split(budgets),
        _numbers(seeds, int, "--seeds"),
        TrainingSettings(
            model=model,
            split=split,
            validation=validation,
            test=test,
            embedding_dim=embedding_dim,
            epochs=epochs,
            batch_size=batch_size,
            learning_rates=_numbers(learning_rates, float, "--learning-rates"),
        ),
        threads,
        plan_seconds,
        workers,
    )
    failed = run_sweep(settings, out, cache=cache).failed
    print_tables(write_report(out, "embcompress " + shlex.join(sys.argv[1:])))
    print(f"results, plots and report.html are in {out}")
    if failed:
        print_failures(failed)
        print(f"{len(failed)} runs failed; the same command tries them again", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@_friendly
def report(directory: Annotated[Path, typer.Argument(help="of a sweep")]) -> None:
    """Write the report of a sweep again, from its records."""
    from embcompress.bench.report import print_tables, write_report
    from embcompress.bench.tables import markdown_results

    summaries = write_report(directory)
    print_tables(summaries)
    for summary in summaries:
        print(f"\n{markdown_results(summary)}")


@app.command()
@_friendly
def prepare(
    data: Annotated[list[str], typer.Option(help=DATA_HELP)],
    cache: Annotated[Path | None, typer.Option(help="prepared click logs")] = None,
) -> None:
    """Prepare click logs; goes on where it was stopped."""
    from embcompress.data import load_click_log

    for spec in data:
        log = load_click_log(spec, cache=cache)
        print(
            f"{log.name}: {len(log):,} rows, {len(log.features)} id features of "
            f"{sum(f.num_embeddings for f in log.features):,} ids, {len(log.dense_names)} "
            f"numbers, {log.meta['malformed']} malformed rows left out; in {log.directory}"
        )
        for example in log.meta.get("malformed_examples", []):
            print(f"  malformed: {example}")


@app.command()
@_friendly
def profile(
    data: Annotated[str, typer.Option(help="click log, as for sweep")],
    out: Annotated[Path, typer.Option(help="file of the profile; FILE.png beside it")],
    split: Annotated[str, typer.Option(help="all rows, or the training rows of: time, random")] = (
        "all"
    ),
    seed: Annotated[int, typer.Option(help="of the random split")] = 0,
    cache: Annotated[Path | None, typer.Option(help="prepared click logs")] = None,
) -> None:
    """Counts, tail and drift of the ids of every feature; resumes where it was stopped."""
    from embcompress.statistics.plot import save_plot
    from embcompress.statistics.resume import profile_to_file

    result = profile_to_file(data, out, split=split, seed=seed, cache=cache)  # type: ignore[arg-type]
    print(result)
    for pair in result.pairs()[:5]:
        print(f"{pair.first} and {pair.second} share {pair.bits:.2f} bits ({pair.share:.0%})")
    picture = out.with_name(out.name + ".png")
    save_plot(result, picture)
    print(f"the profile is in {out}, its plot in {picture}")


@app.command()
@_friendly
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="as a Markdown table")] = False,
) -> None:
    """Every method."""
    from embcompress.methods import methods as known
    from embcompress.methods import resolve_method
    from embcompress.text_table import markdown_table, text_table

    header = ("method", "what it does", "procedure")
    rows = [(name, text, resolve_method(name).procedure_kind) for name, text in known().items()]
    if markdown:
        print(markdown_table(header, [(f"`{name}`", *rest) for name, *rest in rows]))
    else:
        print(text_table(header, rows))


@app.command()
@_friendly
def plan(
    rows: Annotated[int, typer.Option(help="number of ids")],
    width: Annotated[int, typer.Option(help="embedding_dim")],
    method: Annotated[str, typer.Option()],
    budget: Annotated[str, typer.Option(help="bytes, or a share such as 5%")],
) -> None:
    """The lookup plan of a method for one table."""
    from embcompress.budget import fit_plan, parse_budget
    from embcompress.methods import TableSpec, resolve_method

    table = TableSpec(rows, width)
    print(fit_plan(resolve_method(method), table, parse_budget(budget, table.dense_bytes)))
