"""The exceptions a user can meet. Each message names the value that was given, what is allowed, and the way out."""

import signal


class BankwiseError(Exception):
    """Base of every error that a user's input can cause; the CLI prints it as one line and exits with code 2."""


class ConfigError(BankwiseError, ValueError):
    """A setting is outside its range, or contradicts another one."""


class ModelLoadError(BankwiseError):
    """A dense model or a checkpoint cannot be read, or is not of a supported family."""


class DataError(BankwiseError):
    """A text source is missing, empty, or too short for what was asked of it."""


class RoutingError(BankwiseError, ArithmeticError):
    """Router logits are not finite, so no channel choice would mean anything."""


class TrainingError(BankwiseError):
    """Training had to stop; the message names the step and the last good checkpoint."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a command; the message names it, and where training had come to."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM and what is treated like it."""
        return 128 + (signal.SIGINT if self.signum == signal.SIGINT else signal.SIGTERM)


class KernelError(BankwiseError):
    """A fast kernel was asked for that cannot be built, or cannot run this model, device or dtype."""
