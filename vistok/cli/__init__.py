"""The `vistok` command. Bad input ends in one line on stderr and exit code 2; Ctrl-C in 130; never in a traceback."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: without the program's name; None takes the process's own. `--debug` anywhere shows tracebacks.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    # Progress belongs to our own bars; the libraries' are noise in a command line.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    import typer

    from vistok.cli.app import build
    from vistok.errors import VistokError

    # Recent typer carries its own copy of click, so its errors are found through typer's own names.
    click_error = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")
    try:
        result = build().main(args=given, prog_name="vistok", standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == 130:  # typer's own answer to Ctrl-C
            print("vistok: interrupted", file=sys.stderr)
        return code
    except typer.Exit as ending:
        return int(ending.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        print("vistok: interrupted", file=sys.stderr)
        return 130
    except click_error as error:  # type: ignore[misc]
        if not given:  # the help that a bare `vistok` shows
            print(error.format_message(), file=sys.stderr)
            return 2
        return _fail(error.format_message())
    except (VistokError, OSError) as error:
        if debug:
            raise
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"vistok: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
