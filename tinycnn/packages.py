"""Optional packages."""

import importlib

from config import UserError
from tinycnn.errors import as_user_errors


def require(purpose: str, *packages: str, modules: tuple[str, ...] = ()) -> None:
    """Import the optional `packages`, and `modules` that need them. Raises UserError where one is missing, or is there and
    broken; `purpose`: what needs them."""
    install = f"python -m pip install {' '.join(packages)}"
    for name in (*packages, *modules):
        try:
            with as_user_errors():
                importlib.import_module(name)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            raise UserError(f"{purpose} needs the package {error.name}: {install}") from error
        except Exception as error:  # a broken package may raise anything
            raise UserError(f"{purpose} needs {name}, which is installed and broken ({type(error).__name__}: {error}): "
                            f"reinstall it with {install} --force-reinstall") from error
