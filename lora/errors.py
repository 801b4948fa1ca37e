"""The error of lora/ that means "the user can put this right"."""


class LoraError(ValueError):
    """Bad input: one line that says what was wrong and what to do."""

    def __init__(self, message: object) -> None:
        super().__init__(" ".join(str(message).split()))
