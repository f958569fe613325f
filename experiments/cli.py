"""What every command line shares: flags, one-line errors, the log."""

import logging
import sys
from collections.abc import Callable

import absl.logging
from absl import app, flags
from ml_collections import ConfigDict, config_flags

from s24jax.errors import EXPECTED, InvalidInput


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; an expected error is one line on stderr and status 1."""

    def guarded(argv):
        if argv[1:]:
            _fail(f"{argv[1]!r} is no flag; write --flag=value")
        _show_log()
        try:
            main()
        except EXPECTED as error:
            _fail(error)

    app.run(guarded, flags_parser=_parse)


def define_config(name: str, description: str):
    """A flag that takes a configuration file; its keys can be set with --name.key=value."""
    holder = config_flags.DEFINE_config_file(name, None, description, lock_config=True)
    flags.mark_flag_as_required(name)
    return holder


def load_config(holder: flags.FlagHolder) -> ConfigDict:
    """The configuration of a `define_config` flag.

    Raises:
      InvalidInput: its file does not exist.
    """
    try:
        return holder.value.lock()  # the first use; a file that is missing shows only then
    except OSError as error:
        raise InvalidInput(_no_config(error)) from error


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        if "Traceback" in str(error):  # a configuration file that raised; its last line says what
            _fail(str(error).strip().splitlines()[-1].removeprefix("s24jax.errors."))
        _fail(f"{_one_line(error)}; --help lists the flags")
    except (AttributeError, KeyError) as error:  # ml_collections' words for an unknown key
        key = _one_line(error.args[0]).strip("\"'")
        written = next((arg for arg in argv if f".{key}" in arg), key)
        _fail(f"{written}: the configuration has no key {key!r}; configs/base.py lists the keys")
    except OSError as error:
        _fail(_no_config(error))


def _no_config(error: OSError) -> str:
    return f"{_one_line(error)}; name a file of configs/"


def _one_line(error) -> str:
    return " ".join(str(error).split())


def _show_log() -> None:
    """s24jax's own log on stderr (which implementation an op got, and why); of others, errors."""
    if not flags.FLAGS["verbosity"].present:
        absl.logging.set_verbosity(absl.logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("s24jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _fail(message) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
