"""Making an artifact: default vectors, tables and an estimator from text, and the report of what they are worth."""


class CalibrationError(RuntimeError):
    """Calibration cannot start or go on; the message says what to change."""
