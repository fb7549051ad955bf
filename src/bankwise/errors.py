"""The exceptions a user can meet. Each message names the value that was given, what is allowed, and the way out."""


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


class KernelError(BankwiseError):
    """A fast kernel was asked for that cannot be built, or cannot run this model, device or dtype."""
