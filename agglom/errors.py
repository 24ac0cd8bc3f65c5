"""Errors a user can act on, and the exit status of each.

| status | meaning |
|---|---|
| 0 | done |
| 2 | wrong configuration or usage (`ConfigError`, `PluginError`) |
| 3 | a comparison's verdict is "no" |
| 4 | data: manifest, images, stored features, checkpoints, a full disk (`DataError`, `CacheError`) |
| 5 | numerics: a loss that is not finite (`NumericsError`) |
| 130 | interrupted; a checkpoint was written (`Interrupted`) |

Messages name the file, the key or the row, say what was expected and what to do.
"""


class AgglomError(Exception):
    """Base of every error that the command line prints without a traceback."""

    exit_status = 1


class ConfigError(AgglomError):
    """The configuration or the command line is wrong."""

    exit_status = 2


class PluginError(AgglomError):
    """A teacher, student or balancer cannot be found, built, or breaks its contract."""

    exit_status = 2


class DataError(AgglomError):
    """The manifest, an image, a checkpoint or the disk is not as it must be."""

    exit_status = 4


class CacheError(DataError):
    """Stored features do not belong to this job."""


class NumericsError(AgglomError):
    """A loss is not finite."""

    exit_status = 5


class Interrupted(AgglomError):
    """The run was asked to stop and left a checkpoint."""

    exit_status = 130


VERDICT_NO = 3
